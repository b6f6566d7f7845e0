"""``PagedTensorMemoryAllocator``: pages of one fixed size, each holding one block.

Pages never fragment: any free page will do, and a batch takes neighbours where it can, so that a
copy of it has few runs. It is :class:`~kvheap.tensor_allocator.TensorMemoryAllocator` on an
address space of pages, and as cheap: a batch costs no Python work per page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvheap.address_manager import AddressManager
from kvheap.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.memory_format import MemoryFormat
from kvheap.tensor_allocator import TensorMemoryAllocator

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvheap.memory_allocator import HeapOptions

__all__ = ["PagedTensorMemoryAllocator", "pages_of"]


class PagedTensorMemoryAllocator(TensorMemoryAllocator):
    """Allocates pages, each large enough for one block of a given layout.

    A smaller block takes a page too, and reports its own size.

    Args:
        tensor: the buffer, as for ``TensorMemoryAllocator``. Bytes beyond the last whole page
            stay unused.
        shapes: the shape that a page holds, or a list of them, one for each group.
        dtypes: its dtype, or a list of them.
        fmt: what the dimensions mean.
        options: see :class:`~kvheap.tensor_allocator.TensorMemoryAllocator`.

    Raises:
        ValueError: the layout is no layout, or the buffer not contiguous.

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
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        **options: Unpack[HeapOptions],
    ) -> None:
        self.page_layout = BlockLayout.of(shapes, dtypes, fmt)
        """What a page holds."""
        num_bytes = tensor.numel() * tensor.element_size()
        manager = pages_of(num_bytes, self.page_layout)
        super().__init__(tensor, address_manager=manager, **options)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_layout.size_bytes

    @property
    def num_pages(self) -> int:
        """How many pages there are, free or not."""
        return self.address_manager.get_heap_size() // self.page_bytes

    def _layout(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat) -> BlockLayout:
        layout = super()._layout(shape, dtype, fmt)
        if layout.size_bytes > self.page_bytes:
            raise ValueError(
                f"{layout} has {layout.size_bytes} bytes, more than a page of {self.page_bytes}"
            )
        return layout


def pages_of(num_bytes: int, layout: BlockLayout) -> AddressManager:
    """An address space of as many pages of ``layout`` as ``num_bytes`` hold."""
    return AddressManager.of_pages(num_bytes // layout.size_bytes, layout.size_bytes)
