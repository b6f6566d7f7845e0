"""Which tokens chunks hold, and of which layers: recorded by a store, and required by a load.

Both cost O(1) for whole batches, with all layers and heads. For lists of chunks, and if slots on
the host skip tokens, they cost a few operations for each chunk. A slot of -1 that is on a device
counts as a token, because reading it would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.heap import BlockObjects
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.origin import Origin
from kvheap.blocks.stored_tokens import Cells, StoredTokens, TokenSet, sets_of
from kvheap.engine.origins import origin_of, require_origin
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_plan import Pairing
from kvheap.kernels.paged_slots import Places
from kvheap.kernels.token_copy import TokenCopy

__all__ = ["form_of", "record_stored", "require_stored"]


class _Terms(NamedTuple):
    """What a pairing means to the records of chunks."""

    form: str
    """See ``StoredTokens.form``."""
    cells: Cells | None
    """Which layers and heads of the chunks are copied; None: all."""
    place_tokens: int
    """Tokens of what counts as one for the copy: a block, where only whole ones are copied."""

    @classmethod
    def of(cls, cache: PagedKVCache, pairing: Pairing) -> _Terms:
        """Those of a pairing of a cache, kept with it."""
        found: _Terms | None = pairing.kept.get("terms")
        if found is None:
            place_tokens = cache.block_size if cache.layout.whole_blocks else 1
            found = cls(form_of(cache, pairing), _cells_of(pairing), place_tokens)
            pairing.kept["terms"] = found
        return found


def form_of(cache: PagedKVCache, pairing: Pairing) -> str:
    """In what units a chunk keeps the KV of a cache: only the same units can be loaded."""
    if not cache.layout.whole_blocks:
        return "rows of tokens"
    order = "" if pairing.cache.num_heads == cache.num_heads else ", slots outermost"
    return f"whole blocks of {cache.block_size} slots of {cache.layout.name}{order}"


def _cells_of(pairing: Pairing) -> Cells | None:
    chunk = pairing.chunk
    num_heads = chunk.row_bytes // pairing.chunk_head_stride
    layers = (0, 1) if chunk.is_per_layer else (pairing.chunk_layers[0], pairing.num_layers)
    if layers[1] == chunk.num_layers and pairing.num_heads == num_heads:
        return None
    heads = (pairing.chunk_head, pairing.num_heads)
    return Cells.of(layers, chunk.num_layers, heads, num_heads)


Kept = npt.NDArray[np.bool_] | None


def _kept(places: Places, num_tokens: int, cache: PagedKVCache) -> Kept:
    """Which tokens are copied, bool ``[num_tokens]``; None if none is known to be skipped."""
    if places.are_all_real:
        return None
    return replace(places, num_tokens=num_tokens).kept(cache.block_size)


def require_stored(
    objs: BlockObjects, chunk: ChunkLayout, copy: TokenCopy, cache: PagedKVCache
) -> None:
    """Raise if chunks are known not to hold a token that is to be loaded.

    Args:
        objs: exactly as many chunks as the tokens need.
        chunk: where tokens are in them.
        copy: the load.
        cache: the cache.

    Raises:
        ValueError: names the first such token; or the chunks hold other units than the cache's, or
            other layers or heads than the load names.
    """
    form, cells, place_tokens = _Terms.of(cache, copy.pairing)
    for stored in _records_of(objs):
        if stored.form not in (None, form):
            raise ValueError(f"the chunks hold {stored.form}, the cache takes {form}")
    origin = origin_of(copy.pairing, len(objs))
    if origin is not None:
        require_origin(objs, origin, cells)
    places = copy.places
    num_tokens = places.num_tokens * place_tokens
    if isinstance(objs, MemoryBatch):
        stored = objs.stored_tokens
        first = stored.first
        if stored.is_unknown or (first is not None and num_tokens <= first):
            return
    elif places.are_all_real and _hold_first(_rows_of(objs), chunk, num_tokens):
        return
    needed = sets_of(num_tokens, _kept(places, num_tokens, cache), chunk.num_tokens)
    for at, (stored, row) in enumerate(_rows_of(objs)):
        wanted = needed[at % len(needed)]
        for part in stored.within(cells):
            held = part.of(row, chunk.num_tokens, chunk.is_per_layer)
            if held is None or not wanted & ~held:
                continue
            missing = wanted & ~held
            token = at % len(needed) * chunk.num_tokens + (missing & -missing).bit_length() - 1
            where = "" if part is stored else " in some of the layers and heads to load"
            raise ValueError(
                f"token {token} of the {num_tokens} to load was never stored: chunk {at} holds "
                f"{held.bit_count()} tokens{where}, and other bytes behind them; load only what "
                f"was stored, or skip tokens by slots of -1 (what was filled by other means, say "
                f"by set_num_tokens)"
            )


def _hold_first(
    pairs: Sequence[tuple[StoredTokens, int]], chunk: ChunkLayout, num_tokens: int
) -> bool:
    """Whether each chunk holds the first tokens that it is to give, as far as is known."""
    room, is_per_layer = chunk.num_tokens, chunk.is_per_layer
    for at in range(-(-num_tokens // room)):
        count = min(num_tokens - at * room, room)
        for stored, row in pairs[at :: -(-num_tokens // room)]:
            if not stored.holds_first(row, count, room, is_per_layer):
                return False
    return True


def record_stored(
    objs: BlockObjects, chunk: ChunkLayout, copy: TokenCopy, cache: PagedKVCache
) -> None:
    """Record what a store has written: the tokens of each chunk are now those of this store.

    Tokens that the store skipped are as they were, unless it converted (the new scales are not
    those of the tokens that were there), or they were of other layers or heads. Arguments are those
    of :func:`require_stored`.
    """
    form, cells, place_tokens = _Terms.of(cache, copy.pairing)
    if isinstance(objs, MemoryBatch):
        stored, places = objs.stored_tokens, copy.places
        if cells is None and places.are_all_real:  # most
            origin = origin_of(copy.pairing, len(objs))
            stored.set_first(places.num_tokens * place_tokens, origin)
        else:
            _record(objs, chunk, copy, cache)
        stored.form = form
        return
    were = [(stored, stored.form) for stored in _records_of(objs)]
    _record(objs, chunk, copy, cache)
    for stored, before in were:
        stored.form = form if before in (None, form) else None


def _record(objs: BlockObjects, chunk: ChunkLayout, copy: TokenCopy, cache: PagedKVCache) -> None:
    _, cells, place_tokens = _Terms.of(cache, copy.pairing)
    num_tokens = copy.places.num_tokens * place_tokens
    kept = _kept(copy.places, num_tokens, cache)
    origin = origin_of(copy.pairing, len(objs))
    keeps_skipped = copy.chunks.scale_offset is None
    if isinstance(objs, MemoryBatch):
        stored = objs.stored_tokens
        parts = stored.to_store(cells, None)
        if kept is not None and all(part.first == 0 for part in parts):
            kept, num_tokens = _without_padding(kept, num_tokens, chunk.num_tokens)
        if kept is None:
            for part in parts:
                part.set_first(num_tokens, origin)
        else:
            each = [(parts, row) for row in range(len(objs))]
            _record_rows(each, chunk, num_tokens, kept, keeps_skipped, origin)
        stored.join()
        return
    pairs = _rows_of(objs)
    records: dict[int, Sequence[StoredTokens]] = {}
    rows_by_batch: dict[int, list[int]] = {}
    for stored, row in pairs:
        rows_by_batch.setdefault(id(stored), []).append(row)
    leaves_layers = chunk.is_per_layer and copy.pairing.num_layers < cache.num_layers
    for stored, _ in pairs:
        if id(stored) not in records:
            if leaves_layers:
                stored.empty_if_unknown(None)  # the chunks of the other layers
            records[id(stored)] = stored.to_store(cells, rows_by_batch[id(stored)])
    each = [(records[id(stored)], row) for stored, row in pairs]
    _record_rows(each, chunk, num_tokens, kept, keeps_skipped, origin)
    for stored, _ in pairs:
        stored.join()


def _record_rows(
    rows: Sequence[tuple[Sequence[StoredTokens], int]],
    chunk: ChunkLayout,
    num_tokens: int,
    kept: Kept,
    keeps_skipped: bool,
    origin: Origin | None,
) -> None:
    """Record the tokens of each chunk by itself, in each of the records that it has."""
    written = sets_of(num_tokens, kept, chunk.num_tokens)
    spans = sets_of(num_tokens, None, chunk.num_tokens)
    origins = [None] * len(rows) if origin is None else origin.of_rows(len(rows))
    for at, (parts, row) in enumerate(rows):
        number = at % len(written)
        skipped = spans[number] & ~written[number]
        for part in parts:
            held: TokenSet | None = 0
            now = origins[at]
            if skipped:
                before = part.origin_of(row)
                now = now if written[number] else before
                is_alike = now is None or before is None or now.agrees_with(before)
                if is_alike and (keeps_skipped or not written[number]):
                    held = part.of(row, chunk.num_tokens, chunk.is_per_layer)
            # If nothing is known of the tokens that were skipped, nothing is known of the chunk.
            tokens = None if held is None else written[number] | (held & skipped)
            part.set_row(row, tokens, now)


def _without_padding(
    kept: npt.NDArray[np.bool_], num_tokens: int, chunk_tokens: int
) -> tuple[Kept, int]:
    """Read slots of -1 at the end, as engines pad their slot mappings, as a shorter store."""
    count = int(np.count_nonzero(kept))
    is_padding = bool(kept[:count].all()) and -(-count // chunk_tokens) == -(
        -num_tokens // chunk_tokens
    )
    return (None, count) if is_padding else (kept, num_tokens)


def _records_of(objs: BlockObjects) -> Sequence[StoredTokens]:
    """The records of the batches that chunks belong to, each once."""
    if isinstance(objs, MemoryBatch):
        return (objs.stored_tokens,)
    if isinstance(objs, BatchSlice):
        return (objs.batch.stored_tokens,)
    return list({id(obj.batch): obj.batch.stored_tokens for obj in objs}.values())


def _rows_of(objs: BlockObjects) -> Sequence[tuple[StoredTokens, int]]:
    if isinstance(objs, MemoryBatch):
        return [(objs.stored_tokens, row) for row in range(len(objs))]
    if isinstance(objs, BatchSlice):
        return [(objs.batch.stored_tokens, row) for row in objs.row_range]
    return [(obj.batch.stored_tokens, obj.row) for obj in objs]
