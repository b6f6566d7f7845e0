"""Every eviction policy against a naive model, and what the command line promises of all."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack

import pytest
from naive_policies import NAIVE, Naive, NaiveGDSF, NaiveS3FIFO

from kvheap.prefix import ARC, GDSF, LRU, POLICIES, S3FIFO, EvictionPolicy, PrefixIndex
from kvheap.prefix.policies.base import CachedChunk
from kvheap.prefix.policies.buckets import PriorityBuckets
from kvheap.prefix.policies.ghosts import GhostList

each_policy = pytest.mark.parametrize("name", POLICIES)


def test_each_has_a_model_and_a_name() -> None:
    assert dict(POLICIES) == {"lru": LRU, "gdsf": GDSF, "s3fifo": S3FIFO, "arc": ARC}
    assert set(NAIVE) == set(POLICIES)


class Pair:
    """An index and a model that see the same random traffic."""

    def __init__(self, policy: EvictionPolicy, model: Naive, seed: int, largest: int) -> None:
        self.source = random.Random(seed)
        self.index: PrefixIndex[int, int] = PrefixIndex(policy)
        self.model = model
        self.largest = largest
        self.holds: list[tuple[object, list[int]]] = []
        self.counts: Counter[int] = Counter()
        self.happened: Counter[str] = Counter()

    def ready(self) -> list[int]:
        return sorted(self.model.sizes)

    def some(self) -> list[int]:
        ready = self.ready()
        return self.source.sample(ready, min(len(ready), self.source.randint(1, 6)))

    def insert(self) -> None:
        keys = self.source.sample(range(60), self.source.randint(1, 8))
        keys = self.index.missing(keys)
        sizes = {key: self.source.randint(1, self.largest) for key in keys}
        self.index.begin(keys, keys, list(sizes.values())).complete()
        self.model.insert(keys, sizes)

    def touch(self) -> None:
        keys = self.some()
        self.index.touch(keys)
        self.model.touch(keys)

    def hold(self) -> None:
        keys = self.some()
        self.holds.append((self.index.hold(keys), keys))
        self.counts.update(keys)
        self.model.hold(keys)

    def release(self) -> None:
        if self.holds:
            hold, keys = self.holds.pop(self.source.randrange(len(self.holds)))
            ended = hold.release()
            self.counts.subtract(keys)
            assert all(key not in self.model.sizes for key, _ in ended)
            last = [key for key in keys if not self.counts[key] and key in self.model.sizes]
            self.model.release(last)

    def remove(self) -> None:
        """Keys that are held stay out of it: the model does not know two chunks of one key."""
        keys = [key for key in self.some() if not self.counts[key]][:1]
        assert self.index.remove(keys) == [(key, key) for key in keys]
        self.model.remove(keys)

    def evict(self) -> None:
        self.evict_beside([])

    def evict_protected(self) -> None:
        self.evict_beside(self.some())

    def evict_beside(self, protected: list[int]) -> None:
        kept = [key for key in protected if not self.counts[key]]
        idle = [key for key in self.ready() if not self.counts[key] and key not in kept]
        evictable = sum(self.model.sizes[key] for key in idle)
        num_bytes = self.source.randint(1, 3 * self.largest)
        ended = self.index.evict(num_bytes, protected)
        if num_bytes > evictable:
            assert ended is None
            return
        self.model.hold(kept)
        expected = self.model.evict(num_bytes)
        self.model.release(kept)
        assert ended == [(key, key) for key in expected]
        self.happened["evicted"] += len(expected)

    def step(self) -> None:
        weights = {"insert": 6, "touch": 5, "hold": 2, "release": 2, "remove": 1}
        weights |= {"evict": 5, "evict_protected": 2}
        (name,) = self.source.choices(list(weights), list(weights.values()))
        getattr(self, name)()
        self.happened[name] += 1
        self.index.check()
        stats = self.index.stats()
        assert stats.ready_chunks == len(self.model.sizes)
        assert stats.held_chunks == sum(key in self.model.sizes for key in +self.counts)


@pytest.mark.parametrize("largest", [1, 4], ids=["equal sizes", "unlike sizes"])
@pytest.mark.parametrize("seed", range(3))
@each_policy
def test_it_evicts_what_the_naive_model_evicts(name: str, seed: int, largest: int) -> None:
    pair = Pair(POLICIES[name](), NAIVE[name](), seed, largest)
    for _ in range(1200):
        pair.step()
    assert pair.happened["evicted"] > 300
    assert min(pair.happened.values()) > 20


@pytest.mark.parametrize("seed", range(3))
def test_a_cost_decides_what_a_byte_is_worth(seed: int) -> None:
    pair = Pair(GDSF(lambda size: 1), NaiveGDSF(lambda size: 1), seed, 4)
    for _ in range(800):
        pair.step()
    assert pair.happened["evicted"] > 200


@pytest.mark.parametrize("min_uses", [2, 3])
def test_s3fifo_asks_for_more_uses_in_its_small_queue(min_uses: int) -> None:
    pair = Pair(S3FIFO(min_uses), NaiveS3FIFO(min_uses), 5, 4)
    for _ in range(1200):
        pair.step()
    assert pair.happened["evicted"] > 300
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"min_uses must be between 1 and 3, got {wrong}"):
            S3FIFO(wrong)


@each_policy
def test_the_tail_of_a_request_goes_before_its_head(name: str) -> None:
    index: PrefixIndex[str, int] = PrefixIndex(POLICIES[name]())
    index.begin(list("abcdefgh"), range(8), 10).complete()
    with index.hold([*"abcdefgh"]):
        index.touch([*"abcdefgh"])
    keys = [index.evict(1)[0][0] for _ in range(8)]
    assert keys == list("hgfedcba")


def test_gdsf_keeps_a_head_until_its_tail_is_gone() -> None:
    """Requests with shared prefixes that store a chunk at a time, held together at their end."""
    source = random.Random(1)
    index: PrefixIndex[tuple[int, ...], None] = PrefixIndex(GDSF())
    evicted = 0
    for _ in range(2000):
        path = tuple(source.choice((0, 0, 1)) for _ in range(source.randint(1, 9)))
        keys = [path[: length + 1] for length in range(len(path))]
        with ExitStack() as held:
            held.enter_context(index.hold(keys[: index.prefix_length(keys)]))
            index.touch(keys)
            for key in index.missing(keys):
                if len(index) >= 40:
                    ((victim, _),) = index.evict(1)
                    evicted += 1
                    assert not any((*victim, bit) in index for bit in (0, 1))
                index.begin([key], [None], 1).complete()
                held.enter_context(index.hold([key]))
            request = index.hold(keys)
        request.release()
    assert evicted > 500


class TestBuckets:
    def test_the_lowest_priority_goes_first_and_of_equals_the_first_added(self) -> None:
        buckets, chunks = PriorityBuckets(), [CachedChunk(1, number) for number in range(6)]
        for chunk, rank in zip(chunks, (2, 1, 1, 3, 1, 2), strict=True):
            chunk.rank = rank
            buckets.add(chunk)
        buckets.discard(chunks[2])
        buckets.discard(chunks[2])
        chunks[1].rank = 2
        buckets.add(chunks[1])
        order = [chunks.index(chunk) for size in (1, 2, 1, 1) for chunk in buckets.take(size)]
        assert order == [4, 0, 5, 1, 3]
        assert len(buckets) == 0
        with pytest.raises(IndexError):
            buckets.take(1)

    def test_a_chunk_that_is_used_for_ever_leaves_no_buckets_behind(self) -> None:
        index: PrefixIndex[str, int] = PrefixIndex(policy := GDSF())
        index.begin(["hot", "cold"], [1, 2], 1).complete()
        for _ in range(5000):
            index.touch(["hot"])
        assert len(policy._order._priorities) < 200
        index.check()
        assert index.evict(2) == [("cold", 2), ("hot", 1)]


class TestGhosts:
    def chunks(self, *sizes: int) -> list[CachedChunk]:
        return [CachedChunk(size, fingerprint) for fingerprint, size in enumerate(sizes)]

    def test_the_oldest_are_forgotten_by_their_bytes(self) -> None:
        ghosts, chunks = GhostList(), self.chunks(5, 10, 20)
        for note, chunk in enumerate(chunks):
            ghosts.remember(chunk, note)
        assert (len(ghosts), ghosts.num_bytes) == (3, 35)
        ghosts.trim(30)
        assert [ghosts.recall(chunk) for chunk in chunks] == [None, 1, 2]
        assert (len(ghosts), ghosts.num_bytes) == (0, 0)

    def test_one_that_is_remembered_again_is_the_newest_and_counts_once(self) -> None:
        ghosts, chunks = GhostList(), self.chunks(5, 10)
        for chunk in (*chunks, chunks[0]):
            ghosts.remember(chunk)
        assert ghosts.num_bytes == 15
        ghosts.trim(5)
        assert ghosts.recall(chunks[0]) == 0


@each_policy
def test_what_it_remembers_of_the_past_is_bounded(name: str) -> None:
    policy = POLICIES[name]()
    index: PrefixIndex[int, None] = PrefixIndex(policy)
    for first in range(0, 40_000, 100):
        index.begin(range(first, first + 100), [None] * 100, 10).complete()
        if len(index) > 500:
            index.evict(1000)
    ghosts = getattr(policy, "_ghosts", {})
    lists = ghosts.values() if isinstance(ghosts, dict) else [ghosts]
    assert sum(map(len, lists)) <= 4 * 600
    if name != "lru":
        assert sum(map(len, lists)) > 50
    index.clear()
    assert sum(map(len, lists)) == 0


@each_policy
def test_an_index_needs_a_policy_of_its_own(name: str) -> None:
    policy = POLICIES[name]()
    PrefixIndex(policy)
    with pytest.raises(TypeError, match="policy must be an object of an EvictionPolicy"):
        PrefixIndex(POLICIES[name])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"the {name} policy is another index's"):
        PrefixIndex(policy)


@each_policy
def test_a_name_makes_a_new_policy(name: str) -> None:
    indexes: list[PrefixIndex[str, int]] = [PrefixIndex(name), PrefixIndex(name)]
    policies = [index.books.policy for index in indexes]
    assert [type(policy) for policy in policies] == [POLICIES[name]] * 2
    assert policies[0] is not policies[1]
    for wrong in ("", "LRU", "random"):
        with pytest.raises(ValueError, match=f"one of lru, gdsf, s3fifo, arc, .* got '{wrong}'"):
            PrefixIndex(wrong)


def test_index_and_policies_need_no_torch() -> None:
    code = (
        "import sys, kvheap\n"
        "from kvheap.prefix import POLICIES, PrefixIndex\n"
        "index = kvheap.PrefixIndex(POLICIES['arc']())\n"
        "sys.exit(bool({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
