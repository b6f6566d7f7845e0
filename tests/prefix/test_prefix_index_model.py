"""PrefixIndex as a state machine: every value belongs to the index or to the caller, never both."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvheap.prefix import POLICIES, Hold, PendingStore, PrefixIndex

KEYS = st.integers(0, 11)
KEY_LISTS = st.lists(KEYS, min_size=0, max_size=6)


@dataclass(eq=False)
class ModelChunk:
    key: int
    value: int
    size: int
    state: str = "pending"
    is_removed: bool = False
    holds: int = 0

    @property
    def pair(self) -> tuple[int, int]:
        return self.key, self.value


@dataclass(eq=False)
class ModelHandle:
    handle: Hold | PendingStore
    chunks: dict[int, ModelChunk] = field(default_factory=dict)

    def select(self, keys: list[int] | None) -> dict[int, ModelChunk]:
        return self.chunks if keys is None else {key: self.chunks[key] for key in keys}


class IndexMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize()
    def start(self) -> None:
        self.index: PrefixIndex[int, int] = PrefixIndex(POLICIES[self.policy]())
        self.values = count(1000)
        self.chunks: list[ModelChunk] = []  # all whose value the index has
        self.due: list[tuple[int, int]] = []  # ended, not yet returned
        self.returned: set[int] = set()
        self.holds: list[ModelHandle] = []
        self.stores: list[ModelHandle] = []

    # -- the model -----------------------------------------------------------------------------

    def found(self, state: str) -> dict[int, ModelChunk]:
        here = [c for c in self.chunks if c.state == state and not c.is_removed]
        return {chunk.key: chunk for chunk in here}

    def idle(self) -> list[ModelChunk]:
        return [chunk for chunk in self.found("ready").values() if not chunk.holds]

    def end(self, chunk: ModelChunk) -> None:
        self.chunks.remove(chunk)
        self.due.append(chunk.pair)

    def take(self, pairs: list[tuple[int, int]]) -> None:
        """What a call returned is all that was due, each value for the first time."""
        assert sorted(pairs) == sorted(self.due)
        values = {value for _, value in pairs}
        assert len(values) == len(pairs)
        assert not values & self.returned
        self.returned |= values
        self.due = []

    def remove_from_model(self, chunk: ModelChunk) -> None:
        if chunk.state == "ready" and not chunk.holds:
            self.end(chunk)
        else:
            chunk.is_removed = True

    # -- look up and use -----------------------------------------------------------------------

    @rule(keys=KEY_LISTS)
    def look_up(self, keys: list[int]) -> None:
        ready, pending = self.found("ready"), self.found("pending")
        length = next((i for i, key in enumerate(keys) if key not in ready), len(keys))
        assert self.index.prefix_length(keys) == length
        assert self.index.values(keys[:length]) == [ready[key].value for key in keys[:length]]
        distinct = list(dict.fromkeys(keys))
        missing = [key for key in distinct if key not in ready and key not in pending]
        assert self.index.missing(keys) == missing
        for key in keys:
            expected = "ready" if key in ready else "pending" if key in pending else "absent"
            assert self.index.state(key) == expected
            assert (key in self.index) == (key in ready)
        if length < len(keys):
            with pytest.raises(KeyError, match=str(keys[length])):
                self.index.values(keys)

    @rule(keys=KEY_LISTS)
    def touch(self, keys: list[int]) -> None:
        self.index.touch(keys)

    @rule(keys=KEY_LISTS)
    def hold(self, keys: list[int]) -> None:
        ready = self.found("ready")
        absent = [key for key in keys if key not in ready]
        if absent:
            with pytest.raises(KeyError, match=str(absent[0])):
                self.index.hold(keys)
            return
        hold = self.index.hold(keys)
        chunks = {key: ready[key] for key in keys}
        for chunk in chunks.values():
            chunk.holds += 1
        assert (hold.keys, len(hold)) == (list(chunks), len(chunks))
        self.holds.append(ModelHandle(hold, chunks))

    def some_of(self, handle: ModelHandle, data: st.DataObject) -> list[int] | None:
        keys = list(handle.chunks)
        subsets = st.lists(st.sampled_from(keys), unique=True) if keys else st.just([])
        return data.draw(st.none() | subsets)

    def end_hold(self, hold: ModelHandle, keys: list[int] | None) -> None:
        chunks = hold.select(keys)
        for key, chunk in list(chunks.items()):
            chunk.holds -= 1
            if chunk.is_removed and not chunk.holds:
                self.end(chunk)
            del hold.chunks[key]

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        hold = data.draw(st.sampled_from(self.holds))
        assert hold.handle.values == [chunk.value for chunk in hold.chunks.values()]
        keys = self.some_of(hold, data)
        pairs = hold.handle.release(keys)
        self.end_hold(hold, keys)
        self.take(pairs)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def leave_the_block_of_a_hold(self, data: st.DataObject) -> None:
        hold = data.draw(st.sampled_from(self.holds))
        with hold.handle:
            pass
        self.end_hold(hold, None)

    @precondition(lambda self: self.holds or self.stores)
    @rule(data=st.data(), key=st.integers(100, 200))
    def name_a_key_that_is_not_open(self, data: st.DataObject, key: int) -> None:
        handle = data.draw(st.sampled_from(self.holds + self.stores))
        keys = [*handle.chunks, key]
        ends = (
            [handle.handle.release]
            if handle in self.holds
            else [handle.handle.abort] + [handle.handle.complete] * bool(handle.chunks)
        )
        for end in ends:
            with pytest.raises(KeyError, match=str(key)):
                end(keys)

    # -- store ---------------------------------------------------------------------------------

    @rule(keys=KEY_LISTS, sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6))
    def begin(self, keys: list[int], sizes: list[int]) -> None:
        values = [next(self.values) for _ in keys]
        known = self.found("ready") | self.found("pending")
        if len(set(keys)) < len(keys) or known.keys() & set(keys):
            with pytest.raises(ValueError, match=r"stored already|named twice") as caught:
                self.index.begin(keys, values, sizes[: len(keys)])
            named = int(str(caught.value).split()[0])
            assert named in known or keys.count(named) > 1
            return
        size = sizes[0] if len(keys) == 1 else sizes[: len(keys)]
        store = self.index.begin(keys, values, size)
        made = map(ModelChunk, keys, values, sizes)
        chunks = {chunk.key: chunk for chunk in made}
        self.chunks += chunks.values()
        self.stores.append(ModelHandle(store, chunks))

    @precondition(lambda self: self.stores)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        store = data.draw(st.sampled_from(self.stores))
        keys = self.some_of(store, data)
        pairs = store.handle.complete(keys)
        for key, chunk in list(store.select(keys).items()):
            chunk.state = "ready"
            if chunk.is_removed:
                self.end(chunk)
            del store.chunks[key]
        self.take(pairs)
        self.forget_ended_stores()

    @precondition(lambda self: self.stores)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        store = data.draw(st.sampled_from(self.stores))
        keys = self.some_of(store, data)
        pairs = store.handle.abort(keys)
        for key, chunk in list(store.select(keys).items()):
            self.end(chunk)
            del store.chunks[key]
        self.take(pairs)
        self.forget_ended_stores()

    def forget_ended_stores(self) -> None:
        for store in self.stores:
            if not store.chunks:
                assert store.handle.abort() == []
        self.stores = [store for store in self.stores if store.chunks]

    # -- make room -----------------------------------------------------------------------------

    @rule(keys=KEY_LISTS)
    def remove(self, keys: list[int]) -> None:
        pairs = self.index.remove(keys)
        for key in set(keys):
            for chunk in (self.found("ready") | self.found("pending")).values():
                if chunk.key == key:
                    self.remove_from_model(chunk)
        self.take(pairs)

    @rule()
    def clear(self) -> None:
        pairs = self.index.clear()
        for chunk in (*self.found("ready").values(), *self.found("pending").values()):
            self.remove_from_model(chunk)
        self.take(pairs)

    @rule(num_bytes=st.integers(0, 25), protected=KEY_LISTS)
    def evict(self, num_bytes: int, protected: list[int]) -> None:
        may_go = {chunk.pair: chunk for chunk in self.idle() if chunk.key not in protected}
        total = sum(chunk.size for chunk in may_go.values())
        ended = self.index.evict(num_bytes, protected)
        assert (ended is None) == (num_bytes > total)
        if ended is None:
            return
        victims = [pair for pair in ended if pair not in self.due]
        sizes = [may_go[pair].size for pair in victims]
        assert sum(sizes) >= num_bytes
        assert sum(sizes[:-1]) < num_bytes or not sizes
        for pair in victims:
            self.end(may_go[pair])
        self.take(ended)

    @rule()
    def take_ended(self) -> None:
        self.take(self.index.take_ended())

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def the_books_are_right(self) -> None:
        self.index.check()
        stats = self.index.stats()
        ready = list(self.found("ready").values())
        groups = {
            "ready": ready,
            "pending": list(self.found("pending").values()),
            "held": [chunk for chunk in ready if chunk.holds],
            "evictable": self.idle(),
            "removed": [chunk for chunk in self.chunks if chunk.is_removed],
        }
        for name, chunks in groups.items():
            expected = len(chunks), sum(chunk.size for chunk in chunks)
            found = getattr(stats, f"{name}_chunks"), getattr(stats, f"{name}_bytes")
            assert found == expected, name
        assert stats.ended_chunks == len(self.due)
        assert self.index.evictable_bytes == stats.evictable_bytes
        assert len(self.index) == len(ready)

    def teardown(self) -> None:
        """Whatever happened, everything comes back once all has ended."""
        if not hasattr(self, "index"):
            return
        for hold in self.holds:
            pairs = hold.handle.release()
            self.end_hold(hold, None)
            self.take(pairs)
        for store in self.stores:
            pairs = store.handle.abort()
            for chunk in store.chunks.values():
                self.end(chunk)
            self.take(pairs)
        self.clear()
        assert self.chunks == []
        assert all(not vars_left for vars_left in (self.due, self.found("ready")))


@pytest.mark.parametrize("name", POLICIES)
def test_no_value_is_lost_or_returned_twice(name: str) -> None:
    machine = type(f"Machine_{name}", (IndexMachine,), {"policy": name})
    case = machine.TestCase
    case.settings = settings(deadline=None)
    case("runTest").runTest()
