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
looks up the streams and records their events, and is made in a section that finds no other stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.leases import Leases
from kvheap.blocks.ledger import Ledger, Space
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.reclaimer import Reclaimer
from kvheap.blocks.recorded_streams import Streams
from kvheap.blocks.release import Release
from kvheap.blocks.report import LiveBlocks
from kvheap.blocks.sites import Site, callers, site_lines
from kvheap.blocks.stream_events import NO_EVENTS, StreamEvents
from kvheap.blocks.tracked import BlockRows, TrackedBatch
from kvheap.device.events import Event, Stream, has_let_go
from kvheap.errors import ReentrantCallError
from kvheap.guards import Deferred, DeferredCall, Guard, is_inside_section, section

__all__ = ["Lifetime"]

Merge = Callable[[list[Release]], list[Release]]
"""Combines releases that can be given back together."""


class Lifetime:
    """Tracks the blocks of one allocator from allocation until their bytes may be reused.

    - batches: ``own``, ``live``, ``dropped_blocks``;
    - counts: ``hold``, ``change``, ``record_stream``;
    - freeing: ``free``, ``free_whole``, ``free_on``, ``take_back``, ``discard``, ``detach``;
    - its parts: ``leases``, ``reclaimer``;
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
        self.leases = Leases(guard, self.ledger, self._deferred)
        """Pins that expire."""
        self.reclaimer = Reclaimer(guard, self.ledger, self._deferred, self.leases)
        """Gives bytes back that nobody uses any more."""

    # -- batches -------------------------------------------------------------------------------

    def own(self, batch: TrackedBatch) -> None:
        """Make a batch the owner of its blocks' bytes, by the last store here.

        Before it the bytes are the caller's to free; after it they are the batch's, also if an
        exception strikes.
        """
        batch.is_owner = True
        if self._site_frames:
            batch.site = callers(self._site_frames)
        ledger = self.ledger
        batch.record = record = OwnedBlocks(batch, ledger.note_dropped)
        record.addresses = batch.runs
        record.counts = batch.counts
        record.layout = batch.layout
        record.site = batch.site
        record.born = batch.born
        record.done = record.was_reported = False
        ledger.live[id(record)] = record

    def live(self) -> tuple[LiveBlocks, ...]:
        """All live blocks, grouped by site and block layout, oldest first. O(batches)."""
        groups: dict[tuple[BlockLayout, Site], list[tuple[int, int, int, float]]] = {}
        now = time.monotonic()
        for record in self.ledger.live.copy().values():
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

    @section
    def hold(
        self,
        batch: TrackedBatch,
        row: int,
        references: int = 0,
        pins: int = 0,
        call: DeferredCall | None = None,
    ) -> None:
        """Add a reference or a pin to a block; :meth:`change` takes it away.

        Args:
            batch: the block's batch.
            row: the block's number in it.
            references: what to add to the reference count: 1, or 0 for a pin.
            pins: what to add to the pin count: 1, or 0 for a reference.
            call: if this call was put off.

        Raises:
            LifetimeError: the block is freed.
        """
        if self._deferred and call is None:
            self._deferred.run()
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.add(partial(self.hold, batch, row, references, pins))
            return
        with guard.lock:
            guard.busy = True
            ledger, counts = self.ledger, batch.counts
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            new_references, new_pins = counts.changed(row, references, pins, batch)
            values = counts.references_to_change() if references else counts.pins_to_change()
            # No signal handler runs between these lines. If something did, the count would be too
            # high, never too low.
            values[row] = new_references if references else new_pins
            if call is not None:
                call.was_made = True
            guard.busy = False

    def change(
        self,
        batch: TrackedBatch,
        row: int,
        references: int = 0,
        pins: int = 0,
        call: DeferredCall | None = None,
    ) -> None:
        """Change a block's counts, and free it if no reference and no pin is left.

        :meth:`hold` is quicker where nothing can become free.

        Args:
            batch: the block's batch.
            row: the block's number in it.
            references: what to add to the reference count.
            pins: what to add to the pin count.
            call: if this call was put off.

        Raises:
            LifetimeError: the block is freed, or a count would be negative.
            ForeignProcessError: the block would be freed, and another process keeps the books.
            Exception: a stream that uses the block cannot record an event; nothing is changed.
        """
        if self._deferred and call is None:
            self._deferred.run()
        events = NO_EVENTS
        while streams := self._try_change(batch, row, references, pins, events, call):
            events = events.record(streams, is_wrapped=call is not None)

    @section
    def _try_change(
        self,
        batch: TrackedBatch,
        row: int,
        references: int,
        pins: int,
        events: StreamEvents,
        call: DeferredCall | None,
    ) -> Streams:
        """Change counts; or return the streams without event that use a block to be freed."""
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.add(partial(self.change, batch, row, references, pins))
            return {}
        with guard.lock:
            guard.busy = True
            ledger, counts = self.ledger, batch.counts
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            if counts.has_dropped and references + pins < 0 and counts.was_dropped(row):
                if references:
                    ledger.num_dropped -= counts.forgive(np.array([row], np.int64))
                guard.busy = False
                return {}
            if counts.num_rows == 1 and references == -1:
                record = batch.record
                if record is not None and ledger.free_only(record, batch):
                    guard.busy = False
                    return {}
            new_references, new_pins = counts.changed(row, references, pins, batch)
            if new_references or new_pins or counts.leases_of(row):
                values = counts.references_to_change() if references else counts.pins_to_change()
                # No signal handler runs between these lines. If something did, the count would be
                # too high, never too low.
                if call is not None and references + pins < 0:
                    call.was_made = True
                values[row] = new_references if references else new_pins
                if call is not None:
                    call.was_made = True
                guard.busy = False
                return {}
            if batch.record is not None:
                batch.require_owner()
            missing = ledger.free_rows(counts, batch.record, np.array([row], np.int64), events)
            guard.busy = False
            return missing

    @section
    def record_stream(
        self,
        batch: TrackedBatch,
        stream: Stream,
        rows: Int64Array | None = None,
        call: DeferredCall | None = None,
    ) -> None:
        """Keep the bytes of ``rows`` (None: all) from reuse until the stream has used them.

        Raises:
            LifetimeError: one of them is freed.
        """
        if self._deferred:
            self._deferred.run()
        ended: Sequence[Stream] | None = None
        recorded = batch.counts.streams
        if recorded is not None and recorded.num_unpruned <= 0:
            ended = [each for each in batch.counts.streams_now(None).values() if has_let_go(each)]
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.add(partial(self.record_stream, batch, stream, rows))
            return
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            batch.counts.record_stream(stream, rows, batch)
            if ended is not None:
                batch.counts.forget_streams(ended)
            guard.busy = False

    # -- freeing -------------------------------------------------------------------------------

    @section
    def free_only(self, batch: TrackedBatch) -> bool:
        """:meth:`free_whole` for one batch of this allocator; the quickest way."""
        guard = self.guard
        if self._deferred or (guard.busy and is_inside_section()):
            return False
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            record = batch.record
            is_freed = record is not None and ledger.free_only(record, batch)
            guard.busy = False
        return is_freed

    @section
    def free_whole(self, batches: Sequence[TrackedBatch]) -> bool:
        """Free all blocks of batches, if nothing keeps or delays that; quicker than :meth:`free`.

        Args:
            batches: batches of this allocator, each once.

        Returns:
            Whether they are freed; False: nothing is changed, and :meth:`free` knows why.
        """
        guard = self.guard
        if self._deferred or (guard.busy and is_inside_section()):
            return False
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            records = tuple([each.record for each in batches if each.record is not None])
            is_freed = len(records) == len(batches) and ledger.free_whole(records)
            guard.busy = False
        return is_freed

    def free(
        self,
        parts: Sequence[BlockRows],
        skip_freed: bool = False,
        merge: Merge | None = None,
        call: DeferredCall | None = None,
    ) -> None:
        """Free blocks, all or none.

        Args:
            parts: blocks of this allocator, each batch once.
            skip_freed: skip blocks that are already freed instead of raising.
            merge: combines the releases of several parts.
            call: if this call was put off.

        Raises:
            DoubleFreeError: a block is already freed, or named twice.
            BlockInUseError: a block is pinned or has more than one reference.
            ForeignObjectError: a batch is a view of another process's blocks.
            Exception: a stream that uses a block cannot record an event; nothing is freed.
        """
        if self._deferred and call is None:
            self._deferred.run()
        events = NO_EVENTS
        if len(parts) == 1 and parts[0].rows is None and not self.guard.busy:
            batch = parts[0].batch
            counts = batch.counts
            if counts.streams is not None and counts.is_untouched():  # it will be freed
                events = NO_EVENTS.record(counts.streams_now(None), is_wrapped=call is not None)
                if self._free_behind(batch, events):
                    return
        while streams := self._try_free(parts, skip_freed, merge, events):
            events = events.record(streams, is_wrapped=call is not None)

    @section
    def _free_behind(self, batch: TrackedBatch, events: StreamEvents) -> bool:
        """:meth:`free_whole` for one batch that streams use, whose events are known."""
        guard = self.guard
        if self._deferred or (guard.busy and is_inside_section()):
            return False
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            record = batch.record
            is_freed = record is not None and ledger.free_behind(record, events)
            guard.busy = False
        return is_freed

    @section
    def _try_free(
        self,
        parts: Sequence[BlockRows],
        skip_freed: bool,
        merge: Merge | None,
        events: StreamEvents,
    ) -> Streams:
        """Free blocks; or return the streams without event that use any of them."""
        guard = self.guard
        if guard.busy and is_inside_section():
            self._deferred.add(partial(self.free, parts, skip_freed, merge))
            return {}
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            has_dropped = False
            missing: Streams = {}
            claimed: list[tuple[OwnedBlocks | None, bool]] = []
            releases: list[Release] = []
            for part in parts:
                batch = part.batch
                rows, record = batch.claimable(part.rows, skip_freed), batch.record
                claimed.append((record, rows is None))
                has_dropped = has_dropped or batch.counts.has_dropped
                if record is None or (rows is not None and not len(rows)):
                    continue
                waits: tuple[Event, ...] = ()
                if batch.counts.streams is not None:
                    waits = events.of(batch.counts.streams.of(rows), missing)
                if not missing:
                    releases.append(record.release_of(rows, waits))
            if not missing:
                if merge is not None and len(releases) > 1:
                    releases = merge(releases)
                ledger.carry_out(tuple(releases))
                for record, is_whole in claimed:
                    if is_whole:
                        ledger.forget(record)
                if has_dropped:
                    for part in parts:
                        ledger.num_dropped -= part.batch.counts.forgive(part.rows)
            guard.busy = False
        return missing

    def free_on(self, parts: Sequence[BlockRows], condition: Event) -> None:
        """Free blocks, all or none, on condition that ``condition`` completes.

        They count as freed at once. If the event raises ``ReleaseVoidError``, they are live again;
        or free, if their batch has been dropped meanwhile.

        Args:
            parts: blocks of this allocator, each batch once.
            condition: the event.

        Raises:
            As :meth:`free`; and ReentrantCallError if the calling thread is inside an operation.
        """
        if self._deferred:
            self._deferred.run()
        events = NO_EVENTS
        while streams := self._try_free_on(parts, condition, events):
            events = events.record(streams)

    @section
    def _try_free_on(
        self, parts: Sequence[BlockRows], condition: Event, events: StreamEvents
    ) -> Streams:
        """Free blocks on condition; or return the streams without event that use any of them."""
        guard = self.guard
        if guard.busy and is_inside_section():
            raise ReentrantCallError("offload(free=True)", 0, 0, 0)
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            missing: Streams = {}
            releases: list[Release] = []
            for part in parts:
                rows, record = part.batch.claimable(part.rows, False), part.batch.record
                if record is None:
                    continue  # an empty batch whose blocks are all free
                waits = events.of(record.counts.streams_of(rows), missing)
                if not missing:
                    release = record.release_of(rows, (condition, *waits))
                    release.batch, release.condition = record, condition
                    releases.append(release)
            if not missing:
                ledger.carry_out(tuple(releases))
            guard.busy = False
        return missing

    @section
    def take_back(self, condition: Event) -> None:
        """Make the blocks live again that were freed on a condition, unless that was done."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return  # the next operation finds that the condition is void
        with guard.lock:
            guard.busy = True
            ledger = self.ledger
            if ledger.begun or ledger.allocation.done:
                ledger.finish()
            pending = ledger.pending.copy().values()
            waiting = tuple(each for each in pending if each.condition is condition)
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
