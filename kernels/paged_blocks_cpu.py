"""Paged copy of whole blocks on a CPU: the ways for what most stores and loads of an engine are.

Beside this stands a loop of one ``index_select`` or ``index_copy_`` for each layer. That starts
torch's threads only for larger layers, and so does this; see :mod:`kvheap.kernels.paged_dense_cpu`.

===========================================  =======================================================
blocks                                       copied by
===========================================  =======================================================
of which a layer is shared by torch's        one indexing call of torch for all layers, which its
threads                                      threads share
one row each                                 one NumPy call; :mod:`kvheap.kernels.paged_single_cpu`
layers at equal distances                    one NumPy assignment for each block; some loads by one
                                             for all of them
others, chunks in a run                      NumPy in steps, or indexing calls of torch that its
                                             threads do not share
others                                       :mod:`kvheap.kernels.paged_rows_cpu`
===========================================  =======================================================

Each byte of the blocks is read and written once, or twice through a temporary of a few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvheap.kernels.arrays import Int64Array, alignment_of, combined_bits
from kvheap.kernels.launch import runs_kernels
from kvheap.kernels.paged_dense_cpu import MAX_NUMPY_BYTES, MIN_SHARED_BYTES
from kvheap.kernels.paged_rows_cpu import RowCopy
from kvheap.kernels.paged_slots import Places

__all__ = ["copy_blocks"]

MIN_RUN = 9
MAX_EACH = 24
LARGE_BLOCK = 16 << 10
"""How many blocks are worth one assignment of all of them; how many are worth one each, and how
large they are if more of them are worth it, too. See benchmarks/NOTES.md."""


def copy_blocks(
    rows: RowCopy, chunk_addresses: Sequence[int], blocks: list[int] | Int64Array, to_heap: bool
) -> bool:
    """Copy whole blocks between a cache and chunks, all on a CPU.

    Args:
        rows: the copies of the pairing, in units of a block.
        chunk_addresses: absolute address of each chunk; a range, if they are at equal distances.
        blocks: the blocks, all of them real ones of the cache; as many as the chunks have room for,
            but for the last chunk. An array is int64 ``[N]``.
        to_heap: whether the chunks are written.

    Returns:
        Whether they were copied. If not, they are too many, or not contiguous in the chunks.
    """
    if runs_kernels(rows.pairing.cache.device):
        return False
    single = rows.single
    if (
        single is not None
        and isinstance(chunk_addresses, range)
        and single.copy(chunk_addresses, blocks, to_heap)
    ):
        return True
    count, per_chunk = len(blocks), len(rows.unit_offsets)
    if len(rows.block_units) > 1:
        return False
    num_tokens = count * rows.unit_tokens
    num_bytes = num_tokens * rows.token_bytes
    dense = rows.dense
    is_shared = num_bytes > MIN_SHARED_BYTES and dense is not None and dense.is_shared(count)
    run = _full_run(rows, chunk_addresses, count) if is_shared else None
    is_for_numpy = num_bytes <= MAX_NUMPY_BYTES and run is None
    if is_for_numpy and _copy_by_grid(rows, chunk_addresses, blocks, to_heap):
        return True
    array, run = _array_of(blocks), run or _full_run(rows, chunk_addresses, count)
    if dense is not None and run is not None:
        dense.copy_places(run, array, per_chunk, to_heap)
        return True
    places = Places(array, True, rows.unit_tokens, num_tokens, True)
    addresses = np.array(chunk_addresses, np.int64)
    if rows.is_right_for(num_tokens):
        rows.run(addresses, places, 0, to_heap)
        return True
    if count % per_chunk:
        return False
    alignment = alignment_of(combined_bits(addresses))
    return rows.copy_dense(addresses, alignment, places, to_heap) > 0


def _copy_by_grid(
    rows: RowCopy, chunk_addresses: Sequence[int], blocks: list[int] | Int64Array, to_heap: bool
) -> bool:
    """Copy blocks by NumPy; False if nothing was copied: there is no grid, or it is slower."""
    grid, count, block_bytes = rows.grid, len(blocks), rows.unit_tokens * rows.token_bytes
    if grid is None or not grid.are_blocks:
        return False
    run = None
    if count >= MIN_RUN and not to_heap:
        run = _run_of(rows, chunk_addresses, count, grid.chunk_offset)
    if run is not None:
        grid.load_run(run, _array_of(blocks))
        return True
    is_small = count > MAX_EACH and block_bytes < LARGE_BLOCK
    if is_small and _full_run(rows, chunk_addresses, count):
        return False
    addresses = rows.addresses_of(chunk_addresses, count, grid.chunk_offset)
    grid.copy_each(addresses, blocks if isinstance(blocks, list) else blocks.tolist(), to_heap)
    return True


def _full_run(rows: RowCopy, chunk_addresses: Sequence[int], count: int) -> range | None:
    """The chunks, if so many blocks fill them and their rows are at equal distances."""
    per_chunk, dense = len(rows.unit_offsets), rows.dense
    if dense is None or type(chunk_addresses) is not range:
        return None
    is_full = len(chunk_addresses) * per_chunk == count
    return chunk_addresses if is_full and dense.are_rows(chunk_addresses, per_chunk) else None


def _run_of(rows: RowCopy, chunk_addresses: Sequence[int], count: int, first: int) -> range | None:
    """As ``rows.addresses_of``, if the addresses are at equal distances; else None."""
    if type(chunk_addresses) is not range:
        return None
    per_chunk, step = len(rows.unit_offsets), chunk_addresses.step
    if per_chunk > 1:
        if len(chunk_addresses) > 1 and step != per_chunk * rows.unit_step:
            return None
        step = rows.unit_step
    start = chunk_addresses.start + first
    return range(start, start + count * step, step) if step else None


def _array_of(blocks: list[int] | Int64Array) -> Int64Array:
    return np.array(blocks, np.int64) if isinstance(blocks, list) else blocks
