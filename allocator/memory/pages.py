"""Pages of host memory: their size, huge pages, and ``madvise``."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Literal

__all__ = [
    "MADV_HUGEPAGE",
    "MADV_POPULATE_WRITE",
    "PAGE_BYTES",
    "TRANSPARENT_HUGE_PAGE_BYTES",
    "HugePages",
    "explicit_huge_page_bytes",
    "explicit_huge_page_counts",
    "madvise",
    "require_transparent_huge_pages",
    "why_no_transparent_huge_pages",
]

HugePages = Literal["none", "if possible", "transparent", "explicit"]

PAGE_BYTES = mmap.PAGESIZE

TRANSPARENT_HUGE_PAGE_BYTES = 2 << 20
"""Bytes that one second-level entry of the page table maps, with pages of 4 KiB."""

# From <linux/mman.h>; Python's mmap module lacks them, or has them only in its newest versions.
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


def madvise(pointer: int, num_bytes: int, advice: int) -> None:
    """Call ``madvise`` without the GIL, which Python's own ``mmap.madvise`` holds.

    Args:
        pointer: a multiple of the page size.
        num_bytes: how many bytes from there.
        advice: one of the ``MADV_`` constants.

    Raises:
        OSError: the kernel refused, with its ``errno``.
    """
    while _libc.madvise(pointer, num_bytes, advice):
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, f"madvise({advice}): {os.strerror(code)}")


def require_transparent_huge_pages(shared: bool) -> None:
    """Check that the system allows transparent huge pages.

    Args:
        shared: for shared memory instead of private memory.

    Raises:
        RuntimeError: they are switched off, or the kernel does not support them.
    """
    reason = why_no_transparent_huge_pages(shared)
    if reason is not None:
        raise RuntimeError(f"transparent huge pages are switched off: {reason}")


def why_no_transparent_huge_pages(shared: bool) -> str | None:
    """The setting that keeps the system from giving transparent huge pages; None if it gives them.

    Args:
        shared: for shared memory instead of private memory.
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage") / (
        "shmem_enabled" if shared else "enabled"
    )
    text = setting.read_text().strip() if setting.exists() else "absent"
    if text == "absent" or "[never]" in text or "[deny]" in text:
        return f"{setting} says {text!r}"
    return None


def explicit_huge_page_bytes() -> int:
    """Bytes of one explicit huge page.

    Raises:
        OSError: the kernel has no explicit huge pages.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    raise OSError(errno.ENOTSUP, "the kernel has no explicit huge pages: none in /proc/meminfo")


def explicit_huge_page_counts() -> str:
    """How many explicit huge pages the system has, from ``/proc/meminfo``, for error messages."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return ", ".join(
        " ".join(line.split()) for line in lines if line.startswith(("HugePages_", "Hugepagesize"))
    )
