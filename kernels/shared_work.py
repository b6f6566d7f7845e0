"""Tasks that the calling thread and helper threads share."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

__all__ = ["do_all"]


def do_all(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Do all tasks with at most ``threads`` threads, including the caller's.

    Raises:
        BaseException: whatever a task or a signal handler raised. By then, no thread is running a
            task any more; tasks that had not begun are dropped.
    """
    _Work(tasks).run(threads)


class _Work:
    """A queue from which threads take tasks until it is empty or a task fails."""

    def __init__(self, tasks: Sequence[Callable[[], None]]) -> None:
        self._tasks = deque(tasks)
        self._num_busy = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def run(self, threads: int) -> None:
        """Do all tasks; return or raise only when no helper is running one."""
        try:
            # Fails if the system is out of threads, or the interpreter is exiting.
            with suppress(RuntimeError):
                for _ in range(threads - 1):
                    _helpers(os.getpid()).submit(self._help)
            self._drain()
        finally:
            self._close()
        if self._error is not None:
            raise self._error

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
        with self._changed:
            if not self._tasks:  # the helper started late; the caller may have returned long ago
                return
            self._num_busy += 1
        try:
            self._drain()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._num_busy -= 1
                self._changed.notify_all()

    def _close(self) -> None:
        """Wait for busy helpers, however often a signal handler raises meanwhile."""
        self._tasks.clear()
        interrupt: BaseException | None = None
        while True:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: not self._num_busy)
                break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


@cache
def _helpers(pid: int) -> ThreadPoolExecutor:
    """Helper threads of the process ``pid``; a forked process needs its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kvheap-copy")
