"""``Read``: one read from a peer, and the event that tells how it ends.

============  ==================================================================================
state         meaning
============  ==================================================================================
asked         the peer has not said where the blocks are: nothing can arrive
running       NIXL moves the bytes
over          whoever waits knows the outcome
quarantined   over with an error, and bytes may still arrive: the blocks stay allocated
ended         nothing can arrive any more
============  ==================================================================================

A read is ended when NIXL says that it is done, or when the peer is known to be gone. An error is
not an end, and neither is a release: NIXL 1.5.1 went on writing after both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from kvheap.addresses.block_runs import BlockRuns
from kvheap.blocks.block_layout import BlockLayout
from kvheap.claims import Claim
from kvheap.device.events import ReportingEvent
from kvheap.device.host_queue import NestedWaitError
from kvheap.errors import TransferError
from kvheap.kernels.latch import Latch
from kvheap.remote.deadlines import Deadline, now_s
from kvheap.remote.pairs import Part
from kvheap.remote.peer_lease import Hold

__all__ = ["Read", "ReadEvent"]

LOGGER = logging.getLogger("kvheap")

WITHDRAWN = object()

WAIT_S = 0.05
"""Seconds between two looks of whoever waits for a read that nobody looks at."""


class ReadEvent(Latch, ReportingEvent):
    """The end of a read, for ``foreign_transfer``: open once its outcome is known.

    Asked by any thread. It is its own latch: each further object shows in the time of a small read.
    A failure is a line of the log; the error itself is the caller's.

    Args:
        thread: the one that is about to begin the read.
    """

    __slots__ = ("_thread", "cause", "has_ended", "look")

    asks_device = False

    def __init__(self, thread: int) -> None:
        Latch.__init__(self)  # quicker than by super()
        self._thread = thread
        self.look: Callable[[bool], float] | None = None
        """Does what can be done for the read now, and returns the seconds until the next look.

        Given False, it does only what takes a moment.
        """
        self.cause: BaseException | None = None
        """Why the read failed, once that is known."""
        self.has_ended = False
        """Whether nothing can arrive any more."""

    @property
    def is_over(self) -> bool:
        """Whether the outcome is known."""
        return self.is_open

    def fail(self, cause: BaseException) -> None:
        """Note the first failure; it does not say that nothing arrives any more."""
        if self.is_open:
            return
        if self.cause is None and not self.has_ended:
            cause.__traceback__ = cause.__context__ = None  # their frames hold memory
            self.cause = cause
        if self.cause is not None:  # also if an exception struck here the first time
            self.open()
            LOGGER.info("a read failed: %s", self.cause)

    def end(self) -> None:
        """Note that nothing can arrive any more."""
        self.has_ended = True
        self.open()
        self.look = None

    def query(self) -> bool:
        """Whether nothing can arrive any more; looks, if that takes a moment."""
        look = self.look
        if look is not None and not self.has_ended:
            look(False)
        return self.has_ended

    @property
    def is_stuck(self) -> bool:
        """Whether the read has failed, and bytes may still arrive."""
        return self.cause is not None and not self.has_ended

    def error(self) -> TransferError | None:
        """Why the read failed; a new object each time."""
        cause = self.cause
        if cause is None:
            return None
        error = TransferError(str(cause))
        error.__cause__ = cause
        return error

    def require_success(self) -> None:
        """Raise if the read is known to have failed.

        Raises:
            TransferError: it has.
        """
        if self.cause is not None:
            raise TransferError(str(self.cause)) from self.cause

    def synchronize(self) -> None:
        """Wait until the outcome is known, and help to get there.

        Raises:
            NestedWaitError: the code that was interrupted here must go on first.
        """
        while not self.is_open:
            look = self.look
            if look is None and self._thread == threading.get_ident() and not self.is_open:
                raise NestedWaitError(
                    "a finalizer or signal handler cannot wait for a read that is about to begin"
                )
            pause_s = WAIT_S if look is None else look(True)
            if pause_s:
                self.wait(pause_s)


class Read:
    """One read. It is made once, or withdrawn before it has begun.

    Args:
        keys: of the chunks.
        layout: what their blocks hold here.
        num_bytes: of all blocks.
        timeout_s: for all of it.
        target: where the blocks are here; needed without a lease.
        hold: the lease that was taken before; None: the read asks for one.
        parts: what to read by that lease, the last part first; becomes the read's.
    """

    lease = 0
    """The number of the peer's lease for this read alone."""
    lease_until: Deadline | None = None
    asked_for = 0
    """The number of the lease that the peer was asked for, until it has answered."""
    asked_at = 0.0
    was_asked = False
    """Whether a question for the blocks has been sent."""
    posted_at = 0.0
    watched_until = 0.0
    """Until when whoever waits for it looks at it."""
    failure: BaseException | None = None
    """What NIXL has reported, until it is known whether the peer is gone."""
    settle_until: Deadline | None = None

    def __init__(
        self,
        keys: Sequence[bytes],
        layout: BlockLayout,
        num_bytes: int,
        timeout_s: float,
        target: BlockRuns | None = None,
        hold: Hold | None = None,
        parts: list[Part] | None = None,
    ) -> None:
        self.keys = keys
        self.layout = layout
        self.num_bytes = num_bytes
        self.target = target
        self.begun_at = now = now_s()
        self.limit = Deadline(timeout_s, now)
        """Until when whoever waits is told of an outcome."""
        self.caller: int | None = (thread := threading.get_ident())
        """The thread that is about to begin it; None once that was done, or given up."""
        self.event = ReadEvent(thread)
        self.right = Claim()  # never given up
        self.hold = hold
        if hold is not None:
            self.lease_until = hold.until
        self.parts = [] if parts is None else parts
        """What is still to be posted, the next one last."""
        self.running: list[int] = []
        """Requests that NIXL has and may work on."""
        self.broken: list[int] = []
        """Requests that NIXL reports as failed."""

    def withdraw(self) -> bool:
        """Give the read up unless it has begun; returns whether it never begins."""
        if self.right.take(WITHDRAWN):
            self.fail(RuntimeError("the read was withdrawn before it began"))
        return self.right.holder is WITHDRAWN

    def fail(self, cause: BaseException) -> None:
        """End it with an error, before or after NIXL has to do with it."""
        self.event.fail(cause)
        self.event.end()
