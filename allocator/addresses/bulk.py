"""Batch operations on the free list: run by run, or for many runs by rebuilding it from arrays.

Each function chooses the cheaper way. Run by run, it logs the changes in the given free list and
returns that list. Rebuilding leaves the given list as it is and returns a new one. The caller
commits the given list; after an exception, it keeps that list and rolls it back.
"""

from __future__ import annotations

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Extents, joined, overlap_of, place_blocks
from kvheap.addresses.free_list import FreeList
from kvheap.addresses.free_requests import double_free
from kvheap.errors import DoubleFreeError

__all__ = ["insert_runs", "max_batch", "max_steps", "take_batch"]

MIN_REBUILD_RUNS = 64
"""A batch of at most this many runs never rebuilds the free list; see benchmarks/NOTES.md."""

REBUILD_SHARE = 32
"""Nor does a batch with at most one run for each 32 extents; see benchmarks/NOTES.md."""


def max_steps(free_list: FreeList) -> int:
    """The largest number of runs for which a run-by-run change is cheaper than a rebuild."""
    return max(MIN_REBUILD_RUNS, len(free_list) // REBUILD_SHARE)


def max_batch(free_list: FreeList, size: int) -> int:
    """How many blocks of ``size`` units one batch could take."""
    return free_list.max_blocks(size, max_steps(free_list))


def take_batch(
    free_list: FreeList, size: int, count: int, unit_bytes: int, allow_partial: bool
) -> tuple[AddressBatch, FreeList] | None:
    """Take ``count`` blocks of ``size`` units in the fewest runs.

    O(R log F) for R runs; by rebuilding, O(F log F) in array operations.

    Args:
        free_list: the free list to take the blocks from.
        size: units of each block.
        count: how many blocks, at least 1.
        unit_bytes: bytes of a unit.
        allow_partial: if they do not all fit, take as many as do.

    Returns:
        The blocks, and the free list without them. None if they do not all fit and
        ``allow_partial`` is false; nothing is changed then.
    """
    if size * count > free_list.free_units and not allow_partial:
        return None
    runs = free_list.fewest_runs(size, count, max_steps(free_list))
    if runs is None:
        starts, counts, left = place_blocks(free_list.extents(), size, count)
        if not allow_partial and counts.sum() < count:
            return None
        batch = AddressBatch(size * unit_bytes, starts * unit_bytes, counts)
        return batch, free_list.rebuilt(left)
    if not allow_partial and sum(blocks for _, blocks in runs) < count:
        return None
    for start, blocks in runs:
        free_list.carve(start, blocks * size)
    runs.sort()
    batch = AddressBatch(
        size * unit_bytes,
        [start * unit_bytes for start, _ in runs],
        [blocks for _, blocks in runs],
    )
    return batch, free_list


def insert_runs(free_list: FreeList, runs: Extents, unit_bytes: int) -> FreeList:
    """Free all runs, or none.

    O(R log F) for R runs; by rebuilding, O(F + R) in array operations.

    Args:
        free_list: the free list to add the runs to.
        runs: in units; disjoint, in address order, within the heap, and across no wall.
        unit_bytes: bytes of a unit, for error messages.

    Returns:
        The free list with the runs.

    Raises:
        DoubleFreeError: a run is free already, in whole or in part; nothing is changed.
    """
    if len(runs.starts) > max_steps(free_list):
        return _insert_by_rebuilding(free_list, runs, unit_bytes)
    pairs = list(zip(runs.starts.tolist(), runs.sizes.tolist(), strict=True))
    for start, size in pairs:
        overlapping = free_list.overlapping(start, start + size)
        if overlapping is not None:
            raise _double_free(start, size, overlapping, unit_bytes)
    for start, size in pairs:
        free_list.insert(start, size)
    return free_list


def _insert_by_rebuilding(free_list: FreeList, runs: Extents, unit_bytes: int) -> FreeList:
    free = free_list.extents()
    overlap = overlap_of(free, runs)
    if overlap is not None:
        extent, run = overlap
        overlapping = int(free.starts[extent]), int(free.ends[extent])
        raise _double_free(int(runs.starts[run]), int(runs.sizes[run]), overlapping, unit_bytes)
    starts = np.concatenate((free.starts, runs.starts))
    sizes = np.concatenate((free.sizes, runs.sizes))
    order = np.argsort(starts, kind="stable")  # recognizes two sorted halves and merges them
    extents = joined(Extents(starts[order], sizes[order]), free_list.wall_array)
    return free_list.rebuilt(extents)


def _double_free(
    start: int, size: int, overlapping: tuple[int, int], unit_bytes: int
) -> DoubleFreeError:
    free_start, free_end = overlapping
    return double_free(
        start * unit_bytes, size * unit_bytes, free_start * unit_bytes, free_end * unit_bytes
    )
