"""``Ledger``: who owns which bytes of an allocator, in a form that no exception can damage.

At every instant each allocated byte is named by exactly one of these records:

- ``allocation``: the receipt of the allocation that is under way;
- ``live``: the blocks of a batch, until they are freed or the batch is dropped and reclaimed;
- ``begun``: the releases that are under way;
- ``pending``: releases that wait for streams.

A byte passes from one record to the next by a single store. An exception, such as
``KeyboardInterrupt`` from a signal handler, can strike between two stores but not within one. So
whatever it leaves half-done can be told from the records alone: :meth:`Ledger.finish` completes
it, and does nothing a second time that was done before. Each section calls it first.

A :class:`Ledger` is used with the allocator's guard held. It calls no code of the user's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.addresses.free_list import Done, Receipt
from kvheap.blocks.counts import RowCounts
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.recorded_streams import Streams
from kvheap.blocks.release import Release, WipedLaterError, WipingError
from kvheap.blocks.stream_events import StreamEvents
from kvheap.device.events import Event
from kvheap.errors import InvalidFreeError
from kvheap.guards import read_meanwhile

__all__ = ["Ledger", "NoSpace", "Space"]


class Space(Protocol):
    """Where the bytes of an allocator come from."""

    is_plain: bool
    """Whether bytes that are given back become free and nothing else is done to them."""

    def give_back(self, release: Release) -> None:
        """Make the bytes of a release free, and set ``release.done`` in the same step."""
        ...

    @property
    def give_back_whole(self) -> Callable[[AddressBatch, Done], None]:
        """:meth:`give_back` of all blocks of a batch, with a receipt for it; if plain."""
        ...

    def give_back_together(self, records: Sequence[OwnedBlocks]) -> bool:
        """:meth:`give_back_whole` of all batches or of none; whether it was of all."""
        ...

    def was_given_back(self, record: OwnedBlocks) -> bool:
        """After :meth:`finish`: whether an interrupted :meth:`give_back_whole` has freed them."""
        ...

    def finish(self) -> None:
        """Undo an allocation that an exception interrupted, so that its receipt is final."""
        ...


class Recorded(Protocol):
    """A batch, as far as a ledger knows it."""

    record: OwnedBlocks | None
    """What the ledger knows of it; None once all is freed."""


class NoSpace:
    """The space of an allocator whose batches own their memory: nothing is given back."""

    is_plain = False

    def give_back(self, release: Release) -> None:
        """Nothing but the receipt."""
        release.done = True

    def give_back_whole(self, blocks: AddressBatch, receipt: Done) -> None:
        """Nothing but the receipt."""
        receipt.done = True

    def give_back_together(self, records: Sequence[OwnedBlocks]) -> bool:
        """None: each by itself."""
        return False

    def was_given_back(self, record: OwnedBlocks) -> bool:
        """Whether the receipt says so."""
        return record.done

    def finish(self) -> None:
        """Does nothing."""


class Ledger:
    """Who owns which bytes of an allocator. Not thread-safe.

    Attributes:
        live: the records of all batches that may have live blocks, by ``id`` of the record.
        dropped: the records of batches that are gone; each stays in ``live`` until it is reclaimed.
        pending: freed blocks that streams still use, by ``id``, the first checked longest ago.
        pending_bytes: the bytes of ``pending``.
        begun: releases that are under way, or the record of a batch that is freed as a whole. Not
            empty at the start of a section: an exception interrupted the last one, which
            :meth:`finish` completes.
        allocation: the receipt for allocations from the space. If it is ``done`` at the start of a
            section, likewise.
        failed: releases whose bytes could not be given back, to be reported.
        unclear: dropped batches whose streams could not be queried, to be tried again.
        num_reclaimed: number of releases whose bytes were given back after the free: a wait for
            bytes was worth it.
        num_dropped: number of blocks that were dropped without being freed, and then reclaimed.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._undo: Release | None = None
        self.live: dict[int, OwnedBlocks] = {}
        self.dropped: deque[OwnedBlocks] = deque()
        self.note_dropped: Callable[[OwnedBlocks], None] = self.dropped.append
        """The interpreter calls it when a batch is gone; nothing interrupts a C function."""
        self.pending: OrderedDict[int, Release] = OrderedDict()
        self.pending_bytes = 0
        self.begun: tuple[Release | OwnedBlocks, ...] = ()
        self.allocation = Receipt()
        self.failed: deque[Release] = deque()
        self.unclear: list[OwnedBlocks] = []
        self.num_reclaimed = 0
        self.num_dropped = 0

    def carry_out(self, releases: tuple[Release, ...]) -> None:
        """Free the blocks of releases, or make them live again if they are void.

        Raises:
            Exception: the bytes of a release could not be given back. All blocks count as freed;
                what can be tried again is pending.
        """
        self.begun = releases  # from here on they are freed, whatever happens
        error = self._go_on(releases, is_quiet=False)
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback would hold this frame, and so the heap

    def free_only(self, record: OwnedBlocks, batch: Recorded) -> bool:
        """:meth:`free_whole` for one batch; the quickest way.

        Args:
            record: the record of the batch.
            batch: the batch.

        Returns:
            As :meth:`free_whole`.

        Raises:
            InvalidFreeError: as :meth:`free_whole`.
        """
        space, counts = self._space, record.counts
        if not (space.is_plain and counts.is_unused()):
            return False
        give_back = space.give_back_whole
        self.begun = (record,)  # from here on they are freed, whatever happens
        counts.set_all_freed()
        try:
            give_back(record.addresses, record)
        except InvalidFreeError:
            self.forget(record)
            self.begun = ()
            raise
        self.live.pop(id(record), None)  # as ``forget``
        batch.record = None
        self.begun = ()
        return True

    def free_whole(self, records: tuple[OwnedBlocks, ...]) -> bool:
        """Free all blocks of batches, if nothing keeps or delays that.

        Args:
            records: the records of the batches, each once.

        Returns:
            Whether they are freed. If not, nothing is changed: some block may be free already, be
            held or be used by a stream, or its bytes must be wiped.

        Raises:
            InvalidFreeError: bytes are somebody else's by now; all blocks count as freed.
        """
        space = self._space
        if not space.is_plain:
            return False
        for record in records:
            if not record.counts.is_unused():
                return False
        self.begun = records  # from here on they are freed, whatever happens
        for record in records:
            record.counts.set_all_freed()
        error: InvalidFreeError | None = None
        are_free = space.give_back_together(records)
        for record in records:
            if not are_free:
                try:
                    space.give_back_whole(record.addresses, record)
                except InvalidFreeError as failure:
                    error = failure
            self.live.pop(id(record), None)  # as ``forget``
            batch = record()
            if batch is not None:
                batch.record = None
        self.begun = ()
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback would hold this frame
        return True

    def free_behind(self, record: OwnedBlocks, events: StreamEvents) -> bool:
        """:meth:`free_whole` for one batch that streams use, whose events are known.

        Returns:
            Whether the blocks are freed; False, too, if a stream has no event yet.
        """
        counts, missing = record.counts, Streams()
        if not (self._space.is_plain and counts.is_untouched()):
            return False
        waits = events.of(counts.streams_of(None), missing)
        if missing:
            return False
        self.carry_out((record.release_of(None, waits),))
        self.forget(record)
        return True

    def carry_out_quietly(self, release: Release) -> None:
        """:meth:`carry_out` for whoever did not ask for it: an error is noted in ``failed``."""
        self.begun = (release,)
        self._go_on((release,), is_quiet=True)
        self.num_reclaimed += release.done

    def free_rows(
        self, counts: RowCounts, record: OwnedBlocks | None, rows: Int64Array, events: StreamEvents
    ) -> Streams:
        """Free rows that nothing holds; or return the streams without event that use them."""
        if record is None:  # a view: its bytes are another process's
            counts.set_freed(rows)
            return {}
        waits: tuple[Event, ...] = ()
        if counts.streams is not None:
            missing: Streams = {}
            waits = events.of(counts.streams_of(rows), missing)
            if missing:
                return missing
        self.carry_out((record.release_of(rows, waits),))
        if len(record.addresses) == 1 or (record() is None and not counts.count_live()[0]):
            self.forget(record)
        return {}

    def finish(self) -> None:
        """Finish what an exception interrupted."""
        self._space.finish()  # first: a receipt is the truth only once no rollback is pending
        self._finish_begun()
        allocation = self.allocation
        if not allocation.done:
            return
        blocks = allocation.blocks
        assert blocks is not None
        if not any(record.addresses is blocks for record in self.live.copy().values()):
            undo = self._undo
            if undo is None or undo.freed is not blocks:
                self._undo = undo = _undo_of(blocks)
            if not undo.done and id(undo) not in self.pending:
                self.begun = (undo,)
                self._finish_begun()
        allocation.done = False

    def _finish_begun(self) -> None:
        if self.begun:
            releases = tuple(map(self._as_release, self.begun))
            self.begun = releases  # they are the receipts from now on
            self._go_on(releases, is_quiet=True)
            pending = self.pending.copy().values()
            self.pending_bytes = sum(release.num_bytes for release in pending)

    def _as_release(self, begun: Release | OwnedBlocks) -> Release:
        """The release of a batch that was being freed as a whole when an exception struck."""
        if isinstance(begun, Release):
            return begun
        release = begun.release_of(None, ())
        release.done = self._space.was_given_back(begun)
        return release

    def forget(self, record: OwnedBlocks | None) -> None:
        """Drop the record of a batch without live blocks."""
        if record is not None:
            self.live.pop(id(record), None)
            batch = record()
            if batch is not None:
                batch.record = None

    def reclaim(
        self, record: OwnedBlocks, release: Release | None, num_blocks: int, is_leased: bool
    ) -> None:
        """Free what is live of the first dropped batch.

        Args:
            record: the first of ``dropped``.
            release: its live blocks; None if there are none.
            num_blocks: how many they are.
            is_leased: whether others of its blocks are leased, and stay live.
        """
        if release is not None:
            self.carry_out_quietly(release)
        self.num_dropped += num_blocks
        if not is_leased:
            self.live.pop(id(record), None)
        self.dropped.popleft()

    def extents(self) -> Extents:
        """The bytes that live batches and pending releases name, in address order.

        Returns:
            Start and size of each block in bytes, as often as it is named.
        """
        starts: list[Int64Array] = [np.empty(0, np.int64)]
        sizes: list[Int64Array] = [np.empty(0, np.int64)]
        for record in self.live.copy().values():
            rows = record.counts.rows_to_drop()
            addresses = record.addresses.addresses
            starts.append(addresses if rows is None else addresses[rows])
            sizes.append(np.full(len(starts[-1]), record.addresses.block_bytes, np.int64))
        for release in self.pending.copy().values():
            for addresses, size in release.by_size():
                starts.append(addresses)
                sizes.append(np.full(len(addresses), size, np.int64))
        all_starts, all_sizes = np.concatenate(starts), np.concatenate(sizes)
        order = np.argsort(all_starts, kind="stable")
        return Extents(all_starts[order], all_sizes[order])

    def next_pending(self, limit: int | None) -> list[Release]:
        """The ``limit`` pending releases that were checked longest ago (None: all).

        Needs no guard.
        """
        try:
            return list(islice(self.pending.values(), limit))
        except RuntimeError:
            return read_meanwhile(lambda: list(islice(self.pending.values(), limit)))

    def check_last(self, releases: Sequence[Release]) -> None:
        """Let :meth:`next_pending` return these releases, if they are pending, after all others."""
        for release in releases:
            if id(release) in self.pending:
                self.pending.move_to_end(id(release))

    def _go_on(self, releases: Sequence[Release], is_quiet: bool) -> BaseException | None:
        """Carry out ``begun``, of which every step may have been done before.

        Args:
            releases: the same.
            is_quiet: note errors in ``failed``; one that is tried again, only the second time.

        Returns:
            Why bytes could not be given back.
        """
        error: BaseException | None = None
        for release in releases:
            if release.is_void and release.is_orphaned:
                release.waive_condition()
            elif release.is_void:
                for counts, rows in release.parts:
                    counts.set_live(rows)
                self._end_pending(release)
                continue
            for counts, rows in release.parts:
                counts.set_freed(rows, release.count)
            if release.events:
                self._begin_pending(release)
                continue
            if not release.done:
                try:
                    self._space.give_back(release)
                except InvalidFreeError as failure:  # its bytes are somebody else's by now
                    error = release.error = failure
                    if is_quiet:
                        self.failed.append(release)
                except WipedLaterError:
                    self._begin_pending(release)
                    continue
                except WipingError as failure:
                    error = failure.__cause__
                    if is_quiet and release.error is not None and not release.was_reported:
                        release.was_reported = True
                        self.failed.append(release)
                    release.error = error
                    self._begin_pending(release)
                    continue
            self._end_pending(release)
        self.begun = ()
        return error

    def _begin_pending(self, release: Release) -> None:
        key, pending = id(release), self.pending
        if key not in pending:
            release.pending_bytes = num_bytes = release.num_bytes
            # No signal handler runs between these two lines.
            pending[key] = release
            self.pending_bytes += num_bytes

    def _end_pending(self, release: Release) -> None:
        key, pending = id(release), self.pending
        if key in pending:
            num_bytes = release.pending_bytes
            del pending[key]
            self.pending_bytes -= num_bytes


def _undo_of(blocks: AddressBatch) -> Release:
    return Release(blocks, blocks.block_bytes, None)
