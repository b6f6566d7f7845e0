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

from collections.abc import Iterator

from kvheap.addresses.block_runs import BlockRuns
from kvheap.blocks.block_layout import BlockLayout
from kvheap.claims import Claim
from kvheap.errors import TransferError
from kvheap.kernels.latch import Latch
from kvheap.kernels.pieces import Pieces
from kvheap.remote.deadlines import Deadline

__all__ = ["Read", "ReadEvent"]

WITHDRAWN = object()


class ReadEvent:
    """The end of a read, for ``foreign_transfer``. Asked by any thread."""

    __slots__ = ("_over", "cause", "has_ended")

    def __init__(self) -> None:
        self._over = Latch()
        self.cause: BaseException | None = None
        """Why the read failed, once that is known."""
        self.has_ended = False
        """Whether nothing can arrive any more."""

    @property
    def is_over(self) -> bool:
        """Whether the outcome is known."""
        return self._over.is_open

    def fail(self, cause: BaseException) -> None:
        """Note the first failure; it does not say that nothing arrives any more."""
        if self.cause is None and not self.has_ended:
            self.cause = cause
            self._over.open()

    def end(self) -> None:
        """Note that nothing can arrive any more."""
        self.has_ended = True
        self._over.open()

    def query(self) -> bool:
        """Whether the read has ended well.

        Raises:
            TransferError: it has failed, and ended.
            Exception: it has failed; bytes may still arrive.
        """
        has_ended, cause = self.has_ended, self.cause
        if cause is None:
            return has_ended
        if has_ended:
            raise TransferError(str(cause)) from cause
        raise cause

    def synchronize(self) -> None:
        """Wait until the outcome is known; raises as :meth:`query`."""
        self._over.wait()
        self.query()


class Read:
    """One read. It is made once, or withdrawn before it has begun.

    Args:
        keys: of the chunks.
        target: where their blocks are here.
        layout: what they hold here.
        timeout_s: for all of it.
    """

    def __init__(
        self, keys: list[bytes], target: BlockRuns, layout: BlockLayout, timeout_s: float
    ) -> None:
        self.keys = keys
        self.target = target
        self.layout = layout
        self.limit = Deadline(timeout_s)
        """Until when whoever waits is told of an outcome."""
        self.event = ReadEvent()
        self.right = Claim()  # never given up
        self.lease = 0
        """The number of the peer's lease."""
        self.lease_until: Deadline | None = None
        self.asked_at = 0.0
        self.posted_at = 0.0
        self.groups: Iterator[Pieces] | None = None
        """What is still to be posted."""
        self.running: list[int] = []
        """Requests that NIXL works on."""
        self.broken: list[int] = []
        """Requests that NIXL reports as failed."""
        self.failure: BaseException | None = None
        """What NIXL has reported, until it is known whether the peer is gone."""
        self.settle_until: Deadline | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks."""
        return len(self.target) * self.target.size_bytes

    def withdraw(self) -> bool:
        """Give the read up unless it has begun; returns whether it never begins."""
        if self.right.take(WITHDRAWN):
            self.fail(RuntimeError("the read was withdrawn before it began"))
        return self.right.holder is WITHDRAWN

    def fail(self, cause: BaseException) -> None:
        """End it with an error, before or after NIXL has to do with it."""
        self.event.fail(cause)
        self.event.end()
