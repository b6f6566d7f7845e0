"""``PagedTensorMemoryAllocator``: pages of one fixed size, each holding one block.

Pages do not fragment: any free page fits any block. A batch takes neighbouring pages if it can, so
that copying it takes few runs. The allocator is a ``TensorMemoryAllocator`` on an address space of
pages, and a batch needs no Python work per page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvheap.blocks.memory_allocator import HeapOptions

__all__ = ["PagedTensorMemoryAllocator"]


class PagedTensorMemoryAllocator(TensorMemoryAllocator):
    """Allocates pages, each large enough for one block of a given block layout.

    A smaller block takes a whole page too, but reports its own size.

    Args:
        tensor: the buffer, as for ``TensorMemoryAllocator``. Bytes beyond the last whole page
            stay unused.
        shapes: the shape of a page's block, or a list with the shape of each group.
        dtypes: its dtype, or a list with the dtype of each group.
        fmt: what the dimensions mean.
        options: see ``TensorMemoryAllocator``.

    Raises:
        ValueError: shapes and dtypes are not a block layout, or the buffer is not contiguous.

    >>> heap = PagedTensorMemoryAllocator(torch.zeros(4096, dtype=torch.uint8), [32, 9],
    ...                                   torch.float16)
    >>> heap.num_pages, heap.page_bytes, heap.allocate([5, 9], torch.float16).size_bytes
    (7, 576, 90)
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        shapes: Shapes,
        dtypes: Dtypes,
        fmt: MemoryFormat | str = MemoryFormat.KV_2LTD,
        **options: Unpack[HeapOptions],
    ) -> None:
        options["page_layout"] = BlockLayout.of(shapes, dtypes, fmt)
        super().__init__(tensor, **options)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.address_manager.align_bytes

    @property
    def num_pages(self) -> int:
        """Number of pages, free or allocated."""
        return self.address_manager.get_heap_size() // self.page_bytes
