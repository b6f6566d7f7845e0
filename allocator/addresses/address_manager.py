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

What is free is the business of ``FreeSpace``; the manager adds the guard. Each operation takes one
lock once, and so do statistics and snapshots.

An exception raised inside an operation, by a signal handler or for lack of memory, undoes that
operation. If it strikes after the last change but before the caller has the result, the operation
stands: the address that was not returned stays allocated, and ``snapshot`` shows the gap.

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
from kvheap.addresses.free_space import FreeSpace, require_addressable, require_positive
from kvheap.addresses.heap_stats import HeapStats
from kvheap.addresses.integers import as_integer, round_up
from kvheap.addresses.reservations import as_reservation
from kvheap.errors import HeapCorruptionError
from kvheap.guards import Deferred, DeferredCall, Guard, is_inside_section, section

__all__ = ["AddressManager"]

Answer = TypeVar("Answer")


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
    - for a heap that holds the guard itself: :attr:`guard` and :attr:`space`; methods of the latter
      are here too, from :meth:`take` to :meth:`finish`.

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
        require_addressable(size)
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
        require_addressable(num_pages * page_bytes, f" ({num_pages} pages of {page_bytes} bytes)")
        manager = cls.__new__(cls)
        manager._set_up(num_pages, page_bytes)
        return manager

    def _set_up(self, heap_units: int, unit_bytes: int) -> None:
        self._unit = unit_bytes
        self.guard = Guard()
        """Protects the free space; a heap that is built on this manager shares it."""
        self.space = FreeSpace(heap_units, unit_bytes)
        """The free space, for whoever holds the guard."""
        self._deferred = Deferred(self.guard)

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
        return self._look(self.space.stats_of)

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
        units = -(-require_positive(size) // self._unit)
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
            size = require_positive(size)
        unit, guard = self._unit, self.guard
        units = -(-size // unit)
        if self._deferred:
            self._deferred.run()
        if guard.busy and is_inside_section():
            raise self.space.reentered("allocate", units * unit)
        with guard.lock:
            guard.busy = True
            start = self.space.take_extent(units)
            guard.busy = False
            if start is None:
                raise self.space.out_of_memory(units * unit)
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
            raise self.space.reentered("batched_allocate", 0)
        with guard.lock:
            guard.busy = True
            batch = self.space.take(size, batch_size, allow_partial)
            guard.busy = False
            if batch is None:
                raise self.space.out_of_memory(-(-size // self._unit) * self._unit * batch_size)
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
            raise self.space.reentered("reserve", int(taken.sizes.sum()))
        with guard.lock:
            guard.busy = True
            self.space.reserve(taken)
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
        guard, space = self.guard, self.space
        if self._deferred:
            self._deferred.run()
        if guard.busy and is_inside_section():
            self._put_off([(address, size)])
            return
        with guard.lock:
            guard.busy = True
            space.keeps_spares = False
            space.give_back_extent(address, size)
            guard.busy = False

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
        space = self.space
        one_run: tuple[int, int] | None = None
        extents: Extents | None = None
        if isinstance(blocks, AddressBatch) and sizes is None:
            one_run = blocks.only_run()
        if one_run is None:
            extents = space.merged(blocks, sizes)
        guard = self.guard
        if guard.busy and is_inside_section():
            self._put_off(blocks if extents is None else np.stack(extents, axis=1))
            return
        with guard.lock:
            guard.busy = True
            space.keeps_spares = False
            if one_run is not None:
                space.give_back_extent(one_run[0], one_run[1])
            elif extents is not None:
                space.give_back_merged(extents)
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
        guard, space = self.guard, self.space
        extents = space.merged(blocks, None)
        with guard.lock:
            guard.busy = True
            space.keeps_spares = False
            space.finish()
            if not receipt.done:
                space.give_back_merged(extents, receipt)
            guard.busy = False

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
            raise self.space.reentered("sbrk", 0)
        with guard.lock:
            guard.busy = True
            self.space.extend(size, new_segment)
            guard.busy = False

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
            raise self.space.reentered("trim", 0)
        with guard.lock:
            guard.busy = True
            num_bytes = self.space.trim()
            guard.busy = False
        return num_bytes

    # -- for a heap that holds the guard itself ------------------------------------------------

    def take(
        self,
        size: int,
        batch_size: int,
        allow_partial: bool = False,
        receipt: Receipt | None = None,
    ) -> AddressBatch | None:
        """``FreeSpace.take``."""
        return self.space.take(size, batch_size, allow_partial, receipt)

    def take_spare(self, receipt: Receipt) -> AddressBatch | None:
        """``FreeSpace.take_spare``."""
        return self.space.take_spare(receipt)

    def give_back(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None = None,
        receipt: Receipt | None = None,
    ) -> None:
        """``FreeSpace.give_back``."""
        self.space.give_back(blocks, sizes, receipt)

    def give_back_batch(self, blocks: AddressBatch, receipt: Done) -> None:
        """``FreeSpace.give_back_batch``."""
        self.space.give_back_batch(blocks, receipt)

    def give_back_batches(self, batches: Sequence[AddressBatch], receipts: Sequence[Done]) -> bool:
        """``FreeSpace.give_back_batches``."""
        return self.space.give_back_batches(batches, receipts)

    def give_back_spare(self, blocks: AddressBatch, receipt: Done) -> None:
        """``FreeSpace.give_back_spare``."""
        self.space.give_back_spare(blocks, receipt)

    def was_given_back(self, blocks: AddressBatch) -> bool:
        """``FreeSpace.was_given_back``."""
        return self.space.was_given_back(blocks)

    def extend(self, size: int, new_segment: bool = False) -> None:
        """``FreeSpace.extend``."""
        self.space.extend(size, new_segment)

    @property
    def heap_bytes(self) -> int:
        """``FreeSpace.heap_bytes``."""
        return self.space.heap_bytes

    def free_extents(self) -> Extents:
        """``FreeSpace.free_extents``."""
        return self.space.free_extents()

    def finish(self) -> None:
        """``FreeSpace.finish``."""
        self.space.finish()

    # -- invariants ----------------------------------------------------------------------------

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
            return question(self.space.before())
        if self._deferred:
            self._deferred.run()
        with guard.lock:
            guard.busy = True
            answer = question(self.space.settled())
            guard.busy = False
        return answer
