"""Where the blocks of a heap are: what ``store``, ``load`` and transfers ask of what they get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_batch import FREED, MemoryBatch
from kvheap.blocks.memory_object import MemoryObj
from kvheap.errors import ForeignObjectError, LifetimeError

if TYPE_CHECKING:
    from kvheap.heaps.tensor_allocator import TensorMemoryAllocator

__all__ = ["BlockObjects", "heap_of", "layout_and_addresses"]

BlockObjects: TypeAlias = "MemoryBatch | Sequence[MemoryObj]"
"""Blocks: a batch, or objects of one heap and layout."""


def heap_of(objs: BlockObjects) -> TensorMemoryAllocator:
    """The heap that blocks are of.

    Raises:
        ValueError: there are none.
        TypeError: they are not of a heap.
    """
    if not isinstance(objs, MemoryBatch) and not len(objs):
        raise ValueError("no block: an empty batch says what a block is, an empty list does not")
    batch = objs if isinstance(objs, MemoryBatch) else objs[0]._batch
    heap = batch.allocator
    if not hasattr(heap, "_absolute"):
        raise TypeError(f"blocks of a heap are needed, got some of {type(heap).__name__}")
    return cast("TensorMemoryAllocator", heap)


def layout_and_addresses(objs: BlockObjects) -> tuple[BlockLayout, Int64Array]:
    """What each block holds, and where each is in the heap, int64 ``[N]``.

    Raises:
        LifetimeError: a block is freed.
        ForeignObjectError: blocks are of several heaps.
        ValueError: they have several layouts.
    """
    if isinstance(objs, MemoryBatch):
        counts = objs._ref_counts
        is_live = objs._uniform_ref_count != FREED if counts is None else bool(objs.live.all())
        if not is_live:
            raise LifetimeError(f"a block of {objs!r} is freed")
        return objs.layout, objs.addresses
    first = objs[0]._batch
    for obj in objs:
        if not obj.is_valid():
            raise LifetimeError(f"{obj!r} is freed")
        if obj._batch.allocator is not first.allocator:
            raise ForeignObjectError(f"{obj!r} is of another heap than {objs[0]!r}")
        if obj._batch.layout != first.layout:
            raise ValueError(
                f"blocks must have one layout, got {first.layout}, {obj._batch.layout}"
            )
    return first.layout, np.array([obj.address for obj in objs], np.int64)
