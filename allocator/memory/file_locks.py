"""Locks on files that the kernel drops when their process dies: of a file, and of numbers in it.

Both kinds belong to an open file, not to a process. So the descriptors must be opened for the lock
alone: a mapping keeps the open file that it was made from, also in a forked child, and would keep
its locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
import weakref

from kvheap.interrupts import is_interrupt
from kvheap.memory.descriptors import Descriptor

__all__ = ["FileLock", "RangeLocks"]

RETRY_S = 0.01

FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` on 64-bit Linux: type, whence, start, length, process; native alignment."""


class FileLock:
    """The exclusive ``flock`` of an open file, until :meth:`release` or the end of the process.

    Args:
        file: opened for this lock; closed by :meth:`release`, or once this is dropped.
        patience_s: how long to try: somebody may have it for a moment only.

    Raises:
        BlockingIOError: somebody else has it.
    """

    def __init__(self, file: Descriptor, patience_s: float = 0.0) -> None:
        self._file = file
        self._pid = os.getpid()
        finalizer = weakref.finalize(self, _release, file, self._pid)
        # At the end of a program the kernel releases it, when no thread can work any more.
        finalizer.atexit = False
        end_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end_s or is_interrupt(error):
                    raise
            time.sleep(RETRY_S)

    @property
    def fd(self) -> int:
        """Of the file, open until :meth:`release`."""
        return self._file.fd

    @property
    def is_held(self) -> bool:
        """Whether :meth:`release` was not called yet."""
        return not self._file.closed

    @classmethod
    def reopened(cls, fd: int, patience_s: float = 0.0) -> FileLock:
        """The lock of a file that is open, on an open file of its own; ``fd`` stays the caller's.

        Raises:
            BlockingIOError: somebody else has it.
            OSError: the file cannot be opened again.
        """
        file = Descriptor(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            return cls(file, patience_s)
        except BaseException:
            file.close()
            raise

    def release(self) -> None:
        """Let others have it, and close the descriptor. Further calls do nothing.

        In a forked child the lock stays the parent's.
        """
        _release(self._file, self._pid)


def _release(file: Descriptor, pid: int) -> None:
    try:
        if not file.closed and os.getpid() == pid:
            # At once, also for a forked child that has not yet closed what it inherited.
            fcntl.flock(file.fd, fcntl.LOCK_UN)
    finally:
        file.close()


class RangeLocks:
    """Locks of ranges of numbers on one open file (``F_OFD_SETLK``), shared or exclusive.

    The numbers need not be offsets of bytes that exist. What one open file has locked twice is
    unlocked by one :meth:`drop`: the caller counts.

    Args:
        file: opened for these locks; closed by :meth:`close`, or once this is dropped.
    """

    def __init__(self, file: Descriptor) -> None:
        self._file = file
        self._fd = file.fd

    def share(self, start: int, count: int) -> bool:
        """Lock numbers together with others; False if somebody has one exclusively."""
        return self._set(fcntl.F_RDLCK, start, count)

    def take(self, start: int, count: int) -> bool:
        """Lock numbers exclusively; False if somebody has one."""
        return self._set(fcntl.F_WRLCK, start, count)

    def drop(self, start: int, count: int) -> None:
        """Unlock numbers; closed locks have none."""
        if self._fd >= 0:
            self._set(fcntl.F_UNLCK, start, count)

    def has_others(self, start: int, count: int) -> bool:
        """Whether another open file has locked any of these numbers. One call of the system."""
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
        return bool(FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Unlock everything; may be repeated. In a forked child the locks stay the parent's."""
        self._fd = -1
        self._file.close()

    def _set(self, kind: int, start: int, count: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
        except (BlockingIOError, PermissionError) as error:  # EAGAIN, EACCES: somebody has it
            if is_interrupt(error):
                raise
            return False
        return True
