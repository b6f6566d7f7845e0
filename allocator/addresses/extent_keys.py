"""``ExtentKeys``: a sorted list of integers with look-ups by key instead of by position."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

__all__ = ["ExtentKeys"]


class ExtentKeys(SortedList[int]):
    """A ``SortedList`` of distinct non-negative ints, with additional look-ups and changes.

    A ``SortedList`` is a list of short sorted lists (``_lists``) and their maxima (``_maxes``).
    Its own look-ups return positions, for which it maintains an index of the lengths of those
    lists. The look-ups here return keys and need no such index, which makes an allocation up to
    four times as fast; see ``benchmarks/NOTES.md``.
    """

    if TYPE_CHECKING:  # sortedcontainers 2.4 documents these as its implementation
        _lists: list[list[int]]
        _maxes: list[int]

        def _check(self) -> None: ...

    def last(self) -> int | None:
        """The largest key, or None if there is no key. O(1)."""
        maxes = self._maxes
        return maxes[-1] if maxes else None

    def first_at_least(self, key: int) -> int | None:
        """The smallest key >= ``key``, or None. O(log F)."""
        maxes = self._maxes
        if not maxes:
            return None
        # Up to 2,000 keys are in one list, which needs no search for the list.
        position = 0 if key <= maxes[0] else bisect_left(maxes, key)
        if position == len(maxes):
            return None
        keys = self._lists[position]
        return keys[bisect_left(keys, key)]

    def around(self, key: int) -> tuple[int | None, int | None]:
        """The largest key < ``key`` and the smallest key >= ``key``, each or None. O(log F)."""
        maxes = self._maxes
        if not maxes:
            return None, None
        position = 0 if key <= maxes[0] else bisect_left(maxes, key)
        if position == len(maxes):
            return maxes[-1], None
        keys = self._lists[position]
        index = bisect_left(keys, key)
        if index:
            return keys[index - 1], keys[index]
        return (maxes[position - 1] if position else None), keys[0]

    def shift(self, old: int, new: int) -> None:
        """Replace ``old`` with ``new``, which must lie between the same neighbours. O(log F)."""
        maxes = self._maxes
        position = 0 if old <= maxes[0] else bisect_left(maxes, old)
        if maxes[position] == old:  # the last of its list: nothing to search for
            self._lists[position][-1] = new
            maxes[position] = new
            return
        keys = self._lists[position]
        keys[bisect_left(keys, old)] = new

    def replace(self, old: int, new: int) -> None:
        """Replace ``old`` with ``new``. O(log F).

        One write if ``new`` lies between the same neighbours, else a removal and an addition.
        """
        maxes, lists = self._maxes, self._lists
        position = 0 if old <= maxes[0] else bisect_left(maxes, old)
        keys = lists[position]
        if maxes[position] == old:  # the last of its list: nothing to search for
            if new > old:
                stays = position + 1 == len(lists) or new < lists[position + 1][0]
            elif len(keys) > 1:
                stays = keys[-2] < new
            else:
                stays = not position or maxes[position - 1] < new
            if stays:
                keys[-1] = new
                maxes[position] = new
                return
        else:
            index = bisect_left(keys, old)
            if new > old:
                stays = new < keys[index + 1]
            else:
                below = keys[index - 1] if index else maxes[position - 1] if position else -1
                stays = below < new
            if stays:
                keys[index] = new
                return
        self.remove(old)
        self.add(new)

    def check(self) -> None:
        """Assert the invariants of the sorted list. O(F).

        Raises:
            AssertionError: one of them does not hold; the state is printed.
        """
        self._check()
