"""LMCache's memory classes, with its names and signatures, on kvheap's; LMCache is not needed.

Code, or a test file, that says ``from lmcache.v1.memory_management import ...`` runs with
``from kvheap.integrations.lmcache import ...``. Names and signatures are those of LMCache 0.5.6;
``shape`` and ``dtype``, its older keywords, work too. Each class has its kvheap allocator as
``allocator``, for all that LMCache has no name for.

As in LMCache: a full allocator answers None, a negative batch size is a ``RuntimeError``, freeing
again does nothing, and so does freeing plain bytes, or anything after ``close``. What differs:

- a batch is a ``MemoryBatch``, a sequence, but no list: it cannot be sorted or appended to;
- the blocks of one ``batched_allocate`` that are dropped without being freed come back when the
  last of their objects is gone, with the next call; LMCache takes each back at its own end;
- a block that somebody else holds (reference count above one, or pinned) is not freed: that raises
  ``BlockInUseError``; so does a count that would go below zero, a ``LifetimeError``;
- without CUDA, GPU memory is host memory and pinned memory is not pinned; with it, what cannot be
  pinned raises, but for ``LazyMemoryAllocator``;
- the size of a heap is rounded up to its alignment.

``KVHeapMemoryAllocator`` is for the opposite direction, a kvheap allocator inside LMCache; asking
for it imports LMCache. See :mod:`kvheap.integrations.lmcache_adapter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch

import kvheap
from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_batch import BytesBufferMemoryObj, MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryObjMetadata
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


class NUMAMapping(Protocol):
    """Which NUMA node is nearest to which GPU, as LMCache's class of this name."""

    @property
    def gpu_to_numa_mapping(self) -> Mapping[int, int]:
        """NUMA node of each GPU number."""
        ...


class PageArguments(TypedDict, total=False):
    """What a page holds, by LMCache's names and its older ones; unused without paging."""

    shapes: Shapes
    dtypes: Dtypes
    shape: Shapes
    dtype: Dtypes
    fmt: MemoryFormat


class HeapArguments(PageArguments, total=False):
    """What LMCache's heaps in host memory take by keyword, beside the size.

    ``align_bytes`` is unused with pages, and ``device`` always. ``shm_name``, also in ``config``,
    must be None: kvheap shares memory by descriptor.
    """

    align_bytes: int
    device: torch.device | str
    numa_mapping: NUMAMapping | None
    shm_name: str | None
    config: Any


class MemoryAllocatorInterface:
    """LMCache's calls, answered by an allocator of kvheap's.

    Args:
        allocator: who answers. Closed with this object.
    """

    default_fmt = MemoryFormat.KV_2LTD
    """The format of what is allocated without naming one."""

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
        """Allocate one block; None when it does not fit.

        Args:
            shapes: logical shape, or a list of them, one for each group.
            dtypes: logical dtype, or a list of them; unused for plain bytes.
            fmt: what the dimensions mean.
            allocator_type: unused.
            shape: another name of ``shapes``.
            dtype: another name of ``dtypes``.

        Raises:
            ValueError: the shape has no element, or is no shape.
            TypeError: there is no shape, two, or something is no dtype.
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
        """Allocate ``batch_size`` equal blocks, all or none; None when they do not all fit.

        Args and Raises: as for :meth:`allocate`, and

        Raises:
            NegativeBatchSizeError: a ``RuntimeError``: ``batch_size`` is negative.
        """
        if (shapes is None) == (shape is None):
            raise TypeError(f"name one shape, as shapes or shape, got {shapes!r} and {shape!r}")
        if dtypes is not None and dtype is not None:
            raise TypeError(f"name one dtype, as dtypes or dtype, got {dtypes!r} and {dtype!r}")
        chosen_shape: Any = shape if shapes is None else shapes
        chosen_dtype: Any = dtype if dtypes is None else dtypes  # None will do for plain bytes
        fmt = self.default_fmt if fmt is None else fmt
        return self.allocator.batched_allocate(chosen_shape, chosen_dtype, batch_size, fmt)

    def free(self, memory_obj: MemoryObj, allocator_type: str | None = None) -> None:
        """Free one block; nothing happens if it is freed already, or plain bytes.

        Raises:
            BlockInUseError: it is pinned or has more than one reference.
            ForeignObjectError: it belongs to another allocator.
        """
        self.batched_free([memory_obj])

    def batched_free(
        self,
        memory_objs: MemoryBatch | Iterable[MemoryObj],
        allocator_type: str | None = None,
        update_stats: bool = True,
    ) -> None:
        """Free many blocks, all or none, but for those that are freed already, or plain bytes.

        Args:
            memory_objs: a batch, or any blocks of this allocator.
            allocator_type: unused.
            update_stats: unused.

        Raises:
            BlockInUseError, ForeignObjectError: as for :meth:`free`; nothing is freed.
        """
        if self.allocator.closed:  # LMCache's cache engine closes first, then clears
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
        """Release everything. Idempotent."""
        self.allocator.close()

    def __repr__(self) -> str:
        """The class and its kvheap allocator."""
        return f"{type(self).__name__}({self.allocator!r})"

    def __str__(self) -> str:
        """The name of the class."""
        return type(self).__name__


class _Heap(MemoryAllocatorInterface):
    """What all have that are one heap."""

    allocator: kvheap.TensorMemoryAllocator

    @property
    def address_manager(self) -> AddressManager:
        """What is free."""
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
        tensor: the buffer: contiguous, any dtype and shape.
        align_bytes: a power of two; every block starts at a multiple of it.
        init_address_space: how many of its bytes are the heap, until ``address_manager.sbrk``
            adds more; None: all.

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
    """Pages in a tensor, each holding one block of a layout, or a smaller one.

    Args:
        tensor: the buffer: contiguous, any dtype and shape.
        shapes: the shape that a page holds, or a list of them, one for each group.
        dtypes: its dtype, or a list of them.
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
        """Bytes of a page."""
        return self.address_manager.align_bytes


class GPUMemoryAllocator(_Heap):
    """A heap on a device.

    Args:
        size: bytes.
        device: where; without CUDA, in host memory.
        align_bytes: a power of two; every block starts at a multiple of it.
        use_paging: cut the heap into pages.
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
        _refuse_unknown(arguments, PageArguments.__annotations__)
        alignment = AddressManager.ALIGN_BYTES if align_bytes is None else align_bytes
        super().__init__(
            kvheap.GPUMemoryAllocator(
                _whole_units(size, alignment),
                device,
                alignment,
                allow_cpu=True,
                page_layout=_page_layout(use_paging, arguments),
                idempotent_free=True,
            )
        )


class HostMemoryAllocator(_Heap):
    """A heap in host memory that is not pinned.

    Args:
        size: bytes.
        use_paging: cut the heap into pages.
        arguments: see :class:`HeapArguments`.
    """

    def __init__(
        self, size: int, use_paging: bool = False, **arguments: Unpack[HeapArguments]
    ) -> None:
        alignment = _alignment(use_paging, arguments)
        super().__init__(
            kvheap.HostMemoryAllocator(
                _whole_units(size, alignment),
                alignment,
                numa_node=_numa_node(arguments),
                page_layout=_page_layout(use_paging, arguments),
                idempotent_free=True,
            )
        )


class PinMemoryAllocator(_Heap):
    """A heap in pinned host memory; not pinned where there is no CUDA.

    Args:
        size: bytes.
        use_paging: cut the heap into pages.
        arguments: see :class:`HeapArguments`.
    """

    def __init__(
        self, size: int, use_paging: bool = False, **arguments: Unpack[HeapArguments]
    ) -> None:
        super().__init__(_pinned_heap(size, use_paging, False, arguments))


class MixedMemoryAllocator(MemoryAllocatorInterface):
    """Tensors in a pinned heap, plain bytes (``BINARY_BUFFER``) outside it.

    Args:
        size: bytes of the heap.
        use_paging: cut the heap into pages.
        use_hugepages: take huge pages, which the system must have set aside.
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
        """Every tensor starts at a multiple of it; bytes of a page, where there are pages."""

    @property
    def pin_allocator(self) -> kvheap.TensorMemoryAllocator:
        """Where tensors go."""
        return self.allocator.pin_allocator

    @property
    def buffer_allocator(self) -> kvheap.BufferAllocator:
        """Where plain bytes go."""
        return self.allocator.buffer_allocator

    @property
    def buffer(self) -> torch.Tensor:
        """The heap's bytes, uint8."""
        return self.pin_allocator.buffer


class LazyMemoryAllocator(_Heap):
    """A heap in pinned host memory that grows in the background; not pinned without CUDA.

    Args:
        init_size: bytes to begin with.
        final_size: bytes in the end.
        align_bytes: a power of two; every block starts at a multiple of it.
        numa_mapping: take memory of the NUMA node that it names for the current GPU.
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
                _whole_units(final_size, max(align_bytes, PAGE_BYTES)),
                align_bytes,
                pin="if possible" if torch.cuda.is_available() else "no",
                numa_node=_numa_node({"numa_mapping": numa_mapping}),
                idempotent_free=True,
            )
        )

    def get_underlying_buffer(self) -> torch.Tensor:
        """All bytes that the heap will have, uint8."""
        return self.buffer

    def get_address_manager(self) -> AddressManager:
        """``address_manager``."""
        return self.address_manager


class AdHocMemoryAllocator(MemoryAllocatorInterface):
    """Every batch is a tensor of its own, for tests.

    Args:
        device: where; without CUDA, in host memory.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = device if torch.cuda.is_available() else "cpu"
        super().__init__(kvheap.AdHocMemoryAllocator(device, idempotent_free=True))


class BufferAllocator(MemoryAllocatorInterface):
    """Plain bytes, which live as long as their objects.

    Args:
        device: unused: they are in host memory.
    """

    default_fmt = MemoryFormat.BINARY_BUFFER

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(kvheap.BufferAllocator(idempotent_free=True))


def _pinned_heap(
    size: int, use_paging: bool, use_hugepages: bool, arguments: HeapArguments
) -> kvheap.PinMemoryAllocator:
    alignment = _alignment(use_paging, arguments)
    return kvheap.PinMemoryAllocator(
        _whole_units(size, alignment),
        alignment,
        huge_pages="explicit" if use_hugepages else "none",
        numa_node=_numa_node(arguments),
        allow_unpinned=not torch.cuda.is_available(),
        page_layout=_page_layout(use_paging, arguments),
        idempotent_free=True,
    )


def _page_layout(use_paging: bool, arguments: PageArguments) -> BlockLayout | None:
    """What a page holds; None without paging."""
    if not use_paging:
        return None
    shapes = arguments.get("shapes", arguments.get("shape"))
    dtypes = arguments.get("dtypes", arguments.get("dtype"))
    fmt = arguments.get("fmt")
    if shapes is None or dtypes is None or fmt is None:
        raise ValueError(f"paging needs shapes, dtypes and fmt, got {shapes}, {dtypes} and {fmt}")
    return BlockLayout.of(shapes, dtypes, fmt)


def _alignment(use_paging: bool, arguments: HeapArguments) -> int:
    """The alignment of a heap in host memory, which must be one that kvheap can make."""
    _refuse_unknown(arguments, HeapArguments.__annotations__)
    config = arguments.get("config")
    shm_name = arguments.get("shm_name")
    if shm_name is None and config is not None:
        shm_name = config.get_extra_config_value("shm_name", None)
    if shm_name is not None:
        raise ValueError(
            f"kvheap's memory has no name, got shm_name {shm_name!r}: share it by descriptor, with "
            f"kvheap.HostMemoryAllocator(shared=True)"
        )
    default = AddressManager.ALIGN_BYTES
    return default if use_paging else arguments.get("align_bytes", default)


def _refuse_unknown(arguments: PageArguments, known: Iterable[str]) -> None:
    unknown = arguments.keys() - set(known)
    if unknown:
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")


def _numa_node(arguments: HeapArguments) -> int | None:
    """The NUMA node of the current GPU, or of GPU 0 without CUDA; None when it does not matter."""
    mapping = arguments.get("numa_mapping")
    if mapping is None:
        return None
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
    if gpu not in mapping.gpu_to_numa_mapping:
        raise KeyError(f"GPU {gpu} is not in the NUMA mapping {mapping!r}")
    return mapping.gpu_to_numa_mapping[gpu]


def _whole_units(size: int, unit_bytes: int) -> int:
    """``size`` rounded up; what is wrong with either, the allocator will say."""
    size, unit_bytes = as_integer("size", size), as_integer("align_bytes", unit_bytes)
    return -(-size // unit_bytes) * unit_bytes if size > 0 < unit_bytes else size


def __getattr__(name: str) -> Any:
    if name != "KVHeapMemoryAllocator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvheap.integrations.lmcache_adapter import lmcache_classes

    return lmcache_classes().allocator
