"""``Reclaimer``: gives bytes back that nobody uses any more.

These are the blocks of batches that were dropped, freed blocks whose streams have finished, and
blocks whose last lease has expired.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.counts import DROPPED, RowCounts
from kvheap.blocks.leases import Leases
from kvheap.blocks.ledger import Ledger
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.release import Release
from kvheap.blocks.stream_events import StreamEvents
from kvheap.device.events import POLL_SECONDS, Event, ReleaseVoidError, Stream, has_let_go
from kvheap.guards import Deferred, Guard, is_inside_section, section
from kvheap.interrupts import is_interrupt

__all__ = ["Reclaimer"]

LOGGER = logging.getLogger("kvheap")

CHECKED_RELEASES = 8
"""Pending releases that one operation checks; see benchmarks/NOTES.md."""


class Reclaimer:
    """Gives bytes back that nobody uses any more.

    - what waits: ``has_work``, ``pending_bytes``, ``num_reclaimed``;
    - reclaim: ``settle``, ``wait_for_streams``, ``wait_until_unused``;
    - streams: ``streams_of``.

    Args:
        guard: the allocator's guard.
        ledger: who owns which bytes.
        deferred: the allocator's calls that were put off.
        leases: the allocator's leases.
    """

    def __init__(self, guard: Guard, ledger: Ledger, deferred: Deferred, leases: Leases) -> None:
        self._guard = guard
        self._ledger = ledger
        self._deferred = deferred
        self._leases = leases
        self._told_of_lost_events = False

    @property
    def pending_bytes(self) -> int:
        """Freed bytes that streams still use. O(1)."""
        return self._ledger.pending_bytes

    @property
    def has_work(self) -> bool:
        """Whether anything waits for :meth:`settle`."""
        ledger = self._ledger
        return bool(
            ledger.dropped
            or ledger.pending
            or self._deferred
            or self._leases.queue.entries
            or ledger.begun
            or ledger.allocation.done
        )

    @property
    def num_reclaimed(self) -> int:
        """How many times bytes were reclaimed; frees that gave theirs back at once do not count."""
        return self._ledger.num_reclaimed

    def settle(self, limit: int | None = CHECKED_RELEASES) -> bool:
        """Reclaim dropped blocks, freed blocks that streams no longer use, and expired leases.

        Does nothing inside a section.

        Args:
            limit: how many pending releases to check; None: all.

        Returns:
            Whether bytes may have become free.
        """
        guard = self._guard
        if guard.busy and is_inside_section():
            return False
        before = self.num_reclaimed
        if self._deferred:
            self._deferred.run()
        if self._leases.queue.entries:
            self._leases.expire()
        ledger = self._ledger
        if limit is None and ledger.unclear:
            ledger.dropped.extend(ledger.unclear)  # what is queued twice is skipped
            ledger.unclear = []
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
            record = self._ledger.dropped[0]
        except IndexError:  # another thread took it
            return False
        if id(record) not in self._ledger.live:  # it was never owned, or freed since
            return self._skip(record)
        events = StreamEvents()
        streams: Sequence[Stream] = ()
        if record.counts.has_streams:
            streams = self.streams_of(record.counts, record.counts.rows_to_drop())
        if streams and not self._can_record(record, streams, events):
            return self._skip(record)
        return self._reclaim(record, events)

    def _can_record(
        self, record: OwnedBlocks, streams: Sequence[Stream], events: StreamEvents
    ) -> bool:
        """Record the events that the blocks of a dropped batch wait for; False if that fails."""
        try:
            events.record(streams)
        except Exception as error:
            if is_interrupt(error):
                raise
            if not record.was_reported:
                record.was_reported = True
                LOGGER.exception(
                    "%d dropped bytes stay allocated: a stream that used them cannot be queried",
                    record.counts.count_live()[0] * record.addresses.block_bytes,
                )
            return False
        return True

    @section
    def _reclaim(self, record: OwnedBlocks, events: StreamEvents) -> bool:
        """Free what is live of a dropped batch, but for leased blocks; False inside a section."""
        guard = self._guard
        if guard.busy and is_inside_section():
            return False
        with guard.lock:
            guard.busy = True
            ledger, counts = self._ledger, record.counts
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            if ledger.dropped and ledger.dropped[0] is record:
                leased = counts.leased_rows()
                num_held = sum(counts.is_held(row, but_leases=True) for row in leased)
                for row in leased:  # their leases free them
                    counts.references_to_change()[row] = 0
                    counts.pins_to_change()[row] = 0
                rows = counts.rows_to_drop(leased)
                num_blocks = len(record.addresses if rows is None else rows)
                release = None
                if num_blocks and id(record) in ledger.live:
                    found = counts.streams_of(rows)
                    release = record.release_of(rows, events.of(found))
                    release.count = DROPPED
                if id(record) not in ledger.live:
                    num_blocks, num_held, leased = 0, 0, ()
                ledger.reclaim(record, release, num_blocks + num_held, bool(leased))
            guard.busy = False
        return True

    @section
    def _skip(self, record: OwnedBlocks) -> bool:
        """Take the first dropped batch off the queue; what is live of it stays so for now."""
        guard = self._guard
        if guard.busy and is_inside_section():
            return False
        with guard.lock:
            guard.busy = True
            ledger = self._ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            if ledger.dropped and ledger.dropped[0] is record:
                if id(record) in ledger.live:
                    ledger.unclear.append(record)
                ledger.dropped.popleft()
            guard.busy = False
        return True

    @section
    def _next_pending(self, limit: int | None) -> Sequence[Release]:
        guard = self._guard
        if guard.busy and is_inside_section():
            return ()
        with guard.lock:
            guard.busy = True
            ledger = self._ledger
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
        except Exception as error:
            if is_interrupt(error):
                raise
            if not self._told_of_lost_events:
                self._told_of_lost_events = True
                LOGGER.exception(
                    "cannot tell whether a stream still uses freed bytes: they stay allocated"
                )
            return False

    @section
    def _conclude(self, release: Release, is_void: bool) -> None:
        """Give the bytes of a pending release back, or make its blocks live again."""
        guard = self._guard
        if guard.busy and is_inside_section():
            return
        with guard.lock:
            guard.busy = True
            ledger = self._ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            if id(release) in ledger.pending:
                if is_void:
                    release.is_void = True
                else:
                    release.events = ()
                ledger.carry_out_quietly(release)
            guard.busy = False

    def _report(self, release: Release) -> None:
        LOGGER.error(
            "%d freed bytes could not be given back: %s",
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
            if time.monotonic() >= deadline or not self._ledger.pending:
                return False
            time.sleep(POLL_SECONDS)

    def wait_until_unused(self, seconds: float) -> bool:
        """Wait until no stream uses live or freed blocks, for at most ``seconds``.

        Returns:
            Whether all streams have finished.
        """
        deadline = time.monotonic() + seconds
        records = self._ledger.live.copy().values()
        streams = [each for record in records for each in self.streams_of(record.counts, None)]
        waits = [stream.record_event() for stream in streams if not has_let_go(stream)]
        while True:
            self.settle(limit=None)
            waits = [event for event in waits if not self._has_ended(event)]
            pending = self._ledger.pending.copy().values()
            if not waits and all(self._state_of(release) != "pending" for release in pending):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)

    @section
    def streams_of(self, counts: RowCounts, rows: Int64Array | None) -> tuple[Stream, ...]:
        """The streams that were recorded for any of ``rows`` (None: all)."""
        guard = self._guard
        if guard.busy and is_inside_section():
            return _streams_meanwhile(counts, rows)
        with guard.lock:
            guard.busy = True
            streams = counts.streams_of(rows)
            guard.busy = False
        return streams


def _streams_meanwhile(counts: RowCounts, rows: Int64Array | None) -> tuple[Stream, ...]:
    """The streams of rows, while another thread may be recording more."""
    streams = None
    while streams is None:
        with suppress(RuntimeError):  # a dict has changed while it was read
            streams = counts.streams_of(rows)
    return streams
