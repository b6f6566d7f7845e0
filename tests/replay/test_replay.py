"""Replay against a naive model of the default policy, and with every other one."""

from __future__ import annotations

import random

import pytest
import torch
from naive_policies import NAIVE, Naive

from kvheap import TensorMemoryAllocator
from kvheap.prefix import POLICIES
from kvheap.replay.copies import EngineCopies
from kvheap.replay.engine_cache import EngineCache
from kvheap.replay.geometry import GEOMETRIES, Geometry
from kvheap.replay.replay import Replay
from kvheap.replay.trace import synthetic_trace

TINY, SMALL = GEOMETRIES["tiny"], GEOMETRIES["small"]


def heap_of(chunks: int, geometry: Geometry = TINY) -> TensorMemoryAllocator:
    buffer = torch.zeros(chunks * geometry.chunk_bytes, dtype=torch.uint8)
    return TensorMemoryAllocator(buffer, on_full=None)


class NaiveCache:
    """The default policy in so many words: a list, least recently used first."""

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


def order_of(replay: Replay) -> list[int]:
    return [chunk.key for chunk in replay.store._index._books.policy._order]


def random_ids(source: random.Random) -> list[int]:
    """One of six prefixes, and then anything, also ids named twice and ids behind a gap."""
    prompt = source.randrange(6)
    ids = [100 * prompt + i for i in range(source.randint(1, 8))]
    return ids + [source.randrange(1000) for _ in range(source.randint(0, 4))]


@pytest.mark.parametrize("seed", range(5))
def test_it_evicts_what_the_naive_model_evicts(seed: int) -> None:
    source = random.Random(seed)
    replay, model = Replay(heap_of(20), TINY), NaiveCache(20)
    for _ in range(300):
        ids = random_ids(source)
        replay.serve(ids)
        model.serve(ids)
        assert order_of(replay) == model.order
    assert (replay.hits, replay.store.stats().evicted_chunks) == (model.hits, model.evicted)
    assert replay.mismatches == 0
    assert model.evicted > 100
    replay.heap.address_manager.check()
    replay.store.check()


class NaiveServer:
    """Requests through a naive policy: what is stored is held and used, then all in order."""

    def __init__(self, policy: Naive, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.hits = self.evicted = 0

    def serve(self, ids: list[int]) -> None:
        policy = self.policy
        distinct = list(dict.fromkeys(ids))
        stored = [i for i in distinct if i in policy.sizes]
        missing = [i for i in distinct if i not in policy.sizes]
        self.hits += next((n for n, i in enumerate(ids) if i not in policy.sizes), len(ids))
        policy.hold(stored)
        policy.touch(stored)
        excess = len(policy.sizes) + len(missing) - self.capacity
        if excess > 0:
            self.evicted += len(policy.evict(excess))
        policy.insert(missing, dict.fromkeys(missing, 1))
        policy.release(distinct)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", POLICIES)
def test_a_request_uses_and_holds_its_chunks_once(name: str, seed: int) -> None:
    source = random.Random(seed)
    replay = Replay(heap_of(20), TINY, policy=POLICIES[name]())
    model = NaiveServer(NAIVE[name](), 20)
    for _ in range(300):
        ids = random_ids(source)
        replay.serve(ids)
        model.serve(ids)
        assert sorted(replay.store._index._books.ready) == sorted(model.policy.sizes)
    assert (replay.hits, replay.store.stats().evicted_chunks) == (model.hits, model.evicted)
    assert model.evicted > 100


def test_an_engine_that_holds_two_chunks_changes_nothing() -> None:
    source, model = random.Random(1), NaiveCache(20)
    engine = EngineCache("vllm-flash-nhd", SMALL, torch.device("cpu"), num_blocks=64)
    assert engine.num_chunks == 2
    replay = Replay(heap_of(20, SMALL), SMALL, EngineCopies(engine))
    for _ in range(60):
        ids = random_ids(source)
        replay.serve(ids)
        model.serve(ids)
        assert order_of(replay) == model.order
    assert (replay.hits, replay.mismatches) == (model.hits, 0)
    assert model.evicted > 20


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_the_same_traffic_and_every_byte_is_right(name: str) -> None:
    replay = Replay(heap_of(300), TINY, policy=POLICIES[name]())
    replay.run(synthetic_trace(400))
    assert replay.hits + replay.stored + replay.resident == replay.block_refs
    evicted = replay.store.stats().evicted_chunks
    assert evicted == replay.stored - len(replay.store)
    assert evicted > 200
    assert replay.mismatches == 0
    replay.store.check()
    replay.store.close()
    assert replay.heap.heap.leaks() == ()


def test_calls_of_the_heap_are_timed_with_their_blocks() -> None:
    replay = Replay(heap_of(4), TINY)
    replay.serve([1, 2, 3])
    replay.serve([1, 2, 3])
    replay.serve([4, 5, 6])
    assert [blocks for _, blocks in replay.heap.allocations] == [3, 3]
    assert [blocks for _, blocks in replay.heap.frees] == [2]
    assert all(seconds > 0 for seconds, _ in replay.heap.allocations + replay.heap.frees)


class KeepsAll:
    """A further tier in this process; it may bring back wrong bytes."""

    def __init__(self, heap: TensorMemoryAllocator, wrong: int = -1) -> None:
        self.heap, self.wrong = heap, wrong
        self.kept: dict[int, torch.Tensor] = {}

    def keep(self, store: object, hash_ids: list[int]) -> None:
        for hash_id, chunk in zip(hash_ids, store.chunks(hash_ids), strict=True):  # type: ignore[attr-defined]
            self.kept[hash_id] = chunk.tensor.clone()

    def fetch(self, store: object, hash_ids: list[int]) -> list[int]:
        found = [hash_id for hash_id in hash_ids if hash_id in self.kept]
        if found:
            source = torch.stack([self.kept[hash_id] for hash_id in found])
            if self.wrong in found:
                source[found.index(self.wrong)].view(-1).view(torch.uint8)[0] ^= 1
            store.store(found, source)  # type: ignore[attr-defined]
        return found


@pytest.mark.parametrize("wrong", [-1, 2])
def test_what_a_further_tier_brings_back_is_compared(wrong: int) -> None:
    heap = heap_of(4)
    replay = Replay(heap, TINY, tier=KeepsAll(heap, wrong))
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 9], [5]):
        replay.serve(ids)
    assert (replay.hits, replay.fetched, replay.stored) == (1, 2, 9)
    assert replay.block_refs == replay.hits + replay.fetched + replay.stored + replay.resident
    assert replay.mismatches == (wrong in (1, 2))
