"""Reads whose callers are interrupted, or in whose middle other code runs, at every place.

A small read by a lease is posted by its caller, who also asks NIXL about reads that it waits for:
a signal handler or a finalizer may strike there between any two steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from foreign_code import Foreign, interrupts, no_deadlock
from remote_nodes import fill, keys_of, need_nixl, until, wrong_rows
from remote_pairs import Pair

from kvheap.device.host_queue import NestedWaitError

WHY_NOT = need_nixl()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    # Some interrupts strike in a finalizer, which can only report them.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PLACES = {
    "modules": ("kvheap.remote.peer", "kvheap.remote.read", "kvheap.remote.moves")
    + ("kvheap.remote.agent", "kvheap.remote.turn", "kvheap.remote.peer_lease", "kvheap.claims")
    + ("kvheap.remote.line", "kvheap.remote.frames", "kvheap.remote.messages"),
    "but_not_inside": ("logging", "threading"),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    yield shared
    shared.require_idle()
    assert shared.here.stats().allocated_bytes == 0


READS = {
    "one block by a lease": (range(5, 6), True),
    "parts by a lease": (range(0, 64, 2), True),
    "by keys": (range(3), False),
}


def is_empty(heap: Any) -> bool:
    """Whether nothing is allocated; an allocation takes back what was dropped without a free."""
    heap.batched_free(fill(heap, [0]))
    return not heap.stats().allocated_bytes


@pytest.mark.parametrize("name", READS)
def test_an_interrupt_at_any_place(pair: Pair, name: str) -> None:
    numbers, is_leased = READS[name]
    number = struck = 0
    lease = pair.lease(numbers)
    wanted: Any = lease if is_leased else keys_of(numbers)

    def read() -> None:
        batch = pair.peer.read(wanted, into=pair.here, timeout_s=2)  # a lost lease ends then
        batches.append(batch)
        batch.transfer.result()

    while True:
        batches: list[Any] = []
        with no_deadlock():
            was_struck = interrupts(number, read, **PLACES)
            for batch in batches:
                assert wrong_rows(numbers, batch) == 0  # waits: a read that has begun goes on
                pair.here.batched_free(batch)
            batch = None
            assert until(lambda: not pair.reader.stats().reads_in_flight)
            assert until(lambda: is_empty(pair.here))
            assert pair.num_leases >= 1
        struck += was_struck
        if not was_struck:
            break
        number += 1
    assert struck > 20
    lease.release()


@pytest.mark.parametrize("inner", ["by a lease", "by keys"])
@pytest.mark.parametrize("name", ["one block by a lease", "by keys"])
def test_another_read_at_any_place(pair: Pair, name: str, inner: str) -> None:
    """A finalizer or a handler that reads, and waits, itself."""
    numbers, is_leased = READS[name]
    other, lease = pair.lease([9]), pair.lease(numbers)
    wanted: Any = lease if is_leased else keys_of(numbers)
    wanted_inside: Any = other if inner == "by a lease" else keys_of([9])
    outcomes: Counter[str] = Counter()
    number = 0

    def read() -> None:
        batches.append(pair.peer.read(wanted, into=pair.here))
        batches[-1].transfer.result()

    def inside() -> None:
        batches.insert(0, pair.peer.read(wanted_inside, into=pair.here))
        try:
            batches[0].transfer.result()
            outcomes["waited"] += 1
        except NestedWaitError:
            outcomes["refused"] += 1

    while True:
        batches: list[Any] = []
        with no_deadlock():
            was_struck = Foreign(number, inside, **PLACES).strikes(read)
            if was_struck:
                assert wrong_rows([9], batches[0]) == 0
            assert wrong_rows(numbers, batches[-1]) == 0
            for batch in batches:
                pair.here.batched_free(batch)
        if not was_struck:
            break
        number += 2
    assert outcomes["waited"] > 10
    assert bool(outcomes["refused"]) == (inner == "by keys")
    for each in (other, lease):
        each.release()


def test_a_read_cannot_be_waited_for_in_its_own_middle(pair: Pair) -> None:
    """Of the thread that looks at it, and is interrupted there: it says so, and nothing is lost."""
    lease = pair.lease([5])
    target = fill(pair.here, [0])
    outcomes: set[str] = set()
    number = 0

    def inside() -> None:
        transfer = target.transfer
        if transfer is None or transfer is before[-1]:
            outcomes.add("not begun")
            return
        try:
            transfer.result()
            outcomes.add("waited")
        except NestedWaitError:
            outcomes.add("refused")

    before: list[Any] = []
    while True:
        before.append(target.transfer)
        with no_deadlock():
            was_struck = Foreign(number, inside, **PLACES).strikes(
                lambda: pair.peer.read(lease, into=target)
            )
            target.transfer.result()
            assert wrong_rows([5], target) == 0
        if not was_struck:
            break
        number += 1
    assert outcomes == {"not begun", "waited", "refused"}
    lease.release()
    pair.here.batched_free(target)


def test_a_handler_may_wait_for_the_read_that_is_waited_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes first ends it, and the other does not ask NIXL for a request that is gone."""
    agent = pair.reader._reader._agent
    state, post, release = agent.state, agent.post, agent.release
    looks: Counter[int] = Counter()
    gone: set[int] = set()
    wrong: list[int] = []

    def posted(request: int) -> Any:
        gone.discard(request)
        looks[request] = 0
        post(request)
        return "running", None

    def asked(request: int) -> Any:
        if request in gone:  # NIXL would read memory that it has freed
            wrong.append(number)
            return "done", None
        looks[request] += 1
        return ("running", None) if looks[request] < 4 else state(request)

    def released(request: int) -> None:
        gone.add(request)
        release(request)

    for name, function in (("post", posted), ("state", asked), ("release", released)):
        monkeypatch.setattr(agent, name, function)
    monkeypatch.setattr("kvheap.remote.moves.FOLLOW_S", 0.0)  # fewer turns of the loop
    lease, target = pair.lease([5]), fill(pair.here, [0])
    outcomes: set[str] = set()
    number = 0

    def inside() -> None:
        try:
            target.transfer.result()
            outcomes.add("waited")
        except NestedWaitError:
            outcomes.add("refused")

    while True:
        pair.peer.read(lease, into=target)
        with no_deadlock():
            was_struck = Foreign(number, inside, **PLACES).strikes(target.transfer.result)
        assert wrong_rows([5], target) == 0
        if not was_struck:
            break
        number += 1
    assert not wrong
    assert outcomes == {"waited", "refused"}
    lease.release()
    pair.here.batched_free(target)


ASKING = {
    "modules": ("kvheap.remote.ask", "kvheap.remote.peer", "kvheap.remote.turn")
    + ("kvheap.remote.line", "kvheap.remote.frames", "kvheap.remote.messages"),
    "but_not_inside": ("threading",),
}


@pytest.mark.parametrize("name", ["lookup", "lease"])
def test_a_question_that_is_interrupted_holds_up_no_other(pair: Pair, name: str) -> None:
    def ask() -> None:
        if name == "lookup":
            pair.peer.lookup(keys_of([1]))
        else:
            pair.lease([1], 0.5).release()  # one whose answer is lost ends by itself

    number = 0
    while True:
        with no_deadlock():
            was_struck = interrupts(number, ask, **ASKING)
            assert pair.peer.lookup(keys_of([1, 999]), 3).tolist() == [True, False]
        if not was_struck:
            break
        number += 1
    assert number > 20


def test_a_question_in_the_middle_of_another_is_refused_or_answered(pair: Pair) -> None:
    outcomes: set[str] = set()

    def inside() -> None:
        try:
            assert pair.peer.lookup(keys_of([1, 999]), 3).tolist() == [True, False]
            outcomes.add("answered")
        except NestedWaitError:
            outcomes.add("refused")

    number = 0
    while True:
        with no_deadlock():
            foreign = Foreign(number, inside, **ASKING)
            was_struck = foreign.strikes(lambda: pair.peer.lookup(keys_of([2]), 3))
        if not was_struck:
            break
        number += 1
    assert outcomes == {"answered", "refused"}
