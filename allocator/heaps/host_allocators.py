"""Heaps in host memory, plain or pinned.

Memory comes from ``HostBuffer``. Pinned memory is registered with CUDA in pieces. No block
straddles two pieces, since CUDA cannot copy a range that does.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.arguments import require_count, require_flags
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout
from kvheap.heaps.options import require_size
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.memory.host_memory import HostBuffer
from kvheap.memory.host_registration import REGISTRATION_BYTES
from kvheap.memory.pages import PAGE_BYTES, HugePages
from kvheap.memory.registrar import HostRegistrar, require_registrar
from kvheap.memory.shared_files import open_shared_file

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Unpack

    from kvheap.blocks.memory_allocator import HeapOptions
    from kvheap.device.copy_device import CopyDevice

__all__ = ["HostMemoryAllocator", "PinMemoryAllocator"]


class HostHeap(TensorMemoryAllocator):
    """A heap in a ``HostBuffer``; the base class of the heaps in host memory."""

    host_buffer: HostBuffer
    """The heap's memory; closed with the heap."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the buffer that are page-locked."""
        return self.host_buffer.pinned_bytes

    def pinned_addresses(self, device: CopyDevice) -> Int64Array:
        """The absolute ranges that ``device`` can reach: the registrations, int64 ``[R, 2]``."""
        ranges = self.host_buffer.pinned_addresses
        return ranges if len(ranges) else super().pinned_addresses(device)

    def close_memory(self, timeout_s: float) -> None:
        """Wait until no stream uses the buffer, then unpin and unmap it."""
        super().close_memory(timeout_s)
        self.host_buffer.close()


class HostMemoryAllocator(HostHeap):
    """A heap in plain host memory, private or shared with other processes.

    Args:
        size: bytes of the heap; rounded down to the alignment.
        align_bytes: a power of two; the heap address and the absolute address of every block are
            multiples of it.
        huge_pages: ``"none"``, ``"if possible"``, ``"transparent"`` or ``"explicit"``; see
            ``HostBuffer``.
        numa_node: take memory of this node only.
        populate: commit all memory now, on several threads, instead of page by page at first use.
        shared: use memory that other processes can map: see :meth:`attach`.
        host_buffer: a buffer of your own, which replaces the arguments that describe memory. The
            heap is its first ``size`` bytes, and the allocator closes it. If it maps a file by
            ``fd``, the heap is view-only, since another process may keep the books; the one process
            that is to keep them passes ``view_only=False``.
        options: see ``TensorMemoryAllocator``.

    Raises:
        ValueError: an argument is wrong.
        OSError: the system does not provide the memory.

    >>> import torch
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
        require_flags(populate=populate, shared=shared)
        size = require_size(size, align_bytes, options.get("page_layout"))
        if host_buffer is None:
            host_buffer = _reserve(size, align_bytes, huge_pages, numa_node, shared)
        elif not isinstance(host_buffer, HostBuffer):
            raise TypeError(f"host_buffer must be a HostBuffer, got {host_buffer!r}")
        elif size > host_buffer.size_bytes:
            raise ValueError(
                f"size is {size}, more than the {host_buffer.size_bytes} bytes of the host_buffer"
            )
        self.host_buffer = host_buffer
        try:
            if populate:
                host_buffer.populate(0, size)
            super().__init__(host_buffer.tensor[:size], align_bytes, **options)
        except BaseException:
            host_buffer.close()
            raise

    @classmethod
    def attach(
        cls,
        file: int | str | os.PathLike[str],
        size: int | None = None,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        *,
        page_layout: BlockLayout | None = None,
    ) -> Self:
        """Map the heap of another process, which alone allocates and frees in it.

        The heap is view-only: ``view(metadata)`` wraps blocks that the owner has allocated, to read
        them, load and copy them, and, with ``writable=True``, to fill them. Everything else raises
        ``ForeignProcessError``.

        Args:
            file: the descriptor ``host_buffer.fd`` of the owner's heap, as this process has
                received it, which is left open; a path to the file, such as ``/proc/PID/fd/FD``
                with the owner's process id and descriptor; or the POSIX name of shared memory in
                ``/dev/shm``, such as ``SharedMemory.name``. Symbolic links to files are not
                followed.
            size: bytes of the owner's heap; None: all of the file.
            align_bytes: as the owner's.
            page_layout: as the owner's.

        Raises:
            ValueError: an argument is wrong; the file is smaller than ``size``; or it is a symbolic
                link, no regular file, or both a path and a name.
            TypeError: ``file`` is neither a descriptor nor a path or name.
            FileNotFoundError: there is no such file or shared memory.
            OSError: it cannot be opened or mapped.

        >>> import torch
        >>> with HostMemoryAllocator(1 << 20, shared=True) as owner:
        ...     batch = owner.batched_allocate([2], torch.float32, 2, source=torch.ones(2, 2))
        ...     with HostMemoryAllocator.attach(owner.host_buffer.fd, 1 << 20) as heap:
        ...         heap.view(batch.metadata)[1].tensor, heap.max_batch([2], torch.float32)
        (tensor([1., 1.]), 0)
        """
        is_own = isinstance(file, (str, os.PathLike))
        fd = open_shared_file(file) if isinstance(file, (str, os.PathLike)) else _descriptor(file)
        try:
            size = require_size(_size_of(fd) if size is None else size, align_bytes, page_layout)
            buffer = HostBuffer(size, fd=fd)
        finally:
            if is_own:
                os.close(fd)
        return cls(size, align_bytes, host_buffer=buffer, page_layout=page_layout, view_only=True)


class PinMemoryAllocator(HostHeap):
    """A heap in pinned host memory.

    Args:
        size: bytes of the heap; rounded down to the alignment.
        align_bytes: a power of two; the heap address and the absolute address of every block are
            multiples of it.
        huge_pages: ``"none"``, ``"if possible"``, ``"transparent"`` or ``"explicit"``; see
            ``HostBuffer``. They are pinned faster.
        numa_node: take memory of this node only; ``numa_node_of_gpu`` returns the node of a GPU.
        allow_unpinned: accept memory that cannot be pinned; ``stats().pinned_bytes`` tells how much
            is pinned.
        registrar: pins the memory; None: CUDA does.
        piece_bytes: maximum bytes of one registration, a multiple of the alignment.
        options: see ``TensorMemoryAllocator``.

    Raises:
        ValueError: an argument is wrong.
        OSError: the system does not provide the memory.
        RuntimeError: ``allow_unpinned`` is false, and some memory could not be pinned or CUDA is
            not available.

    >>> import torch
    >>> with PinMemoryAllocator(1 << 20, allow_unpinned=True) as heap:
    ...     obj = heap.allocate([16], torch.float16)
    """

    def __init__(
        self,
        size: int,
        align_bytes: int = AddressManager.ALIGN_BYTES,
        *,
        huge_pages: HugePages = "if possible",
        numa_node: int | None = None,
        allow_unpinned: bool = False,
        registrar: HostRegistrar | None = None,
        piece_bytes: int = REGISTRATION_BYTES,
        **options: Unpack[HeapOptions],
    ) -> None:
        require_flags(allow_unpinned=allow_unpinned)
        require_registrar(registrar)
        piece_bytes = require_count("piece_bytes", piece_bytes, at_least=1)
        size = require_size(size, align_bytes, options.get("page_layout"))
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


def empty_address_space(
    align_bytes: int, page_layout: BlockLayout | None
) -> tuple[AddressManager, int]:
    """An empty address space, and the granularity of its pinned pieces in bytes.

    The granularity is a common multiple of the address space's alignment and the page size of host
    memory.
    """
    if page_layout is None:
        manager = AddressManager(0, align_bytes)
    else:
        manager = AddressManager.of_pages(0, page_layout.size_bytes)
    return manager, math.lcm(manager.align_bytes, PAGE_BYTES)


def _descriptor(file: Any) -> int:
    fd = as_integer("file", file)
    if not 0 <= fd < 1 << 31:
        raise ValueError(f"file must be a file descriptor, a path or a name, got {fd}")
    return fd


def _size_of(fd: int) -> int:
    size = os.fstat(fd).st_size
    if not size:
        raise ValueError("the file to attach is empty: its owner has not given it a size")
    return size


def _reserve(
    size: int, align_bytes: int, huge_pages: HugePages, numa_node: int | None, shared: bool
) -> HostBuffer:
    size, align_bytes = as_integer("size", size), as_integer("align_bytes", align_bytes)
    if shared:
        return HostBuffer.shared(
            size, align_bytes=align_bytes, huge_pages=huge_pages, numa_node=numa_node
        )
    return HostBuffer(size, align_bytes=align_bytes, huge_pages=huge_pages, numa_node=numa_node)
