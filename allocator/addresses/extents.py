"""``Extents``: extents as two arrays, and what is done to very many of them at once.

A batch that touches a large part of the free list costs less as a few array operations on all
extents than as one step in the free list for each. The functions here know no heap: they take
extents in bytes or units alike, and never change what they are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from itertools import chain
from operator import index as as_index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvheap.errors import DoubleFreeError, InvalidFreeError

__all__ = ["Extents", "Int64Array", "as_extents", "joined", "merged", "overlap_of", "place_blocks"]

Int64Array = npt.NDArray[np.int64]

NO_WALLS = np.empty(0, np.int64)


class Extents(NamedTuple):
    """Extents ``[starts[i], starts[i] + sizes[i])``."""

    starts: Int64Array
    """int64 ``[F]``."""
    sizes: Int64Array
    """int64 ``[F]``."""

    @classmethod
    def of(cls, start: int, size: int) -> Extents:
        """One extent, or none where ``size`` is 0."""
        if not size:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64))
        return cls(np.array([start], np.int64), np.array([size], np.int64))

    @property
    def ends(self) -> Int64Array:
        """Where each extent ends."""
        return self.starts + self.sizes


def as_extents(
    blocks: Iterable[tuple[int, int]] | npt.ArrayLike, sizes: npt.ArrayLike | None
) -> Extents:
    """What callers hand in to be freed: pairs, or addresses with sizes.

    Args:
        blocks: ``(address, size)`` pairs, also as an integer ``[N, 2]`` array; with ``sizes``,
            addresses ``[N]``.
        sizes: one for each address, ``[N]``, or one for all.

    Raises:
        TypeError: something is not an integer.
        ValueError: the shapes do not belong together.
        InvalidFreeError: a number is too large to be an address.

    >>> as_extents([(8, 4), (0, 4)], None)
    Extents(starts=array([8, 0]), sizes=array([4, 4]))
    >>> as_extents([8, 0], 4)
    Extents(starts=array([8, 0]), sizes=array([4, 4]))
    """
    if sizes is None:
        return _from_pairs(blocks)
    addresses = _integer_array("addresses", _listed(blocks))
    lengths = _integer_array("sizes", sizes)
    if addresses.ndim != 1 or lengths.ndim > 1:
        raise ValueError(
            f"addresses must be one-dimensional with one size each or one for all, "
            f"got shapes {addresses.shape} and {lengths.shape}"
        )
    if lengths.ndim == 1 and len(lengths) != len(addresses):
        raise ValueError(f"got {len(addresses)} addresses but {len(lengths)} sizes")
    return Extents(addresses, np.broadcast_to(lengths, addresses.shape))


def _from_pairs(blocks: Iterable[tuple[int, int]] | npt.ArrayLike) -> Extents:
    pairs: Any = _listed(blocks)
    if isinstance(pairs, np.ndarray):
        table = _integer_array("(address, size) pairs", pairs)
        if table.size == 0:
            return Extents.of(0, 0)
        if table.ndim != 2 or table.shape[1] != 2:
            raise ValueError(f"blocks must be (address, size) pairs, got shape {table.shape}")
        return Extents(table[:, 0], table[:, 1])
    # Three times as fast as np.array on a list of pairs, which looks at every tuple's shape.
    try:
        lengths = set(map(len, pairs))
    except TypeError:
        lengths = {0}
    if not lengths <= {2}:
        wrong = next(pair for pair in pairs if not isinstance(pair, Sized) or len(pair) != 2)
        raise ValueError(f"blocks must be (address, size) pairs, got {wrong!r}")
    try:
        flat = np.fromiter(map(as_index, chain.from_iterable(pairs)), np.int64, 2 * len(pairs))
    except TypeError as error:
        raise TypeError(f"(address, size) pairs must be integers: {error}") from None
    except OverflowError:
        huge = max(chain.from_iterable(pairs), key=abs)
        raise InvalidFreeError(f"(address, size) pairs must be below 2**63, got {huge}") from None
    return Extents(flat[0::2], flat[1::2])


def _listed(values: Any) -> Any:
    """``values`` as a sequence or an array; iterators are used up."""
    return values if isinstance(values, (np.ndarray, Sequence)) else list(values)


def _integer_array(name: str, values: npt.ArrayLike) -> Int64Array:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype} ({array.flat[0]!r}, ...)")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise InvalidFreeError(f"{name} must be below 2**63, got {array.max()}")
    return array.astype(np.int64, copy=False)


def merged(extents: Extents, walls: Int64Array = NO_WALLS) -> Extents:
    """The extents in address order, those that touch made one. O(N log N).

    Args:
        extents: in any order.
        walls: places, in ascending order, where extents that touch stay apart.

    Raises:
        DoubleFreeError: two overlap.
        InvalidFreeError: one is empty, has a wall within, or ends beyond 2**63.
    """
    starts, sizes = extents
    if len(starts) > 1 and not (starts[1:] > starts[:-1]).all():
        if sizes.min() == sizes.max():
            starts = np.sort(starts)
        else:
            order = np.argsort(starts, kind="stable")
            starts, sizes = starts[order], sizes[order]
    if len(sizes) and sizes.min() <= 0:
        at = int(sizes.argmin())
        raise InvalidFreeError(
            f"cannot free {sizes[at]} bytes at {starts[at]}: size must be positive"
        )
    ends = starts + sizes
    if (ends < starts).any():
        at = int(np.argmax(ends < starts))
        raise InvalidFreeError(f"cannot free {sizes[at]} bytes at {starts[at]}: beyond any heap")
    overlap = ends[:-1] > starts[1:]
    if overlap.any():
        at = int(np.argmax(overlap))
        raise DoubleFreeError(
            f"cannot free [{starts[at + 1]}, {ends[at + 1]}): "
            f"[{starts[at]}, {ends[at]}) is freed in the same call"
        )
    if len(walls) and len(starts):
        holder = np.searchsorted(starts, walls) - 1  # the extent that begins before each wall
        inside = (holder >= 0) & (ends[holder] > walls)
        if inside.any():
            wall = int(walls[np.argmax(inside)])
            at = int(holder[np.argmax(inside)])
            raise InvalidFreeError(
                f"cannot free [{starts[at]}, {ends[at]}): a segment of the heap begins at {wall}"
            )
    return joined(Extents(starts, sizes), walls)


def joined(extents: Extents, walls: Int64Array = NO_WALLS) -> Extents:
    """Disjoint extents in address order with those that touch made one, but at walls. O(N).

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
    """The numbers of a free extent and a run that overlap, both in address order, or None."""
    after = np.searchsorted(free.starts, runs.starts)
    follows = np.append(free.starts, np.iinfo(np.int64).max)[after] < runs.ends
    precedes = np.append(np.iinfo(np.int64).min, free.ends)[after] > runs.starts
    overlap = follows | precedes
    if not overlap.any():
        return None
    run = int(np.argmax(overlap))
    return int(after[run]) - int(precedes[run]), run


def place_blocks(free: Extents, size: int, count: int) -> tuple[Int64Array, Int64Array, Extents]:
    """``FreeList.fewest_runs`` and ``carve`` for very many runs, on all extents. O(F log F).

    Returns:
        The runs' starts and their counts of blocks, in address order, of fewer than ``count``
        blocks when no more fit; and what is left of ``free``.
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
