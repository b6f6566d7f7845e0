"""Chunks of some layers or heads are loaded as those that they are, or as others on purpose.

Each layer and head of the caches here holds a number of its own, so that the reference is what a
load has written.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap import (
    BlockIds,
    MemoryBatch,
    MemoryBatchMetadata,
    MemoryFormat,
    MemoryObjMetadata,
    PagedKVCache,
    TensorMemoryAllocator,
    load,
    offload,
    store,
)

F = MemoryFormat
BLOCKS, N, CHUNK = 12, 4, 8
STACKED = [F.KV_2LTD, F.KV_2TLD, F.KV_PL2TD]
FORMATS = [*STACKED, F.KV_2TD, F.KV_T2D]
OTHERS = "was stored from .* call forget_origin"


def engine(layers: int = 3, heads: int = 2, first: int = 0) -> PagedKVCache:
    """Layer ``l`` and head ``h`` hold ``10 * (first + l) + h``."""
    tensors = []
    for layer in range(first, first + layers):
        values = 10 * layer + torch.arange(heads, dtype=torch.float32)
        tensors.append(values[:, None].expand(2, BLOCKS, N, heads, 8).contiguous())
    return PagedKVCache.of("vllm-flash-nhd", tensors)


def numbers(cache: PagedKVCache, slot: int = 40) -> Any:
    """What each layer and head holds at a slot, ``[L, H]``."""
    found = torch.stack([tensor[:, slot // N, slot % N] for tensor in cache.tensors])
    assert (found == found[:, :1, :, :1]).all()
    return found[:, 0, :, 0].tolist()


def heap() -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(1 << 18, dtype=torch.uint8), on_full=None)


def stored(cache: PagedKVCache, slots: Any = range(19), **how: Any) -> MemoryBatch:
    batch = heap().batched_store(cache, slots, CHUNK, **how)
    assert batch is not None
    return batch


def fresh(layers: int = 3, heads: int = 2) -> PagedKVCache:
    cache = engine(layers, heads)
    for tensor in cache.tensors:
        tensor.fill_(-1)
    return cache


TO = range(29, 48)


class TestLayers:
    @pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
    def test_others_are_refused(self, fmt: MemoryFormat) -> None:
        batch = stored(engine(4), fmt=fmt, layers=range(1, 3))
        for objs in (batch, list(batch)):
            target = fresh(4)
            for wrong in (range(2), range(2, 4)):
                with pytest.raises(ValueError, match=OTHERS):
                    load(objs, target, TO, layers=wrong)
            assert numbers(target) == [[-1, -1]] * 4
            load(objs, target, TO, layers=range(1, 3))
            assert numbers(target) == [[-1, -1], [10, 11], [20, 21], [-1, -1]]

    @pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
    def test_on_purpose(self, fmt: MemoryFormat) -> None:
        """A stage's two layers 1 and 2 are layers 3 and 4 of another's."""
        target = fresh(6)
        batch = stored(engine(4), fmt=fmt, layers=range(1, 3))
        batch.forget_origin()
        load(batch, target, TO, layers=range(3, 5))
        assert numbers(target)[2:] == [[-1, -1], [10, 11], [20, 21], [-1, -1]]

    @pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
    def test_all_layers_of_a_stage_are_some_of_a_larger_one(self, fmt: MemoryFormat) -> None:
        batch = stored(engine(2, first=2), fmt=fmt)
        target = fresh(4)
        for objs in (batch, list(batch)):
            load(objs, target, TO, layers=range(2, 4))
            assert numbers(target) == [[-1, -1], [-1, -1], [20, 21], [30, 31]]

    @pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
    def test_some_layers_are_all_of_a_smaller_stage(self, fmt: MemoryFormat) -> None:
        batch = stored(engine(4), fmt=fmt, layers=range(2, 4))
        target = fresh(2)
        load(batch, target, TO)
        assert numbers(target) == [[20, 21], [30, 31]]

    @pytest.mark.parametrize("fmt", [F.KV_2TD, F.KV_T2D], ids=lambda fmt: fmt.name)
    def test_chunks_of_one_layer(self, fmt: MemoryFormat) -> None:
        batch = stored(engine(3), fmt=fmt)
        per_layer = len(batch) // 3
        target = fresh(3)
        for here in range(3):
            objs = batch[here * per_layer : (here + 1) * per_layer]
            for there in range(3):
                if here != there:
                    with pytest.raises(
                        ValueError, match=f"layer {here} of its .* as layer {there}"
                    ):
                        load(objs, target, TO, layers=range(there, there + 1))
        load(batch[per_layer:], target, TO, layers=range(1, 3))
        assert numbers(target) == [[-1, -1], [10, 11], [20, 21]]
        swapped = [*batch[per_layer : 2 * per_layer], *batch[:per_layer]]
        with pytest.raises(ValueError, match=r"layer 1 of its cache on, .* as layer 0"):
            load(swapped, target, TO, layers=range(2))
        batch.forget_origin()
        load(swapped, target, TO, layers=range(2))
        assert numbers(target) == [[10, 11], [0, 1], [20, 21]]

    def test_a_chunk_of_all_layers_is_loaded_by_any_layer(self) -> None:
        batch = stored(engine(3))
        target = fresh(3)
        for layer in (2, 0, 1):
            load(batch, target, TO, layers=range(layer, layer + 1))
        assert numbers(target) == numbers(engine(3))
        assert batch.metadata.origins is None

    def test_whole_blocks(self) -> None:
        cache = PagedKVCache.of("vllm-cpu", [torch.rand(8, 2, 4, 16) for _ in range(3)])
        batch = heap().batched_store(cache, BlockIds([3, 1]), 8, layers=range(2))
        assert batch is not None
        with pytest.raises(ValueError, match=OTHERS):
            load(batch, cache, BlockIds([0, 2]), layers=range(1, 3))
        load(batch, cache, BlockIds([0, 2]), layers=range(2))

    def test_convert(self) -> None:
        tensors = [torch.rand(2, BLOCKS, N, 2, 8).half() for _ in range(3)]
        cache = PagedKVCache.of("vllm-flash-nhd", tensors)
        batch = stored(cache, layers=range(2), convert=True)
        with pytest.raises(ValueError, match=OTHERS):
            load(batch, cache, TO, layers=range(1, 3), convert=True)
        load(batch, cache, TO, layers=range(2), convert=True)


class TestHeads:
    @staticmethod
    def chunks(heads: int, layers: int = 3) -> MemoryBatch:
        batch = heap().batched_allocate([2, layers, CHUNK, 8 * heads], torch.float32, 3)
        assert batch is not None
        return batch

    @pytest.mark.parametrize("is_list", [False, True])
    def test_others_are_refused(self, is_list: bool) -> None:
        source, target = engine(heads=4), fresh(heads=4)
        batch = self.chunks(2)
        objs: Any = list(batch) if is_list else batch
        store(source, range(19), objs, heads=slice(2, 4))
        for wrong in (slice(0, 2), slice(1, 3)):
            with pytest.raises(ValueError, match=r"head 2 of its cache on, .* as head"):
                load(objs, target, TO, heads=wrong)
        load(objs, target, TO, heads=slice(2, 4))
        assert numbers(target)[1] == [-1, -1, 12, 13]
        load(objs, target, TO, heads=slice(-2, None))
        batch.forget_origin()
        load(objs, target, TO, heads=slice(0, 2))
        assert numbers(target)[1] == [12, 13, 12, 13]

    def test_another_degree_of_tensor_parallelism(self) -> None:
        """A rank's chunks in a larger cache, and a larger cache's in a rank."""
        whole, rank = fresh(heads=4), fresh(heads=2)
        load(stored(engine(heads=2)), whole, TO, heads=slice(2, 4))
        assert numbers(whole)[2] == [-1, -1, 20, 21]
        of_all = stored(engine(heads=4))
        for begin in (0, 1, 2):
            load(of_all, rank, TO, heads=slice(begin, begin + 2))
            assert numbers(rank)[1] == [10 + begin, 11 + begin]
        some = self.chunks(2)
        store(engine(heads=4), range(19), some, heads=slice(2, 4))
        load(some, rank, TO)
        assert numbers(rank)[1] == [12, 13]
        together = self.chunks(4)
        for begin in (2, 0):
            store(rank, TO, together, heads=slice(begin, begin + 2))
        load(together, whole, TO)

    def test_layers_and_heads(self) -> None:
        source, target = engine(heads=4), fresh(heads=4)
        batch = self.chunks(2, layers=2)
        store(source, range(19), batch, layers=range(1, 3), heads=slice(1, 3))
        for layers, heads in ((range(2), slice(1, 3)), (range(1, 3), slice(2, 4))):
            with pytest.raises(ValueError, match="layer 1, head 1 of its cache"):
                load(batch, target, TO, layers=layers, heads=heads)
        load(batch, target, TO, layers=range(1, 3), heads=slice(1, 3))
        assert numbers(target) == [[-1] * 4, [-1, 11, 12, -1], [-1, 21, 22, -1]]


WAYS: dict[str, Callable[[MemoryBatch], Any]] = {
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch.metadata)),
    "json": lambda batch: MemoryBatchMetadata.from_dict(
        json.loads(json.dumps(batch.metadata.to_dict()))
    ),
    "json of objects": lambda batch: [
        MemoryObjMetadata.from_dict(json.loads(json.dumps(obj.metadata.to_dict()))) for obj in batch
    ],
    "view of a view": lambda batch: batch.allocator.view(batch.metadata).metadata,  # type: ignore[attr-defined]
}


class TestWhereItGoes:
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
    @pytest.mark.parametrize("way", WAYS)
    def test_to_another_process(self, way: str, fmt: MemoryFormat) -> None:
        batch = stored(engine(4), fmt=fmt, layers=range(1, 3))
        view = batch.allocator.view(WAYS[way](batch))  # type: ignore[attr-defined]
        target = fresh(4)
        for objs in (view, list(view)):
            with pytest.raises(ValueError, match=OTHERS):
                load(objs, target, TO, layers=range(2))
            load(objs, target, TO, layers=range(1, 3))
        view.forget_origin()
        load(view, target, TO, layers=range(2))
        assert numbers(target) == [[10, 11], [20, 21], [20, 21], [-1, -1]]

    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
    @pytest.mark.parametrize("is_list", [False, True])
    def test_to_another_heap(self, is_list: bool, fmt: MemoryFormat) -> None:
        batch = stored(engine(4), fmt=fmt, layers=range(1, 3))
        away = offload(list(batch) if is_list else batch, into=heap())
        assert away is not None
        target = fresh(4)
        with pytest.raises(ValueError, match=OTHERS):
            load(away, target, TO, layers=range(2, 4))
        load(away, target, TO, layers=range(1, 3))
        assert numbers(target)[1:3] == [[10, 11], [20, 21]]

    def test_what_is_not_known_is_accepted(self) -> None:
        """Other means of filling, and metadata of a version that knew no origins."""
        batch = stored(engine(4), layers=range(1, 3))
        values = batch.metadata.to_dict()
        del values["origins"]
        view = batch.allocator.view(MemoryBatchMetadata.from_dict(values))  # type: ignore[attr-defined]
        load(view, fresh(4), TO, layers=range(2))
        batch.set_num_tokens(19)
        load(batch, fresh(4), TO, layers=range(2))

    @pytest.mark.parametrize(
        "wrong", [3, "ab", [], [1], [[1, 0, None]], [[-1, 0, None, 0]], [["1", 0, None, 0]], [True]]
    )
    def test_damaged_metadata(self, wrong: Any) -> None:
        batch = stored(engine(4), layers=range(1, 3))
        with pytest.raises(ValueError, match="origins"):
            MemoryBatchMetadata.from_dict({**batch.metadata.to_dict(), "origins": wrong})
        obj = {**batch[0].metadata.to_dict(), "origin": [wrong]}
        with pytest.raises(ValueError, match="origin"):
            MemoryObjMetadata.from_dict(obj)

    def test_as_many_origins_as_blocks(self) -> None:
        batch = stored(engine(4), layers=range(1, 3))
        values = batch.metadata.to_dict()
        two = MemoryBatchMetadata.from_dict({**values, "origins": values["origins"] * 2})
        with pytest.raises(ValueError, match="origins are those of 2 blocks, but there are 3"):
            batch.allocator.view(two)  # type: ignore[attr-defined]


class TestStoresOneAfterTheOther:
    def test_the_last_one_counts(self) -> None:
        source, target = engine(4), fresh(4)
        batch = stored(source, layers=range(1, 3))
        store(source, range(19), batch, layers=range(2))
        load(batch, target, TO, layers=range(2))
        assert numbers(target) == [[0, 1], [10, 11], [-1, -1], [-1, -1]]
        with pytest.raises(ValueError, match=OTHERS):
            load(batch, target, TO, layers=range(1, 3))

    @pytest.mark.parametrize("is_list", [False, True])
    def test_skipped_tokens_of_other_layers_are_lost(self, is_list: bool) -> None:
        source, target = engine(4), fresh(4)
        batch = stored(source, layers=range(1, 3))
        objs: Any = list(batch) if is_list else batch
        store(source, [*[-1] * 17, 17, 18], objs, layers=range(2))
        load(objs[:2], target, range(29, 45), layers=range(1, 3))  # as they were
        with pytest.raises(ValueError, match=OTHERS):
            load(objs[2:3], target, [-1, 46, 47], layers=range(1, 3))
        load(objs[2:3], target, [-1, 46, 47], layers=range(2))
        with pytest.raises(ValueError, match=r"token 0 .* was never stored"):
            load(objs[2:3], target, [45, 46, 47], layers=range(2))

    @settings(deadline=None, max_examples=80)
    @given(st.data())
    def test_beside_what_the_bytes_say(self, data: st.DataObject) -> None:
        """Random stores and loads of whole batches and of chunks, beside the layers of each."""
        fmt = data.draw(st.sampled_from([F.KV_2LTD, F.KV_2TD]))
        source, target = engine(4), fresh(4)
        batch = stored(source, range(16), fmt=fmt, layers=range(2))
        held = [0, 0]
        for _ in range(data.draw(st.integers(1, 8))):
            which = data.draw(st.sampled_from([None, 0, 1]))
            objs: Any = batch
            if which is not None:
                objs = [batch[which], batch[which + 2]] if fmt is F.KV_2TD else [batch[which]]
            rows = [0, 1] if which is None else [which]
            slots, first = range(48 - CHUNK * len(rows), 48), data.draw(st.integers(0, 2))
            layers = range(first, first + 2)
            if data.draw(st.booleans()):
                store(source, slots, objs, layers=layers)
                for row in rows:
                    held[row] = first
            elif all(held[row] == first for row in rows):
                for tensor in target.tensors:
                    tensor.fill_(-1)
                load(objs, target, slots, layers=layers)
                for slot in (slots[0], slots[-1]):
                    for layer, found in enumerate(numbers(target, slot)):
                        is_loaded = layer in layers
                        assert found == ([10 * layer, 10 * layer + 1] if is_loaded else [-1, -1])
            else:
                with pytest.raises(ValueError, match=OTHERS):
                    load(objs, target, slots, layers=layers)
