"""Blocks that are one run in the heap: copied by one indexing call, whatever the words are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import paged_blocks_cpu
from kvheap.kernels.paged_dense_cpu import DenseRows
from kvheap.kernels.paged_single_cpu import SingleRows

LAYERS, TOKENS, BLOCKS = 3, 4, 40


@pytest.fixture(autouse=True)
def all_bytes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every run be copied so, and note which way each copy goes."""
    monkeypatch.setattr(paged_blocks_cpu, "MAX_NUMPY_BYTES", -1)
    ways: list[str] = []

    def watch(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def noted(self: object, *arguments: Any) -> Any:
            found = method(self, *arguments)
            ways.append("store" if arguments[-1] else "load")
            return found

        monkeypatch.setattr(kind, name, noted)

    watch(DenseRows, "copy_places")
    watch(SingleRows, "copy")
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


class TestManyBlocks:
    """More blocks than are looked at one by one, of one layer, with and without padding."""

    COUNT, PAGES = 100, 260

    def scene(self, align_bytes: int) -> tuple[PagedKVCache, torch.Tensor, Any]:
        layer = torch.randn(self.PAGES, TOKENS, 20).bfloat16()
        chunk_bytes = -(-TOKENS * 20 * 2 // align_bytes) * align_bytes
        buffer = torch.full(((self.COUNT + 1) * chunk_bytes,), 7, dtype=torch.uint8)
        heap = TensorMemoryAllocator(buffer, align_bytes=align_bytes)
        shape = (1, 1, TOKENS, 20)
        batch = heap.batched_allocate(shape, torch.bfloat16, self.COUNT, MemoryFormat.KV_MLA_FMT)
        return PagedKVCache.of("mla", [layer]), layer, batch

    @pytest.mark.parametrize("align_bytes", [16, 256, 4096])
    def test_there_and_back(self, align_bytes: int, all_bytes: list[str]) -> None:
        cache, layer, batch = self.scene(align_bytes)
        order = torch.randperm(self.PAGES)
        ids, others = order[: self.COUNT], order[self.COUNT : 2 * self.COUNT]
        kvheap.store(cache, BlockIds(ids), batch)  # the ordinary way
        batch.allocator.buffer.fill_(7)
        kvheap.store(cache, BlockIds(ids), batch)
        memory = batch.allocator.buffer[: self.COUNT * batch.allocated_bytes].view(self.COUNT, -1)
        wanted = layer[ids].reshape(self.COUNT, -1).view(torch.uint8)
        assert torch.equal(memory[:, : wanted.shape[1]], wanted)
        assert (memory[:, wanted.shape[1] :] == 7).all()
        rest = order[2 * self.COUNT :]
        kept = layer[rest].clone()
        transfer = kvheap.load(batch, cache, BlockIds(others))
        assert transfer.num_bytes == self.COUNT * TOKENS * 20 * 2
        assert torch.equal(layer[others], layer[ids])
        assert torch.equal(layer[rest], kept)
        assert all_bytes == ["store", "load"]

    @pytest.mark.parametrize("last", [PAGES, -2, 4], ids=["too high", "negative", "twice"])
    def test_wrong_ids_are_refused(self, last: int, all_bytes: list[str]) -> None:
        cache, layer, batch = self.scene(16)
        kvheap.store(cache, BlockIds(torch.arange(self.COUNT)), batch)
        before = layer.clone()
        wrong = torch.arange(self.COUNT)
        wrong[-1] = last
        with pytest.raises(ValueError, match=str(last)):
            kvheap.load(batch, cache, BlockIds(wrong))
        assert torch.equal(layer, before)
        if last == 4:  # a store may read a block twice
            kvheap.store(cache, BlockIds(wrong), batch)
            assert torch.equal(batch[-1].tensor[0, 0], layer[4])
            assert all_bytes == ["store"]
        else:
            with pytest.raises(ValueError, match=str(last)):
                kvheap.store(cache, BlockIds(wrong), batch)
            assert all_bytes == []

    def test_blocks_that_lack_tokens_go_the_ordinary_way(self, all_bytes: list[str]) -> None:
        cache, layer, batch = self.scene(16)
        ids = torch.arange(self.COUNT)
        kvheap.store(cache, BlockIds(ids), batch)
        partly = BlockIds(ids, num_tokens=self.COUNT * TOKENS - 1)
        kvheap.store(cache, partly, batch)
        assert all_bytes == []
        with pytest.raises(ValueError, match="stored"):
            kvheap.load(batch, cache, BlockIds(ids + self.COUNT))
        kvheap.load(batch, cache, BlockIds(ids + self.COUNT, num_tokens=self.COUNT * TOKENS - 1))
        assert torch.equal(layer[self.COUNT : 2 * self.COUNT - 1], layer[: self.COUNT - 1])
