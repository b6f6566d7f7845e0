"""``FreeSpace``: what is free in one address space, for whoever holds the guard over it.

Takes and gives back blocks by address. Each change is made whole or not at all: an exception inside
it undoes it, and what an exception interrupts in the undoing, the next call finishes. A
:class:`Receipt` tells the caller which of the two happened.

It takes no lock and puts nothing off. ``AddressManager`` does both for callers who hold no guard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy.typing as npt

from kvheap.addresses import bulk
from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.arguments import require_flags
from kvheap.addresses.extents import Extents
from kvheap.addresses.free_list import Done, FreeList, Receipt
from kvheap.addresses.free_requests import (
    as_extents,
    double_free,
    invalid_free,
    merged,
    require_inside,
)
from kvheap.addresses.heap_stats import HeapStats
from kvheap.addresses.integers import as_integer
from kvheap.addresses.reservations import without
from kvheap.addresses.spares import MAX_SPARES, Spares
from kvheap.errors import NegativeBatchSizeError, OutOfMemoryError, ReentrantCallError

__all__ = ["FreeSpace", "require_addressable", "require_positive"]

ADDRESS_BITS = 63
"""Addresses are int64: a heap ends below ``2**63``."""


class FreeSpace:
    """The free extents of an address space, in units of its alignment. Not thread-safe.

    - allocate: :meth:`take`, :meth:`take_extent`, :meth:`take_spare`, :meth:`reserve`;
    - free: :meth:`give_back`, :meth:`give_back_extent`, :meth:`give_back_batch`,
      :meth:`give_back_batches`, :meth:`give_back_spare`, :meth:`was_given_back`; in two steps
      :meth:`merged`, :meth:`give_back_merged`;
    - grow and shrink: :meth:`extend`, :meth:`trim`;
    - look: :attr:`heap_bytes`, :meth:`free_extents`, :meth:`settled`, :meth:`before`,
      :meth:`stats_of`;
    - after an exception: :meth:`finish`.

    Args:
        heap_units: units of the address space, all free.
        unit_bytes: bytes of a unit.

    Attributes:
        unit_bytes: as given.
        keeps_spares: whether :meth:`give_back_spare` may keep blocks out of the free list. Whoever
            frees by address, and may thus free a block that has an owner, sets it to False: the
            owner is then to be told so at once, so every free must look at the free list.
    """

    def __init__(self, heap_units: int, unit_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self.keeps_spares = True
        self._free_list = FreeList(Extents.of(0, heap_units), heap_units)
        self._spares = Spares()
        self._last_moved: AddressBatch | None = None

    # -- allocate ------------------------------------------------------------------------------

    def take_extent(self, units: int) -> int | None:
        """Allocate one extent of so many units; returns its first one, None if it does not fit."""
        free_list = self._free_list
        if free_list.pending or self._spares.blocks:
            free_list = self.settled()
        try:
            start = free_list.take(units)
            free_list.pending.clear()  # as ``commit``
        except BaseException:
            free_list.rollback()
            raise
        return start

    def take(
        self,
        size: int,
        batch_size: int,
        allow_partial: bool = False,
        receipt: Receipt | None = None,
    ) -> AddressBatch | None:
        """Allocate blocks; see ``AddressManager.batched_allocate``.

        Args:
            size: bytes of each block, at least 1; rounded up to the alignment.
            batch_size: number of blocks.
            allow_partial: if they do not all fit, allocate as many as fit.
            receipt: gets the blocks, and tells whether they are allocated.

        Returns:
            The blocks; None if they do not all fit, and ``allow_partial`` is false.

        Raises:
            ValueError, TypeError, NegativeBatchSizeError: as there.
        """
        if type(size) is not int or size <= 0:
            size = require_positive(size)
        if type(batch_size) is not int:
            batch_size = as_integer("batch_size", batch_size)
        unit = self.unit_bytes
        units = -(-size // unit)
        if batch_size <= 0:
            if batch_size:
                raise NegativeBatchSizeError(batch_size)
            return AddressBatch(units * unit, [], [])
        free_list = self._free_list
        if free_list.pending or self._spares.blocks:
            free_list = self.settled()
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

    def reserve(self, taken: Extents) -> None:
        """Allocate given extents in bytes, in address order; see ``AddressManager.reserve``.

        Raises:
            ValueError: an extent is not free; the message names it.
        """
        unit, free_list = self.unit_bytes, self.settled()
        left = without(self.free_extents(), taken, free_list.end * unit)
        self._free_list = free_list.rebuilt(Extents(left.starts // unit, left.sizes // unit))

    # -- free ----------------------------------------------------------------------------------

    def give_back(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None = None,
        receipt: Receipt | None = None,
    ) -> None:
        """Free blocks; see ``AddressManager.batched_free``.

        Args:
            blocks: as there.
            sizes: as there; not used for an :class:`AddressBatch`.
            receipt: tells whether the blocks are free.

        Raises:
            DoubleFreeError, InvalidFreeError, TypeError, ValueError: as there.
        """
        one_run: tuple[int, int] | None = None
        if isinstance(blocks, AddressBatch):
            one_run, sizes = blocks.only_run(), None
        if one_run is not None:
            self.give_back_extent(one_run[0], one_run[1], receipt)
        else:
            self.give_back_merged(self.merged(blocks, sizes), receipt)

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
            self.give_back_merged(self.merged(blocks, None), receipt)
            return
        address, size = run
        unit, free_list = self.unit_bytes, self._free_list
        start, units = address // unit, size // unit
        is_plain = not (free_list.pending or self._spares.blocks or free_list.walls)
        if not is_plain or start + units > free_list.end:
            self.give_back_extent(address, size, receipt)
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
        unit, free_list = self.unit_bytes, self.settled()
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

    def give_back_extent(self, address: int, size: int, receipt: Done | None = None) -> None:
        """:meth:`give_back` of one extent. O(log F)."""
        unit, free_list = self.unit_bytes, self._free_list
        if free_list.pending or self._spares.blocks:
            free_list = self.settled()
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
            free_list.pending.clear()  # as ``commit``
        except BaseException:
            free_list.rollback()
            raise
        if overlapping is not None:
            raise double_free(address, size, overlapping[0] * unit, overlapping[1] * unit)

    def merged(
        self,
        blocks: AddressBatch | Iterable[tuple[int, int]] | npt.ArrayLike,
        sizes: npt.ArrayLike | None,
    ) -> Extents:
        """Extents that shall be free, in bytes, in address order, merged within each segment.

        Needs no guard: a block of a segment is allocated only after the segment's wall was put up.

        Args:
            blocks: as for ``AddressManager.batched_free``.
            sizes: as there.

        Raises:
            DoubleFreeError, InvalidFreeError, TypeError, ValueError: as there.
        """
        if isinstance(blocks, AddressBatch) and sizes is None:
            extents = Extents(blocks.run_starts, blocks.run_counts * blocks.block_bytes)
        else:
            extents = as_extents(blocks, sizes)
        return merged(extents, self._free_list.wall_array * self.unit_bytes)

    def give_back_merged(self, extents: Extents, receipt: Done | None = None) -> None:
        """:meth:`give_back` of what :meth:`merged` has returned."""
        free_list, unit = self.settled(), self.unit_bytes
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

    # -- lone blocks ---------------------------------------------------------------------------

    def take_spare(self, receipt: Receipt) -> AddressBatch | None:
        """Take the block of one unit that was freed last. O(1).

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
            or not self.keeps_spares
            or spares.done
            or blocks.block_bytes != self.unit_bytes
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

    # -- grow and shrink -----------------------------------------------------------------------

    def extend(self, size: int, new_segment: bool = False) -> None:
        """Grow the address space at its end; see ``AddressManager.sbrk``.

        Raises:
            ValueError, TypeError: as there.
        """
        size = as_integer("size", size)
        require_flags(new_segment=new_segment)
        unit = self.unit_bytes
        if size < 0 or size % unit:
            raise ValueError(
                f"size must be a non-negative multiple of align_bytes ({unit}), got {size}"
            )
        if size == 0:
            return
        free_list = self.settled()
        require_addressable(free_list.end * unit + size, f" (with {size} more)")
        free_list = free_list.ready_to_grow(size // unit, new_segment)
        self._free_list = free_list
        try:
            free_list.grow(size // unit)
            free_list.commit()
        except BaseException:
            free_list.rollback()
            raise

    def trim(self) -> int:
        """Give back the free tail of the address space; returns its bytes."""
        free_list = self.settled()
        try:
            units = free_list.trim()
            free_list.commit()
        except BaseException:
            free_list.rollback()
            raise
        return units * self.unit_bytes

    # -- look ----------------------------------------------------------------------------------

    @property
    def heap_bytes(self) -> int:
        """Bytes of the address space."""
        return self._free_list.end * self.unit_bytes

    def free_extents(self) -> Extents:
        """All free extents in bytes, in address order. O(F)."""
        extents = self.settled().extents()
        return Extents(extents.starts * self.unit_bytes, extents.sizes * self.unit_bytes)

    def stats_of(self, free_list: FreeList) -> HeapStats:
        """The counters of :meth:`settled` or :meth:`before`."""
        unit = self.unit_bytes
        heap_bytes, free_bytes = free_list.end * unit, free_list.free_units * unit
        return HeapStats(
            heap_bytes=heap_bytes,
            allocated_bytes=heap_bytes - free_bytes,
            free_bytes=free_bytes,
            largest_free_bytes=free_list.largest * unit,
            free_extents=len(free_list),
        )

    def out_of_memory(self, num_bytes: int) -> OutOfMemoryError:
        """The error of a request of so many bytes that does not fit."""
        free_list, unit = self._free_list, self.unit_bytes
        return OutOfMemoryError(num_bytes, free_list.free_units * unit, free_list.largest * unit)

    def reentered(self, call: str, num_bytes: int) -> ReentrantCallError:
        """The error of a call inside an operation of the same thread; needs no guard."""
        free_list, unit = self._free_list, self.unit_bytes
        return ReentrantCallError(
            call, num_bytes, free_list.free_units * unit, free_list.largest * unit
        )

    # -- after an exception --------------------------------------------------------------------

    def finish(self) -> None:
        """Undo what an exception interrupted, so that every receipt is final.

        Every other method does so anyway.
        """
        self.settled()

    def settled(self) -> FreeList:
        """The free list, without the remains of an interrupted rollback. Do not change it."""
        free_list, spares = self._free_list, self._spares
        if free_list.pending:
            free_list.rollback()
        if spares.blocks:
            if not spares.done:
                free = spares.free
                self._last_moved = free[-1] if free else None
                spares.move_to(free_list, self.unit_bytes)
            self._spares = Spares()
        return free_list

    def before(self) -> FreeList:
        """A copy of the free list as the last operation left it, while one is under way."""
        free_list, spares = self._free_list, self._spares
        before = free_list.before_changes()
        if not spares.done or spares in free_list.pending:
            for blocks in spares.free:
                before.insert(blocks.address(0) // self.unit_bytes, 1)
            before.commit()
        return before


def require_positive(size: int) -> int:
    """A caller's size in bytes.

    Raises:
        ValueError: it is not positive.
        TypeError: it is not an integer.
    """
    size = as_integer("size", size)
    if size <= 0:
        raise ValueError(f"size must be greater than 0, got {size}")
    return size


def require_addressable(heap_bytes: int, reason: str = "") -> None:
    """Raise if an address space is too large for int64.

    Raises:
        ValueError: names its size, and ``reason``.
    """
    if heap_bytes >> ADDRESS_BITS:
        raise ValueError(
            f"a heap must end below 2**{ADDRESS_BITS}: its size would be {heap_bytes} bytes{reason}"
        )
