"""What a store takes chunks from: arguments are checked before anything is evicted for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.heap import BlockObjects, layout_and_addresses
from kvheap.engine.chunks import dim_order_of, require_cache
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.paged_plan import pairing_of
from kvheap.kernels.paged_slots import Places, count_tokens

if TYPE_CHECKING:
    from kvheap.kernels.paged_layout import PagedKVCache
    from kvheap.kernels.paged_slots import Slots

__all__ = ["engine_chunk_tokens", "require_blocks", "require_slots"]


def require_blocks(layout: BlockLayout, num_chunks: int, blocks: BlockObjects) -> None:
    """Refuse blocks that are not so many of a layout.

    Raises:
        TypeError: they are not blocks.
        ValueError: the number or the layout differs.
        LifetimeError: a block is freed.
        ForeignObjectError: the blocks are of several heaps.
    """
    if not isinstance(blocks, Sequence):
        raise TypeError(f"batch must be a MemoryBatch or a list of its objects, got {blocks!r}")
    if len(blocks) != num_chunks:
        raise ValueError(f"{num_chunks} keys need as many blocks, got {len(blocks)} in batch")
    if num_chunks:
        found, _ = layout_and_addresses(blocks)
        if found != layout:
            raise ValueError(f"the blocks must be {layout}, got {found}")


def engine_chunk_tokens(
    layout: BlockLayout, num_chunks: int, cache: PagedKVCache, slots: Slots
) -> int:
    """How many tokens of an engine's cache a chunk of a layout holds.

    Raises:
        ValueError: the chunks of the cache differ from the layout, or the slots do not make so
            many chunks.
    """
    require_cache(cache)
    if len(layout.shapes) != 1:
        raise ValueError(f"chunks of one group can be stored from an engine, not {layout}")
    order = dim_order_of(layout.fmt)
    chunk = ChunkLayout.of(order, layout.shapes[0], layout.dtypes[0].itemsize)
    shape = cache.chunk_layout(chunk.num_tokens, layout.fmt).shape
    if shape != tuple(layout.shapes[0]) or cache.dtype != layout.dtypes[0]:
        raise ValueError(f"the cache's chunks are {shape} {cache.dtype}, not {layout}")
    num_tokens = count_tokens(slots, cache.block_size)
    found = chunk.num_chunks(num_tokens, cache.num_layers)
    if found != num_chunks:
        raise ValueError(f"{num_chunks} keys need as many chunks, but the slots make {found}")
    return chunk.num_tokens


def require_slots(layout: BlockLayout, cache: PagedKVCache, slots: Slots, eager: bool) -> None:
    """Refuse slots that a copy from an engine's cache would refuse.

    Raises:
        ValueError: a slot is out of range, or on another device.
        TypeError: slots are not integers.
    """
    order = dim_order_of(layout.fmt)
    chunk = ChunkLayout.of(order, layout.shapes[0], layout.dtypes[0].itemsize)
    layers = range(1) if chunk.is_per_layer else None
    Places.of(slots, pairing_of(cache, chunk, layers, None), eager=eager, distinct=False)
