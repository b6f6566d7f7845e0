"""``DataFile``: reads and writes extents of one file, past the page cache where that is possible.

The file is opened twice. What is aligned goes through the descriptor with ``O_DIRECT``, if the file
system takes that, and the rest through the other one; Linux keeps both in step for extents that are
not used at the same time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from errno import EINVAL, EIO
from pathlib import Path

from kvheap.interrupts import is_interrupt
from kvheap.memory.descriptors import Descriptor

__all__ = ["MAX_BUFFERS", "PLACE_ALIGN_BYTES", "DataFile", "ShortReadError"]

PLACE_ALIGN_BYTES = 4096
"""Extents begin at multiples of this, and take a multiple of it: ``O_DIRECT`` needs as much."""

MEMORY_ALIGNMENTS = (512, 4096)
"""What ``O_DIRECT`` may need of memory; which of them is tried out."""

MAX_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 1024) if hasattr(os, "preadv") else 1
"""Of one call."""

O_DIRECT: int = getattr(os, "O_DIRECT", 0)


class ShortReadError(OSError):
    """The file ends before the extent does: somebody else has made it shorter."""


class DataFile:
    """The file that chunks are in. Its methods may be called by several threads.

    Args:
        path: the file; made if it is missing.
        size: its bytes, a multiple of ``PLACE_ALIGN_BYTES``. It is sparse until it is written.
        direct: use ``O_DIRECT`` where the file system takes it.

    Attributes:
        direct_align: what the memory of direct reads and writes must be aligned to, in bytes; None
            if there are none.

    Raises:
        OSError: the file cannot be opened, or not have that size.
    """

    def __init__(self, path: Path, size: int, direct: bool) -> None:
        self._path = str(path)
        self._file = Descriptor(path, os.O_RDWR | os.O_CREAT)
        self._direct_file: Descriptor | None = None
        self._fd = self._file.fd
        self._direct_fd = -1
        self.direct_align: int | None = None
        try:
            if os.fstat(self._fd).st_size != size:
                try:
                    os.ftruncate(self._fd, size)
                except OSError as error:
                    if is_interrupt(error):
                        raise
                    reason = f"{error.strerror}, {size} bytes are needed"
                    raise OSError(error.errno, reason, str(path)) from None
            if direct and O_DIRECT:
                self._try_direct(path)
        except BaseException:
            self.close()
            raise

    def _try_direct(self, path: Path) -> None:
        try:
            self._direct_file = Descriptor(path, os.O_RDWR | O_DIRECT)
        except OSError as error:
            if error.errno != EINVAL:
                raise
            return
        self._direct_fd = self._direct_file.fd
        with mmap.mmap(-1, 2 * PLACE_ALIGN_BYTES) as memory:
            for align in MEMORY_ALIGNMENTS:
                with memoryview(memory)[align : align + PLACE_ALIGN_BYTES] as part:
                    try:
                        os.preadv(self._direct_fd, [part], 0)
                    except OSError as error:
                        if error.errno != EINVAL:
                            raise
                        continue
                self.direct_align = align
                return

    def read(self, buffers: Sequence[memoryview], address: int, is_aligned: bool) -> bool:
        """Fill buffers with the bytes from an address on.

        Args:
            buffers: at most ``MAX_BUFFERS``.
            address: a multiple of ``PLACE_ALIGN_BYTES``.
            is_aligned: whether all buffers begin at, and take, multiples of ``direct_align``.

        Returns:
            Whether it went past the page cache.

        Raises:
            ShortReadError: the file ends before.
            OSError: the bytes cannot be read.
        """
        return self._move(os.preadv, buffers, address, is_aligned)

    def write(self, buffers: Sequence[memoryview], address: int, is_aligned: bool) -> bool:
        """Write buffers to the bytes from an address on; arguments and result as :meth:`read`.

        Raises:
            OSError: the bytes cannot be written, or not all of them.
        """
        return self._move(os.pwritev, buffers, address, is_aligned)

    def _move(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        buffers: Sequence[memoryview],
        address: int,
        is_aligned: bool,
    ) -> bool:
        left = buffers
        is_direct = is_aligned and self.direct_align is not None
        went_direct = False
        while left:
            try:
                moved = call(self._direct_fd if is_direct else self._fd, left, address)
            except InterruptedError:
                continue
            except OSError as error:
                if not is_direct or error.errno != EINVAL:
                    error.filename = self._path
                    raise
                is_direct = False  # it takes these bytes only through the page cache
                continue
            if moved <= 0:
                if call is os.preadv:
                    raise ShortReadError(EIO, f"the file ends at {address}", self._path)
                raise OSError(EIO, f"no byte could be written at {address}", self._path)
            went_direct |= is_direct
            address += moved
            left = _after(left, moved)
            if moved % PLACE_ALIGN_BYTES:
                is_direct = False  # the rest does not begin at a multiple
        return went_direct

    def sync(self) -> None:
        """Wait until all bytes are on the disk, and the file's size."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close it; may be repeated."""
        self._fd = self._direct_fd = -1
        self._file.close()
        if self._direct_file is not None:
            self._direct_file.close()


def _after(buffers: Sequence[memoryview], num_bytes: int) -> Sequence[memoryview]:
    """What is left of buffers behind their first bytes."""
    for at, buffer in enumerate(buffers):
        if num_bytes < buffer.nbytes:
            return [buffer[num_bytes:], *buffers[at + 1 :]]
        num_bytes -= buffer.nbytes
    return []
