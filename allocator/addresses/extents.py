"""``Extents``: extents as two arrays, and operations on very many of them at once.

For a batch that touches a large part of the free list, a few array operations on all extents cost
less than one step in the free list for each extent. The functions here work on extents in bytes or
in units, and never change their arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["NO_WALLS", "Extents", "Int64Array", "joined", "overlap_of", "place_blocks"]

Int64Array = npt.NDArray[np.int64]

NO_WALLS = np.empty(0, np.int64)
"""The walls of a heap of one segment."""


class Extents(NamedTuple):
    """Extents ``[starts[i], starts[i] + sizes[i])``."""

    starts: Int64Array
    """int64 ``[F]``."""
    sizes: Int64Array
    """int64 ``[F]``."""

    @classmethod
    def of(cls, start: int, size: int) -> Extents:
        """One extent, or none if ``size`` is 0."""
        if not size:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64))
        return cls(np.array([start], np.int64), np.array([size], np.int64))

    @property
    def ends(self) -> Int64Array:
        """Where each extent ends, int64 ``[F]``."""
        return self.starts + self.sizes


def joined(extents: Extents, walls: Int64Array = NO_WALLS) -> Extents:
    """The extents, with those that touch joined into one, except at walls. O(F).

    Args:
        extents: disjoint and in address order.
        walls: addresses at which extents that touch stay apart.

    >>> joined(Extents(np.array([0, 4, 9]), np.array([4, 2, 1])))
    Extents(starts=array([0, 9]), sizes=array([6, 1]))
    """
    starts, ends = extents.starts, extents.ends
    is_first = np.ones(len(starts), np.bool_)
    np.not_equal(starts[1:], ends[:-1], out=is_first[1:])
    if len(walls):
        is_first |= np.isin(starts, walls)
    firsts = np.flatnonzero(is_first)
    if len(firsts) == len(starts):
        return extents
    lasts = np.append(firsts[1:], len(starts)) - 1
    return Extents(starts[firsts], ends[lasts] - starts[firsts])


def overlap_of(free: Extents, runs: Extents) -> tuple[int, int] | None:
    """The indices of a free extent and of a run that overlap, or None. O(R log F).

    Args:
        free: disjoint, in address order.
        runs: disjoint, in address order.
    """
    after = np.searchsorted(free.starts, runs.starts)
    follows = np.append(free.starts, np.iinfo(np.int64).max)[after] < runs.ends
    precedes = np.append(np.iinfo(np.int64).min, free.ends)[after] > runs.starts
    overlap = follows | precedes
    if not overlap.any():
        return None
    run = int(np.argmax(overlap))
    return int(after[run]) - int(precedes[run]), run


def place_blocks(free: Extents, size: int, count: int) -> tuple[Int64Array, Int64Array, Extents]:
    """Place ``count`` blocks of ``size`` in the fewest runs, on all extents at once. O(F log F).

    Chooses as ``FreeList.fewest_runs`` does.

    Args:
        free: disjoint, in address order.
        size: of each block.
        count: how many blocks, at least 1.

    Returns:
        The start of each run and its number of blocks, int64 ``[R]`` each, in address order; and
        what is left of ``free``. The runs have fewer than ``count`` blocks in all if no more fit.
    """
    starts, sizes = free
    largest_first = np.argsort(sizes, kind="stable")[::-1]
    fitting = sizes[largest_first] // size
    total = np.cumsum(fitting)
    if not len(total) or total[-1] <= count:
        taken, counts = largest_first[fitting > 0], fitting[fitting > 0]
    else:
        whole = int(np.searchsorted(total, count))
        rest = count - (int(total[whole - 1]) if whole else 0)
        best = int(np.searchsorted(-fitting, -rest, side="right")) - 1
        taken = np.append(largest_first[:whole], largest_first[best])
        counts = np.append(fitting[:whole], rest)
    in_address_order = np.argsort(taken)
    taken, counts = taken[in_address_order], counts[in_address_order]
    rest_starts, rest_sizes = starts.copy(), sizes.copy()
    rest_starts[taken] += counts * size
    rest_sizes[taken] -= counts * size
    left = np.flatnonzero(rest_sizes)
    return starts[taken], counts, Extents(rest_starts[left], rest_sizes[left])
