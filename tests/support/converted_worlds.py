"""Compiled conversions to fp8 and back, beside plain loops over torch's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ptx_machine.jit import Gpu, running_ptx
from ptx_machine.memory import GlobalMemory

import kvheap
from kvheap import MemoryBatch, MemoryObj, PagedKVCache, TensorMemoryAllocator

E4M3 = torch.float8_e4m3fn


def codes_and_scales(chunk: MemoryObj) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes ``[planes, layers, tokens, D]`` and float32 ``[planes, layers, heads]`` of a chunk."""
    codes, scales = chunk.get_tensor(0), chunk.get_tensor(1)
    assert codes is not None
    assert scales is not None
    return codes.view(torch.uint8), scales


class ConvertedWorld:
    """A cache of vLLM's FlashAttention, and chunks of fp8 with their scales in a heap."""

    def __init__(
        self,
        dtype: torch.dtype,
        num_tokens: int,
        chunk_tokens: int,
        num_heads: int = 2,
        head_dim: int = 24,
        num_layers: int = 2,
    ) -> None:
        self.num_tokens, self.chunk_tokens = num_tokens, chunk_tokens
        self.num_heads, self.head_dim, self.num_layers = num_heads, head_dim, num_layers
        self.num_blocks, self.block_size = num_tokens // 4 + 3, 4
        shape = (2, self.num_blocks, self.block_size, num_heads, head_dim)
        random = torch.Generator().manual_seed(5)
        sizes = (1e-3, 30.0, 1.0)
        self.tensors = [
            (torch.randn(shape, generator=random) * size).to(dtype) for size in sizes[:num_layers]
        ]
        self.cache = PagedKVCache.of("vllm-flash-nhd", self.tensors)
        num_chunks = -(-num_tokens // chunk_tokens)
        codes = (2, num_layers, chunk_tokens, num_heads * head_dim)
        scales = (2, num_layers, num_heads)
        buffer = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=random)
        self.heap = TensorMemoryAllocator(buffer, 64)
        batch = self.heap.batched_allocate([codes, scales], [E4M3, torch.float32], num_chunks)
        assert batch is not None
        self.batch: MemoryBatch = batch

    def slots(self) -> list[int]:
        order = np.random.default_rng(2).permutation(self.num_blocks * self.block_size)
        return [int(slot) for slot in order[: self.num_tokens]]

    def token(self, layer: int, plane: int, slot: int, head: int) -> torch.Tensor:
        """A row of the cache, ``[head_dim]``, a view."""
        block, at = divmod(slot, self.block_size)
        return self.tensors[layer][plane, block, at, head]

    def groups(self, slots: list[int]) -> Iterator[tuple[list[Any], list[Any], Any]]:
        """What shares a scale: rows of the cache, rows of codes, and the scale, ``[1]``; views."""
        for number, chunk in enumerate(self.batch):
            whole, scales = codes_and_scales(chunk)
            codes = whole.view(*whole.shape[:-1], self.num_heads, self.head_dim)
            first = number * self.chunk_tokens
            kept = [
                (at, slot)
                for at, slot in enumerate(slots[first : first + self.chunk_tokens])
                if slot >= 0
            ]
            for plane, layer, head in np.ndindex(2, self.num_layers, self.num_heads):
                rows = [self.token(layer, plane, slot, head) for _, slot in kept]
                places = [codes[plane, layer, at, head] for at, _ in kept]
                yield rows, places, scales[plane, layer, head : head + 1]

    def memory(self, slots: list[int], is_store: bool) -> GlobalMemory:
        groups = list(self.groups(slots))
        theirs = [row for rows, _, _ in groups for row in rows]
        ours = [row for _, rows, _ in groups for row in rows]
        if is_store:
            return GlobalMemory(theirs, ours + [scale for rows, _, scale in groups if rows])
        return GlobalMemory(ours + [scale for _, _, scale in groups], theirs)

    def parts(self) -> list[torch.Tensor]:
        return [*self.tensors, self.heap.buffer]

    def store_reference(self, slots: list[int]) -> None:
        for rows, places, scale in self.groups(slots):
            if not rows:
                continue
            values = torch.stack(rows).float()
            finite = torch.where(values.isfinite(), values.abs(), 0.0)
            scale.fill_(max(float(finite.max() / 448.0), 2.0**-126))
            for place, value in zip(places, values, strict=True):
                place.copy_((value / scale).clamp(-448, 448).to(E4M3).view(torch.uint8))

    def load_reference(self, slots: list[int]) -> None:
        for rows, places, scale in self.groups(slots):
            for row, place in zip(rows, places, strict=True):
                row.copy_((place.view(E4M3).float() * scale).to(row.dtype))

    def check(
        self, slots: list[int], is_store: bool, capability: int, given: Any = None, **options: Any
    ) -> Gpu:
        """Convert, and compare every byte with the reference, but for the kind of a NaN."""
        before = [part.clone() for part in self.parts()]
        (self.store_reference if is_store else self.load_reference)(slots)
        self.unify_nans(slots, is_store)
        expected = [part.clone() for part in self.parts()]
        for part, saved in zip(self.parts(), before, strict=True):
            part.copy_(saved)
        given = slots if given is None else given
        with running_ptx(capability, self.memory(slots, is_store), **options) as gpu:
            if is_store:
                kvheap.store(self.cache, given, self.batch, convert=True)
            else:
                kvheap.load(self.batch, self.cache, given, convert=True)
        self.unify_nans(slots, is_store)
        for part, wanted in zip(self.parts(), expected, strict=True):
            assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
        return gpu

    def unify_nans(self, slots: list[int], is_store: bool) -> None:
        """Give what is no number among the results one pattern of bits."""
        for rows, places, _ in self.groups(slots):
            for place in places if is_store else ():
                place[place & 0x7F == 0x7F] = 0x7F
            for row in () if is_store else rows:
                row[row.isnan()] = torch.nan
