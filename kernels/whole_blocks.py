"""Caches of which only whole blocks can be copied, seen as caches with one slot for each block.

Their engine mixes the bytes of the tokens of a block, so that a token has no bytes of its own. A
chunk keeps the bytes of a block in the place of its tokens: plane by plane, and head by head if the
heads of a block are apart in the cache.
"""

from __future__ import annotations

from dataclasses import replace

from kvheap.kernels.engine_planes import Plane
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_slots import BlockIds, Slots

__all__ = ["blocks_of_cache", "ids_of_whole_blocks"]


def ids_of_whole_blocks(cache: PagedKVCache, slots: Slots) -> BlockIds:
    """The blocks that a caller gave, each as one slot.

    Raises:
        ValueError: they are slots of tokens, or the last block is only partly filled.
    """
    if not isinstance(slots, BlockIds):
        raise ValueError(
            f"{cache.layout.name} keeps the tokens of a block together: give BlockIds of whole "
            f"blocks, not slots"
        )
    num_blocks = len(slots.ids)
    if slots.num_tokens not in (None, num_blocks * cache.block_size):
        raise ValueError(
            f"{cache.layout.name} keeps the tokens of a block together: {num_blocks} whole blocks "
            f"of {cache.block_size} slots have {num_blocks * cache.block_size} tokens, got "
            f"num_tokens={slots.num_tokens}"
        )
    return BlockIds(slots.ids)


def blocks_of_cache(cache: PagedKVCache) -> PagedKVCache:
    """The cache with one slot for each block, kept with it once it is made."""
    found: PagedKVCache | None = cache.kept.get("blocks")
    if found is None:
        planes, num_heads = _block_planes(cache)
        found = replace(
            cache,
            layout=replace(cache.layout, whole_blocks=False),
            planes=planes,
            block_size=1,
            num_heads=num_heads,
            head_dim=cache.head_dim * cache.block_size * cache.num_heads // num_heads,
        )
        cache.kept["blocks"] = found
    return found


def _block_planes(cache: PagedKVCache) -> tuple[tuple[Plane, ...], int]:
    """The bytes of a block in each plane: a row for each head, or one if slots are outermost."""
    slots, heads = cache.block_size, cache.num_heads
    is_by_head = all(plane.slot_stride == plane.row_bytes for plane in cache.planes)
    if heads == 1 or slots == 1 or is_by_head:
        planes = (
            Plane(p.row_bytes * slots, p.block_stride, p.block_stride, p.head_stride)
            for p in cache.planes
        )
        return tuple(planes), heads
    planes = (
        Plane(p.row_bytes * slots * heads, p.block_stride, p.block_stride, p.row_bytes)
        for p in cache.planes
    )
    return tuple(planes), 1
