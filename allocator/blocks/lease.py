"""``Lease``: a pin that expires; ``LeaseQueue``: an allocator's leases, by deadline."""

from __future__ import annotations

import heapq
import itertools
import time
import weakref
from typing import Generic, Literal, Protocol, TypeVar

from kvheap.blocks.counts import RowCounts
from kvheap.blocks.owned_blocks import OwnedBlocks

__all__ = ["Lease", "LeaseQueue", "LeaseState"]

LeaseState = Literal["held", "released", "expired"]

MIN_PRUNED = 64
"""Ended leases are pruned at this many entries, then each time the number has doubled."""


class LeaseEnder(Protocol):
    """The part of ``Leases`` that a lease uses."""

    def end(self, lease: Lease, state: LeaseState) -> bool:
        """End a lease; False if it had already ended."""
        ...

    def extend(self, lease: Lease, ttl: float) -> bool:
        """Let a lease expire later; False if it has ended."""
        ...


class Lease:
    """A pin that expires; see ``MemoryObj.pin``. Usable as a context manager.

    Attributes:
        counts: the counts of the leased block's batch.
        record: what is needed to free the block; None for a view, and once the lease has ended.
        row: the block's number in its batch.
        deadline: when it expires, as a ``time.monotonic`` value in seconds.
        state: ``held``, ``released`` or ``expired``.
        was_reported: whether the log says that its block cannot be freed.
    """

    __slots__ = ("_leases", "counts", "deadline", "record", "row", "state", "was_reported")

    def __init__(
        self,
        leases: LeaseEnder,
        counts: RowCounts,
        record: OwnedBlocks | None,
        row: int,
        deadline: float,
    ) -> None:
        # Weak: what ends leases holds the lease, and the heap's buffers with it.
        self._leases = weakref.ref(leases)
        self.counts = counts
        self.record = record
        self.row = row
        self.deadline = deadline
        self.state: LeaseState = "held"
        self.was_reported = False

    def release(self) -> bool:
        """End it now; False if it had already ended."""
        leases = self._leases()
        if leases is not None:
            return leases.end(self, "released")
        was_held, self.state = self.state == "held", "released"
        return was_held

    def extend(self, ttl: float) -> bool:
        """Let it expire ``ttl`` seconds from now, unless it expires later anyway.

        Returns:
            Whether it is still held; False if it was released or its deadline has passed: the block
            may have been freed.

        Raises:
            ValueError: ``ttl`` is not positive.
            ReentrantCallError: the calling thread is inside an operation; nothing is changed.
        """
        leases = self._leases()
        return leases is not None and leases.extend(self, ttl)

    def let_go(self) -> None:
        """Forget the block, once the lease has ended."""
        self.counts.remove_lease(self.row, self)
        self.record = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        """State and block."""
        return f"Lease({self.state}, block {self.row})"


class QueuedLease(Protocol):
    """The part of a lease that the queue uses."""

    deadline: float
    state: LeaseState


AnyLease = TypeVar("AnyLease", bound=QueuedLease)


class LeaseQueue(Generic[AnyLease]):
    """Leases in the order of their deadlines. Not thread-safe.

    Released leases stay in the queue until their deadline, or until they outnumber the leases that
    are still held. One that was extended stays where it was; at its old deadline it is queued anew.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, AnyLease]] = []
        """A ``heapq`` of (deadline, number, lease)."""
        self._prune_at = MIN_PRUNED
        self._number = itertools.count()

    def __len__(self) -> int:
        """Number of queued leases."""
        return len(self.entries)

    def push(self, lease: AnyLease) -> None:
        """Queue a lease. Amortized O(log leases)."""
        if len(self.entries) >= self._prune_at:
            held = [entry for entry in self.entries if entry[2].state == "held"]
            heapq.heapify(held)
            self.entries[:] = held  # the same list: others look whether it is empty
            self._prune_at = 2 * len(held) + MIN_PRUNED
        heapq.heappush(self.entries, (lease.deadline, next(self._number), lease))

    def first_due(self) -> AnyLease | None:
        """The first lease if its deadline has passed. It stays queued."""
        entries = self.entries
        if not entries or entries[0][0] > time.monotonic():
            return None
        return entries[0][2]

    def pop(self, lease: AnyLease) -> None:
        """Take a lease that has ended off the queue, if it is the first."""
        if self.entries and self.entries[0][2] is lease:
            heapq.heappop(self.entries)
