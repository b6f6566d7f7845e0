"""``AddressBatch``: N equal blocks, kept as a few runs; ``batched_allocate`` returns it.

A run is a sequence of adjacent blocks. N blocks in R runs are two arrays of length R, so a batch
costs the same whether it holds 64 or 64,000 blocks. The N addresses are computed on demand.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, repeat
from typing import SupportsIndex, overload

import numpy as np

from kvheap.addresses.batch_checks import integers, is_run, positive, require_apart
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer

__all__ = ["AddressBatch"]


class AddressBatch(Sequence[tuple[int, int]]):
    """N equal blocks, a sequence of ``(address, size)`` pairs.

    Allocations are in ascending address order; blocks that were put together in another way are in
    the order in which they were given. Immutable. Equal to any sequence of the same pairs, and
    ``batch + list`` is a list, so that code written for a list of pairs works with it unchanged.

    The constructor trusts its arguments, which for one run may be two numbers. :meth:`of_runs` and
    :meth:`of_addresses` check numbers that come from elsewhere.

    Attributes:
        block_bytes: allocated bytes of each block, a multiple of the alignment.
        num_blocks: number of blocks N, as ``len`` returns it.

    >>> batch = AddressBatch(4096, np.array([0, 16384]), np.array([2, 1]))
    >>> list(batch)
    [(0, 4096), (4096, 4096), (16384, 4096)]
    >>> batch.num_runs, len(batch), batch.addresses
    (2, 3, array([    0,  4096, 16384]))
    """

    __slots__ = ("_addresses", "_counts", "_ends", "_starts", "block_bytes", "num_blocks")

    def __init__(
        self,
        block_bytes: int,
        run_starts: Int64Array | Sequence[int] | int,
        run_counts: Int64Array | Sequence[int] | int,
    ) -> None:
        self.block_bytes = block_bytes
        # Numbers, and lists of a few runs, stay so: freeing the whole batch needs no array.
        self._starts = run_starts
        self._counts = run_counts
        self._addresses: Int64Array | None = None
        self._ends: list[int] | None = None
        if type(run_counts) is int:  # most batches
            self.num_blocks = run_counts
        else:
            counts = _listed(run_counts)
            self.num_blocks = int(sum(counts) if len(counts) < 64 else np.sum(counts))

    @classmethod
    def of_addresses(cls, addresses: Int64Array | Sequence[int], block_bytes: int) -> AddressBatch:
        """A batch of the blocks at ``addresses``, integers ``[N]``, in any order.

        Raises:
            ValueError: the addresses are not integers or negative, blocks overlap or end at 2**63
                or beyond, or ``block_bytes`` is not positive.
            TypeError: ``block_bytes`` is not an integer.

        >>> AddressBatch.of_addresses(np.array([32, 0, 8]), 8).run_counts
        array([1, 2])
        """
        block_bytes = positive("block_bytes", block_bytes)
        addresses = integers("addresses", addresses)
        require_apart("addresses", addresses, np.ones(len(addresses), np.int64), block_bytes)
        gaps = np.diff(addresses)
        firsts = np.flatnonzero(np.append(True, gaps != block_bytes))[: len(addresses)]
        counts = np.diff(np.append(firsts, len(addresses)))
        return cls(block_bytes, addresses[firsts], counts)

    @classmethod
    def of_runs(
        cls,
        block_bytes: int,
        run_starts: Int64Array | Sequence[int],
        run_counts: Int64Array | Sequence[int],
    ) -> AddressBatch:
        """A batch of checked runs, in any order.

        Args:
            block_bytes: allocated bytes of each block.
            run_starts: address of each run's first block, integers ``[R]``.
            run_counts: blocks in each run, integers ``[R]``.

        Raises:
            ValueError: the arrays are not integers or differ in length, a start is negative, a
                count or ``block_bytes`` is not positive, or runs overlap or end at 2**63 or beyond.
            TypeError: ``block_bytes`` is not an integer.

        >>> AddressBatch.of_runs(8, [16, 0], [1, 3])
        Traceback (most recent call last):
        ValueError: run_starts overlap: [16, 24) and [0, 24)
        """
        block_bytes = positive("block_bytes", block_bytes)
        starts = integers("run_starts", run_starts)
        counts = integers("run_counts", run_counts)
        require_apart("run_starts", starts, counts, block_bytes)
        return cls(block_bytes, starts, counts)

    def checked(self) -> AddressBatch:
        """The same batch, checked as :meth:`of_runs` does. O(R), or a sort of the runs."""
        starts, counts = _listed(self._starts), _listed(self._counts)
        if len(starts) == len(counts) == 1 and is_run(starts[0], counts[0], self.block_bytes):
            return self
        return AddressBatch.of_runs(self.block_bytes, starts, counts)

    @property
    def run_starts(self) -> Int64Array:
        """Address of each run's first block, int64 ``[R]``, read-only."""
        self._starts = found = _read_only(self._starts)
        return found

    @property
    def run_counts(self) -> Int64Array:
        """Blocks in each run, int64 ``[R]``, all positive, read-only."""
        self._counts = found = _read_only(self._counts)
        return found

    @property
    def num_runs(self) -> int:
        """How many runs the blocks form; the cost of copying the batch grows with it."""
        starts = self._starts
        return 1 if type(starts) is int else len(_listed(starts))

    @property
    def is_ascending(self) -> bool:
        """Whether the blocks are in address order, as those of every allocation are. O(R)."""
        return self.num_runs < 2 or bool((np.diff(self.run_starts) > 0).all())

    def run_pairs(self) -> list[tuple[int, int]]:
        """Address and bytes of each run, as plain ints."""
        size = self.block_bytes
        runs = zip(_listed(self._starts), _listed(self._counts), strict=True)
        return [(int(start), int(count) * size) for start, count in runs]

    def only_run(self) -> tuple[int, int] | None:
        """Address and bytes of the run, as plain ints; None unless there is exactly one."""
        starts = self._starts
        if not isinstance(starts, int):
            if len(starts) != 1:
                return None
            first = starts[0]
            starts = first if isinstance(first, int) else int(first)
        return starts, self.num_blocks * self.block_bytes

    def part(self, first: int, count: int) -> AddressBatch:
        """Blocks ``first`` to ``first + count - 1`` of a batch of one run, as a batch."""
        start = self.address(first)
        return AddressBatch(self.block_bytes, start, count)

    @property
    def addresses(self) -> Int64Array:
        """The address of every block, int64 ``[N]``, read-only. O(N) the first time.

        They are kept until :meth:`forget_addresses`, 8 bytes for each block.
        """
        found = self._addresses  # once: another thread may forget them
        if found is None:
            offsets = np.arange(self.num_blocks, dtype=np.int64)
            run = self.only_run()
            if run is not None:
                offsets *= self.block_bytes
                offsets += run[0]
            elif self.num_blocks:
                first_index = np.cumsum(self.run_counts) - self.run_counts
                offsets -= np.repeat(first_index, self.run_counts)
                offsets *= self.block_bytes
                offsets += np.repeat(self.run_starts, self.run_counts)
            offsets.flags.writeable = False
            self._addresses = found = offsets
        return found

    def forget_addresses(self) -> None:
        """Give back the memory of :attr:`addresses`; they are computed again when needed."""
        self._addresses = None

    def addresses_of(self, rows: Int64Array) -> Int64Array:
        """The addresses of some blocks, int64 ``[K]``, without those of all. O(K log R + R).

        Args:
            rows: the numbers of the blocks, int64 ``[K]``, from 0 to N - 1.
        """
        known = self._addresses
        if known is not None:
            return known[rows]
        only = self.only_run()
        if only is not None:
            found: Int64Array = rows * self.block_bytes
            found += only[0]
            return found
        ends = np.cumsum(self.run_counts)
        run = np.searchsorted(ends, rows, side="right")
        in_run = rows - (ends - self.run_counts)[run]
        found = self.run_starts[run]
        found += in_run * self.block_bytes
        return found

    def address(self, index: int) -> int:
        """The address of block ``index`` (0 <= index < N). O(log R), after O(R) the first time."""
        starts = self._starts
        if type(starts) is int:
            return starts + index * self.block_bytes
        starts = _listed(starts)
        if len(starts) == 1:
            return int(starts[0]) + index * self.block_bytes
        known = self._addresses
        if known is not None:
            return int(known[index])
        ends, counts = self._ends, _listed(self._counts)
        if ends is None:
            self._ends = ends = list(accumulate(map(int, counts)))
        run = bisect_right(ends, index)
        in_run = index - (ends[run] - int(counts[run]))
        return int(starts[run]) + in_run * self.block_bytes

    def __len__(self) -> int:
        """The number of blocks."""
        return self.num_blocks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The ``(address, size)`` pairs."""
        return zip(self.addresses.tolist(), repeat(self.block_bytes))

    @overload
    def __getitem__(self, index: SupportsIndex) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> tuple[int, int] | list[tuple[int, int]]:
        """One ``(address, size)`` pair, or a list of them for a slice."""
        if isinstance(index, slice):
            return list(zip(self.addresses[index].tolist(), repeat(self.block_bytes)))
        number = as_integer("index", index)
        if not -self.num_blocks <= number < self.num_blocks:
            raise IndexError(f"block {number} is out of range for a batch of {self.num_blocks}")
        return int(self.addresses[number]), self.block_bytes

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence holds the same pairs in the same order."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """A list of this batch's pairs and the other's."""
        return [*self, *other]

    def __radd__(self, other: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """A list of the other's pairs and this batch's."""
        return [*other, *self]

    def __reduce__(self) -> tuple[type[AddressBatch], tuple[int, Int64Array, Int64Array]]:
        return type(self), (self.block_bytes, self.run_starts, self.run_counts)

    def __repr__(self) -> str:
        """The number of blocks, their size and the first runs."""
        starts, counts = _listed(self._starts)[:8], _listed(self._counts)[:8]
        runs = [f"{count} at {start}" for start, count in zip(starts, counts, strict=True)]
        more = ", ..." if self.num_runs > 8 else ""
        return f"AddressBatch({len(self)} x {self.block_bytes} bytes: {', '.join(runs)}{more})"


def _listed(values: Int64Array | Sequence[int] | int) -> Int64Array | Sequence[int]:
    """Numbers of runs, which for one run may be one number."""
    return (values,) if isinstance(values, int) else values


def _read_only(values: Int64Array | Sequence[int] | int) -> Int64Array:
    array = np.asarray(_listed(values), np.int64).view()
    array.flags.writeable = False
    return array
