"""A few whole blocks on a CPU: as copies of many, and with the same errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import kvheap
from kvheap import (
    AdHocMemoryAllocator,
    BlockIds,
    BlockLayout,
    MemoryBatch,
    MemoryFormat,
    PagedKVCache,
    TensorMemoryAllocator,
)
from kvheap.engine import few_blocks

BLOCKS, SLOTS, HEADS, DIM, LAYERS = 24, 4, 2, 8, 3

F = MemoryFormat

TOKEN_BY_TOKEN = ("flash-hnd", "mla, padded", "indexer")
"""Caches whose blocks are not contiguous, or not in chunks."""


def _apart(*shape: int) -> list[torch.Tensor]:
    """Layers in storages of their own, which are not at equal distances."""
    return [torch.rand(*shape).half() for _ in range(LAYERS)]


def _shared(*shape: int) -> list[torch.Tensor]:
    return list(torch.rand(LAYERS, *shape).half())


def _padded(*shape: int) -> list[torch.Tensor]:
    wide = torch.rand(LAYERS, *shape[:-1], 3 * shape[-1]).half()
    return [layer[..., : shape[-1]] for layer in wide]


CACHES: dict[str, Callable[[], PagedKVCache]] = {
    "flash, shared": lambda: PagedKVCache.of(
        "vllm-flash-nhd", _shared(2, BLOCKS, SLOTS, HEADS, DIM)
    ),
    "flash, apart": lambda: PagedKVCache.of("vllm-flash-nhd", _apart(2, BLOCKS, SLOTS, HEADS, DIM)),
    "flash-hnd": lambda: PagedKVCache.of("vllm-flash-hnd", _shared(2, BLOCKS, HEADS, SLOTS, DIM)),
    "flashinfer": lambda: PagedKVCache.of(
        "vllm-flashinfer-nhd", _shared(BLOCKS, 2, SLOTS, HEADS, DIM)
    ),
    "mla, apart": lambda: PagedKVCache.of("mla", _apart(BLOCKS, SLOTS, DIM)),
    "mla, padded": lambda: PagedKVCache.of("mla", _padded(BLOCKS, SLOTS, DIM)),
    "indexer": lambda: PagedKVCache.of(
        "indexer", [torch.randint(0, 255, (BLOCKS, SLOTS, 132)).byte() for _ in range(LAYERS)]
    ),
    "cross-layer": lambda: PagedKVCache.of(
        "vllm-cross-layer", torch.rand(BLOCKS, LAYERS, 2, SLOTS, HEADS, DIM).half()
    ),
    "cpu": lambda: PagedKVCache.of(
        "vllm-cpu", torch.rand(LAYERS, BLOCKS, HEADS, SLOTS, 2 * DIM).half()
    ),
    "opaque": lambda: PagedKVCache.of("opaque", _shared(BLOCKS, 40)),
}


def _format(cache: PagedKVCache) -> MemoryFormat:
    return F.KV_2LTD if cache.chunk_planes == 2 else F.KV_MLA_FMT


def _allocated(cache: PagedKVCache, num_blocks: int, per_chunk: int) -> MemoryBatch:
    heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8), align_bytes=64)
    held = [heap.allocate([64], torch.uint8) for _ in range(9)]  # so that chunks form two runs
    for obj in held[::2]:
        assert obj is not None
        heap.free(obj)
    slots = BlockIds(np.arange(num_blocks))
    chunk_tokens = per_chunk * cache.block_size
    batch = heap.batched_store(cache, slots, chunk_tokens, _format(cache))
    assert batch is not None
    return batch


def _contents(batch: MemoryBatch) -> list[torch.Tensor]:
    return [obj.raw_tensor.clone() for obj in batch]


def _tensors(cache: PagedKVCache) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in cache.tensors]


def _equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.fixture
def takes_short_way(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each store and load since was one of a few blocks."""
    taken: list[bool] = []

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(few_blocks, name)

        def call(*arguments: Any) -> Any:
            transfer = function(*arguments)
            taken.append(transfer is not None)
            return transfer

        return call

    for name in ("store_few", "load_few"):
        monkeypatch.setattr(kvheap.engine.chunks, name, watched(name))
    return taken


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 12])
@pytest.mark.parametrize("name", CACHES)
def test_copies_as_many_blocks_are(
    name: str, num_blocks: int, per_chunk: int, takes_short_way: list[bool]
) -> None:
    cache = CACHES[name]()
    batch = _allocated(cache, num_blocks, per_chunk)
    rng = np.random.default_rng(num_blocks)
    ids = rng.permutation(BLOCKS)[:num_blocks]
    del takes_short_way[:]
    kvheap.store(cache, BlockIds(ids), batch)
    stored = _contents(batch)
    target = rng.permutation(BLOCKS)[:num_blocks].tolist()
    kvheap.load(batch, cache, BlockIds(target))
    loaded = _tensors(cache)
    is_contiguous = name not in TOKEN_BY_TOKEN
    assert takes_short_way == [is_contiguous, is_contiguous]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_blocks, "MAX_BLOCKS", 0)
        again = CACHES[name]()
        for tensor, was in zip(again.tensors, loaded, strict=True):
            tensor.copy_(was)
        kvheap.load(batch, again, BlockIds(target))
        assert _equal(_tensors(again), loaded)
        kvheap.store(again, BlockIds(target), batch)
    assert _equal(_contents(batch), stored)
    assert batch.num_tokens == num_blocks * cache.block_size


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, lambda ids: np.array(ids, "i4")])
def test_takes_ids_of_any_kind(kind: Any, takes_short_way: list[bool]) -> None:
    cache = CACHES["flash, shared"]()
    batch = _allocated(cache, 2, 1)
    kvheap.store(cache, BlockIds(kind([5, 3])), batch)
    assert takes_short_way[-1]
    assert torch.equal(batch[1].tensor[1, 2].view(-1), cache.tensors[2][1, 3].reshape(-1))


LONG_STEP = ((1 << 20) + 64) // 8
"""Ids at such a distance lie in pages of their own, where most of what is behind them is 0."""


def _without_memory(num_ids: int, step: int) -> torch.Tensor:
    """Ids at such a step, the last of which has lost its memory."""
    every = torch.zeros(num_ids * step, dtype=torch.int64)
    ids = every[::step]
    ids.copy_(torch.arange(num_ids, 0, -1))
    every.untyped_storage().resize_(8 * (num_ids - 1) * step)
    return ids


WRONG: dict[str, Any] = {
    "out of range": [0, BLOCKS],
    "negative": [0, -2],
    "floats": np.array([0.0, 1.0]),
    "too few": [0],
    "too many": [0, 1, 2],
    "two dimensions": np.zeros((2, 1), np.int64),
    "twice": [4, 4],
    "sparse": torch.tensor([0, 1]).to_sparse(),
    "without memory": _without_memory(2, 1),
    "without memory, in steps": _without_memory(2, LONG_STEP),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses_what_copies_of_many_refuse(name: str) -> None:
    cache = CACHES["flash, shared"]()
    batch = _allocated(cache, 2, 1)
    slots = BlockIds(WRONG[name])

    def error_of(call: Callable[..., None], *arguments: Any) -> str:
        try:
            call(*arguments)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def errors() -> list[str]:
        return [
            error_of(kvheap.store, cache, slots, batch),
            error_of(kvheap.load, batch, cache, slots),
        ]

    few = errors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_blocks, "MAX_BLOCKS", 0)
        assert few == errors()
    assert few[1]


@pytest.mark.parametrize("step", [1, LONG_STEP])
@pytest.mark.parametrize("num_ids", [2, 12])
def test_refuses_ids_whose_memory_was_taken_away(num_ids: int, step: int) -> None:
    cache = CACHES["flash, shared"]()
    batch = _allocated(cache, num_ids, 1)
    before = _contents(batch)
    slots = BlockIds(_without_memory(num_ids, step))
    for call in (kvheap.store, lambda *_: kvheap.load(batch, cache, slots)):
        with pytest.raises(ValueError, match=r"block ids ends at byte .* give it its memory back"):
            call(cache, slots, batch)
    assert _equal(_contents(batch), before)


def test_refuses_blocks_that_are_of_no_heap_also_where_their_layout_is_known() -> None:
    cache = CACHES["flash, shared"]()
    layout = _allocated(cache, 2, 1).layout
    batch = AdHocMemoryAllocator("cpu").batched_allocate(
        layout.shapes[0], layout.dtypes[0], 2, layout.fmt
    )
    assert batch.layout == layout
    slots = BlockIds([0, 1])
    for call in (kvheap.store, lambda *_: kvheap.load(batch, cache, slots)):
        with pytest.raises(TypeError, match="expected blocks of a heap, got blocks of AdHoc"):
            call(cache, slots, batch)


def test_skipped_blocks_are_left_as_they_are() -> None:
    cache = CACHES["flash, shared"]()
    batch = _allocated(cache, 2, 1)
    before = _tensors(cache)
    kvheap.load(batch, cache, BlockIds([-1, 7]))
    before[0][:, 7] = cache.tensors[0][:, 7]
    before[1][:, 7] = cache.tensors[1][:, 7]
    before[2][:, 7] = cache.tensors[2][:, 7]
    assert _equal(_tensors(cache), before)


def test_chunks_of_ever_new_lengths_do_not_fill_the_memory(monkeypatch: Any) -> None:
    monkeypatch.setattr(few_blocks, "MAX_LAYOUTS", 4)
    cache = CACHES["flash, shared"]()
    for per_chunk in range(1, 12):
        batch = _allocated(cache, 1, per_chunk)
        kvheap.store(cache, BlockIds([per_chunk]), batch)
        assert torch.equal(
            batch[0].tensor[0, 1, :SLOTS].view(-1), cache.tensors[1][0, per_chunk].view(-1)
        )
    assert sum(isinstance(key, BlockLayout) for key in cache.kept) <= 4


class TestNewChunks:
    """``batched_store``, with what it keeps of chunks."""

    @pytest.mark.parametrize("name", CACHES)
    def test_are_filled_as_allocated_ones_are(self, name: str, takes_short_way: list[bool]) -> None:
        cache = CACHES[name]()
        ids = np.random.default_rng(0).permutation(BLOCKS)[:5]
        wanted = _contents(_allocated(cache, 5, 2))
        batch = _allocated(cache, 5, 2)
        assert takes_short_way[-2:] == [False, name not in TOKEN_BY_TOKEN]
        assert _equal(_contents(batch), wanted)
        assert batch.num_tokens == 5 * cache.block_size
        heap: Any = batch.allocator
        again = heap.batched_store(cache, BlockIds(ids), 2 * cache.block_size, _format(cache))
        kvheap.store(cache, BlockIds(ids), batch)
        assert _equal(_contents(again), _contents(batch))

    def test_in_part(self, takes_short_way: list[bool]) -> None:
        cache = CACHES["flash, shared"]()
        heap: Any = _allocated(cache, 4, 1).allocator
        chunk_elements = [2 * LAYERS * SLOTS * HEADS * DIM]
        held = []
        while (room := heap.max_batch(chunk_elements, torch.float16)) > 3:
            held.append(heap.batched_allocate(chunk_elements, torch.float16, room - 3))
        assert room == 3
        slots = BlockIds(np.arange(5)[::-1])
        batch = heap.batched_store(cache, slots, SLOTS, allow_partial=True)
        assert takes_short_way[-1]
        assert (len(batch), batch.num_tokens) == (3, 3 * SLOTS)
        assert torch.equal(batch[2].tensor[0, 1].view(-1), cache.tensors[1][0, 2].reshape(-1))

    @pytest.mark.parametrize("name", ["out of range", "negative", "floats", "two dimensions"])
    def test_with_wrong_blocks_are_not_allocated(self, name: str) -> None:
        cache = CACHES["flash, shared"]()
        heap: Any = _allocated(cache, 2, 1).allocator
        before = heap.stats().allocated_bytes
        with pytest.raises((TypeError, ValueError)):
            heap.batched_store(cache, BlockIds(WRONG[name]), SLOTS)
        assert heap.stats().allocated_bytes == before

    @pytest.mark.parametrize(
        "wrong",
        [
            {"chunk_tokens": True},
            {"chunk_tokens": 1.0},
            {"chunk_tokens": torch.tensor(1.0)},
            {"fmt": 1},
            {"fmt": ["KV_2LTD"]},
            {"convert": 0},
            {"convert": np.False_},
            {"layers": 0},
            {"heads": 0},
        ],
        ids=repr,
    )
    def test_no_wrong_argument_counts_as_an_equal_one(self, wrong: dict[str, Any]) -> None:
        cache = CACHES["flash, shared"]()
        heap: Any = _allocated(cache, 2, 1).allocator
        given = {"chunk_tokens": 1, "fmt": None, "convert": False}
        batch = heap.batched_store(cache, range(2), **given)
        assert len(batch) == 2
        with pytest.raises((TypeError, ValueError)):
            heap.batched_store(cache, range(2), **given | wrong)

    def test_of_ever_new_lengths_do_not_fill_the_memory(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(kvheap.engine.chunks, "MAX_KEPT", 4)
        cache = CACHES["flash, shared"]()
        for per_chunk in range(1, 12):
            _allocated(cache, 1, per_chunk)
            assert len(cache.kept["new chunks"]) <= 4


class TestLifetimes:
    def test_freed_chunks(self) -> None:
        cache = CACHES["flash, shared"]()
        batch = _allocated(cache, 2, 1)
        batch.allocator.free(batch[0])
        with pytest.raises(kvheap.LifetimeError):
            kvheap.store(cache, BlockIds([0, 1]), batch)
        with pytest.raises(kvheap.LifetimeError):
            kvheap.load(batch, cache, BlockIds([0, 1]))

    def test_a_closed_heap(self) -> None:
        cache = CACHES["flash, shared"]()
        batch = _allocated(cache, 2, 1)
        batch.allocator.close()
        with pytest.raises(kvheap.ClosedError):
            kvheap.store(cache, BlockIds([0, 1]), batch)
        with pytest.raises(kvheap.ClosedError):
            kvheap.load(batch, cache, BlockIds([0, 1]))

    def test_a_view_for_reading(self) -> None:
        cache = CACHES["flash, shared"]()
        batch = _allocated(cache, 2, 1)
        view = batch.allocator.view(batch.metadata, writable=False)
        kvheap.load(view, cache, BlockIds([4, 2]))
        with pytest.raises(kvheap.ForeignObjectError):
            kvheap.store(cache, BlockIds([0, 1]), view)

    def test_blocks_that_a_transfer_fills(self) -> None:
        cache = CACHES["flash, shared"]()
        batch = _allocated(cache, 2, 1)
        far = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
        moved = kvheap.offload(batch, into=far)
        assert moved is not None
        kvheap.load(moved, cache, BlockIds([4, 2]))
        assert torch.equal(cache.tensors[1][0, 4].reshape(-1), moved[0].tensor[0, 1].view(-1))


class TestStoredTokens:
    def test_blocks_that_were_not_stored(self) -> None:
        cache = CACHES["flash, shared"]()
        batch = _allocated(cache, 4, 2)
        batch.set_num_tokens(3 * SLOTS)
        with pytest.raises(ValueError, match=f"token {3 * SLOTS} .* was never stored"):
            kvheap.load(batch, cache, BlockIds([0, 1, 2, 3]))
        kvheap.load(batch, cache, BlockIds([0, 1, 2]))
        kvheap.store(cache, BlockIds([0, 1, 2, 3]), batch)
        kvheap.load(batch, cache, BlockIds([0, 1, 2, 3]))

    def test_blocks_of_another_form(self) -> None:
        cache = CACHES["cpu"]()
        batch = _allocated(cache, 2, 1)
        other = CACHES["flash, shared"]()
        heap = batch.allocator
        with pytest.raises(ValueError, match="the chunks hold whole blocks"):
            kvheap.load(batch, other, BlockIds([0, 1]))
        rows = heap.batched_store(other, BlockIds([0, 1]), SLOTS)
        assert rows is not None
        kvheap.load(rows, other, BlockIds([0, 1]))
        with pytest.raises(ValueError, match="the chunks hold rows of tokens"):
            kvheap.load(rows, cache, BlockIds([0, 1]))

    def test_a_store_of_all_layers_after_one_of_some(self) -> None:
        cache = CACHES["flash, shared"]()
        batch = _allocated(cache, 2, 1)
        kvheap.store(cache, BlockIds([3, 4]), batch, layers=range(1, 2))
        kvheap.store(cache, BlockIds([5, 6]), batch)
        assert batch.num_tokens == 2 * SLOTS
        kvheap.load(batch, cache, BlockIds([0, 1]))
        assert torch.equal(cache.tensors[0][:, 0], cache.tensors[0][:, 5])
