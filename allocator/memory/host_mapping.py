"""``HostMapping``: a range of address space, reserved at once and backed by memory when written to.

Reserving a range costs address space only: 16 GiB or 1 TiB take microseconds and no memory.
Explicit huge pages are the exception: they are taken from the administrator's pool at once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext

from kvheap.addresses.integers import round_up
from kvheap.interrupts import is_interrupt, suppress_own
from kvheap.memory.host_registration import HostRegistrations
from kvheap.memory.numa import bind_to_node
from kvheap.memory.pages import (
    MADV_HUGEPAGE,
    PAGE_BYTES,
    TRANSPARENT_HUGE_PAGE_BYTES,
    HugePages,
    explicit_huge_page_bytes,
    explicit_huge_page_counts,
    madvise,
    require_transparent_huge_pages,
    why_no_transparent_huge_pages,
)

__all__ = ["HostMapping", "attached_mappings", "reserve"]

# From <linux/mman.h>; not in Python's mmap module, or only in its newest versions.
MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000

_of_files: weakref.WeakSet[HostMapping] = weakref.WeakSet()


class HostMapping(mmap.mmap):
    """A mapping that is unregistered with CUDA before it is unmapped.

    Every tensor over the memory holds a reference to this object, so the memory is unmapped when
    the last tensor is gone, and ``__del__`` runs just before. That is why the registrations belong
    to the mapping and not to the ``HostBuffer``: a tensor that outlives a pinned buffer still views
    pinned memory, and when the tensor goes, the memory is unpinned and then unmapped.
    ``weakref.finalize`` would not work: CPython's mmap unmaps before it calls weak references.

    Attributes:
        size_bytes: bytes of the range, as requested.
        offset: where the range begins in the mapping.
        data_ptr: address of the range's first byte.
        registrations: which parts of the range are pinned.
        is_bound: whether all its pages come from the node that was asked for.
        creator_pid: the process that created the file that it maps; None: that is not known, or it
            maps no file.
    """

    size_bytes: int
    offset: int
    data_ptr: int
    registrations: HostRegistrations
    is_bound: bool
    creator_pid: int | None

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        registrations = getattr(self, "registrations", None)  # None: reserving it failed
        # At exit the driver may be gone; it unpins the pages by itself.
        if registrations is None or is_finalizing():
            return
        try:
            registrations.close_unshared()
        finally:
            if registrations.num_bytes:
                # Never unmap: CUDA would mistake a later mapping at this address for this one.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))


def reserve(
    size_bytes: int,
    align_bytes: int,
    huge_pages: HugePages,
    numa_node: int | None,
    fd: int | None,
) -> HostMapping:
    """Reserve a range; arguments and errors are those of ``HostBuffer``.

    Raises:
        ValueError: the file is too small, or its mapping is not aligned.
        OSError: the range, the huge pages or the node's memory is not available.
        RuntimeError: transparent huge pages are switched off.
    """
    if huge_pages == "transparent":
        require_transparent_huge_pages(shared=fd is not None)
    is_wish = huge_pages == "if possible"
    if is_wish:
        is_allowed = why_no_transparent_huge_pages(shared=fd is not None) is None
        huge_pages = "transparent" if is_allowed else "none"
    if fd is None:
        if huge_pages == "transparent":
            align_bytes = max(align_bytes, TRANSPARENT_HUGE_PAGE_BYTES)
        mapping = _map_anonymous(size_bytes, align_bytes, huge_pages)
    else:
        mapping = _map_file(size_bytes, fd)
    pointer = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = -pointer % align_bytes
    if fd is not None and offset:
        raise ValueError(
            f"the file's mapping is not aligned to {align_bytes} bytes: it starts at "
            f"{pointer:#x}, and a shared mapping cannot be shifted"
        )
    if huge_pages == "transparent":
        with suppress_own(OSError) if is_wish else nullcontext():
            madvise(pointer, len(mapping), MADV_HUGEPAGE)
    if numa_node is not None:
        bind_to_node(pointer, len(mapping), numa_node)
    mapping.size_bytes = size_bytes
    mapping.offset = offset
    mapping.data_ptr = pointer + offset
    mapping.registrations = HostRegistrations(mapping.data_ptr)
    mapping.is_bound = numa_node is not None
    mapping.creator_pid = None
    if fd is not None:
        _of_files.add(mapping)
    return mapping


def attached_mappings() -> list[HostMapping]:
    """The mappings of files that this process has not created."""
    return [mapping for mapping in list(_of_files) if mapping.creator_pid != os.getpid()]


def _map_anonymous(size_bytes: int, align_bytes: int, huge_pages: HugePages) -> HostMapping:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page_bytes = PAGE_BYTES
    if huge_pages == "explicit":
        # Without MAP_NORESERVE, so that too few pages raise here, instead of SIGBUS at first touch.
        flags |= MAP_HUGETLB
        page_bytes = explicit_huge_page_bytes()
    else:
        flags |= MAP_NORESERVE
    num_bytes = round_up(size_bytes, page_bytes) + max(0, align_bytes - page_bytes)
    try:
        return HostMapping(-1, num_bytes, flags=flags)
    except OSError as error:
        if is_interrupt(error):
            raise
        what = "bytes of address space"
        if huge_pages == "explicit":
            what = f"bytes of explicit huge pages (/proc/meminfo: {explicit_huge_page_counts()})"
        raise OSError(
            error.errno, f"cannot reserve {num_bytes} {what}: {error.strerror}"
        ) from error


def _map_file(size_bytes: int, fd: int) -> HostMapping:
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_size < size_bytes:
        raise ValueError(
            f"the file has {found.st_size} bytes, fewer than the {size_bytes} that are to be mapped"
        )
    try:
        return HostMapping(fd, size_bytes, flags=mmap.MAP_SHARED | MAP_NORESERVE)
    except OSError as error:
        if is_interrupt(error):
            raise
        raise OSError(
            error.errno, f"cannot map {size_bytes} bytes of the file: {error.strerror}"
        ) from error
