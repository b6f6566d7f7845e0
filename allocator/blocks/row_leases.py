"""``RowLeases``: which leases hold which rows of a batch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array

__all__ = ["HeldLease", "RowLeases"]


class HeldLease(Protocol):
    """The part of a lease that its blocks' counts use."""

    @property
    def state(self) -> str:
        """``held`` as long as it pins its blocks."""
        ...


class RowLeases:
    """The leases of a batch: those on one row each, and those on many rows at once.

    A lease on many rows costs the same whatever their number, except that its rows are looked
    through when all rows are asked for. Changes are made by one thread at a time; reading needs no
    lock.
    """

    __slots__ = ("_of_many", "_of_row")

    def __init__(self) -> None:
        self._of_row: dict[int, dict[int, HeldLease]] = {}
        self._of_many: dict[int, tuple[HeldLease, Int64Array | None]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return not self._of_many and not self._of_row

    def add(self, row: int, lease: HeldLease) -> None:
        """A lease holds a row."""
        self._of_row.setdefault(row, {})[id(lease)] = lease

    def add_many(self, rows: Int64Array | None, lease: HeldLease) -> None:
        """A lease holds ``rows``, int64 ``[R]``, ascending and distinct (None: all)."""
        self._of_many[id(lease)] = lease, rows

    def remove(self, row: int, lease: HeldLease) -> None:
        """Forget a lease on one row that has ended."""
        leases = self._of_row.get(row)
        if leases is not None:
            leases.pop(id(lease), None)
            if not leases:
                del self._of_row[row]

    def remove_many(self, lease: HeldLease) -> None:
        """Forget a lease on many rows that has ended."""
        self._of_many.pop(id(lease), None)

    def on(self, row: int, but: HeldLease | None = None) -> int:
        """How many held leases, other than ``but``, hold a row."""
        count = 0
        leases = self._of_row.get(row)
        if leases:
            leases = leases.copy()  # another thread may change it
            count = sum(each.state == "held" and each is not but for each in leases.values())
        for lease, rows in self._of_many.copy().values() if self._of_many else ():
            if lease.state == "held" and lease is not but:
                count += rows is None or _has(rows, row)
        return count

    def add_to(self, pins: npt.NDArray[np.int32], but: HeldLease | None = None) -> None:
        """Add the held leases, other than ``but``, of each row to ``pins``, int32 ``[N]``."""
        for row in self._of_row.copy():
            leases = self._of_row.get(row)
            for each in {} if leases is None else leases.copy().values():
                pins[row] += each.state == "held" and each is not but
        for lease, rows in self._of_many.copy().values():
            if lease.state == "held" and lease is not but:
                pins[slice(None) if rows is None else rows] += 1


def _has(rows: Int64Array, row: int) -> bool:
    at = int(np.searchsorted(rows, row))
    return at < len(rows) and int(rows[at]) == row
