"""Heaps in host memory: plain, pinned, and pinned beside plain bytes.

Memory comes from ``HostBuffer``; what is pinned is registered with CUDA
in pieces, and no block straddles two of them, since CUDA copies no range that does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.lifetime import LiveBlocks
from kvheap.blocks.memory_allocator import MemoryAllocatorInterface
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_object import BytesBufferMemoryObj, MemoryObj
from kvheap.errors import ForeignObjectError
from kvheap.heaps.plain_allocators import BufferAllocator
from kvheap.heaps.tensor_allocator import AllocatorStats, TensorMemoryAllocator
from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.pages import PAGE_BYTES, HugePages
from kvheap.memory.registrar import HostRegistrar

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvheap.blocks.memory_allocator import HeapOptions
    from kvheap.device.copy_device import CopyDevice

__all__ = ["HostMemoryAllocator", "MixedMemoryAllocator", "PinMemoryAllocator"]

PIECE_BYTES = 64 << 30
"""Bytes of one registration: current drivers refuse a very large one, and beside 64 GiB what the
last block before a boundary wastes is nothing."""


class HostHeap(TensorMemoryAllocator):
    """A heap whose bytes are a ``HostBuffer``; the base of those here."""

    host_buffer: HostBuffer
    """Where the bytes are; closed with the heap."""

    def _pinned_bytes(self) -> int:
        return self.host_buffer.pinned_bytes

    def _pinned_addresses(self, device: CopyDevice) -> Int64Array:
        ranges = self.host_buffer.pinned_addresses
        return ranges if len(ranges) else super()._pinned_addresses(device)

    def _close(self) -> None:
        super()._close()
        self.host_buffer.close()


class HostMemoryAllocator(HostHeap):
    """A heap in host memory that is not pinned, or shared with other processes.

    Args:
        size: bytes of the heap; rounded down to the alignment.
        align_bytes: a power of two; every block starts at a multiple of it, as an address in the
            heap and in memory.
        huge_pages: ``"none"``, ``"transparent"`` or ``"explicit"``; see ``HostBuffer``.
        numa_node: take memory of this node only.
        populate: commit all memory now, on several threads, instead of page by page at first use.
        shared: memory that other processes map through ``host_buffer.fd``.
        host_buffer: a buffer of your own, which the allocator closes; instead of all that says
            where memory comes from. ``size`` is then how much of it is the heap.
        options: see ``TensorMemoryAllocator``.

    Raises:
        ValueError: an argument is wrong.
        OSError: the memory cannot be had.

    >>> with HostMemoryAllocator(1 << 20) as heap:
    ...     obj = heap.allocate([16], torch.float16)
    """

    def __init__(
        self,
        size: int,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        *,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
        populate: bool = False,
        shared: bool = False,
        host_buffer: HostBuffer | None = None,
        **options: Unpack[HeapOptions],
    ) -> None:
        if host_buffer is None:
            host_buffer = _reserve(size, align_bytes, huge_pages, numa_node, shared)
        self.host_buffer = host_buffer
        try:
            if populate:
                host_buffer.populate(0, size)
            super().__init__(host_buffer.tensor[:size], align_bytes, **options)
        except BaseException:
            host_buffer.close()
            raise


class PinMemoryAllocator(HostHeap):
    """A heap in pinned host memory.

    Args:
        size: bytes of the heap; rounded down to the alignment.
        align_bytes: a power of two; every block starts at a multiple of it, as an address in the
            heap and in memory.
        huge_pages: ``"none"``, ``"transparent"`` or ``"explicit"``; see ``HostBuffer``.
        numa_node: take memory of this node only; ``numa_node_of_gpu`` tells a GPU's.
        allow_unpinned: go on with what cannot be pinned, visible as ``stats().pinned_bytes``.
        registrar: who pins; None: CUDA.
        piece_bytes: bytes of one registration at most, a multiple of the alignment.
        options: see ``TensorMemoryAllocator``.

    Raises:
        ValueError: an argument is wrong.
        OSError: the memory cannot be had.
        RuntimeError: something could not be pinned, or there is no CUDA, and ``allow_unpinned``
            is false.

    >>> with PinMemoryAllocator(1 << 20, allow_unpinned=True) as heap:
    ...     obj = heap.allocate([16], torch.float16)
    """

    def __init__(
        self,
        size: int,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        *,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
        allow_unpinned: bool = False,
        registrar: HostRegistrar | None = None,
        piece_bytes: int = PIECE_BYTES,
        **options: Unpack[HeapOptions],
    ) -> None:
        self.host_buffer = _reserve(size, align_bytes, huge_pages, numa_node, shared=False)
        try:
            manager, granule = empty_address_space(align_bytes, options.get("page_layout"))
            piece_bytes = max(piece_bytes // granule, 1) * granule
            self.host_buffer.pin(
                0,
                size,
                registrar=registrar,
                piece_bytes=piece_bytes,
                allow_unpinned=allow_unpinned,
            )
            usable = size // manager.align_bytes * manager.align_bytes
            for start in range(0, usable, piece_bytes):
                manager.sbrk(min(piece_bytes, usable - start), new_segment=True)
            super().__init__(self.host_buffer.tensor, address_manager=manager, **options)
        except BaseException:
            self.host_buffer.close()
            raise


class MixedMemoryAllocator(MemoryAllocatorInterface):
    """Tensors in a heap, typically pinned; plain bytes, of format ``BINARY_BUFFER``, outside it.

    Args:
        pin_allocator: where tensors go. Closed with this allocator.
        buffer_allocator: where bytes go.

    >>> mixed = MixedMemoryAllocator(PinMemoryAllocator(1 << 20, allow_unpinned=True))
    >>> len(mixed.allocate([100], None, MemoryFormat.BINARY_BUFFER).byte_view)
    100
    >>> mixed.close()
    """

    def __init__(
        self,
        pin_allocator: TensorMemoryAllocator,
        buffer_allocator: BufferAllocator | None = None,
    ) -> None:
        self.pin_allocator = pin_allocator
        self.buffer_allocator = buffer_allocator or BufferAllocator()

    def _allocator_of(self, fmt: MemoryFormat) -> MemoryAllocatorInterface:
        if fmt is MemoryFormat.BINARY_BUFFER:
            return self.buffer_allocator
        if fmt is MemoryFormat.UNDEFINED:
            raise ValueError(f"a mixed allocator needs to know the format, got {fmt}")
        return self.pin_allocator

    def batched_allocate(
        self,
        shape: Shapes,
        dtype: Dtypes,
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """``batched_allocate`` of the allocator that ``fmt`` belongs to.

        Raises:
            ValueError: ``fmt`` is ``UNDEFINED``, or another argument wrong; nothing is allocated.
        """
        self._require_open()
        chosen = self._allocator_of(fmt)
        return chosen.batched_allocate(shape, dtype, batch_size, fmt, source, allow_partial)

    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """``batched_free`` of the allocator that the blocks belong to; they must share one.

        Raises:
            ForeignObjectError: they belong to both allocators, or to another; nothing is freed.
        """
        self._require_open()
        if isinstance(objs, MemoryBatch):
            is_buffer = isinstance(objs.allocator, BufferAllocator)
        else:
            objs = list(objs)
            kinds = {isinstance(obj, BytesBufferMemoryObj) for obj in objs}
            if len(kinds) > 1:
                raise ForeignObjectError("tensors and plain bytes cannot be freed in one call")
            is_buffer = True in kinds
        (self.buffer_allocator if is_buffer else self.pin_allocator).batched_free(objs, out)

    def stats(self) -> AllocatorStats:
        """``stats`` of the heap."""
        self._require_open()
        return self.pin_allocator.stats()

    def leaks(self) -> tuple[LiveBlocks, ...]:
        """All live blocks of both, the oldest first."""
        both = self.pin_allocator.leaks() + self.buffer_allocator.leaks()
        return tuple(sorted(both, key=lambda group: -group.age_s))

    def memcheck(self) -> bool:
        """Whether every invariant of the heap holds."""
        self._require_open()
        return self.pin_allocator.memcheck()

    def _bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        raise ForeignObjectError(f"{batch!r} belongs to another allocator")

    def _close(self) -> None:
        try:
            self.pin_allocator.close()
        finally:
            self.buffer_allocator.close()

    def __repr__(self) -> str:
        """Both allocators."""
        return f"MixedMemoryAllocator({self.pin_allocator!r}, {self.buffer_allocator!r})"


def empty_address_space(
    align_bytes: int, page_layout: BlockLayout | None
) -> tuple[AddressManager, int]:
    """An address space to be grown, and the bytes by which pinned pieces of it may be cut.

    Those are whole units of the address space and whole pages of memory.
    """
    if page_layout is None:
        manager = AddressManager(0, align_bytes)
    else:
        manager = AddressManager.of_pages(0, page_layout.size_bytes)
    return manager, math.lcm(manager.align_bytes, PAGE_BYTES)


def _reserve(
    size: int, align_bytes: int, huge_pages: HugePages, numa_node: int | None, shared: bool
) -> HostBuffer:
    size, align_bytes = as_integer("size", size), as_integer("align_bytes", align_bytes)
    if shared:
        return HostBuffer.shared(
            size, align_bytes=align_bytes, huge_pages=huge_pages, numa_node=numa_node
        )
    return HostBuffer(size, align_bytes=align_bytes, huge_pages=huge_pages, numa_node=numa_node)
