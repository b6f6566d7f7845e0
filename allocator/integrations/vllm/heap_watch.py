"""``watch_heaps``: learn at once that the workers have let go of their heaps.

vLLM ends the workers before it shuts the scheduler down, and waits for their processes. Meanwhile it
may kill the scheduler's: five seconds after it asked for the end, unless ``--shutdown-timeout`` says
otherwise. But a worker that has closed its heap, or died, has lost its lock on the file.

Needs no vLLM.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterable

__all__ = ["watch_heaps"]


def watch_heaps(paths: Iterable[str], on_released: Callable[[], None]) -> None:
    """Call back once, from a thread, when nobody has a lock on any of the files any more.

    While the callback runs, nobody can lock the files.

    Args:
        paths: files that their owners have locked by ``flock``, on this machine.
        on_released: to be called; it must not raise.

    Raises:
        OSError: a file cannot be opened.
    """
    fds: list[int] = []
    try:
        for path in paths:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401  # closed if one fails
    except BaseException:
        _close(fds)
        raise

    def wait() -> None:
        try:
            for fd in fds:
                fcntl.flock(fd, fcntl.LOCK_SH)
            on_released()
        finally:
            _close(fds)

    threading.Thread(target=wait, name="kvheap-heap-watch", daemon=True).start()


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
