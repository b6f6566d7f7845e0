"""``watch_heaps``: learn at once that the workers have let go of their heaps.

vLLM ends the workers before it shuts the scheduler down, and waits for their processes. It may kill
the scheduler's process meanwhile: five seconds after it asked for the end, or what
``--shutdown-timeout`` says. But a worker that has closed its heap, or died, has lost its lock on
the file.

Needs no vLLM.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterable

__all__ = ["watch_heaps"]


def watch_heaps(paths: Iterable[str], on_released: Callable[[], None]) -> None:
    """Call back once, from a thread, when the owners of the files have let go of their locks.

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
        for fd in fds:
            fcntl.flock(fd, fcntl.LOCK_SH)
            os.close(fd)  # at once: the next process may want it
        on_released()

    threading.Thread(target=wait, name="kvheap-heap-watch", daemon=True).start()


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
