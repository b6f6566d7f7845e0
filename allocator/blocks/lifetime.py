"""``Lifetime``: which batches of an allocator are live, and when freed bytes may be reused.

An allocator has one :class:`Lifetime`. It makes every change of a count, and every change of who
owns bytes; the records are in ``blocks/ledger.py``. It keeps

- the live batches, with allocation time and, if recorded, allocation site, to list leaks;
- the blocks of batches that were dropped without being freed, which its next operation reclaims;
- the blocks that were freed while a stream still used them. Their bytes return to the free list
  once the events recorded at the free have completed;
- the leases: pins that expire.

Changes are made in sections (``kvheap/guards.py``). A finalizer or a signal handler that runs
inside one, on the same thread, can call the allocator: what it frees or changes is done by the next
operation, an allocation returns None, and readers answer. An exception that strikes a section
undoes it or lets it be finished by the next one.

Events are recorded and queried outside sections, because that calls code of the user's: a free
looks up the streams inside a section, records their events outside, and is made in a section that
finds no other stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.counts import RowCounts
from kvheap.blocks.lease import Lease, LeaseQueue, LeaseState
from kvheap.blocks.ledger import Ledger, Space
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.recorded_streams import stream_key
from kvheap.blocks.release import Release
from kvheap.blocks.report import LiveBlocks
from kvheap.blocks.sites import Site, callers, site_lines
from kvheap.device.events import POLL_SECONDS, Event, ReleaseVoidError, Stream, has_let_go
from kvheap.errors import ReentrantCallError
from kvheap.guards import Deferred, Guard, is_inside_section, section

__all__ = ["BlockRows", "Lifetime", "TrackedBatch"]

CHECKED_RELEASES = 8
"""Pending releases that one operation checks; see benchmarks/NOTES.md."""

Merge = Callable[[list[Release]], list[Release]]
"""Combines releases that can be given back together."""

Events = dict[Hashable, Event | None]
"""The events of streams, by ``stream_key``; None for a stream that uses no bytes any more."""


class TrackedBatch(Protocol):
    """The part of a batch that :class:`Lifetime` uses."""

    born: float
    site: Site
    layout: BlockLayout
    counts: RowCounts
    record: OwnedBlocks | None

    @property
    def runs(self) -> AddressBatch:
        """The runs that the blocks form."""
        ...

    def describe(self, row: int) -> str:
        """Describe a block for an error message."""
        ...

    def claimable(self, rows: Int64Array | None, skip_freed: bool) -> Int64Array | None:
        """Check that rows can be freed; see ``MemoryBatch.claimable``."""
        ...


class BlockRows(Protocol):
    """Some blocks of one batch; see ``blocks/rows.py``."""

    @property
    def batch(self) -> TrackedBatch:
        """The batch."""
        ...

    @property
    def rows(self) -> Int64Array | None:
        """Row numbers; None for all."""
        ...


class Lifetime:
    """Tracks the blocks of one allocator from allocation until their bytes may be reused.

    - batches: ``own``, ``live``, ``dropped_blocks``;
    - counts: ``change``, ``record_stream``;
    - leases: ``grant_lease``, ``end_lease``, ``expire_leases``, ``expired_leases``;
    - freeing: ``free``, ``free_on``, ``take_back``, ``discard``, ``detach``, ``pending_bytes``;
    - reclaiming: ``has_work``, ``settle``, ``num_reclaimed``, ``wait_for_streams``,
      ``wait_until_unused``;
    - for the allocator's own sections: ``guard``, ``ledger``.

    Args:
        guard: the guard of the space; the allocator's sections hold it too.
        space: where the bytes go back to.
        site_frames: number of callers to record for each allocation; 0: none.
    """

    def __init__(self, guard: Guard, space: Space, site_frames: int) -> None:
        if site_frames < 0:
            raise ValueError(f"trace_frames must be non-negative, got {site_frames}")
        self.guard = guard
        self.ledger = Ledger(space)
        """Who owns which bytes; use it inside sections only."""
        self._site_frames = site_frames
        self._deferred = Deferred(guard)
        self._leases = LeaseQueue()
        self._told_of_lost_events = False
        self._num_expired = 0

    # -- batches -------------------------------------------------------------------------------

    def own(self, batch: TrackedBatch) -> None:
        """Make a batch the owner of its blocks' bytes, by the last store here.

        Before it the bytes are the caller's to free; after it they are the batch's, also if an
        exception strikes.
        """
        batch.born = time.monotonic()
        if self._site_frames:
            batch.site = callers(self._site_frames)
        ledger = self.ledger
        batch.record = record = OwnedBlocks(batch, ledger.note_dropped)
        record.addresses, record.counts, record.layout = batch.runs, batch.counts, batch.layout
        record.site, record.born = batch.site, batch.born
        ledger.live[id(record)] = record

    def live(self) -> tuple[LiveBlocks, ...]:
        """All live blocks, grouped by site and block layout, oldest first. O(batches)."""
        groups: dict[tuple[BlockLayout, Site], list[tuple[int, int, int, float]]] = {}
        now = time.monotonic()
        for record in tuple(self.ledger.live.values()):
            live, pinned = record.counts.count_live()
            if live:
                row = (live, pinned, record.addresses.block_bytes, now - record.born)
                groups.setdefault((record.layout, record.site), []).append(row)
        found = [
            LiveBlocks(
                layout=str(layout),
                site=site_lines(site),
                num_blocks=sum(live for live, _, _, _ in rows),
                num_bytes=sum(live * size for live, _, size, _ in rows),
                num_pinned=sum(pinned for _, pinned, _, _ in rows),
                pinned_bytes=sum(pinned * size for _, pinned, size, _ in rows),
                age_s=max(age for _, _, _, age in rows),
            )
            for (layout, site), rows in groups.items()
        ]
        return tuple(sorted(found, key=lambda group: -group.age_s))

    @property
    def dropped_blocks(self) -> int:
        """Number of blocks that were dropped without being freed, and then reclaimed."""
        return self.ledger.num_dropped

    # -- counts --------------------------------------------------------------------------------

    def change(self, batch: TrackedBatch, row: int, references: int = 0, pins: int = 0) -> None:
        """Add to a block's counts, and free it if no reference and no pin is left.

        Raises:
            LifetimeError: the block is freed, or a count would be negative.
            Exception: a stream that uses the block cannot record an event; nothing is changed.
        """
        if self._deferred:
            self._deferred.run()
        events: Events = {}
        while streams := self._try_change(batch, row, references, pins, events):
            _record(streams, events)

    @section
    def _try_change(
        self, batch: TrackedBatch, row: int, references: int, pins: int, events: Events
    ) -> list[Stream]:
        """Change counts; or return the streams without event that use a block to be freed."""
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.append(partial(self.change, batch, row, references, pins))
            return []
        with guard.lock:
            guard.busy = True
            ledger, counts = self.ledger, batch.counts
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            new_references, new_pins = counts.changed(row, references, pins, batch.describe)
            if new_references or new_pins or counts.leases_of(row):
                if references:
                    counts.set_references(row, new_references)
                else:
                    counts.set_pins(row, new_pins)
                guard.busy = False
                return []
            rows = np.array([row], np.int64)
            missing = self._free_held(counts, batch.record, rows, events)
            guard.busy = False
            return missing

    def record_stream(
        self, batch: TrackedBatch, stream: Stream, rows: Int64Array | None = None
    ) -> None:
        """Keep the bytes of ``rows`` (None: all) from reuse until the stream has used them.

        Raises:
            LifetimeError: one of them is freed.
        """
        if self._deferred:
            self._deferred.run()
        ended: Sequence[Stream] | None = None
        if batch.counts.should_prune_streams:
            ended = [each for each in self._streams_of(batch.counts, None) if has_let_go(each)]
        self._record_stream(batch, stream, rows, ended)

    @section
    def _record_stream(
        self,
        batch: TrackedBatch,
        stream: Stream,
        rows: Int64Array | None,
        ended: Sequence[Stream] | None,
    ) -> None:
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.append(partial(self.record_stream, batch, stream, rows))
            return
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            batch.counts.record_stream(stream, rows, batch.describe)
            if ended is not None:
                batch.counts.forget_streams(ended)
            guard.busy = False

    @section
    def _streams_of(self, counts: RowCounts, rows: Int64Array | None) -> tuple[Stream, ...]:
        """The streams that were recorded for any of ``rows``; none inside a section."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return ()
        with guard.lock:
            guard.busy = True
            streams = counts.streams_of(rows)
            guard.busy = False
        return streams

    # -- leases --------------------------------------------------------------------------------

    @section
    def grant_lease(self, batch: TrackedBatch, row: int, ttl: float) -> Lease:
        """Pin a block for ``ttl`` seconds.

        Raises:
            LifetimeError: the block is freed.
            ValueError: ``ttl`` is not positive.
            ReentrantCallError: the calling thread is inside an operation; nothing is pinned.
        """
        if not ttl > 0:
            raise ValueError(f"ttl must be a positive number of seconds, got {ttl}")
        guard = self.guard
        if guard.busy and is_inside_section():
            raise ReentrantCallError("pin(ttl)", 0, 0, 0)
        lease = Lease(self, batch.counts, batch.record, row, time.monotonic() + ttl)
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            batch.counts.changed(row, 0, 1, batch.describe)
            self._leases.push(lease)  # first: whatever happens now, it expires
            batch.counts.add_lease(row, lease)
            guard.busy = False
        return lease

    def end_lease(self, lease: Lease, state: LeaseState) -> bool:
        """End a lease, and free its block if nothing else holds it.

        Returns:
            Whether it was held.

        Raises:
            Exception: a stream that uses the block cannot record an event. The lease has ended,
                and the block stays allocated until its batch is dropped.
        """
        if self._deferred:
            self._deferred.run()
        was_held = lease.state == "held"
        events: Events = {}
        while streams := self._try_end_lease(lease, state, events):
            try:
                _record(streams, events)
            except Exception:
                self._num_expired += state == "expired"
                lease.state = state
                raise
        return was_held

    @section
    def _try_end_lease(self, lease: Lease, state: LeaseState, events: Events) -> list[Stream]:
        """End a lease; or return the streams without event that use its block."""
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.append(partial(self.end_lease, lease, state))
            return []
        with guard.lock:
            guard.busy = True
            ledger, counts, record, row = self.ledger, lease.counts, lease.record, lease.row
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            missing: list[Stream] = []
            if lease.state == "held":
                if counts.is_live(row) and not counts.is_held(row, but=lease):
                    missing = self._free_held(counts, record, np.array([row], np.int64), events)
                if not missing:
                    self._num_expired += state == "expired"
                    lease.state = state
                    counts.remove_lease(row, lease)
                    lease.record = None  # an ended lease keeps no record
            guard.busy = False
        return missing

    def expire_leases(self) -> bool:
        """End the leases whose deadline has passed; return whether there were any."""
        found = False
        while self._leases.entries:
            lease = self._first_due_lease()
            if lease is None:
                break
            try:
                found |= self.end_lease(lease, "expired")
            except Exception:  # must not fail the unrelated operation that runs this
                logging.getLogger("kvheap").exception(
                    "a block whose lease expired stays allocated: its stream cannot be queried"
                )
        return found

    @section
    def _first_due_lease(self) -> Lease | None:
        """The first held lease that is due; takes those that have ended off the queue."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return None
        with guard.lock:
            guard.busy = True
            while (lease := self._leases.first_due()) is not None and lease.state != "held":
                self._leases.pop(lease)
            guard.busy = False
            return lease

    @property
    def expired_leases(self) -> int:
        """Number of leases that have expired."""
        return self._num_expired

    # -- freeing -------------------------------------------------------------------------------

    def free(
        self, parts: Sequence[BlockRows], skip_freed: bool = False, merge: Merge | None = None
    ) -> None:
        """Free blocks, all or none.

        Args:
            parts: blocks of this allocator, each batch once.
            skip_freed: skip blocks that are already freed instead of raising.
            merge: combines the releases of several parts.

        Raises:
            DoubleFreeError: a block is already freed, or named twice.
            BlockInUseError: a block is pinned or has more than one reference.
            ForeignObjectError: a batch is a view of another process's blocks.
            Exception: a stream that uses a block cannot record an event; nothing is freed.
        """
        if self._deferred:
            self._deferred.run()
        events: Events = {}
        while streams := self._try_free(parts, skip_freed, merge, events):
            _record(streams, events)

    @section
    def _try_free(
        self,
        parts: Sequence[BlockRows],
        skip_freed: bool,
        merge: Merge | None,
        events: Events,
    ) -> list[Stream]:
        """Free blocks; or return the streams without event that use any of them."""
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.append(partial(self.free, parts, skip_freed, merge))
            return []
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            claimed = [
                (part.batch, part.batch.claimable(part.rows, skip_freed)) for part in parts
            ]
            missing: list[Stream] = []
            releases: list[Release] = []
            for batch, rows in claimed:
                record = batch.record
                if record is None or not len(record.addresses if rows is None else rows):
                    continue
                found = () if not record.counts.has_streams else record.counts.streams_of(rows)
                missing += [stream for stream in found if stream_key(stream) not in events]
                if not missing:
                    releases.append(record.release_of(rows, _events_of(found, events)))
            if not missing:
                if merge is not None and len(releases) > 1:
                    releases = merge(releases)
                ledger.carry_out(tuple(releases))
                for batch, rows in claimed:
                    if rows is None:
                        ledger.forget(batch.record)
            guard.busy = False
        return missing

    def _free_held(
        self, counts: RowCounts, record: OwnedBlocks | None, rows: Int64Array, events: Events
    ) -> list[Stream]:
        """Free rows that nothing holds; or return the streams without event that use them.

        Call with the guard held.
        """
        if record is None:  # a view: its bytes are another process's
            counts.set_freed(rows)
            return []
        found = () if not counts.has_streams else counts.streams_of(rows)
        missing = [stream for stream in found if stream_key(stream) not in events]
        if missing:
            return missing
        self.ledger.carry_out((record.release_of(rows, _events_of(found, events)),))
        if len(record.addresses) == 1 or (record() is None and not counts.count_live()[0]):
            self.ledger.forget(record)
        return []

    def free_on(
        self, parts: Sequence[BlockRows], condition: Event, keep: tuple[object, ...]
    ) -> tuple[Release, ...]:
        """Free blocks, all or none, on condition that ``condition`` completes.

        They count as freed at once. If the event raises ``ReleaseVoidError``, they are live again.

        Args:
            parts: blocks of this allocator, each batch once.
            condition: the event.
            keep: the batches, which must live until the condition is decided.

        Returns:
            The releases, for :meth:`take_back`.

        Raises:
            As :meth:`free`; and ReentrantCallError if the calling thread is inside an operation.
        """
        if self._deferred:
            self._deferred.run()
        events: Events = {}
        while True:
            missing, releases = self._try_free_on(parts, condition, keep, events)
            if not missing:
                return releases
            _record(missing, events)

    @section
    def _try_free_on(
        self,
        parts: Sequence[BlockRows],
        condition: Event,
        keep: tuple[object, ...],
        events: Events,
    ) -> tuple[list[Stream], tuple[Release, ...]]:
        guard = self.guard
        if guard.busy and is_inside_section():
            raise ReentrantCallError("offload(free=True)", 0, 0, 0)
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            missing: list[Stream] = []
            releases: list[Release] = []
            for part in parts:
                rows, record = part.batch.claimable(part.rows, False), part.batch.record
                assert record is not None  # a view is not claimable
                found = record.counts.streams_of(rows)
                missing += [stream for stream in found if stream_key(stream) not in events]
                if not missing:
                    release = record.release_of(rows, (condition, *_events_of(found, events)))
                    release.batches = keep
                    releases.append(release)
            if not missing:
                ledger.carry_out(tuple(releases))
            guard.busy = False
        return missing, tuple(releases)

    @section
    def take_back(self, releases: Sequence[Release]) -> None:
        """Make the blocks of conditional releases live again, unless that was done already."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return  # :meth:`settle` does it
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            waiting = tuple(each for each in releases if id(each) in ledger.pending)
            for release in waiting:
                release.is_void = True
            ledger.carry_out(waiting)
            guard.busy = False

    @section
    def discard(self, batch: TrackedBatch) -> None:
        """Free what is live of a batch that nobody else has seen."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return  # it is reclaimed once it is dropped
        with guard.lock:
            guard.busy = True
            ledger, record = self.ledger, batch.record
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            if record is not None:
                rows = batch.counts.rows_to_drop()
                ledger.carry_out((record.release_of(rows, ()),))
                ledger.forget(record)
            guard.busy = False

    @section
    def detach(self, batch: TrackedBatch) -> AddressBatch:
        """Free no bytes, but count all blocks of a batch as freed; see ``MemoryBatch.detach``."""
        guard = self.guard
        if guard.busy and is_inside_section():
            raise ReentrantCallError("detach", 0, 0, 0)
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            batch.claimable(None, False)
            batch.counts.set_freed(None)
            ledger.forget(batch.record)
            guard.busy = False
        return batch.runs

    @property
    def pending_bytes(self) -> int:
        """Freed bytes that streams still use."""
        return sum(release.num_bytes for release in tuple(self.ledger.pending.values()))

    # -- reclaiming ----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything waits for :meth:`settle`."""
        ledger = self.ledger
        return bool(
            ledger.dropped
            or ledger.pending
            or self._deferred
            or self._leases.entries
            or ledger.begun
            or ledger.allocation.done
            or ledger.failed
        )

    @property
    def num_reclaimed(self) -> int:
        """How many times bytes were given back: a count that changes when there may be room."""
        return self.ledger.num_returned

    def settle(self, limit: int | None = CHECKED_RELEASES) -> bool:
        """Reclaim dropped blocks, freed blocks that streams no longer use, and expired leases.

        Does nothing inside a section.

        Args:
            limit: how many pending releases to check; None: all.

        Returns:
            Whether bytes may have become free.
        """
        guard = self.guard
        if guard.busy and is_inside_section():
            return False
        before = self.num_reclaimed
        if self._deferred:
            self._deferred.run()
        if self._leases.entries:
            self.expire_leases()
        ledger = self.ledger
        while ledger.dropped and self._reclaim_dropped():
            continue
        if ledger.pending or ledger.begun or ledger.allocation.done:
            for release in self._next_pending(limit):
                state = self._state_of(release)
                if state != "pending":
                    self._conclude(release, is_void=state == "failed")
        while ledger.failed:
            self._report(ledger.failed.popleft())
        return self.num_reclaimed != before

    def _reclaim_dropped(self) -> bool:
        """Free the first dropped batch; False if there is none, or this thread cannot."""
        try:
            record = self.ledger.dropped[0]
        except IndexError:  # another thread took it
            return False
        events: Events = {}
        try:
            if record.counts.has_streams:
                rows = record.counts.rows_to_drop()
                _record(self._streams_of(record.counts, rows), events)
        except Exception:
            logging.getLogger("kvheap").exception(
                "%d dropped bytes stay allocated: a stream that used them cannot be queried",
                record.counts.count_live()[0] * record.addresses.block_bytes,
            )
            return self._abandon(record)
        return self._reclaim(record, events)

    @section
    def _reclaim(self, record: OwnedBlocks, events: Events) -> bool:
        """Free what is live of a dropped batch, but for leased blocks; False inside a section."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return False
        with guard.lock:
            guard.busy = True
            ledger, counts = self.ledger, record.counts
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            if ledger.dropped and ledger.dropped[0] is record:
                leased = counts.leased_rows()
                for row in leased:  # their leases free them
                    counts.set_references(row, 0)
                rows = counts.rows_to_drop(leased)
                num_blocks = len(record.addresses if rows is None else rows)
                release = None
                if num_blocks and id(record) in ledger.live:
                    found = counts.streams_of(rows)
                    release = record.release_of(rows, _events_of(found, events))
                ledger.reclaim(record, release, num_blocks if release else 0, bool(leased))
            guard.busy = False
        return True

    @section
    def _abandon(self, record: OwnedBlocks) -> bool:
        """Leave the first dropped batch allocated; it stays among the live ones."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return False
        with guard.lock:
            guard.busy = True
            if self.ledger.dropped and self.ledger.dropped[0] is record:
                self.ledger.dropped.popleft()
            guard.busy = False
        return True

    @section
    def _next_pending(self, limit: int | None) -> list[Release]:
        guard = self.guard
        if guard.busy and is_inside_section():
            return []
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            releases = ledger.next_pending(limit)
            guard.busy = False
        return releases

    def _state_of(self, release: Release) -> str:
        """``pending``; ``ended``; or ``failed`` if the blocks become live again."""
        if release.is_void:
            return "failed"
        try:
            return "ended" if all(map(self._has_ended, release.events)) else "pending"
        except ReleaseVoidError:
            return "failed"

    def _has_ended(self, event: Event) -> bool:
        """Whether an event is over; False if it cannot tell, which is logged once."""
        try:
            return event.query()
        except ReleaseVoidError:
            raise
        except Exception:
            if not self._told_of_lost_events:
                self._told_of_lost_events = True
                logging.getLogger("kvheap").exception(
                    "cannot tell whether a stream still uses freed bytes: they stay allocated"
                )
            return False

    @section
    def _conclude(self, release: Release, is_void: bool) -> None:
        """Give the bytes of a pending release back, or make its blocks live again."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            if id(release) in ledger.pending:
                if is_void:
                    release.is_void = True
                else:
                    release.events = ()
                with suppress(Exception):  # it is among the failed ones, and is tried again
                    ledger.carry_out((release,))
                release.batches = ()
            guard.busy = False

    def _report(self, release: Release) -> None:
        logging.getLogger("kvheap").error(
            "%d freed bytes stay allocated until they can be wiped: %s",
            release.num_bytes,
            release.error,
            exc_info=release.error,
        )

    def wait_for_streams(self, seconds: float, since: int | None = None) -> bool:
        """Wait until bytes may have become free, for at most ``seconds``.

        Args:
            seconds: how long.
            since: ``num_reclaimed`` at an earlier time: return at once if it has changed.

        Returns:
            Whether bytes may have become free.
        """
        deadline = time.monotonic() + seconds
        before = self.num_reclaimed if since is None else since
        while True:
            self.settle(limit=None)
            if self.num_reclaimed != before:
                return True
            if time.monotonic() >= deadline or not self.ledger.pending:
                return False
            time.sleep(POLL_SECONDS)

    def wait_until_unused(self, seconds: float) -> bool:
        """Wait until no stream uses live or freed blocks, for at most ``seconds``.

        Returns:
            Whether all streams have finished.
        """
        deadline = time.monotonic() + seconds
        records = tuple(self.ledger.live.values())
        streams = [each for record in records for each in self._streams_of(record.counts, None)]
        waits = [stream.record_event() for stream in streams if not has_let_go(stream)]
        while True:
            self.settle(limit=None)
            waits = [event for event in waits if not self._has_ended(event)]
            pending = tuple(self.ledger.pending.values())
            if not waits and all(self._state_of(release) != "pending" for release in pending):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)


def _record(streams: Sequence[Stream], events: Events) -> None:
    """Record an event of each stream that may still use bytes."""
    for stream in streams:
        events[stream_key(stream)] = None if has_let_go(stream) else stream.record_event()


def _events_of(streams: Sequence[Stream], events: Events) -> tuple[Event, ...]:
    """The recorded events of streams that still use bytes."""
    found = (events.get(stream_key(stream)) for stream in streams)
    return tuple(event for event in found if event is not None)
