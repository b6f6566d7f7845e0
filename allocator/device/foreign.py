"""``ForeignEvent``: the end of work that others do, as their own event or ``Future`` reports it.

Neither an error nor an abort of a transfer says that it has ended: after both, NIXL 1.5.1 still
wrote into blocks that were allocated anew (4,096 of 4,096, over loopback). So a failure ends work
only if it says so, by being a :class:`~kvheap.errors.TransferError`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from kvheap.device.events import POLL_SECONDS, Event, ReportingEvent
from kvheap.errors import TransferError
from kvheap.interrupts import is_interrupt
from kvheap.kernels.latch import Latch

__all__ = ["ForeignEvent", "FutureLike", "is_event"]

LOGGER = logging.getLogger("kvheap")

MAX_POLL_S = 1e-3
"""Longest pause between two queries of an event that cannot be waited for."""

POLLS_PER_DURATION = 16
"""A wait is longer than the work by at most this share of it."""


class FutureLike(Protocol):
    """A ``concurrent.futures.Future``, or an object with its methods."""

    def done(self) -> bool:
        """Whether the work has ended or failed."""
        ...

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        ...

    def exception(self) -> BaseException | None:
        """Why it failed, if it is done."""
        ...


def is_event(work: object) -> bool:
    """Whether an object is an event or a future; a class of them is neither."""
    if isinstance(work, type):
        return False
    return _has(work, "query") or _has(work, "done", "cancelled", "exception")


def _has(work: object, *names: str) -> bool:
    return all(callable(getattr(work, name, None)) for name in names)


class ForeignEvent(ReportingEvent):
    """The end of foreign work.

    - an event whose ``query`` is true, or a future with a result: the work has ended;
    - a ``TransferError``, raised by ``query`` or ``synchronize`` or set in a future; a cancelled
      ``concurrent.futures.Future``, which never ran: it has failed, and ended;
    - any other failure: it has failed and is stuck, until ``query`` returns true after all.

    Args:
        work: the event or the future.
        name: who does the work, for messages.

    Raises:
        TypeError: ``work`` is neither.
    """

    __slots__ = ("_cause", "_name", "_work")

    def __init__(self, work: Any, name: str) -> None:
        if not is_event(work):
            raise TypeError(
                f"an event must have query(), and a future done(), cancelled() and exception(), "
                f"got {work!r}"
            )
        self._work: _Work | None = _work_of(work)
        self._name = name
        self._cause: BaseException | None = None

    def query(self) -> bool:
        """Whether the work has ended, successfully or not."""
        work = self._work
        if work is None:
            return True
        has_ended, cause = work.state()
        self._note(work, has_ended, cause)
        return has_ended

    def synchronize(self) -> None:
        """Wait until the work has ended, or is stuck.

        Raises:
            RuntimeError: it is an ``asyncio`` future of the loop that runs this code.
        """
        work = self._work
        if work is None or self.is_stuck:
            return
        self._note(work, *work.wait())
        begun = time.monotonic()
        while not self.query() and not self.is_stuck:
            pause_s = (time.monotonic() - begun) / POLLS_PER_DURATION
            time.sleep(min(max(pause_s, POLL_SECONDS), MAX_POLL_S))

    def error(self) -> TransferError | None:
        """Why the work failed; None while it runs, and if it succeeded."""
        return None if self._cause is None else self._failure()

    def require_success(self) -> None:
        """Raise if the work is known to have failed.

        Raises:
            TransferError: it has.
        """
        if self._cause is not None:
            raise self._failure()  # in no local variable, as in ``Completion``

    @property
    def is_stuck(self) -> bool:
        """Whether the work has failed and is not known to have ended."""
        return self._cause is not None and self._work is not None

    def _note(self, work: _Work, has_ended: bool, cause: BaseException | None) -> None:
        if cause is not None and self._cause is None:
            self._cause = cause
            LOGGER.error(
                "a transfer by %s failed%s",
                self._name,
                "" if has_ended else ": its blocks stay allocated until it is known to have ended",
                exc_info=cause,
            )
        if cause is not None:
            work.forget_frames(cause)  # each time: an event may raise one error again and again
        if has_ended:
            self._work = None  # it may keep memory alive

    def _failure(self) -> TransferError:
        """A new object for the error, which must be known."""
        cause = self._cause
        if isinstance(cause, TransferError):
            error = TransferError(*cause.args)
            error.__cause__ = cause.__cause__
            return error
        error = TransferError(f"a transfer by {self._name} failed: {cause!r}")
        error.__cause__ = cause
        return error


class _EventWork:
    """Asks an event."""

    __slots__ = ("_event",)

    def __init__(self, event: Event) -> None:
        self._event = event

    def state(self) -> tuple[bool, BaseException | None]:
        """Whether the work has ended, and why it failed."""
        return self._answer(self._event.query)

    def wait(self) -> tuple[bool, BaseException | None]:
        """Wait, if the event can be waited for; what is known then of the work."""
        wait = getattr(self._event, "synchronize", None)
        if not callable(wait):
            return False, None
        _, cause = self._answer(lambda: bool(wait()))
        return isinstance(cause, TransferError), cause

    def forget_frames(self, cause: BaseException) -> None:
        """The frames of an error that was raised to us, and of what we handled, keep memory."""
        cause.__traceback__ = cause.__context__ = None

    def _answer(self, question: Callable[[], bool]) -> tuple[bool, BaseException | None]:
        try:
            return bool(question()), None
        except Exception as cause:
            if is_interrupt(cause):
                raise
            return isinstance(cause, TransferError), cause


class _FutureWork:
    """Asks a future of ``asyncio``, or another that takes no lock."""

    __slots__ = ("_future",)

    def __init__(self, future: Any) -> None:
        self._future = future

    def state(self) -> tuple[bool, BaseException | None]:
        """Whether the work has ended, and why it failed."""
        return _outcome(self._future) if self._future.done() else (False, None)

    def wait(self) -> tuple[bool, BaseException | None]:
        """What is known of the work; ``ForeignEvent`` asks again until it has ended."""
        future = self._future
        if asyncio.isfuture(future) and not future.done():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # none runs on this thread
                loop = None
            if loop is future.get_loop():
                raise RuntimeError(
                    f"{future!r} cannot end while its event loop waits for it: await the transfer "
                    f"instead"
                )
        return self.state()

    def forget_frames(self, cause: BaseException) -> None:
        """Nothing: the error is the future's, which shows it to others."""


class _CalledBack:
    """Is told the outcome of a ``concurrent.futures.Future``.

    Such a future takes a lock to say whether it is done. A signal handler that raises there, on the
    main thread, would leave it locked, and block whichever thread asks next.
    """

    __slots__ = ("_ended", "_outcome")

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._ended = Latch()
        self._outcome: tuple[bool, BaseException | None] = (False, None)
        future.add_done_callback(self._note)

    def _note(self, future: concurrent.futures.Future[Any]) -> None:
        self._outcome = _outcome(future)
        self._ended.open()

    def state(self) -> tuple[bool, BaseException | None]:
        """Whether the work has ended, and why it failed."""
        return self._outcome

    def wait(self) -> tuple[bool, BaseException | None]:
        """Wait until the future is done."""
        self._ended.wait()
        return self._outcome

    def forget_frames(self, cause: BaseException) -> None:
        """Nothing: the error is the future's, which shows it to others."""


def _outcome(future: Any) -> tuple[bool, BaseException | None]:
    """Whether the work of a future that is done has ended, and why it failed."""
    if future.cancelled():
        # What an asyncio future stands for may go on when it is cancelled.
        never_ran = isinstance(future, concurrent.futures.Future)
        return never_ran, concurrent.futures.CancelledError("it was cancelled")
    cause: BaseException | None = future.exception()
    return cause is None or isinstance(cause, TransferError), cause


def _work_of(work: Any) -> _Work:
    if _has(work, "query"):
        return _EventWork(work)
    if isinstance(work, concurrent.futures.Future):
        return _CalledBack(work)
    return _FutureWork(work)


_Work: TypeAlias = _EventWork | _FutureWork | _CalledBack
