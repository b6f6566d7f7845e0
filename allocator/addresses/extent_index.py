"""``ExtentIndex``: the same extents sorted by start and by size, with an undo log.

Each of the F extents ``[start, start + size)`` is one integer key in each of two sorted lists:

- ``by_start``: ``start << bits | size``, to find the neighbours of an address;
- ``by_size``: ``size << bits | start``, so that the first key at or above ``size << bits`` is
  the smallest extent that fits and, among equals, the one with the lowest address.

In a heap of fewer than 2**31 units (8 TiB of 4 KiB) a start and a size fit into one int64, and
NumPy packs, sorts and unpacks all keys at once. In larger heaps, Python does it.

Nearly every change moves one boundary of one extent, and the extent keeps its place in both lists.
One list item is then overwritten, which is cheaper than to delete and insert one.

An exception, including ``KeyboardInterrupt`` and ``MemoryError``, can interrupt a change at any
point. Every change is logged before it begins, and changes one list after the other, so at least
one list is intact at every moment. From that list and the log, :meth:`ExtentIndex.restore` rebuilds
both as they were at the last commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from kvheap.addresses.extent_keys import ExtentKeys
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.errors import HeapCorruptionError

__all__ = ["ExtentIndex"]

NARROW_BITS = 31
"""Bits of a start or a size in heaps in which both fit into one int64."""

WIDE_BITS = 63
"""Bits of a start or a size in all other heaps."""

SHOWN_EXTENTS = 32
"""How many extents ``repr`` shows."""


class ExtentIndex:
    """Disjoint extents in two sorted orders. Not thread-safe.

    Methods that change an extent take its two keys, because the caller has already computed most of
    them and computing them again would slow an allocation down; see ``benchmarks/NOTES.md``.

    Attributes:
        by_start: the keys in address order; change them with the methods below only.
        by_size: the keys in order of size; change them in the same way only.
        bits: the width of a key's lower half.
        mask: the lower half's bits, and the largest start and size that a key can hold.
        log: the changes since the last commit, each as the keys of ``by_start`` that it removes
            and adds; clear it to make them final. Other entries are the free list's: the end of
            the heap before a change, and receipts.
    """

    __slots__ = ("_start_in_change", "bits", "by_size", "by_start", "log", "mask")

    def __init__(self, extents: Extents, end: int) -> None:
        """Index extents that are disjoint and in address order.

        Args:
            extents: their starts and sizes in units.
            end: the keys are made wide enough for extents up to here.
        """
        self.bits = WIDE_BITS if end >> NARROW_BITS else NARROW_BITS
        self.mask = (1 << self.bits) - 1
        self.by_start = ExtentKeys(_packed(extents.starts, extents.sizes, self.bits))
        self.by_size = ExtentKeys(_packed(extents.sizes, extents.starts, self.bits))
        self.log: list[Any] = []
        self._start_in_change = False

    def __len__(self) -> int:
        """The number of extents."""
        return len(self.by_start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Start and size of each extent, in address order."""
        bits, mask = self.bits, self.mask
        return ((key >> bits, key & mask) for key in self.by_start)

    def extents(self) -> Extents:
        """All extents in address order, as arrays. O(F)."""
        bits, mask = self.bits, self.mask
        if bits == NARROW_BITS:
            keys = np.fromiter(self.by_start, np.int64, len(self))
            return Extents(keys >> bits, keys & mask)
        flat = np.fromiter(chain.from_iterable(self), np.int64, 2 * len(self))
        return Extents(flat[0::2], flat[1::2])

    def reshape(self, by_start: int, new_by_start: int, by_size: int, new_by_size: int) -> None:
        """Replace one extent by another one between the same neighbours. O(log F).

        Args:
            by_start: the old extent's key in ``by_start``.
            new_by_start: the new extent's key there.
            by_size: the old extent's key in ``by_size``.
            new_by_size: the new extent's key there.
        """
        self.log.append((by_start, new_by_start))
        self.by_start.shift(by_start, new_by_start)  # one store: it is intact at every moment
        self.by_size.replace(by_size, new_by_size)

    def remove(self, by_start: int, by_size: int) -> None:
        """Remove the extent with these keys. O(log F)."""
        self.log.append((by_start, None))
        self._start_in_change = True
        self.by_start.remove(by_start)
        self._start_in_change = False
        self.by_size.remove(by_size)

    def add(self, by_start: int, by_size: int) -> None:
        """Add the extent with these keys, which overlaps no other. O(log F)."""
        self.log.append((None, by_start))
        self._start_in_change = True
        self.by_start.add(by_start)
        self._start_in_change = False
        self.by_size.add(by_size)

    def restore(self) -> None:
        """Rebuild both lists as they were at the last commit. O(F log F); for exceptions only.

        The log stays; the caller clears it once everything is restored. If a call is interrupted,
        call it again: restoring twice gives the same result.
        """
        keys = self._keys_before_changes()
        self.by_start = ExtentKeys(keys)
        self.by_size = ExtentKeys(self._swapped(keys))
        self._start_in_change = False

    def before_changes(self) -> Extents:
        """The extents as they were at the last commit, in address order. O(F log F)."""
        keys = sorted(self._keys_before_changes())
        bits, mask = self.bits, self.mask
        starts = np.array([key >> bits for key in keys], np.int64)
        return Extents(starts, np.array([key & mask for key in keys], np.int64))

    def _keys_before_changes(self) -> set[int]:
        """The keys of ``by_start`` at the last commit."""
        keys = set(self._swapped(self.by_size) if self._start_in_change else self.by_start)
        for entry in reversed(self.log):
            if isinstance(entry, tuple):
                removed, added = entry
                keys.discard(added)
                if removed is not None:
                    keys.add(removed)
        return keys

    def _swapped(self, keys: Iterable[int]) -> Iterator[int]:
        """Keys of one list as keys of the other."""
        bits, mask = self.bits, self.mask
        return ((key & mask) << bits | key >> bits for key in keys)

    def check(self) -> None:
        """Assert that both lists are sorted and hold the same extents. O(F log F).

        Raises:
            HeapCorruptionError: a list is not sorted, or the two differ; the message shows the
                extents.
        """
        try:
            self.by_start.check()
            self.by_size.check()
        except AssertionError as error:
            raise HeapCorruptionError(
                f"a sorted order of the free list is broken: {self}"
            ) from error
        if sorted(self._swapped(self.by_size)) != self.by_start:
            raise HeapCorruptionError(
                f"the orders by start and by size hold different extents: {self}"
            )

    def __repr__(self) -> str:
        """The first extents, and how many more there are."""
        pairs = list(self)
        shown = [f"[{start}, {start + size})" for start, size in pairs[:SHOWN_EXTENTS]]
        if len(pairs) > SHOWN_EXTENTS:
            shown.append(f"... {len(pairs) - SHOWN_EXTENTS} more")
        return f"ExtentIndex({', '.join(shown)})"


def _packed(high: Int64Array, low: Int64Array, bits: int) -> list[int]:
    """``high << bits | low`` of each pair, in ascending order."""
    if bits == NARROW_BITS:
        packed = high << bits | low
        if (packed[1:] < packed[:-1]).any():
            packed.sort()
        return packed.tolist()  # type: ignore[no-any-return]
    return sorted(h << bits | lo for h, lo in zip(high.tolist(), low.tolist(), strict=True))
