"""kvheap's kernels and copies: of tensors and addresses, without knowledge of the allocator.

Blocks in a buffer: ``block_copy``. An engine's paged cache: ``paged_copy``. Pieces anywhere:
``pointer_copy`` by a GPU's multiprocessors, ``copy_engine`` by its copy engines, ``host_copy`` by
the host.
"""

from kvheap.kernels.block_copy import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.host_copy import copy_on_host
from kvheap.kernels.paged_copy import Chunks, load_tokens, store_tokens
from kvheap.kernels.paged_layout import LAYOUTS, LayoutError, PagedKVCache
from kvheap.kernels.paged_slots import BlockIds
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy, copy_pieces

__all__ = [
    "LAYOUTS",
    "BlockIds",
    "ChunkLayout",
    "Chunks",
    "LayoutError",
    "PagedKVCache",
    "Pieces",
    "PointerCopy",
    "copy_on_host",
    "copy_pieces",
    "fill_blocks",
    "gather_blocks",
    "load_tokens",
    "move_blocks",
    "scatter_blocks",
    "store_tokens",
]
