"""``Tasks``: what other threads ask the reader's thread to do, and how they wake it up."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from kvheap.interrupts import is_interrupt

__all__ = ["Tasks"]


class Tasks:
    """A queue of tasks for one thread, which sleeps in a selector.

    Everything but :meth:`run` and :meth:`calm` may be called anywhere, also in a finalizer, and
    after the end.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Sockets, not a pipe: a lease may be dropped after they are closed, and must not write to a
        # descriptor that is somebody else's by then.
        self._reading, self._writing = socket.socketpair()
        for each in (self._reading, self._writing):
            each.setblocking(False)

    @property
    def signal(self) -> socket.socket:
        """What the selector waits for: readable when the thread is to wake up."""
        return self._reading

    def put(self, task: Callable[[], None]) -> None:
        """Do something on the thread, soon."""
        self._queue.put(task)
        self.wake()

    def wake(self) -> None:
        """Wake the thread up."""
        try:
            self._writing.send(b"!")
        except OSError as error:  # it is full: the thread wakes up anyway; or closed
            if is_interrupt(error):
                raise

    def calm(self) -> None:
        """Note that the thread is awake."""
        with suppress(OSError):
            self._reading.recv(4096)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done."""
        return self._queue.empty()

    def run(self) -> None:
        """Do everything that is to be done."""
        while True:
            try:
                task = self._queue.get_nowait()
            except Empty:
                return
            task()

    def close(self) -> None:
        """Close this process's sockets."""
        self._reading.close()
        self._writing.close()
