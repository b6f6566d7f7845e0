"""``Completion``: when an asynchronous copy has ended, and how.

One object serves everybody who needs to know. To a batch it is a stream: bytes that are freed
during the copy wait for it. To a release it is an event. To a transfer it is the state of the
copy. It knows neither batches nor heaps. It keeps the buffers that the copy reads and writes
alive until the copy has ended. Copies that nobody asks about are checked whenever another copy
begins.

States, of which the last two are final:

- *begun*: bytes are protected, and nothing of the copy is known to have been queued;
- *queued*: an event tells when the copy will have ended;
- *ended*: whatever was queued has ended; with an error, part of the copy was not done;
- *lost*: the event cannot be queried (the device is gone). The bytes of such a copy are never
  handed out again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvheap.device.events import POLL_SECONDS, DeviceEvent, ReleaseVoidError
from kvheap.device.host_queue import FutureEvent
from kvheap.errors import TransferError
from kvheap.forks import starts_over_after_fork

__all__ = ["Answer", "Completion", "InFlight", "Success", "in_flight"]

Answer = TypeVar("Answer")

CHECKED_COPIES = 8
"""How many copies in flight are checked when another begins."""


class Completion:
    """When a copy has ended. A stream and an event to those who protect bytes with it.

    - to protect bytes: ``record_event``, ``query``, ``has_let_go``;
    - for the code that queues the copy: ``keep``, ``queued``, ``nothing_queued``, ``ended``,
      ``failed``, ``lose``;
    - for the transfer: ``ask``, ``wait``, ``error``, ``has_ended``, ``is_done``, ``is_lost``.

    Args:
        keep: what the copy reads or writes, kept alive until the copy has ended.
    """

    __slots__ = ("__weakref__", "_error", "_event", "_keep", "_state")

    def __init__(self, keep: Sequence[object] = ()) -> None:
        self._keep: list[object] = list(keep)
        self._event: DeviceEvent | None = None
        self._error: TransferError | None = None
        self._state = "begun"

    # -- to protect bytes ----------------------------------------------------------------------

    def record_event(self) -> Completion:
        """This object: the end of this copy, not of other work on its stream."""
        return self

    def query(self) -> bool:
        """Whether the copy has stopped reading and writing. It may have failed.

        Raises:
            TransferError: this cannot be known, now or later.
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

    @property
    def has_let_go(self) -> bool:
        """Whether the copy is known to have stopped reading and writing."""
        return self.has_ended and not self.is_lost

    # -- for the code that queues the copy -----------------------------------------------------

    def keep(self, *objects: object) -> None:
        """Keep more objects alive until the copy has ended."""
        self._keep += objects

    def queued(self, event: DeviceEvent) -> None:
        """No more of the copy will be queued; ``event`` tells when it has ended."""
        # In this order: as soon as there is an event, another thread may see the copy end.
        self._state = "queued"
        self._event = event

    def nothing_queued(self) -> None:
        """End the copy if none of it was queued."""
        if self._state == "begun":
            self._end()

    def ended(self) -> None:
        """Everything that was queued has ended."""
        self._end()

    def failed(self, error: TransferError) -> None:
        """The copy will not be completed. Call it before :meth:`queued`.

        The error is logged with its traceback, since the holder of the transfer may never ask for
        it. The stored error has no traceback: its frames would keep batches alive.
        """
        cause = error.__cause__
        logging.getLogger("kvheap").error("%s", error, exc_info=cause or error)
        if cause is not None:
            cause.__traceback__ = None
        self._error = error

    def lose(self, cause: BaseException) -> None:
        """The device can no longer tell whether it uses the bytes."""
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

    # -- for the transfer ----------------------------------------------------------------------

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer of one of the copy's events.

        Raises:
            TransferError: the event failed; the copy is lost.
        """
        try:
            return question()
        except Exception as cause:
            self.lose(cause)
            error = self.error or TransferError(f"the device cannot be asked: {cause}")
            raise error from cause

    @property
    def is_lost(self) -> bool:
        """Whether the device can no longer tell if it uses the bytes."""
        return self._state == "lost"

    @property
    def is_done(self) -> bool:
        """Whether the whole copy is known to have succeeded. Queries nothing."""
        return self._state == "ended" and self._error is None

    @property
    def has_ended(self) -> bool:
        """Whether the state is final: the copy ended or was lost."""
        try:
            return self.query()
        except TransferError:
            return True

    @property
    def error(self) -> TransferError | None:
        """Why the copy failed, as far as is known; None while all is well.

        A new object each time: an error that was raised keeps its frames, and would keep them for
        as long as the copy is known.
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
        """Wait until the copy has ended or is lost, for at most ``timeout_s`` seconds.

        Returns:
            Whether it has.
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
    """The event of blocks that are given up on condition that a copy succeeds."""

    __slots__ = ("_completion",)

    def __init__(self, completion: Completion) -> None:
        self._completion = completion

    def query(self) -> bool:
        """Whether the copy has succeeded.

        Raises:
            ReleaseVoidError: it has failed.
        """
        completion = self._completion
        ended = completion.has_ended
        if ended and completion.error is not None:
            raise ReleaseVoidError("the copy for which the blocks were given up has failed")
        return ended


class InFlight:
    """The copies that have begun and not yet ended. Keeping them keeps their buffers alive."""

    def __init__(self) -> None:
        self._begun: deque[Completion] = deque()
        self._lost: list[Completion] = []
        starts_over_after_fork(self)

    def add(self, completion: Completion) -> None:
        """Keep a copy, and drop a few that have ended."""
        for _ in range(min(len(self._begun), CHECKED_COPIES)):
            try:
                other = self._begun.popleft()
            except IndexError:  # another thread took it
                break
            if not other.has_ended:
                self._begun.append(other)
            elif other.is_lost:  # the device may still write
                self._lost.append(other)
        self._begun.append(completion)

    def start_over_after_fork(self) -> None:
        """Lose all copies in a forked child: neither their threads nor their device are there."""
        cause = RuntimeError("a copy in flight does not go on in a forked child")
        for completion in self._begun:
            completion.lose(cause)
        self._lost += self._begun
        self._begun = deque()

    def __len__(self) -> int:
        """How many copies are kept."""
        return len(self._begun)


in_flight = InFlight()
"""The copies of this process."""
