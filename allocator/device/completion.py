"""``Completion``: when an asynchronous copy has ended, and how.

One object stands for it on every side. A batch records it as it records a stream, so that bytes
freed meanwhile wait for it; a release takes it for an event; the transfer asks it. It knows
neither batches nor heaps: what it keeps alive are the buffers that the copy reads and writes, and
those only until it has ended. Copies that nobody asks about are looked at whenever another begins.

States, of which the last two are final:

- *begun*: bytes are protected, nothing of the copy is known to have been queued;
- *queued*: an event tells when it will have ended;
- *ended*: whatever was queued has ended; with an error, not all of the copy was done;
- *lost*: its event cannot be asked (the device is gone). The bytes of such a copy are never
  handed out again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from typing import Protocol, TypeVar

from kvheap.blocks.lifetime import POLL_SECONDS, ReleaseVoidError
from kvheap.errors import TransferError

__all__ = [
    "Answer",
    "Completion",
    "DeviceEvent",
    "FutureEvent",
    "HostQueue",
    "NotAllQueuedError",
    "Success",
]

Answer = TypeVar("Answer")

LOOKED_AT = 8
"""How many copies in flight are looked at when another begins."""


class DeviceEvent(Protocol):
    """A point in a stream's work, as ``torch.cuda.Event`` is."""

    def query(self) -> bool:
        """Whether the work up to this point has ended."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until it has."""
        ...


class Completion:
    """When a copy has ended; a stream and an event to those who protect bytes with it.

    Args:
        keep: what the copy reads or writes, kept alive until it has ended.
    """

    __slots__ = ("__weakref__", "_error", "_event", "_keep", "_state")

    def __init__(self, keep: Sequence[object] = ()) -> None:
        self._keep: list[object] = list(keep)
        self._event: DeviceEvent | None = None
        self._error: TransferError | None = None
        self._state = "begun"

    # -- what those who protect bytes see ------------------------------------------------------

    def record_event(self) -> Completion:
        """Itself: the end of this copy, not of what else its stream was given."""
        return self

    def query(self) -> bool:
        """Whether the copy reads and writes no more; that it was done is not said.

        Raises:
            TransferError: it cannot be known, and never will be.
        """
        if self._state == "ended":
            return True
        event = self._event
        if self._state == "lost":
            error = self.error
            assert error is not None
            raise error
        if event is None or not self.ask(event.query):
            return False
        self._end()
        return True

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer of one of the copy's events.

        Raises:
            TransferError: it has none, and never will.
        """
        try:
            return question()
        except Exception as cause:
            self.lose(cause)
            error = self.error or TransferError(f"the device cannot be asked: {cause}")
            raise error from cause

    @property
    def is_lost(self) -> bool:
        """Whether the device cannot say when it has done with the bytes."""
        return self._state == "lost"

    @property
    def is_done(self) -> bool:
        """Whether all of the copy is known to have been done. Asks nobody."""
        return self._state == "ended" and self._error is None

    @property
    def has_let_go(self) -> bool:
        """Whether the copy is known to read and write no more."""
        return self.has_ended and not self.is_lost

    @property
    def has_ended(self) -> bool:
        """Whether nothing more can be learned: it ended, or was lost."""
        try:
            return self.query()
        except TransferError:
            return True

    # -- what the copy says --------------------------------------------------------------------

    def keep(self, *objects: object) -> None:
        """Keep these too until the copy has ended."""
        self._keep += objects

    def queued(self, event: DeviceEvent) -> None:
        """All of the copy that will ever be queued is; ``event`` tells when it has ended."""
        # In this order: once there is an event, another thread may find that all has ended.
        self._state = "queued"
        self._event = event

    def nothing_queued(self) -> None:
        """The copy has ended, since none of it was begun; unless it is known to have been."""
        if self._state == "begun":
            self._end()

    def ended(self) -> None:
        """All that was queued has ended."""
        self._end()

    def failed(self, error: TransferError) -> None:
        """The copy will not be done; said before :meth:`queued`, of what was begun of it.

        It is told in the log too, with its traceback: its holder may never ask. The error itself
        keeps none, whose frames would keep batches.
        """
        cause = error.__cause__
        logging.getLogger("kvheap").error("%s", error, exc_info=cause or error)
        if cause is not None:
            cause.__traceback__ = None
        self._error = error

    def lose(self, cause: BaseException) -> None:
        """The device cannot say when it has done with the bytes."""
        if self._state == "ended":
            return
        if self._error is None:
            self._error = TransferError(f"the device cannot be asked about a transfer: {cause}")
        self._state = "lost"

    def _end(self) -> None:
        self._error = self.error
        self._state = "ended"
        self._event = None
        self._keep = []

    # -- what the transfer asks ----------------------------------------------------------------

    @property
    def error(self) -> TransferError | None:
        """Why it failed, as far as is known; None while all is well.

        Made anew for each who asks: an error that is raised keeps the frames it went through, and
        they would be kept as long as the copy is known.
        """
        event = self._event
        if self._error is None and isinstance(event, FutureEvent):
            self._error = event.error()
        if self._error is None:
            return None
        error = TransferError(*self._error.args)
        error.__cause__ = self._error.__cause__
        return error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended or is lost; whether it has within ``timeout_s`` seconds."""
        if self.has_ended:
            return True
        event = self._event
        if timeout_s is None and event is not None:
            try:
                self.ask(event.synchronize)
            except TransferError:
                return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.has_ended:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


class Success:
    """The event of bytes that are given up once a copy has been done, and only then."""

    __slots__ = ("_completion",)

    def __init__(self, completion: Completion) -> None:
        self._completion = completion

    def query(self) -> bool:
        """Whether the copy was done.

        Raises:
            ReleaseVoidError: it has failed.
        """
        completion = self._completion
        ended = completion.has_ended
        if ended and completion.error is not None:
            raise ReleaseVoidError("the copy for which the blocks were given up has failed")
        return ended


class InFlight:
    """Copies that have begun, kept until they have ended: their buffers are kept by them."""

    def __init__(self) -> None:
        self._begun: deque[Completion] = deque()
        self._lost: list[Completion] = []

    def add(self, completion: Completion) -> None:
        """Keep a copy, and let go of a few that have ended."""
        for _ in range(min(len(self._begun), LOOKED_AT)):
            try:
                other = self._begun.popleft()
            except IndexError:  # another thread took it
                break
            if not other.has_ended:
                self._begun.append(other)
            elif other.is_lost:  # a device that is gone may still write
                self._lost.append(other)
        self._begun.append(completion)

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._begun)


in_flight = InFlight()
"""Of this process."""


class FutureEvent:
    """The end of work on a thread, as an event."""

    __slots__ = ("_future",)

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def query(self) -> bool:
        """Whether it has ended."""
        return self._future.done()

    def synchronize(self) -> None:
        """Wait until it has."""
        wait_for_futures([self._future])

    def error(self) -> TransferError | None:
        """Why it failed; None while it runs, and when it did not."""
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
    """Some works could not be queued, which its cause tells; the others are not done either.

    Attributes:
        events: of those that were at work already.
    """

    def __init__(self, events: list[FutureEvent]) -> None:
        super().__init__(f"{len(events)} works were at work already")
        self.events = events


class HostQueue:
    """Copies within host memory, one after another on one thread, as a stream runs them."""

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forget what was queued, as a forked child must: it has no thread, nor the lock."""
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def run(self, works: Sequence[Callable[[], None]], is_small: bool) -> list[FutureEvent]:
        """Queue ``works`` in order. One that fails fails those behind it.

        Args:
            works: what to do; each waits for nothing but the one before.
            is_small: do it here and now, unless the queue is at work.

        Returns:
            An event for each.

        Raises:
            NotAllQueuedError: some could not be queued.
        """
        with self._lock:
            is_idle = self._last is None or self._last.done()
            if not is_small or not is_idle:
                return self._queue(works)
        return self._run_here(works)

    def _queue(self, works: Sequence[Callable[[], None]]) -> list[FutureEvent]:
        futures: list[Future[None]] = []
        try:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvheap-copy")
            for work in works:
                before = futures[-1] if futures else None
                futures.append(self._executor.submit(_after, before, work))
                self._last = futures[-1]
        except BaseException as error:  # no more threads, an interpreter that exits, an interrupt
            at_work = [future for future in futures if not future.cancel()]
            raise NotAllQueuedError([FutureEvent(future) for future in at_work]) from error
        return [FutureEvent(future) for future in futures]

    def _run_here(self, works: Sequence[Callable[[], None]]) -> list[FutureEvent]:
        events: list[FutureEvent] = []
        failure: Exception | None = None
        for work in works:
            future: Future[None] = Future()
            try:
                if failure is None:
                    work()
            except Exception as error:
                failure = error
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)
            events.append(FutureEvent(future))
        return events


def _after(before: Future[None] | None, work: Callable[[], None]) -> None:
    if before is not None:
        before.result()
    work()


host_queue = HostQueue()
"""Of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=host_queue.start_over)
