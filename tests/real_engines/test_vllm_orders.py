"""LRU and ARC evict what vLLM's own classes evict."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from vllm_scenes import part_of_vllm

from kvheap.prefix.orders import ORDERS

POLICIES = "vllm.v1.kv_offload.cpu.policies"
CAPACITY = 40


class Peer:
    """A policy of vLLM, whose chunks are ready as soon as they are inserted."""

    def __init__(self, name: str) -> None:
        module = part_of_vllm(f"{POLICIES}.{name}")
        self.chunk = part_of_vllm(f"{POLICIES}.base").ChunkStatus
        self.policy = getattr(module, f"{name.upper()}CachePolicy")(CAPACITY)
        self.context = part_of_vllm("vllm.v1.kv_offload.base").ReqContext("request")

    def insert(self, key: bytes) -> None:
        self.policy.on_store_miss([key], self.context)
        chunk = self.chunk(0)
        self.policy.insert(key, chunk, self.context)
        chunk.ref_cnt = 0
        self.policy.mark_evictable(key)

    def pin(self, key: bytes, is_pinned: bool) -> None:
        self.policy.get(key).ref_cnt = int(is_pinned)
        mark = self.policy.mark_non_evictable if is_pinned else self.policy.mark_evictable
        mark(key)

    def evict(self, num_chunks: int, protected: set[bytes]) -> list[bytes]:
        evicted: Any = self.policy.evict(num_chunks, protected)
        return [key for key, _ in evicted or []]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["lru", "arc"])
def test_it_evicts_what_vllm_evicts(name: str, seed: int) -> None:
    source = random.Random(seed)
    order, peer = ORDERS[name](CAPACITY), Peer(name)
    stored: set[bytes] = set()
    pinned: set[bytes] = set()
    happened: Counter[str] = Counter()

    def evict(num_chunks: int) -> None:
        protected = set(source.sample(sorted(stored), min(len(stored), 3)))
        expected = peer.evict(num_chunks, protected)
        is_kept = (pinned | protected).__contains__
        assert order.evict_until(num_chunks, is_kept) == expected
        stored.difference_update(expected)
        happened["evicted" if expected else "refused"] += max(1, len(expected))

    for _ in range(3000):
        step = source.random()
        keys = [source.randrange(90) ** 2 // 90 for _ in range(source.randint(1, 6))]
        named = list(dict.fromkeys(b"%d" % key for key in keys))
        if step < 0.45:
            missing = [key for key in named if key not in stored]
            excess = len(stored) + len(missing) - CAPACITY
            if excess > 0:
                evict(excess)
            for key in missing[: CAPACITY - len(stored)]:
                order.insert(key, 1, group=0)
                peer.insert(key)
                stored.add(key)
        elif step < 0.8:
            there = [key for key in named if key in stored]
            order.touch(there)
            peer.policy.touch(there, peer.context)
        elif step < 0.9:
            for key in [key for key in named if key in stored][:1]:
                peer.pin(key, key not in pinned)
                pinned.symmetric_difference_update([key])
                happened["pinned"] += 1
        elif step < 0.95:
            for key in [key for key in named if key in stored and key not in pinned][:1]:
                order.remove(key)
                peer.policy.remove(key)
                stored.remove(key)
        elif stored:
            evict(source.randint(1, 45))
        assert all((key in order) == (peer.policy.get(key) is not None) for key in named)
    assert len(order) == len(stored)
    assert happened["evicted"] > 1000
    assert min(happened["pinned"], happened["refused"]) > 20
