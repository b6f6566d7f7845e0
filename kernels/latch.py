"""``Latch``: something that happens once, which threads can wait for.

``threading.Event`` holds a lock while it is set and while it is read into a wait. A finalizer or a
signal handler that runs on that thread in between, and sets or awaits the same event, waits for
ever. A latch holds nothing: each thread that waits has a lock of its own, which opening releases.
"""

from __future__ import annotations

import threading
from contextlib import suppress

__all__ = ["Latch"]


class Latch:
    """Closed at first, and open for good once it was opened.

    All methods can be called from finalizers and signal handlers, also in the middle of each other.

    Attributes:
        is_open: whether it was opened.

    >>> latch = Latch()
    >>> latch.wait(0.001), latch.open(), latch.wait()
    (False, None, True)
    """

    __slots__ = ("_waiting", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self._waiting: list[threading.Lock] = []

    def open(self) -> None:
        """Open it, and let all threads go on that wait."""
        self.is_open = True
        while self._waiting:
            try:
                gate = self._waiting.pop()
            except IndexError:  # another thread opens it too
                return
            gate.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is open; returns whether it is.

        Args:
            timeout_s: the most seconds to wait; None: no limit.
        """
        if self.is_open:
            return True
        gate = _closed_gate()
        self._waiting.append(gate)
        # Looked at again: it may have been opened before the gate was in the list.
        if self.is_open:
            return True
        if timeout_s is None:
            gate.acquire()
        elif not gate.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)):
            with suppress(ValueError):  # opened at the last moment
                self._waiting.remove(gate)
        return self.is_open


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate
