"""``HostBuffer``: a range of host memory that is committed, pinned and shared on request.

Reserving a range costs address space only. Memory is committed when bytes are first written, or in
advance and in parallel by :meth:`HostBuffer.populate`; :meth:`HostBuffer.pin` page-locks it for
CUDA. Huge pages and a NUMA node are chosen when the range is reserved. If the system cannot provide
them, the constructor raises; the buffer never silently gets less than requested. A buffer over a
file descriptor is memory that several processes can share.

Linux only. Only pinning needs CUDA.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

import torch

from kvheap.addresses.arguments import require_flags
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.memory.available import available_bytes
from kvheap.memory.descriptors import Descriptor
from kvheap.memory.host_mapping import HostMapping, reserve
from kvheap.memory.host_registration import REGISTRATION_BYTES
from kvheap.memory.numa import MAX_NUMA_NODES
from kvheap.memory.pages import PAGE_BYTES, HugePages
from kvheap.memory.populate import populate, touch
from kvheap.memory.registrar import CudaHostRegistrar, HostRegistrar, require_registrar
from kvheap.memory.workers import Worker, cut
from kvheap.renamed import renamed

__all__ = ["HostBuffer"]


class HostBuffer:
    """One range of host memory as a uint8 tensor.

    Thread-safe. The memory lives as long as the buffer is open or any tensor views it: closing or
    dropping the buffer invalidates no tensor. Before either, wait for asynchronous copies to end.

    Methods by purpose:

    - reserve: the constructor, :meth:`shared`;
    - the bytes: :attr:`tensor`, :attr:`data_ptr`, :attr:`size_bytes`, :attr:`device`, :attr:`fd`,
      :attr:`is_attached`;
    - commit and page-lock: :meth:`populate`, :meth:`pin`;
    - what is pinned: :attr:`pinned_ranges`, :attr:`pinned_addresses`, :attr:`pinned_bytes`;
    - end: :meth:`close`, :attr:`closed`, ``with``.

    Args:
        size: bytes of the range, at least 1.
        align_bytes: a power of two; the address of the first byte is a multiple of it.
        huge_pages: ``"transparent"`` asks the kernel to use them, and aligns to 2 MiB; ``"if
            possible"`` does so unless the system has switched them off. ``"explicit"`` takes them
            at once from the pool that the administrator set aside, and a few more than needed if
            ``align_bytes`` exceeds their size; not with ``fd``.
        numa_node: the only node whose memory is used; None leaves the choice to the kernel.
        fd: map this file (a memfd, a shared memory object) from its start, shared with every
            process that maps it. The buffer counts as attached: a heap in it is view-only unless
            told otherwise. The file must have at least ``size`` bytes. The descriptor is
            duplicated, and the caller's is left open. The kernel chooses the address, which is a
            multiple of the page size but may have no larger alignment.

    Raises:
        ValueError: an argument is wrong, the file is too small, or its mapping is not aligned.
        OSError: the range, the huge pages or the node's memory is not available.
        RuntimeError: transparent huge pages are switched off.

    >>> with HostBuffer(16 << 30) as buffer:
    ...     buffer.populate(0, 1 << 20)
    ...     buffer.tensor[:3].fill_(7).tolist(), buffer.size_bytes
    ([7, 7, 7], 17179869184)
    """

    @renamed(size_bytes="size")
    def __init__(
        self,
        size: int,
        *,
        align_bytes: int = 4096,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
        fd: int | None = None,
    ) -> None:
        _require_arguments(size, align_bytes, huge_pages, numa_node, fd)
        self._size_bytes = size
        self._file = None if fd is None else Descriptor.copy_of(fd)
        self._fd = None if self._file is None else self._file.fd
        mapping = reserve(size, align_bytes, huge_pages, numa_node, self._fd)
        self._data_ptr = mapping.data_ptr
        self._registrations = mapping.registrations
        self._mapping: HostMapping | None = mapping
        self._tensor: torch.Tensor | None = torch.frombuffer(
            mapping, dtype=torch.uint8, count=size, offset=mapping.offset
        )

    @classmethod
    @renamed(size_bytes="size")
    def shared(
        cls,
        size: int,
        *,
        name: str = "kvheap",
        align_bytes: int = 4096,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
    ) -> HostBuffer:
        """Reserve memory that other processes can map, through its :attr:`fd`.

        Args:
            size: bytes of the range, at least 1.
            name: shown in ``/proc/<pid>/maps``.
            align_bytes: as for the class, with ``fd``.
            huge_pages: as for the class, with ``fd``.
            numa_node: as for the class; applies to all processes.

        Raises:
            ValueError: as for the class.
            OSError: as for the class.
            RuntimeError: as for the class.
        """
        if as_integer("size", size) < 1:
            raise ValueError(f"size must be positive, got {size}")
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            buffer = cls(
                size,
                align_bytes=align_bytes,
                huge_pages=huge_pages,
                numa_node=numa_node,
                fd=fd,
            )
            buffer._open_mapping().creator_pid = os.getpid()
            return buffer
        finally:
            os.close(fd)

    @property
    def tensor(self) -> torch.Tensor:
        """All bytes, uint8 ``[size_bytes]`` on the CPU, no copy.

        Raises:
            RuntimeError: the buffer is closed.
        """
        if self._tensor is None:
            raise RuntimeError("the host buffer is closed")
        return self._tensor

    @property
    def data_ptr(self) -> int:
        """Address of the first byte.

        Raises:
            RuntimeError: the buffer is closed.
        """
        self._open_mapping()
        return self._data_ptr

    @property
    def fd(self) -> int | None:
        """A descriptor of the shared file, open until the buffer is closed; None: private memory.

        Raises:
            RuntimeError: the buffer is closed.
        """
        self._open_mapping()
        return self._fd

    @property
    def is_attached(self) -> bool:
        """Whether the memory may be another process's: a file that this process did not create.

        Raises:
            RuntimeError: the buffer is closed.
        """
        return self._fd is not None and self._open_mapping().creator_pid != os.getpid()

    @property
    def size_bytes(self) -> int:
        """Bytes of the range, as requested."""
        return self._size_bytes

    @property
    def device(self) -> torch.device:
        """``cpu``."""
        return torch.device("cpu")

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._mapping is None

    @property
    def pinned_ranges(self) -> list[tuple[int, int]]:
        """Start and end in bytes of each pinned piece, in address order."""
        return self._registrations.ranges

    @property
    def pinned_addresses(self) -> Int64Array:
        """The pinned pieces as absolute addresses, int64 ``[R, 2]``, for R pieces."""
        return self._registrations.absolute_ranges

    @property
    def pinned_bytes(self) -> int:
        """How many bytes are pinned."""
        return self._registrations.num_bytes

    def __repr__(self) -> str:
        """Size, whether it is shared, and what is pinned."""
        state = "closed" if self.closed else "private" if self._fd is None else "shared"
        return f"HostBuffer({self._size_bytes} bytes, {state}, {self.pinned_bytes} bytes pinned)"

    def populate(self, start: int, end: int, threads: int | None = None) -> None:
        """Commit bytes ``[start, end)``, and the rest of their pages; contents stay.

        Works in parallel and without the GIL. Before Linux 5.14, it rewrites the contents of each
        page, so no other thread may write to private memory meanwhile. If the whole machine runs
        out of memory, there is no error: the kernel kills a process.

        Args:
            start: first byte.
            end: the byte after the last.
            threads: number of threads; None: one for each CPU, at most 8.

        Raises:
            ValueError: the range is not within the buffer, or ``threads`` is not positive.
            MemoryError: the kernel has no memory.
            OSError: another error, such as a full file system or pool; some pages may be
                committed.
            RuntimeError: the buffer is closed.
        """
        mapping = self._open_mapping()
        self._require_within(start, end)
        populate(mapping, start, end, self._fd, threads)

    def pin(
        self,
        start: int,
        end: int,
        *,
        registrar: HostRegistrar | None = None,
        piece_bytes: int = REGISTRATION_BYTES,
        allow_unpinned: bool = False,
    ) -> int:
        """Page-lock bytes ``[start, end)`` for CUDA, all or none; this also commits them.

        The pages are committed first, by several threads, since the driver uses one: 2 GiB take
        0.5 s instead of 1.1 s (benchmarks/NOTES.md). A separate thread does the work. The caller
        waits for it and can be interrupted. The piece in progress is then finished in the
        background, and everything that this call pinned is unpinned.

        CUDA refuses to copy a range that is only partly pinned. With ``allow_unpinned``, no block
        may therefore cross an end of :attr:`pinned_ranges`.

        Args:
            start: first byte, a multiple of the page size.
            end: the byte after the last, a multiple of the page size or the buffer's end.
            registrar: does the page-locking; None: a ``CudaHostRegistrar`` for the current device
                of this thread.
            piece_bytes: the most bytes of one registration, a multiple of the page size.
            allow_unpinned: leave pieces that fail unpinned; without CUDA, leave all unpinned.

        Returns:
            Bytes pinned by this call.

        Raises:
            ValueError: the range is not within the buffer, does not consist of whole pages, or is
                partly pinned already; nothing changes.
            RuntimeError: the buffer is closed, there is no CUDA, or a piece failed; the message
                then names the piece, CUDA's error, and how much is pinned. Nothing is pinned by
                this call.
        """
        mapping = self._open_mapping()
        self._require_within(start, end)
        if start % PAGE_BYTES or (end % PAGE_BYTES and end != self._size_bytes):
            raise ValueError(
                f"start and end must be multiples of {PAGE_BYTES}, got [{start}, {end})"
            )
        piece_bytes = as_integer("piece_bytes", piece_bytes)
        if piece_bytes <= 0 or piece_bytes % PAGE_BYTES:
            raise ValueError(
                f"piece_bytes must be a positive multiple of {PAGE_BYTES}, got {piece_bytes}"
            )
        require_flags(allow_unpinned=allow_unpinned)
        require_registrar(registrar)
        if registrar is None:
            if allow_unpinned and not torch.cuda.is_available():
                return 0
            registrar = CudaHostRegistrar()
        pieces = cut(start, end, piece_bytes)
        chosen = registrar

        def task(cancelled: threading.Event) -> int:
            # Refers to the mapping, so that the memory stays mapped while this runs.
            def commit(start: int, end: int) -> None:
                touch(mapping, start, end, lambda: cancelled.is_set() or self.closed)

            registrations = mapping.registrations
            if end - start > available_bytes():  # the driver says so; the kernel kills a process
                return registrations.register(pieces, chosen, allow_unpinned, cancelled)
            return registrations.register(pieces, chosen, allow_unpinned, cancelled, commit)

        return Worker(task).result()

    def close(self) -> None:
        """Unpin everything, and let go of the memory; tensors over it stay valid. Idempotent.

        Waits for a :meth:`pin` in progress.

        Raises:
            RuntimeError: a piece could not be unpinned; the first such error, after all pieces
                were tried. Unpinning is tried once more when the last tensor is gone; if that
                fails too, the memory stays mapped.
        """
        self._tensor = None
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        if self._file is not None:
            self._file.close()
        self._registrations.close()

    def __enter__(self) -> HostBuffer:
        """The buffer itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _open_mapping(self) -> HostMapping:
        mapping = self._mapping
        if mapping is None:
            raise RuntimeError("the host buffer is closed")
        return mapping

    def _require_within(self, start: int, end: int) -> None:
        start, end = as_integer("start", start), as_integer("end", end)
        if not 0 <= start <= end <= self._size_bytes:
            raise ValueError(
                f"[{start}, {end}) is not within the buffer's {self._size_bytes} bytes"
            )


def _require_arguments(
    size: int,
    align_bytes: int,
    huge_pages: str,
    numa_node: int | None,
    fd: int | None,
) -> None:
    size = as_integer("size", size)
    align_bytes = as_integer("align_bytes", align_bytes)
    if numa_node is not None:
        numa_node = as_integer("numa_node", numa_node)
    if fd is not None and not 0 <= as_integer("fd", fd) < 1 << 31:
        raise ValueError(f"fd must be a file descriptor, got {fd}")
    if not 1 <= size < 1 << 62:
        raise ValueError(f"size must be positive and below 2**62, got {size}")
    if not 1 <= align_bytes < 1 << 62 or align_bytes & (align_bytes - 1):
        raise ValueError(
            f"align_bytes must be a positive power of two below 2**62, got {align_bytes}"
        )
    known = ("none", "if possible", "transparent", "explicit")
    if not isinstance(huge_pages, str) or huge_pages not in known:
        raise ValueError(f"huge_pages must be one of {', '.join(known)}, got {huge_pages!r}")
    if huge_pages == "explicit" and fd is not None:
        raise ValueError("huge_pages='explicit' does not work with fd: the file has its own pages")
    if numa_node is not None and not 0 <= numa_node < MAX_NUMA_NODES:
        raise ValueError(f"numa_node must be between 0 and {MAX_NUMA_NODES - 1}, got {numa_node}")
