"""Paged copy with conversion to fp8 e4m3 on a CPU; also the reference for the kernel.

Tokens are copied to or from temporary chunks of the cache's own dtype, and a few torch calls
convert each of these chunks. This reads and writes 2 bytes more for each element than the kernel.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kvheap.kernels.paged_copy_cpu import copy_on_cpu
from kvheap.kernels.token_copy import Chunks, TokenCopy

__all__ = ["LARGEST_E4M3", "SMALLEST_SCALE", "convert_on_cpu"]

LARGEST_E4M3 = 448.0

SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: the scale of zeros, and of the smallest numbers."""


def convert_on_cpu(copy: TokenCopy) -> None:
    """Copy at least one token between a cache and chunks of fp8, all on a CPU."""
    pairing, chunks = copy.pairing, copy.chunks
    chunk_bytes = pairing.chunk.size_bytes
    plain = torch.zeros((len(chunks.addresses), chunk_bytes), dtype=torch.uint8, device="cpu")
    addresses = plain.data_ptr() + np.arange(len(plain), dtype=np.int64) * chunk_bytes
    exact = replace(copy, chunks=Chunks(plain, addresses, chunk_bytes, 1, pairing.chunk))
    if copy.to_heap:
        copy_on_cpu(exact)
    is_kept = copy.places.as_slots(pairing.cache.block_size).as_mapping() >= 0
    chunk_tokens = chunks.layout.num_tokens
    num_chunks = -(-len(is_kept) // chunk_tokens)
    for row, address in enumerate(chunks.addresses.tolist()):
        first = row % num_chunks * chunk_tokens
        kept = torch.from_numpy(is_kept[first : first + chunk_tokens])
        _convert_chunk(copy, plain[row], address, kept)
    if not copy.to_heap:
        copy_on_cpu(exact)


def _convert_chunk(copy: TokenCopy, plain: torch.Tensor, address: int, kept: torch.Tensor) -> None:
    """Convert one chunk to fp8 or back; ``kept`` marks the tokens to store, bool ``[tokens]``."""
    pairing, chunks = copy.pairing, copy.chunks
    layout, scale_offset = chunks.layout, chunks.scale_offset
    assert scale_offset is not None
    heads = layout.row_bytes // pairing.cache.head_dim
    raw: Any = (ctypes.c_char * chunks.size_bytes).from_address(address)
    packed = torch.frombuffer(raw, dtype=torch.uint8)
    values = pairing.chunk.view(plain.view(pairing.cache.dtype), heads)
    data = packed[chunks.data_offset : chunks.data_offset + layout.size_bytes]
    codes = layout.view(data.view(torch.float8_e4m3fn), heads)
    scale_shape = (layout.num_planes, layout.num_layers, heads)
    scale_end = scale_offset + 4 * int(np.prod(scale_shape))
    scales = packed[scale_offset:scale_end].view(torch.float32).view(scale_shape)
    if not copy.to_heap:
        numbers = codes.float() * scales[:, :, None, :, None]
        values.copy_(numbers.to(values.dtype))
        return
    if not kept.any():
        return
    part = (
        slice(None),
        slice(None)
        if layout.is_per_layer
        else torch.tensor(list(pairing.chunk_layers), device="cpu"),
        slice(None),
        slice(pairing.chunk_head, pairing.chunk_head + pairing.num_heads),
    )
    wanted = values[part][:, :, : len(kept)].float()
    sizes = wanted.abs()
    finite = sizes.isfinite()
    sizes = torch.where(finite & kept[:, None, None], sizes, 0.0)
    largest = sizes.amax(dim=(2, 4))
    found = (largest / LARGEST_E4M3).clamp_min(SMALLEST_SCALE)
    scaled = wanted.div_(found[:, :, None, :, None])
    if not finite.all():
        most = (largest / found)[:, :, None, :, None]
        scaled = scaled.clamp(-most, most).copysign(scaled)  # a bound of 0 alone loses signs
    # The division may round to a little more.
    scaled = scaled.clamp_(-LARGEST_E4M3, LARGEST_E4M3)
    # As bytes: torch cannot index or select fp8 on a CPU.
    new, old = scaled.to(torch.float8_e4m3fn).view(torch.uint8), codes.view(torch.uint8)
    whole = old[part].clone()
    before = whole[:, :, : len(kept)]
    whole[:, :, : len(kept)] = torch.where(kept[:, None, None], new, before)
    old[part] = whole
    scales[part[0], part[1], part[3]] = found
