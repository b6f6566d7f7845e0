"""kvheap's kernels: they know tensors, addresses and layouts, and nothing of the allocator."""

from kvheap.kernels.block_copy import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.host_copy import copy_on_host
from kvheap.kernels.paged_copy import Chunks, load_tokens, store_tokens
from kvheap.kernels.paged_layout import LAYOUTS, LayoutError, PagedKVCache
from kvheap.kernels.paged_plan import ChunkLayout
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
