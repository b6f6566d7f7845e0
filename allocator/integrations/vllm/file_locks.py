"""Locks on files, which end with the process that has them. Needs no vLLM."""

from __future__ import annotations

import os
import weakref

from kvheap.memory.file_locks import FileLock

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
        fd: of the file, open until :meth:`release`. The lock is not its own, so that no mapping of
            the file keeps it, in this process or in a forked child.
    """

    def __init__(self, path: str, message: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock = FileLock.reopened(self.fd, PATIENCE_S)
        except BlockingIOError as error:
            os.close(self.fd)
            raise BlockingIOError(error.errno, message) from None
        except BaseException:
            os.close(self.fd)
            raise
        self._finalizer = weakref.finalize(self, _release, self.fd, self._lock)

    def release(self) -> None:
        """Let others have it, also if a mapping of it is left. Further calls do nothing."""
        self._finalizer()


def _release(fd: int, lock: FileLock) -> None:
    os.close(fd)
    lock.release()
