"""Every order of eviction against a naive model, and what all of them promise."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_orders import NAIVE

from kvheap.prefix.orders import ORDERS, AdaptiveOrder, ARCOrder, EvictionOrder

each_order = pytest.mark.parametrize("name", ORDERS)

HEAP_BYTES = 100


def never(key: object) -> bool:
    return False


def filled(name: str, num_chunks: int = 8, size_bytes: int = 10) -> EvictionOrder[int]:
    order: EvictionOrder[int] = ORDERS[name](num_chunks * size_bytes)
    for key in reversed(range(num_chunks)):
        order.insert(key, size_bytes, group=0)
    return order


def test_each_has_a_model() -> None:
    assert set(NAIVE) == set(ORDERS) == {"lru", "arc", "s3fifo", "adaptive"}


class Pair:
    """An order and a model that see the same random traffic, with pins."""

    def __init__(self, name: str, seed: int, largest: int, num_keys: int = 60) -> None:
        self.source = random.Random(seed)
        self.heap_bytes = num_keys // 3 * largest
        self.order: EvictionOrder[int] = ORDERS[name](self.heap_bytes)
        self.model = NAIVE[name](self.heap_bytes)
        self.num_keys = num_keys
        self.largest = largest
        self.pinned: set[int] = set()
        self.happened: Counter[str] = Counter()

    def some(self) -> list[int]:
        there = sorted(self.model.sizes)
        # A few keys are used far more often than the others, and some are not there.
        hot = [key for key in there if key % 7 == 0]
        pool = hot if self.source.random() < 0.5 and hot else [*there, -1]
        return self.source.sample(pool, min(len(pool), self.source.randint(1, 5)))

    def insert(self) -> None:
        keys = self.source.sample(range(self.num_keys), self.source.randint(1, 5))
        for key in keys:
            if key not in self.model.sizes:
                size, group = 1 + key % self.largest, key % 2
                self.order.insert(key, size, group)
                self.model.insert(key, size, group)
        excess = sum(self.model.sizes.values()) - self.heap_bytes
        if excess > 0:
            self.evict(excess)

    def touch(self) -> None:
        keys = self.some()
        self.order.touch(keys)
        self.model.touch(keys)

    def settle(self) -> None:
        keys = self.some()
        self.order.settle(keys)
        self.model.settle(keys)

    def pin(self) -> None:
        self.pinned = set(self.source.sample(range(self.num_keys), self.source.randint(0, 30)))

    def remove(self) -> None:
        for key in [key for key in self.some() if key in self.model.sizes][:1]:
            self.order.remove(key)
            self.model.remove(key)

    def choose(self) -> None:
        keys = [key for key in self.some() if key in self.model.sizes][:2]
        self.order.evict(keys)
        self.model.evict(keys)

    def evict_some(self) -> None:
        self.evict(self.source.randint(1, 3 * self.largest))

    def evict_too_many(self) -> None:
        idle = [size for key, size in self.model.sizes.items() if key not in self.pinned]
        assert self.order.evict_until(sum(idle) + 1, self.pinned.__contains__) == []

    def evict(self, num_bytes: int) -> None:
        expected = self.model.evict_until(num_bytes, self.pinned.__contains__)
        assert self.order.evict_until(num_bytes, self.pinned.__contains__) == expected
        self.happened["evicted"] += len(expected)

    def step(self) -> None:
        weights = {"insert": 8, "touch": 6, "settle": 1, "pin": 1, "remove": 1, "choose": 1}
        weights |= {"evict_some": 2, "evict_too_many": 1}
        (name,) = self.source.choices(list(weights), list(weights.values()))
        getattr(self, name)()
        self.happened[name] += 1
        assert len(self.order) == len(self.model.sizes)


@pytest.mark.parametrize("largest", [1, 4], ids=["equal sizes", "unlike sizes"])
@pytest.mark.parametrize("seed", range(2))
@each_order
def test_it_evicts_what_the_naive_model_evicts(name: str, seed: int, largest: int) -> None:
    pair = Pair(name, seed, largest)
    for _ in range(1500):
        pair.step()
    assert pair.happened["evicted"] > 500
    assert min(pair.happened.values()) > 10
    assert all((key in pair.order) == (key in pair.model.sizes) for key in range(pair.num_keys))
    assert sorted(pair.order) == sorted(pair.model.sizes)


@each_order
def test_the_tail_of_a_request_goes_before_its_head(name: str) -> None:
    order = filled(name)
    order.touch(range(8))
    assert [order.evict_until(1, never)[0] for _ in range(8)] == list(reversed(range(8)))


@each_order
def test_settling_mends_the_order_of_a_request_that_was_stored_in_steps(name: str) -> None:
    order: EvictionOrder[int] = ORDERS[name](80)
    for key in (2, 1, 0, 5, 4, 3):  # two steps, each the tail first
        order.insert(key, 10, group=0)
    order.settle(range(6))
    assert order.evict_until(60, never) == [5, 4, 3, 2, 1, 0]


@each_order
def test_a_new_order_goes_on_with_the_order_of_use(name: str) -> None:
    """Inserted again as iteration gives them, chunks leave as those that were used once do."""
    order = filled(name)
    order.touch([6, 7])
    order.settle([2, 3])
    again: EvictionOrder[int] = ORDERS[name](80)
    for key in order:
        again.insert(key, 10, group=0)
    assert list(again) == list(order)
    if name != "s3fifo":  # whose queues do not move what is used
        assert again.evict_until(40, never) == [5, 4, 1, 0]


@each_order
def test_pinned_chunks_stay_in_their_places(name: str) -> None:
    order = filled(name)
    assert order.evict_until(20, {7, 5}.__contains__) == [6, 4]
    assert order.evict_until(20, never) == [7, 5]


@each_order
def test_an_eviction_that_is_impossible_changes_nothing(name: str) -> None:
    order = filled(name)
    for _ in range(3):
        assert order.evict_until(51, {0, 1, 2}.__contains__) == []
    assert len(order) == 8
    assert order.evict_until(50, {0, 1, 2}.__contains__) == [7, 6, 5, 4, 3]


@each_order
def test_a_question_that_fails_loses_no_chunk(name: str) -> None:
    order = filled(name)
    asked: list[int] = []

    def fails(key: int) -> bool:
        asked.append(key)
        if len(asked) > 6:
            raise RuntimeError("no answer")
        return key == 7

    with pytest.raises(RuntimeError, match="no answer"):
        order.evict_until(80, fails)
    asked.clear()
    left = order.evict_until(10 * len(order), never)
    assert len(left) == len(set(left)) > 0
    assert len(order) == 0


@each_order
def test_wrong_arguments_change_nothing(name: str) -> None:
    order = filled(name)
    with pytest.raises(ValueError, match=r"the key 3 is in the order already"):
        order.insert(3, 10, group=0)
    for size in (0, -1):
        with pytest.raises(ValueError, match=rf"size_bytes of 9 must be positive, got {size}"):
            order.insert(9, size, group=0)
    with pytest.raises(ValueError, match=r"num_bytes must be positive, got 0"):
        order.evict_until(0, never)
    for call in (order.remove, lambda key: order.evict([key])):
        with pytest.raises(KeyError, match="9"):
            call(9)
    assert order.evict_until(80, never) == list(reversed(range(8)))


@pytest.mark.parametrize("make", [ARCOrder, AdaptiveOrder])
def test_a_heap_has_a_size(make: type[ARCOrder[int]]) -> None:
    with pytest.raises(ValueError, match=r"heap_bytes must be positive, got 0"):
        make(0)
    with pytest.raises(TypeError, match="heap_bytes"):
        make(1.5)  # type: ignore[arg-type]


@each_order
def test_after_a_reset_it_is_as_new(name: str) -> None:
    pair = Pair(name, 7, 3)
    for _ in range(700):
        pair.step()
    pair.order.reset()
    assert len(pair.order) == 0
    fresh = Pair(name, 7, 3)
    fresh.order = pair.order
    for _ in range(700):
        fresh.step()


class Machine(RuleBasedStateMachine):
    """An order whose victims are only asked to be legal."""

    @initialize(name=st.sampled_from(sorted(ORDERS)))
    def begin(self, name: str) -> None:
        self.order: EvictionOrder[int] = ORDERS[name](HEAP_BYTES)
        self.sizes: dict[int, int] = {}
        self.pinned: set[int] = set()

    @rule(key=st.integers(0, 30), size=st.integers(1, 20), group=st.integers(0, 2))
    def insert(self, key: int, size: int, group: int) -> None:
        if key in self.sizes:
            with pytest.raises(ValueError, match="in the order already"):
                self.order.insert(key, size, group)
        else:
            self.order.insert(key, size, group)
            self.sizes[key] = size

    @rule(keys=st.lists(st.integers(0, 30), max_size=6), is_use=st.booleans())
    def use(self, keys: list[int], is_use: bool) -> None:
        (self.order.touch if is_use else self.order.settle)(keys)

    @rule(keys=st.sets(st.integers(0, 30), max_size=20))
    def pin(self, keys: set[int]) -> None:
        self.pinned = keys

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), is_eviction=st.booleans())
    def remove(self, data: st.DataObject, is_eviction: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.sizes)))
        if is_eviction:
            self.order.evict([key])
        else:
            self.order.remove(key)
        del self.sizes[key]

    @rule(num_bytes=st.integers(1, 150))
    def evict(self, num_bytes: int) -> None:
        victims = self.order.evict_until(num_bytes, self.pinned.__contains__)
        idle = {key: size for key, size in self.sizes.items() if key not in self.pinned}
        if sum(idle.values()) < num_bytes:
            assert victims == []
            return
        assert len(set(victims)) == len(victims)
        freed = [idle[key] for key in victims]
        assert sum(freed) >= num_bytes > sum(freed[:-1])
        for key in victims:
            del self.sizes[key]

    @rule()
    def reset(self) -> None:
        self.order.reset()
        self.sizes.clear()

    @invariant()
    def it_holds_what_it_should(self) -> None:
        assert len(self.order) == len(self.sizes)
        assert all((key in self.order) == (key in self.sizes) for key in range(31))


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
