"""``paired_runs``: which bytes of one set of blocks go to which of another, in the fewest runs.

For whoever copies by other means than :func:`kvheap.transfer.copy`: to another machine, a file, or
by a library of its own. Either side may be blocks of another process or machine, described by
:class:`~kvheap.addresses.block_runs.BlockRuns`. Their addresses are another memory's: they may be
any numbers, also those of blocks here.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from kvheap.addresses.arguments import require_flags
from kvheap.addresses.block_runs import BlockRuns, runs_of
from kvheap.addresses.extents import Extents
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.heap import BlockObjects, Heap, heap_of, layout_and_addresses
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.rows import Rows
from kvheap.kernels.pieces import Pieces
from kvheap.transfer.sides import MAX_PADDING

__all__ = ["PlacedBlocks", "block_runs", "extents", "paired_runs"]

PlacedBlocks: TypeAlias = "BlockObjects | Rows | BlockRuns"
"""Blocks with a place in memory: of a heap here, or the runs of blocks anywhere."""


def extents(blocks: PlacedBlocks, *, padding: bool = True) -> Extents:
    """The bytes of blocks as absolute extents: of a batch, some of its rows, or objects.

    >>> import torch
    >>> from kvheap import TensorMemoryAllocator
    >>> buffer = torch.zeros(1 << 16, dtype=torch.uint8)
    >>> batch = TensorMemoryAllocator(buffer).batched_allocate([8], torch.float32, 4)
    >>> addresses, sizes = extents(batch[1:3])
    >>> addresses - buffer.data_ptr(), sizes
    (array([4096]), array([8192]))

    Args:
        blocks: a batch, objects of one heap and layout in any order, rows, or runs.
        padding: see ``BlockRuns.extents``.

    Returns:
        Absolute addresses and bytes, int64 ``[E]`` each.

    Raises:
        LifetimeError, ValueError, TypeError, ClosedError: as :func:`block_runs`.
    """
    require_flags(padding=padding)
    return block_runs(blocks).extents(padding=padding)


def block_runs(blocks: PlacedBlocks) -> BlockRuns:
    """Where blocks are in memory, as runs of adjacent blocks, in the order of the blocks.

    O(runs) for a whole batch, else O(blocks).

    Args:
        blocks: a batch, objects of one heap and layout in any order, rows, or runs.

    Raises:
        LifetimeError: a block is freed.
        ValueError: objects have several layouts, the list is empty, or the runs cannot be.
        ForeignObjectError: objects belong to several heaps.
        TypeError: ``blocks`` is none of these.
        ClosedError: the heap is closed.
    """
    if isinstance(blocks, BlockRuns):
        return blocks.checked()
    if isinstance(blocks, MemoryBatch):
        return blocks.block_runs()
    if isinstance(blocks, BatchSlice):
        return blocks.block_runs()
    if isinstance(blocks, Rows):
        return blocks.batch.block_runs(blocks.rows)
    heap, batch = heap_of(blocks), blocks[0].batch
    rows = [obj.row for obj in blocks if isinstance(obj, MemoryObj) and obj.batch is batch]
    if len(rows) == len(blocks):
        return batch.block_runs(rows)
    layout, addresses = layout_and_addresses(blocks)
    sizes = {obj.allocated_bytes for obj in blocks}
    # Blocks with unequal padding have none in common: each is a run by itself.
    block_bytes = sizes.pop() if len(sizes) == 1 else layout.size_bytes
    starts, counts = runs_of(addresses, block_bytes)
    segments = heap.memory_segments()
    return BlockRuns.of_addresses(starts, counts, layout.size_bytes, block_bytes, segments)


def paired_runs(source: PlacedBlocks, target: PlacedBlocks) -> Pieces:
    """The bytes to copy from block ``i`` of the source to block ``i`` of the target, in runs.

    Blocks that are adjacent on both sides are one piece. Their padding is part of it if it is the
    same on both sides, and up to an eighth of a block; else each block is a piece of its contents
    alone. No piece crosses the end of a buffer on either side.

    A side given as ``BlockRuns`` is in another memory, such as another machine's: its addresses are
    not compared with those of the other side.

    >>> import numpy as np
    >>> there = BlockRuns(np.array([4096]), np.array([3]), 4096, 4096)
    >>> here = BlockRuns(np.array([4096, 40960]), np.array([2, 1]), 4096, 4096)
    >>> paired_runs(there, here)
    Pieces(2 x 4096 to 8192 bytes, 12288 bytes)

    Args:
        source: a batch, objects, rows, or runs.
        target: the same, as many blocks of the same size.

    Returns:
        Absolute addresses of both sides, and bytes, of each piece.

    Raises:
        ValueError: the sides differ in the number or size of their blocks or in their layouts, two
            blocks of the target overlap, or both sides are here and overlap.
        LifetimeError, ForeignObjectError, TypeError, ClosedError: as :func:`block_runs`.
    """
    one, other = block_runs(source), block_runs(target)
    if len(one) != len(other):
        raise ValueError(f"the source has {len(one)} blocks, the target {len(other)}")
    layouts = [_layout_of(side) for side in (source, target)]
    if None not in layouts and layouts[0] != layouts[1]:
        raise ValueError(f"the source's blocks are {layouts[0]}, the target's {layouts[1]}")
    if one.size_bytes != other.size_bytes:
        raise ValueError(
            f"the source's blocks have {one.size_bytes} bytes, the target's {other.size_bytes}"
        )
    padding = one.block_bytes == other.block_bytes <= one.size_bytes * (1 + MAX_PADDING)
    pieces = _paired(one.extents(padding=padding), other.extents(padding=padding))
    if not isinstance(target, (MemoryBatch, BatchSlice)):
        pieces.require_distinct_targets()
    memories = [_memory_of(side) for side in (source, target)]
    if None not in memories and memories[0] == memories[1]:
        pieces.require_apart()
    return pieces


def _paired(source: Extents, target: Extents) -> Pieces:
    """Pieces from the k-th byte of the source to the k-th of the target; both have as many."""
    ends = [np.cumsum(side.sizes) for side in (source, target)]
    if np.array_equal(ends[0], ends[1]):  # such as lone blocks on both sides
        return Pieces(source.starts, target.starts, source.sizes)
    all_ends = np.union1d(*ends)
    firsts = np.concatenate((np.zeros(1, np.int64), all_ends))[:-1]
    places = []
    for side, side_ends in zip((source, target), ends, strict=True):
        run = np.searchsorted(side_ends, firsts, side="right")
        places.append(side.starts[run] + firsts - (side_ends - side.sizes)[run])
    return Pieces(places[0], places[1], all_ends - firsts)


def _layout_of(blocks: PlacedBlocks) -> object | None:
    """What each block holds; None if that is not known."""
    if isinstance(blocks, BlockRuns):
        return None
    batch = blocks.batch if isinstance(blocks, (Rows, BatchSlice)) else blocks
    return batch.layout if isinstance(batch, MemoryBatch) else batch[0].batch.layout


def _memory_of(blocks: PlacedBlocks) -> str | None:
    """The kind of memory that blocks are in, whose addresses can be compared; None if elsewhere."""
    if isinstance(blocks, BlockRuns):
        return None
    heap: Heap = heap_of(blocks.batch if isinstance(blocks, Rows) else blocks)
    return heap.device.type
