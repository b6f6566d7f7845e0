"""``Pieces``: N ranges of bytes to copy, as arrays of sources, targets and sizes.

This module prepares pieces for a copy, with array operations: it merges pieces that follow each
other on both sides, splits pieces that one call cannot copy whole, and refuses pieces that overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvheap.kernels.arrays import (
    INT64_END,
    Int64Array,
    alignment_of,
    combined_bits,
    int64_array,
    require_all,
)

__all__ = ["Pieces", "first_outside", "is_covered"]

MAX_CELLS_PER_PIECE = 64
"""Targets of one size are checked for overlaps in a table with at most this many one-byte cells for
each piece, or by a sort if the table would be larger."""

FIRST_LOOK = 16
"""How many of the targets tell whether they may ascend."""


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """N ranges of bytes to copy, each from a source address to a target address, in this order.

    Attributes:
        sources: absolute address of the first byte to read of each, int64 ``[N]``.
        targets: absolute address of the first byte to write of each, int64 ``[N]``.
        sizes: bytes of each, all positive: int64 ``[N]``, or one int if all are equal.

    >>> pieces = Pieces.of([4096, 4160, 8192], [64, 128, 1024], 64)
    >>> pieces.merged()
    Pieces(2 x 64 to 128 bytes, 192 bytes)
    >>> pieces.merged().sizes
    array([128,  64])
    """

    sources: Int64Array
    targets: Int64Array
    sizes: Int64Array | int

    @classmethod
    def of(
        cls,
        sources: npt.ArrayLike,
        targets: npt.ArrayLike,
        sizes: npt.ArrayLike,
    ) -> Pieces:
        """Check a caller's arrays and leave out pieces of no bytes.

        Args:
            sources: absolute addresses, integers ``[N]``.
            targets: absolute addresses, integers ``[N]``.
            sizes: bytes of each, integers ``[N]``; or one integer for all.

        Raises:
            TypeError: an array does not hold integers.
            ValueError: lengths differ, an array is not one-dimensional, a size is negative, or an
                address is not positive or too high for its piece; the message names the value.
        """
        source_array, target_array = (
            int64_array("sources", sources),
            int64_array("targets", targets),
        )
        size_array = int64_array("sizes", sizes, allow_scalar=True)
        lengths = (len(source_array), len(target_array))
        if size_array.ndim == 0:
            if lengths[0] != lengths[1]:
                raise ValueError(f"got {lengths[0]} sources but {lengths[1]} targets")
        elif not lengths[0] == lengths[1] == len(size_array):
            raise ValueError(
                f"got {lengths[0]} sources, {lengths[1]} targets and {len(size_array)} sizes"
            )
        if size_array.size and size_array.min() < 0:
            require_all("sizes", size_array, size_array >= 0, "must not be negative")
        if size_array.ndim == 0:
            kept = slice(0, 0) if int(size_array) == 0 else slice(None)
            source_array, target_array = source_array[kept], target_array[kept]
            pieces = cls(source_array, target_array, max(int(size_array), 1))
        elif size_array.size and size_array.min() == 0:
            some = np.flatnonzero(size_array)
            pieces = cls(source_array[some], target_array[some], size_array[some])
        else:
            pieces = cls(source_array, target_array, size_array)
        for name, starts in (("sources", pieces.sources), ("targets", pieces.targets)):
            if not len(starts):
                continue
            largest = pieces.sizes if isinstance(pieces.sizes, int) else int(pieces.sizes.max())
            if starts.min() <= 0 or int(starts.max()) + largest >= INT64_END:
                # User space ends far below 2**63 on every system that CUDA runs on.
                require_all(name, starts, starts > 0, "must be positive addresses")
                ends_in = starts < INT64_END - pieces.sizes
                require_all(name, starts, ends_in, "must not wrap around")
        return pieces

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        """All pieces of ``parts``, one part after another."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), 1)
        sizes = {part.sizes for part in parts if isinstance(part.sizes, int)}
        all_sizes: Int64Array | int
        if len(sizes) == 1 and all(isinstance(part.sizes, int) for part in parts):
            all_sizes = sizes.pop()
        else:
            all_sizes = np.concatenate([part.size_array() for part in parts])
        return cls(
            np.concatenate([part.sources for part in parts]),
            np.concatenate([part.targets for part in parts]),
            all_sizes,
        )

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self.sources)

    def __repr__(self) -> str:
        """How many pieces there are, of how many bytes."""
        if isinstance(self.sizes, int) or not len(self):
            size = f"{self.sizes if isinstance(self.sizes, int) else 0}"
        else:
            size = f"{self.sizes.min()} to {self.sizes.max()}"
        return f"Pieces({len(self)} x {size} bytes, {self.num_bytes} bytes)"

    @property
    def num_bytes(self) -> int:
        """Bytes of all pieces."""
        if isinstance(self.sizes, int):
            return len(self) * self.sizes
        return int(self.sizes.sum())

    @property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides all addresses and sizes."""
        sizes = self.sizes if isinstance(self.sizes, int) else combined_bits(self.sizes)
        return alignment_of(sizes, combined_bits(self.sources), combined_bits(self.targets))

    def size_array(self) -> Int64Array:
        """The size of each piece, int64 ``[N]``, even if all are equal."""
        if isinstance(self.sizes, int):
            return np.full(len(self), self.sizes, np.int64)
        return self.sizes

    def __getitem__(self, part: slice | Int64Array | npt.NDArray[np.bool_]) -> Pieces:
        """Some of the pieces."""
        sizes = self.sizes
        return Pieces(
            self.sources[part],
            self.targets[part],
            sizes if isinstance(sizes, int) else sizes[part],
        )

    def merged(self) -> Pieces:
        """The same bytes, with pieces that follow each other on both sides merged into one."""
        if len(self) < 2:
            return self
        sizes = self.sizes
        steps = sizes if isinstance(sizes, int) else sizes[:-1]
        sources, targets = self.sources, self.targets
        follows = sources[1:] - sources[:-1] == steps
        if not follows.any():
            return self
        follows &= targets[1:] - targets[:-1] == steps
        if not follows.any():
            return self
        firsts = np.flatnonzero(~follows) + 1
        firsts = np.concatenate((np.zeros(1, np.int64), firsts))
        if isinstance(sizes, int):
            total = np.diff(np.append(firsts, len(self))) * sizes
        else:
            total = np.add.reduceat(sizes, firsts)
        return Pieces(self.sources[firsts], self.targets[firsts], _one_if_equal(total))

    def split(self, source_walls: Int64Array, target_walls: Int64Array) -> Pieces:
        """The same bytes, with pieces cut so that none crosses a wall.

        Args:
            source_walls: absolute addresses that no piece may cross on the source's side, int64,
                ascending.
            target_walls: absolute addresses that no piece may cross on the target's side, int64,
                ascending.
        """
        pieces = self
        if len(source_walls):
            pieces = pieces._split_side(pieces.sources, source_walls)
        if len(target_walls):
            pieces = pieces._split_side(pieces.targets, target_walls)
        return pieces

    def _split_side(self, starts: Int64Array, walls: Int64Array) -> Pieces:
        sizes = self.size_array()
        # Walls strictly inside a piece: after its first byte, before its end.
        first = np.searchsorted(walls, starts, side="right")
        last = np.searchsorted(walls, starts + sizes, side="left")
        counts = np.maximum(last - first, 0)
        if not counts.any():
            return self
        extra = np.repeat(np.arange(len(self)), counts)
        within = np.arange(len(extra)) - np.repeat(np.cumsum(counts) - counts, counts)
        cuts = walls[first[extra] + within] - starts[extra]
        return self._cut_at(extra, cuts)

    def cut(self, max_bytes: int) -> Pieces:
        """The same bytes, in pieces of at most ``max_bytes``, each cut from its start."""
        sizes = self.sizes
        if not len(self) or (sizes if isinstance(sizes, int) else int(sizes.max())) <= max_bytes:
            return self
        whole = self.size_array()
        counts = -(-whole // max_bytes)
        ends = np.cumsum(counts)
        # Parts are numbered through all pieces: shift each piece's start back by those before it.
        before = (ends - counts) * max_bytes
        offsets = np.arange(int(ends[-1])) * max_bytes
        parts = np.full(len(offsets), max_bytes)
        parts[ends - 1] = whole - (counts - 1) * max_bytes
        return Pieces(
            np.repeat(self.sources - before, counts) + offsets,
            np.repeat(self.targets - before, counts) + offsets,
            _one_if_equal(parts),
        )

    def _cut_at(self, rows: Int64Array, cuts: Int64Array) -> Pieces:
        """Cut piece ``rows[i]`` at byte ``cuts[i]``; both ascending, cuts inside their pieces."""
        sizes = self.size_array()
        all_rows = np.concatenate((np.arange(len(self)), rows))
        offsets = np.concatenate((np.zeros(len(self), np.int64), cuts))
        order = np.lexsort((offsets, all_rows))
        all_rows, offsets = all_rows[order], offsets[order]
        ends = np.append(offsets[1:], 0)
        is_last = np.append(all_rows[1:] != all_rows[:-1], True)
        ends[is_last] = sizes[all_rows[is_last]]
        return Pieces(
            self.sources[all_rows] + offsets,
            self.targets[all_rows] + offsets,
            _one_if_equal(ends - offsets),
        )

    def by_bytes(self, max_bytes: int) -> Iterator[Pieces]:
        """The pieces in parts of ``max_bytes`` bytes each; the last part has the rest.

        Pieces are cut where a part ends inside them. A few array operations for each part.
        """
        if not len(self):
            return
        ends = np.cumsum(self.size_array())
        walls = np.arange(max_bytes, int(ends[-1]), max_bytes)
        starts = ends - self.size_array()
        whole = self._split_side(starts, walls)
        piece_ends = np.cumsum(whole.size_array())
        limits = np.searchsorted(piece_ends, np.append(walls, piece_ends[-1])) + 1
        begin = 0
        for end in limits.tolist():
            yield whole[begin:end]
            begin = end

    def require_distinct_targets(self, within: tuple[int, int] | None = None) -> None:
        """Refuse targets that overlap each other.

        O(N) if targets ascend, or have one size and are not too far apart; else a sort.

        Args:
            within: two addresses between which all targets are known to be.

        Raises:
            ValueError: two targets overlap; the message names their pieces.
        """
        if len(self) < 2:
            return
        starts, sizes = self.targets, self.sizes
        steps = sizes if isinstance(sizes, int) else sizes[:-1]
        # Those that ascend mostly do so from the first one on; the others need no look at all.
        begins = starts[:FIRST_LOOK].tolist()
        if begins == sorted(begins) and (starts[1:] - starts[:-1] >= steps).all():
            return
        if isinstance(sizes, int) and _are_disjoint(starts, sizes, within):
            return
        order = np.argsort(starts, kind="stable")
        ordered = starts[order]
        steps = sizes if isinstance(sizes, int) else sizes[order][:-1]
        overlaps = np.diff(ordered) < steps
        if overlaps.any():
            at = int(np.argmax(overlaps))
            first, second = int(order[at]), int(order[at + 1])
            raise ValueError(
                f"targets overlap: piece {first} ends at address "
                f"{starts[first] + self._size(first)}, piece {second} starts at {starts[second]}"
            )

    def require_apart(self) -> None:
        """Refuse a target that overlaps a source, which would change while it is read.

        O(N) if all targets are above or below all sources, as between two buffers; else a sort.

        Raises:
            ValueError: a target overlaps a source; the message names both.
        """
        if not len(self):
            return
        sizes = self.sizes
        if isinstance(sizes, int) and (
            int(self.sources.min()) >= int(self.targets.max()) + sizes
            or int(self.targets.min()) >= int(self.sources.max()) + sizes
        ):
            return
        source_ends, target_ends = self.sources + sizes, self.targets + sizes
        if self.sources.min() >= target_ends.max() or self.targets.min() >= source_ends.max():
            return
        order = np.argsort(self.sources, kind="stable")
        starts = self.sources[order]
        # Sources may overlap each other, so take the furthest end of all that start before.
        furthest = np.maximum.accumulate(source_ends[order])
        before_end = np.searchsorted(starts, target_ends, side="left")
        reached = np.append(np.int64(-1), furthest)[before_end]
        overlaps = reached > self.targets
        if overlaps.any():
            target = int(np.argmax(overlaps))
            inside = (self.sources < target_ends[target]) & (source_ends > self.targets[target])
            source = int(np.argmax(inside))
            raise ValueError(
                f"the target of piece {target}, [{self.targets[target]}, {target_ends[target]}), "
                f"overlaps the source of piece {source}, [{self.sources[source]}, "
                f"{source_ends[source]})"
            )

    def _size(self, row: int) -> int:
        return self.sizes if isinstance(self.sizes, int) else int(self.sizes[row])


def is_covered(start: int, end: int, ranges: Int64Array) -> bool:
    """Whether ranges follow each other without a gap and hold all of ``[start, end)``.

    Arguments are as for :func:`first_outside`.

    >>> is_covered(8, 24, np.array([[0, 16], [16, 32]])), is_covered(8, 24, np.array([[0, 16]]))
    (True, False)
    """
    if not len(ranges) or start < ranges.item(0) or ranges.item(-1) < end:
        return False
    return len(ranges) == 1 or bool((ranges[1:, 0] == ranges[:-1, 1]).all())


def first_outside(starts: Int64Array, ends: Int64Array, ranges: Int64Array) -> int | None:
    """The index of the first ``[start, end)`` that is not inside the union of ``ranges``, or None.

    Args:
        starts: address of the first byte of each, int64 ``[N]``.
        ends: address after the last byte of each, int64 ``[N]``.
        ranges: disjoint ``[start, end)``, int64 ``[R, 2]``, ascending; ranges that touch count as
            one.
    """
    if not len(starts):
        return None
    if not len(ranges):
        return 0
    if len(ranges) == 1 and starts.min() >= ranges[0, 0] and ends.max() <= ranges[0, 1]:
        return None
    apart = np.flatnonzero(ranges[1:, 0] != ranges[:-1, 1])
    range_starts = ranges[np.append(0, apart + 1), 0]
    range_ends = ranges[np.append(apart, len(ranges) - 1), 1]
    number = np.searchsorted(range_starts, starts, side="right") - 1
    outside = (number < 0) | (ends > range_ends[number])
    return int(np.argmax(outside)) if outside.any() else None


def _are_disjoint(starts: Int64Array, size_bytes: int, within: tuple[int, int] | None) -> bool:
    """Whether ranges of one size are disjoint. O(N), or a sort if they are far apart.

    Memory is divided into cells of that size. Ranges are disjoint if no two start in the same cell
    and none reaches into the next cell beyond the start of the range there.
    """
    if within is None or within[1] - within[0] > MAX_CELLS_PER_PIECE * len(starts) * size_bytes:
        within = int(starts.min()), int(starts.max())
    low, high = within
    num_cells = (high - low) // size_bytes + 1
    if num_cells > MAX_CELLS_PER_PIECE * len(starts):
        return bool((np.diff(np.sort(starts)) >= size_bytes).all())
    shift = size_bytes.bit_length() - 1
    cells = starts - low
    offsets = None
    if size_bytes == 1 << shift:
        if int(np.bitwise_or.reduce(cells)) & (size_bytes - 1):
            offsets = cells & (size_bytes - 1)
        cells >>= shift
    else:
        cells, offsets = np.divmod(cells, size_bytes)
    is_taken = np.zeros(num_cells, np.bool_)
    is_taken[cells] = True
    if np.count_nonzero(is_taken) < len(starts):
        return False
    if offsets is None or not offsets.any():
        return True
    # Each range reaches as far into the next cell as it starts into its own.
    offset_in = np.zeros(num_cells, np.int64)
    offset_in[cells] = offsets
    both_taken = is_taken[1:] & is_taken[:-1]
    return bool((offset_in[1:] >= offset_in[:-1])[both_taken].all())


def _one_if_equal(sizes: Int64Array) -> Int64Array | int:
    """One int if all sizes are equal, else the array."""
    return int(sizes[0]) if len(sizes) and (sizes == sizes[0]).all() else sizes
