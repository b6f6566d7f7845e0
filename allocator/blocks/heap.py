"""``Heap``: an allocator whose blocks have addresses in buffers, and helpers for copying them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from kvheap.addresses.block_runs import MemorySegment
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.block_allocator import BlockAllocator, segment_of
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.rows import rows_of
from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.errors import ForeignObjectError, LifetimeError

__all__ = [
    "BlockObjects",
    "Heap",
    "await_filling",
    "await_transfers",
    "heap_of",
    "layout_and_addresses",
    "require_writable",
    "users_of",
]

BlockObjects: TypeAlias = "MemoryBatch | Sequence[MemoryObj]"
"""Blocks: a batch, a slice of one, or objects of one heap and layout."""


class Heap(BlockAllocator):
    """An allocator whose blocks have addresses in one or several buffers of one device."""

    page_layout: BlockLayout | None
    """What a page holds; None if the heap has no pages."""

    @property
    @abstractmethod
    def debug(self) -> bool:
        """Whether freed bytes are poisoned, and arguments on a device are checked."""

    @property
    @abstractmethod
    def segments(self) -> list[tuple[int, torch.Tensor]]:
        """The buffers, uint8, each with the address of its first byte."""

    def memory_segments(self, batch: MemoryBatch | None = None) -> Sequence[MemorySegment]:
        """Where the buffers are in this process's memory, for a registration or another machine.

        Args:
            batch: has no influence: the blocks of any batch may be in any buffer.

        Raises:
            ClosedError: the heap is closed.
        """
        return [segment_of(start, buffer) for start, buffer in self.segments]

    @abstractmethod
    def absolute(self, addresses: Int64Array) -> tuple[Int64Array, int]:
        """Convert addresses in the heap to absolute addresses.

        Args:
            addresses: addresses in the heap, int64 ``[N]``.

        Returns:
            The absolute addresses, int64 ``[N]``, and a power of two up to 16 that divides the
            absolute address of every block of the heap.
        """

    @abstractmethod
    def pinned_addresses(self, device: CopyDevice) -> Int64Array:
        """The absolute ranges of a host heap that ``device`` can reach, int64 ``[R, 2]``."""

    @abstractmethod
    def max_batch(self, shape: Shapes, dtype: Dtypes) -> int:
        """How many blocks of this shape and dtype one ``batched_allocate`` could return now."""


def heap_of(objs: BlockObjects) -> Heap:
    """The heap of some blocks.

    Raises:
        ValueError: ``objs`` is an empty list.
        TypeError: they are not blocks, or their allocator is not a heap.
    """
    if isinstance(objs, MemoryBatch):
        batch = objs
    elif isinstance(objs, BatchSlice):
        batch = objs.batch
    else:
        _require_objects(objs)
        if not len(objs):
            raise ValueError(
                "an empty list of blocks belongs to no heap: pass an empty batch instead"
            )
        batch = objs[0].batch
    heap = batch.allocator
    if not isinstance(heap, Heap):
        raise TypeError(f"expected blocks of a heap, got blocks of {type(heap).__name__}")
    return heap


def _require_objects(objs: Sequence[MemoryObj]) -> None:
    """Raise if these are not objects in a sequence; O(1), looks at the first one only."""
    if type(objs) is list and (not objs or isinstance(objs[0], MemoryObj)):
        return
    if isinstance(objs, MemoryObj):
        raise TypeError(f"expected a batch or a list of objects, got {objs!r}: pass [it]")
    if not isinstance(objs, Sequence) or (len(objs) and not isinstance(objs[0], MemoryObj)):
        raise TypeError(f"expected a MemoryBatch or a list of its objects, got {objs!r}")


def await_filling(objs: BlockObjects, device: torch.device) -> None:
    """Order work on ``device`` behind the transfers that fill blocks.

    Call this before reading or writing the bytes of blocks. For host memory the host waits; for
    GPU memory the device's current stream waits.

    Raises:
        TransferError: a transfer has failed; the bytes are undefined.
    """
    batches = (objs,) if isinstance(objs, MemoryBatch) else _batches_of(objs)
    for batch in batches:
        if batch.transfer is not None:
            batch.await_filling(on_host=device.type == "cpu")


def await_transfers(objs: BlockObjects) -> None:
    """Wait on the host for the transfers in flight that use blocks; see ``MemoryBatch``.

    Call this before the host writes to blocks. O(1) for a batch that no transfer uses.
    """
    if isinstance(objs, MemoryBatch):
        objs.await_transfers()
        return
    if any(batch.counts.streams is not None for batch in _batches_of(objs)):
        for part in rows_of(objs):
            part.batch.await_transfers(part.rows)


def users_of(objs: BlockObjects) -> Sequence[Completion]:
    """The transfers that have been queued to read or fill blocks, as ``RowCounts.users``."""
    if isinstance(objs, MemoryBatch):
        return objs.counts.users(None)
    if all(batch.counts.streams is None for batch in _batches_of(objs)):
        return ()
    return [user for part in rows_of(objs) for user in part.users()]


def require_writable(objs: BlockObjects) -> None:
    """Raise if stores may not fill blocks.

    Raises:
        ForeignObjectError: as ``MemoryBatch.require_writable``.
    """
    if isinstance(objs, MemoryBatch):
        objs.require_writable()
        return
    for batch in _batches_of(objs):
        batch.require_writable()


def _batches_of(objs: BlockObjects) -> Iterable[MemoryBatch]:
    if isinstance(objs, MemoryBatch):
        return (objs,)
    if isinstance(objs, BatchSlice):
        return (objs.batch,)
    return {id(obj.batch): obj.batch for obj in objs}.values()


def layout_and_addresses(objs: BlockObjects) -> tuple[BlockLayout, Int64Array]:
    """The block layout, and the address of each block in the heap, int64 ``[N]``.

    Raises:
        TypeError: they are not blocks.
        LifetimeError: a block is freed.
        ForeignObjectError: the blocks belong to several heaps.
        ValueError: they have several block layouts.
    """
    if isinstance(objs, MemoryBatch):
        if not objs.counts.all_live():
            raise LifetimeError(f"a block of {objs!r} is freed")
        return objs.layout, objs.addresses
    if isinstance(objs, BatchSlice):
        batch = objs.batch
        if not batch.counts.all_live():
            batch.counts.require_live(objs.rows, batch)
        return batch.layout, objs.addresses
    _require_objects(objs)
    first = objs[0].batch
    for obj in objs:
        if not isinstance(obj, MemoryObj):
            raise TypeError(f"expected a MemoryBatch or a list of its objects, got {obj!r} in it")
        if not obj.is_valid():
            raise LifetimeError(f"{obj!r} is freed")
        batch = obj.batch
        if batch is first:
            continue
        if batch.allocator is not first.allocator:
            raise ForeignObjectError(f"{obj!r} belongs to another heap than {objs[0]!r}")
        if batch.layout is not first.layout and batch.layout != first.layout:
            raise ValueError(f"blocks must have one layout, got {first.layout}, {batch.layout}")
    return first.layout, np.array([obj.address for obj in objs], np.int64)
