"""LMCache's allocator classes, with its names and signatures, over kvheap's; needs no LMCache.

Code or tests with ``from lmcache.v1.memory_management import ...`` also run with
``from kvheap.integrations.lmcache import ...``. Names and signatures are those of LMCache 0.5.6;
``shape`` and ``dtype``, its older keywords, work too. Each class has the kvheap allocator that it
wraps as its attribute ``allocator``, for everything that LMCache has no name for.

As in LMCache: a full allocator returns None, a negative batch size is a ``RuntimeError``, and
freeing does nothing for a block that is already freed, for plain bytes, or after ``close``. The
differences:

- a batch is a ``MemoryBatch``: a sequence, but not a list, so it cannot be sorted or appended to;
- if the blocks of one ``batched_allocate`` are dropped without being freed, they return to the heap
  together, at the first call after the last of their objects is gone; LMCache takes back each block
  when its own object is gone;
- freeing a block that has other holders (a reference count above one, or a pin) raises
  ``BlockInUseError``; lowering a count below zero raises ``LifetimeError``;
- without CUDA, GPU memory is host memory, and pinned memory is not pinned; with CUDA, it is an
  error if memory cannot be pinned, except in ``LazyMemoryAllocator``;
- the size of a heap is rounded up to its alignment.

``KVHeapMemoryAllocator`` is the opposite: a kvheap allocator for use inside LMCache. Reading this
name imports LMCache. See :mod:`kvheap.integrations.lmcache_adapter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

import kvheap
from kvheap.addresses.address_manager import AddressManager
from kvheap.blocks.block_layout import Dtypes, Shapes
from kvheap.blocks.memory_batch import BytesBufferMemoryObj, MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryObjMetadata
from kvheap.integrations.lmcache_arguments import HeapArguments as HeapArguments
from kvheap.integrations.lmcache_arguments import NUMAMapping as NUMAMapping
from kvheap.integrations.lmcache_arguments import PageArguments as PageArguments
from kvheap.integrations.lmcache_arguments import (
    alignment_of,
    numa_node_of,
    page_layout_of,
    refuse_unknown,
    whole_units,
)
from kvheap.memory.pages import PAGE_BYTES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    KVHeapMemoryAllocator: type[Any]

__all__ = [
    "AdHocMemoryAllocator",
    "AddressManager",
    "BufferAllocator",
    "BytesBufferMemoryObj",
    "GPUMemoryAllocator",
    "HostMemoryAllocator",
    "LazyMemoryAllocator",
    "MemoryAllocatorInterface",
    "MemoryFormat",
    "MemoryObj",
    "MemoryObjMetadata",
    "MixedMemoryAllocator",
    "PagedTensorMemoryAllocator",
    "PinMemoryAllocator",
    "TensorMemoryAllocator",
    "TensorMemoryObj",
]

TensorMemoryObj = MemoryObj


class MemoryAllocatorInterface:
    """LMCache's methods over an allocator of kvheap.

    Args:
        allocator: the kvheap allocator that does the work. Closed with this object.
    """

    default_fmt = MemoryFormat.KV_2LTD
    """The format of a block that is allocated without one."""

    def __init__(self, allocator: kvheap.MemoryAllocatorInterface) -> None:
        self.allocator = allocator

    def allocate(
        self,
        shapes: Shapes | None = None,
        dtypes: Dtypes | None = None,
        fmt: MemoryFormat | None = None,
        allocator_type: str | None = None,
        *,
        shape: Shapes | None = None,
        dtype: Dtypes | None = None,
    ) -> MemoryObj | None:
        """Allocate one block; returns None if it does not fit.

        Args:
            shapes: logical shape, or a list of shapes, one for each group.
            dtypes: logical dtype, or a list of dtypes; unused for plain bytes.
            fmt: what the dimensions mean.
            allocator_type: unused.
            shape: another name for ``shapes``.
            dtype: another name for ``dtypes``.

        Raises:
            ValueError: the shape has no element, or is not a shape.
            TypeError: neither ``shapes`` nor ``shape`` is given, or both are, or both ``dtypes``
                and ``dtype`` are, or one of the dtypes is not a dtype.
        """
        batch = self.batched_allocate(shapes, dtypes, 1, fmt, shape=shape, dtype=dtype)
        return None if batch is None else batch[0]

    def batched_allocate(
        self,
        shapes: Shapes | None = None,
        dtypes: Dtypes | None = None,
        batch_size: int = 1,
        fmt: MemoryFormat | None = None,
        allocator_type: str | None = None,
        *,
        shape: Shapes | None = None,
        dtype: Dtypes | None = None,
    ) -> MemoryBatch | None:
        """Allocate ``batch_size`` equal blocks, all or none; returns None if they do not all fit.

        The other arguments are those of :meth:`allocate`.

        Raises:
            ValueError, TypeError: as in :meth:`allocate`.
            NegativeBatchSizeError: ``batch_size`` is negative. A ``RuntimeError``.
        """
        if (shapes is None) == (shape is None):
            raise TypeError(
                f"give the shape once, as shapes or as shape, got shapes={shapes!r} and "
                f"shape={shape!r}"
            )
        if dtypes is not None and dtype is not None:
            raise TypeError(
                f"give the dtype once, as dtypes or as dtype, got dtypes={dtypes!r} and "
                f"dtype={dtype!r}"
            )
        chosen_shape: Any = shape if shapes is None else shapes
        chosen_dtype: Any = dtype if dtypes is None else dtypes  # plain bytes need none
        fmt = self.default_fmt if fmt is None else fmt
        return self.allocator.batched_allocate(chosen_shape, chosen_dtype, batch_size, fmt)

    def free(self, memory_obj: MemoryObj, allocator_type: str | None = None) -> None:
        """Free one block. Does nothing if the block is already freed, or is plain bytes.

        Args:
            memory_obj: the block.
            allocator_type: unused.

        Raises:
            BlockInUseError: the block is pinned or has more than one reference.
            ForeignObjectError: the block belongs to another allocator.
        """
        self.batched_free([memory_obj])

    def batched_free(
        self,
        memory_objs: MemoryBatch | Iterable[MemoryObj],
        allocator_type: str | None = None,
        update_stats: bool = True,
    ) -> None:
        """Free many blocks, all or none. Skips blocks that are already freed, and plain bytes.

        Args:
            memory_objs: a batch, or any blocks of this allocator.
            allocator_type: unused.
            update_stats: unused.

        Raises:
            BlockInUseError, ForeignObjectError: as in :meth:`free`; nothing is freed.
        """
        if self.allocator.closed:  # LMCache's cache engine closes its allocator, then frees
            return
        if not isinstance(memory_objs, MemoryBatch):
            tensors = [obj for obj in memory_objs if not isinstance(obj, BytesBufferMemoryObj)]
            self.allocator.batched_free(tensors)
        elif memory_objs.allocator.object_type is not BytesBufferMemoryObj:
            self.allocator.batched_free(memory_objs)

    def memcheck(self) -> bool:
        """Whether every invariant of the allocator holds."""
        return self.allocator.memcheck()

    def close(self) -> None:
        """Release all memory. Calling it again does nothing."""
        self.allocator.close()

    def __repr__(self) -> str:
        """The class, and the kvheap allocator."""
        return f"{type(self).__name__}({self.allocator!r})"

    def __str__(self) -> str:
        """The name of the class."""
        return type(self).__name__


class _Heap(MemoryAllocatorInterface):
    """An allocator over one heap."""

    allocator: kvheap.TensorMemoryAllocator

    @property
    def address_manager(self) -> AddressManager:
        """The free list of the heap."""
        return self.allocator.address_manager

    @property
    def total_allocated_size(self) -> int:
        """Allocated bytes."""
        return self.allocator.total_allocated_size

    @property
    def buffer(self) -> torch.Tensor:
        """The heap's bytes, uint8."""
        return self.allocator.buffer


class TensorMemoryAllocator(_Heap):
    """A heap in a tensor.

    Args:
        tensor: the buffer: contiguous, of any dtype and shape.
        align_bytes: a power of two; every block starts at a multiple of it.
        init_address_space: how many bytes of the buffer the heap uses until
            ``address_manager.sbrk`` adds more; None for all of them.

    >>> heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
    >>> obj = heap.allocate([2, 3], dtype=torch.float16)
    >>> obj.tensor.shape, heap.total_allocated_size
    (torch.Size([2, 3]), 4096)
    >>> heap.free(obj)
    >>> heap.free(obj)
    >>> obj.tensor, heap.total_allocated_size
    (None, 0)
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        init_address_space: int | None = None,
    ) -> None:
        manager = None
        if init_address_space is not None:
            manager = AddressManager(init_address_space, align_bytes)
        super().__init__(
            kvheap.TensorMemoryAllocator(
                tensor, align_bytes, address_manager=manager, idempotent_free=True
            )
        )


class PagedTensorMemoryAllocator(_Heap):
    """Pages in a tensor. A page holds one block of the given layout, or one smaller block.

    Args:
        tensor: the buffer: contiguous, of any dtype and shape.
        shapes: the shape of the block that fills a page, or a list of shapes, one for each group.
        dtypes: its dtype, or a list of dtypes.
        fmt: what the dimensions mean.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        shapes: Shapes,
        dtypes: Dtypes,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
    ) -> None:
        super().__init__(
            kvheap.PagedTensorMemoryAllocator(tensor, shapes, dtypes, fmt, idempotent_free=True)
        )

    @property
    def align_bytes(self) -> int:
        """The size of a page, bytes."""
        return self.address_manager.align_bytes


class GPUMemoryAllocator(_Heap):
    """A heap on a device.

    Args:
        size: bytes; rounded up to the alignment.
        device: the device of the heap; without CUDA, the heap is in host memory.
        align_bytes: a power of two; every block starts at a multiple of it.
        use_paging: divide the heap into pages.
        arguments: see :class:`PageArguments`.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cuda",
        align_bytes: int | None = None,
        use_paging: bool = False,
        **arguments: Unpack[PageArguments],
    ) -> None:
        refuse_unknown(arguments, PageArguments.__annotations__)
        alignment = AddressManager.ALIGN_BYTES if align_bytes is None else align_bytes
        super().__init__(
            kvheap.GPUMemoryAllocator(
                whole_units(size, alignment),
                device,
                alignment,
                allow_cpu=True,
                page_layout=page_layout_of(use_paging, arguments),
                idempotent_free=True,
            )
        )


class HostMemoryAllocator(_Heap):
    """A heap in host memory that is not pinned.

    Args:
        size: bytes; rounded up to the alignment.
        use_paging: divide the heap into pages.
        arguments: see :class:`HeapArguments`.
    """

    def __init__(
        self, size: int, use_paging: bool = False, **arguments: Unpack[HeapArguments]
    ) -> None:
        alignment = alignment_of(use_paging, arguments)
        super().__init__(
            kvheap.HostMemoryAllocator(
                whole_units(size, alignment),
                alignment,
                numa_node=numa_node_of(arguments),
                page_layout=page_layout_of(use_paging, arguments),
                idempotent_free=True,
            )
        )


class PinMemoryAllocator(_Heap):
    """A heap in pinned host memory, which is not pinned without CUDA.

    Args:
        size: bytes; rounded up to the alignment.
        use_paging: divide the heap into pages.
        arguments: see :class:`HeapArguments`.
    """

    def __init__(
        self, size: int, use_paging: bool = False, **arguments: Unpack[HeapArguments]
    ) -> None:
        super().__init__(_pinned_heap(size, use_paging, False, arguments))


class MixedMemoryAllocator(MemoryAllocatorInterface):
    """Tensors in a pinned heap, plain bytes (``BINARY_BUFFER``) outside it.

    Args:
        size: bytes of the heap; rounded up to the alignment.
        use_paging: divide the heap into pages.
        use_hugepages: use huge pages, which must be reserved in the system.
        arguments: see :class:`HeapArguments`.

    >>> mixed = MixedMemoryAllocator(1 << 20)
    >>> len(mixed.allocate([512], [], MemoryFormat.BINARY_BUFFER).byte_array)
    512
    >>> mixed.close()
    """

    allocator: kvheap.MixedMemoryAllocator

    def __init__(
        self,
        size: int,
        use_paging: bool = False,
        use_hugepages: bool = False,
        **arguments: Unpack[HeapArguments],
    ) -> None:
        pinned = _pinned_heap(size, use_paging, use_hugepages, arguments)
        super().__init__(kvheap.MixedMemoryAllocator(pinned))
        self.align_bytes = pinned.address_manager.align_bytes
        """Every tensor starts at a multiple of it. With pages, the size of a page."""

    @property
    def pin_allocator(self) -> kvheap.TensorMemoryAllocator:
        """The heap, which holds the tensors."""
        return self.allocator.pin_allocator

    @property
    def buffer_allocator(self) -> kvheap.BufferAllocator:
        """The allocator of plain bytes."""
        return self.allocator.buffer_allocator

    @property
    def buffer(self) -> torch.Tensor:
        """The heap's bytes, uint8."""
        return self.pin_allocator.buffer


class LazyMemoryAllocator(_Heap):
    """A heap in pinned host memory that grows in the background; not pinned without CUDA.

    Args:
        init_size: bytes that are usable at once.
        final_size: bytes after the growth; rounded up to the alignment and to whole memory pages.
        align_bytes: a power of two; every block starts at a multiple of it.
        numa_mapping: the NUMA node of each GPU; memory is on the node of the current GPU.
    """

    allocator: kvheap.LazyMemoryAllocator
    default_fmt = MemoryFormat.UNDEFINED

    def __init__(
        self,
        init_size: int,
        final_size: int,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        numa_mapping: NUMAMapping | None = None,
    ) -> None:
        super().__init__(
            kvheap.LazyMemoryAllocator(
                init_size,
                whole_units(final_size, max(align_bytes, PAGE_BYTES)),
                align_bytes,
                pin="if possible" if torch.cuda.is_available() else "no",
                numa_node=numa_node_of({"numa_mapping": numa_mapping}),
                idempotent_free=True,
            )
        )

    def get_underlying_buffer(self) -> torch.Tensor:
        """The bytes of the heap at its final size, uint8."""
        return self.buffer

    def get_address_manager(self) -> AddressManager:
        """The ``address_manager``."""
        return self.address_manager


class AdHocMemoryAllocator(MemoryAllocatorInterface):
    """Allocates a tensor for each batch; for tests.

    Args:
        device: the device of the tensors; without CUDA, they are in host memory.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = device if torch.cuda.is_available() else "cpu"
        super().__init__(kvheap.AdHocMemoryAllocator(device, idempotent_free=True))


class BufferAllocator(MemoryAllocatorInterface):
    """Plain bytes in host memory, which live as long as their objects.

    Args:
        device: unused.
    """

    default_fmt = MemoryFormat.BINARY_BUFFER

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(kvheap.BufferAllocator(idempotent_free=True))


def _pinned_heap(
    size: int, use_paging: bool, use_hugepages: bool, arguments: HeapArguments
) -> kvheap.PinMemoryAllocator:
    alignment = alignment_of(use_paging, arguments)
    return kvheap.PinMemoryAllocator(
        whole_units(size, alignment),
        alignment,
        huge_pages="explicit" if use_hugepages else "none",
        numa_node=numa_node_of(arguments),
        allow_unpinned=not torch.cuda.is_available(),
        page_layout=page_layout_of(use_paging, arguments),
        idempotent_free=True,
    )


def __getattr__(name: str) -> Any:
    if name != "KVHeapMemoryAllocator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvheap.integrations.lmcache_adapter import lmcache_classes

    return lmcache_classes().allocator
