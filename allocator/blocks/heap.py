"""``Heap``: an allocator whose blocks have addresses in buffers, and what copies ask of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_allocator import BlockAllocator
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.device.copy_device import CopyDevice
from kvheap.errors import ForeignObjectError, LifetimeError

__all__ = ["BlockObjects", "Heap", "await_filling", "heap_of", "layout_and_addresses"]

BlockObjects: TypeAlias = "MemoryBatch | Sequence[MemoryObj]"
"""Blocks: a batch, or objects of one heap and layout."""


class Heap(BlockAllocator):
    """An allocator whose blocks have addresses in one or several buffers of one device."""

    page_layout: BlockLayout | None
    """What a page holds; None if the heap has no pages."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the buffers are."""

    @property
    @abstractmethod
    def debug(self) -> bool:
        """Whether freed bytes are poisoned, and arguments on a device are checked."""

    @property
    @abstractmethod
    def segments(self) -> list[tuple[int, torch.Tensor]]:
        """The buffers, uint8, each with the address of its first byte."""

    @abstractmethod
    def absolute(self, addresses: Int64Array) -> tuple[Int64Array, int]:
        """Where blocks are in memory.

        Args:
            addresses: addresses in the heap, int64 ``[N]``.

        Returns:
            The absolute address of each, and a power of two up to 16 that divides all absolute
            addresses of the heap's blocks.
        """

    @abstractmethod
    def pinned_addresses(self, device: CopyDevice) -> Int64Array:
        """What ``device`` can reach of a heap in host memory: absolute ranges, int64 ``[R, 2]``."""

    @abstractmethod
    def max_batch(self, shape: Shapes, dtype: Dtypes) -> int:
        """How many blocks of this shape and dtype one ``batched_allocate`` could return now."""


def heap_of(objs: BlockObjects) -> Heap:
    """The heap of some blocks.

    Raises:
        ValueError: there are none.
        TypeError: their allocator is no heap.
    """
    if not isinstance(objs, MemoryBatch) and not len(objs):
        raise ValueError("no block: an empty batch says what a block is, an empty list does not")
    batch = objs if isinstance(objs, MemoryBatch) else objs[0].batch
    heap = batch.allocator
    if not isinstance(heap, Heap):
        raise TypeError(f"blocks of a heap are needed, got some of {type(heap).__name__}")
    return heap


def await_filling(objs: BlockObjects, device: torch.device) -> None:
    """Order work on ``device`` behind the transfers that fill blocks.

    Whoever reads or writes the bytes of blocks calls this first. Host memory is waited for on the
    host, memory of a GPU on its current stream.

    Raises:
        TransferError: a transfer has failed; the bytes are undefined.
    """
    batches = (
        [objs] if isinstance(objs, MemoryBatch) else {id(o.batch): o.batch for o in objs}.values()
    )
    for batch in batches:
        if batch.transfer is not None:
            batch.await_filling(on_host=device.type == "cpu")


def layout_and_addresses(objs: BlockObjects) -> tuple[BlockLayout, Int64Array]:
    """What each block holds, and where each is in the heap, int64 ``[N]``.

    Raises:
        LifetimeError: a block is freed.
        ForeignObjectError: the blocks are of several heaps.
        ValueError: they have several layouts.
    """
    if isinstance(objs, MemoryBatch):
        if not objs.counts.all_live():
            raise LifetimeError(f"a block of {objs!r} is freed")
        return objs.layout, objs.addresses
    first = objs[0].batch
    for obj in objs:
        if not obj.is_valid():
            raise LifetimeError(f"{obj!r} is freed")
        if obj.batch.allocator is not first.allocator:
            raise ForeignObjectError(f"{obj!r} is of another heap than {objs[0]!r}")
        if obj.batch.layout != first.layout:
            raise ValueError(f"blocks must have one layout, got {first.layout}, {obj.batch.layout}")
    return first.layout, np.array([obj.address for obj in objs], np.int64)
