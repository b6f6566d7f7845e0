"""kvheap's kernels and copies. They work on tensors and addresses and do not know the allocator.

``block_copy`` copies blocks of a buffer, and ``paged_copy`` copies to and from an engine's paged
cache. Pieces anywhere in memory are copied by a GPU's multiprocessors (``pointer_copy``,
``bulk_copy``), by its copy engines (``copy_engine``) or by the host (``host_copy``).
"""

from kvheap.kernels.block_copy import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.bulk_copy import BulkCopy
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.chunk_shape import ChunkShape
from kvheap.kernels.host_copy import copy_on_host
from kvheap.kernels.paged_copy import Chunks, load_tokens, store_tokens
from kvheap.kernels.paged_layout import LAYOUTS, LayoutError, PagedKVCache
from kvheap.kernels.paged_slots import BlockIds
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy, copy_pieces

__all__ = [
    "LAYOUTS",
    "BlockIds",
    "BulkCopy",
    "ChunkLayout",
    "ChunkShape",
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
