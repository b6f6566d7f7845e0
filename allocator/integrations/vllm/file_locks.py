"""Locks on files, which end with the process that has them. Needs no vLLM."""

from __future__ import annotations

import fcntl

__all__ = ["lock_file"]


def lock_file(fd: int, message: str) -> None:
    """Lock a file until the last descriptor of this opening of it is closed.

    Args:
        fd: of the file.
        message: of the error.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, message) from None
