"""Committing the pages of a mapping ahead of their first use, in parallel.

Where the memory of no node was asked for, all threads stay on the node of the calling thread, so
that the pages come from where they would have come from without them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import torch

from kvheap.addresses.arguments import require_count
from kvheap.addresses.integers import round_up
from kvheap.interrupts import is_interrupt, suppress_own
from kvheap.memory.host_mapping import HostMapping
from kvheap.memory.numa import cpus_nearby
from kvheap.memory.pages import MADV_POPULATE_WRITE, PAGE_BYTES, madvise
from kvheap.memory.workers import cut, share_out

__all__ = ["populate", "touch"]

POPULATE_SLICE_BYTES = 16 << 20
"""Bytes that one thread commits in one call: a few milliseconds of work, whole huge pages."""

MAX_POPULATE_THREADS = 8


def populate(
    mapping: HostMapping, start: int, end: int, fd: int | None, threads: int | None
) -> None:
    """Commit the pages of bytes ``[start, end)``; contents stay. Runs without the GIL.

    Linux has a call for this from 5.14 on. On older kernels, this rewrites each page's contents.

    Args:
        mapping: the memory.
        start: first byte.
        end: the byte after the last.
        fd: the file that is mapped; None for private memory.
        threads: number of threads; None: one for each CPU, at most 8.

    Raises:
        ValueError: ``threads`` is not positive.
        MemoryError: the kernel has no memory.
        OSError: another error, such as a full file system or pool; some pages may be committed.
    """
    threads = None if threads is None else require_count("threads", threads, at_least=1)
    _share_out(mapping, start, end, lambda piece: _populate_slice(mapping, *piece, fd), threads)


def touch(mapping: HostMapping, start: int, end: int, is_over: Callable[[], bool]) -> None:
    """Commit the pages of bytes ``[start, end)``, as far as the kernel can and will.

    For memory that is about to be registered: the driver commits its pages one after another, on
    one thread, and tells what is wrong with them. Contents stay, also if others write meanwhile.

    Args:
        mapping: the memory.
        start: first byte.
        end: the byte after the last.
        is_over: whether nobody needs the pages any more; asked before each slice.
    """

    def commit(piece: tuple[int, int]) -> None:
        if not is_over():
            madvise(mapping.data_ptr + piece[0], piece[1] - piece[0], MADV_POPULATE_WRITE)

    with suppress_own(OSError):
        _share_out(mapping, start, end, commit, None)


def _share_out(
    mapping: HostMapping,
    start: int,
    end: int,
    commit: Callable[[tuple[int, int]], None],
    threads: int | None,
) -> None:
    """Share slices of whole pages out to ``threads`` (None: one for each CPU, at most 8)."""
    cpus = os.sched_getaffinity(0)
    if not mapping.is_bound:
        cpus = cpus_nearby(cpus)
    if threads is None:
        threads = min(len(cpus), MAX_POPULATE_THREADS)
    first, last = start // PAGE_BYTES * PAGE_BYTES, round_up(end, PAGE_BYTES)
    slices = cut(first, last, POPULATE_SLICE_BYTES) if start < end else []
    share_out(commit, slices, threads, lambda: _stay_on(cpus))


def _stay_on(cpus: set[int]) -> None:
    with suppress_own(OSError):  # some have gone offline
        os.sched_setaffinity(0, cpus)


def _populate_slice(mapping: HostMapping, start: int, end: int, fd: int | None) -> None:
    try:
        madvise(mapping.data_ptr + start, end - start, MADV_POPULATE_WRITE)
    except OSError as error:
        if is_interrupt(error):
            raise
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"no memory for bytes [{start}, {end}) of the buffer") from error
        if error.errno != errno.EINVAL:
            raise OSError(
                error.errno,
                f"cannot commit bytes [{start}, {end}) of the buffer: {error.strerror}",
            ) from error
        _populate_by_hand(mapping, start, min(end, mapping.size_bytes), fd)


def _populate_by_hand(mapping: HostMapping, start: int, end: int, fd: int | None) -> None:
    """Commit pages on kernels before 5.14."""
    if fd is not None:
        # Other processes may be writing to shared memory; this call writes nothing back.
        os.posix_fallocate(fd, start, end - start)
        return
    pages = torch.frombuffer(
        mapping, dtype=torch.uint8, count=end - start, offset=mapping.offset + start
    )
    pages[::PAGE_BYTES].bitwise_or_(0)
