"""Store and load of a few whole blocks on a CPU, where what the call itself costs decides.

Only ordinary calls are made here: all layers and heads of a cache, a whole batch, block ids on the
host. What they need to know of a cache and a block layout is computed once and kept with the cache;
what may change from call to call is checked here. Everything else, and everything wrong, is left to
:mod:`kvheap.engine.chunks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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

__all__ = ["keep_for_few", "load_few", "store_few"]

MAX_BLOCKS = 4096
"""The most blocks that are copied here."""

MAX_LISTED = 24
"""Up to so many ids are looked at one by one; NumPy's view of a tensor and a look at all take 1.2
us for any number of them. See benchmarks/NOTES.md."""

MAX_LAYOUTS = 64
"""Block layouts of which something is kept with a cache; half are dropped beyond that."""

MAX_SET = 64
"""Up to so many ids are compared in a set; more of them in a table of all blocks."""

INTEGERS = (torch.int64, torch.int32)
NUMPY_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """What copies between a cache and batches of one block layout have in common."""

    rows: RowCopy
    form: str
    """See ``StoredTokens.form``."""
    blocks_per_chunk: int
    runs_per_block: int

    def transfer(self, num_blocks: int, num_tokens: int) -> Transfer:
        """The transfer of a copy that was made."""
        num_bytes = num_tokens * self.rows.token_bytes
        return ended_transfer(num_bytes, num_blocks * self.runs_per_block)


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
        cache.kept[batch.layout] = _Known(rows, form, per_chunk, per_block)


def store_few(cache: PagedKVCache, slots: Slots, batch: BlockObjects) -> Transfer | None:
    """Store whole blocks into a batch; see :func:`kvheap.store`.

    Returns:
        The transfer, which has ended; None if nothing was done: the call is not of this kind, or is
        wrong.
    """
    known = _known(cache, slots, batch)
    if known is None:
        return None
    chunks: Any = batch  # a MemoryBatch, as _known has found
    ids = _ids_of(slots, cache)
    if ids is None or not chunks.is_writable:
        return None
    segments = chunks.allocator.segments  # keeps them alive if another thread closes the heap
    addresses = _addresses_of(segments, chunks, len(ids), known)
    chunks.await_transfers()
    if not addresses or not copy_blocks(known.rows, addresses, ids, to_heap=True):
        return None
    stored, num_tokens = chunks.stored_tokens, len(ids) * cache.block_size
    stored.set_first(num_tokens)
    stored.form = known.form
    return known.transfer(len(ids), num_tokens)


def load_few(batch: BlockObjects, cache: PagedKVCache, slots: Slots) -> Transfer | None:
    """Load whole blocks from a batch; see :func:`kvheap.load`. Returns as :func:`store_few`."""
    known = _known(cache, slots, batch)
    if known is None:
        return None
    chunks: Any = batch
    ids = _ids_of(slots, cache)
    if ids is None or not _are_distinct(ids, cache):
        return None
    stored, num_tokens = chunks.stored_tokens, len(ids) * cache.block_size
    first = stored.first
    if stored.form not in (None, known.form) or not (
        stored.is_unknown or (first is not None and num_tokens <= first)
    ):
        return None
    segments = chunks.allocator.segments  # as in store_few
    addresses = _addresses_of(segments, chunks, len(ids), known)
    if not addresses or not copy_blocks(known.rows, addresses, ids, to_heap=False):
        return None
    return known.transfer(len(ids), num_tokens)


def _known(cache: PagedKVCache, slots: Slots, batch: BlockObjects) -> _Known | None:
    """What is known of such a copy; None if it is not an ordinary one."""
    if (
        type(cache) is not PagedKVCache
        or type(slots) is not BlockIds
        or type(batch) is not MemoryBatch
        or batch.transfer is not None
        or not batch.counts.all_live()
    ):
        return None
    found: _Known | None = cache.kept.get(batch.layout)
    return found


Ids = list[int] | Int64Array
"""Block ids that were checked: a list of a few, or an array of more."""


def _ids_of(blocks: Any, cache: PagedKVCache) -> Ids | None:
    """The ids of full blocks of a cache; None if they are not that, or too many."""
    given = blocks.ids
    kind = type(given)
    if kind is torch.Tensor:
        if given.dtype not in INTEGERS or given.ndim != 1 or not given.is_cpu:
            return None
        count = given.numel()
    elif kind is np.ndarray:
        if given.dtype not in NUMPY_INTEGERS or given.ndim != 1:
            return None
        count = len(given)
    elif kind is list and set(map(type, given)) == {int}:
        count = len(given)
    else:
        return None
    if not 0 < count <= MAX_BLOCKS or blocks.num_tokens not in (None, count * cache.block_size):
        return None
    if count <= MAX_LISTED:
        ids: list[int] = given if kind is list else given.tolist()
        return ids if min(ids) >= 0 and max(ids) < cache.num_blocks else None
    array: Int64Array = given.numpy() if kind is torch.Tensor else given
    if kind is list:
        try:
            array = np.array(given, np.int64)
        except OverflowError:
            return None
    elif array.dtype != np.int64:
        array = array.astype(np.int64)
    highest = np.maximum.reduce(array.view(np.uint64))  # a negative one is higher than any
    return array if highest < cache.num_blocks else None


def _are_distinct(ids: Ids, cache: PagedKVCache) -> bool:
    """Whether no block is named twice."""
    if len(ids) <= MAX_SET:
        return len(set(ids if isinstance(ids, list) else ids.tolist())) == len(ids)
    is_named = np.zeros(cache.num_blocks, np.bool_)
    is_named[ids] = True
    return int(np.count_nonzero(is_named)) == len(ids)


def _addresses_of(
    segments: list[tuple[int, torch.Tensor]], batch: MemoryBatch, num_blocks: int, known: _Known
) -> Sequence[int]:
    """The absolute address of each chunk; none if they are not as many as the blocks need.

    A range, if they are at equal distances.
    """
    buffer, num_chunks = segments[0][1], len(batch)
    if num_chunks != -(-num_blocks // known.blocks_per_chunk) or not buffer.is_cpu:
        return []
    run = batch.runs.only_run() if len(segments) == 1 else None
    if run is None:
        heap: Any = batch.allocator
        addresses: list[int] = heap.absolute(batch.addresses)[0].tolist()
        return addresses
    start, num_bytes = run[0] + buffer.data_ptr(), run[1]
    return range(start, start + num_bytes, num_bytes // num_chunks)
