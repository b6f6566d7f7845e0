"""PrefixStore against a naive model of the same policy, and its mistakes."""

from __future__ import annotations

import random

import pytest
import torch

from kvheap import MemoryObj, TensorMemoryAllocator
from kvheap.prefix.store import PrefixStore, RequestTooLargeError
from kvheap.replay.geometry import GEOMETRIES
from kvheap.replay.replay import Replay

TINY = GEOMETRIES["tiny"]


def heap_of(chunks: int) -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(chunks * TINY.chunk_bytes, dtype=torch.uint8))


def chunks_of(count: int) -> torch.Tensor:
    return torch.zeros(count, *TINY.shape, dtype=TINY.dtype)


class NaiveCache:
    """The policy in so many words: a list, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.order: list[int] = []
        self.hits = self.evicted = 0

    def serve(self, ids: list[int]) -> None:
        hits = 0
        while hits < len(ids) and ids[hits] in self.order:
            hits += 1
        self.hits += hits
        pinned = set(ids) & set(self.order)
        missing = [i for i in dict.fromkeys(ids[hits:]) if i not in self.order]
        while len(self.order) + len(missing) > self.capacity:
            self.order.remove(next(i for i in self.order if i not in pinned))
            self.evicted += 1
        self.order += missing
        for i in reversed(ids):
            self.order.remove(i)
            self.order.append(i)


@pytest.mark.parametrize("seed", range(5))
def test_it_evicts_what_the_naive_model_evicts(seed: int) -> None:
    source = random.Random(seed)
    replay, model = Replay(heap_of(20), TINY), NaiveCache(20)
    for _ in range(300):
        prompt = source.randrange(6)
        ids = [100 * prompt + i for i in range(source.randint(1, 8))]
        ids += [source.randrange(1000) for _ in range(source.randint(0, 4))]
        replay.serve(ids)
        model.serve(ids)
        assert list(replay.store._chunks) == model.order
    assert (replay.hits, replay.store.num_evicted) == (model.hits, model.evicted)
    assert replay.mismatches == 0
    assert model.evicted > 100
    replay.store.allocator.address_manager.check()


def test_a_request_beyond_the_heap_leaves_it_as_it_was() -> None:
    store = PrefixStore(heap_of(4), TINY)
    store.store([1, 2], chunks_of(2))
    with pytest.raises(RequestTooLargeError, match="5 more chunks of 4096 bytes"):
        store.store([3, 4, 5, 6, 7], chunks_of(5))
    with store.in_flight([1, 2]), pytest.raises(RequestTooLargeError, match="only 0 may be"):
        store.store([3, 4, 5], chunks_of(3))
    assert list(store._chunks) == [2, 1]
    assert not any(chunk.pin_count for chunk in store._chunks.values())


@pytest.mark.parametrize(("ids", "message"), [([1], "stored already"), ([5, 5], "named twice")])
def test_an_id_is_stored_once(ids: list[int], message: str) -> None:
    store = PrefixStore(heap_of(4), TINY)
    store.store([1, 2], chunks_of(2))
    with pytest.raises(ValueError, match=message):
        store.store(ids, chunks_of(len(ids)))
    assert store.allocator.stats().allocated_bytes == 2 * TINY.chunk_bytes


def test_a_store_that_fails_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixStore(heap_of(4), TINY)
    with pytest.raises(ValueError, match="source must have shape"):
        store.store([1, 2], chunks_of(3))

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.allocator, "_scatter", fail)
    with pytest.raises(KeyboardInterrupt):
        store.store([1, 2], chunks_of(2))
    assert len(store) == store.allocator.stats().allocated_bytes == 0
    assert store.allocate_seconds == []


def test_it_finds_the_longest_stored_prefix_and_where_it_is() -> None:
    store = PrefixStore(heap_of(4), TINY)
    store.store([1, 2, 3], chunks_of(3))
    lengths = [store.prefix_length(ids) for ids in ([], [9, 1], [1, 2, 9, 3], [1, 2, 3, 3])]
    assert lengths == [0, 0, 2, 4]
    assert store.addresses([3, 1]).tolist() == [8192, 0]
    assert 3 in store
    assert 9 not in store
    with pytest.raises(KeyError):
        store.addresses([1, 9])


def test_a_request_loses_its_tail_first_and_in_one_free() -> None:
    store = PrefixStore(heap_of(4), TINY)
    store.store([1, 2, 3, 4], chunks_of(4))
    with store.in_flight([1, 2, 3, 4]):
        pass
    store.store([8, 9], chunks_of(2))
    assert store.prefix_length([1, 2, 3, 4]) == 2
    assert [blocks for _, blocks in store.free_seconds] == [2]


def test_an_error_in_flight_unpins() -> None:
    store = PrefixStore(heap_of(4), TINY)
    store.store([1, 2, 3], chunks_of(3))

    def fail_in_flight() -> None:
        with store.in_flight([1, 2, 9]):
            assert [chunk.pin_count for chunk in store._chunks.values()] == [1, 1, 0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_in_flight()
    assert not any(chunk.pin_count for chunk in store._chunks.values())


def test_geometries_have_the_published_sizes() -> None:
    sizes = {name: geometry.chunk_bytes for name, geometry in GEOMETRIES.items()}
    assert sizes["tiny"] == 4096
    assert sizes["llama-3-8b"] == 64 << 20
    assert sizes["llama-3-70b"] == 4 * sizes["llama-3-70b-tp4"] == 160 << 20
    assert sizes["deepseek-v3"] == 61 * 512 * 576 * 2


@pytest.mark.parametrize(("is_freed", "left"), [(False, [1, 2, 3, 4]), (True, [3, 4])])
def test_an_interrupted_eviction_leaves_no_stale_chunk(
    monkeypatch: pytest.MonkeyPatch, is_freed: bool, left: list[int]
) -> None:
    store = PrefixStore(heap_of(4), TINY)
    store.store([1, 2, 3, 4], chunks_of(4))
    batched_free = store.allocator.batched_free

    def interrupted_free(objs: list[MemoryObj]) -> None:
        if is_freed:
            batched_free(objs)
        raise KeyboardInterrupt

    monkeypatch.setattr(store.allocator, "batched_free", interrupted_free)
    with pytest.raises(KeyboardInterrupt):
        store.store([8, 9], chunks_of(2))
    assert list(store._chunks) == left
    assert all(chunk.is_valid() for chunk in store._chunks.values())
