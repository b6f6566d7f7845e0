"""``RowCounts``: the reference counts, pin counts, leases and streams of a batch's blocks.

The reference count tells whether a block is live: it is >= 0 while the block is live, and ``FREED``
afterwards. ``RowCounts`` also keeps pin counts, leases (pins that expire) and the streams that
still use a block. All changes happen under one lock, which is held for a few instructions and never
taken by a finalizer. The thread that sets a row to ``FREED`` releases its bytes, so when two
threads free the same block, exactly one succeeds.

Most batches are filled, read and freed as a whole, and no count ever changes in between. Counts are
therefore one number for all rows until one of them changes, and arrays from then on.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.lease import Lease
from kvheap.blocks.recorded_streams import RecordedStreams
from kvheap.device.events import Stream
from kvheap.errors import BlockInUseError, DoubleFreeError, LifetimeError

__all__ = ["FREED", "RowCounts"]

FREED = -1
"""The reference count of a block that was freed."""

Describe = Callable[[int], str]
"""Describes a row for an error message."""


class RowCounts:
    """Reference counts, pin counts, leases and streams of N rows.

    - read one row, without the lock: ``is_live``, ``references_of``, ``pins_of``;
    - read all rows: ``references``, ``pins``, ``live``, ``count_live``, ``all_live``;
    - change one row: ``change_references``, ``change_pins``, ``begin_lease``, ``end_lease``;
    - free: ``claim``, ``unclaim``, ``free_all``, ``rows_to_drop``;
    - streams: ``record_stream``, ``streams_of``, ``require_live``.

    Args:
        num_rows: number of rows N; each starts with one reference and no pin.
    """

    __slots__ = (
        "__weakref__",
        "_leases",
        "_lock",
        "_num_rows",
        "_pins",
        "_references",
        "_streams",
        "_uniform_references",
    )

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._lock = threading.Lock()
        self._uniform_references = 1
        self._references: array[int] | None = None
        self._pins: array[int] | None = None
        self._leases: dict[int, int] | None = None
        self._streams: RecordedStreams | None = None

    # -- read one row, without the lock --------------------------------------------------------

    def is_live(self, row: int) -> bool:
        """Whether the row is not freed."""
        counts = self._references
        return (self._uniform_references if counts is None else counts[row]) != FREED

    def references_of(self, row: int) -> int:
        """The row's reference count; 0 once freed."""
        counts = self._references
        return max(self._uniform_references if counts is None else counts[row], 0)

    def pins_of(self, row: int) -> int:
        """The row's pin count, leases included."""
        counts = self._pins
        return 0 if counts is None else counts[row]

    # -- read all rows -------------------------------------------------------------------------

    def references(self) -> npt.NDArray[np.int32]:
        """A copy of the reference counts, int32 ``[N]``; 0 for freed rows."""
        with self._lock:
            return np.maximum(self._reference_array(), 0)

    def pins(self) -> npt.NDArray[np.int32]:
        """A copy of the pin counts, int32 ``[N]``."""
        with self._lock:
            return self._pin_array().copy()

    def live(self) -> npt.NDArray[np.bool_]:
        """Which rows are not freed, bool ``[N]``."""
        with self._lock:
            return np.not_equal(self._reference_array(), FREED)

    def all_live(self) -> bool:
        """Whether no row is freed."""
        if self._references is None:
            return self._uniform_references != FREED
        return bool(self.live().all())

    @property
    def has_leases(self) -> bool:
        """Whether a row ever had a lease."""
        return self._leases is not None

    def count_live(self) -> tuple[int, int]:
        """How many rows are live, and how many of those are pinned."""
        with self._lock:
            if self._references is None and self._pins is None:
                return (0 if self._uniform_references == FREED else self._num_rows), 0
            live = self._reference_array() != FREED
            return int(live.sum()), int((live & (self._pin_array() > 0)).sum())

    # -- change one row ------------------------------------------------------------------------

    def change_references(self, row: int, change: int, describe: Describe) -> int | None:
        """Add ``change``, and free the row if no reference and no pin is left.

        Returns:
            The count before if this freed the row, whose bytes the caller then releases; else
            None.

        Raises:
            LifetimeError: the row is freed, or its count would be negative.
        """
        with self._lock:
            self._require_row("reference", row, describe)
            count = self.references_of(row)
            if count + change < 0:
                raise self._count_error("reference", row, count, change, describe)
            is_nobodys = count + change == 0 and self.pins_of(row) == 0
            self._own_references()[row] = FREED if is_nobodys else count + change
        return count if is_nobodys else None

    def change_pins(self, row: int, change: int, describe: Describe) -> bool:
        """Add ``change`` to the pins other than leases, and free the row if nothing holds it.

        Returns:
            Whether this freed the row; the caller then releases its bytes.

        Raises:
            LifetimeError: the row is freed, or its pin count would fall below its lease count.
        """
        with self._lock:
            self._require_row("pin", row, describe)
            count = self.pins_of(row)
            leases = self._leases.get(row, 0) if self._leases else 0
            if count + change < leases:
                raise self._count_error("pin", row, count, change, describe)
            self._own_pins()[row] = count + change
            if count + change or self.references_of(row):
                return False
            self._own_references()[row] = FREED
        return True

    def begin_lease(self, row: int, describe: Describe) -> None:
        """Pin a row for a lease.

        Raises:
            LifetimeError: the row is freed.
        """
        with self._lock:
            self._require_row("pin", row, describe)
            if self._leases is None:
                self._leases = {}
            self._own_pins()[row] += 1
            self._leases[row] = self._leases.get(row, 0) + 1

    def end_lease(self, lease: Lease, row: int, state: str) -> tuple[bool, bool]:
        """End a lease if it is still held, even if the row has been freed.

        Returns:
            Whether the lease was held, and whether ending it freed the row; the caller then
            releases the row's bytes.
        """
        with self._lock:
            if lease.state != "held":
                return False, False
            lease.state = state
            assert self._leases is not None
            self._leases[row] -= 1
            self._own_pins()[row] -= 1
            if not self.is_live(row) or self.pins_of(row) or self.references_of(row):
                return True, False
            self._own_references()[row] = FREED
        return True, True

    # -- free ----------------------------------------------------------------------------------

    def claim(
        self, rows: Int64Array | None, describe: Describe, skip_freed: bool = False
    ) -> Int64Array | None:
        """Free ``rows`` (None: all), all or none; the caller then releases their bytes.

        Args:
            rows: row numbers.
            describe: describes a row for an error message.
            skip_freed: skip rows that are already freed instead of raising.

        Returns:
            The rows that were freed; None for all.

        Raises:
            DoubleFreeError: a row is already freed, or named twice.
            BlockInUseError: a row is pinned or has more than one reference.
        """
        with self._lock:
            if rows is None and self._is_untouched():
                self.free_all()
                return None
            if skip_freed:
                rows = self._live_among(rows)
            elif rows is not None:
                _require_distinct(rows, describe)
            self._require_sole_owner(rows, describe)
            if rows is None:
                self.free_all()
            else:
                np.frombuffer(self._own_references(), np.int32)[rows] = FREED
            return rows

    def unclaim(self, rows: Int64Array | None, references: int = 1) -> None:
        """Undo :meth:`claim`, while the bytes have not been released."""
        with self._lock:
            if rows is None:
                self._set_all(references)
            else:
                np.frombuffer(self._own_references(), np.int32)[rows] = references

    def free_all(self) -> None:
        """Free all rows, whatever their state. Takes no lock."""
        self._set_all(FREED)

    def rows_to_drop(self) -> Int64Array | None:
        """The live rows, int64 ``[R]``; None if all are. Takes no lock: a finalizer calls it."""
        if self._references is None:
            return None if self._uniform_references != FREED else np.empty(0, np.int64)
        rows = np.flatnonzero(self._reference_array() != FREED)
        return None if len(rows) == self._num_rows else rows

    # -- streams -------------------------------------------------------------------------------

    def record_stream(self, stream: Stream, rows: Int64Array | None, describe: Describe) -> None:
        """Record that a stream uses ``rows`` (None: all).

        Raises:
            LifetimeError: one of them is freed.
        """
        with self._lock:
            self.require_live(rows, describe)
            if self._streams is None:
                self._streams = RecordedStreams()
            self._streams.add(stream, rows)

    def streams_of(self, rows: Int64Array | None) -> tuple[Stream, ...]:
        """The streams that were recorded for any of ``rows`` (None: all)."""
        return () if self._streams is None else self._streams.of(rows)

    def require_live(self, rows: Int64Array | None, describe: Describe) -> None:
        """Raise if any of ``rows`` (None: all) is freed.

        Raises:
            LifetimeError: names the first freed row.
        """
        if self._references is None and self._uniform_references != FREED:
            return
        freed = self._reference_array() == FREED
        freed = freed if rows is None else freed[rows]
        if freed.any():
            at = int(np.argmax(freed))
            name = describe(at if rows is None else int(rows[at]))
            raise LifetimeError(f"{name} is freed: it cannot be copied")

    def start_over_after_fork(self) -> None:
        """Replace the lock in a forked child."""
        self._lock = threading.Lock()

    # -- helpers -------------------------------------------------------------------------------

    def _own_references(self) -> array[int]:
        if self._references is None:
            self._references = array("i", (self._uniform_references,)) * self._num_rows
        return self._references

    def _own_pins(self) -> array[int]:
        if self._pins is None:
            self._pins = array("i", (0,)) * self._num_rows
        return self._pins

    def _set_all(self, references: int) -> None:
        self._uniform_references = references  # first: other threads read without the lock
        self._references = None

    def _reference_array(self) -> npt.NDArray[np.int32]:
        if self._references is None:
            return np.full(self._num_rows, self._uniform_references, np.int32)
        return np.frombuffer(self._references, np.int32)

    def _pin_array(self) -> npt.NDArray[np.int32]:
        if self._pins is None:
            return np.zeros(self._num_rows, np.int32)
        return np.frombuffer(self._pins, np.int32)

    def _is_untouched(self) -> bool:
        is_uniform = self._references is None and self._pins is None
        return is_uniform and self._uniform_references == 1

    def _live_among(self, rows: Int64Array | None) -> Int64Array:
        live = self._reference_array() != FREED
        return np.flatnonzero(live) if rows is None else np.unique(rows[live[rows]])

    def _require_row(self, kind: str, row: int, describe: Describe) -> None:
        if not self.is_live(row):
            raise LifetimeError(f"{describe(row)} is freed: its {kind} count cannot change")

    def _count_error(
        self, kind: str, row: int, count: int, change: int, describe: Describe
    ) -> LifetimeError:
        leases = self._leases.get(row, 0) if self._leases else 0
        held = f", {leases} of them by leases" if kind == "pin" and leases else ""
        return LifetimeError(
            f"the {kind} count of {describe(row)} is {count}{held}: it cannot change by {change}"
        )

    def _require_sole_owner(self, rows: Int64Array | None, describe: Describe) -> None:
        """Raise if any of ``rows`` (None: all) is freed, pinned or has several references."""
        references = self._reference_array()[slice(None) if rows is None else rows]
        pins = self._pin_array()[slice(None) if rows is None else rows]
        wrong = (references != 1) | (pins != 0)
        if not wrong.any():
            return
        at = int(np.argmax(wrong))
        name = describe(at if rows is None else int(rows[at]))
        if references[at] == FREED:
            raise DoubleFreeError(f"{name} is already freed")
        raise BlockInUseError(
            f"{name} is in use: reference count {references[at]}, pin count {pins[at]}"
        )


def _require_distinct(rows: Int64Array, describe: Describe) -> None:
    ordered = np.sort(rows)
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        row = int(ordered[int(np.argmax(repeated))])
        raise DoubleFreeError(f"{describe(row)} is named twice in one call")
