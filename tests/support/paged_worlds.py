"""Worlds in which paged copies are checked: an engine, a heap, and what a copy should change.

Every check compares every byte of the engine's storages and of the heap's buffers, so what lies
between the tokens and around them must be as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from paged_reference import (
    PER_LAYER,
    WITHOUT_KEYS,
    Engine,
    Sizes,
    Strides,
    chunk_shape,
    pairs,
    random_bytes,
)

import kvheap
from kvheap import MemoryBatch, MemoryFormat, PagedKVCache, TensorMemoryAllocator

TWO_PLANE_FORMATS = (
    MemoryFormat.KV_2LTD,
    MemoryFormat.KV_2TD,
    MemoryFormat.KV_T2D,
    MemoryFormat.KV_2TLD,
    MemoryFormat.KV_PL2TD,
    MemoryFormat.KV_2PHTLD,
    MemoryFormat.KV_PHL2TD,
)
FLASH = "vllm-flash-nhd"
FUSED = "vllm-lbhnc"

BOTH_WAYS = pytest.mark.parametrize("is_store", [True, False], ids=["store", "load"])

SMALL = Sizes(num_layers=2, num_blocks=5, block_size=4, num_heads=3, head_dim=8)
PADDED = Strides(padding=8, guard=24)


class World:
    """An engine, a heap, and a batch of the heap among blocks that must not change."""

    def __init__(
        self,
        engine: Engine,
        fmt: MemoryFormat,
        num_tokens: int,
        chunk_tokens: int,
        *,
        num_layers: int | None = None,
        num_heads: int | None = None,
        num_buffers: int = 1,
        align_bytes: int = 64,
        seed: int = 1,
    ) -> None:
        self.engine, self.num_tokens = engine, num_tokens
        shape = chunk_shape(engine, fmt, chunk_tokens, num_layers, num_heads)
        num_blocks = -(-num_tokens // chunk_tokens)
        if fmt in PER_LAYER:
            num_blocks *= engine.sizes.num_layers if num_layers is None else num_layers
        size = torch.Size(shape).numel() * engine.sizes.dtype.itemsize
        size = -(-size // align_bytes) * align_bytes
        # Just enough for _scattered, so that blocks are taken from all free places.
        room = -(-(num_blocks + num_blocks // 2 + 1) // num_buffers) * size
        generator = torch.Generator().manual_seed(seed)
        self.buffers = [random_bytes(room, generator).to(engine.device) for _ in range(num_buffers)]
        self.heap = TensorMemoryAllocator(self.buffers[0], align_bytes)
        for buffer in self.buffers[1:]:
            self.heap.add_buffer(buffer)
        self.batch = self._scattered(shape, fmt, num_blocks)

    def _scattered(self, shape: tuple[int, ...], fmt: MemoryFormat, num_blocks: int) -> MemoryBatch:
        """Blocks that are not all adjacent: every third place is another batch's."""
        dtype = self.engine.sizes.dtype
        others = self.heap.batched_allocate(shape, dtype, num_blocks + num_blocks // 2, fmt)
        assert others is not None
        self.neighbours = list(others)[::3]
        self.heap.batched_free([obj for i, obj in enumerate(others) if i % 3])
        batch = self.heap.batched_allocate(shape, dtype, num_blocks, fmt)
        assert batch is not None
        return batch

    def parts(self) -> list[torch.Tensor]:
        return [*self.engine.storages, *self.buffers]

    def snapshot(self) -> list[torch.Tensor]:
        return [part.clone() for part in self.parts()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        for part, saved in zip(self.parts(), snapshot, strict=True):
            part.copy_(saved)

    def differences(self, expected: list[torch.Tensor]) -> list[tuple[int, int]]:
        """(which part, how many bytes of it are not as expected)."""
        counts = [int((a != b).sum()) for a, b in zip(self.parts(), expected, strict=True)]
        return [(at, count) for at, count in enumerate(counts) if count]

    def expected(self, slots: Sequence[int], is_store: bool, **kept: Any) -> list[torch.Tensor]:
        """Every byte after the transfer; the world is as before."""
        before = self.snapshot()
        for engine_row, heap_row in pairs(self.engine, self.batch, slots, **kept):
            if is_store:
                heap_row.copy_(engine_row)
            else:
                engine_row.copy_(heap_row)
        after = self.snapshot()
        self.restore(before)
        return after


def slots_of_blocks(ids: Sequence[int], block_size: int, num_tokens: int) -> list[int]:
    """The slots of the first tokens of some blocks."""
    return [ids[i // block_size] * block_size + i % block_size for i in range(num_tokens)]


def format_of(layout: str) -> MemoryFormat:
    return MemoryFormat.KV_MLA_FMT if layout in WITHOUT_KEYS else MemoryFormat.KV_2LTD


def cache_of(engine: Engine) -> PagedKVCache:
    return PagedKVCache.of(
        engine.layout, engine.tensors, block_size=engine.block_size, **engine.facts
    )


def random_slots(engine: Engine, num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).permutation(engine.num_slots)[:num_tokens].tolist()


def transfer(world: World, slots: Any, is_store: bool, **kept: Any) -> None:
    cache = cache_of(world.engine)
    if is_store:
        kvheap.store(cache, slots, world.batch, **kept)
    else:
        kvheap.load(world.batch, cache, slots, **kept)


def check_copy(
    world: World, slots: Sequence[int], is_store: bool, given_as: Any = None, **kept: Any
) -> None:
    """Copy the tokens at ``slots``, given so or as ``given_as``; compare every byte; undo."""
    before = world.snapshot()
    expected = world.expected(slots, is_store, **kept)
    moved = world.differences(expected)
    assert bool(moved) == any(slot >= 0 for slot in slots)  # a copy of nothing would be seen
    transfer(world, slots if given_as is None else given_as, is_store, **kept)
    assert world.differences(expected) == []
    world.restore(before)


def check_moves(
    parts: Sequence[torch.Tensor],
    moves: Sequence[tuple[torch.Tensor, torch.Tensor]],
    run: Callable[[], None],
) -> None:
    """``run`` must copy each (source, target), views of ``parts``, and touch no other byte."""
    before = [part.clone() for part in parts]
    for source, target in moves:
        target.copy_(source)
    expected = [part.clone() for part in parts]
    for part, saved in zip(parts, before, strict=True):
        part.copy_(saved)
    assert any(not torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    run()
    differing = [
        0 if torch.equal(part, wanted) else int((part != wanted).sum())
        for part, wanted in zip(parts, expected, strict=True)
    ]
    for part, saved in zip(parts, before, strict=True):
        part.copy_(saved)
    assert differing == [0] * len(parts)


def check_refused(
    world: World, error: type[Exception], message: str, slots: Any, is_store: bool, **kept: Any
) -> None:
    before = world.snapshot()
    with pytest.raises(error, match=message):
        transfer(world, slots, is_store, **kept)
    assert world.differences(before) == []
