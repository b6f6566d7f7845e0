"""Which tokens chunks hold: recorded by a store, and required by a load.

Both cost O(1) for whole batches. For lists of chunks, and if slots on the host skip tokens, they
cost a few operations for each chunk. A slot of -1 that is on a device counts as a token, because
reading it would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvheap.blocks.heap import BlockObjects
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.stored_tokens import StoredTokens, TokenSet, sets_of
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_slots import Places

__all__ = ["record_stored", "require_stored", "tokens_of"]


def tokens_of(places: Places, cache: PagedKVCache) -> Places:
    """The places of a copy, with its tokens counted where only whole blocks are copied."""
    if not cache.layout.whole_blocks:
        return places
    return replace(places, num_tokens=places.num_tokens * cache.block_size)


Kept = npt.NDArray[np.bool_] | None


def require_stored(objs: BlockObjects, chunk: ChunkLayout, places: Places, block_size: int) -> None:
    """Raise if chunks are known not to hold a token that is to be loaded.

    Args:
        objs: exactly as many chunks as the tokens need.
        chunk: where tokens are in them.
        places: the tokens of the load.
        block_size: slots of a block of the cache.

    Raises:
        ValueError: names the first such token.
    """
    num_tokens = places.num_tokens
    if isinstance(objs, MemoryBatch):
        stored = objs.stored_tokens
        first = stored.first
        if stored.is_unknown or (first is not None and num_tokens <= first):
            return
    elif places.are_all_real and _hold_first(objs, chunk, num_tokens):
        return
    needed = sets_of(num_tokens, places.kept(block_size), chunk.num_tokens)
    for at, (stored, row) in enumerate(_rows_of(objs)):
        wanted = needed[at % len(needed)]
        held = stored.of(row, chunk.num_tokens, chunk.is_per_layer)
        if held is None or not wanted & ~held:
            continue
        missing = wanted & ~held
        token = at % len(needed) * chunk.num_tokens + (missing & -missing).bit_length() - 1
        raise ValueError(
            f"token {token} of the {num_tokens} to load was never stored: chunk {at} holds "
            f"{held.bit_count()} tokens, and other bytes behind them; load only what was stored, "
            f"or skip tokens by slots of -1"
        )


def _hold_first(objs: Sequence[MemoryObj], chunk: ChunkLayout, num_tokens: int) -> bool:
    """Whether each chunk holds the first tokens that it is to give, as far as is known."""
    room, is_per_layer = chunk.num_tokens, chunk.is_per_layer
    for at in range(-(-num_tokens // room)):
        count = min(num_tokens - at * room, room)
        for obj in objs[at :: -(-num_tokens // room)]:
            if not obj.batch.stored_tokens.holds_first(obj.row, count, room, is_per_layer):
                return False
    return True


def record_stored(objs: BlockObjects, chunk: ChunkLayout, places: Places, block_size: int) -> None:
    """Record what a store has written: the tokens of each chunk are now those of this store.

    Tokens that the store skipped are as they were. Arguments are those of :func:`require_stored`.
    """
    num_tokens, kept = places.num_tokens, places.kept(block_size)
    if isinstance(objs, MemoryBatch):
        stored = objs.stored_tokens
        if kept is not None and stored.first == 0:
            kept, num_tokens = _without_padding(kept, num_tokens, chunk.num_tokens)
        if kept is None:
            stored.set_first(num_tokens)
            return
    written = sets_of(num_tokens, kept, chunk.num_tokens)
    spans = sets_of(num_tokens, None, chunk.num_tokens)
    for at, (stored, row) in enumerate(_rows_of(objs)):
        number = at % len(written)
        skipped = spans[number] & ~written[number]
        held: TokenSet | None = 0
        if skipped:
            held = stored.of(row, chunk.num_tokens, chunk.is_per_layer)
        # If nothing is known of the tokens that were skipped, nothing is known of the chunk.
        stored.set_row(row, None if held is None else written[number] | (held & skipped))


def _without_padding(
    kept: npt.NDArray[np.bool_], num_tokens: int, chunk_tokens: int
) -> tuple[Kept, int]:
    """Read slots of -1 at the end, as engines pad their slot mappings, as a shorter store."""
    count = int(np.count_nonzero(kept))
    is_padding = bool(kept[:count].all()) and -(-count // chunk_tokens) == -(
        -num_tokens // chunk_tokens
    )
    return (None, count) if is_padding else (kept, num_tokens)


def _rows_of(objs: BlockObjects) -> Sequence[tuple[StoredTokens, int]]:
    if isinstance(objs, MemoryBatch):
        return [(objs.stored_tokens, row) for row in range(len(objs))]
    return [(obj.batch.stored_tokens, obj.row) for obj in objs]
