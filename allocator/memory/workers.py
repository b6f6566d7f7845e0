"""Work on other threads, for a caller that can be interrupted while it waits.

All threads are daemons: an interrupted program exits without waiting for a call into the kernel or
the driver to end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvheap.interrupts import is_interrupt

__all__ = ["Worker", "cut", "share_out"]


class Worker(threading.Thread):
    """Runs one task on a thread of its own.

    Args:
        task: called with an event that is set when nobody waits for the result any more.
    """

    def __init__(self, task: Callable[[threading.Event], int]) -> None:
        super().__init__(name="kvheap-pin", daemon=True)
        self._task: Callable[[threading.Event], int] | None = task
        self._cancelled = threading.Event()
        self._value = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run the task; the thread's body."""
        task, self._task = self._task, None
        assert task is not None
        try:
            self._value = task(self._cancelled)
        except BaseException as error:
            self._error = error

    def result(self) -> int:
        """Start the thread and wait for the task's value.

        If the wait is interrupted, the task is told to cancel, and this does not wait for it.

        Raises:
            BaseException: the exception that the task raised, or that interrupted the wait.
        """
        try:
            try:
                self.start()
            except RuntimeError as refused:  # no more threads: at exit, or at the system's limit
                if is_interrupt(refused):
                    raise
                self.run()
            else:
                self.join()
        except BaseException:
            self._cancelled.set()
            raise
        # Do not keep the error: its traceback refers to this worker, and so to the memory.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._value
        finally:
            del error


def cut(start: int, end: int, piece_bytes: int) -> list[tuple[int, int]]:
    """``[start, end)`` in pieces of ``piece_bytes``; the last piece has the rest.

    >>> cut(0, 10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [(first, min(first + piece_bytes, end)) for first in range(start, end, piece_bytes)]


def share_out(
    task: Callable[[tuple[int, int]], None],
    pieces: list[tuple[int, int]],
    num_threads: int,
    at_start: Callable[[], None] = lambda: None,
) -> None:
    """Run ``task`` on every piece, on this thread and on up to ``num_threads - 1`` others.

    The others call ``at_start`` first.

    The first error stops all threads after their piece in progress, and is raised. If the caller is
    interrupted, the threads stop too, and nobody waits for them. A thread pool would not work,
    because it accepts no work once the interpreter is exiting. If no thread can be started, the
    caller's thread does all the work.

    Raises:
        BaseException: the first exception that ``task`` raised, or that interrupted the caller.
    """
    remaining = iter(pieces)  # shared by the threads: each piece is taken once
    ended = threading.Event()
    errors: list[BaseException] = []

    def help_out() -> None:
        try:
            at_start()
        except BaseException as error:
            ended.set()
            errors.append(error)
        else:
            work()

    def work() -> None:
        try:
            for piece in remaining:
                if ended.is_set():
                    return
                task(piece)
        except BaseException as error:
            ended.set()
            errors.append(error)

    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(num_threads, len(pieces)) - 1):
            helper = threading.Thread(target=help_out, name="kvheap-populate", daemon=True)
            try:
                helper.start()
            except RuntimeError as error:
                if is_interrupt(error):
                    raise
                break
            helpers.append(helper)
        work()
        for helper in helpers:
            helper.join()
    except BaseException:
        ended.set()
        raise
    if errors:
        # Popped, so that this frame, which the traceback refers to, does not refer to the error.
        del errors[1:]
        raise errors.pop()
