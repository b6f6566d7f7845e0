"""Leases in the wrong hands, or at a bad moment: liars, copies, interrupts, ends of their nodes.

Whatever happens, a lease is given back once, by whoever has it, and no read is posted that nobody
follows.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from foreign_code import Foreign, interrupts, no_deadlock
from remote_nodes import fill, key_of, keys_of, make_heap, need_nixl, until, wrong_rows
from remote_pairs import Pair

from kvheap import ClosedError, LifetimeError, TransferError

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.device.host_queue import NestedWaitError
    from kvheap.remote import Node
    from kvheap.remote.deadlines import Deadline
    from kvheap.remote.handshake import call, channel_key
    from kvheap.remote.messages import packed

PLACES = {
    "modules": ("kvheap.remote", "kvheap.claims"),
    "but_not_inside": ("logging", "threading"),
}

IN_READS = {
    "modules": ("kvheap.remote.peer", "kvheap.remote.reader"),
    "but_not_inside": ("logging", "threading"),
}


@pytest.fixture
def own() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def has_all_back(pair: Pair) -> bool:
    """Whether the owner gets its leases back long before they expire."""
    return bool(until(lambda: not pair.num_leases, 2))


class Busy:
    """Keeps the thread that reads from whatever it is told, as a large read does."""

    def __init__(self, node: Any) -> None:
        self._go_on = threading.Event()
        node._reader.submit(lambda: self._go_on.wait(20) and None)

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on.set()


def strike() -> None:
    raise KeyboardInterrupt


class TestLiars:
    def test_a_client_cannot_give_back_what_others_have(self, own: Pair) -> None:
        """Else the blocks would be used again while they are read."""
        leases = [own.lease([number]) for number in range(4)]
        host, _, port = own.owner.address.rpartition(":")
        line, _ = call((host, int(port)), channel_key(None), "liar", 5)
        line.send(packed(kind="lease", number=1, ttl=20.0, keys=[key_of(9)]), Deadline(5))
        line.receive(Deadline(5))
        for number in range(64):
            line.send(packed(kind="unlock", lease=number), Deadline(5))
        line.send(packed(kind="lookup", number=2, keys=[key_of(9)]), Deadline(5))
        line.receive(Deadline(5))  # all of that was served
        assert own.num_leases == 5
        line.close()
        for lease in leases:
            lease.release()
        assert until(lambda: own.num_leases == 1, 5)
        for number in [*own.owner._lent._leases]:
            own.owner._lent.take_back(number)


class TestCopies:
    @pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_there_is_one_lease(self, own: Pair, how: Any) -> None:
        """A copy that is dropped would release it."""
        with own.lease([1]) as lease:
            with pytest.raises(TypeError, match=r"PeerLease\(held, 1 of 1.*cannot be copied"):
                how(lease)
            assert lease.state == "held"


class TestInterrupts:
    def test_a_lease_whose_finalizer_is_interrupted_is_given_back(
        self, own: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The interpreter ignores what a finalizer raises, and does not call it again."""
        monkeypatch.setattr(sys, "unraisablehook", lambda what: None)  # pytest's keeps the lease
        number = 0
        while True:
            leases = [own.lease([1])]
            foreign = Foreign(number, strike, **PLACES)
            foreign.strikes(leases.clear)
            assert has_all_back(own), number
            if foreign.left >= 0:
                break
            number += 1
        assert number > 5

    @pytest.mark.parametrize("again", ["dropped", "released"])
    def test_a_release_that_is_interrupted_can_be_repeated(self, own: Pair, again: str) -> None:
        number = 0
        while True:
            lease = own.lease([1])
            was_struck = interrupts(number, lease.release, **PLACES)
            if again == "released":
                lease.release()
            kept = lease if again == "released" else None
            del lease
            assert has_all_back(own), number
            assert until(lambda: not own.peer.link.holds, 2)
            del kept
            if not was_struck:
                break
            number += 1
        assert number > 5

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets
    def test_a_lease_that_nobody_got_is_known_to_nobody(self, own: Pair) -> None:
        number = 0
        while interrupts(number, lambda: own.lease([1], 0.05), **PLACES):
            number += 1
        assert number > 50
        assert has_all_back(own)
        assert until(lambda: not own.peer.link.holds, 2)

    @pytest.mark.parametrize("is_leased", [True, False], ids=["by a lease", "by keys"])
    def test_a_read_that_is_interrupted_leaves_nothing(self, own: Pair, is_leased: bool) -> None:
        lease = own.lease([5], 50)
        number = 0

        def read() -> None:
            wanted: Any = lease if is_leased else keys_of([5])
            batch = own.peer.read(wanted, into=own.here, timeout_s=3)
            batches.append(batch)
            batch.transfer.result()

        while True:
            batches: list[Any] = []
            with no_deadlock():
                was_struck = interrupts(number, read, **PLACES)
            for batch in batches:
                assert wrong_rows([5], batch) == 0
                own.here.batched_free(batch)
            batch = None
            assert until(lambda: not own.reader._reader._open, 5), number
            assert lease.hold is not None
            assert until(lambda: not lease.hold._reads, 5), number
            if not was_struck:
                break
            number += 1
        assert number > 20
        lease.release()
        assert until(lambda: not own.peer.link.holds, 2)


class LateError(TimeoutError):
    """The usual time limit: a handler of SIGALRM raises it. An ``OSError``, as of a socket."""


class LostError(ConnectionError):
    """Another ``OSError``."""


class OwnError(Exception):
    """Any other."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets
@pytest.mark.parametrize("error", [LateError, LostError, OwnError])
@pytest.mark.parametrize("name", ["read", "read by keys", "lookup", "lease", "release", "connect"])
def test_what_a_signal_handler_raises_is_told_as_it_is(
    own: Pair, name: str, error: type[Exception]
) -> None:
    """Neither swallowed, nor taken for an error of the network, of the peer, or of the read."""
    lease = own.lease([5], 50)
    leases: list[Any] = []
    batches: list[Any] = []

    def read(wanted: Any) -> None:
        batches.append(own.peer.read(wanted, into=own.here, timeout_s=1))
        batches[-1].transfer.result()

    calls = {
        "read": lambda: read(lease),
        "read by keys": lambda: read(keys_of([5])),
        "lookup": lambda: own.peer.lookup(keys_of([5])),
        "lease": lambda: own.lease([5], 0.05),
        "release": lambda: leases[-1].release(),
        "connect": lambda: own.reader.connect(own.owner.address),
    }

    def strike() -> None:
        raise error

    number = 0
    was_struck = True
    while was_struck:
        if name == "release":
            leases.append(own.lease([6], 0.1))
        foreign = Foreign(number, strike, **PLACES)
        outcome: Any = None
        with no_deadlock():
            try:
                foreign.strikes(calls[name])
            except BaseException as raised:
                outcome = raised
        was_struck = foreign.left < 0
        assert (type(outcome) is error) == was_struck, (number, outcome)
        while batches:
            batch = batches.pop()
            assert wrong_rows([5], batch) == 0
            own.here.batched_free(batch)
        number += 1
    assert number > 9
    lease.release()


class TestClosing:
    def test_a_closed_peer_refuses_everything_at_once(self, own: Pair) -> None:
        batch, lease = fill(own.here, [0]), own.lease([1])
        with Busy(own.reader):  # which does not know that yet
            own.peer.close()
            for ask in (
                lambda: own.peer.lookup(keys_of([1])),
                lambda: own.peer.lease(keys_of([1])),
                lambda: own.peer.offer(keys_of([1])),
                lambda: own.peer.read(keys_of([1]), into=own.here),
                lambda: own.peer.read(keys_of([1]), into=batch),
            ):
                with pytest.raises(ClosedError, match=r"Peer\('owner'.*was closed: connect again"):
                    ask()
            assert lease.state == "released"
            assert own.here.stats().allocated_bytes == batch.allocated_bytes
        assert batch.transfer is None
        assert has_all_back(own)

    @pytest.mark.parametrize("is_leased", [True, False], ids=["by a lease", "by keys"])
    def test_a_peer_closed_in_the_middle_of_a_read_leaves_no_connection(
        self, own: Pair, is_leased: bool
    ) -> None:
        """At any place: what was begun ends, and the owner has everything back long before ttl."""
        number = 0
        was_struck = True
        while was_struck:
            peer = own.reader.connect(own.owner.address)
            lease = peer.lease(keys_of([5]), 20)
            was_struck = self._is_closed_in(number, peer, lease if is_leased else [key_of(5)], own)
            peer.close()
            assert has_all_back(own), number
            assert until(lambda: own.owner.stats().num_clients == 0, 2), number
            assert until(lambda: own.here.stats().allocated_bytes == 0, 5), number
            number += 1
        assert number > 20

    def _is_closed_in(self, number: int, peer: Any, wanted: Any, own: Pair) -> bool:
        def close() -> None:
            peer.close()
            if not own.reader._reader._turn.is_here:  # which the thread that does it waits for
                own.reader._reader.ask(lambda: None)

        batches: list[Any] = []
        foreign = Foreign(number, close, **IN_READS)
        with no_deadlock(), suppress(ClosedError, LifetimeError):
            foreign.strikes(lambda: batches.append(peer.read(wanted, own.here, 20)))
        for batch in batches:
            with suppress(TransferError):
                batch.transfer.result()
                assert wrong_rows([5], batch) == 0
            own.here.batched_free(batch)
        return foreign.left < 0

    def test_who_connects_after_a_close_gets_a_peer_that_is_open(self, own: Pair) -> None:
        def again() -> None:
            found.append(own.reader.connect(own.owner.address))

        found: list[Any] = []
        with Busy(own.reader):
            own.peer.close()
            thread = threading.Thread(target=again)
            thread.start()
            until(lambda: found, 0.3)
        thread.join(20)
        assert found[0] is not own.peer
        lease = found[0].lease(keys_of([1]))
        assert wrong_rows([1], found[0].read(lease, into=own.here)) == 0

    def test_closing_again_leaves_a_successor_with_the_same_connection_alone(
        self, own: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        agent = own.reader._reader._agent
        with monkeypatch.context() as slow:  # a read is in flight when the first is closed
            post = agent.post
            slow.setattr(agent, "post", lambda request: (post(request), ("running", None))[1])
            slow.setattr(agent, "state", lambda request: ("running", None))
            begun = own.peer.read(own.lease([5]), into=own.here)
            first = own.peer
            first.close()
            second = own.reader.connect(own.owner.address)
            assert second.link is first.link
            lease = second.lease(keys_of([1]))
            first.close()
            own.reader._reader.ask(lambda: None)  # that is done
        assert lease.state == "held"
        assert wrong_rows([1], second.read(lease, into=own.here)) == 0
        assert wrong_rows([5], begun) == 0
        second.close()
        assert has_all_back(own)

    def test_threads_that_connect_at_once_get_the_same_peer(self, own: Pair) -> None:
        own.peer.close()
        found: list[Any] = []
        gate = threading.Barrier(4)

        def connect() -> None:
            gate.wait()
            found.append(own.reader.connect(own.owner.address))

        threads = [threading.Thread(target=connect) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len({*map(id, found)}) == 1
        lease = found[0].lease(keys_of([1]))
        assert wrong_rows([1], found[0].read(lease, into=own.here)) == 0
        found[0].close()
        assert until(lambda: own.owner.stats().num_clients == 0, 5)

    @pytest.mark.parametrize("is_leased", [True, False], ids=["by a lease", "by keys"])
    @pytest.mark.parametrize("count", [1, 128], ids=["small", "large"])
    def test_a_node_closed_by_another_thread_in_the_middle_of_a_read(
        self, monkeypatch: pytest.MonkeyPatch, is_leased: bool, count: int
    ) -> None:
        """At any place: the read is refused, or ends before NIXL does."""
        outcomes: list[str] = []
        number = 0
        while self._is_closed_by_another(monkeypatch, number, range(count), is_leased, outcomes):
            number += 3
        assert outcomes.count("refused") > 3
        assert outcomes.count("read") > 3

    def _is_closed_by_another(
        self,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        numbers: range,
        is_leased: bool,
        outcomes: list[str],
    ) -> bool:
        own = Pair(256)
        lease = own.lease(numbers)
        agent = own.reader._reader._agent
        post = agent.post
        is_late: list[bool] = []
        threads: list[threading.Thread] = []
        batches: list[Any] = []

        def watched(request: int) -> Any:
            is_late.append(agent._agent is None)
            return post(request)

        def close() -> None:
            thread = threading.Thread(target=lambda: own.reader.close(20))
            threads.append(thread)
            thread.start()
            thread.join(0.05)  # it has ended, or waits for the read

        monkeypatch.setattr(agent, "post", watched)
        wanted: Any = lease if is_leased else keys_of(numbers)
        foreign = Foreign(number, close, **IN_READS)
        with no_deadlock():
            try:
                foreign.strikes(lambda: batches.append(own.peer.read(wanted, own.here)))
            except ClosedError:
                outcomes.append("refused")
            for batch in batches:
                outcomes.append("read")
                assert wrong_rows(numbers, batch) == 0
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not any(is_late), number
        if not threads:
            own.reader.close(20)
        assert has_all_back(own), number
        if batches:
            own.here.batched_free(batches.pop())
        batch = None
        assert until(lambda: own.here.stats().allocated_bytes == 0, 5)
        assert until(lambda: own.here.stats().pending_bytes == 0, 5)
        own.close()
        return bool(threads)

    @pytest.mark.parametrize("is_leased", [True, False], ids=["by a lease", "by keys"])
    def test_a_node_closed_by_foreign_code_in_the_middle_of_a_read(self, is_leased: bool) -> None:
        """It cannot wait for the code below it; that goes on, and a later close ends the node."""
        outcomes: set[str] = set()
        number = 0
        while self._is_closed_by_foreign_code(number, is_leased, outcomes):
            number += 3
        assert outcomes == {"closed", "refused"}

    def _is_closed_by_foreign_code(self, number: int, is_leased: bool, outcomes: set[str]) -> bool:
        own = Pair(256)
        lease = own.lease([5])
        batches: list[Any] = []

        def close() -> None:
            try:
                own.reader.close(20)
                outcomes.add("closed")
            except NestedWaitError:
                outcomes.add("refused")

        wanted: Any = lease if is_leased else keys_of([5])
        foreign = Foreign(number, close, **IN_READS)
        with no_deadlock(10):
            with suppress(ClosedError):
                foreign.strikes(lambda: batches.append(own.peer.read(wanted, own.here)))
            for batch in batches:
                assert wrong_rows([5], batch) == 0
        own.reader.close(20)
        assert has_all_back(own), number
        own.close()
        return foreign.left < 0


@pytest.mark.parametrize("is_leased", [True, False], ids=["by a lease", "by keys"])
@pytest.mark.parametrize("what", ["connect", "assume_gone"])
def test_foreign_code_that_needs_the_thread_that_reads(
    own: Pair, what: str, is_leased: bool
) -> None:
    """In the middle of a read, which that thread waits for, it is refused; elsewhere it waits."""
    other = Node("other", make_heap(8))
    lease = own.lease([5])
    outcomes: set[str] = set()
    batches: list[Any] = []

    def inside() -> None:
        try:
            if what == "connect":
                own.reader.connect(other.address).close()
            else:
                second.assume_gone()
            outcomes.add("done")
        except NestedWaitError:
            outcomes.add("refused")

    number = 0
    was_struck = True
    while was_struck:
        second: Any = own.reader.connect(other.address) if what == "assume_gone" else None
        foreign = Foreign(number, inside, **IN_READS)
        wanted: Any = lease if is_leased else keys_of([5])
        with no_deadlock(10):
            foreign.strikes(lambda wanted=wanted: batches.append(own.peer.read(wanted, own.here)))
            batch = batches.pop()
            assert wrong_rows([5], batch) == 0
        own.here.batched_free(batch)
        if second is not None:
            second.close()
        was_struck = foreign.left < 0
        number += 1
    assert outcomes == {"done", "refused"}
    lease.release()
    other.close(10)


def test_a_second_node_of_the_process_is_another_reader(own: Pair) -> None:
    other = Node("other", make_heap(8))
    peer = other.connect(own.owner.address)
    with own.lease([1]) as lease, pytest.raises(ValueError, match="keys must be a lease of"):
        peer.read(lease, into=other.heap)
    other.close(10)
