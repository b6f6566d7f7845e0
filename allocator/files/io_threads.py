"""``IOThreads``: threads that read, write and keep the books of one tier.

Callers never wait for a lock of a tier, so finalizers and signal handlers may call it: they put a
job into a queue. Loads have threads of their own, so that none waits behind stores, and so have
short changes of the books. A thread makes a whole job, so each job that was begun goes on whatever
the others do; idle threads of the same queue help with its pieces.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Generic, Literal, TypeVar

from kvheap.kernels.latch import Latch

__all__ = ["IOThreads", "Kind"]

LOGGER = logging.getLogger("kvheap")

Answer = TypeVar("Answer")
Piece = TypeVar("Piece")

Kind = Literal["load", "store", "short"]

Job = Callable[[], object]

LOOK_S = 1.0
"""Seconds between two looks at whether the threads have ended."""


class IOThreads:
    """The threads of one tier.

    Args:
        num_threads: for loads, and as many for stores.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._queues: dict[Kind, SimpleQueue[Job | None]] = {
            "short": SimpleQueue(),
            "load": SimpleQueue(),
            "store": SimpleQueue(),
        }
        self._here = threading.local()
        self._threads: list[threading.Thread] = []
        self.have_ended = Latch()
        """Opened once all threads have ended and the last call was made."""

    def start(self) -> None:
        """Start them, once.

        Raises:
            RuntimeError: the system does not let so many threads start: :meth:`abandon` the others.
        """
        for kind, queue in self._queues.items():
            for number in range(1 if kind == "short" else self._num_threads):
                thread = threading.Thread(
                    target=self._work,
                    args=(queue,),
                    name=f"kvheap-{kind}-{number}",
                    daemon=True,
                )
                self._threads.append(thread)  # first: the start may be interrupted
                thread.start()

    def abandon(self) -> None:
        """End the threads that were started, in the middle of :meth:`start` or after it.

        None has a job. Returns when they have ended, but for one whose start was interrupted.
        """
        for queue in self._queues.values():
            queue.put(None)
        for thread in self._threads:
            with suppress(RuntimeError):  # it was not started
                thread.join()
        self.have_ended.open()

    def _work(self, queue: SimpleQueue[Job | None]) -> None:
        here = self._here
        here.queue = queue
        while (job := queue.get()) is not None:
            here.is_busy = True
            _make(job)
            here.is_busy = False
            del job  # it may keep memory alive
        queue.put(None)  # for the next thread of this queue

    def submit(self, kind: Kind, job: Job) -> None:
        """Let a thread make a job; jobs of a kind begin in the order of these calls."""
        self._queues[kind].put(job)

    def ask(self, question: Callable[[], Answer], closed: Callable[[], Exception]) -> Answer:
        """What a short call returns or raises that one of the threads makes.

        Args:
            question: the call.
            closed: the error to raise if the threads end without making it.
        """
        answers: list[Answer] = []
        errors: list[BaseException] = []
        is_done = Latch()

        def make() -> None:
            try:
                answers.append(question())
            except BaseException as error:
                errors.append(error)
            is_done.open()

        self.submit("short", make)
        while not is_done.wait(LOOK_S):
            if self.have_ended.is_open and not is_done.is_open:
                raise closed()
        if errors:
            raise errors.pop()
        return answers.pop()

    def share(self, task: Callable[[Piece], object], pieces: Sequence[Piece]) -> None:
        """Do ``task`` for all pieces, on this thread and on idle ones; returns when all are done.

        Args:
            task: must not raise.
            pieces: what it is called with.
        """
        work = _SharedWork(task, pieces)
        queue = getattr(self._here, "queue", None)
        if queue is not None:
            for _ in range(min(self._num_threads, len(pieces)) - 1):
                queue.put(work.help)
        work.finish()

    def is_here(self) -> bool:
        """Whether the calling thread is making a job, and cannot wait for others."""
        return bool(getattr(self._here, "is_busy", False))

    def mark_busy(self, is_busy: bool) -> None:
        """Note whether the calling thread, one of these, makes a job or waits for its turn."""
        self._here.is_busy = is_busy

    def stop(self, last: Callable[[], object]) -> None:
        """Let the threads end after all jobs so far, and call ``last`` when they have.

        May be repeated, with the same ``last``, which is then called again or not.
        """
        for kind in ("load", "store"):
            self._queues[kind].put(None)
        self._queues["short"].put(partial(self._end, last))
        self._queues["short"].put(None)

    def _end(self, last: Callable[[], object]) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        _make(last)
        self.have_ended.open()


class _SharedWork(Generic[Piece]):
    """Pieces that several threads take one after another."""

    def __init__(self, task: Callable[[Piece], object], pieces: Sequence[Piece]) -> None:
        self._task: Callable[[Piece], object] | None = task
        self._left: Iterator[Piece] = iter(pieces)
        self._num_pieces = len(pieces)
        self._done: list[int] = []  # by each thread that took some
        self._is_done = Latch()

    def help(self) -> None:
        """Take pieces until none is left."""
        task = self._task
        if task is None:
            return
        done = 0
        for piece in self._left:
            task(piece)
            done += 1
        self._done.append(done)
        if sum(self._done) == self._num_pieces:  # the last one to append sees all
            self._is_done.open()

    def finish(self) -> None:
        """Take pieces until none is left, and wait for those that others have taken."""
        self.help()
        self._is_done.wait()
        self._task = None


def _make(job: Job) -> None:
    """Make a job; one that nobody waits for leaves its error to the log."""
    try:
        job()
    except BaseException:
        LOGGER.exception("a job of a FileTier has failed")
