"""``AddressManager``: hands out extents of one virtual address space that starts at 0.

It knows addresses and sizes only: no tensor, no device. Address-ordered best fit over
``FreeList``: the smallest free extent that holds the request, the lowest
address among equals, carved from its low end. Names and results follow LMCache's class of the
same name (LMCache 0.5.6, ``lmcache/v1/memory_management.py``), which is a first-fit walk.

Invariants, asserted by :meth:`AddressManager.check`:

1. free extents are disjoint, sorted, non-empty, and no two touch;
2. every start and size is a multiple of the alignment;
3. free bytes + allocated bytes = heap bytes, and no free extent leaves the heap.

What is free is known exactly, so a free of bytes that are free already, in whole or in part, is
always refused. Which allocation a byte belongs to is not kept: any aligned part of the allocated
bytes may be freed, also parts of two neighbouring allocations at once.

One lock, taken once an operation; statistics and snapshots are taken under it too.

An exception raised inside an operation, from a signal handler or for want of memory, undoes that
operation. If it strikes after the last change, before the caller has the result, the operation
stands: an address that nobody got to know stays allocated, and ``snapshot`` shows the gap.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index as as_index
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import (
    Extents,
    Int64Array,
    as_extents,
    joined,
    merged,
    overlap_of,
    place_blocks,
)
from kvheap.addresses.free_list import FreeList
from kvheap.errors import (
    DoubleFreeError,
    HeapCorruptionError,
    InvalidFreeError,
    NegativeBatchSizeError,
    OutOfMemoryError,
)

__all__ = ["AddressManager", "HeapStats"]

ADDRESS_BITS = 63
"""Addresses are int64: a heap ends below ``2**63``."""

MIN_REBUILD_RUNS = 64
REBUILD_SHARE = 32
"""A batch rebuilds the free list when its runs are more than 64 and more than a 32nd of the
extents. To free R lone pages among F extents took, walking and rebuilding: R = 64, F = 64, 162 and
123 us; R = 64, F = 1,024, 202 and 156; R = 256, F = 8,192, 772 and 707; R = 1,024, F = 65,536,
3.6 and 5.7 ms; R = 4,096, F = 65,536, 14.1 and 6.4 ms (2-core AMD EPYC, CPython 3.11)."""


@dataclass(frozen=True, slots=True)
class HeapStats:
    """The heap at one moment; all in bytes but ``free_extents``, a count."""

    heap_bytes: int
    allocated_bytes: int
    free_bytes: int
    largest_free_bytes: int
    free_extents: int

    @property
    def utilization(self) -> float:
        """Allocated bytes over heap bytes, 0.0 to 1.0; an empty heap counts as full."""
        return self.allocated_bytes / self.heap_bytes if self.heap_bytes else 1.0


class AddressManager:
    """A thread-safe best-fit allocator of addresses.

    Args:
        size: bytes of the address space; rounded down to the alignment, 0 is legal.
        align_bytes: a power of two; every address and allocated size is a multiple of it.

    Raises:
        ValueError: ``size`` is negative or 2**63 or more, or ``align_bytes`` is not a positive
            power of two.

    >>> heap = AddressManager(1 << 20)
    >>> heap.allocate(5000)
    (0, 8192)
    >>> batch = heap.batched_allocate(4096, 3)
    >>> list(batch)
    [(8192, 4096), (12288, 4096), (16384, 4096)]
    >>> heap.batched_free(batch)
    >>> heap.free(0, 8192)
    >>> heap.get_free_size() == heap.get_heap_size() == 1 << 20
    True
    """

    ALIGN_BYTES = 4096

    def __init__(self, size: int, align_bytes: int = ALIGN_BYTES) -> None:
        size = as_integer("size", size)
        align_bytes = as_integer("align_bytes", align_bytes)
        if align_bytes <= 0 or align_bytes & (align_bytes - 1):
            raise ValueError(f"align_bytes must be a positive power of two, got {align_bytes}")
        if size < 0:
            raise ValueError(f"size must be non-negative, got {size}")
        _require_addressable(size)
        self._set_up(size // align_bytes, align_bytes)

    @classmethod
    def of_pages(cls, num_pages: int, page_bytes: int) -> AddressManager:
        """An address space of whole pages, whose size need not be a power of two.

        Args:
            num_pages: how many, 0 is legal.
            page_bytes: bytes of each, the alignment of every address and allocated size.

        Raises:
            ValueError: ``num_pages`` is negative, ``page_bytes`` not positive, or the address
                space would end at 2**63 or beyond.

        >>> AddressManager.of_pages(10, page_bytes=576).batched_allocate(500, 2)[1]
        (576, 576)
        """
        num_pages = as_integer("num_pages", num_pages)
        page_bytes = as_integer("page_bytes", page_bytes)
        if num_pages < 0 or page_bytes <= 0:
            raise ValueError(
                f"num_pages must be non-negative and page_bytes positive, got {num_pages} "
                f"and {page_bytes}"
            )
        _require_addressable(num_pages * page_bytes)
        manager = cls.__new__(cls)
        manager._set_up(num_pages, page_bytes)
        return manager

    def _set_up(self, heap_units: int, unit_bytes: int) -> None:
        self._unit = unit_bytes
        self._heap_bytes = heap_units * unit_bytes
        self._lock = threading.Lock()
        self._free_list = FreeList(Extents.of(0, heap_units), heap_units)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def align_bytes(self) -> int:
        """The alignment of every address and allocated size."""
        return self._unit

    def compute_aligned_size(self, size: int) -> int:
        """``size`` rounded up to the alignment, in bytes."""
        return -(-size // self._unit) * self._unit

    def get_heap_size(self) -> int:
        """Bytes of the address space."""
        return self._heap_bytes

    def get_free_size(self) -> int:
        """Free bytes, over all extents."""
        return self.stats().free_bytes

    @property
    def total_allocated_size(self) -> int:
        """Allocated bytes."""
        return self.stats().allocated_bytes

    def stats(self) -> HeapStats:
        """A consistent snapshot of the counters. O(1)."""
        with self._lock:
            free_list, unit = self._settled_free_list(), self._unit
            free_bytes = free_list.free_units * unit
            return HeapStats(
                heap_bytes=self._heap_bytes,
                allocated_bytes=self._heap_bytes - free_bytes,
                free_bytes=free_bytes,
                largest_free_bytes=free_list.largest * unit,
                free_extents=len(free_list),
            )

    def snapshot(self) -> Int64Array:
        """All free extents at one moment. O(F).

        Returns:
            Start and size of each in bytes, int64 ``[F, 2]``, in address order.
        """
        with self._lock:
            extents = self._settled_free_list().extents()
        return np.stack(extents, axis=1) * self._unit

    def max_batch(self, size: int) -> int:
        """How many blocks of ``size`` bytes one ``batched_allocate`` could have now.

        O(R) for the R extents that fit one; where they are a large part of the F extents, O(F)
        in array operations.

        Args:
            size: bytes of each block, at least 1; rounded up to the alignment.

        Raises:
            ValueError: ``size`` is not positive.
        """
        units = self._units_of_request(size)
        with self._lock:
            free_list = self._settled_free_list()
            return free_list.max_blocks(units, _max_steps(free_list))

    # -- allocate ------------------------------------------------------------------------------

    def allocate(self, size: int) -> tuple[int, int]:
        """Allocate one extent. O(log F).

        Args:
            size: bytes, at least 1; rounded up to the alignment.

        Returns:
            ``(address, allocated_size)`` in bytes.

        Raises:
            ValueError: ``size`` is not positive.
            OutOfMemoryError: no free extent is large enough; nothing changes.
        """
        units = self._units_of_request(size)
        unit = self._unit
        with self._lock:
            free_list = self._free_list
            if free_list.pending:
                free_list.rollback()
            try:
                start = free_list.take(units)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise
            if start is None:
                raise self._out_of_memory(units)
        return start * unit, units * unit

    def batched_allocate(
        self, size: int, batch_size: int, allow_partial: bool = False
    ) -> AddressBatch:
        """Allocate ``batch_size`` blocks of ``size`` bytes in the fewest runs.

        One extent holds them if one can, the smallest such; else the largest extents in turn.
        O(R log F) for the R runs; where they are a large part of the F extents, O(F) in array
        operations.

        Args:
            size: bytes of each block, at least 1; rounded up to the alignment.
            batch_size: number of blocks; 0 gives an empty batch.
            allow_partial: when they do not all fit, allocate as many as do, also none at all.

        Returns:
            The blocks in address order.

        Raises:
            ValueError: ``size`` is not positive.
            NegativeBatchSizeError: ``batch_size`` is negative.
            OutOfMemoryError: the blocks do not all fit, and ``allow_partial`` is false; nothing
                changes.
        """
        units = self._units_of_request(size)
        if type(batch_size) is not int:
            batch_size = as_integer("batch_size", batch_size)
        if batch_size < 0:
            raise NegativeBatchSizeError(batch_size)
        if batch_size == 0:
            return AddressBatch(units * self._unit, [], [])
        with self._lock:
            free_list = self._settled_free_list()
            try:
                batch = self._take_batch(free_list, units, batch_size, allow_partial)
                free_list.commit()
            except BaseException:
                self._free_list = free_list
                free_list.rollback()
                raise
        return batch

    def _take_batch(
        self, free_list: FreeList, units: int, batch_size: int, allow_partial: bool
    ) -> AddressBatch:
        unit = self._unit
        start = free_list.take(units * batch_size)
        if start is not None:
            return AddressBatch(units * unit, [start * unit], [batch_size])
        if units * batch_size > free_list.free_units and not allow_partial:
            raise self._out_of_memory(units * batch_size)
        runs = free_list.fewest_runs(units, batch_size, _max_steps(free_list))
        if runs is None:
            starts, counts, left = place_blocks(free_list.extents(), units, batch_size)
            if not allow_partial and counts.sum() < batch_size:
                raise self._out_of_memory(units * batch_size)
            batch = AddressBatch(units * unit, starts * unit, counts)
            self._free_list = FreeList(left, self._heap_bytes // unit, free_list.walls)
            return batch
        if not allow_partial and sum(count for _, count in runs) < batch_size:
            raise self._out_of_memory(units * batch_size)
        for start, count in runs:
            free_list.carve(start, count * units)
        runs.sort()
        return AddressBatch(
            units * unit, [start * unit for start, _ in runs], [count for _, count in runs]
        )

    # -- free ----------------------------------------------------------------------------------

    def free(self, address: int, size: int) -> None:
        """Free one extent and join it with its free neighbours. O(log F).

        Args:
            address: its start, as allocated.
            size: its allocated bytes.

        Raises:
            DoubleFreeError: some of its bytes are free already; nothing changes.
            InvalidFreeError: it is empty, misaligned or outside the heap; nothing changes.
        """
        if type(address) is not int or type(size) is not int:
            address, size = as_integer("address", address), as_integer("size", size)
        unit = self._unit
        with self._lock:
            free_list = self._free_list
            if free_list.pending:
                free_list.rollback()
            if (
                size <= 0
                or address < 0
                or address % unit
                or size % unit
                or address + size > self._heap_bytes
                or (free_list.walls and self._has_wall(address, size))
            ):
                raise self._not_freeable(address, size)
            try:
                overlapping = free_list.insert(address // unit, size // unit)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise
            if overlapping is not None:
                raise self._double_free(address, size, overlapping)

    def batched_free(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None = None,
    ) -> None:
        """Free many extents, all or none, in any order.

        O(R log F) after sorting, for the R runs that neighbours among them form; where R is a
        large part of the F extents, O(F) in array operations.

        Args:
            blocks: an :class:`AddressBatch`; or ``(address, size)`` pairs, also as an integer
                ``[N, 2]`` array; or, with ``sizes``, an integer array of addresses ``[N]``.
            sizes: bytes of each extent, ``[N]``, or one number for all.

        Raises:
            DoubleFreeError: bytes are free already, or named twice here; nothing changes.
            InvalidFreeError: an extent is empty, misaligned or outside the heap; nothing changes.
            TypeError: the addresses or sizes are not integers.
            ValueError: the shapes do not belong together.
        """
        if isinstance(blocks, AddressBatch) and sizes is None:
            if blocks.num_runs == 1:
                self.free(*blocks.run_pairs()[0])
                return
            extents = Extents(blocks.run_starts, blocks.run_counts * blocks.block_bytes)
        else:
            extents = as_extents(blocks, sizes)
        # Blocks of a segment exist only after its wall: to look before the lock misses none.
        extents = merged(extents, self._free_list.wall_array * self._unit)
        if not len(extents.starts):
            return
        with self._lock:
            free_list = self._settled_free_list()
            self._require_inside(extents)
            runs = Extents(extents.starts // self._unit, extents.sizes // self._unit)
            if len(runs.starts) > _max_steps(free_list):
                self._free_by_rebuilding(free_list, runs)
                return
            pairs = list(zip(runs.starts.tolist(), runs.sizes.tolist(), strict=True))
            for start, size in pairs:
                overlapping = free_list.overlapping(start, start + size)
                if overlapping is not None:
                    raise self._double_free(start * self._unit, size * self._unit, overlapping)
            try:
                for start, size in pairs:
                    free_list.insert(start, size)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise

    def _free_by_rebuilding(self, free_list: FreeList, runs: Extents) -> None:
        """``insert`` for very many disjoint runs, as array operations on all extents."""
        free, unit = free_list.extents(), self._unit
        overlap = overlap_of(free, runs)
        if overlap is not None:
            extent, run = overlap
            raise self._double_free(
                int(runs.starts[run]) * unit,
                int(runs.sizes[run]) * unit,
                (int(free.starts[extent]), int(free.ends[extent])),
            )
        starts = np.concatenate((free.starts, runs.starts))
        order = np.argsort(starts, kind="stable")  # finds the two sorted halves and merges them
        sizes = np.concatenate((free.sizes, runs.sizes))
        extents = joined(Extents(starts[order], sizes[order]), free_list.wall_array)
        self._free_list = FreeList(extents, self._heap_bytes // unit, free_list.walls)

    # -- the heap's end ------------------------------------------------------------------------

    def sbrk(self, size: int, new_segment: bool = False) -> None:
        """Grow the address space at its end. O(log F).

        Args:
            size: bytes to add, a multiple of the alignment; 0 adds nothing.
            new_segment: the new bytes live elsewhere than those before: nothing is ever
                allocated across the boundary.

        Raises:
            ValueError: ``size`` is negative or not a multiple of the alignment, or the heap
                would end at 2**63 or beyond.
        """
        size = as_integer("size", size)
        unit = self._unit
        if size < 0 or size % unit:
            raise ValueError(
                f"size must be a non-negative multiple of align_bytes ({unit}), got {size}"
            )
        if size == 0:
            return
        with self._lock:
            free_list, before = self._settled_free_list(), self._heap_bytes
            after = before + size
            _require_addressable(after)
            # What was trimmed took its walls with it.
            walls = frozenset(wall for wall in free_list.walls if wall * unit < before)
            if new_segment and before:
                walls |= {before // unit}
            if walls != free_list.walls or not free_list.can_hold(after // unit):
                free_list = FreeList(free_list.extents(), after // unit, walls)
                self._free_list = free_list
            try:
                free_list.insert(before // unit, size // unit)
                self._heap_bytes = after
                free_list.commit()
            except BaseException:
                self._heap_bytes = before
                free_list.rollback()
                raise

    def trim(self) -> int:
        """Give back the free tail of the address space, the opposite of :meth:`sbrk`. O(log F).

        Of several segments, at most the last.

        Returns:
            How many bytes the heap lost: 0 when its last byte is allocated.
        """
        with self._lock:
            free_list, before = self._settled_free_list(), self._heap_bytes
            units = free_list.tail(before // self._unit)
            if not units:
                return 0
            try:
                free_list.cut_tail(units)
                self._heap_bytes = before - units * self._unit
                free_list.commit()
            except BaseException:
                self._heap_bytes = before
                free_list.rollback()
                raise
        return units * self._unit

    # -- invariants ----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant of the module's docstring. O(F log F).

        Raises:
            HeapCorruptionError: names the broken invariant and shows the state.
        """
        with self._lock:
            if self._heap_bytes % self._unit:
                raise HeapCorruptionError(
                    f"the heap's {self._heap_bytes} bytes are not aligned to {self._unit}"
                )
            self._settled_free_list().check(self._heap_bytes // self._unit)

    def check_consistency(self) -> bool:
        """Whether :meth:`check` finds every invariant holding."""
        try:
            self.check()
        except HeapCorruptionError:
            return False
        return True

    def __repr__(self) -> str:
        """The counters and the alignment."""
        return f"AddressManager({self.stats()}, align_bytes={self._unit})"

    # -- helpers, called with the lock held ----------------------------------------------------

    def _settled_free_list(self) -> FreeList:
        free_list = self._free_list
        if free_list.pending:
            free_list.rollback()
        return free_list

    def _out_of_memory(self, units: int) -> OutOfMemoryError:
        free_list, unit = self._free_list, self._unit
        return OutOfMemoryError(units * unit, free_list.free_units * unit, free_list.largest * unit)

    def _has_wall(self, address: int, size: int) -> bool:
        walls = self._free_list.wall_array * self._unit
        after = int(np.searchsorted(walls, address, side="right"))
        return after < len(walls) and int(walls[after]) < address + size

    def _require_inside(self, extents: Extents) -> None:
        """Refuse extents in address order that are misaligned or leave the heap."""
        starts, sizes = extents
        misaligned = (starts % self._unit != 0) | (sizes % self._unit != 0)
        if misaligned.any():
            at = int(np.argmax(misaligned))
        elif starts[0] < 0:
            at = 0
        elif starts[-1] + sizes[-1] > self._heap_bytes:
            at = -1
        else:
            return
        raise self._not_freeable(int(starts[at]), int(sizes[at]))

    def _not_freeable(self, start: int, size: int) -> InvalidFreeError:
        extent = f"[{start}, {start + size})"
        if size <= 0:
            return InvalidFreeError(f"cannot free {size} bytes at {start}: size must be positive")
        if start % self._unit or size % self._unit:
            return InvalidFreeError(f"cannot free {extent}: not aligned to {self._unit}")
        if start >= 0 and start + size <= self._heap_bytes:
            return InvalidFreeError(f"cannot free {extent}: it spans two segments of the heap")
        return InvalidFreeError(f"cannot free {extent}: outside the heap [0, {self._heap_bytes})")

    def _double_free(self, start: int, size: int, overlapping: tuple[int, int]) -> DoubleFreeError:
        unit = self._unit
        return DoubleFreeError(
            f"cannot free [{start}, {start + size}): "
            f"[{overlapping[0] * unit}, {overlapping[1] * unit}) is free already"
        )

    # -- helpers without state -----------------------------------------------------------------

    def _units_of_request(self, size: int) -> int:
        if type(size) is not int:
            size = as_integer("size", size)
        if size <= 0:
            raise ValueError(f"size must be greater than 0, got {size}")
        return -(-size // self._unit)


def _max_steps(free_list: FreeList) -> int:
    """From how many runs on rebuilding the free list beats walking it."""
    return max(MIN_REBUILD_RUNS, len(free_list) // REBUILD_SHARE)


def as_integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return as_index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _require_addressable(heap_bytes: int) -> None:
    if heap_bytes >> ADDRESS_BITS:
        raise ValueError(f"a heap must end below 2**{ADDRESS_BITS}, got {heap_bytes} bytes")
