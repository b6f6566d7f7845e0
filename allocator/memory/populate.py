"""Committing the pages of a mapping ahead of their first use, in parallel."""

from __future__ import annotations

import errno
import os

import torch

from kvheap.addresses.arguments import require_count
from kvheap.addresses.integers import round_up
from kvheap.memory.host_mapping import HostMapping
from kvheap.memory.pages import MADV_POPULATE_WRITE, PAGE_BYTES, madvise
from kvheap.memory.workers import cut, share_out

__all__ = ["populate"]

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
    if threads is None:
        threads = min(len(os.sched_getaffinity(0)), MAX_POPULATE_THREADS)
    threads = require_count("threads", threads, at_least=1)
    first, last = start // PAGE_BYTES * PAGE_BYTES, round_up(end, PAGE_BYTES)
    slices = cut(first, last, POPULATE_SLICE_BYTES) if start < end else []
    share_out(lambda piece: _populate_slice(mapping, *piece, fd), slices, threads)


def _populate_slice(mapping: HostMapping, start: int, end: int, fd: int | None) -> None:
    try:
        madvise(mapping.data_ptr + start, end - start, MADV_POPULATE_WRITE)
    except OSError as error:
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
