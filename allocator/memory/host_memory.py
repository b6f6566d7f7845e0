"""``HostBuffer``: one range of host memory, reserved at once and backed where it is wanted.

Reserving costs address space only: 16 GiB or 1 TiB take microseconds and no memory. Bytes are
committed when they are first written, or ahead of that, in parallel, by
:meth:`HostBuffer.populate`; :meth:`HostBuffer.pin` page-locks them for CUDA. Huge pages and a NUMA
node are chosen when the range is reserved; what the system cannot give is an error, never less
than was asked for. A buffer over a file descriptor is memory that several processes share.

Linux only. CUDA is not needed to import or use this, except to pin.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from kvheap.addresses.extents import Int64Array
from kvheap.memory.host_registration import (
    PAGE_BYTES,
    CudaHostRegistrar,
    HostRegistrar,
    HostRegistrations,
    Worker,
    round_up,
)

__all__ = ["HostBuffer", "HugePages", "numa_node_of_gpu"]

HugePages = Literal["none", "transparent", "explicit"]

TRANSPARENT_HUGE_PAGE_BYTES = 2 << 20
"""What one entry of a page table's second level maps, with pages of 4 KiB."""

POPULATE_SLICE_BYTES = 16 << 20
"""What one thread commits in one call, a few milliseconds' work: small enough to share a piece of
256 MiB evenly, a multiple of a huge page."""

MAX_POPULATE_THREADS = 8

# <linux/mman.h>, <linux/mempolicy.h>: not in Python's mmap module, or only in its newest.
MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
MPOL_BIND = 2
MAX_NUMA_NODES = 1024
MBIND_SYSCALLS = {"x86_64": 237, "aarch64": 235}

# Calls through ctypes release the GIL; those of Python's mmap do not.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int
_libc.syscall.restype = ctypes.c_long


class _Mapping(mmap.mmap):
    """A mapping that is unregistered before it is unmapped.

    Every tensor over the memory holds a reference to this object, so the memory is unmapped when
    the last of them is gone, and ``__del__`` runs just before. The registrations live here, not
    in the HostBuffer: whoever drops a pinned buffer but keeps a tensor keeps pinned memory, and
    the last drop undoes both. ``weakref.finalize`` would not do: CPython's mmap unmaps first
    and calls weak references then.
    """

    registrations: HostRegistrations | None = None

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        registrations = self.registrations
        # At exit the driver may be gone, and takes its hands off the pages by itself.
        if registrations is None or is_finalizing():
            return
        try:
            registrations.close_unshared()
        finally:
            if registrations.num_bytes:
                # CUDA would take a later mapping at this address for the pinned one: never unmap.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))


class HostBuffer:
    """One range of host memory as a uint8 tensor.

    Thread-safe. Closing it, or dropping it, does not pull the memory from under tensors that
    still view it; the last one gone gives the memory back. Wait for asynchronous copies before
    either.

    Args:
        size_bytes: bytes of the range, at least 1.
        align_bytes: a power of two; the address of the first byte is a multiple of it.
        huge_pages: ``"transparent"`` asks the kernel to use them (and aligns to 2 MiB);
            ``"explicit"`` takes them from the pool that the administrator set aside, at once, but
            for a few more when ``align_bytes`` exceeds their size; not with ``fd``.
        numa_node: the only node whose memory is used; None leaves it to the kernel.
        fd: map this file (a memfd, a shared memory's) from its start, shared with every process
            that maps it; it must hold ``size_bytes`` bytes. Duplicated, and left open. The kernel
            chooses the address: a multiple of the page size, hardly of more.

    Raises:
        ValueError: an argument is wrong, the file is too small, or its mapping is not aligned.
        OSError: the range, the huge pages or the node's memory cannot be had.
        RuntimeError: transparent huge pages are switched off.

    >>> with HostBuffer(16 << 30) as buffer:
    ...     buffer.populate(0, 1 << 20)
    ...     buffer.tensor[:3].fill_(7).tolist(), buffer.size_bytes
    ([7, 7, 7], 17179869184)
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        align_bytes: int = 4096,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
        fd: int | None = None,
    ) -> None:
        _require_arguments(size_bytes, align_bytes, huge_pages, numa_node, fd)
        self._size_bytes = size_bytes
        self._fd: int | None = None
        if huge_pages == "transparent":
            _require_transparent_huge_pages(shared=fd is not None)
        if fd is None:
            if huge_pages == "transparent":
                align_bytes = max(align_bytes, TRANSPARENT_HUGE_PAGE_BYTES)
            mapping = _map_anonymous(size_bytes, align_bytes, huge_pages)
        else:
            self._fd = os.dup(fd)
            self._close_fd = weakref.finalize(self, os.close, self._fd)
            mapping = _map_file(size_bytes, self._fd)
        pointer = _address_of(mapping)
        offset = -pointer % align_bytes
        if fd is not None and offset:
            raise ValueError(
                f"the file's mapping is not aligned to {align_bytes} bytes: it starts at "
                f"{pointer:#x}, and a shared mapping cannot be shifted"
            )
        if huge_pages == "transparent":
            _madvise(pointer, len(mapping), MADV_HUGEPAGE)
        if numa_node is not None:
            _bind_to_node(pointer, len(mapping), numa_node)
        mapping.registrations = HostRegistrations(pointer + offset)
        self._data_ptr = pointer + offset
        self._registrations = mapping.registrations
        self._mapping: _Mapping | None = mapping
        self._tensor: torch.Tensor | None = torch.frombuffer(
            mapping, dtype=torch.uint8, count=size_bytes, offset=offset
        )

    @classmethod
    def shared(
        cls,
        size_bytes: int,
        *,
        name: str = "kvheap",
        align_bytes: int = 4096,
        huge_pages: HugePages = "none",
        numa_node: int | None = None,
    ) -> HostBuffer:
        """Reserve memory that other processes can map, through its :attr:`fd`.

        Args:
            size_bytes: bytes of the range, at least 1.
            name: what ``/proc/<pid>/maps`` shows.
            align_bytes: as for the class, with ``fd``.
            huge_pages: as for the class, with ``fd``.
            numa_node: as for the class; it holds for all processes.

        Raises:
            ValueError: as for the class.
            OSError: as for the class.
            RuntimeError: as for the class.
        """
        if size_bytes < 1:
            raise ValueError(f"size_bytes must be positive, got {size_bytes}")
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            return cls(
                size_bytes,
                align_bytes=align_bytes,
                huge_pages=huge_pages,
                numa_node=numa_node,
                fd=fd,
            )
        finally:
            os.close(fd)

    # -- look ----------------------------------------------------------------------------------

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
        """A descriptor of the shared file, open until the buffer is closed; None without one.

        Raises:
            RuntimeError: the buffer is closed.
        """
        self._open_mapping()
        return self._fd

    @property
    def size_bytes(self) -> int:
        """Bytes of the range, as asked for."""
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
        """What is pinned: ``(start, end)`` in bytes of each registration, in address order."""
        return self._registrations.ranges

    @property
    def pinned_addresses(self) -> Int64Array:
        """The same as absolute addresses, int64 ``[R, 2]``."""
        return self._registrations.absolute_ranges

    @property
    def pinned_bytes(self) -> int:
        """How many bytes are pinned."""
        return self._registrations.num_bytes

    def __repr__(self) -> str:
        """Address, size and what is pinned."""
        state = "closed" if self.closed else f"at {self._data_ptr:#x}"
        return f"HostBuffer({self._size_bytes} bytes, {state}, {self.pinned_bytes} bytes pinned)"

    # -- commit --------------------------------------------------------------------------------

    def populate(self, start: int, end: int, threads: int | None = None) -> None:
        """Commit bytes ``[start, end)``, and the rest of their pages; contents stay.

        In parallel, without the GIL. Before Linux 5.14 this writes to each page what it holds:
        nobody else may write to private memory then. When the machine has too little memory in
        all, the kernel does not answer with an error; it ends a process.

        Args:
            start: first byte.
            end: the byte after the last.
            threads: how many; None: one for each CPU, at most 8.

        Raises:
            ValueError: the range is not within the buffer, or ``threads`` is not positive.
            MemoryError: the kernel has no memory.
            OSError: another error, such as a full file system or pool; some pages may be
                committed.
            RuntimeError: the buffer is closed.
        """
        mapping = self._open_mapping()
        self._require_within(start, end)
        if threads is None:
            threads = min(len(os.sched_getaffinity(0)), MAX_POPULATE_THREADS)
        if threads < 1:
            raise ValueError(f"threads must be positive, got {threads}")
        first, last = start // PAGE_BYTES * PAGE_BYTES, round_up(end, PAGE_BYTES)
        slices = _cut(first, last, POPULATE_SLICE_BYTES) if start < end else []
        _share_out(lambda piece: self._populate_slice(mapping, piece), slices, threads)

    def _populate_slice(self, mapping: _Mapping, piece: tuple[int, int]) -> None:
        start, end = piece
        try:
            _madvise(self._data_ptr + start, end - start, MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError(f"no memory for bytes [{start}, {end}) of the buffer") from error
            if error.errno != errno.EINVAL:
                raise OSError(
                    error.errno,
                    f"cannot commit bytes [{start}, {end}) of the buffer: {error.strerror}",
                ) from error
            self._populate_by_hand(mapping, start, min(end, self._size_bytes))

    def _populate_by_hand(self, mapping: _Mapping, start: int, end: int) -> None:
        """What kernels before 5.14 leave to do."""
        if self._fd is not None:
            # Others may be writing to shared memory; this has no contents to write back.
            os.posix_fallocate(self._fd, start, end - start)
            return
        offset = self._data_ptr - _address_of(mapping) + start
        pages = torch.frombuffer(mapping, dtype=torch.uint8, count=end - start, offset=offset)
        pages[::PAGE_BYTES].bitwise_or_(0)

    def pin(
        self,
        start: int,
        end: int,
        *,
        registrar: HostRegistrar | None = None,
        piece_bytes: int = 64 << 30,
        allow_unpinned: bool = False,
    ) -> int:
        """Page-lock bytes ``[start, end)`` for CUDA, all or none; this commits them, too.

        On a thread of its own: the caller waits, and can be interrupted. The piece in progress
        then ends in the background, and what the call pinned is unpinned.

        CUDA refuses to copy a range that is pinned in part: with ``allow_unpinned``, keep blocks
        from straddling the ends of :attr:`pinned_ranges`.

        Args:
            start: first byte, a multiple of the page size.
            end: the byte after the last, a multiple of the page size or the buffer's end.
            registrar: who does it; None: a :class:`CudaHostRegistrar` for the current device of
                this thread.
            piece_bytes: bytes of one registration at most, a multiple of the page size.
            allow_unpinned: leave pieces that fail unpinned, and all of them without CUDA.

        Returns:
            Bytes pinned by this call.

        Raises:
            ValueError: the range is not within the buffer or not of whole pages, or pinned
                already in part; nothing changes.
            RuntimeError: the buffer is closed, there is no CUDA, or a piece failed: the message
                names it, CUDA's error, and what is pinned. Nothing is pinned by this call.
        """
        mapping = self._open_mapping()
        self._require_within(start, end)
        if start % PAGE_BYTES or (end % PAGE_BYTES and end != self._size_bytes):
            raise ValueError(
                f"start and end must be multiples of {PAGE_BYTES}, got [{start}, {end})"
            )
        if piece_bytes <= 0 or piece_bytes % PAGE_BYTES:
            raise ValueError(
                f"piece_bytes must be a positive multiple of {PAGE_BYTES}, got {piece_bytes}"
            )
        if registrar is None:
            if allow_unpinned and not torch.cuda.is_available():
                return 0
            registrar = CudaHostRegistrar()
        pieces = _cut(start, end, piece_bytes)
        chosen = registrar

        def task(cancelled: threading.Event) -> int:
            registrations = mapping.registrations
            assert registrations is not None
            return registrations.register(pieces, chosen, allow_unpinned, cancelled)

        return Worker(task).result()

    # -- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Unpin everything, and drop the memory; tensors over it stay valid. Idempotent.

        Waits for a :meth:`pin` in progress.

        Raises:
            RuntimeError: something could not be unpinned: the first such error, after all were
                tried. It is tried once more when the last tensor goes; what fails again stays
                mapped.
        """
        self._tensor = None
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        if self._fd is not None:
            self._close_fd()
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

    # -- helpers -------------------------------------------------------------------------------

    def _open_mapping(self) -> _Mapping:
        mapping = self._mapping
        if mapping is None:
            raise RuntimeError("the host buffer is closed")
        return mapping

    def _require_within(self, start: int, end: int) -> None:
        if not 0 <= start <= end <= self._size_bytes:
            raise ValueError(
                f"[{start}, {end}) is not within the buffer's {self._size_bytes} bytes"
            )


def numa_node_of_gpu(
    device: torch.device | int | str | None = None, *, sysfs: Path = Path("/sys")
) -> int | None:
    """The NUMA node that a GPU hangs on: the one whose memory it copies to and from fastest.

    Args:
        device: the GPU; None: the current one.
        sysfs: where sysfs is mounted.

    Returns:
        The node; None where the system does not tell, as on machines with one node.

    Raises:
        RuntimeError: this torch does not tell the PCI address, or there is no CUDA.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        address = (
            f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:"
            f"{properties.pci_device_id:02x}.0"
        )
    except AttributeError as error:
        raise RuntimeError(
            f"torch {torch.__version__} does not tell a GPU's PCI address"
        ) from error
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
    except FileNotFoundError:
        return None
    return node if node >= 0 else None


def _require_arguments(
    size_bytes: int,
    align_bytes: int,
    huge_pages: str,
    numa_node: int | None,
    fd: int | None,
) -> None:
    if not 1 <= size_bytes < 1 << 62:
        raise ValueError(f"size_bytes must be positive and below 2**62, got {size_bytes}")
    if not 1 <= align_bytes < 1 << 62 or align_bytes & (align_bytes - 1):
        raise ValueError(
            f"align_bytes must be a positive power of two below 2**62, got {align_bytes}"
        )
    if huge_pages not in ("none", "transparent", "explicit"):
        raise ValueError(
            f"huge_pages must be 'none', 'transparent' or 'explicit', got {huge_pages!r}"
        )
    if huge_pages == "explicit" and fd is not None:
        raise ValueError("huge_pages='explicit' cannot be had with fd: the file has its own pages")
    if numa_node is not None and not 0 <= numa_node < MAX_NUMA_NODES:
        raise ValueError(f"numa_node must be between 0 and {MAX_NUMA_NODES - 1}, got {numa_node}")


def _require_transparent_huge_pages(shared: bool) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage") / (
        "shmem_enabled" if shared else "enabled"
    )
    text = setting.read_text().strip() if setting.exists() else "absent"
    if text == "absent" or "[never]" in text or "[deny]" in text:
        raise RuntimeError(f"transparent huge pages are switched off: {setting} says {text!r}")


def _map_anonymous(size_bytes: int, align_bytes: int, huge_pages: HugePages) -> _Mapping:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page_bytes = PAGE_BYTES
    if huge_pages == "explicit":
        # Without MAP_NORESERVE: too few pages are an error here, not a SIGBUS at first touch.
        flags |= MAP_HUGETLB
        page_bytes = _huge_page_bytes()
    else:
        flags |= MAP_NORESERVE
    num_bytes = round_up(size_bytes, page_bytes) + max(0, align_bytes - page_bytes)
    try:
        return _Mapping(-1, num_bytes, flags=flags)
    except OSError as error:
        what = "bytes of address space"
        if huge_pages == "explicit":
            what = f"bytes of explicit huge pages (/proc/meminfo: {_huge_page_counts()})"
        raise OSError(
            error.errno, f"cannot reserve {num_bytes} {what}: {error.strerror}"
        ) from error


def _map_file(size_bytes: int, fd: int) -> _Mapping:
    try:
        return _Mapping(fd, size_bytes, flags=mmap.MAP_SHARED | MAP_NORESERVE)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot map {size_bytes} bytes of the file: {error.strerror}"
        ) from error


def _huge_page_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    raise OSError(errno.ENOTSUP, "the kernel has no explicit huge pages: none in /proc/meminfo")


def _huge_page_counts() -> str:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return ", ".join(
        " ".join(line.split()) for line in lines if line.startswith(("HugePages_", "Hugepagesize"))
    )


def _address_of(mapping: _Mapping) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _madvise(pointer: int, num_bytes: int, advice: int) -> None:
    while _libc.madvise(pointer, num_bytes, advice):
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, f"madvise({advice}): {os.strerror(code)}")


def _bind_to_node(pointer: int, num_bytes: int, numa_node: int) -> None:
    machine = platform.machine()
    if machine not in MBIND_SYSCALLS:
        raise OSError(errno.ENOSYS, f"numa_node is not supported on {machine}")
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = (ctypes.c_ulong * (MAX_NUMA_NODES // word_bits))()
    words[numa_node // word_bits] = 1 << numa_node % word_bits
    failed = _libc.syscall(
        ctypes.c_long(MBIND_SYSCALLS[machine]),
        ctypes.c_void_p(pointer),
        ctypes.c_ulong(num_bytes),
        ctypes.c_ulong(MPOL_BIND),
        words,
        ctypes.c_ulong(MAX_NUMA_NODES + 1),  # the kernel takes it for one more than the bits
        ctypes.c_ulong(0),
    )
    if failed:
        code = ctypes.get_errno()
        raise OSError(
            code, f"cannot bind {num_bytes} bytes to NUMA node {numa_node}: {os.strerror(code)}"
        )


def _share_out(
    task: Callable[[tuple[int, int]], None], pieces: list[tuple[int, int]], threads: int
) -> None:
    """Do every piece, on this thread and on ``threads - 1`` others; an error ends them all.

    A thread pool would not do: it takes no work once the interpreter is exiting, and a daemon
    thread that populates then would fail. Where no thread can be started, this one does it all.
    """
    remaining = iter(pieces)  # shared: each piece comes out once
    ended = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for piece in remaining:
                if ended.is_set():
                    return
                task(piece)
        except BaseException as error:
            ended.set()
            errors.append(error)

    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(threads, len(pieces)) - 1):
            helper = threading.Thread(target=work, name="kvheap-populate", daemon=True)
            try:
                helper.start()
            except RuntimeError:
                break
            helpers.append(helper)
        work()
        for helper in helpers:
            helper.join()
    except BaseException:
        ended.set()
        raise
    if errors:
        # Popped: an error holds the frames it went through, which must not hold it.
        del errors[1:]
        raise errors.pop()


def _cut(start: int, end: int, piece_bytes: int) -> list[tuple[int, int]]:
    return [(first, min(first + piece_bytes, end)) for first in range(start, end, piece_bytes)]
