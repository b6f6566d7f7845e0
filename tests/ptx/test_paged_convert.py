"""Compiled conversions to fp8 e4m3 and back, executed, beside plain loops over torch's numbers.

From sm_89 on there is an instruction for e4m3; sm_80 rounds in integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compiled import ON_ALL_CAPABILITIES, needs_compiler
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory

import kvheap
from kvheap import BlockIds, MemoryBatch, PagedKVCache, TensorMemoryAllocator

pytestmark = needs_compiler

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
E4M3 = torch.float8_e4m3fn


class World:
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
        return order[: self.num_tokens].tolist()

    def token(self, layer: int, plane: int, slot: int, head: int) -> torch.Tensor:
        """A row of the cache, ``[head_dim]``, a view."""
        block, at = divmod(slot, self.block_size)
        return self.tensors[layer][plane, block, at, head]

    def groups(self, slots: list[int]) -> Iterator[tuple[list[Any], list[Any], Any]]:
        """What shares a scale: rows of the cache, rows of codes, and the scale, ``[1]``; views."""
        for number, chunk in enumerate(self.batch):
            whole, scales = chunk.get_tensor(0), chunk.get_tensor(1)
            assert whole is not None
            assert scales is not None
            codes = whole.view(torch.uint8).unflatten(-1, (self.num_heads, self.head_dim))
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
    ) -> None:
        """Convert, and compare every byte with the reference; what is no number, as that."""
        before = [part.clone() for part in self.parts()]
        (self.store_reference if is_store else self.load_reference)(slots)
        expected = [part.clone() for part in self.parts()]
        for part, saved in zip(self.parts(), before, strict=True):
            part.copy_(saved)
        given = slots if given is None else given
        with running_ptx(capability, self.memory(slots, is_store), **options) as gpu:
            if is_store:
                kvheap.store(self.cache, given, self.batch, convert=True)
            else:
                kvheap.load(self.batch, self.cache, given, convert=True)
        has_instruction = any("e4m3x2" in name for name in gpu.executed)
        assert has_instruction == (capability >= 89)
        for part, wanted in zip(self.parts(), expected, strict=True):
            assert same(part, wanted).all()


def same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether each element has the same bits, or is not a number in both; bytes count as e4m3."""
    kind = torch.uint8 if one.dtype == torch.uint8 else torch.int16
    numbers = [x.view(E4M3).float() if kind == torch.uint8 else x for x in (one, other)]
    return (one.view(kind) == other.view(kind)) | (numbers[0].isnan() & numbers[1].isnan())


@ON_ALL_CAPABILITIES
@DTYPES
@pytest.mark.parametrize(
    ("head_dim", "chunk_tokens"), [(24, 32), (128, 100), (33, 8), (64, 1)], ids=str
)
def test_numbers_are_converted_and_come_back(
    head_dim: int, chunk_tokens: int, dtype: torch.dtype, capability: int
) -> None:
    """Chunks of one step and of several, rows of all alignments, a chunk that is partly filled."""
    world = World(dtype, 9 if chunk_tokens < 8 else 110, chunk_tokens, head_dim=head_dim)
    world.check(world.slots(), True, capability)
    world.check(world.slots(), False, capability)


@ON_ALL_CAPABILITIES
def test_skipped_tokens_and_blocks(capability: int) -> None:
    world = World(torch.float16, 46, 16)
    slots = [slot if at % 5 and not 16 <= at < 32 else -1 for at, slot in enumerate(world.slots())]
    ids = [7, -1, 0, 3, 2, 1, 8, -1, 4, 6, -1, 5]
    of_blocks = [-1 if ids[at // 4] < 0 else ids[at // 4] * 4 + at % 4 for at in range(46)]
    for is_store in (True, False):
        world.check(slots, is_store, capability)
        world.check(of_blocks, is_store, capability, given=BlockIds(ids, 46))


@ON_ALL_CAPABILITIES
def test_every_number_of_fp16_is_rounded_as_torch_does(capability: int) -> None:
    """In K with a scale of 1, which gives all ties; in V with infinities and what is no number."""
    world = World(torch.float16, 512, 512, num_heads=1, head_dim=128, num_layers=1)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    slots = world.slots()
    for plane in (0, 1):
        values = torch.where(every.abs() <= 448, every, 448.0) if plane == 0 else every
        for slot, row in zip(slots, values.view(512, 128), strict=True):
            world.token(0, plane, slot, 0).copy_(row)
    world.check(slots, True, capability)
    assert float(world.batch[0].get_tensor(1)[0, 0, 0]) == 1.0


@ON_ALL_CAPABILITIES
@DTYPES
def test_every_code_comes_back_with_its_sign(dtype: torch.dtype, capability: int) -> None:
    """Also -0.0."""
    world = World(dtype, 8, 8, num_heads=1, head_dim=32, num_layers=1)
    chunk = world.batch[0]
    every = torch.arange(256, dtype=torch.uint8).view(1, 8, 32)
    chunk.get_tensor(0).view(torch.uint8).copy_(every.expand(2, 1, 8, 32))
    chunk.get_tensor(1).copy_(torch.tensor([1.0, 0.37]).view(2, 1, 1))
    world.check(world.slots(), False, capability)
    zero = world.token(0, 0, world.slots()[4], 0)[0]
    assert zero == 0
    assert zero.signbit()
