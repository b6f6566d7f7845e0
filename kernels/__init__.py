"""kvheap's kernels: they know tensors, addresses and layouts, and nothing of the allocator."""

from kvheap.kernels.block_copy import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.paged_copy import Chunks, load_tokens, store_tokens
from kvheap.kernels.paged_layout import LAYOUTS, LayoutError, PagedKVCache
from kvheap.kernels.paged_plan import ChunkLayout
from kvheap.kernels.paged_slots import BlockIds

__all__ = [
    "LAYOUTS",
    "BlockIds",
    "ChunkLayout",
    "Chunks",
    "LayoutError",
    "PagedKVCache",
    "fill_blocks",
    "gather_blocks",
    "load_tokens",
    "move_blocks",
    "scatter_blocks",
    "store_tokens",
]
