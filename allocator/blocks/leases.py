"""``Leases``: grants and ends the leases of one allocator."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from kvheap.addresses.arguments import as_seconds
from kvheap.blocks.batch_lease import BatchLease, LeasedRows
from kvheap.blocks.lease import Lease, LeaseQueue, LeaseState
from kvheap.blocks.ledger import Ledger
from kvheap.blocks.recorded_streams import Streams
from kvheap.blocks.stream_events import StreamEvents, StreamGoneError
from kvheap.blocks.tracked import BlockRows, TrackedBatch
from kvheap.errors import ReentrantCallError
from kvheap.guards import Deferred, DeferredCall, Guard, is_inside_section, section

__all__ = ["Leases"]

LOGGER = logging.getLogger("kvheap")

RETRY_S = 1.0
"""Seconds until an expired lease is looked at again whose stream cannot be queried."""


class Leases:
    """Grants and ends the leases of one allocator.

    Args:
        guard: the allocator's guard.
        ledger: who owns which bytes.
        deferred: the allocator's calls that were put off.
    """

    def __init__(self, guard: Guard, ledger: Ledger, deferred: Deferred) -> None:
        self._guard = guard
        self._ledger = ledger
        self._deferred = deferred
        self.queue: LeaseQueue[Lease | BatchLease] = LeaseQueue()
        """The leases by deadline."""
        self.num_expired = 0
        """Number of leases that have expired."""

    @section
    def grant(self, batch: TrackedBatch, row: int, ttl: float) -> Lease:
        """Pin a block for ``ttl`` seconds.

        Raises:
            LifetimeError: the block is freed.
            ValueError: ``ttl`` is not positive.
            ReentrantCallError: the calling thread is inside an operation; nothing is pinned.
        """
        _require_positive(ttl)
        guard = self._guard
        if guard.busy and is_inside_section():
            raise ReentrantCallError("pin(ttl)", 0, 0, 0)
        lease = Lease(self, batch.counts, batch.record, row, time.monotonic() + ttl)
        with guard.lock:
            guard.busy = True
            ledger = self._ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            batch.counts.changed(row, 0, 1, batch)
            self.queue.push(lease)  # first: whatever happens now, it expires
            batch.counts.add_lease(row, lease)
            guard.busy = False
        return lease

    @section
    def grant_many(self, parts: Sequence[BlockRows], ttl: float) -> BatchLease:
        """Pin blocks for ``ttl`` seconds, all or none. O(batches), and a sort of given rows.

        Raises:
            LifetimeError: a block is freed.
            ValueError: ``ttl`` is not positive.
            ReentrantCallError: the calling thread is inside an operation; nothing is pinned.
        """
        _require_positive(ttl)
        guard = self._guard
        if guard.busy and is_inside_section():
            raise ReentrantCallError("lease", 0, 0, 0)
        leased = [LeasedRows.of(part) for part in parts]
        lease = BatchLease(self, leased, time.monotonic() + ttl)
        with guard.lock:
            guard.busy = True
            ledger = self._ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            for part in parts:
                part.batch.counts.require_pinnable(part.rows, part.batch)
            self.queue.push(lease)  # first: whatever happens now, it expires
            for counts, _, rows in leased:
                counts.add_leases(rows, lease)
            guard.busy = False
        return lease

    @section
    def extend(self, lease: Lease | BatchLease, ttl: float) -> bool:
        """Let a lease expire ``ttl`` seconds from now, unless it expires later.

        Returns:
            Whether it is still held.

        Raises:
            ValueError: ``ttl`` is not positive.
            ReentrantCallError: the calling thread is inside an operation; nothing is changed.
        """
        _require_positive(ttl)
        guard = self._guard
        if guard.busy and is_inside_section():
            raise ReentrantCallError("extend", 0, 0, 0)
        with guard.lock:
            guard.busy = True
            now = time.monotonic()
            is_held = lease.state == "held" and lease.deadline > now and not lease.was_reported
            if is_held:
                lease.deadline = max(lease.deadline, now + ttl)
            guard.busy = False
        return is_held

    def end(
        self, lease: Lease | BatchLease, state: LeaseState, call: DeferredCall | None = None
    ) -> bool:
        """End a lease, and free those of its blocks that nothing else holds.

        Returns:
            Whether it was held.

        Raises:
            StreamGoneError: a stream that uses a block cannot record an event; the lease is still
                held.
        """
        if self._deferred and call is None:
            self._deferred.run()
        events = StreamEvents()
        while True:
            streams, has_ended = self._try_end(lease, state, events)
            if not streams:
                return has_ended
            events.record(streams, is_wrapped=True)

    @section
    def _try_end(
        self, lease: Lease | BatchLease, state: LeaseState, events: StreamEvents
    ) -> tuple[Streams, bool]:
        """End a lease; or return the streams without event that use its blocks.

        Returns:
            The streams, and whether this call ended it, or will.
        """
        guard = self._guard
        if guard.busy and is_inside_section():
            self._deferred.add(partial(self.end, lease, state))
            return {}, lease.state == "held"
        with guard.lock:
            guard.busy = True
            ledger = self._ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            missing: Streams = {}
            is_held = lease.state == "held"
            if is_held and state == "expired":
                is_held = lease.deadline <= time.monotonic()  # else it was extended meanwhile
            if is_held:
                missing, has_freed = (
                    lease.free_unheld(ledger, events)
                    if isinstance(lease, BatchLease)
                    else _free_unheld(lease, ledger, events)
                )
                if not missing:
                    self.num_expired += state == "expired" and not lease.was_reported
                    ledger.num_reclaimed += state == "expired" and has_freed
                    lease.state = state
                    lease.let_go()  # an ended lease keeps no record
            guard.busy = False
        return missing, is_held

    def expire(self) -> bool:
        """End the leases whose deadline has passed; return whether there were any."""
        found = False
        while self.queue.entries:
            lease = self._first_due()
            if lease is None:
                break
            try:
                found |= self.end(lease, "expired")
            except StreamGoneError as error:  # must not fail the operation that runs this
                self._put_off(lease, error.__cause__)
        return found

    def _put_off(self, lease: Lease | BatchLease, cause: BaseException | None) -> None:
        """Try again later to end a lease whose block a stream uses that cannot be queried."""
        if not lease.was_reported:
            lease.was_reported = True
            self.num_expired += 1
            LOGGER.error(
                "what an expired lease held stays allocated: its stream cannot be queried",
                exc_info=cause,
            )
        self._push_again(lease)

    @section
    def _push_again(self, lease: Lease | BatchLease) -> None:
        guard = self._guard
        if guard.busy and is_inside_section():
            return  # it is still the first that is due
        with guard.lock:
            guard.busy = True
            lease.deadline = time.monotonic() + RETRY_S
            self.queue.push(lease)
            self.queue.pop(lease)
            guard.busy = False

    @section
    def _first_due(self) -> Lease | BatchLease | None:
        """The first held lease that is due; takes others from the front of the queue.

        Those are leases that have ended, and leases that were extended, which are queued anew.
        """
        guard = self._guard
        if guard.busy and is_inside_section():
            return None
        with guard.lock:
            guard.busy = True
            while (lease := self.queue.first_due()) is not None:
                if lease.state == "held":
                    if lease.deadline <= time.monotonic():
                        break
                    self.queue.push(lease)
                self.queue.pop(lease)
            guard.busy = False
            return lease


def _require_positive(ttl: float) -> None:
    if not as_seconds("ttl", ttl) > 0:
        raise ValueError(f"ttl must be a positive number of seconds, got {ttl}")


def _free_unheld(lease: Lease, ledger: Ledger, events: StreamEvents) -> tuple[Streams, bool]:
    """``BatchLease.free_unheld`` for one block."""
    counts, record, row = lease.counts, lease.record, lease.row
    missing: Streams = {}
    if counts.is_live(row) and not counts.is_held(row, but=lease):
        missing = ledger.free_rows(counts, record, np.array([row], np.int64), events)
    if record is not None and record() is None and not counts.count_live()[0]:
        ledger.forget(record)  # also if an exception kept the last call from it
    return missing, not counts.is_live(row)
