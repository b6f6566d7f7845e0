"""The runs of bytes of a copy between an engine's cache and chunks, as pieces for any path.

The paged kernels compute addresses on the device. The copy engine takes them from the host: layer
by layer, for each plane all tokens in their order, neighbours merged.
"""

from __future__ import annotations

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.kernels.paged_slots import Places
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.token_copy import TokenCopy

__all__ = ["count_runs", "pieces_of", "units_of"]


def units_of(copy: TokenCopy) -> Places:
    """The copy's places as slots, in the longest units that are one run on both sides.

    Slots that are on a device stay as they are.
    """
    places, pairing = copy.places, copy.pairing
    if not isinstance(places.values, np.ndarray):
        return places
    return places.as_slots(pairing.cache.block_size).merged(pairing)


def count_runs(copy: TokenCopy, units: Places) -> int:
    """How many runs a copy has at most, before those of neighbouring units are merged. O(1)."""
    pairing = copy.pairing
    num_units = -(-units.num_tokens // units.unit_tokens)
    return num_units * pairing.runs_per_token * len(pairing.entries) * pairing.num_layers


def pieces_of(copy: TokenCopy, units: Places) -> Pieces:
    """The runs of a copy, layer by layer. O(runs) array operations.

    Args:
        copy: a copy that converts nothing.
        units: its slots on the host, as :func:`units_of` returns them.
    """
    pairing, chunks = copy.pairing, copy.chunks
    chunk, block_size = pairing.chunk, pairing.cache.block_size
    starts = units.on_host()
    first_token = np.arange(len(starts), dtype=np.int64) * units.unit_tokens
    num_tokens = np.full(len(starts), units.unit_tokens, np.int64)
    if len(starts):
        num_tokens[-1] = units.num_tokens - first_token[-1]
    kept = starts >= 0
    if not kept.all():
        starts, first_token, num_tokens = starts[kept], first_token[kept], num_tokens[kept]
    # By layer, then by plane.
    entries = [entry for of_layer in zip(*pairing.entries, strict=True) for entry in of_layer]
    table = np.array(
        [
            (
                e.cache_base,
                e.block_stride,
                e.slot_stride,
                e.head_stride,
                e.chunk_offset,
                e.run_bytes,
            )
            for e in entries
        ],
        np.int64,
    ).reshape(-1, 6, 1)
    cache_base, block_stride, slot_stride, head_stride, chunk_offset, run_bytes = (
        table[:, column] for column in range(6)
    )
    block = starts // block_size
    slot = starts - block * block_size
    in_cache: Int64Array = cache_base + block * block_stride + slot * slot_stride
    number = first_token // chunk.num_tokens
    in_chunk = first_token - number * chunk.num_tokens
    page = in_chunk // chunk.page_tokens
    in_page = in_chunk - page * chunk.page_tokens
    if chunk.is_per_layer:
        per_layer = len(chunks.addresses) // pairing.num_layers
        layers = np.array([entry.layer for entry in entries], np.int64).reshape(-1, 1)
        starts_of_chunks: Int64Array = chunks.addresses[number + layers * per_layer]
    else:
        starts_of_chunks = chunks.addresses[number]
    in_heap: Int64Array = starts_of_chunks + (
        page * chunk.page_stride + in_page * chunk.token_stride
    )
    in_heap = in_heap + chunk_offset
    sizes = run_bytes * num_tokens
    if pairing.runs_per_token > 1:
        run = np.arange(pairing.runs_per_token, dtype=np.int64)
        in_cache = in_cache[:, :, None] + run * head_stride[:, :, None]
        in_heap = in_heap[:, :, None] + run * pairing.chunk_head_stride
        sizes = np.broadcast_to(sizes[:, :, None], in_heap.shape)
    sides = (in_cache, in_heap) if copy.to_heap else (in_heap, in_cache)
    flat = sizes.reshape(-1)
    one = len(flat) > 0 and bool((flat == flat[0]).all())
    return Pieces(
        sides[0].reshape(-1), sides[1].reshape(-1), int(flat[0]) if one else flat
    ).merged()
