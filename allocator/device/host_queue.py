"""``HostQueue``: runs copies within host memory in order, like a stream.

A finalizer, a signal handler or an ``atexit`` function may call anything here, in the middle of any
call, on the caller's thread or on the thread that copies. So no lock is held at any time: a job
waits in a dict, whoever holds a :class:`~kvheap.claims.Claim` runs the jobs in order, and events
are latches.

One thing cannot be had: the thread that makes a copy cannot wait for that copy, or for one behind
it. A finalizer that runs there and tries gets a :class:`NestedWaitError` instead.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from queue import Empty, SimpleQueue

from kvheap.claims import Claim
from kvheap.device.events import POLL_SECONDS, ReportingEvent
from kvheap.errors import TransferError
from kvheap.forks import starts_over_after_fork
from kvheap.interrupts import is_interrupt
from kvheap.kernels.latch import Latch

__all__ = ["HostEvent", "HostJob", "HostQueue", "NestedWaitError", "host_queue"]

LOGGER = logging.getLogger("kvheap")

IDLE_S = 0.05
"""Seconds between two looks of an idle thread at whether the program is ending."""

MAX_IDLE_LOOKS = 20
"""An idle thread ends after so many looks."""

_is_copying: ContextVar[bool] = ContextVar("kvheap_is_copying", default=False)
"""Whether this thread, or the one that it helps, makes the queue's copies."""


class NestedWaitError(RuntimeError):
    """The thread that makes a copy was told to wait for it, or for one that comes after it."""


class HostEvent(ReportingEvent):
    """The end of a task of a job.

    Attributes:
        is_submitted: whether the job is in the queue, or runs: it comes before what is queued now.
        runner: the thread that runs the job, by its ``threading.get_ident``; 0: none yet.
    """

    __slots__ = ("_cause", "_ended", "is_submitted", "runner")

    asks_device = False

    def __init__(self) -> None:
        self._ended = Latch()
        self._cause: BaseException | None = None
        self.is_submitted = False
        self.runner = 0

    def query(self) -> bool:
        """Whether the task has ended."""
        return self._ended.is_open

    def synchronize(self) -> None:
        """Wait until the task has ended.

        Raises:
            NestedWaitError: the task cannot end before this call returns.
        """
        if not self._ended.is_open and (_is_copying.get() or self.runner == threading.get_ident()):
            raise NestedWaitError(
                "the thread that makes a copy cannot wait for it: a finalizer that the garbage "
                "collector runs there must not wait for transfers"
            )
        self._ended.wait()

    def error(self) -> TransferError | None:
        """Why the task failed; None while it runs, and if it succeeded."""
        return None if self._cause is None else self._failure(self._cause)

    def require_success(self) -> None:
        """Raise if the task is known to have failed.

        Raises:
            TransferError: it has.
        """
        if self._cause is not None:
            raise self._failure(self._cause)  # in no local variable, as in ``Completion``

    def end(self, cause: BaseException | None) -> None:
        """Note that the task has ended, and why it failed, if it did.

        The failure is logged, and kept without its traceback, whose frames hold the memory.
        """
        if cause is not None and not isinstance(cause, TransferError):
            LOGGER.error("a copy in host memory failed", exc_info=cause)
            cause.__traceback__ = None
        self._cause = cause
        self._ended.open()

    def _failure(self, cause: BaseException) -> TransferError:
        """A new object for the error."""
        if isinstance(cause, TransferError):
            error = TransferError(*cause.args)
            error.__cause__ = cause.__cause__
        else:
            error = TransferError(f"a copy in host memory failed: {cause}")
            error.__cause__ = cause
        return error


class HostJob:
    """Tasks of one call, which run one after another; if one fails, those after it fail too.

    Args:
        tasks: the tasks.
        at_end: called when the last task has ended, on the same thread.
    """

    __slots__ = ("_at_end", "_right", "_tasks", "events")

    def __init__(
        self, tasks: Sequence[Callable[[], None]], at_end: Callable[[], object] | None = None
    ) -> None:
        self._tasks = list(tasks)
        self._at_end = at_end
        self._right = Claim()  # never given up: a job runs once, or is withdrawn
        self.events = [HostEvent() for _ in self._tasks]
        """The end of each task."""

    def run(self) -> None:
        """Run the tasks, unless the job has run or was withdrawn.

        Raises:
            BaseException: what a signal handler raised. Tasks that had not ended have failed.
        """
        me = [threading.get_ident()]
        failure: BaseException | None = None
        try:
            if self._right.take(me):
                for event in self.events:
                    event.runner = me[0]
                    event.is_submitted = True
                for task, event in zip(self._tasks, self.events, strict=True):
                    if failure is None:
                        try:
                            task()
                        except Exception as error:
                            if is_interrupt(error):
                                raise
                            failure = error
                    event.end(failure)
        except BaseException as interrupt:
            # Not itself: it is raised on, and collects the frames that it passes.
            failure = TransferError(f"the copy was interrupted: {interrupt!r}")
            raise
        finally:
            if self._right.holder is me:
                self._finish(failure)
            del failure  # whose traceback refers to this frame

    def withdraw(self) -> bool:
        """Give the job up unless it has begun; returns whether none of its tasks ran, or will.

        If this thread had begun it, an exception has ended that, and perhaps also what was to end
        the events: they are ended here.
        """
        me = [threading.get_ident()]
        self._right.take(me)
        holder = self._right.holder
        if holder is me:
            self._finish(TransferError("the copy was withdrawn before it began"))
        elif holder == me:
            self._finish(TransferError("the copy was interrupted"))
        return holder is me

    def _finish(self, failure: BaseException | None) -> None:
        for event in self.events:
            if not event.query():
                event.end(failure)
        self._tasks = []  # they keep memory alive
        at_end, self._at_end = self._at_end, None
        if at_end is not None:
            at_end()


class HostQueue:
    """Runs jobs one after another on one thread, which starts with a job and ends when idle.

    At the end of the program, all jobs are run before the interpreter goes. When no thread can be
    started, as in ``atexit`` functions and at the system's limit, the caller's thread runs them.
    """

    def __init__(self) -> None:
        self.start_over_after_fork()
        starts_over_after_fork(self)

    def start_over_after_fork(self) -> None:
        """Forget all jobs: a forked child has no queue thread."""
        # In order; a job stays until it has ended, so that no exception can lose one.
        self._jobs: dict[HostJob, None] = {}
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._runner = Claim()

    def run(self, tasks: Sequence[Callable[[], None]], is_small: bool) -> list[HostEvent]:
        """Queue tasks in order; see :meth:`submit`.

        Returns:
            The end of each task.
        """
        job = HostJob(tasks)
        self.submit(job, is_small)
        return job.events

    def submit(self, job: HostJob, is_small: bool) -> None:
        """Queue a job.

        Args:
            job: the job.
            is_small: run it on the calling thread, unless the queue is busy.

        Raises:
            BaseException: what a signal handler raised; :meth:`withdraw` then tells whether the
                job has begun.
        """
        if is_small and not self._jobs:
            job.run()
        elif _is_copying.get() or not _is_ending():
            self._jobs[job] = None
            for event in job.events:
                event.is_submitted = True
            self._wake.put(None)
            # Whoever runs jobs, be it a caller of this call, looks at the queue once more at its
            # end.
            if not self._runner.is_taken and not self._start_thread():
                self._run_all()
        else:
            # The program is ending: nobody waits any more for a thread that starts now, and the
            # thread that there is must not get more work for ever.
            while not self._run_all(job):
                time.sleep(POLL_SECONDS)

    def _start_thread(self) -> bool:
        work = partial(_work, self._jobs, self._wake, self._runner)
        # No daemon: the interpreter waits for it, and so for the copies.
        thread = threading.Thread(target=work, name="kvheap-copy", daemon=False)
        try:
            thread.start()
        except RuntimeError as error:  # the system's limit, or the interpreter is exiting
            if is_interrupt(error):
                raise
            return False
        return True

    def _run_all(self, last: HostJob | None = None) -> bool:
        """Run all jobs on the calling thread, then ``last``; False if another thread runs jobs."""
        # In a copy of the context, so that what is set there ends with the call.
        is_mine = True
        while is_mine and (self._jobs or last is not None):
            is_mine = copy_context().run(_run_here, self._jobs, self._runner, last)
            last = None
        return is_mine

    def drain(self) -> None:
        """Wait until all jobs have ended."""
        while self._jobs and not self._run_all():
            time.sleep(POLL_SECONDS)

    def withdraw(self, job: HostJob) -> bool:
        """Give a job up unless it has begun; returns whether none of its tasks ran, or will."""
        is_withdrawn = job.withdraw()
        if is_withdrawn:
            self._jobs.pop(job, None)
        return is_withdrawn


def _work(jobs: dict[HostJob, None], wake: SimpleQueue[None], runner: Claim) -> None:
    """The queue's thread: run all jobs, and stay a while for more."""
    _is_copying.set(True)
    me = object()
    while runner.take(me):
        looks = 0
        try:
            while looks < MAX_IDLE_LOOKS and (jobs or not _is_ending()):
                with suppress(BaseException):  # the job has it; no signal is handled here
                    _run_in_order(jobs)
                try:
                    wake.get(timeout=IDLE_S)
                    looks = 0
                except Empty:
                    looks += 1
        finally:
            runner.give_up(me)
        if not jobs:  # else one came while the claim was not given up yet
            return


def _run_here(jobs: dict[HostJob, None], runner: Claim, last: HostJob | None) -> bool:
    """Run all jobs on the calling thread, then ``last``; False if another thread runs jobs."""
    _is_copying.set(True)
    me = object()
    try:
        if not runner.take(me):
            return False
        _run_in_order(jobs)
        if last is not None:
            last.run()
        return True
    finally:
        try:
            runner.give_up(me)
        finally:  # once more, if a signal handler raised in there
            runner.give_up(me)


def _run_in_order(jobs: dict[HostJob, None]) -> None:
    while jobs:
        try:
            job = next(iter(jobs))
        except (RuntimeError, StopIteration):  # a job came, or was withdrawn, at this moment
            continue
        job.run()
        jobs.pop(job, None)


_ending = Latch()


def _is_ending() -> bool:
    """Whether the program is ending: the main thread has come to its end, or to ``atexit``."""
    main = threading.main_thread()
    # The main thread never asks about itself: if a signal handler raises in ``is_alive``, CPython
    # up to 3.12 takes the thread for dead.
    if threading.current_thread() is not main and not main.is_alive():
        _ending.open()
    return _ending.is_open


host_queue = HostQueue()
"""The queue of this process."""


@atexit.register
def _end() -> None:
    _ending.open()
    host_queue.drain()
