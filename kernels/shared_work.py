"""Tasks that the calling thread and helper threads share.

A finalizer or a signal handler can run in the middle of this code, on any of its threads, and can
begin shared work of its own. So no lock is held here at any time: queues, latches and single
operations of lists and deques do everything.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import cache, partial
from queue import Empty, SimpleQueue

from kvheap.kernels.latch import Latch

__all__ = ["do_all"]


def do_all(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Do all tasks with at most ``threads`` threads, including the caller's.

    Tasks on other threads run in copies of the caller's ``contextvars`` context.

    Raises:
        BaseException: whatever a task or a signal handler raised. By then, no thread is running a
            task any more; tasks that had not begun are dropped.
    """
    _Work(tasks).run(threads)


class _Work:
    """A queue from which threads take tasks until it is empty or a task fails."""

    def __init__(self, tasks: Sequence[Callable[[], None]]) -> None:
        self._tasks = deque(tasks)
        self._helping: list[Latch] = []
        self._errors: list[BaseException] = []

    def run(self, threads: int) -> None:
        """Do all tasks; return or raise only when no helper is running one."""
        try:
            # Fails if the system is out of threads, or the interpreter is exiting.
            with suppress(RuntimeError):
                for _ in range(threads - 1):
                    _helpers(os.getpid()).submit(partial(copy_context().run, self._help))
            self._drain()
        finally:
            self._close()
        if self._errors:
            # Popped: the error's traceback refers to this frame, which must not refer to the error.
            raise self._errors.pop()

    def _drain(self) -> None:
        try:
            while True:
                try:
                    task = self._tasks.popleft()
                except IndexError:
                    return
                task()
        except BaseException:
            self._tasks.clear()
            raise

    def _help(self) -> None:
        # Known before it takes a task: the caller empties the queue first, and then waits for all
        # helpers that it knows of. A helper that it misses finds no task.
        ended = Latch()
        self._helping.append(ended)
        try:
            self._drain()
        except BaseException as error:
            self._errors.append(error)
        finally:
            ended.open()

    def _close(self) -> None:
        """Wait for busy helpers, however often a signal handler raises meanwhile."""
        interrupt: BaseException | None = None
        while True:
            try:
                self._tasks.clear()
                for ended in self._helping:
                    ended.wait()
                break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


IDLE = None
"""What a thread that waits for a call puts into the list of such threads."""


class _Helpers:
    """Up to ``limit`` daemon threads, which start when they are needed and then wait for calls."""

    def __init__(self, limit: int) -> None:
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._places = deque(range(limit))  # one for each thread that can still start
        self._idle: deque[None] = deque()

    def submit(self, call: Callable[[], object]) -> None:
        """Run a call on some thread, as soon as one has time.

        Raises:
            RuntimeError: a thread is needed and cannot be started; the call is dropped.
        """
        try:
            self._idle.pop()
        except IndexError:
            if self._places:
                threading.Thread(target=self._serve, name="kvheap-copy", daemon=True).start()
        self._calls.put(call)

    def _serve(self) -> None:
        try:
            self._places.popleft()
        except IndexError:  # several calls started a thread for the last place
            return
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                self._idle.append(IDLE)
                call = self._calls.get()
            call()
            del call  # it would keep the work alive until the next call


@cache
def _helpers(pid: int) -> _Helpers:
    """Helper threads of the process ``pid``; a forked process needs its own."""
    return _Helpers(os.cpu_count() or 1)
