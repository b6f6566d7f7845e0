"""Requests for given bytes: reads them, refuses wrong ones, and takes them out of the free extents.

All in array operations: whoever asks for given addresses has kept them, and has many.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Extents
from kvheap.addresses.free_requests import as_extents
from kvheap.errors import InvalidFreeError

__all__ = ["as_reservation", "without"]


def as_reservation(
    blocks: Iterable[tuple[int, int]] | npt.ArrayLike,
    sizes: npt.ArrayLike | None,
    unit_bytes: int,
) -> Extents:
    """The extents to reserve, as given: aligned, not empty, and apart. O(N log N).

    Args:
        blocks: as for ``AddressManager.reserve``.
        sizes: as for ``AddressManager.reserve``.
        unit_bytes: the alignment.

    Raises:
        ValueError: an extent, which is named, is negative, empty, misaligned, ends at 2**63 or
            beyond, or overlaps another one.
        TypeError: the addresses or sizes are not integers.
    """
    try:
        extents = as_extents(blocks, sizes)
    except InvalidFreeError as error:
        raise ValueError(str(error)) from None
    starts, lengths = extents
    for is_wrong, why in (
        (starts < 0, "an address must not be negative"),
        (lengths <= 0, "a size must be positive"),
        (starts % unit_bytes != 0, f"the address is not aligned to {unit_bytes}"),
        (lengths % unit_bytes != 0, f"the size is not a multiple of {unit_bytes}"),
        (extents.ends < starts, "it ends at 2**63 or beyond"),
    ):
        if is_wrong.any():
            raise _refused(extents, int(np.argmax(is_wrong)), why)
    order = np.argsort(starts, kind="stable")
    first, second = order[:-1], order[1:]
    overlaps = np.flatnonzero(extents.ends[first] > starts[second])
    if len(overlaps):
        pairs = np.sort(np.stack((first[overlaps], second[overlaps])), axis=0)
        at = int(np.argmin(pairs[1]))
        other = _named(extents, int(pairs[0, at]))
        raise _refused(extents, int(pairs[1, at]), f"it overlaps {other} of the same call")
    return extents


def without(free: Extents, taken: Extents, heap_bytes: int) -> Extents:
    """Free extents without others, each of which must lie in one of them. O(F + N log(F + N)).

    Args:
        free: disjoint, in address order, in bytes.
        taken: disjoint, in any order, in bytes.
        heap_bytes: where the heap ends.

    Raises:
        ValueError: an extent, which is named, leaves the heap, is not free, or spans two segments.

    >>> without(Extents.of(0, 64), Extents.of(16, 8), 64)
    Extents(starts=array([ 0, 24]), sizes=array([16, 40]))
    """
    holder = np.searchsorted(free.starts, taken.starts, side="right") - 1
    is_free = np.append(free.ends, np.int64(-1))[holder] >= taken.ends
    if not is_free.all():
        at = int(np.argmin(is_free))
        raise _refused(taken, at, _why_not(free, int(taken.starts[at]), taken, at, heap_bytes))
    starts = np.sort(np.concatenate((free.starts, taken.ends)))
    ends = np.sort(np.concatenate((taken.starts, free.ends)))
    left = np.flatnonzero(ends > starts)
    return Extents(starts[left], (ends - starts)[left])


def _why_not(free: Extents, start: int, taken: Extents, at: int, heap_bytes: int) -> str:
    """Why an extent that lies in no free one cannot be had."""
    end = int(taken.ends[at])
    if end > heap_bytes:
        return f"outside the heap [0, {heap_bytes})"
    while True:  # over the free extents that touch one another: between them, segments begin
        holder = int(np.searchsorted(free.starts, start, side="right")) - 1
        if holder < 0 or free.ends[holder] <= start:
            return "it is not free" if start == int(taken.starts[at]) else f"{start} is not free"
        start = int(free.ends[holder])
        if start >= end:
            return "it spans two segments of the heap"


def _named(extents: Extents, at: int) -> str:
    return f"[{extents.starts[at]}, {int(extents.starts[at]) + int(extents.sizes[at])})"


def _refused(extents: Extents, at: int, why: str) -> ValueError:
    return ValueError(f"cannot reserve {_named(extents, at)}: {why}")
