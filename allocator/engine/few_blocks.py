"""Store and load of a few whole blocks on a CPU, where what the call itself costs decides.

Only ordinary calls are made here: all layers and heads of a cache, a whole batch, block ids on the
host. What they need to know of a cache and a block layout is computed once and kept with the cache;
what may change from call to call is checked here. Everything else, and everything wrong, is left to
:mod:`kvheap.engine.chunks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.heap import BlockObjects
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.device.transfer import Transfer
from kvheap.engine.origins import origin_of
from kvheap.engine.tokens import form_of
from kvheap.engine.transfers import ended_transfer
from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.paged_blocks_cpu import copy_blocks
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_rows_cpu import RowCopy
from kvheap.kernels.paged_slots import BlockIds, Slots
from kvheap.kernels.token_copy import TokenCopy
from kvheap.kernels.words import array_at

__all__ = ["keep_for_few", "load_few", "store_few"]

MAX_BLOCKS = 4096
"""The most blocks that are copied here."""

MAX_LISTED = 8
"""Up to so many ids are looked at one by one. See benchmarks/NOTES.md."""

MAX_LAYOUTS = 64
"""Block layouts of which something is kept with a cache; half are dropped beyond that."""

MAX_SET = 64
"""Up to so many ids are compared in a set; more of them in a table of all blocks."""

INT64, UINT64 = np.dtype(np.int64), np.dtype(np.uint64)
INTEGERS = (torch.int64, torch.int32)
NUMPY_INTEGERS = (INT64, np.dtype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """What copies between a cache and batches of one block layout have in common."""

    rows: RowCopy
    form: str
    """See ``StoredTokens.form``."""
    block_bytes: int
    blocks_per_chunk: int
    runs_per_block: int


def keep_for_few(cache: PagedKVCache, batch: BlockObjects, copy: TokenCopy) -> None:
    """Keep what later copies of a few blocks need to know, after an ordinary copy was made."""
    pairing = copy.pairing
    if (
        type(batch) is not MemoryBatch
        or batch.layout in cache.kept
        or cache.device.type != "cpu"
        or cache.filled_tokens is not None
        or copy.chunks.scale_offset is not None
        or pairing.heads is not None
        or pairing.chunk.is_per_layer
        or pairing.num_layers != cache.num_layers
        or origin_of(pairing, 1) is not None
    ):
        return
    block_size = pairing.cache.block_size
    if pairing.block_unit == block_size:
        layouts = [key for key in cache.kept.copy() if isinstance(key, BlockLayout)]
        if len(layouts) >= MAX_LAYOUTS:  # chunks of ever new lengths must not fill the memory
            for layout in layouts[: MAX_LAYOUTS // 2]:
                cache.kept.pop(layout, None)
        rows = RowCopy.of(pairing, block_size)
        form, per_chunk = form_of(cache, pairing), len(rows.unit_offsets)
        per_block = pairing.runs_per_token * len(pairing.entries) * pairing.num_layers
        block_bytes = block_size * rows.token_bytes
        cache.kept[batch.layout] = _Known(rows, form, block_bytes, per_chunk, per_block)


def store_few(cache: PagedKVCache, slots: Slots, batch: BlockObjects) -> Transfer | None:
    """Store whole blocks into a batch; see :func:`kvheap.store`.

    Returns:
        The transfer, which has ended; None if nothing was done: the call is not of this kind, or is
        wrong.
    """
    call = _checked(cache, slots, batch)
    chunks: Any = batch  # a MemoryBatch, as was found
    if call is None or not chunks.is_writable:
        return None
    known, ids, count, addresses, _ = call
    if chunks.counts.streams is not None:
        chunks.await_transfers()
    if not copy_blocks(known.rows, addresses, ids, True):
        return None
    chunks.stored_tokens.set_first(count * cache.block_size, None, known.form)
    return ended_transfer(count * known.block_bytes, count * known.runs_per_block)


def load_few(batch: BlockObjects, cache: PagedKVCache, slots: Slots) -> Transfer | None:
    """Load whole blocks from a batch; see :func:`kvheap.load`. Returns as :func:`store_few`."""
    call = _checked(cache, slots, batch)
    if call is None:
        return None
    known, ids, count, addresses, _ = call
    if count > 1 and not _are_distinct(ids, cache):
        return None
    chunks: Any = batch
    stored = chunks.stored_tokens
    first, num_tokens = stored.first, count * cache.block_size
    if stored.form not in (None, known.form) or not (
        stored.is_unknown if first is None else num_tokens <= first
    ):
        return None
    if not copy_blocks(known.rows, addresses, ids, False):
        return None
    return ended_transfer(count * known.block_bytes, count * known.runs_per_block)


Call: TypeAlias = "tuple[_Known, Ids, int, Sequence[int], object]"
"""What is known of a copy; its block ids, and how many; the absolute address of each chunk, a range
if they are at equal distances; and what keeps the chunks' memory alive if another thread closes the
heap. A plain tuple, which costs a tenth of a class with names."""


def _checked(cache: PagedKVCache, slots: Slots, batch: BlockObjects) -> Call | None:
    """Check a call; None if it is not an ordinary one, or is wrong."""
    if (
        type(cache) is not PagedKVCache
        or type(slots) is not BlockIds
        or type(batch) is not MemoryBatch
        or batch.transfer is not None
        or batch.storage is not None  # it is of no heap
        or not batch.counts.all_live()
    ):
        return None
    known: _Known | None = cache.kept.get(batch.layout)
    if known is None:
        return None
    ids = _ids_of(slots, cache)
    if ids is None:
        return None
    heap: Any = batch.allocator
    count, runs = len(ids), batch.runs
    segments = heap.segments
    buffer, per_chunk = segments[0][1], known.blocks_per_chunk
    num_chunks = count if per_chunk == 1 else -(-count // per_chunk)
    if runs.num_blocks != num_chunks or not buffer.is_cpu:
        return None
    run = runs.only_run() if len(segments) == 1 else None
    if run is None:
        addresses: list[int] = heap.absolute(batch.addresses)[0].tolist()
        return known, ids, count, addresses, segments
    start = run[0] + buffer.data_ptr()
    return known, ids, count, range(start, start + run[1], runs.block_bytes), segments


Ids: TypeAlias = "list[int] | Int64Array"
"""Block ids that were checked: a list of a few, or an array of more."""


def _ids_of(slots: Any, cache: PagedKVCache) -> Ids | None:
    """The ids of full blocks of a cache; None if they are not that, or too many."""
    given = slots.ids
    kind = type(given)
    if kind is torch.Tensor:
        if given.dtype not in INTEGERS or given.ndim != 1 or not given.is_cpu:
            return None
        count, step = given.numel(), 1
        if not given.is_contiguous():
            if given.layout is not torch.strided:
                return None
            step = given.stride(0)
        end = given.storage_offset() + (count - 1) * step + 1
        if given.untyped_storage().nbytes() < end * given.itemsize:
            return None  # its memory was taken away, all or part of it
    elif kind is np.ndarray:
        if given.dtype not in NUMPY_INTEGERS or given.ndim != 1:
            return None
        count = len(given)
    elif kind is list and set(map(type, given)) == {int}:
        count = len(given)
    else:
        return None
    if not 0 < count <= MAX_BLOCKS or slots.num_tokens not in (None, count * cache.block_size):
        return None
    if count <= MAX_LISTED:
        ids: list[int] = given if kind is list else given.tolist()
        return ids if min(ids) >= 0 and max(ids) < cache.num_blocks else None
    return _array_of(given, cache.num_blocks)


def _array_of(given: Any, num_blocks: int) -> Int64Array | None:
    """Integers of any kind as an array that torch takes, too; None if one is no block."""
    array: npt.NDArray[Any]
    if type(given) is torch.Tensor:
        if given.is_neg():
            return None
        if given.is_contiguous() and given.dtype is torch.int64:
            array = array_at(given.data_ptr(), (given.numel(),), INT64, (8,))
        else:
            array = given.numpy().astype(np.int64)
    elif type(given) is list:
        try:
            array = np.array(given, np.int64)
        except OverflowError:
            return None
    elif given.dtype != INT64 or not given.flags.carray:  # torch would not take it
        array = given.astype(np.int64)
    else:
        array = given
    # NumPy finds the place of the highest in a quarter of the time that the highest takes it.
    highest = array[array.view(UINT64).argmax()]  # a negative one is higher than any
    return array if 0 <= highest < num_blocks else None


def _are_distinct(ids: Ids, cache: PagedKVCache) -> bool:
    """Whether no block is named twice."""
    count = len(ids)
    if count <= MAX_SET:
        return len(set(ids if isinstance(ids, list) else ids.tolist())) == count
    is_named = np.zeros(cache.num_blocks, np.bool_)
    is_named[ids] = True
    return int(np.count_nonzero(is_named)) == count
