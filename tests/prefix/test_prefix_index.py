"""PrefixIndex: what each call does and refuses, and what an eviction costs."""

from __future__ import annotations

import sys
from types import FrameType

import numpy as np
import pytest

from kvheap import PrefixIndex
from kvheap.errors import HeapCorruptionError, LifetimeError
from kvheap.prefix import POLICIES


def index_of(*keys: str, size_bytes: int = 10) -> PrefixIndex[str, str]:
    """An index in which these keys are ready, each with its upper case as its value."""
    index: PrefixIndex[str, str] = PrefixIndex()
    index.begin(keys, [key.upper() for key in keys], size_bytes).complete()
    return index


class TestStates:
    def test_a_chunk_is_found_only_once_its_store_is_completed(self) -> None:
        index = index_of("a")
        store = index.begin(["b", "c"], ["B", "C"], 10)
        assert [index.state(key) for key in "abz"] == ["ready", "pending", "absent"]
        assert (index.prefix_length([*"abc"]), "b" in index, len(index)) == (1, False, 1)
        assert index.missing([*"abcz"]) == ["z"]
        with pytest.raises(KeyError, match="b"):
            index.values(["a", "b"])
        assert store.complete(["b"]) == []
        assert (index.prefix_length([*"abc"]), index.values([*"ab"])) == (2, ["A", "B"])
        assert (store.keys, store.values) == (["c"], ["C"])
        assert store.abort() == [("c", "C")]
        assert index.state("c") == "absent"

    def test_an_aborted_key_can_be_stored_again(self) -> None:
        index = index_of()
        assert index.begin(["a"], [1], 10).abort() == [("a", 1)]
        assert index.begin(["a"], [2], 10).complete() == []
        assert index.values(["a"]) == [2]

    def test_keys_may_be_of_any_hashable_type_and_values_of_any(self) -> None:
        index: PrefixIndex[object, object] = PrefixIndex()
        keys = [b"hash" + bytes(4), (3, "group"), 7, frozenset({1})]
        values = [0, (1, 4096), None, ["unhashable"]]
        index.begin(keys, values, [1, 2, 3, 4]).complete()
        assert index.values(keys) == values
        assert index.stats().ready_bytes == 10

    def test_sizes_may_be_numpy_integers(self) -> None:
        index: PrefixIndex[int, int] = PrefixIndex()
        index.begin([1], [1], np.int64(7)).complete()
        index.begin([2, 3], [2, 3], np.array([8, 9])).complete()
        assert index.stats().ready_bytes == 24
        assert type(index.stats().ready_bytes) is int


class TestWhatIsRemovedInUse:
    def test_a_held_chunk_ends_with_its_last_hold(self) -> None:
        index = index_of("a", "b")
        first, second = index.hold([*"ab"]), index.hold(["a"])
        assert index.remove(["a", "unknown", "a"]) == []
        assert [index.state(key) for key in "ab"] == ["absent", "ready"]
        assert first.values == ["A", "B"]
        assert first.release() == []
        assert second.release() == [("a", "A")]
        assert index.stats().removed_chunks == 0

    def test_a_pending_chunk_ends_when_its_store_does(self) -> None:
        index = index_of()
        stores = [index.begin([key], [key.upper()], 10) for key in "ab"]
        assert index.clear() == []
        assert index.stats().removed_bytes == 20
        assert stores[0].complete() == [("a", "A")]
        assert stores[1].abort() == [("b", "B")]
        assert len(index) == 0

    def test_its_key_can_be_stored_again_at_once(self) -> None:
        index = index_of("a")
        hold, store = index.hold(["a"]), index.begin(["b"], ["B"], 10)
        index.clear()
        index.begin(["a", "b"], ["new A", "new B"], 10).complete()
        assert (hold.values, store.values) == (["A"], ["B"])
        assert [*hold.release(), *store.complete()] == [("a", "A"), ("b", "B")]
        assert index.values([*"ab"]) == ["new A", "new B"]
        assert index.hold([*"ab"]).release() == []

    def test_what_a_block_ends_is_returned_by_the_next_call(self) -> None:
        index = index_of("a", "b", "c")
        with index.hold(["a"]), index.hold(["b"]):
            assert index.remove([*"ab"]) == []
        assert index.stats().ended_bytes == 20
        assert index.evict(10) == [("b", "B"), ("a", "A"), ("c", "C")]
        assert index.take_ended() == []


class TestHolds:
    def test_they_nest(self) -> None:
        index = index_of("a")
        holds = [index.hold(["a"]) for _ in range(3)]
        for hold in holds:
            assert index.evict(10) is None
            hold.release()
        assert index.evict(10) == [("a", "A")]

    def test_a_second_release_changes_nothing(self) -> None:
        index = index_of("a")
        first, second = index.hold(["a"]), index.hold(["a"])
        for _ in range(3):
            first.release()
        assert (len(first), first.keys, index.evict(10)) == (0, [], None)
        with second:
            second.release()
        assert index.evictable_bytes == 10

    def test_a_key_that_is_named_twice_is_held_once(self) -> None:
        index = index_of("a", "b")
        hold = index.hold([*"abaab"])
        assert hold.keys == ["a", "b"]
        hold.release(["a"])
        assert index.stats().held_chunks == 1
        with pytest.raises(KeyError, match="a"):
            hold.release(["b", "a"])
        assert index.stats().held_chunks == 1

    def test_one_absent_key_and_nothing_is_held(self) -> None:
        index = index_of("a")
        with pytest.raises(KeyError, match="zzz"):
            index.hold(["a", "zzz"])
        assert index.stats().held_chunks == 0

    def test_an_error_in_the_block_releases(self) -> None:
        index = index_of("a")
        with pytest.raises(KeyboardInterrupt), index.hold(["a"]):
            raise KeyboardInterrupt
        assert index.evictable_bytes == 10


class TestEviction:
    def test_it_is_whole_or_not_at_all(self) -> None:
        index = index_of("a", "b", "c")
        with index.hold(["b"]):
            assert index.evict(21) is None
            assert index.evict(11) == [("c", "C"), ("a", "A")]
        assert index.evict(10) == [("b", "B")]
        assert index.evict(0) == []
        assert index.evict(1) is None

    def test_protected_keys_stay(self) -> None:
        index = index_of("a", "b", "c")
        assert index.evict(11, protected=["c", "c", "unknown"]) == [("b", "B"), ("a", "A")]
        assert index.evict(10, protected=["c"]) is None
        assert index.state("c") == "ready"

    def test_bytes_count_and_not_chunks(self) -> None:
        index: PrefixIndex[int, int] = PrefixIndex()
        index.begin([3, 2, 1], [3, 2, 1], [300, 20, 1]).complete()
        assert index.evict(2) == [(1, 1), (2, 2)]

    def test_the_tail_goes_before_the_head(self) -> None:
        index = index_of("a", "b", "c", "d")
        index.touch([*"ab"])
        assert [key for key, _ in index.evict(40)] == ["d", "c", "b", "a"]


BAD_STORES = [
    (["a"], ["x"], 10, ValueError, "'a' is stored already"),
    (["n", "p"], ["x", "y"], 10, ValueError, "'p' is being stored already"),
    (["n", "m", "n"], ["x", "y", "z"], 10, ValueError, "'n' is named twice"),
    (["n", "m"], ["x"], 10, ValueError, "2 keys need as many values, got 1"),
    (["n", "m"], ["x", "y"], [10], ValueError, "2 keys need as many sizes, got 1"),
    (["n", "m"], ["x", "y"], [10, 0], ValueError, "size_bytes of 'm' must be positive, got 0"),
    (["n"], ["x"], -5, ValueError, "size_bytes of 'n' must be positive, got -5"),
    (["n"], ["x"], [1.5], TypeError, "must be an integer, got 1.5"),
    (["n"], ["x"], 1.5, TypeError, "must be an integer, got 1.5"),
    (["n", ["list"]], ["x", "y"], 10, TypeError, "unhashable"),
]


@pytest.mark.parametrize(("keys", "values", "sizes", "error", "message"), BAD_STORES)
def test_a_wrong_store_is_refused_and_names_the_key(
    keys: list, values: list, sizes: object, error: type[Exception], message: str
) -> None:
    index = index_of("a")
    index.begin(["p"], ["P"], 10)
    before = index.stats()
    with pytest.raises(error, match=message):
        index.begin(keys, values, sizes)
    assert index.stats() == before
    index.check()


def test_other_wrong_calls_are_refused() -> None:
    index = index_of("a")
    store = index.begin(["b", "c"], ["B", "C"], 10)
    with pytest.raises(ValueError, match="num_bytes must be non-negative, got -1"):
        index.evict(-1)
    for end in (store.complete, store.abort):
        with pytest.raises(KeyError, match="a"):
            end(["b", "a"])
    assert store.keys == ["b", "c"]
    store.complete()
    with pytest.raises(LifetimeError, match="completed or aborted already"):
        store.complete()
    with pytest.raises(KeyError, match="b"):
        store.complete(["b"])
    assert store.abort() == []
    assert index.prefix_length([*"abc"]) == 3


def test_an_empty_store_and_an_empty_hold_do_nothing() -> None:
    index = index_of("a")
    assert index.begin([], [], 10).complete() == []
    assert index.begin([], [], []).abort() == []
    assert index.hold([]).release() == []
    assert index.touch([]) is None
    assert index.remove([]) == []


def test_check_finds_what_is_wrong() -> None:
    index = index_of("a", "b")
    index._books.evictable_bytes += 1
    with pytest.raises(HeapCorruptionError, match="21 evictable bytes should be 20"):
        index.check()
    index = index_of("a", "b")
    index._books.policy.take_out(list(index._books.ready.values())[:1])
    with pytest.raises(HeapCorruptionError, match="orders more or fewer chunks"):
        index.check()


class Steps:
    """Counts lines and calls into C inside kvheap: the work of an operation, not its time."""

    def __init__(self) -> None:
        self.count = 0

    def trace(self, frame: FrameType, event: str, argument: object) -> object:
        if not frame.f_globals.get("__name__", "").startswith("kvheap."):
            return None
        self.count += event == "line"
        return self.trace

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        is_ours = frame.f_globals.get("__name__", "").startswith("kvheap.")
        self.count += is_ours and event == "c_call"

    def of(self, operation: object) -> int:
        self.count = 0
        sys.settrace(self.trace)
        sys.setprofile(self.profile)
        try:
            operation()
        finally:
            sys.setprofile(None)
            sys.settrace(None)
        return self.count


@pytest.mark.parametrize("in_use", ["held", "pending"])
@pytest.mark.parametrize("name", POLICIES)
def test_an_eviction_costs_the_same_whatever_is_in_use(name: str, in_use: str) -> None:
    """20,000 chunks are stored; 10,000 of them, those next in the order, are in use or not."""
    costs = []
    for is_in_use in (False, True):
        index: PrefixIndex[int, None] = PrefixIndex(POLICIES[name]())
        old, new = range(10_000), range(10_000, 20_000)
        store = index.begin(old, [None] * len(old), 10)
        if in_use == "held":
            store.complete()
            if is_in_use:
                index.hold(old)
        elif not is_in_use:
            store.abort()
        index.begin(new, [None] * len(new), 10).complete()
        steps = [Steps().of(lambda index=index: index.evict(160)) for _ in range(5)]
        costs.append(max(steps))
        index.check()
    assert costs[0] == costs[1]
    assert 16 * 3 < costs[0] < 16 * 60
