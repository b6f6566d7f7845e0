"""kvheap's kernels: they know tensors, addresses and layouts, and nothing of the allocator."""

from kvheap.kernels.block_copy import fill_blocks, gather_blocks, move_blocks, scatter_blocks

__all__ = ["fill_blocks", "gather_blocks", "move_blocks", "scatter_blocks"]
