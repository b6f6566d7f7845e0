"""Finalizers and signal handlers that use an index or a store, at every place of its own code.

Also exceptions at each of these places, which are more than the lines of ``test_interrupted.py``.
"""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from foreign_code import Foreign, interrupts, no_deadlock

from kvheap import BlockLayout, MemoryFormat, PrefixIndex, PrefixStore, TensorMemoryAllocator
from kvheap.device.host_queue import host_queue
from kvheap.prefix import LRU, POLICIES, BusyError, CachedChunk, Hold, PendingStore
from kvheap.prefix.store_handles import ChunkHold, StoreInFlight
from kvheap.transfer import runs

LAYOUT = BlockLayout.of([2, 1, 512, 2], torch.float16, MemoryFormat.KV_2LTD)
CHUNK = 4096
PREFIX: dict[str, Any] = {"modules": ("kvheap.prefix", "kvheap.claims")}
OURS: dict[str, Any] = {
    "modules": ("kvheap.prefix", "kvheap.claims", "kvheap.transfer", "kvheap.device"),
}


class Scene:
    """An index with chunks in every state, and every value that it was given or gave back."""

    def __init__(self, policy: str) -> None:
        self.index: PrefixIndex[int, int] = PrefixIndex(POLICIES[policy]())
        index = self.index
        index.begin(range(12), range(12), [5, 10, 20] * 4).complete()
        self.owned, self.given = list(range(12)), []
        self.holds: list[Hold[int, int]] = [index.hold(range(2, 6)), index.hold([4, 5])]
        self.extra = index.hold([2, 8])
        self.stores: list[PendingStore[int, int]] = []
        self.begin(20)
        self.begin(30)
        index.remove([3, 5, 21])

    def begin(self, first: int) -> None:
        values = list(range(first, first + 3))
        self.stores.append(self.index.begin(values, values, 10))
        self.owned += values

    def take(self, keys: list[int]) -> None:
        self.holds.append(self.index.hold(keys))

    def give(self, pairs: list[tuple[int, int]] | None) -> None:
        self.given += [value for _, value in pairs or []]

    def require_whole(self) -> None:
        index = self.index
        index.check()
        self.give(index.clear())
        for handle in (*self.holds, self.extra):
            self.give(handle.release())
        for store in self.stores:
            self.give(store.abort())
        self.give(index.take_ended())
        assert sorted(self.given) == sorted(self.owned)
        stats = index.stats()
        assert not any(getattr(stats, name) for name in type(stats).__slots__)


OPERATIONS: dict[str, Callable[[Scene], object]] = {
    "begin": lambda scene: scene.begin(40),
    "complete": lambda scene: scene.give(scene.stores[0].complete()),
    "complete a part": lambda scene: scene.give(scene.stores[0].complete([21])),
    "abort": lambda scene: scene.give(scene.stores[0].abort()),
    "hold": lambda scene: scene.take([0, 4, 7]),
    "release": lambda scene: scene.give(scene.holds[0].release()),
    "release a part": lambda scene: scene.give(scene.holds[0].release([2, 3])),
    "leave a block": lambda scene: scene.holds[1].__exit__(None, None, None),
    "touch": lambda scene: scene.index.touch(range(12)),
    "evict": lambda scene: scene.give(scene.index.evict(31)),
    "evict beside protected": lambda scene: scene.give(scene.index.evict(11, [0, 1])),
    "remove": lambda scene: scene.give(scene.index.remove([1, 3, 5, 7, 9, 20])),
    "clear": lambda scene: scene.give(scene.index.clear()),
    "take what ended": lambda scene: scene.give(scene.index.take_ended()),
}


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(BusyError, match="in the middle of another call"):
        call()


ENDS: list[Callable[[Scene], object]] = [
    lambda scene: scene.give(scene.extra.release()),
    lambda scene: scene.give(scene.extra.release([2])),
    lambda scene: scene.extra.__exit__(None, None, None),
    lambda scene: scene.give(scene.stores[1].complete()),
    lambda scene: scene.give(scene.stores[1].abort()),
    lambda scene: scene.give(scene.stores[1].complete([31])),
]
"""What finalizers may do in the middle of a call."""

LOOKS: list[Callable[[Scene], object]] = [
    lambda scene: scene.index.stats(),
    lambda scene: scene.index.prefix_length(range(12)),
    lambda scene: (scene.index.state(4), 4 in scene.index, len(scene.index), repr(scene.index)),
    lambda scene: (scene.index.missing(range(50)), scene.index.evictable_bytes),
]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_what_ends_in_the_middle_of_a_call_ends_with_it(policy: str, name: str) -> None:
    number = 0
    while True:
        scene = Scene(policy)
        end, look = ENDS[number % len(ENDS)], LOOKS[number % len(LOOKS)]

        def foreign(scene: Scene = scene, end: Any = end, look: Any = look) -> None:
            look(scene)
            end(scene)
            look(scene)

        if not Foreign(number, foreign, **PREFIX).strikes(partial(OPERATIONS[name], scene)):
            break
        scene.index.stats()
        assert len(scene.extra) == {0: 0, 1: 1, 2: 0}.get(number % len(ENDS), 2)
        scene.require_whole()
        number += 1
    assert number > 5


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_calls_are_refused_there_and_change_nothing(name: str) -> None:
    number = refusals = 0
    while True:
        scene = Scene("gdsf")
        calls = [
            other
            for other in OPERATIONS
            if other in ("begin", "hold", "touch", "evict", "remove", "clear", "take what ended")
        ]
        other = OPERATIONS[calls[number % len(calls)]]
        seen: list[BaseException] = []

        def foreign(scene: Scene = scene, other: Any = other, seen: Any = seen) -> None:
            try:
                other(scene)
            except BusyError as error:
                seen.append(error)
            except (KeyError, ValueError):
                pass

        struck = Foreign(number, foreign, **PREFIX).strikes(partial(run, name, scene))
        if not struck:
            break
        refusals += len(seen)
        scene.require_whole()
        number += 1
    assert refusals > number / 2


def run(name: str, scene: Scene) -> None:
    """An operation, of which another may have taken away what it works on."""
    with suppress(KeyError, ValueError):
        OPERATIONS[name](scene)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_an_exception_at_any_place_loses_no_value(policy: str, name: str) -> None:
    number = 0
    while True:
        scene = Scene(policy)
        if not interrupts(number, partial(OPERATIONS[name], scene), **PREFIX):
            break
        scene.require_whole()
        number += 1
    assert number > 5


def test_an_exception_in_the_repair_too() -> None:
    for name in OPERATIONS:
        for number in range(0, 60, 7):
            scene = Scene("s3fifo")
            interrupts(number, partial(OPERATIONS[name], scene), **PREFIX)
            for other in range(0, 40, 3):
                interrupts(other, lambda scene=scene: scene.index.take_ended, **PREFIX)
                interrupts(other, scene.index.stats, **PREFIX)
            scene.require_whole()


def test_finalizers_on_other_threads() -> None:
    """The garbage collector runs a finalizer on whichever thread allocates."""
    index: PrefixIndex[int, int] = PrefixIndex()
    index.begin(range(100), range(100), 10).complete()
    handles: list[Hold[int, int]] = []
    ended = threading.Event()
    given: list[int] = []

    def finalize() -> None:
        while not ended.is_set() or handles:
            try:
                hold = handles.pop()
            except IndexError:
                continue
            given.extend(value for _, value in hold.release())

    threads = [threading.Thread(target=finalize) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun = 100
    with no_deadlock(60):
        for round in range(1500):
            keys = [key for key in range(round % 90, begun, 90) if key in index]
            handles.append(index.hold(keys))
            given += [value for _, value in index.evict(20) or []]
            index.begin([begun, begun + 1], [begun, begun + 1], 10).complete()
            begun += 2
            given += [value for _, value in index.remove([begun - 1])]
        ended.set()
        for thread in threads:
            thread.join()
    index.check()
    given += [value for _, value in index.take_ended()]
    assert index.stats().held_chunks == 0
    given += [value for _, value in index.clear()]
    assert sorted(given) == list(range(begun))


class Broken(LRU):
    """A policy of which one method always fails, from some time on."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.is_broken = False
        setattr(self, method, partial(self.fail, getattr(self, method)))

    def fail(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if self.is_broken:
            raise ZeroDivisionError("a bug in the policy")
        return method(*arguments)


METHODS = ["insert", "touch", "take_out", "put_back", "remove", "evict", "clear", "repair"]


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_always_fails_does_not_take_the_index_with_it(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Broken(method)
    index: PrefixIndex[int, int] = PrefixIndex(policy)
    index.begin(range(10), range(10), 10).complete()
    holds = [index.hold([1, 2])]
    policy.is_broken = True
    given: list[int] = []
    errors = 0
    numbers = itertools.count(100)
    steps: list[Callable[[], object]] = [
        lambda: index.begin([len(steps) * 100 + next(numbers)], [next(numbers)], 10).complete(),
        lambda: index.touch(range(10)),
        lambda: holds.append(index.hold([3, 4])),
        lambda: given.extend(value for _, value in holds[0].release()),
        lambda: given.extend(value for _, value in index.remove([5])),
        lambda: given.extend(value for _, value in index.evict(10) or []),
    ]
    with caplog.at_level(logging.ERROR, "kvheap"):
        for step in steps * 3:
            try:
                step()
            except ZeroDivisionError:
                errors += 1
            except (ValueError, KeyError):  # in the second round
                pass
            index.stats()
    assert errors <= 2
    assert (errors > 0) == (method not in ("clear", "repair"))
    if errors:
        assert "fails again and again; LRU takes its place" in caplog.text
    index.check()
    given += [value for _, value in index.evict(10) or []]
    for _ in range(2):
        with suppress(ZeroDivisionError):
            given += [value for _, value in index.clear()]
    assert len(index) == 0
    for hold in holds:
        given += [value for _, value in hold.release()]
    assert len(set(given)) == len(given)
    index.check()


@pytest.mark.parametrize("wrong", ["few", "foreign", "held", "twice"])
def test_a_policy_that_chooses_wrong_victims(wrong: str) -> None:
    class Wrong(LRU):
        def evict(self, num_bytes: int) -> list[CachedChunk]:
            found = list(super().evict(num_bytes))
            return {
                "few": found[:-1],
                "foreign": [index.books.__class__.__mro__ and CachedChunk(10, 1)],
                "held": [index.books.ready[1]],
                "twice": [found[0], found[0]],
            }[wrong]

    index: PrefixIndex[int, int] = PrefixIndex(Wrong())
    index.begin(range(4), range(4), 10).complete()
    hold = index.hold([1])
    with pytest.raises(Exception, match=r"the policy lru chose|no attribute 'key'"):
        index.evict(20)
    index.check()
    assert index.evict(20) == [(3, 3), (2, 2)] or wrong
    index.check()
    hold.release()
    assert len(index) == 2


# -- stores ----------------------------------------------------------------------------------------

SOURCE = torch.ones(4, *LAYOUT.shapes[0], dtype=torch.float16)


class StoreScene:
    """A store with a hold, a store in flight, and blocks of another heap to offload."""

    def __init__(self, num_chunks: int = 6) -> None:
        self.heap, self.near = (
            TensorMemoryAllocator(torch.zeros(num * CHUNK, dtype=torch.uint8), on_full=None)
            for num in (num_chunks, 4)
        )
        self.store: PrefixStore[int] = PrefixStore(self.heap, LAYOUT)
        self.store.store([1, 2, 3, 4], SOURCE)
        self.holds: list[ChunkHold[int]] = [self.store.hold([1, 2])]
        self.flights: list[StoreInFlight[int]] = [self.store.begin([5])]
        batch = self.near.batched_allocate(
            LAYOUT.shapes[0], LAYOUT.dtypes[0], 2, LAYOUT.fmt, source=SOURCE[:2]
        )
        assert batch is not None
        self.batch = batch

    def offload(self, free: bool) -> None:
        self.flights.append(self.store.offload([8, 9], self.batch, free=free))

    def require_whole(self) -> None:
        store, heap = self.store, self.heap
        host_queue.run([lambda: None], False)[0].synchronize()
        for flight in self.flights:
            if flight.batch.transfer is not None:
                flight.batch.transfer.result()
        store.poll()
        store.check()
        for key in range(20):
            if key in store:
                assert torch.equal(store.chunks([key])[0].tensor, SOURCE[0]), key
        is_moved = [key in store for key in (8, 9)]
        assert is_moved[0] == is_moved[1]
        live = self.batch.live
        assert live.all() or not live.any()
        assert live.all() or store.stats().evicted_chunks or is_moved[0] or len(store) == 0
        for hold in self.holds:
            hold.release()
        for flight in self.flights:
            flight.abort()
        stats = store.stats()
        assert (stats.held_chunks, stats.removed_chunks, stats.pending_chunks) == (0, 0, 0)
        assert stats.stores_in_flight == 0
        assert heap.stats().allocated_bytes == CHUNK * stats.ready_chunks
        assert self.near.stats().allocated_bytes == CHUNK * int(live.sum())
        store.close()
        assert heap.leaks() == ()
        heap.address_manager.check()


STORE_OPERATIONS: dict[str, Callable[[StoreScene], object]] = {
    "store": lambda scene: scene.store.store([10], SOURCE[:1]),
    "store and evict": lambda scene: scene.store.store([10, 11], SOURCE[:2]),
    "begin": lambda scene: scene.flights.append(scene.store.begin([10])),
    "complete": lambda scene: (
        scene.flights[0].batch[0].tensor.fill_(1),
        scene.flights[0].complete(),
    ),
    "abort": lambda scene: scene.flights[0].abort(),
    "hold": lambda scene: scene.holds.append(scene.store.hold([2, 3])),
    "release": lambda scene: scene.holds[0].release(),
    "release what was removed": lambda scene: (scene.store.remove([1]), scene.holds[0].release()),
    "remove": lambda scene: scene.store.remove([1, 3]),
    "clear": lambda scene: scene.store.clear(),
    "touch": lambda scene: scene.store.touch([1, 3]),
    "poll": lambda scene: scene.store.poll(),
    "offload": lambda scene: scene.offload(free=False),
    "offload and free": lambda scene: scene.offload(free=True),
}


@pytest.mark.parametrize("name", STORE_OPERATIONS)
@pytest.mark.parametrize("by_queue", [False, True])
def test_an_exception_at_any_place_of_a_store_loses_nothing(
    name: str, by_queue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_queue:
        if "offload" not in name:
            return
        monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)
    number = 0
    while True:
        scene = StoreScene()
        with no_deadlock():
            if not interrupts(number, partial(STORE_OPERATIONS[name], scene), **OURS):
                break
            scene.flights[0].abort()
            scene.require_whole()
        number += 1
    assert number > 5


STORE_ENDS: list[Callable[[StoreScene], object]] = [
    lambda scene: scene.holds[0].release(),
    lambda scene: scene.holds[0].release([2]),
    lambda scene: scene.flights[0].abort(),
]


@pytest.mark.parametrize("name", STORE_OPERATIONS)
def test_what_finalizers_end_in_the_middle_of_a_call_of_a_store(name: str) -> None:
    number = 0
    while True:
        scene = StoreScene()
        kept = scene.store.hold([1, 2])
        scene.store.remove([2])

        def foreign(scene: StoreScene = scene, number: int = number) -> None:
            scene.store.stats()
            STORE_ENDS[number % len(STORE_ENDS)](scene)
            assert scene.store.prefix_length([99]) == 0
            scene.store.stats()

        def call(scene: StoreScene = scene) -> None:
            try:
                STORE_OPERATIONS[name](scene)
            except BusyError:
                raise
            except (KeyError, RuntimeError):  # of what the finalizer has ended
                pass

        with no_deadlock():
            struck = Foreign(number, foreign, **OURS).strikes(call)
            scene.store.stats()
            if struck and number % len(STORE_ENDS) == 0:
                assert scene.holds[0].keys == []
            kept.release()
            scene.flights[0].abort()
            if not struck:
                break
            scene.require_whole()
        number += 1
    assert number > 5


def test_calls_of_a_store_in_the_middle_of_another_are_refused() -> None:
    scene = StoreScene()
    seen: list[str] = []

    class Key:
        def __hash__(self) -> int:
            for name, call in {
                "store": lambda: scene.store.store([90], SOURCE[:1]),
                "begin": lambda: scene.store.begin([90]),
                "hold": lambda: scene.store.hold([1]),
                "clear": scene.store.clear,
                "poll": scene.store.poll,
                "close": scene.store.close,
            }.items():
                with pytest.raises(BusyError):
                    call()
                seen.append(name)
            return 1

    with no_deadlock():
        scene.store.touch([Key()])  # type: ignore[list-item]
    assert seen[:6] == ["store", "begin", "hold", "clear", "poll", "close"]
    scene.flights[0].abort()
    scene.require_whole()


class Cycle:
    """Garbage that only the collector finds; its finalizer ends a hold."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.me = self
        weakref.finalize(self, call).atexit = False


def test_finalizers_of_cycles_release_holds() -> None:
    """As of requests of an engine, which refer to themselves and hold their prefix."""
    index: PrefixIndex[int, int] = PrefixIndex()
    index.begin(range(50), range(50), 10).complete()
    before = gc.get_threshold()
    begun, given = 50, []
    gc.collect()
    gc.set_threshold(1)
    try:
        with no_deadlock(60):
            for round in range(400):
                held = [key for key in range(round % 40, begun) if key in index][:4]
                Cycle(index.hold(held).release)
                index.begin([begun], [begun], 10).complete()
                begun += 1
                given += [value for _, value in index.evict(10) or []]
    finally:
        gc.set_threshold(*before)
    gc.collect()
    index.check()
    given += [value for _, value in index.clear()]
    assert index.stats().held_chunks == 0
    assert len(set(given)) == len(given)
    assert index.stats().removed_chunks == 0
