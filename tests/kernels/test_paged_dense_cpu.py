"""Blocks that are one run in the heap: copied by one indexing call, whatever the words are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import paged_rows_cpu
from kvheap.kernels.paged_dense_cpu import DenseRows

LAYERS, TOKENS, BLOCKS = 3, 4, 40


@pytest.fixture(autouse=True)
def all_bytes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every run be copied so, and note which way each copy goes."""
    monkeypatch.setattr(paged_rows_cpu, "MIN_DENSE_BYTES", 0)
    ways: list[str] = []
    copy_places = DenseRows.copy_places

    def noted(self: DenseRows, *arguments: Any) -> None:
        ways.append("store" if arguments[-1] else "load")
        copy_places(self, *arguments)

    monkeypatch.setattr(DenseRows, "copy_places", noted)
    return ways


class Scene:
    """A cache of made-up bytes with layers apart, and chunks of ``per_chunk`` blocks in one run."""

    def __init__(self, width: int, per_chunk: int, skew: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(width)
        self.layers = []
        for _ in range(LAYERS):
            raw = torch.randint(0, 100, (BLOCKS * TOKENS * width + skew,), generator=generator)
            layer = raw.to(dtype)[skew:].view(BLOCKS, TOKENS, width)
            self.layers.append(layer)
        self.cache = PagedKVCache.of("mla", self.layers)
        self.per_chunk = per_chunk
        shape = (1, LAYERS, per_chunk * TOKENS, width)
        chunk_bytes = LAYERS * per_chunk * TOKENS * width * dtype.itemsize
        buffer = torch.full((20 * chunk_bytes,), 7, dtype=torch.uint8)
        self.heap = TensorMemoryAllocator(buffer, align_bytes=dtype.itemsize)
        batch = self.heap.batched_allocate(shape, dtype, 6, MemoryFormat.KV_MLA_FMT)
        assert batch is not None
        self.batch = batch

    def stored(self) -> torch.Tensor:
        """The chunks, a block after another: ``[blocks, layers, tokens, width]``."""
        chunks = torch.stack([obj.tensor[0] for obj in self.batch])
        blocks = chunks.unflatten(2, (self.per_chunk, TOKENS))
        return blocks.transpose(1, 2).flatten(0, 1)

    def blocks(self, ids: list[int]) -> torch.Tensor:
        return torch.stack([layer[ids] for layer in self.layers], 1)


KINDS = {
    "list": list,
    "int64": torch.tensor,
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "strided": lambda ids: torch.tensor([ids, ids]).T.reshape(-1)[::2],
    "array": np.array,
    "inference": lambda ids: _inferred(ids),
}


def _inferred(ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.tensor(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize(
    ("width", "skew", "dtype"),
    [
        (32, 0, torch.bfloat16),
        (4, 4, torch.bfloat16),
        (3, 2, torch.bfloat16),
        (5, 1, torch.float16),
        (7, 3, torch.uint8),
    ],
)
def test_there_and_back(
    width: int, skew: int, dtype: torch.dtype, per_chunk: int, kind: str, all_bytes: list[str]
) -> None:
    scene = Scene(width, per_chunk, skew, dtype)
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    count = 6 * per_chunk
    ids, others, rest = order[:count], order[count : 2 * count], order[2 * count :]
    make: Any = KINDS[kind]
    before = scene.blocks(ids)
    kvheap.store(scene.cache, BlockIds(make(ids)), scene.batch)  # the ordinary way
    for obj in scene.batch:
        obj.tensor.fill_(3)
    untouched = scene.heap.buffer[scene.batch.addresses[-1] + scene.batch.allocated_bytes :].clone()
    kvheap.store(scene.cache, BlockIds(make(ids)), scene.batch)
    assert torch.equal(scene.stored(), before)
    kept = scene.blocks(ids + rest)
    kvheap.load(scene.batch, scene.cache, BlockIds(make(others)))
    assert all_bytes == ["store", "load"]
    assert torch.equal(scene.blocks(others), before)
    assert torch.equal(scene.blocks(ids + rest), kept)
    after = scene.heap.buffer[scene.batch.addresses[-1] + scene.batch.allocated_bytes :]
    assert torch.equal(after, untouched)


def test_a_cache_that_was_first_used_in_inference_mode(all_bytes: list[str]) -> None:
    scene = Scene(32, 1, 0, torch.bfloat16)
    ids, others = list(range(6)), list(range(10, 16))
    with torch.inference_mode():
        for _ in range(2):
            kvheap.store(scene.cache, BlockIds(ids), scene.batch)
            kvheap.load(scene.batch, scene.cache, BlockIds(others))
    kvheap.load(scene.batch, scene.cache, BlockIds(others))
    assert torch.equal(scene.blocks(others), scene.blocks(ids))
    assert all_bytes == ["load", "store", "load", "load"]


@pytest.mark.parametrize(
    "wrong", [[0, 1, 2, 3, 4, BLOCKS], [0, 1, 2, 3, 4, -2], [0, 1, 2, 3, 4, 4]]
)
def test_wrong_ids_are_refused(wrong: list[int], all_bytes: list[str]) -> None:
    scene = Scene(32, 1, 0, torch.bfloat16)
    kvheap.store(scene.cache, BlockIds([5, 6, 7, 8, 9, 10]), scene.batch)
    before = scene.blocks(list(range(BLOCKS)))
    for ids in (wrong, torch.tensor(wrong)):
        with pytest.raises(ValueError, match=str(wrong[-1])):
            kvheap.load(scene.batch, scene.cache, BlockIds(ids))
    assert torch.equal(scene.blocks(list(range(BLOCKS))), before)
    assert all_bytes == []


def test_chunks_that_are_not_one_run_go_another_way(all_bytes: list[str]) -> None:
    scene = Scene(32, 1, 0, torch.bfloat16)
    layout = scene.batch.layout
    holes = scene.heap.batched_allocate(layout.shapes[0], layout.dtypes[0], 12, layout.fmt)
    assert holes is not None
    scene.heap.batched_free([holes[row] for row in range(0, 12, 2)])
    scene.batch = holes[1::2]
    ids = list(itertools.chain(range(3), range(20, 23)))
    for _ in range(2):
        kvheap.store(scene.cache, BlockIds(ids), scene.batch)
        assert torch.equal(scene.stored(), scene.blocks(ids))
    assert all_bytes == []
