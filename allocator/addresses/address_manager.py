"""``AddressManager``: allocates extents of one virtual address space that starts at 0.

It knows addresses and sizes only: no tensor, no device. The policy is address-ordered best fit:
the smallest free extent that holds the request, among equals the one with the lowest address,
carved from its low end. Names and results follow LMCache's class of the same name (LMCache 0.5.6,
``lmcache/v1/memory_management.py``), which uses first fit.

Invariants, asserted by :meth:`AddressManager.check`:

1. free extents are disjoint, sorted, non-empty, and no two touch, except where a segment begins;
2. every start and size is a multiple of the alignment;
3. free bytes + allocated bytes = heap bytes, and no free extent leaves the heap.

The manager knows exactly which bytes are free, so it always refuses to free bytes that are free
already, in whole or in part. It does not record which allocation a byte belongs to: any aligned
part of the allocated bytes may be freed, even parts of two neighbouring allocations at once.

Each operation takes one lock once, and so do statistics and snapshots.

An exception raised inside an operation, by a signal handler or for lack of memory, undoes that
operation. If it strikes after the last change but before the caller has the result, the operation
stands: the address that was not returned stays allocated, and ``snapshot`` shows the gap. A
:class:`Receipt` tells which of the two happened.

A finalizer or a signal handler may call the manager inside an operation on the same thread (see
``kvheap/guards.py``): a free is then done by the next operation, an allocation, ``sbrk`` and
``trim`` raise ``ReentrantCallError``, and everything else answers from the state before the
operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvheap.addresses import bulk
from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.arguments import require_count, require_flags
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.addresses.free_list import Done, FreeList, Receipt
from kvheap.addresses.free_requests import (
    as_extents,
    double_free,
    invalid_free,
    merged,
    require_inside,
)
from kvheap.addresses.heap_stats import HeapStats
from kvheap.addresses.integers import as_integer, round_up
from kvheap.addresses.reservations import as_reservation, without
from kvheap.addresses.spares import MAX_SPARES, Spares
from kvheap.errors import (
    HeapCorruptionError,
    NegativeBatchSizeError,
    OutOfMemoryError,
    ReentrantCallError,
)
from kvheap.guards import Deferred, DeferredCall, Guard, is_inside_section, section

__all__ = ["AddressManager"]

Answer = TypeVar("Answer")

ADDRESS_BITS = 63
"""Addresses are int64: a heap ends below ``2**63``."""


class AddressManager:
    """A thread-safe best-fit allocator of addresses.

    Methods by purpose:

    - allocate: :meth:`allocate`, :meth:`batched_allocate`, :meth:`max_batch`, :meth:`reserve`;
    - free: :meth:`free`, :meth:`batched_free`;
    - grow and shrink: :meth:`sbrk`, :meth:`trim`;
    - sizes: :meth:`get_heap_size`, :meth:`get_free_size`, :attr:`total_allocated_size`,
      :attr:`align_bytes`, :meth:`compute_aligned_size`;
    - the whole state: :meth:`stats`, :meth:`snapshot`;
    - invariants: :meth:`check`, :meth:`check_consistency`;
    - for a heap that holds the guard itself: :attr:`guard`, :meth:`take`, :meth:`give_back`,
      :meth:`give_back_batch`, :meth:`give_back_batches`, :meth:`take_spare`,
      :meth:`give_back_spare`, :meth:`was_given_back`, :meth:`extend`, :attr:`heap_bytes`,
      :meth:`free_extents`, :meth:`finish`.

    Args:
        size: bytes of the address space, rounded down to the alignment; 0 is allowed.
        align_bytes: a power of two; every address and allocated size is a multiple of it. See
            :meth:`of_pages` for other multiples.

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
            num_pages: how many pages; 0 is allowed.
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
        _require_addressable(num_pages * page_bytes, f" ({num_pages} pages of {page_bytes} bytes)")
        manager = cls.__new__(cls)
        manager._set_up(num_pages, page_bytes)
        return manager

    def _set_up(self, heap_units: int, unit_bytes: int) -> None:
        self._unit = unit_bytes
        self.guard = Guard()
        """Protects the free list; a heap that is built on this manager shares it."""
        self._deferred = Deferred(self.guard)
        self._free_list = FreeList(Extents.of(0, heap_units), heap_units)
        self._spares = Spares()
        self._keeps_spares = True
        self._last_moved: AddressBatch | None = None

    @property
    def align_bytes(self) -> int:
        """The alignment of every address and allocated size."""
        return self._unit

    def compute_aligned_size(self, size: int) -> int:
        """``size`` rounded up to the alignment, in bytes.

        Raises:
            TypeError: ``size`` is not an integer.
            ValueError: ``size`` is negative.
        """
        return round_up(require_count("size", size), self._unit)

    def get_heap_size(self) -> int:
        """Bytes of the address space."""
        return self._look(lambda free_list: free_list.end) * self._unit

    def get_free_size(self) -> int:
        """Free bytes, over all extents."""
        return self.stats().free_bytes

    @property
    def total_allocated_size(self) -> int:
        """Allocated bytes."""
        return self.stats().allocated_bytes

    def stats(self) -> HeapStats:
        """A consistent snapshot of the counters. O(1)."""
        return self._look(self._stats_of)

    def _stats_of(self, free_list: FreeList) -> HeapStats:
        unit = self._unit
        heap_bytes, free_bytes = free_list.end * unit, free_list.free_units * unit
        return HeapStats(
            heap_bytes=heap_bytes,
            allocated_bytes=heap_bytes - free_bytes,
            free_bytes=free_bytes,
            largest_free_bytes=free_list.largest * unit,
            free_extents=len(free_list),
        )

    def snapshot(self) -> Int64Array:
        """All free extents at one moment. O(F).

        Returns:
            Start and size of each in bytes, int64 ``[F, 2]``, in address order.
        """
        return np.stack(self._look(FreeList.extents), axis=1) * self._unit

    def max_batch(self, size: int) -> int:
        """How many blocks of ``size`` bytes one ``batched_allocate`` could return now.

        O(R) for the R extents that fit a block; if they are a large part of the F extents, O(F) in
        array operations.

        Args:
            size: bytes of each block, at least 1; rounded up to the alignment.

        Raises:
            ValueError: ``size`` is not positive.
        """
        units = -(-_positive(size) // self._unit)
        return self._look(lambda free_list: bulk.max_batch(free_list, units))

    @section
    def allocate(self, size: int) -> tuple[int, int]:
        """Allocate one extent. O(log F).

        Args:
            size: bytes, at least 1; rounded up to the alignment.

        Returns:
            ``(address, allocated_size)`` in bytes.

        Raises:
            ValueError: ``size`` is not positive.
            OutOfMemoryError: no free extent is large enough; nothing changes.
            ReentrantCallError: the calling thread is inside an operation; nothing changes.
        """
        if type(size) is not int or size <= 0:
            size = _positive(size)
        unit, guard = self._unit, self.guard
        units = -(-size // unit)
        if self._deferred:
            self._deferred.run()
        if guard.busy and is_inside_section():
            raise self._reentered("allocate", units)
        with guard.lock:
            guard.busy = True
            free_list = self._free_list
            if free_list.pending or self._spares.blocks:
                free_list = self._settled_free_list()
            try:
                start = free_list.take(units)
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise
            guard.busy = False
            if start is None:
                raise self._out_of_memory(units)
        return start * unit, units * unit

    @section
    def batched_allocate(
        self, size: int, batch_size: int, allow_partial: bool = False
    ) -> AddressBatch:
        """Allocate ``batch_size`` blocks of ``size`` bytes in the fewest runs.

        They come from the smallest extent that holds them all, if there is one; else from the
        largest extents in turn. O(R log F) for the R runs; if they are a large part of the F
        extents, O(F log F) in array operations.

        Args:
            size: bytes of each block, at least 1; rounded up to the alignment.
            batch_size: number of blocks; 0 gives an empty batch.
            allow_partial: if they do not all fit, allocate as many as fit, perhaps none.

        Returns:
            The blocks in address order.

        Raises:
            ValueError: ``size`` is not positive.
            TypeError: a number is not an integer, or ``allow_partial`` neither True nor False.
            NegativeBatchSizeError: ``batch_size`` is negative.
            OutOfMemoryError: the blocks do not all fit, and ``allow_partial`` is false; nothing
                changes.
            ReentrantCallError: the calling thread is inside an operation; nothing changes.
        """
        if allow_partial is not False and allow_partial is not True:
            require_flags(allow_partial=allow_partial)
        if self._deferred:
            self._deferred.run()
        guard = self.guard
        if guard.busy and is_inside_section():
            raise self._reentered("batched_allocate", 0)
        with guard.lock:
            guard.busy = True
            batch = self.take(size, batch_size, allow_partial)
            guard.busy = False
            if batch is None:
                raise self._out_of_memory(-(-size // self._unit) * batch_size)
        return batch

    def take(
        self,
        size: int,
        batch_size: int,
        allow_partial: bool = False,
        receipt: Receipt | None = None,
    ) -> AddressBatch | None:
        """:meth:`batched_allocate` for a caller that holds the guard.

        Args:
            size: bytes of each block, at least 1; rounded up to the alignment.
            batch_size: number of blocks.
            allow_partial: if they do not all fit, allocate as many as fit.
            receipt: gets the blocks, and tells whether they are allocated.

        Returns:
            The blocks; None if they do not all fit, and ``allow_partial`` is false.

        Raises:
            ValueError, NegativeBatchSizeError: as :meth:`batched_allocate`.
        """
        if type(size) is not int or size <= 0:
            size = _positive(size)
        if type(batch_size) is not int:
            batch_size = as_integer("batch_size", batch_size)
        unit = self._unit
        units = -(-size // unit)
        if batch_size <= 0:
            if batch_size:
                raise NegativeBatchSizeError(batch_size)
            return AddressBatch(units * unit, [], [])
        free_list = self._free_list
        if free_list.pending or self._spares.blocks:
            free_list = self._settled_free_list()
        try:
            if receipt is not None:
                free_list.pending.append(receipt)  # as ``write``, which most calls need
                receipt.done = True
            start = free_list.take(units * batch_size)
            if start is not None:
                batch = AddressBatch(units * unit, start * unit, batch_size)
            else:
                taken = bulk.take_batch(free_list, units, batch_size, unit, allow_partial)
                if taken is None:
                    free_list.withdraw(receipt)
                    free_list.commit()
                    return None
                batch, self._free_list = taken
            if receipt is not None:
                receipt.blocks = batch
            free_list.pending.clear()  # as ``commit``
        except BaseException:
            self._free_list = free_list
            free_list.rollback()
            raise
        return batch

    @section
    def reserve(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None = None,
    ) -> None:
        """Allocate given extents, in any order; either all of them or none.

        For whoever knows from an earlier process which bytes are in use. O(F + N log(F + N)) in
        array operations, for the N extents and the F free ones.

        Args:
            blocks: an :class:`AddressBatch`; or ``(address, size)`` pairs, which may be an integer
                ``[N, 2]`` array; or, with ``sizes``, an integer array of addresses ``[N]``.
            sizes: bytes of each extent, ``[N]``, or one number for all: multiples of the alignment.

        Raises:
            ValueError: an extent is negative, empty, misaligned, outside the heap, not free, spans
                two segments or overlaps another one; the message names the first such one. Or the
                shapes do not fit each other. Nothing changes.
            TypeError: the addresses or sizes are not integers.
            ReentrantCallError: the calling thread is inside an operation; nothing changes.

        >>> heap = AddressManager(5 * 4096)
        >>> heap.reserve([8192, 0], 4096)
        >>> heap.allocate(8192), heap.allocate(4096)
        ((12288, 8192), (4096, 4096))
        """
        if self._deferred:
            self._deferred.run()
        unit, guard = self._unit, self.guard
        if isinstance(blocks, AddressBatch) and sizes is None:
            # Whole blocks: a run may be longer than a segment.
            taken = as_reservation(blocks.addresses, blocks.block_bytes, unit)
        else:
            taken = as_reservation(blocks, sizes, unit)
        if guard.busy and is_inside_section():
            raise self._reentered("reserve", int(taken.sizes.sum()) // unit)
        with guard.lock:
            guard.busy = True
            free_list = self._settled_free_list()
            free, end = free_list.extents(), free_list.end
            in_bytes = Extents(free.starts * unit, free.sizes * unit)
            left = without(in_bytes, taken, end * unit)
            self._free_list = free_list.rebuilt(Extents(left.starts // unit, left.sizes // unit))
            guard.busy = False

    @section
    def free(self, address: int, size: int) -> None:
        """Free one extent and join it with its free neighbours. O(log F).

        Args:
            address: its start, as allocated.
            size: its allocated bytes.

        Raises:
            DoubleFreeError: some of its bytes are free already; nothing changes.
            InvalidFreeError: it is empty, misaligned, outside the heap, or spans two segments;
                nothing changes.
        """
        if type(address) is not int or type(size) is not int:
            address, size = as_integer("address", address), as_integer("size", size)
        guard = self.guard
        if self._deferred:
            self._deferred.run()
        if guard.busy and is_inside_section():
            self._put_off([(address, size)])
            return
        with guard.lock:
            guard.busy = True
            # Whoever frees by address may free a block that has an owner, who is then to be told so
            # at once: from now on every free looks at the free list.
            self._keeps_spares = False
            self._free_one(address, size, None)
            guard.busy = False

    def _free_one(self, address: int, size: int, receipt: Done | None) -> None:
        """Free one extent. Call with the guard held."""
        unit, free_list = self._unit, self._free_list
        if free_list.pending or self._spares.blocks:
            free_list = self._settled_free_list()
        start, units = address // unit, size // unit
        if (
            size <= 0
            or address < 0
            or address % unit
            or size % unit
            or start + units > free_list.end
            or (free_list.walls and free_list.has_wall_within(start, start + units))
        ):
            raise invalid_free(address, size, unit, free_list.end * unit)
        try:
            if receipt is not None:
                free_list.write(receipt)
            overlapping = free_list.insert(start, units)
            if overlapping is not None:
                free_list.withdraw(receipt)
            free_list.commit()
        except BaseException:
            free_list.rollback()
            raise
        if overlapping is not None:
            raise double_free(address, size, overlapping[0] * unit, overlapping[1] * unit)

    @section
    def batched_free(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None = None,
    ) -> None:
        """Free many extents, in any order; either all of them or none.

        O(R log F) after sorting, for the R runs that the extents form; if they are a large part
        of the F free extents, O(F + R) in array operations.

        Args:
            blocks: an :class:`AddressBatch`; or ``(address, size)`` pairs, which may be an integer
                ``[N, 2]`` array; or, with ``sizes``, an integer array of addresses ``[N]``.
            sizes: bytes of each extent, ``[N]``, or one number for all.

        Raises:
            DoubleFreeError: bytes are free already, or named twice here; nothing changes.
            InvalidFreeError: an extent is empty, misaligned, outside the heap, or spans two
                segments; nothing changes.
            TypeError: the addresses or sizes are not integers.
            ValueError: the shapes do not fit each other.
        """
        if self._deferred:
            self._deferred.run()
        one_run: tuple[int, int] | None = None
        extents: Extents | None = None
        if isinstance(blocks, AddressBatch) and sizes is None:
            one_run = blocks.only_run()
        if one_run is None:
            # The walls may be read before the lock is taken: a block of a segment is allocated
            # only after the segment's wall was put up.
            extents = self._merged(blocks, sizes)
        guard = self.guard
        if guard.busy and is_inside_section():
            self._put_off(blocks if extents is None else np.stack(extents, axis=1))
            return
        with guard.lock:
            guard.busy = True
            self._keeps_spares = False
            if one_run is not None:
                self._free_one(one_run[0], one_run[1], None)
            elif extents is not None:
                self._insert(extents, None)
            guard.busy = False

    def _put_off(self, blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike) -> None:
        """Free ``(address, size)`` pairs by the next operation."""
        self._deferred.add(partial(self._free_later, blocks, Receipt()))

    @section
    def _free_later(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        receipt: Receipt,
        call: DeferredCall,
    ) -> None:
        guard = self.guard
        extents = self._merged(blocks, None)
        with guard.lock:
            guard.busy = True
            self._keeps_spares = False
            self.finish()
            if not receipt.done:
                self._insert(extents, receipt)
            guard.busy = False

    def give_back(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None = None,
        receipt: Receipt | None = None,
    ) -> None:
        """:meth:`batched_free` for a caller that holds the guard.

        Args:
            blocks: as for :meth:`batched_free`.
            sizes: as for :meth:`batched_free`; not used for an :class:`AddressBatch`.
            receipt: tells whether the blocks are free.

        Raises:
            DoubleFreeError, InvalidFreeError, TypeError, ValueError: as :meth:`batched_free`.
        """
        one_run: tuple[int, int] | None = None
        if isinstance(blocks, AddressBatch):
            one_run, sizes = blocks.only_run(), None
        if one_run is not None:
            self._free_one(one_run[0], one_run[1], receipt)
        else:
            self._insert(self._merged(blocks, sizes), receipt)

    def give_back_batch(self, blocks: AddressBatch, receipt: Done) -> None:
        """:meth:`give_back` of all blocks that one call of :meth:`take` returned.

        Args:
            blocks: the blocks.
            receipt: tells whether they are free.

        Raises:
            DoubleFreeError, InvalidFreeError: somebody else has freed some of them.
        """
        run = blocks.only_run()
        if run is None:
            self._insert(self._merged(blocks, None), receipt)
            return
        address, size = run
        unit, free_list = self._unit, self._free_list
        start, units = address // unit, size // unit
        is_plain = not (free_list.pending or self._spares.blocks or free_list.walls)
        if not is_plain or start + units > free_list.end:
            self._free_one(address, size, receipt)
            return
        try:
            free_list.pending.append(receipt)  # as ``write``, which most calls need
            receipt.done = True
            overlapping = free_list.insert(start, units)
            if overlapping is not None:
                free_list.withdraw(receipt)
            free_list.pending.clear()  # as ``commit``
        except BaseException:
            free_list.rollback()
            raise
        if overlapping is not None:
            raise double_free(address, size, overlapping[0] * unit, overlapping[1] * unit)

    def give_back_batches(self, batches: Sequence[AddressBatch], receipts: Sequence[Done]) -> bool:
        """:meth:`give_back_batch` of several batches of one run each, all or none. O(N log N).

        Neighbours are joined first, so that the free list changes once for each run.

        Args:
            batches: the blocks.
            receipts: one for each batch; tells whether its blocks are free.

        Returns:
            Whether they are free. If not, nothing is changed: a batch has several runs, or somebody
            else has freed some of them; :meth:`give_back_batch` tells which.
        """
        unit, free_list = self._unit, self._settled_free_list()
        runs: list[list[int]] = []
        for run in sorted(blocks.only_run() or (-1, 0) for blocks in batches):
            first, units = run[0] // unit, run[1] // unit
            if runs and runs[-1][1] == first and first not in free_list.walls:
                runs[-1][1] += units
            else:
                runs.append([first, first + units])
        if not runs or runs[0][0] < 0 or runs[-1][1] > free_list.end:
            return False
        if free_list.walls and any(free_list.has_wall_within(*run) for run in runs):
            return False
        try:
            free_list.pending.extend(receipts)  # as ``write``
            for receipt in receipts:
                receipt.done = True
            for first, end in runs:
                if free_list.insert(first, end - first) is not None:
                    free_list.rollback()
                    return False
            free_list.commit()
        except BaseException:
            free_list.rollback()
            raise
        return True

    def take_spare(self, receipt: Receipt) -> AddressBatch | None:
        """Take the block of one unit that was freed last, for a caller that holds the guard. O(1).

        Args:
            receipt: as for :meth:`take`.

        Returns:
            A batch of one block; None unless :meth:`give_back_spare` has got one: :meth:`take` then
            knows better.
        """
        spares = self._spares
        if spares.done:
            return None
        self._last_moved = None  # a move that was undone left its page here
        return spares.take(receipt)

    def give_back_spare(self, blocks: AddressBatch, receipt: Done) -> None:
        """:meth:`give_back_batch`, which keeps a block of one unit for :meth:`take_spare`. O(1).

        If an exception strikes, :meth:`was_given_back` tells whether the block is free.
        """
        spares = self._spares
        waiting = spares.blocks
        if (
            blocks.num_blocks != 1
            or len(waiting) >= MAX_SPARES
            or not self._keeps_spares
            or spares.done
            or blocks.block_bytes != self._unit
        ):
            self.give_back_batch(blocks, receipt)
            return
        waiting.append(blocks)
        receipt.done = True

    def was_given_back(self, blocks: AddressBatch) -> bool:
        """After :meth:`finish`: whether an interrupted :meth:`give_back_spare` has freed a block.

        If it has, the block was on top, and was moved first.
        """
        return blocks is self._last_moved

    @property
    def heap_bytes(self) -> int:
        """:meth:`get_heap_size` for a caller that holds the guard."""
        return self._free_list.end * self._unit

    def free_extents(self) -> Extents:
        """All free extents in bytes, in address order, for a caller that holds the guard. O(F)."""
        extents = self._settled_free_list().extents()
        return Extents(extents.starts * self._unit, extents.sizes * self._unit)

    def finish(self) -> None:
        """Undo what an exception interrupted, so that every receipt is final.

        For a caller that holds the guard; every operation does so anyway.
        """
        self._settled_free_list()

    def _merged(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None,
    ) -> Extents:
        """The extents to free, in bytes, in address order, merged within each segment."""
        if isinstance(blocks, AddressBatch) and sizes is None:
            extents = Extents(blocks.run_starts, blocks.run_counts * blocks.block_bytes)
        else:
            extents = as_extents(blocks, sizes)
        return merged(extents, self._free_list.wall_array * self._unit)

    def _insert(self, extents: Extents, receipt: Done | None) -> None:
        """Free merged extents. Call with the guard held."""
        free_list, unit = self._settled_free_list(), self._unit
        if len(extents.starts):
            require_inside(extents, unit, free_list.end * unit)
        runs = Extents(extents.starts // unit, extents.sizes // unit)
        try:
            if receipt is not None:
                free_list.write(receipt)
            self._free_list = bulk.insert_runs(free_list, runs, unit)
            free_list.commit()
        except BaseException:
            self._free_list = free_list
            free_list.rollback()
            raise

    @section
    def sbrk(self, size: int, new_segment: bool = False) -> None:
        """Grow the address space at its end. O(log F).

        Args:
            size: bytes to add, a multiple of the alignment; 0 adds nothing.
            new_segment: whether the new bytes are in another buffer than the bytes before them; no
                allocation will then cross the boundary. O(F).

        Raises:
            ValueError: ``size`` is negative or not a multiple of the alignment, or the heap
                would end at 2**63 or beyond.
            TypeError: ``size`` is not an integer, or ``new_segment`` neither True nor False.
            ReentrantCallError: the calling thread is inside an operation; nothing changes.
        """
        guard = self.guard
        if guard.busy and is_inside_section():
            raise self._reentered("sbrk", 0)
        with guard.lock:
            guard.busy = True
            self.extend(size, new_segment)
            guard.busy = False

    def extend(self, size: int, new_segment: bool = False) -> None:
        """:meth:`sbrk` for a caller that holds the guard.

        Raises:
            ValueError: as :meth:`sbrk`.
        """
        size = as_integer("size", size)
        require_flags(new_segment=new_segment)
        unit = self._unit
        if size < 0 or size % unit:
            raise ValueError(
                f"size must be a non-negative multiple of align_bytes ({unit}), got {size}"
            )
        if size == 0:
            return
        free_list = self._settled_free_list()
        _require_addressable(free_list.end * unit + size, f" (with {size} more)")
        free_list = free_list.ready_to_grow(size // unit, new_segment)
        self._free_list = free_list
        try:
            free_list.grow(size // unit)
            free_list.commit()
        except BaseException:
            free_list.rollback()
            raise

    @section
    def trim(self) -> int:
        """Give back the free tail of the address space, the opposite of :meth:`sbrk`. O(log F).

        Gives back at most the last segment.

        Returns:
            How many bytes the heap lost: 0 if its last byte is allocated.

        Raises:
            ReentrantCallError: the calling thread is inside an operation; nothing changes.
        """
        guard = self.guard
        if guard.busy and is_inside_section():
            raise self._reentered("trim", 0)
        with guard.lock:
            guard.busy = True
            free_list = self._settled_free_list()
            try:
                units = free_list.trim()
                free_list.commit()
            except BaseException:
                free_list.rollback()
                raise
            guard.busy = False
        return units * self._unit

    def check(self) -> None:
        """Assert every invariant of the module's docstring. O(F log F).

        Raises:
            HeapCorruptionError: an invariant is broken; the message names it and shows the state.
        """
        self._look(FreeList.check)

    def check_consistency(self) -> bool:
        """Whether :meth:`check` finds that every invariant holds."""
        try:
            self.check()
        except HeapCorruptionError:
            return False
        return True

    def __repr__(self) -> str:
        """The counters and the alignment."""
        return f"AddressManager({self.stats()}, align_bytes={self._unit})"

    @section
    def _look(self, question: Callable[[FreeList], Answer]) -> Answer:
        """What ``question`` answers about the free list as the last operation left it."""
        guard = self.guard
        if guard.busy and is_inside_section():
            return question(self._free_list_before())
        if self._deferred:
            self._deferred.run()
        with guard.lock:
            guard.busy = True
            answer = question(self._settled_free_list())
            guard.busy = False
        return answer

    def _settled_free_list(self) -> FreeList:
        """The free list without the remains of an interrupted rollback; needs the guard."""
        free_list, spares = self._free_list, self._spares
        if free_list.pending:
            free_list.rollback()
        if spares.blocks:
            if not spares.done:
                free = spares.free
                self._last_moved = free[-1] if free else None
                spares.move_to(free_list, self._unit)
            self._spares = Spares()
        return free_list

    def _free_list_before(self) -> FreeList:
        """A copy of the free list as the last operation left it, while one is under way."""
        free_list, spares = self._free_list, self._spares
        before = free_list.before_changes()
        if not spares.done or spares in free_list.pending:
            for blocks in spares.free:
                before.insert(blocks.address(0) // self._unit, 1)
            before.commit()
        return before

    def _reentered(self, call: str, units: int) -> ReentrantCallError:
        free_list, unit = self._free_list, self._unit
        return ReentrantCallError(
            call, units * unit, free_list.free_units * unit, free_list.largest * unit
        )

    def _out_of_memory(self, units: int) -> OutOfMemoryError:
        free_list, unit = self._free_list, self._unit
        return OutOfMemoryError(units * unit, free_list.free_units * unit, free_list.largest * unit)


def _positive(size: int) -> int:
    size = as_integer("size", size)
    if size <= 0:
        raise ValueError(f"size must be greater than 0, got {size}")
    return size


def _require_addressable(heap_bytes: int, reason: str = "") -> None:
    if heap_bytes >> ADDRESS_BITS:
        raise ValueError(
            f"a heap must end below 2**{ADDRESS_BITS}: its size would be {heap_bytes} bytes{reason}"
        )
