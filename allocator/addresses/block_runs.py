"""``BlockRuns``: where N equal blocks are in memory, as runs of absolute addresses.

A heap's addresses begin at 0 and say nothing about memory. A transfer library, a file or another
machine needs absolute ones, and as few descriptors as possible. ``BlockRuns`` has both: it is a few
arrays, whatever the number of blocks, and depends on no tensor and no heap, so it can describe
blocks of another process or machine as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.batch_checks import integers, positive
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.addresses.integers import as_integer

__all__ = ["BlockRuns", "MemorySegment", "runs_of"]

COLUMNS = ("start", "num_bytes", "base")
"""The fields of a :class:`MemorySegment`."""

ADDRESS_END = 1 << 63
"""Addresses are int64."""


class MemorySegment(NamedTuple):
    """A buffer of a heap: where it is in memory, and which of the heap's addresses it has."""

    start: int
    """Heap address of its first byte."""
    num_bytes: int
    """Its size."""
    base: int
    """Absolute address of its first byte, in the process that holds it."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockRuns:
    """N equal blocks in memory, in their batch's order, as runs of adjacent blocks.

    No run crosses the end of a buffer, even if the next buffer happens to follow it in memory: they
    may be registered apart.

    The constructor trusts its arguments; :meth:`placed` and :meth:`checked` do not.

    Attributes:
        starts: absolute address of each run's first block, int64 ``[R]``.
        counts: blocks in each run, int64 ``[R]``.
        size_bytes: bytes of each block's contents.
        block_bytes: bytes from the start of a block to that of the next in its run: the contents,
            and the padding that the heap's alignment adds.

    >>> blocks = AddressBatch(4096, [0, 16384], [2, 1])
    >>> runs = BlockRuns.placed(blocks, 4000, [MemorySegment(0, 1 << 20, 1 << 30)])
    >>> runs.extents().sizes, runs.extents(padding=False).sizes
    (array([8192, 4096]), array([4000, 4000, 4000]))
    """

    starts: Int64Array
    counts: Int64Array
    size_bytes: int
    block_bytes: int

    @classmethod
    def placed(
        cls, blocks: AddressBatch, size_bytes: int, segments: Sequence[tuple[int, int, int]]
    ) -> BlockRuns:
        """From addresses in a heap, and where the heap's buffers are in memory.

        For blocks of another machine: ``metadata.blocks`` and ``metadata.layout.size_bytes``, with
        the :class:`MemorySegment` of each of that heap's buffers there.

        Args:
            blocks: the blocks, in any order; the arrays are checked.
            size_bytes: bytes of each block's contents.
            segments: heap address, bytes and absolute address of each buffer, ascending and
                disjoint in the heap's addresses.

        Raises:
            ValueError: a block leaves the buffers or straddles two, is smaller than its contents,
                or the numbers are not those of blocks or buffers; the message names them.
            TypeError: a number is not an integer, or an argument of another kind.
        """
        size_bytes = positive("size_bytes", size_bytes)
        if not isinstance(blocks, AddressBatch):
            raise TypeError(f"blocks must be an AddressBatch, got {blocks!r}")
        blocks = blocks.checked()
        return cls.of_addresses(
            blocks.run_starts, blocks.run_counts, size_bytes, blocks.block_bytes, segments
        )

    @classmethod
    def of_addresses(
        cls,
        starts: Int64Array,
        counts: Int64Array,
        size_bytes: int,
        block_bytes: int,
        segments: Sequence[tuple[int, int, int]],
    ) -> BlockRuns:
        """As :meth:`placed`, for runs that need not be disjoint: rows may be named twice.

        Args:
            starts: address in the heap of each run's first block, int64 ``[R]``.
            counts: blocks in each run, int64 ``[R]``, all positive.
            size_bytes: bytes of each block's contents.
            block_bytes: bytes of each block.
            segments: as for :meth:`placed`.

        Raises:
            ValueError, TypeError: as :meth:`placed`.
        """
        _require_room(block_bytes, size_bytes)
        if not len(starts):
            return cls(starts, counts, size_bytes, block_bytes)
        if len(starts) == 1 and isinstance(segments, (list, tuple)) and len(segments) == 1:
            shift = _shift_of(int(starts[0]), int(counts[0]) * block_bytes, segments[0])
            if shift is not None:
                return cls(starts + shift, counts, size_bytes, block_bytes)
        firsts, ends, bases = _columns(segments)
        number = np.searchsorted(firsts, starts, side="right") - 1
        if (starts + counts * block_bytes > ends[number]).any() or number.min() < 0:
            # A run may go on in the next buffer, if no block straddles both.
            starts, counts, number = _cut_at_buffers(starts, counts, block_bytes, firsts, ends)
        return cls(starts - firsts[number] + bases[number], counts, size_bytes, block_bytes)

    def checked(self) -> BlockRuns:
        """The same runs, if they can be: for what another process or machine has sent. O(runs).

        Two runs may overlap, as rows may be named twice.

        Raises:
            ValueError: the arrays are not integers of one length, an address or a count is not
                positive, a run ends at 2**63 or beyond, or a block is smaller than its contents;
                the message names the value.
            TypeError: a size is not an integer.
        """
        size_bytes = positive("size_bytes", self.size_bytes)
        block_bytes = positive("block_bytes", self.block_bytes)
        _require_room(block_bytes, size_bytes)
        starts, counts = integers("starts", self.starts), integers("counts", self.counts)
        if len(starts) != len(counts):
            raise ValueError(f"got {len(starts)} starts but {len(counts)} counts")
        for name, values in (("starts", starts), ("counts", counts)):
            if len(values) and values.min() <= 0:
                raise ValueError(f"{name} must be positive, got {values.min()}")
        too_far = counts > (ADDRESS_END - 1 - starts) // block_bytes
        if too_far.any():
            at = int(np.argmax(too_far))
            raise ValueError(
                f"{counts[at]} blocks of {block_bytes} bytes at {starts[at]} end at 2**63 or beyond"
            )
        return BlockRuns(starts, counts, size_bytes, block_bytes)

    def __len__(self) -> int:
        """Number of blocks."""
        return int(self.counts.sum())

    @property
    def num_runs(self) -> int:
        """Number of runs."""
        return len(self.starts)

    def extents(self, *, padding: bool = True) -> Extents:
        """The bytes of the blocks, in their order, as absolute extents.

        Args:
            padding: take each block's padding too, so that adjacent blocks are one extent; the
                last block of a run keeps its padding as well. It belongs to the block: a copy may
                write it, and reads what a former owner left there. False: contents only, which are
                one extent for each block if there is padding, and the same as with it if not.

        Returns:
            Absolute addresses and bytes, int64 ``[E]`` each.
        """
        if padding or self.block_bytes == self.size_bytes:
            return Extents(self.starts, self.counts * self.block_bytes)
        first_index = np.cumsum(self.counts) - self.counts
        in_run = np.arange(len(self), dtype=np.int64) - np.repeat(first_index, self.counts)
        starts = np.repeat(self.starts, self.counts) + in_run * self.block_bytes
        return Extents(starts, np.full(len(starts), self.size_bytes, np.int64))

    def __repr__(self) -> str:
        """Blocks, runs and bytes."""
        return (
            f"BlockRuns({len(self)} x {self.size_bytes} bytes in blocks of {self.block_bytes}, "
            f"{self.num_runs} runs)"
        )


def runs_of(addresses: Int64Array, block_bytes: int) -> tuple[Int64Array, Int64Array]:
    """The runs of blocks at ``addresses``, which may be in any order and name a block twice.

    Returns:
        The address of each run's first block, and its number of blocks, int64 ``[R]`` each.

    >>> runs_of(np.array([32, 0, 8]), 8)
    (array([32,  0]), array([1, 2]))
    """
    is_first = np.ones(len(addresses), np.bool_)
    np.not_equal(np.diff(addresses), block_bytes, out=is_first[1:])
    heads = np.flatnonzero(is_first)
    return addresses[heads], np.diff(np.append(heads, len(addresses)))


def _require_room(block_bytes: int, size_bytes: int) -> None:
    if block_bytes < size_bytes:
        raise ValueError(
            f"blocks of {block_bytes} bytes are too small for contents of {size_bytes} bytes"
        )


def _columns(
    segments: Sequence[tuple[int, int, int]],
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Heap address of the first byte and after the last, and absolute address, of each buffer."""
    rows: list[tuple[int, int, int]] = []
    if not isinstance(segments, Sequence) or isinstance(segments, (str, bytes)):
        raise TypeError(f"segments must be a list of MemorySegment, got {segments!r}")
    for at, segment in enumerate(segments):
        if not isinstance(segment, Sequence) or len(segment) != len(COLUMNS):
            raise TypeError(f"segments[{at}] must be a MemorySegment, got {segment!r}")
        start, num_bytes, base = (
            as_integer(f"segments[{at}].{name}", value)
            for name, value in zip(COLUMNS, segment, strict=True)
        )
        end = rows[-1][1] if rows else 0
        if start < end or num_bytes < 0 or start + num_bytes >= ADDRESS_END:
            raise ValueError(
                f"segments[{at}] must begin at {end} or above, the end of the one before it, and "
                f"end below 2**63, got {num_bytes} bytes at {start}"
            )
        if num_bytes and (base <= 0 or base + num_bytes >= ADDRESS_END):
            raise ValueError(f"segments[{at}] has {num_bytes} bytes at no address: {base:#x}")
        rows.append((start, start + num_bytes, base))
    if not rows:
        raise ValueError("segments must name at least one buffer, got none")
    table = np.array(rows, np.int64)
    return table[:, 0], table[:, 1], table[:, 2]


def _shift_of(start: int, num_bytes: int, segment: object) -> int | None:
    """What turns an address into an absolute one, for a run that lies in a sound buffer; else None.

    In numbers: for a single run, the arrays that tell the same take ten times as long.
    """
    if type(segment) is not MemorySegment or {*map(type, segment)} != {int}:
        return None
    first, size, base = segment
    is_sound = first >= 0 and base > 0 and max(first, base) + size < ADDRESS_END
    return base - first if is_sound and first <= start <= first + size - num_bytes else None


def _cut_at_buffers(
    starts: Int64Array,
    counts: Int64Array,
    block_bytes: int,
    firsts: Int64Array,
    ends: Int64Array,
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Runs that end where their buffer does, and the index of each run's buffer. O(blocks).

    Raises:
        ValueError: a block leaves the buffers, or straddles two.
    """
    # A run that leaves the buffers by far must not become so many blocks.
    beyond = (starts < firsts[0]) | (starts + counts * block_bytes > ends[-1])
    if not beyond.any():
        first_index = np.cumsum(counts) - counts
        in_run = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(first_index, counts)
        blocks = np.repeat(starts, counts) + in_run * block_bytes
        number = np.searchsorted(firsts, blocks, side="right") - 1
        beyond = blocks + block_bytes > ends[number]
        if not beyond.any():
            is_first = np.ones(len(blocks), np.bool_)
            is_first[1:] = (in_run[1:] == 0) | (number[1:] != number[:-1])
            heads = np.flatnonzero(is_first)
            return blocks[heads], np.diff(np.append(heads, len(blocks))), number[heads]
        starts = blocks
    at = int(starts[beyond][0])
    raise ValueError(
        f"blocks of {block_bytes} bytes at {at} leave the heap's buffers, which have the addresses "
        f"{[(int(first), int(end)) for first, end in zip(firsts, ends, strict=True)]}"
    )
