"""Locks on files, which end with the process that has them. Needs no vLLM."""

from __future__ import annotations

import fcntl
import os
import time
import weakref

__all__ = ["LockedFile"]

PATIENCE_S = 0.5
"""Somebody may have the file for a moment only, to see that its owner is gone."""


class LockedFile:
    """A file that is made if need be, and that nobody else can lock until :meth:`release`.

    Args:
        path: the file.
        message: of the error if somebody has it.

    Raises:
        BlockingIOError: somebody else has it.
        OSError: it cannot be opened or made.

    Attributes:
        fd: of the file, open until :meth:`release`.
    """

    def __init__(self, path: str, message: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(self.fd, message)
        except BaseException:
            os.close(self.fd)
            raise
        self._finalizer = weakref.finalize(self, _release, self.fd, os.getpid())

    def release(self) -> None:
        """Let others have it, also if a mapping of it is left. Further calls do nothing."""
        self._finalizer()


def _lock(fd: int, message: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end_s:
                raise BlockingIOError(error.errno, message) from None
        time.sleep(0.01)


def _release(fd: int, pid: int) -> None:
    if os.getpid() == pid:  # in a forked child, the file is still the parent's
        fcntl.flock(fd, fcntl.LOCK_UN)  # mappings have descriptors of their own
    os.close(fd)
