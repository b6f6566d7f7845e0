"""PrefixIndex and PrefixStore when an exception strikes inside a call: no value is lost or doubled.

Lines are interrupted as in ``tests/addresses/test_interrupted.py``. The index must pass its own
check afterwards, and must have every value once: found, in use, or returned to the caller.
"""

from __future__ import annotations

import linecache
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest
import torch

from kvheap import BlockLayout, MemoryFormat, PrefixIndex, PrefixStore, TensorMemoryAllocator
from kvheap.errors import LifetimeError
from kvheap.prefix import POLICIES, ChunkHold, Hold, PendingStore

LAYOUT = BlockLayout.of([2, 1, 512, 2], torch.float16, MemoryFormat.KV_2LTD)


def is_safe_from_signals(frame: FrameType) -> bool:
    """A line before which a trace function runs but never a signal handler.

    CPython looks for signals after calls and jumps. ``return`` of a name that the line before
    assigned or committed is not reached through either, and neither is a ``try``.
    """
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    words = line.split()
    return line == "try:" or (len(words) == 2 and words[0] == "return" and words[1].isidentifier())


class Interruption:
    """Raises KeyboardInterrupt before a line of ``kvheap.prefix``, counted from one."""

    def __init__(self, at_line: int) -> None:
        self.at_line = at_line
        self.lines = 0

    def trace(self, frame: FrameType, event: str, argument: object) -> object:
        if not frame.f_globals.get("__name__", "").startswith("kvheap.prefix"):
            return None
        if event == "line" and not is_safe_from_signals(frame):
            self.lines += 1
            if self.lines == self.at_line:
                raise KeyboardInterrupt
        return self.trace

    def strikes(self, operation: Callable[[], object]) -> bool:
        """Whether ``operation`` was interrupted; else it ended before that line."""
        sys.settrace(self.trace)
        try:
            operation()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


class Flaky:
    """A key whose ``__hash__`` or ``__eq__`` fails at one chosen call; all hashes collide."""

    calls = 0
    fails_at: int | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def tick(cls) -> None:
        cls.calls += 1
        if cls.calls == cls.fails_at:
            raise RuntimeError("a key has failed")

    def __hash__(self) -> int:
        self.tick()
        return 1

    def __eq__(self, other: object) -> bool:
        self.tick()
        return isinstance(other, Flaky) and self.name == other.name

    def __repr__(self) -> str:
        return self.name


class Scene:
    """Chunks in every state: ready, held once and twice, pending, and removed while in use."""

    def __init__(self, policy: str, keys: list[object]) -> None:
        self.keys = keys
        self.index: PrefixIndex[object, object] = PrefixIndex(POLICIES[policy]())
        index = self.index
        index.begin(keys[:3], [f"first {i}" for i in range(3)], 10).complete()
        index.evict(30)  # so that ghosts remember them
        index.begin(keys[:9], [f"value {i}" for i in range(9)], [5, 10, 20] * 3).complete()
        self.hold = index.hold(keys[2:6])
        self.second = index.hold(keys[4:6])
        self.store = index.begin(keys[9:12], ["value 9", "value 10", "value 11"], 10)
        self.removed = [keys[3], keys[5], keys[10]]
        assert index.remove(self.removed) == []
        self.owned = {f"value {i}" for i in range(12)}  # by the index

    def begin(self) -> None:
        keys, values = self.keys[12:15], ["value 12", "value 13", "value 14"]
        self.begun = self.index.begin(keys, values, 10)
        self.owned |= set(values)

    def take_hold(self) -> None:
        self.third = self.index.hold([self.keys[0], self.keys[4], self.keys[7]])

    def leave_block(self) -> None:
        with self.second:
            pass

    def everything(self) -> list[object]:
        """Ends all that can be ended, and returns every value that the index gives back."""
        index = self.index
        given = list(index.take_ended())
        given += index.clear()
        for handle in (self.hold, self.second, getattr(self, "third", None)):
            given += handle.release() if handle is not None else []
        for handle in (self.store, getattr(self, "begun", None)):
            given += handle.abort() if handle is not None else []
        return [value for _, value in given]


OPERATIONS: dict[str, Callable[[Scene], object]] = {
    "begin": Scene.begin,
    "complete": lambda scene: scene.store.complete(),
    "complete a part": lambda scene: scene.store.complete([scene.keys[10]]),
    "abort": lambda scene: scene.store.abort(),
    "hold": Scene.take_hold,
    "release": lambda scene: scene.hold.release(),
    "release a part": lambda scene: scene.hold.release(scene.keys[2:4]),
    "leave a block": Scene.leave_block,
    "touch": lambda scene: scene.index.touch(scene.keys),
    "evict": lambda scene: scene.index.evict(31),
    "evict beside protected": lambda scene: scene.index.evict(11, scene.keys[:2]),
    "remove": lambda scene: scene.index.remove(scene.keys[1:12:2]),
    "clear": lambda scene: scene.index.clear(),
}


def require_that_nothing_is_lost(scene: Scene, given: list[object]) -> None:
    """The index is whole, and has or has returned each value once."""
    scene.index.check()
    given += scene.everything()
    assert sorted(given) == sorted(scene.owned)
    scene.index.check()
    stats = scene.index.stats()
    assert not any(getattr(stats, name) for name in type(stats).__slots__)


class Attempt:
    """One call of an operation on a new scene, and the values that it returned."""

    def __init__(self, policy: str, name: str) -> None:
        self.scene = Scene(policy, [f"key {i}" for i in range(15)])
        self.given: list[object] = []
        self.operation = OPERATIONS[name]

    def __call__(self) -> None:
        self.given += [value for _, value in self.operation(self.scene) or []]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_an_exception_at_any_line_loses_no_value(policy: str, name: str) -> None:
    line = 1
    while Interruption(line).strikes(attempt := Attempt(policy, name)):
        require_that_nothing_is_lost(attempt.scene, attempt.given)
        line += 1
    assert line > 8


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_an_exception_in_the_repair_is_made_good_by_the_next_call(policy: str, name: str) -> None:
    total = Interruption(0)
    total.strikes(Attempt(policy, name))
    source = random.Random(f"{policy} {name}")
    in_repairs = 0
    for _ in range(40):
        attempt = Attempt(policy, name)
        assert Interruption(source.randint(1, total.lines)).strikes(attempt)
        for _ in range(3):
            look = Interruption(source.randint(1, 30))
            in_repairs += look.strikes(lambda index=attempt.scene.index: len(index))
        require_that_nothing_is_lost(attempt.scene, attempt.given)
    assert in_repairs > 5


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_key_that_fails_loses_no_value(name: str) -> None:
    call = 1
    while True:
        scene = Scene("arc", [Flaky(f"key {i}") for i in range(15)])
        Flaky.calls, Flaky.fails_at = 0, call
        given: list[object] = []
        try:
            given = [value for _, value in OPERATIONS[name](scene) or []]
            has_failed = False
        except RuntimeError:
            has_failed = True
        finally:
            Flaky.fails_at = None
        if not has_failed:
            break
        require_that_nothing_is_lost(scene, given)
        call += 1
    needs_no_key = {"touch", "clear", "leave a block", "release", "abort"}
    assert call > 1 or name in needs_no_key


SOURCE = torch.ones(4, *LAYOUT.shapes[0], dtype=torch.float16)

STORE_OPERATIONS: dict[str, Callable[[PrefixStore[int], ChunkHold[int]], object]] = {
    "store": lambda store, hold: store.store([8], SOURCE[:1]),
    "store and evict": lambda store, hold: store.store([6, 7, 8], SOURCE[:3]),
    "begin": lambda store, hold: store.begin([6, 7, 8]),
    "begin and complete": lambda store, hold: store.begin([6, 7, 8]).complete(),
    "begin and abort": lambda store, hold: store.begin([6, 7, 8]).abort(),
    "hold": lambda store, hold: store.hold([2, 3]),
    "release": lambda store, hold: hold.release(),
    "release what was removed": lambda store, hold: (store.remove([1, 2]), hold.release()),
    "remove": lambda store, hold: store.remove([1, 3]),
    "clear": lambda store, hold: store.clear(),
    "close": lambda store, hold: store.close(),
}


@pytest.mark.parametrize("name", STORE_OPERATIONS)
def test_an_exception_at_any_line_of_a_store_loses_no_byte(name: str) -> None:
    operation = STORE_OPERATIONS[name]
    line = 1
    while True:
        buffer = torch.zeros(5 * 4096, dtype=torch.uint8)
        heap = TensorMemoryAllocator(buffer, on_full=None)
        store: PrefixStore[int] = PrefixStore(heap, LAYOUT)
        store.store([1, 2, 3, 4], SOURCE)
        hold = store.hold([1, 2])
        call = partial(operation, store, hold)
        if not Interruption(line).strikes(call):
            break
        store.check()
        heap.address_manager.check()
        assert all(chunk.is_valid() for chunk in store._index.values(filter_ready(store)))
        hold.release()
        stats = store.stats()
        assert (stats.held_chunks, stats.removed_chunks) == (0, 0)
        known = stats.ready_chunks + stats.pending_chunks
        assert heap.stats().allocated_bytes == 4096 * known
        store.close()
        assert heap.leaks() == ()
        line += 1
    assert line > 5


def filter_ready(store: PrefixStore[int]) -> list[int]:
    return [key for key in range(10) if key in store]


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="needs the main thread"
)
def test_real_signals_at_random_moments_lose_no_value() -> None:
    """A timer that raises, as often as it can, into an index at work.

    What a call returns is appended by the same statement, so that no signal comes in between.
    """

    class AlarmError(Exception):
        pass

    def raise_alarm(number: int, frame: FrameType | None) -> None:
        raise AlarmError

    index: PrefixIndex[int, int] = PrefixIndex()
    source = random.Random(3)
    begun: set[int] = set()
    stores: list[PendingStore[int, int]] = []
    holds: list[Hold[int, int]] = []
    given: list[list[tuple[int, int]] | None] = []
    value = alarms = 0

    def work(keys: list[int], values: list[int]) -> None:
        stores.append(index.begin(keys, values, 10))
        if source.random() < 0.8:
            given.append(stores[source.randrange(len(stores))].complete(None))
        holds.append(index.hold([key for key in keys if key in index]))
        given.append(index.remove(keys[::3]))
        index.touch(keys)
        for handle in source.sample(holds, len(holds) // 2):
            given.append(handle.release())
        given.append(index.evict(source.randint(0, 300)))

    before = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            keys = index.missing(source.sample(range(300), 40))
            values = list(range(value, value + len(keys)))
            value += len(keys)
            num_stores = len(stores)
            try:
                signal.setitimer(signal.ITIMER_REAL, source.uniform(1e-6, 300e-6))
                work(keys, values)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (AlarmError, LifetimeError):  # some store that was completed before
                alarms += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            if len(stores) > num_stores:
                begun |= set(values)
            index.check()
            stores = [store for store in stores if len(store)]
            holds = [hold for hold in holds if len(hold)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    given.append(index.clear())
    given += [hold.release() for hold in holds]
    given += [store.abort() for store in stores]
    values = [value for pairs in given for _, value in pairs or []]
    assert sorted(values) == sorted(begun)
    assert alarms > 20
    assert len(begun) > 1000
