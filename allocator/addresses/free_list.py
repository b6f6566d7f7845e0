"""The free list: disjoint, coalesced extents, found by address and by size in O(log F).

It counts in units, the heap's alignment, so that all it holds is aligned. The same F extents
``[start, start + size)`` are kept in two orders, each extent as one integer:

- ``_by_start``: ``start << bits | size``, to find the neighbours of an address;
- ``_by_size``: ``size << bits | start``, so that the first key at or above ``size << bits`` is
  the smallest extent that fits and, among equals, the one with the lowest address.

In a heap of fewer than 2**31 units (8 TiB of 4 KiB) both halves fit into an int64 together, and
NumPy packs, sorts and unpacks all extents at once; in larger ones Python does.

Nearly every operation only moves one boundary of one extent, which keeps its place in both
orders: one list item is then written instead of deleting and inserting.

An exception in the middle of a change, ``KeyboardInterrupt`` and ``MemoryError`` included, is
undone by :meth:`FreeList.rollback`. A change is logged before it is begun, and the two orders are
changed one after the other: at every moment at least one of them is whole, and it and the log
give back the state before. Changes that are pending when an operation starts mean that even the
rollback was interrupted; it is then finished first.

Not thread-safe, and silent about wrong frees: that is ``addresses/address_manager.py``'s part.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from sortedcontainers import SortedList

from kvheap.addresses.extents import Extents, Int64Array
from kvheap.errors import HeapCorruptionError

__all__ = ["ExtentKeys", "FreeList"]

NARROW_BITS = 31
"""Bits of a start or a size in heaps where two of them fit into an int64."""

WIDE_BITS = 63
"""Bits of a start or a size in all others."""


class ExtentKeys(SortedList[int]):
    """A ``SortedList`` of distinct non-negative ints with look-ups and changes that it lacks.

    A ``SortedList`` is a list of short sorted lists (``_lists``) with their maxima (``_maxes``).
    Its own look-ups answer with positions, which need an index over the lengths of those lists;
    these answer with keys and need none. An allocate+free pair at F = 1 / 1,000 / 50,000 /
    1,000,000 took 3.7 / 4.1 / 4.0 / 4.4 us with it, and 5.1 / 6.3 / 12.6 / 18.5 us on plain
    ``SortedList`` with positional look-ups (same run, CPython 3.11, 2-core AMD EPYC).
    """

    if TYPE_CHECKING:  # what sortedcontainers 2.4 documents as its implementation
        _lists: list[list[int]]
        _maxes: list[int]

        def _check(self) -> None: ...

    def first_at_least(self, key: int) -> int | None:
        """The smallest key >= ``key``, or None. O(log F)."""
        maxes = self._maxes
        position = bisect_left(maxes, key)
        if position == len(maxes):
            return None
        keys = self._lists[position]
        return keys[bisect_left(keys, key)]

    def around(self, key: int) -> tuple[int | None, int | None]:
        """The largest key < ``key`` and the smallest key >= ``key``, each or None. O(log F)."""
        maxes = self._maxes
        position = bisect_left(maxes, key)
        if position == len(maxes):
            return (maxes[-1] if maxes else None), None
        keys = self._lists[position]
        index = bisect_left(keys, key)
        if index:
            return keys[index - 1], keys[index]
        return (maxes[position - 1] if position else None), keys[0]

    def shift(self, old: int, new: int) -> None:
        """Put ``new``, which lies between the same neighbours, in the place of ``old``."""
        maxes = self._maxes
        position = bisect_left(maxes, old)
        keys = self._lists[position]
        keys[bisect_left(keys, old)] = new
        if maxes[position] == old:
            maxes[position] = new

    def replace(self, old: int, new: int) -> None:
        """Put ``new`` in the place of ``old``: one write where the order allows it. O(log F)."""
        maxes, lists = self._maxes, self._lists
        position = bisect_left(maxes, old)
        keys = lists[position]
        index = bisect_left(keys, old)
        if new < old:
            below = keys[index - 1] if index else maxes[position - 1] if position else -1
            stays = below < new
        elif index + 1 < len(keys):
            stays = new < keys[index + 1]
        else:
            stays = position + 1 == len(lists) or new < lists[position + 1][0]
        if not stays:
            self.remove(old)
            self.add(new)
            return
        keys[index] = new
        if maxes[position] == old:
            maxes[position] = new


class FreeList:
    """The free extents of one address space, in units. See the module's docstring."""

    __slots__ = (
        "_bits",
        "_by_size",
        "_by_start",
        "_mask",
        "_start_in_change",
        "commit",
        "free_units",
        "pending",
        "wall_array",
        "walls",
    )

    def __init__(
        self, extents: Extents, heap_units: int, walls: frozenset[int] = frozenset()
    ) -> None:
        """Take extents in address order that are disjoint, non-empty and do not touch.

        Args:
            extents: starts and sizes in units.
            heap_units: where the heap ends; :meth:`can_hold` tells if it may grow further.
            walls: where segments of the heap begin: extents that touch there stay apart.
        """
        self.walls = walls
        self.wall_array = np.sort(np.fromiter(walls, np.int64, len(walls)))
        self._bits = WIDE_BITS if heap_units >> NARROW_BITS else NARROW_BITS
        self._mask = (1 << self._bits) - 1
        self._by_start = ExtentKeys(_packed(extents.starts, extents.sizes, self._bits))
        self._by_size = ExtentKeys(_packed(extents.sizes, extents.starts, self._bits))
        self.free_units = int(extents.sizes.sum())
        self.pending: list[tuple[int | None, int | None]] = []
        """Changes since the last commit: keys by start that were removed and added."""
        self.commit = self.pending.clear
        """Makes the pending changes final."""
        self._start_in_change = False

    def __len__(self) -> int:
        """The number of free extents."""
        return len(self._by_start)

    @property
    def largest(self) -> int:
        """Units of the largest extent; 0 when nothing is free. O(1)."""
        maxes = self._by_size._maxes
        return maxes[-1] >> self._bits if maxes else 0

    def can_hold(self, heap_units: int) -> bool:
        """Whether a heap of so many units fits this list's keys."""
        return not heap_units >> self._bits

    # -- look-ups ------------------------------------------------------------------------------

    def fewest_runs(self, size: int, count: int, max_runs: int) -> list[tuple[int, int]] | None:
        """Places for up to ``count`` blocks of ``size`` units, in as few runs as can be.

        One extent if one holds them all, the smallest such; else the largest extents in turn,
        and for the rest the smallest extent that still holds it. No set of extents gives fewer
        runs: each extent holds ``extent // size`` blocks wherever the others are.

        Returns:
            ``(start, blocks)`` pairs, of fewer than ``count`` blocks when no more fit; None when
            more than ``max_runs`` would be needed.
        """
        bits, mask = self._bits, self._mask
        runs: list[tuple[int, int]] = []
        remaining = count
        largest = self.largest // size
        if largest and count > max_runs * largest:
            return None
        for key in reversed(self._by_size):
            fitting = (key >> bits) // size
            if fitting == 0:
                return runs
            if len(runs) == max_runs:
                return None
            if fitting >= remaining:
                best = self._by_size.first_at_least(remaining * size << bits)
                assert best is not None  # this very extent holds the rest
                runs.append((best & mask, remaining))
                return runs
            runs.append((key & mask, fitting))
            remaining -= fitting
        return runs

    def max_blocks(self, size: int, max_steps: int) -> int:
        """How many blocks of ``size`` units fit, each within one extent.

        Walks the extents that fit; beyond ``max_steps`` of them, all extents as arrays.
        """
        bits, total = self._bits, 0
        for step, key in enumerate(reversed(self._by_size)):
            fitting = (key >> bits) // size
            if fitting == 0:
                break
            if step == max_steps:
                return int((self.extents().sizes // size).sum())
            total += fitting
        return total

    def overlapping(self, start: int, end: int) -> tuple[int, int] | None:
        """A free extent that shares units with ``[start, end)``, as ``(start, end)``, or None."""
        before, after = self._by_start.around(start << self._bits)
        for key in (before, after):
            if key is not None:
                free_start = key >> self._bits
                free_end = free_start + (key & self._mask)
                if free_start < end and start < free_end:
                    return free_start, free_end
        return None

    def tail(self, heap_units: int) -> int:
        """Units of the extent that ends where the heap does; 0 if there is none. O(1)."""
        maxes = self._by_start._maxes
        if not maxes:
            return 0
        size = maxes[-1] & self._mask
        return size if (maxes[-1] >> self._bits) + size == heap_units else 0

    def extents(self) -> Extents:
        """All extents in address order, as arrays. O(F)."""
        return _unpacked(self._by_start, self._bits)

    # -- changes -------------------------------------------------------------------------------

    def take(self, size: int) -> int | None:
        """Carve ``size`` units from the low end of the smallest extent that holds them.

        Returns:
            Their start, or None when no extent is large enough. O(log F).
        """
        bits = self._bits
        key = self._by_size.first_at_least(size << bits)
        if key is None:
            return None
        start, extent = key & self._mask, key >> bits
        if extent == size:
            self._remove(start << bits | size, key)
        else:
            rest = extent - size
            new_start = start + size
            self._reshape(
                start << bits | extent, new_start << bits | rest, key, rest << bits | new_start
            )
        self.free_units -= size
        return start

    def carve(self, start: int, size: int) -> None:
        """Take ``size`` units from the low end of the extent that begins at ``start``."""
        bits = self._bits
        key = self._by_start.first_at_least(start << bits)
        assert key is not None
        extent = key & self._mask
        if extent == size:
            self._remove(key, extent << bits | start)
        else:
            rest = extent - size
            new_start = start + size
            self._reshape(
                key, new_start << bits | rest, extent << bits | start, rest << bits | new_start
            )
        self.free_units -= size

    def insert(self, start: int, size: int) -> tuple[int, int] | None:
        """Add ``[start, start + size)`` and join it with its neighbours. O(log F).

        Returns:
            None; or, when part of it is free already, a free extent that overlaps it as
            ``(start, end)``, and nothing is changed.
        """
        bits, mask = self._bits, self._mask
        before, after = self._by_start.around(start << bits)
        end = start + size
        new_start, new_size = start, size
        if before is not None:
            before_start, before_size = before >> bits, before & mask
            if before_start + before_size > start:
                return before_start, before_start + before_size
            if before_start + before_size == start and start not in self.walls:
                new_start, new_size = before_start, before_size + size
        if after is not None:
            after_start, after_size = after >> bits, after & mask
            if after_start < end:
                return after_start, after_start + after_size
            if after_start == end and end not in self.walls:
                new_size += after_size
                if new_start == start:
                    self._reshape(
                        after,
                        start << bits | new_size,
                        after_size << bits | end,
                        new_size << bits | start,
                    )
                    self.free_units += size
                    return None
                self._remove(after, after_size << bits | end)
        if new_start == start:
            self._add(start << bits | size, size << bits | start)
        else:
            assert before is not None
            self._reshape(
                before,
                new_start << bits | new_size,
                before_size << bits | new_start,
                new_size << bits | new_start,
            )
        self.free_units += size
        return None

    def cut_tail(self, size: int) -> None:
        """Take the last extent, which has ``size`` units, out of the list."""
        key = self._by_start._maxes[-1]
        self._remove(key, size << self._bits | key >> self._bits)
        self.free_units -= size

    def rollback(self) -> None:
        """Undo what was done since the last commit. O(F log F); for exceptions only.

        May itself be interrupted and called again: to undo the whole log twice is the same.
        """
        bits, mask = self._bits, self._mask
        keys: set[int]
        if self._start_in_change:
            by_size = chain.from_iterable(self._by_size._lists)
            keys = {(key & mask) << bits | key >> bits for key in by_size}
        else:
            keys = set(chain.from_iterable(self._by_start._lists))
        for removed, added in reversed(self.pending):
            if added is not None:
                keys.discard(added)
            if removed is not None:
                keys.add(removed)
        self._by_start = ExtentKeys(keys)
        self._by_size = ExtentKeys((key & mask) << bits | key >> bits for key in keys)
        self.free_units = sum(key & mask for key in keys)
        self.pending.clear()

    def _reshape(self, by_start: int, new_by_start: int, by_size: int, new_by_size: int) -> None:
        """Change one extent into another that lies between the same neighbours."""
        self.pending.append((by_start, new_by_start))
        self._start_in_change = True
        self._by_start.shift(by_start, new_by_start)
        self._start_in_change = False
        self._by_size.replace(by_size, new_by_size)

    def _remove(self, by_start: int, by_size: int) -> None:
        self.pending.append((by_start, None))
        self._start_in_change = True
        self._by_start.remove(by_start)
        self._start_in_change = False
        self._by_size.remove(by_size)

    def _add(self, by_start: int, by_size: int) -> None:
        self.pending.append((None, by_start))
        self._start_in_change = True
        self._by_start.add(by_start)
        self._start_in_change = False
        self._by_size.add(by_size)

    # -- invariants ----------------------------------------------------------------------------

    def check(self, heap_units: int) -> None:
        """Assert every invariant of the free list of a heap of ``heap_units``. O(F log F).

        Raises:
            HeapCorruptionError: names the broken invariant and shows the extents.
        """
        try:
            self._by_start._check()
            self._by_size._check()
        except AssertionError as error:
            raise HeapCorruptionError(
                f"a sorted order of the free list is broken: {self}"
            ) from error
        bits, mask = self._bits, self._mask
        if sorted((key & mask) << bits | key >> bits for key in self._by_size) != self._by_start:
            raise HeapCorruptionError(f"the order by size misses or invents extents: {self}")
        total = sum(key & mask for key in self._by_start)
        if self.free_units != total:
            raise HeapCorruptionError(
                f"the counter says {self.free_units} free units, the extents sum up to {total}: "
                f"{self}"
            )
        previous_end = -1
        for key in self._by_start:
            start, size = key >> bits, key & mask
            extent = f"extent [{start}, {start + size})"
            if size <= 0:
                raise HeapCorruptionError(f"{extent} is empty: {self}")
            if start < previous_end:
                raise HeapCorruptionError(f"{extent} overlaps its predecessor: {self}")
            if start == previous_end and start not in self.walls:
                raise HeapCorruptionError(f"{extent} touches its predecessor: {self}")
            previous_end = start + size
        if previous_end > heap_units:
            raise HeapCorruptionError(
                f"the last extent ends at {previous_end}, beyond the heap's {heap_units}: {self}"
            )

    def __repr__(self) -> str:
        """The first extents, and how many there are: enough to see what broke."""
        bits, mask = self._bits, self._mask
        keys = list(chain.from_iterable(self._by_start._lists))
        shown = [f"[{key >> bits}, {(key >> bits) + (key & mask)})" for key in keys[:32]]
        more = "" if len(keys) <= 32 else f", ... {len(keys) - 32} more"
        return f"FreeList({', '.join(shown)}{more}; {self.free_units} free units)"


def _packed(high: Int64Array, low: Int64Array, bits: int) -> list[int]:
    """``high << bits | low`` of each pair, in ascending order."""
    if bits == NARROW_BITS:
        packed = high << bits | low
        if (packed[1:] < packed[:-1]).any():
            packed.sort()
        return packed.tolist()  # type: ignore[no-any-return]
    return sorted(h << bits | lo for h, lo in zip(high.tolist(), low.tolist(), strict=True))


def _unpacked(keys: ExtentKeys, bits: int) -> Extents:
    """The extents of keys that are ordered by start."""
    packed = chain.from_iterable(keys._lists)
    if bits == NARROW_BITS:
        array = np.fromiter(packed, np.int64, len(keys))
        return Extents(array >> bits, array & ((1 << bits) - 1))
    mask = (1 << bits) - 1
    pairs = ((key >> bits, key & mask) for key in packed)
    table = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(keys)).reshape(-1, 2)
    return Extents(table[:, 0], table[:, 1])
