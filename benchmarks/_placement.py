"""Placement rules to compare: into which free extent an allocator puts a request.

:class:`FreeExtents` applies a rule; it is made for comparison, not for speed. The docstring of
``bench_utilization.py`` describes the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from sortedcontainers import SortedDict, SortedList

from kvheap import OutOfMemoryError


class Heap(Protocol):
    """The methods that all compared allocators have."""

    def compute_aligned_size(self, size: int, /) -> int:
        """``size`` rounded up to the alignment."""

    def allocate(self, size: int) -> tuple[int, int]:
        """Address and aligned size; raises ``RuntimeError`` if no free extent is large enough."""

    def free(self, address: int, size: int) -> None:
        """Free a block that was allocated."""


MakeHeap = Callable[[int, int], Heap]
"""Makes a heap from its bytes and its alignment."""


class Extent(NamedTuple):
    """A free extent; sorts by size, then by address."""

    size: int
    start: int


class Place(NamedTuple):
    """Where a request goes: the free extent, and the first byte in it."""

    extent: Extent
    start: int


class FreeExtents:
    """A plain allocator that places each request by a rule. For comparison, not for speed."""

    def __init__(self, size: int, align_bytes: int, rule: Rule) -> None:
        self._align_bytes = align_bytes
        self._rule = rule
        self.by_start: SortedDict[int, int] = SortedDict()
        self.by_size: SortedList[Extent] = SortedList()
        self._add(0, size)

    def compute_aligned_size(self, size: int, /) -> int:
        """``size`` rounded up to the alignment."""
        return (size + self._align_bytes - 1) & -self._align_bytes

    def allocate(self, size: int) -> tuple[int, int]:
        """Take the bytes that the rule chooses; the rest of the extent stays free.

        Raises:
            OutOfMemoryError: no extent is large enough.
        """
        size = self.compute_aligned_size(size)
        place = self._rule(self, size)
        if place is None:
            largest = self.by_size[-1].size if self.by_size else 0
            raise OutOfMemoryError(size, sum(self.by_start.values()), largest)
        extent, start = place
        self._remove(extent)
        self._add(extent.start, start - extent.start)
        self._add(start + size, extent.start + extent.size - start - size)
        return start, size

    def free(self, address: int, size: int) -> None:
        """Free an extent, merged with its free neighbours."""
        end = address + size
        after = self.by_start.bisect_left(address)
        neighbours = [
            Extent(self.by_start.peekitem(index)[1], self.by_start.peekitem(index)[0])
            for index in (after - 1, after)
            if 0 <= index < len(self.by_start)
        ]
        for neighbour in neighbours:
            neighbour_end = neighbour.start + neighbour.size
            if neighbour.start < end and address < neighbour_end:
                raise RuntimeError(f"freed twice: {neighbour} and [{address}, {end})")
            if neighbour_end == address or neighbour.start == end:
                self._remove(neighbour)
                address, end = min(address, neighbour.start), max(end, neighbour_end)
        self._add(address, end - address)

    def smallest_of(self, size: int) -> Extent | None:
        """The smallest extent of at least ``size`` bytes, at the lowest address among equals."""
        position = self.by_size.bisect_left(Extent(size, 0))
        return self.by_size[position] if position < len(self.by_size) else None

    def _add(self, start: int, size: int) -> None:
        if size:
            self.by_start[start] = size
            self.by_size.add(Extent(size, start))

    def _remove(self, extent: Extent) -> None:
        del self.by_start[extent.start]
        self.by_size.remove(extent)


Rule = Callable[[FreeExtents, int], Place | None]
"""Places a request of aligned bytes; None if no extent is large enough."""


def at_low_end(extent: Extent | None) -> Place | None:
    return None if extent is None else Place(extent, extent.start)


def first_fit(free: FreeExtents, size: int) -> Place | None:
    fitting = (Extent(held, start) for start, held in free.by_start.items() if held >= size)
    return at_low_end(next(fitting, None))


def worst_fit(free: FreeExtents, size: int) -> Place | None:
    largest = free.by_size[-1] if free.by_size else Extent(0, 0)
    return at_low_end(largest) if largest.size >= size else None


def two_ended(free: FreeExtents, size: int, small_below: int) -> Place | None:
    lowest = free.smallest_of(size)
    if lowest is None or size >= small_below:
        return at_low_end(lowest)
    highest = free.by_size[free.by_size.bisect_left(Extent(lowest.size + 1, 0)) - 1]
    return Place(highest, highest.start + highest.size - size)


def split_from(free: FreeExtents, size: int, threshold: int) -> Place | None:
    best = free.smallest_of(size)
    if best is None or best.size == size or best.size - size >= threshold:
        return at_low_end(best)
    return at_low_end(free.smallest_of(size + threshold) or best)
