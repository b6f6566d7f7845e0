"""``RowCounts``: the reference counts, pin counts, leases and streams of a batch's blocks.

The reference count tells whether a block is live: it is >= 0 while the block is live, and ``FREED``
afterwards. ``RowCounts`` also keeps pin counts, leases (pins that expire) and the streams that
still use a block. It has no lock: ``Lifetime`` makes all changes inside its sections, and reading
needs none. Every change is one store, so it is made or not made when an exception strikes.

Most batches are filled, read and freed as a whole, and no count ever changes in between. Counts are
therefore one number for all rows until one of them changes, and ``ManyCounts`` from then on.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.many_counts import (
    MIN_ROWS,
    FewCounts,
    ManyCounts,
    all_alike,
    are_few,
    as_array,
    with_counts,
)
from kvheap.blocks.recorded_streams import RecordedStreams, Streams
from kvheap.blocks.row_leases import HeldLease, RowLeases
from kvheap.device.completion import Completion
from kvheap.device.events import Stream
from kvheap.errors import BlockInUseError, DoubleFreeError, LifetimeError

__all__ = ["DROPPED", "FREED", "CopiedStates", "RowCounts", "first_repeated"]

FREED = -1
"""The reference count of a block that was freed."""

DROPPED = -2
"""That of a block whose batch was dropped and reclaimed.

Only a finalizer can still have a handle on it, one that ran after the collector had given up the
batch in the same cycle. If it frees the block, that is in order.
"""

NO_ROWS: Int64Array = np.empty(0, np.int64)

FEW_ROWS = 16
"""Up to this many rows are looked at one by one."""


class NamesRows(Protocol):
    """A batch, which error messages ask to describe a row."""

    def describe(self, row: int) -> str:
        """Describe a row."""
        ...


CopiedStates: TypeAlias = "tuple[bytes, bytes] | int"
"""The counts of N rows at one moment: reference counts, negative for freed rows, and pin counts, of
freed rows anything, each int32 ``[N]`` as bytes; empty if no row is pinned. If all have one
reference count, too, that number."""


class RowCounts:
    """Reference counts, pin counts, leases and streams of N rows.

    - read one row: ``is_live``, ``references_of``, ``pins_of``;
    - read all rows: ``references``, ``pins``, ``live``, ``count_live``, ``all_live``,
      ``is_untouched``, ``is_unused``, ``copy_states``, ``leased_rows``, ``rows_to_drop``;
    - change one row: ``changed``, ``references_to_change``, ``pins_to_change``, ``add_lease``,
      ``remove_lease``, ``leases_of``, ``is_held``;
    - change many rows: ``require_pinnable``, ``add_leases``, ``remove_leases``, ``held_only_by``,
      ``give_up``;
    - free: ``claimable``, ``set_freed``, ``set_live``, ``forgive``, ``was_dropped``;
    - streams: ``record_stream``, ``streams_of``, ``streams_now``, ``forget_streams``,
      ``require_live``; of those, transfers: ``users``, ``fillers``.

    Attributes:
        num_rows: number of rows N.
        has_dropped: whether rows may have been dropped and reclaimed: none are in most batches.
        streams: the recorded streams; None if none was ever recorded.

    Args:
        num_rows: number of rows N; each starts with one reference and no pin.
    """

    __slots__ = (
        "_leases",
        "_num_freed",
        "_pins",
        "_references",
        "_uniform_references",
        "has_dropped",
        "num_rows",
        "streams",
    )

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.has_dropped = False
        self._num_freed = 0  # at most, since the array was last looked at
        self._uniform_references = 1
        self._references: ManyCounts | None = None
        self._pins: ManyCounts | None = None
        self._leases: RowLeases | None = None
        self.streams: RecordedStreams | None = None

    # -- read one row --------------------------------------------------------------------------

    def is_live(self, row: int) -> bool:
        """Whether the row is not freed."""
        counts = self._references
        return (self._uniform_references if counts is None else counts[row]) >= 0

    def references_of(self, row: int) -> int:
        """The row's reference count; 0 once freed."""
        counts = self._references
        return max(self._uniform_references if counts is None else counts[row], 0)

    def pins_of(self, row: int) -> int:
        """The row's pin count, leases included; 0 once freed."""
        if not self.is_live(row):
            return 0
        pins = 0 if self._pins is None else self._pins[row]
        leases = self._leases  # once: readers take no lock
        return pins if leases is None else pins + leases.on(row)

    # -- read all rows -------------------------------------------------------------------------

    def references(self) -> npt.NDArray[np.int32]:
        """A copy of the reference counts, int32 ``[N]``; 0 for freed rows."""
        return np.maximum(self._reference_array(), 0)

    def pins(self) -> npt.NDArray[np.int32]:
        """A copy of the pin counts, leases included, int32 ``[N]``; 0 for freed rows."""
        return self._pin_array()

    def live(self) -> npt.NDArray[np.bool_]:
        """Which rows are not freed, bool ``[N]``."""
        return np.greater_equal(self._reference_array(), 0)

    def all_live(self) -> bool:
        """Whether no row is freed."""
        if self._references is None:
            return self._uniform_references >= 0
        return bool(self.live().all())

    @property
    def has_leases(self) -> bool:
        """Whether a row has a lease, which may have expired."""
        return self._leases is not None

    def count_live(self) -> tuple[int, int]:
        """How many rows are live, and how many of those are pinned."""
        if self._references is None and self._pins is None and self._leases is None:
            return (0 if self._uniform_references < 0 else self.num_rows), 0
        live = self.live()
        return int(live.sum()), int((live & (self._pin_array() > 0)).sum())

    def is_untouched(self) -> bool:
        """Whether every row has one reference, no pin and no lease."""
        is_uniform = self._references is None and self._pins is None and self._leases is None
        return is_uniform and self._uniform_references == 1

    def is_unused(self) -> bool:
        """Whether every row has one reference, no pin, no lease, and no stream that used it."""
        return (
            self._references is None
            and self._uniform_references == 1
            and self._pins is None
            and self._leases is None
            and self.streams is None
        )

    def copy_states(self) -> CopiedStates:
        """What tells which rows are live and pinned, copied so that it can be read later. O(N)."""
        references, pins = self._references, self._pins
        if references is None and pins is None and self._leases is None:
            return self._uniform_references
        if self._leases is None and isinstance(references, array):
            if pins is None:
                return references.tobytes(), b""
            if isinstance(pins, array):
                return references.tobytes(), pins.tobytes()
        return self._reference_array().tobytes(), self._pin_array().tobytes()

    def leased_rows(self) -> Int64Array:
        """The live rows that a lease holds, int64 ``[R]``."""
        leases = self._leases
        if leases is None:
            return NO_ROWS
        held = np.zeros(self.num_rows, np.int32)
        leases.add_to(held)
        return np.flatnonzero((held > 0) & (self._reference_array() >= 0))

    def rows_to_drop(self, but: Int64Array = NO_ROWS) -> Int64Array | None:
        """The live rows other than ``but``, int64 ``[R]``; None if all are."""
        if self._references is None and not len(but):
            return None if self._uniform_references >= 0 else NO_ROWS
        live = self._reference_array() >= 0
        live[but] = False
        rows = np.flatnonzero(live)
        return None if len(rows) == self.num_rows else rows

    # -- change one row ------------------------------------------------------------------------

    def changed(self, row: int, references: int, pins: int, batch: NamesRows) -> tuple[int, int]:
        """A row's counts after a change that is not made yet.

        Args:
            row: the row.
            references: what to add to its reference count.
            pins: what to add to its pin count.
            batch: describes a row for an error message.

        Returns:
            The new reference count, and the new pin count without leases.

        Raises:
            LifetimeError: the row is freed, or a count would be negative.
        """
        counts = self._references
        count = self._uniform_references if counts is None else counts[row]
        held = 0 if self._pins is None else self._pins[row]
        if count < 0:
            kind = "pin" if pins else "reference"
            raise LifetimeError(f"{batch.describe(row)} is freed: its {kind} count cannot change")
        if count + references < 0:
            raise LifetimeError(
                f"the reference count of {batch.describe(row)} is {count}: it cannot change by "
                f"{references}"
            )
        if held + pins < 0:
            leases = self.leases_of(row)
            of_leases = f", {leases} of them by leases" if leases else ""
            raise LifetimeError(
                f"the pin count of {batch.describe(row)} is {held + leases}{of_leases}: it cannot "
                f"change by {pins}"
            )
        return count + references, held + pins

    def references_to_change(self) -> ManyCounts:
        """The reference counts of all rows, to set those of live rows."""
        if self._references is None:
            self._references = all_alike(self.num_rows, self._uniform_references)
        return self._references

    def pins_to_change(self) -> ManyCounts:
        """The pin counts of all rows without leases, to set those of live rows."""
        if self._pins is None:
            is_few = isinstance(self._references, FewCounts)
            self._pins = FewCounts({}, 0) if is_few else all_alike(self.num_rows, 0)
        return self._pins

    def add_lease(self, row: int, lease: HeldLease) -> None:
        """Pin a row by a lease, for as long as the lease is held."""
        if self._leases is None:
            self._leases = RowLeases()
        self._leases.add(row, lease)

    def remove_lease(self, row: int, lease: HeldLease) -> None:
        """Forget a lease that has ended."""
        leases = self._leases
        if leases is not None:
            leases.remove(row, lease)

    def leases_of(self, row: int, but: HeldLease | None = None) -> int:
        """How many leases hold a row, other than ``but``."""
        leases = self._leases  # once: readers take no lock
        return 0 if leases is None else leases.on(row, but)

    def is_held(self, row: int, but: HeldLease | None = None) -> bool:
        """Whether a row has a reference or a pin, other than the lease ``but``."""
        has_pins = self._pins is not None and bool(self._pins[row])
        if has_pins or self.references_of(row):
            return True
        return bool(self.leases_of(row, but))

    # -- change many rows ----------------------------------------------------------------------

    def require_pinnable(self, rows: Int64Array | None, batch: NamesRows) -> None:
        """Raise if any of ``rows`` (None: all) cannot be pinned.

        Raises:
            LifetimeError: names the first freed row.
        """
        freed = self._first_freed(rows)
        if freed is not None:
            raise LifetimeError(f"{batch.describe(freed)} is freed: its pin count cannot change")

    def add_leases(self, rows: Int64Array | None, lease: HeldLease) -> None:
        """Pin ``rows``, ascending and distinct (None: all), by one lease while it is held."""
        if self._leases is None:
            self._leases = RowLeases()
        self._leases.add_many(rows, lease)

    def remove_leases(self, lease: HeldLease) -> None:
        """Forget a lease on many rows that has ended."""
        leases = self._leases
        if leases is not None:
            leases.remove_many(lease)
            if leases.is_empty:
                self._leases = None

    def held_only_by(self, lease: HeldLease, rows: Int64Array | None) -> Int64Array | None:
        """Those of ``rows`` (None: all) that only ``lease`` keeps from being freed; None: all."""
        if self._references is None and self._uniform_references:
            return NO_ROWS  # all have a reference, or are freed
        is_free = (self._reference_array() == 0) & (self._pin_array(lease) == 0)
        if rows is None:
            return None if is_free.all() else np.flatnonzero(is_free)
        found: Int64Array = rows[is_free[rows]]
        return found

    def give_up(self, rows: Int64Array) -> int:
        """Take all references and pins but leases from live rows; return how many had any."""
        if not len(rows):
            return 0
        references, pins = self.references_to_change(), self.pins_to_change()
        had = sum(bool(references[row] or pins[row]) for row in rows.tolist())
        for counts in (references, pins):
            if isinstance(counts, FewCounts):
                counts.update(dict.fromkeys(rows.tolist(), 0))
            else:
                np.frombuffer(counts, np.int32)[rows] = 0
        return had

    # -- free ----------------------------------------------------------------------------------

    def claimable(
        self, rows: Int64Array | None, batch: NamesRows, skip_freed: bool = False
    ) -> Int64Array | None:
        """Check that ``rows`` (None: all) can be freed, and change nothing.

        Args:
            rows: row numbers.
            batch: describes a row for an error message.
            skip_freed: skip rows that are already freed instead of raising.

        Returns:
            The rows to free; None for all.

        Raises:
            DoubleFreeError: a row is already freed, or named twice.
            BlockInUseError: a row is pinned or has more than one reference.
        """
        if rows is None and self.is_untouched():
            return None
        if self.has_dropped:
            rows = self._but_dropped(rows)
        if skip_freed:
            rows = self._live_among(rows)
        elif rows is not None and len(rows) > 1:
            repeated = first_repeated(rows)
            if repeated is not None:
                raise DoubleFreeError(f"{batch.describe(repeated)} is named twice in one call")
        if not self.is_untouched():
            self._require_sole_owner(rows, batch)
        return rows

    def set_freed(self, rows: Int64Array | None, count: int = FREED) -> None:
        """Mark ``rows`` (None: all) as ``FREED`` or ``DROPPED``, whatever their state."""
        if count == DROPPED:
            self.has_dropped = True
        if rows is None:
            self._uniform_references = count  # first: readers take no lock
            self._references = None
            return
        self._set(rows, count)
        if self.num_rows >= MIN_ROWS:
            self._num_freed += len(rows)
            if are_few(self.num_rows - self._num_freed, self.num_rows):
                self._give_up_arrays()

    def set_all_freed(self) -> None:
        """:meth:`set_freed` for all rows."""
        self._uniform_references = FREED  # first: readers take no lock
        self._references = None

    def forgive(self, rows: Int64Array | None) -> int:
        """Mark those of ``rows`` (None: all) that were dropped as freed; return how many."""
        dropped = np.flatnonzero(self._reference_array() == DROPPED)
        if rows is not None:
            dropped = np.intersect1d(dropped, rows)
        if len(dropped):
            self._set(dropped, FREED)
        return len(dropped)

    def was_dropped(self, row: int) -> bool:
        """Whether the row's batch was dropped and reclaimed."""
        return self.has_dropped and self._reference_of(row) == DROPPED

    def set_live(self, rows: Int64Array | None) -> None:
        """Give each of ``rows`` (None: all) one reference again."""
        self._set(rows, 1)

    # -- streams -------------------------------------------------------------------------------

    def forget_streams(self, ended: Sequence[Stream]) -> None:
        """Forget streams that have ended."""
        if self.streams is not None:
            self.streams.prune(ended)

    def record_stream(self, stream: Stream, rows: Int64Array | None, batch: NamesRows) -> None:
        """Record that a stream uses ``rows`` (None: all).

        Raises:
            LifetimeError: one of them is freed.
        """
        if self._references is not None or self._uniform_references < 0:
            self.require_live(rows, batch)
        if self.streams is None:
            self.streams = RecordedStreams()
        self.streams.add(stream, rows)

    def streams_of(self, rows: Int64Array | None) -> Streams:
        """The streams that were recorded for any of ``rows`` (None: all), by their keys."""
        return {} if self.streams is None else self.streams.of(rows)

    def streams_now(self, rows: Int64Array | None) -> Streams:
        """:meth:`streams_of`, for whoever is not in a section: other threads may record more."""
        return {} if self.streams is None else self.streams.now(rows)

    def users(self, rows: Int64Array | None) -> Sequence[Completion]:
        """The transfers that have been queued to read or fill ``rows`` (None: all).

        Those that have ended are left out; those that are quarantined are not. O(1) if no transfer
        has used the rows.
        """
        return () if self.streams is None else self.streams.users(rows)

    def fillers(self, rows: Int64Array | None) -> Sequence[Completion]:
        """Those of :meth:`users` that fill any of ``rows`` (None: all)."""
        if self.streams is None or not self.streams.has_fillers:
            return ()
        return [each for each in self.streams.users(rows) if each.fills(id(self), rows)]

    def require_live(self, rows: Int64Array | None, batch: NamesRows) -> None:
        """Raise if any of ``rows`` (None: all) is freed.

        Raises:
            LifetimeError: names the first freed row.
        """
        if self._references is None and self._uniform_references >= 0:
            return
        freed = self._first_freed(rows)
        if freed is not None:
            raise LifetimeError(f"{batch.describe(freed)} is freed: it cannot be copied")

    # -- helpers -------------------------------------------------------------------------------

    def _first_freed(self, rows: Int64Array | None) -> int | None:
        """The first freed one of ``rows`` (None: all); None if all are live."""
        if self._references is None and self._uniform_references >= 0:
            return None
        freed = self._reference_array() < 0
        freed = freed if rows is None else freed[rows]
        if not freed.any():
            return None
        at = int(np.argmax(freed))
        return at if rows is None else int(rows[at])

    def _give_up_arrays(self) -> None:
        """Keep the counts of live rows by themselves, if there are only a few."""
        counts = self._references
        if counts is None or isinstance(counts, FewCounts) or self.has_dropped:
            return
        rows = np.flatnonzero(np.frombuffer(counts, np.int32) >= 0).tolist()
        self._num_freed = self.num_rows - len(rows)
        if not are_few(len(rows), self.num_rows):
            return
        pins = self._pins
        self._references = FewCounts({row: counts[row] for row in rows}, FREED)
        if pins is not None:
            self._pins = FewCounts({row: pins[row] for row in rows}, 0)

    def _set(self, rows: Int64Array | None, count: int) -> None:
        if rows is not None and len(rows) < self.num_rows:
            counts = self.references_to_change()
            self._references = with_counts(counts, rows, count, self.num_rows)
            return
        self._uniform_references = count  # first: readers take no lock
        self._references = None

    def _reference_of(self, row: int) -> int:
        counts = self._references
        return self._uniform_references if counts is None else counts[row]

    def _reference_array(self) -> npt.NDArray[np.int32]:
        counts = self._references  # once: readers take no lock
        if counts is None:
            return np.full(self.num_rows, self._uniform_references, np.int32)
        return as_array(counts, self.num_rows)

    def _pin_array(self, but: HeldLease | None = None) -> npt.NDArray[np.int32]:
        counts = self._pins  # once: readers take no lock
        if counts is None:
            pins = np.zeros(self.num_rows, np.int32)
        else:
            pins = as_array(counts, self.num_rows).copy()
        leases = self._leases
        if leases is not None:
            leases.add_to(pins, but)
        pins[self._reference_array() < 0] = 0
        return pins

    def _but_dropped(self, rows: Int64Array | None) -> Int64Array | None:
        kept = self._reference_array() != DROPPED
        if kept.all():
            return rows
        return np.flatnonzero(kept) if rows is None else rows[kept[rows]]

    def _live_among(self, rows: Int64Array | None) -> Int64Array:
        live = self.live()
        return np.flatnonzero(live) if rows is None else np.unique(rows[live[rows]])

    def _require_sole_owner(self, rows: Int64Array | None, batch: NamesRows) -> None:
        """Raise if any of ``rows`` (None: all) is freed, pinned or has several references."""
        if rows is not None and len(rows) <= FEW_ROWS:  # without looking at all rows
            found = rows.tolist()
            of_rows = [self._reference_of(row) for row in found]
            pins_of_rows = [self.pins_of(row) for row in found]
            if not any(pins_of_rows) and of_rows.count(1) == len(found):
                return
            references, pins = np.array(of_rows, np.int32), np.array(pins_of_rows, np.int32)
        else:
            chosen = slice(None) if rows is None else rows
            references, pins = self._reference_array()[chosen], self._pin_array()[chosen]
        wrong = (references != 1) | (pins != 0)
        if not wrong.any():
            return
        at = int(np.argmax(wrong))
        name = batch.describe(at if rows is None else int(rows[at]))
        if references[at] < 0:
            raise DoubleFreeError(f"{name} is already freed")
        raise BlockInUseError(
            f"{name} is in use: reference count {references[at]}, pin count {pins[at]}"
        )


def first_repeated(rows: Int64Array) -> int | None:
    """The smallest row that is named twice; None if there is none."""
    if len(rows) <= FEW_ROWS and len(set(rows.tolist())) == len(rows):
        return None
    ordered = np.sort(rows)
    repeated = ordered[1:] == ordered[:-1]
    return int(ordered[int(np.argmax(repeated))]) if repeated.any() else None
