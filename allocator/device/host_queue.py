"""``HostQueue``: runs copies within host memory in order, like a stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures

from kvheap.errors import TransferError
from kvheap.forks import starts_over_after_fork

__all__ = ["FutureEvent", "HostQueue", "NotAllQueuedError", "host_queue"]


class FutureEvent:
    """The end of a task on a thread, as an event."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def query(self) -> bool:
        """Whether the task has ended."""
        return self._future.done()

    def synchronize(self) -> None:
        """Wait until the task has ended."""
        wait_for_futures([self._future])

    def error(self) -> TransferError | None:
        """Why the task failed; None while it runs, and if it succeeded."""
        if not self._future.done():
            return None
        cause = None if self._future.cancelled() else self._future.exception()
        if cause is None:
            return None
        if isinstance(cause, TransferError):
            return cause
        error = TransferError(f"a copy in host memory failed: {cause}")
        error.__cause__ = cause
        return error


class NotAllQueuedError(Exception):
    """Some tasks could not be queued, for the reason in ``__cause__``; waiting tasks are dropped.

    Attributes:
        events: the ends of the tasks that were already running.
    """

    def __init__(self, events: list[FutureEvent]) -> None:
        super().__init__(f"not all tasks could be queued; {len(events)} were already running")
        self.events = events


class HostQueue:
    """Runs tasks one after another on one thread, which starts with the first task."""

    def __init__(self) -> None:
        self.start_over_after_fork()
        starts_over_after_fork(self)

    def start_over_after_fork(self) -> None:
        """Forget all tasks: a forked child has no queue thread, and the lock may be held."""
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def run(self, tasks: Sequence[Callable[[], None]], is_small: bool) -> list[FutureEvent]:
        """Queue tasks in order. If one fails, those after it fail too.

        Args:
            tasks: the tasks; each waits for the task before it.
            is_small: run the tasks on the calling thread, unless the queue is busy.

        Returns:
            The end of each task.

        Raises:
            NotAllQueuedError: some tasks could not be queued.
        """
        with self._lock:
            is_idle = self._last is None or self._last.done()
            if not is_small or not is_idle:
                return self._queue(tasks)
        return self._run_here(tasks)

    def _queue(self, tasks: Sequence[Callable[[], None]]) -> list[FutureEvent]:
        futures: list[Future[None]] = []
        try:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvheap-copy")
            for task in tasks:
                before = futures[-1] if futures else None
                futures.append(self._executor.submit(_run_after, before, task))
                self._last = futures[-1]
        except BaseException as error:  # no more threads, interpreter exit, or an interrupt
            running = [future for future in futures if not future.cancel()]
            raise NotAllQueuedError([FutureEvent(future) for future in running]) from error
        return [FutureEvent(future) for future in futures]

    def _run_here(self, tasks: Sequence[Callable[[], None]]) -> list[FutureEvent]:
        events: list[FutureEvent] = []
        failure: Exception | None = None
        for task in tasks:
            future: Future[None] = Future()
            try:
                if failure is None:
                    task()
            except Exception as error:
                failure = error
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)
            events.append(FutureEvent(future))
        return events


def _run_after(before: Future[None] | None, task: Callable[[], None]) -> None:
    if before is not None:
        before.result()
    task()


host_queue = HostQueue()
"""The queue of this process."""
