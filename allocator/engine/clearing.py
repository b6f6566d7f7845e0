"""Zeroes the slots of an engine's block behind the last token of a load.

An engine reads whole blocks, and masks what lies behind a sequence's last token. A NaN that a
former owner left there still reaches the result of attention (vLLM issue 55085).
"""

from __future__ import annotations

import numpy as np
import torch

from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.paged_copy import Chunks, load_tokens
from kvheap.kernels.paged_plan import Pairing
from kvheap.kernels.paged_slots import Places

__all__ = ["clear_rest"]


def clear_rest(pairing: Pairing, places: Places, alignment: int) -> None:
    """Zero the slots behind the last token's in its block, in the layers and heads of a copy.

    One launch on the current stream, which does not wait. Tokens that are in these slots too are
    lost unless they are loaded afterwards.

    Args:
        pairing: the cache, and the layers and heads to copy.
        places: the tokens of the copy, as slots or block ids.
        alignment: what divides the addresses of the chunks of the copy, a power of two. With the
            same one, no other kernel than that of the copy is needed.
    """
    cache = pairing.cache
    if cache.block_size == 1 or not places.num_tokens:
        return
    if places.are_blocks and places.num_tokens % cache.block_size == 0:
        return
    slots = _slots_behind(places, cache.block_size)
    if not len(slots):
        return
    zeros = _zero_rows(pairing, len(slots), alignment)
    own_heads = pairing.num_heads == cache.num_heads
    load_tokens(
        zeros, cache, slots, layers=pairing.layers, heads=None if own_heads else pairing.heads
    )


def _slots_behind(
    places: Places, block_size: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]] | torch.Tensor:
    """The slots behind the last token, on the host or the device; there -1 where there is none."""
    values = places.values
    if places.are_blocks:
        offsets = range(places.num_tokens % block_size, block_size)
        if isinstance(values, torch.Tensor):
            block = values[-1:].long()
            behind = torch.arange(offsets.start, block_size, device=values.device)
            return torch.where(block >= 0, block * block_size + behind, -1)
        block_id = int(values[-1])
        return block_id * block_size + np.array(offsets if block_id >= 0 else (), np.int64)
    if isinstance(values, torch.Tensor):
        numbers = torch.arange(len(values), device=values.device)
        last = torch.where(values >= 0, numbers, -1).max().reshape(1)
        # An index of no dimension would be read by the host, which waits for the device.
        slot = torch.where(last >= 0, values.index_select(0, last.clamp(min=0)).long(), -1)
        behind = slot + torch.arange(1, block_size, device=values.device)
        return torch.where((slot >= 0) & (behind // block_size == slot // block_size), behind, -1)
    real = np.flatnonzero(values >= 0)
    if not len(real):
        return np.empty(0, np.int64)
    slot_number = int(values[real[-1]])
    return np.arange(slot_number + 1, (slot_number // block_size + 1) * block_size)


def _zero_rows(pairing: Pairing, num_tokens: int, alignment: int) -> Chunks:
    """One row of zeros that is every token of every layer of a chunk: all strides are 0."""
    cache = pairing.cache
    row_bytes = sum(plane.row_bytes for plane in cache.planes) * pairing.num_heads
    layout = ChunkLayout(
        num_tokens=num_tokens,
        page_tokens=num_tokens,
        num_planes=1,
        num_layers=pairing.num_layers,
        row_bytes=row_bytes,
        is_per_layer=False,
        page_stride=0,
        token_stride=0,
        plane_stride=0,
        layer_stride=0,
    )
    zeros = torch.zeros(-(-row_bytes // 16) * 16, dtype=torch.uint8, device=cache.device)
    return Chunks(zeros, np.array([zeros.data_ptr()], np.int64), row_bytes, alignment, layout)
