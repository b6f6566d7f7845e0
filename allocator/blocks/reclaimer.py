"""``Reclaimer``: gives bytes back that nobody uses any more.

These are the blocks of batches that were dropped, freed blocks whose streams have finished, and
blocks whose last lease has expired.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TypeAlias

from kvheap.blocks.counts import DROPPED
from kvheap.blocks.leases import Leases
from kvheap.blocks.ledger import Ledger
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.recorded_streams import Streams
from kvheap.blocks.release import Release
from kvheap.blocks.stream_events import StreamEvents
from kvheap.device.captures import end_of_work, is_capturing
from kvheap.device.events import POLL_SECONDS, Event, ReleaseVoidError, Stream, has_let_go
from kvheap.guards import Deferred, Guard, is_inside_section, section
from kvheap.interrupts import is_interrupt
from kvheap.kernels.capture_mode import Relaxed, uses_cuda

__all__ = ["Reclaimer"]

LOGGER = logging.getLogger("kvheap")

CHECKED_RELEASES = 8
"""Pending releases that one operation checks; see benchmarks/NOTES.md."""

RELEASES_PER_SECTION = 64
"""How many are given back at once; other threads wait as long."""

Found: TypeAlias = "tuple[Release, bool]"
"""A release that is pending no more; true if its condition has failed, false if all has ended."""


class Reclaimer:
    """Gives bytes back that nobody uses any more.

    - what waits: ``has_work``, ``waiting``, ``waiting_but_for_streams``, ``pending_bytes``,
      ``num_reclaimed``;
    - reclaim: ``settle``, ``wait_for_streams``, ``wait_until_unused``.

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
        self.waiting_but_for_streams = (ledger.dropped, deferred, leases.queue.entries)
        """``waiting`` for frees: what streams still use is looked at once somebody needs bytes."""
        self.waiting = (*self.waiting_but_for_streams, ledger.pending)
        """What :meth:`settle` looks through; ``any`` of it is a quick ``has_work``, for
        operations whose sections finish what was interrupted."""
        self._told_of_lost_events = False

    @property
    def pending_bytes(self) -> int:
        """Freed bytes that streams still use. O(1)."""
        return self._ledger.pending_bytes

    def count_quarantined_bytes(self) -> int:
        """Those of :attr:`pending_bytes` that a failed transfer may use for ever. O(pending)."""
        return sum(
            release.pending_bytes
            for release in self._ledger.next_pending(None)
            if any(getattr(event, "is_quarantined", False) for event in release.events)
        )

    @property
    def has_work(self) -> bool:
        """Whether anything waits for :meth:`settle`."""
        ledger = self._ledger
        return any(self.waiting) or bool(ledger.begun) or ledger.allocation.done

    @property
    def num_reclaimed(self) -> int:
        """How many times bytes were reclaimed; frees that gave theirs back at once do not count."""
        return self._ledger.num_reclaimed

    def settle(self, limit: int | None = CHECKED_RELEASES) -> bool:
        """Reclaim dropped blocks, freed blocks that streams no longer use, and expired leases.

        Does nothing inside a section. While the calling thread captures a CUDA graph, streams and
        events are asked nothing: what they use is reclaimed after the capture.

        Args:
            limit: how many pending releases to check; None: all.

        Returns:
            Whether bytes may have become free.
        """
        guard = self._guard
        if guard.busy and is_inside_section():
            return False
        ledger = self._ledger
        before = ledger.num_reclaimed
        if self._deferred:
            self._deferred.run()
        if self._leases.queue.entries:
            self._leases.expire()
        if limit is None and ledger.unclear:
            ledger.dropped.extend(ledger.unclear)  # what is queued twice is skipped
            ledger.unclear = []
        while ledger.dropped and self._reclaim_dropped():
            continue
        if ledger.pending or ledger.begun or ledger.allocation.done:
            self._look_at_pending(limit)
        while ledger.failed:
            self._report(ledger.failed.popleft())
        return ledger.num_reclaimed != before

    def _reclaim_dropped(self) -> bool:
        """Free the first dropped batch; False if there is none, or this thread cannot."""
        try:
            record = self._ledger.dropped[0]
        except IndexError:  # another thread took it
            return False
        if id(record) not in self._ledger.live:  # it was never owned, or freed since
            return self._skip(record)
        events = StreamEvents()
        streams: Streams = {}
        if record.counts.streams is not None:
            streams = record.counts.streams_now(record.counts.rows_to_drop())
        if streams and not self._can_record(record, streams, events):
            return self._skip(record)
        return self._reclaim(record, events)

    def _can_record(self, record: OwnedBlocks, streams: Streams, events: StreamEvents) -> bool:
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
                num_held = counts.give_up(leased)  # their leases free them
                rows = counts.rows_to_drop(leased)
                num_blocks = len(record.addresses if rows is None else rows)
                release = None
                if num_blocks and id(record) in ledger.live:
                    release = record.release_of(rows, events.of(counts.streams_of(rows), {}))
                    release.count = DROPPED
                if id(record) not in ledger.live:
                    num_blocks, num_held, leased = 0, 0, leased[:0]
                ledger.reclaim(record, release, num_blocks + num_held, bool(len(leased)))
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

    def _look_at_pending(self, limit: int | None) -> None:
        """Give back what has ended of the ``limit`` pending releases checked longest ago."""
        ledger = self._ledger
        if not uses_cuda():
            releases = ledger.next_pending(limit)
            ended = self._ended_of(releases)
        elif is_capturing():
            releases, ended = [], []
        else:
            releases = ledger.next_pending(limit)
            with Relaxed():
                ended = self._ended_of(releases)
        last = releases if len(releases) < len(ledger.pending) else ()
        if ended or last or ledger.begun or ledger.allocation.done:
            self._conclude(ended, last)

    def _ended_of(self, releases: Sequence[Release]) -> list[Found]:
        """Those releases that have ended or failed; gives the first of very many back."""
        ended: list[Found] = []
        for release in releases:
            state = self._state_of(release)
            if state == "failed" and release.is_orphaned:
                release.waive_condition()
                state = self._state_of(release)
            if state == "pending":
                continue
            ended.append((release, state == "failed"))
            if len(ended) == RELEASES_PER_SECTION:
                self._conclude(ended, ())
                ended = []
        return ended

    def _state_of(self, release: Release) -> str:
        """``pending``; ``ended``; or ``failed`` if the blocks become live again."""
        if release.is_void:
            return "failed"
        try:
            for event in release.events:
                if not event.query():
                    return "pending"
        except ReleaseVoidError:
            return "failed"
        except Exception as error:
            if is_interrupt(error):
                raise
            self._note_lost(error)
            return "pending"
        return "ended"

    def _has_ended(self, event: Event) -> bool:
        """Whether an event is over; False if it cannot tell."""
        try:
            return event.query()
        except Exception as error:
            if is_interrupt(error):
                raise
            self._note_lost(error)
            return False

    def _note_lost(self, error: Exception) -> None:
        """Log once that an event cannot tell."""
        if not self._told_of_lost_events:
            self._told_of_lost_events = True
            LOGGER.error(
                "cannot tell whether a stream still uses bytes: they stay allocated",
                exc_info=error,
            )

    @section
    def _conclude(self, ended: Sequence[Found], last: Sequence[Release]) -> None:
        """Give the bytes of releases back, or make the blocks of void ones live again.

        Args:
            ended: the releases. What was found of them is not to be read from them: they may have
                been looked at again since, by another thread or by the code of an event.
            last: the pending releases that are to be checked again last.
        """
        guard = self._guard
        if guard.busy and is_inside_section():
            return
        with guard.lock:
            guard.busy = True
            ledger = self._ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            for release, is_void in ended:
                if id(release) in ledger.pending:
                    if is_void:
                        release.is_void = True
                    else:
                        release.events = ()
                    ledger.carry_out_quietly(release)
            if last:
                ledger.check_last(last)
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
            if time.monotonic() >= deadline or not self._ledger.pending or is_capturing():
                return False
            time.sleep(POLL_SECONDS)

    def wait_until_unused(self, seconds: float) -> bool:
        """Wait until no stream uses live or freed blocks, for at most ``seconds``.

        Returns:
            Whether all streams have finished; False without a wait for one that cannot tell, and
            while the calling thread captures a CUDA graph.
        """
        deadline = time.monotonic() + seconds
        records = self._ledger.live.copy().values()
        streams = [each for record in records for each in record.counts.streams_now(None).values()]
        waits: list[Event] = []
        if is_capturing() and (streams or self._ledger.pending):
            return False
        with Relaxed():
            can_wait = [self._can_wait_for(stream, waits) for stream in streams]
        while True:
            self.settle(limit=None)
            if self._are_over(waits):
                return all(can_wait)
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)

    def _are_over(self, waits: list[Event]) -> bool:
        """Whether all events are over, and those of pending releases; drops those that are."""
        with Relaxed():
            waits[:] = [event for event in waits if not self._has_ended(event)]
            pending = self._ledger.pending.copy().values()
            return not waits and all(self._state_of(release) != "pending" for release in pending)

    def _can_wait_for(self, stream: Stream, waits: list[Event]) -> bool:
        """Add the event to wait for, if any; False if the stream cannot tell whether it is over."""
        try:
            if not has_let_go(stream):
                waits.append(end_of_work(stream))
        except Exception as error:
            if is_interrupt(error):
                raise
            self._note_lost(error)
            return False
        return True
