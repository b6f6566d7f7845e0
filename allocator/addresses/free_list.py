"""``FreeList``: the free extents of one address space, disjoint and coalesced.

Extents are found by address and by size in O(log F). Starts and sizes are counted in units of the
heap's alignment, so all of them are aligned.

The list never joins extents across a *wall*, an address at which a segment of the heap begins.

An exception at any point of a change is undone by :meth:`FreeList.rollback`, see
``addresses/extent_index.py``. If there are pending changes when an operation starts, a rollback
was itself interrupted; it must then be finished first.

Not thread-safe. :meth:`FreeList.insert` refuses an extent that is free already. The caller must
check that the extent lies within the heap, see ``addresses/address_manager.py``.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extent_index import ExtentIndex
from kvheap.addresses.extents import Extents
from kvheap.errors import HeapCorruptionError

__all__ = ["Done", "FreeList", "Receipt"]


class Done(Protocol):
    """The part of a :class:`Receipt` that tells whether an operation was done."""

    done: bool


class Receipt:
    """Tells whether an operation was done, also if an exception struck it at any moment.

    An operation writes its receipt into the log of its changes before the first change. Committing
    clears the log, in one step; a rollback sets ``done`` back. So once no rollback is pending,
    ``done`` is the truth.

    Attributes:
        done: whether the operation was done.
        blocks: what an allocation took; undefined unless ``done``.
    """

    __slots__ = ("blocks", "done")

    def __init__(self) -> None:
        self.done = False
        self.blocks: AddressBatch | None = None


class FreeList:
    """The free extents of one address space, in units.

    Methods by purpose:

    - look-ups: :meth:`overlapping`, :meth:`has_wall_within`, :meth:`fewest_runs`,
      :meth:`max_blocks`, :meth:`extents`, :attr:`largest`, ``len``;
    - changes: :meth:`take`, :meth:`carve`, :meth:`insert`, :meth:`grow`, :meth:`trim`,
      :meth:`write`, :meth:`withdraw`; then :attr:`commit` or :meth:`rollback`;
    - replacements, which leave this list as it is: :meth:`rebuilt`, :meth:`ready_to_grow`,
      :meth:`before_changes`;
    - invariants: :meth:`check`.

    Attributes:
        end: where the heap ends.
        free_units: the sum of all sizes.
        pending: the log of the changes since the last commit.
        commit: makes the pending changes final.
        walls: where segments of the heap begin, except the first.
        wall_array: the same in ascending order, int64 ``[W]``.
    """

    __slots__ = ("_index", "commit", "end", "free_units", "pending", "wall_array", "walls")

    def __init__(self, extents: Extents, end: int, walls: frozenset[int] = frozenset()) -> None:
        """Take extents in address order that are disjoint, non-empty and do not touch.

        Args:
            extents: starts and sizes in units.
            end: where the heap ends.
            walls: where segments of the heap begin, except the first.
        """
        self._index = ExtentIndex(extents, end)
        self.end = end
        self.pending = self._index.log
        self.commit = self._index.log.clear
        self.free_units = int(extents.sizes.sum())
        self.walls = walls
        self.wall_array = np.sort(np.fromiter(walls, np.int64, len(walls)))

    def __len__(self) -> int:
        """The number of free extents."""
        return len(self._index.by_start)

    @property
    def largest(self) -> int:
        """Units of the largest extent; 0 if nothing is free. O(1)."""
        index = self._index
        key = index.by_size.last()
        return 0 if key is None else key >> index.bits

    def extents(self) -> Extents:
        """All extents in address order, as arrays. O(F)."""
        return self._index.extents()

    def overlapping(self, start: int, end: int) -> tuple[int, int] | None:
        """A free extent that shares units with ``[start, end)``, as ``(start, end)``, or None."""
        index = self._index
        bits, mask = index.bits, index.mask
        for key in index.by_start.around(start << bits):
            if key is not None:
                free_start = key >> bits
                free_end = free_start + (key & mask)
                if free_start < end and start < free_end:
                    return free_start, free_end
        return None

    def has_wall_within(self, start: int, end: int) -> bool:
        """Whether a wall lies strictly between ``start`` and ``end``."""
        walls = self.wall_array
        after = int(np.searchsorted(walls, start, side="right"))
        return after < len(walls) and int(walls[after]) < end

    def fewest_runs(self, size: int, count: int, max_runs: int) -> list[tuple[int, int]] | None:
        """Find places for up to ``count`` blocks of ``size`` units, in as few runs as possible.

        Chooses the smallest extent that holds all blocks, if there is one. Otherwise it takes the
        largest extents in turn, and for the remaining blocks the smallest extent that holds them.
        No other choice gives fewer runs: an extent holds ``extent // size`` blocks, whatever the
        other extents hold.

        Returns:
            ``(start, blocks)`` pairs, with fewer than ``count`` blocks in all if no more fit; None
            if more than ``max_runs`` runs would be needed.
        """
        index = self._index
        bits, mask = index.bits, index.mask
        runs: list[tuple[int, int]] = []
        remaining = count
        largest = self.largest // size
        if largest and count > max_runs * largest:
            return None
        for key in reversed(index.by_size):
            fitting = (key >> bits) // size
            if fitting == 0:
                return runs
            if len(runs) == max_runs:
                return None
            if fitting >= remaining:
                best = index.by_size.first_at_least(remaining * size << bits)
                assert best is not None  # the extent of ``key`` at least
                runs.append((best & mask, remaining))
                return runs
            runs.append((key & mask, fitting))
            remaining -= fitting
        return runs

    def max_blocks(self, size: int, max_steps: int) -> int:
        """How many blocks of ``size`` units fit, each within one extent.

        Visits the extents that fit a block. If there are more than ``max_steps`` of them, it
        computes on all extents as arrays instead.
        """
        bits, total = self._index.bits, 0
        for step, key in enumerate(reversed(self._index.by_size)):
            fitting = (key >> bits) // size
            if fitting == 0:
                break
            if step == max_steps:
                return int((self.extents().sizes // size).sum())
            total += fitting
        return total

    def take(self, size: int) -> int | None:
        """Carve ``size`` units from the low end of the smallest extent that holds them. O(log F).

        Among equal extents, the one with the lowest address.

        Returns:
            Where they start, or None if no extent is large enough.
        """
        index = self._index
        bits = index.bits
        least = size << bits
        key = index.by_size.first_at_least(least)
        if key is None:
            return None
        start = key & index.mask
        by_start = start << bits | key >> bits
        if key - start == least:
            index.remove(by_start, key)
        else:
            step = least - size  # the start moves up by ``size``, the end stays
            index.reshape(by_start, by_start + step, key, key - step)
        self.free_units -= size
        return start

    def carve(self, start: int, size: int) -> None:
        """Take ``size`` units from the low end of the extent that begins at ``start``. O(log F)."""
        index = self._index
        bits = index.bits
        key = index.by_start.first_at_least(start << bits)
        assert key is not None
        extent = key & index.mask
        if extent == size:
            index.remove(key, size << bits | start)
        else:
            new_start, rest = start + size, extent - size
            index.reshape(
                key, new_start << bits | rest, extent << bits | start, rest << bits | new_start
            )
        self.free_units -= size

    def insert(self, start: int, size: int) -> tuple[int, int] | None:
        """Add ``[start, start + size)`` and join it with its free neighbours. O(log F).

        Returns:
            None if it was added. If part of it is free already, nothing is changed, and a free
            extent that overlaps it is returned as ``(start, end)``.
        """
        index = self._index
        bits, mask, walls = index.bits, index.mask, self.walls
        before, after = index.by_start.around(start << bits)
        end, added = start + size, size
        if before is not None:
            before_start, before_size = before >> bits, before & mask
            before_end = before_start + before_size
            if before_end > start:
                return before_start, before_end
            if before_end < start or (walls and start in walls):
                before = None  # it stays apart
        if after is not None:
            after_start = after >> bits
            if after_start < end:
                return after_start, after_start + (after & mask)
            if after_start > end or (walls and end in walls):
                after = None  # it stays apart
        if before is not None:
            if after is not None:
                after_size = after & mask
                index.remove(after, after_size << bits | end)
                added += after_size
            by_size = before_size << bits | before_start
            index.reshape(before, before + added, by_size, by_size + (added << bits))
        elif after is not None:
            by_size, step = (after & mask) << bits | end, (size << bits) - size
            index.reshape(after, after - step, by_size, by_size + step)  # its end stays
        else:
            index.add(start << bits | size, size << bits | start)
        self.free_units += size
        return None

    def grow(self, size: int) -> None:
        """Move the heap's end up by ``size`` units, which are free. O(log F).

        Call it on the list that :meth:`ready_to_grow` returns.
        """
        self.pending.append(self.end)
        self.insert(self.end, size)
        self.end += size

    def trim(self) -> int:
        """Move the heap's end down to the start of the extent that ends there. O(log F).

        Returns:
            By how many units. If no extent ends there, nothing is changed and 0 is returned.
        """
        index = self._index
        key = index.by_start.last()
        if key is None:
            return 0
        start, size = key >> index.bits, key & index.mask
        if start + size < self.end:
            return 0
        self.pending.append(self.end)
        index.remove(key, size << index.bits | start)
        self.free_units -= size
        self.end = start
        return size

    def write(self, receipt: Done) -> None:
        """Log a receipt, whose ``done`` is true from the commit on."""
        self.pending.append(receipt)
        receipt.done = True

    def withdraw(self, receipt: Done | None) -> None:
        """Take back a logged receipt if its operation changed nothing; cheaper than a rollback."""
        if receipt is not None:
            receipt.done = False

    def rollback(self) -> None:
        """Undo all changes since the last commit. O(F log F); for exceptions only.

        If it is itself interrupted, call it again.
        """
        for entry in reversed(self.pending):
            if isinstance(entry, int):
                self.end = entry
            elif not isinstance(entry, tuple):  # a receipt
                entry.done = False
        self._index.restore()
        self.free_units = sum(size for _, size in self._index)
        self.commit()

    def rebuilt(self, extents: Extents) -> FreeList:
        """The free list of the same heap with other extents. O(F)."""
        return FreeList(extents, self.end, self.walls)

    def before_changes(self) -> FreeList:
        """A copy of this list without the changes since the last commit. O(F log F)."""
        end = next((entry for entry in self.pending if isinstance(entry, int)), self.end)
        return FreeList(self._index.before_changes(), end, self.walls)

    def ready_to_grow(self, size: int, new_segment: bool) -> FreeList:
        """The same list, ready to :meth:`grow` by ``size`` units.

        Args:
            size: by how many units.
            new_segment: put a wall where the heap ends now.

        Returns:
            This list; or a copy, in O(F), if the walls change or the keys must become wider. Walls
            at or above the heap's end belonged to segments that were trimmed, and are dropped.
        """
        walls = frozenset(wall for wall in self.walls if wall < self.end)
        if new_segment and self.end:
            walls |= {self.end}
        if walls == self.walls and self.end + size <= self._index.mask:
            return self
        copy = FreeList(self.extents(), self.end + size, walls)  # with keys for the grown heap
        copy.end = self.end
        return copy

    def check(self) -> None:
        """Assert every invariant of the free list. O(F log F).

        Raises:
            HeapCorruptionError: an invariant is broken; the message names it and shows the extents.
        """
        self._index.check()
        total = sum(size for _, size in self._index)
        if self.free_units != total:
            raise HeapCorruptionError(
                f"the counter says {self.free_units} free units, the extents sum up to {total}: "
                f"{self}"
            )
        previous_end = -1
        for start, size in self._index:
            extent = f"extent [{start}, {start + size})"
            if size <= 0:
                raise HeapCorruptionError(f"{extent} is empty: {self}")
            if start < previous_end:
                raise HeapCorruptionError(f"{extent} overlaps its predecessor: {self}")
            if start == previous_end and start not in self.walls:
                raise HeapCorruptionError(f"{extent} touches its predecessor: {self}")
            previous_end = start + size
        if previous_end > self.end:
            raise HeapCorruptionError(
                f"the last extent ends at {previous_end}, beyond the heap's {self.end}: {self}"
            )

    def __repr__(self) -> str:
        """The first extents, how many more there are, and the counter."""
        return f"FreeList({self._index!r}, {self.free_units} free units)"
