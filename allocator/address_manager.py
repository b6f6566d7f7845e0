"""``AddressManager``: hands out extents of one virtual address space that starts at 0.

It knows addresses and sizes only: no tensor, no device. Address-ordered best fit over
:class:`~kvheap.free_list.FreeList`: the smallest free extent that holds the request, the lowest
address among equals, carved from its low end. Names and results follow LMCache's class of the
same name (LMCache 0.5.6, ``lmcache/v1/memory_management.py``), which is a first-fit walk.

Invariants, asserted by :meth:`AddressManager.check`:

1. free extents are disjoint, sorted, non-empty, and no two touch;
2. every start and size is a multiple of the alignment;
3. free bytes + allocated bytes = heap bytes, and no free extent leaves the heap.

What is free is known exactly, so a free of bytes that are free already, in whole or in part, is
always refused. Which allocation a byte belongs to is not kept: any aligned part of the allocated
bytes may be freed, also parts of two neighbouring allocations at once.

One lock, taken once an operation. An exception raised inside an operation, from a signal handler
too, undoes that operation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index as as_index
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.address_batch import AddressBatch
from kvheap.errors import (
    DoubleFreeError,
    HeapCorruptionError,
    InvalidFreeError,
    NegativeBatchSizeError,
    OutOfMemoryError,
)
from kvheap.free_list import ADDRESS_BITS, FreeList

__all__ = ["AddressManager", "HeapStats"]

Int64Array = npt.NDArray[np.int64]


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
        size = _integer("size", size)
        align_bytes = _integer("align_bytes", align_bytes)
        if align_bytes <= 0 or align_bytes & (align_bytes - 1):
            raise ValueError(f"align_bytes must be a positive power of two, got {align_bytes}")
        if size < 0:
            raise ValueError(f"size must be non-negative, got {size}")
        _require_addressable(size)
        self._align_bytes = align_bytes
        self._heap_bytes = size & -align_bytes
        self._lock = threading.Lock()
        self._free_list = _free_list_of(self._heap_bytes)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def align_bytes(self) -> int:
        """The alignment of every address and allocated size."""
        return self._align_bytes

    def compute_aligned_size(self, size: int) -> int:
        """``size`` rounded up to the alignment, in bytes."""
        return (size + self._align_bytes - 1) & -self._align_bytes

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
            free_list = self._settled_free_list()
            return HeapStats(
                heap_bytes=self._heap_bytes,
                allocated_bytes=self._heap_bytes - free_list.free_bytes,
                free_bytes=free_list.free_bytes,
                largest_free_bytes=free_list.largest,
                free_extents=len(free_list),
            )

    def free_extents(self) -> tuple[Int64Array, Int64Array]:
        """A consistent snapshot of all free extents. O(F).

        Returns:
            Starts and sizes in bytes, int64 ``[F]`` each, in address order.
        """
        with self._lock:
            return self._settled_free_list().arrays()

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
        aligned_size = self._aligned_request(size)
        with self._lock:
            free_list = self._settled_free_list()
            address = free_list.best_fit(aligned_size)
            if address is None:
                raise self._out_of_memory(aligned_size)
            try:
                free_list.carve(address, aligned_size)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise
        return address, aligned_size

    def batched_allocate(self, size: int, batch_size: int) -> AddressBatch:
        """Allocate ``batch_size`` blocks of ``size`` bytes, all or none, in the fewest runs.

        O(R log F) for the R runs; where they are a large part of the F extents, O(F) in array
        operations.

        Args:
            size: bytes of each block, at least 1; rounded up to the alignment.
            batch_size: number of blocks; 0 gives an empty batch.

        Returns:
            The blocks in address order.

        Raises:
            ValueError: ``size`` is not positive.
            NegativeBatchSizeError: ``batch_size`` is negative.
            OutOfMemoryError: the blocks do not all fit; nothing changes.
        """
        block_bytes = self._aligned_request(size)
        batch_size = _integer("batch_size", batch_size)
        if batch_size < 0:
            raise NegativeBatchSizeError(batch_size)
        if batch_size == 0:
            return AddressBatch(block_bytes, np.empty(0, np.int64), np.empty(0, np.int64))
        with self._lock:
            free_list = self._settled_free_list()
            if block_bytes * batch_size > free_list.free_bytes:
                raise self._out_of_memory(block_bytes * batch_size)
            runs = free_list.fewest_runs(block_bytes, batch_size, _max_steps(free_list))
            if runs is None:
                return self._allocate_by_rebuilding(block_bytes, batch_size)
            try:
                for start, count in runs:
                    free_list.carve(start, count * block_bytes)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise
        runs.sort()
        return AddressBatch(
            block_bytes,
            np.array([start for start, _ in runs], np.int64),
            np.array([count for _, count in runs], np.int64),
        )

    def _allocate_by_rebuilding(self, block_bytes: int, batch_size: int) -> AddressBatch:
        """``fewest_runs`` and ``carve`` for very many runs, as array operations on all extents."""
        starts, sizes = self._free_list.arrays()
        by_size = np.argsort(-sizes, kind="stable")
        fitting = sizes[by_size] // block_bytes
        total = np.cumsum(fitting)
        if not len(total) or total[-1] < batch_size:
            raise self._out_of_memory(block_bytes * batch_size)
        last = int(np.searchsorted(total, batch_size))
        rest = batch_size - (int(total[last - 1]) if last else 0)
        # Extents are in descending order: the last that still holds the rest is the best fit,
        # the first of its size has the lowest address.
        smallest = int(np.searchsorted(-fitting, -rest, side="right")) - 1
        best = int(np.searchsorted(-sizes[by_size], -sizes[by_size[smallest]]))
        taken = np.append(by_size[:last], by_size[max(best, last)])
        counts = np.append(fitting[:last], rest)
        run_starts = starts[taken]
        starts[taken] += counts * block_bytes
        sizes[taken] -= counts * block_bytes
        left = sizes > 0
        self._free_list = FreeList(starts[left], sizes[left])
        in_address_order = np.argsort(run_starts)
        return AddressBatch(block_bytes, run_starts[in_address_order], counts[in_address_order])

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
        address = _integer("address", address)
        size = _integer("size", size)
        with self._lock:
            free_list = self._settled_free_list()
            self._require_freeable(address, size)
            try:
                free_list.insert(address, size)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise

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
            starts, lengths = blocks.run_starts, blocks.run_counts * blocks.block_bytes
        else:
            starts, lengths = _extent_arrays(blocks, sizes)
        if not len(starts):
            return
        starts, lengths = _merged_runs(starts, lengths)
        with self._lock:
            free_list = self._settled_free_list()
            if len(starts) > _max_steps(free_list):
                self._free_by_rebuilding(starts, lengths)
                return
            runs = list(zip(starts.tolist(), lengths.tolist(), strict=True))
            for start, length in runs:
                self._require_freeable(start, length)
            try:
                for start, length in runs:
                    free_list.insert(start, length)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise

    def _free_by_rebuilding(self, starts: Int64Array, lengths: Int64Array) -> None:
        """``insert`` for very many disjoint runs, as array operations on all extents."""
        ends = starts + lengths
        free_starts, free_sizes = self._free_list.arrays()
        free_ends = free_starts + free_sizes
        after = np.searchsorted(free_starts, starts, side="right")
        wrong = (lengths <= 0) | (starts < 0) | (ends > self._heap_bytes)
        wrong |= ((starts | lengths) & (self._align_bytes - 1)) != 0
        wrong |= np.append(-1, free_ends)[after] > starts
        wrong |= np.append(free_starts, np.iinfo(np.int64).max)[after] < ends
        if wrong.any():
            first = int(np.argmax(wrong))
            self._require_freeable(int(starts[first]), int(lengths[first]))
            raise HeapCorruptionError(f"the free list disagrees with itself: {self._free_list}")
        all_starts = np.concatenate((free_starts, starts))
        order = np.argsort(all_starts, kind="stable")
        all_sizes = np.concatenate((free_sizes, lengths))
        self._free_list = FreeList(*_joined(all_starts[order], all_sizes[order]))

    # -- the heap's end ------------------------------------------------------------------------

    def sbrk(self, size: int) -> None:
        """Grow the address space at its end. O(log F).

        Args:
            size: bytes to add, a multiple of the alignment; 0 adds nothing.

        Raises:
            ValueError: ``size`` is negative or not a multiple of the alignment, or the heap
                would end at 2**63 or beyond.
        """
        size = _integer("size", size)
        if size < 0 or size % self._align_bytes:
            raise ValueError(
                f"size must be a non-negative multiple of align_bytes "
                f"({self._align_bytes}), got {size}"
            )
        if size == 0:
            return
        with self._lock:
            free_list = self._settled_free_list()
            before = self._heap_bytes
            _require_addressable(before + size)
            try:
                free_list.insert(before, size)
                self._heap_bytes = before + size
                free_list.commit()
            except BaseException:
                self._heap_bytes = before
                free_list.rollback()
                raise

    # -- invariants ----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant of the module's docstring. O(F log F).

        Raises:
            HeapCorruptionError: names the broken invariant and shows the state.
        """
        with self._lock:
            if self._heap_bytes % self._align_bytes:
                raise HeapCorruptionError(
                    f"the heap's {self._heap_bytes} bytes are not aligned to {self._align_bytes}"
                )
            self._settled_free_list().check(self._heap_bytes, self._align_bytes)

    def check_consistency(self) -> bool:
        """Whether :meth:`check` finds every invariant holding."""
        try:
            self.check()
        except HeapCorruptionError:
            return False
        return True

    def __repr__(self) -> str:
        """The counters and the alignment."""
        return f"AddressManager({self.stats()}, align_bytes={self._align_bytes})"

    # -- helpers, called with the lock held ----------------------------------------------------

    def _settled_free_list(self) -> FreeList:
        free_list = self._free_list
        if free_list.interrupted:
            free_list.rollback()
        return free_list

    def _out_of_memory(self, requested_bytes: int) -> OutOfMemoryError:
        free_list = self._free_list
        return OutOfMemoryError(requested_bytes, free_list.free_bytes, free_list.largest)

    def _require_freeable(self, start: int, size: int) -> None:
        extent = f"[{start}, {start + size})"
        if size <= 0:
            raise InvalidFreeError(f"cannot free {size} bytes at {start}: size must be positive")
        if (start | size) & (self._align_bytes - 1):
            raise InvalidFreeError(f"cannot free {extent}: not aligned to {self._align_bytes}")
        if start < 0 or start + size > self._heap_bytes:
            raise InvalidFreeError(
                f"cannot free {extent}: outside the heap [0, {self._heap_bytes})"
            )
        free = self._free_list.overlapping(start, start + size)
        if free is not None:
            raise DoubleFreeError(
                f"cannot free {extent}: [{free[0]}, {free[0] + free[1]}) is free already"
            )

    # -- helpers without state -----------------------------------------------------------------

    def _aligned_request(self, size: int) -> int:
        if type(size) is not int:
            size = _integer("size", size)
        if size <= 0:
            raise ValueError(f"size must be greater than 0, got {size}")
        return (size + self._align_bytes - 1) & -self._align_bytes


def _max_steps(free_list: FreeList) -> int:
    """From how many runs on rebuilding the free list beats walking it."""
    return max(64, len(free_list) // 8)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return as_index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _require_addressable(heap_bytes: int) -> None:
    if heap_bytes >> ADDRESS_BITS:
        raise ValueError(f"a heap must end below 2**{ADDRESS_BITS}, got {heap_bytes} bytes")


def _free_list_of(heap_bytes: int) -> FreeList:
    extents = [(0, heap_bytes)] if heap_bytes else []
    table = np.array(extents, np.int64).reshape(-1, 2)
    return FreeList(table[:, 0], table[:, 1])


def _integer_array(name: str, values: npt.ArrayLike) -> Int64Array:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype} ({array.flat[0]!r}, ...)")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise InvalidFreeError(f"{name} must be below 2**{ADDRESS_BITS}, got {array.max()}")
    return array.astype(np.int64, copy=False)


def _extent_arrays(
    blocks: Iterable[tuple[int, int]] | npt.ArrayLike, sizes: npt.ArrayLike | None
) -> tuple[Int64Array, Int64Array]:
    """Starts and lengths, int64 ``[N]`` each, from pairs or from addresses with sizes."""
    values: Any = blocks
    if not isinstance(blocks, (np.ndarray, Sequence)):
        values = list(values)
    if sizes is None:
        pairs = _integer_array("(address, size) pairs", values)
        if pairs.size == 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"blocks must be (address, size) pairs, got shape {pairs.shape}")
        return pairs[:, 0], pairs[:, 1]
    addresses = _integer_array("addresses", values)
    lengths = _integer_array("sizes", sizes)
    if addresses.ndim != 1 or lengths.ndim > 1:
        raise ValueError(
            f"addresses must be one-dimensional with one size each or one for all, "
            f"got shapes {addresses.shape} and {lengths.shape}"
        )
    if lengths.ndim == 1 and len(lengths) != len(addresses):
        raise ValueError(f"got {len(addresses)} addresses but {len(lengths)} sizes")
    return addresses, np.broadcast_to(lengths, addresses.shape)


def _merged_runs(starts: Int64Array, lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """The extents in address order, neighbours joined; refuses what is empty or named twice."""
    if len(starts) > 1 and not (starts[1:] > starts[:-1]).all():
        order = np.argsort(starts, kind="stable")
        starts, lengths = starts[order], lengths[order]
    if (lengths <= 0).any():
        first = int(np.argmax(lengths <= 0))
        raise InvalidFreeError(
            f"cannot free {lengths[first]} bytes at {starts[first]}: size must be positive"
        )
    ends = starts + lengths
    if (ends < starts).any():
        first = int(np.argmax(ends < starts))
        raise InvalidFreeError(
            f"cannot free {lengths[first]} bytes at {starts[first]}: beyond any heap"
        )
    overlap = ends[:-1] > starts[1:]
    if overlap.any():
        first = int(np.argmax(overlap))
        raise DoubleFreeError(
            f"cannot free [{starts[first + 1]}, {ends[first + 1]}): "
            f"[{starts[first]}, {ends[first]}) is freed in the same call"
        )
    return _joined(starts, lengths)


def _joined(starts: Int64Array, lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Disjoint extents in address order with those that touch made one."""
    ends = starts + lengths
    is_first = np.append(True, starts[1:] != ends[:-1])
    is_last = np.append(is_first[1:], True)
    return starts[is_first], ends[is_last] - starts[is_first]
