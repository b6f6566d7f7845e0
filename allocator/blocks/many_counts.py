"""``ManyCounts``: a count for each of many rows: an array, or a dict once few of them matter.

Most counts of a large batch end as the same number, ``FREED``. A block that outlives its batch
would hold the array of all of them; so the counts that differ are then kept by themselves.
"""

from __future__ import annotations

from array import array
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array

__all__ = [
    "MIN_ROWS",
    "FewCounts",
    "ManyCounts",
    "all_alike",
    "are_few",
    "as_array",
    "with_counts",
]

MIN_ROWS = 256
"""From this many rows on, an array is given up for a few live rows."""

ROWS_PER_LIVE = 64
"""An entry of a dict takes the bytes of about 25 counts of an array."""


class FewCounts(dict[int, int]):
    """The counts of a few rows; all other rows have the count ``rest``."""

    __slots__ = ("rest",)

    def __init__(self, counts: dict[int, int], rest: int) -> None:
        super().__init__(counts)
        self.rest = rest

    def __missing__(self, row: int) -> int:
        return self.rest

    def as_array(self, num_rows: int) -> npt.NDArray[np.int32]:
        """The counts of all rows, int32 ``[num_rows]``."""
        found = np.full(num_rows, self.rest, np.int32)
        for row, count in self.copy().items():
            found[row] = count
        return found


ManyCounts: TypeAlias = "array[int] | FewCounts"


def all_alike(num_rows: int, count: int) -> array[int]:
    """The same count for each row, to be changed row by row."""
    return array("i", (count,)) * num_rows


def are_few(num_live: int, num_rows: int) -> bool:
    """Whether so many live rows are better kept by themselves."""
    return num_rows >= MIN_ROWS and num_live * ROWS_PER_LIVE <= num_rows


def as_array(counts: ManyCounts, num_rows: int) -> npt.NDArray[np.int32]:
    """The counts of all rows, int32 ``[num_rows]``: the array's own memory, or new."""
    if isinstance(counts, FewCounts):
        return counts.as_array(num_rows)
    return np.frombuffer(counts, np.int32)


def with_counts(counts: ManyCounts, rows: Int64Array, count: int, num_rows: int) -> ManyCounts:
    """Give ``rows`` a count; returns an array that it has changed, or else new counts.

    O(rows), or O(live rows) for :class:`FewCounts`.
    """
    if not isinstance(counts, FewCounts):
        if len(rows) == 1:
            counts[int(rows[0])] = count
        else:
            np.frombuffer(counts, np.int32)[rows] = count
        return counts
    few = FewCounts({**counts, **dict.fromkeys(rows.tolist(), count)}, counts.rest)
    # Unless a large free is undone, they stay few.
    if len(few) * ROWS_PER_LIVE <= 2 * num_rows:
        return few
    return array("i", few.as_array(num_rows).tobytes())
