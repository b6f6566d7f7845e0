"""``Completion``: the state of an asynchronous copy: whether it has ended, and with which error.

One object plays three roles. A batch records it as a stream, so that bytes freed during the copy
wait for it. A release waits for it as an event. A transfer reads the copy's state from it. It does
not depend on batches or heaps. It keeps the buffers that the copy reads and writes alive until the
copy has ended. Copies that nobody queries are checked when other copies begin (:class:`InFlight`).

States; the last two are final:

- *begun*: the bytes are protected, and nothing of the copy is known to be queued;
- *queued*: everything is queued, and an event marks its end;
- *ended*: everything queued has ended; if there is an error, the copy is incomplete;
- *lost*: the event cannot be queried (the device is gone). The bytes of such a copy are never
  reused.

A copy that others make can also fail without an end (``is_stuck``): it is over for whoever waits,
and its bytes are reused once its event says that it has ended after all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.device.copy_device import CopyDevice
from kvheap.device.events import POLL_SECONDS, DeviceEvent, ReleaseVoidError, ReportingEvent
from kvheap.device.host_queue import HostEvent, NestedWaitError
from kvheap.errors import TransferError
from kvheap.forks import starts_over_after_fork
from kvheap.interrupts import is_interrupt
from kvheap.kernels.capture_mode import Relaxed

__all__ = ["Answer", "Completion", "InFlight", "Success", "in_flight"]

LOGGER = logging.getLogger("kvheap")

Answer = TypeVar("Answer")

CHECKED_COPIES = 8
"""Number of copies in flight that are checked when another begins."""


class Completion:
    """The state of a copy. It is also the stream and the event that protect the copy's bytes.

    - to protect bytes: ``record_event``, ``query``, ``has_let_go``;
    - for the code that queues the copy: ``keep``, ``filled``, ``queued``, ``nothing_queued``,
      ``ended``, ``failed``, ``lose``;
    - for the code that queues others behind it: ``is_using``, ``fills``, ``is_on``,
      ``wait_stream``, ``is_foreign``;
    - for the transfer: ``ask``, ``wait``, ``error``, ``require_success``, ``has_ended``,
      ``is_done``, ``is_lost``.

    Args:
        keep: objects that the copy reads or writes; kept alive until the copy has ended.
    """

    __slots__ = (
        "__weakref__",
        "_error",
        "_event",
        "_keep",
        "_state",
        "_stream",
        "filled",
        "is_over",
    )

    def __init__(self, keep: Sequence[object] = ()) -> None:
        self._keep: list[object] = list(keep)
        self._event: DeviceEvent | None = None
        self._error: TransferError | None = None
        self._state = "begun"
        self.is_over = False
        """Whether somebody has found that it has ended: what is quickest to look at."""
        self._stream: Any = None
        self.filled: tuple[tuple[int, Int64Array | None], ...] = ()
        """What the copy writes to, set before it is queued: blocks, as a number that tells them
        from others while they live, such as their ``id``, and rows of them (None: all)."""

    # -- to protect bytes ----------------------------------------------------------------------

    def record_event(self) -> Completion:
        """This object: it marks the end of this copy, not of other work on the stream."""
        return self

    def query(self) -> bool:
        """Whether the copy has stopped reading and writing, successfully or not.

        Raises:
            TransferError: the copy is lost, so this can never be known.
        """
        if self._state == "ended":
            return True
        event = self._event
        if self._state == "lost":
            raise self._failure()
        if event is None:
            return False
        if isinstance(event, ReportingEvent) and not event.asks_device:
            if not event.query():
                return False
        elif not self.ask(event.query):
            return False
        self._end()
        return True

    @property
    def has_let_go(self) -> bool:
        """Whether the copy is known to have stopped reading and writing."""
        if self.is_over:
            return True
        try:
            return self.query()
        except TransferError:
            return False

    # -- for the code that queues the copy -----------------------------------------------------

    def keep(self, *objects: object) -> None:
        """Keep more objects alive until the copy has ended."""
        self._keep += objects

    def queued(self, event: DeviceEvent, stream: Any = None) -> None:
        """Note that everything is queued.

        Args:
            event: the end of the copy.
            stream: the stream that it is the end of; None: it is of no stream.
        """
        self._stream = stream
        # In this order: once the event is set, another thread may move the state to "ended".
        self._state = "queued"
        self._event = event

    def nothing_queued(self) -> None:
        """End the copy if none of it was queued, be it that :meth:`queued` was interrupted."""
        if self._state == "begun" or (self._state == "queued" and self._event is None):
            self._end()

    def ended(self) -> None:
        """Note that everything that was queued has ended."""
        self._end()

    def failed(self, error: TransferError) -> None:
        """Note that the copy will not be completed. Call this before :meth:`queued`.

        The error is logged with its traceback, since the holder of the transfer may never ask for
        it. The stored error has no traceback: its frames would keep batches alive.
        """
        cause = error.__cause__
        LOGGER.error("%s", error, exc_info=cause or error)
        if cause is not None:
            cause.__traceback__ = None
        self._error = error

    def lose(self, cause: BaseException) -> None:
        """Note that the device can no longer tell whether it uses the bytes."""
        if self._state == "ended":
            return
        if self._error is None:
            self._error = TransferError(f"the device cannot be queried about a transfer: {cause}")
        self._state = "lost"

    def _end(self) -> None:
        # In this order: an exception, or foreign code, may come between any two lines.
        event = self._event
        if self._error is not None or (isinstance(event, ReportingEvent) and event.error()):
            self._error = self.error
        self._state = "ended"
        self.is_over = True
        self._event = self._stream = None
        in_flight.discard(self)
        self._keep = []  # last: the end of what it keeps may run finalizers

    # -- for the code that queues others behind it ---------------------------------------------

    @property
    def is_using(self) -> bool:
        """Whether everything is queued, and not known to have stopped reading and writing.

        False while the copy is being queued: no order is promised to calls at the same time, and
        the caller may have interrupted that very call.
        """
        event, state = self._event, self._state
        if self.is_over or state == "begun":
            return False
        if event is None and state == "queued":
            return False  # not quite queued, or it has just ended
        if isinstance(event, HostEvent) and not event.is_submitted:
            return False  # it might come behind whoever asks
        return not self.has_let_go

    @property
    def is_in_host_queue(self) -> bool:
        """Whether the queue of copies within host memory makes it, or a caller of that queue."""
        return type(self._event) is HostEvent

    def fills(self, blocks: int, rows: Int64Array | None) -> bool:
        """Whether the copy writes to any of ``rows`` (None: all) of blocks; see ``filled``."""
        for filled, some in self.filled:
            if filled == blocks and (
                rows is None or some is None or bool(np.isin(rows, some).any())
            ):
                return True
        return False

    def is_on(self, stream: Any) -> bool:
        """Whether further work on ``stream`` comes behind the copy by itself."""
        own = self._stream
        return own is not None and bool(own == stream)

    def wait_stream(self, device: CopyDevice, stream: Any) -> None:
        """Make further work on a stream of a device wait for the end of the copy.

        For work that is no device's, this waits on the host instead.
        """
        event = self._event  # once: another thread may find that the copy has ended
        if isinstance(event, ReportingEvent):
            self.wait()
        elif event is not None:
            device.wait_event(stream, event)

    @property
    def is_foreign(self) -> bool:
        """Whether others make the copy, so that it may never end."""
        event = self._event
        return isinstance(event, ReportingEvent) and not isinstance(event, HostEvent)

    def arrive(self) -> None:
        """Wait on the host until the copy has ended.

        Raises:
            TransferError: it has failed.
        """
        self.wait()
        self.require_success()

    # -- for the transfer ----------------------------------------------------------------------

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The result of ``question``, which queries one of the copy's events.

        Raises:
            TransferError: the query failed; the copy is lost.
            NestedWaitError: this thread makes the copy, and cannot wait for it.
            BaseException: what a signal handler raised meanwhile; the copy goes on.
        """
        try:
            event = self._event
            if isinstance(event, ReportingEvent) and not event.asks_device:
                return question()
            with Relaxed():
                return question()
        except NestedWaitError:
            raise
        except Exception as cause:
            if isinstance(self._event, ReportingEvent) or is_interrupt(cause):
                raise
            self.lose(cause)
            lost = TransferError(f"the device cannot be queried: {cause}")
            raise (self.error or lost) from cause

    @property
    def is_lost(self) -> bool:
        """Whether the device can no longer tell whether it uses the bytes."""
        return self._state == "lost"

    @property
    def is_done(self) -> bool:
        """Whether the whole copy is known to have succeeded. Queries nothing."""
        return self._state == "ended" and self._error is None

    @property
    def is_stuck(self) -> bool:
        """Whether the copy has failed without being known to have ended; it is asked again."""
        event = self._event
        return isinstance(event, ReportingEvent) and event.is_stuck

    @property
    def is_queued(self) -> bool:
        """Whether everything is queued, and nobody has found that it has ended."""
        return self._state == "queued"

    @property
    def is_quarantined(self) -> bool:
        """Whether the copy has failed and may still use its bytes. Queries nothing."""
        return self._state == "lost" or self.is_stuck

    @property
    def has_ended(self) -> bool:
        """Whether nobody need wait any longer: the copy ended, was lost, or is stuck."""
        try:
            return self.query() or self.is_stuck
        except TransferError:
            return True

    @property
    def error(self) -> TransferError | None:
        """Why the copy failed, as far as is known; None if it has not failed.

        Returns a new object each time: a raised error keeps its frames alive, and a stored one
        would keep them for as long as the completion lives.
        """
        event = self._event
        if self._error is None and isinstance(event, ReportingEvent):
            self._error = event.error()
        return None if self._error is None else self._failure()

    def require_success(self) -> None:
        """Raise if the copy is known to have failed.

        Raises:
            TransferError: it has.
        """
        if self.error is not None:
            raise self._failure()  # in no local variable: its traceback would hold this frame

    def _failure(self) -> TransferError:
        """A new object for the error, which must be known."""
        assert self._error is not None
        error = TransferError(*self._error.args)
        error.__cause__ = self._error.__cause__
        return error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the copy has ended, is lost or is stuck, for at most ``timeout_s`` seconds.

        Returns:
            Whether it has.

        Raises:
            NestedWaitError: without ``timeout_s``, on the thread that makes the copy.
        """
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
    """An event that completes if a copy succeeds; blocks are freed on this condition."""

    __slots__ = ("_completion", "_has_come", "_is_void")

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        self._has_come = self._is_void = False

    def query(self) -> bool:
        """Whether the copy has succeeded.

        Raises:
            ReleaseVoidError: it has failed, or the event was made void.
        """
        if self._is_void:
            raise ReleaseVoidError("the free of these blocks was taken back")
        completion = self._completion
        ended = completion.has_ended
        if ended and completion.error is not None:
            raise ReleaseVoidError("the copy that the free of these blocks depended on has failed")
        self._has_come |= ended
        return ended

    @property
    def is_quarantined(self) -> bool:
        """Whether the copy has failed and may still use the bytes."""
        return self._completion.is_quarantined

    def void(self) -> bool:
        """Make the condition fail; returns False if it was met already."""
        self._is_void = not self._has_come
        return self._is_void


class InFlight:
    """The copies that have begun and not ended. Keeping them keeps their buffers alive.

    A copy within host memory leaves when it ends. A copy on a device leaves when somebody asks for
    its state; of those that nobody asks for, a few are asked whenever another copy begins.
    """

    def __init__(self) -> None:
        self._begun: dict[Completion, None] = {}
        self._to_check: list[Completion] = []
        self._lost: list[Completion] = []
        starts_over_after_fork(self)

    def add(self, completion: Completion) -> None:
        """Keep a copy, and drop those that have ended among ``CHECKED_COPIES`` others."""
        if self._begun:
            with Relaxed():
                self._check_some()
        self._begun[completion] = None

    def _check_some(self) -> None:
        to_check = self._to_check
        if not to_check:
            to_check = self._to_check = [*reversed(self._begun.copy())]
        for _ in range(min(len(to_check), CHECKED_COPIES)):
            # Everything stays in the dict until it is known to have ended: nothing that happens
            # in between, here or in another thread, can lose a copy in flight.
            try:
                other = to_check.pop()
            except IndexError:  # another thread checks them too
                return
            if other.has_ended and not other.is_stuck:
                if other.is_lost:  # the device may still write
                    self._lost.append(other)
                self.discard(other)

    def discard(self, completion: Completion) -> None:
        """Forget a copy, if it is kept."""
        self._begun.pop(completion, None)

    def start_over_after_fork(self) -> None:
        """Lose all copies in a forked child, which has neither their threads nor their device."""
        cause = RuntimeError("a copy in flight does not continue in a forked child")
        for completion in self._begun:
            completion.lose(cause)
        self._lost += self._begun
        self._begun, self._to_check = {}, []

    def __len__(self) -> int:
        """Number of copies that are kept."""
        return len(self._begun)

    @property
    def num_lost(self) -> int:
        """Number of copies whose device can no longer tell whether it uses their bytes."""
        return len(self._lost)


in_flight = InFlight()
"""The copies in flight in this process."""
