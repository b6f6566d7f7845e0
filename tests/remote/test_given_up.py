"""Leases whose answer is lost on the way: they are given back, and do not stay until the end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from forked_child import in_a_child
from remote_nodes import fill, keys_of, make_heap, need_nixl, until, wrong_rows
from remote_pairs import Pair, failure

from kvheap import ClosedError, HostMemoryAllocator, TransferError

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import (
        MissingKeysError,
        Node,
        PeerError,
        PeerGoneError,
        PeerTimeoutError,
        leases,
        offers,
        reader,
    )
    from kvheap.remote.line import Line
    from kvheap.remote.messages import key_fields

SOON_S = 5.0
"""Leases are of 20 seconds and more here."""


@pytest.fixture
def own() -> Iterator[Pair]:
    pair = Pair()
    try:
        yield pair
    finally:
        pair.close()


class Gate:
    """An owner whose answers wait for a gate, and lose their connection if that is asked for."""

    def __init__(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opens = threading.Event()
        self.opens.set()
        self.cuts = 0
        """So many more answers are lost, after what was asked is done."""
        self.lent: list[str] = []
        answer = pair.owner._service.answer
        connections = pair.owner._server._connections

        def gated(request: Any, account: Any) -> Any:
            kind = request.text("kind")
            assert self.opens.wait(20)
            found = answer(request, account)
            if kind in ("lock", "lease"):
                self.lent.append(kind)
                if self.cuts:
                    self.cuts -= 1
                    (sock,) = (
                        each.sock for each in connections.values() if each.account is account
                    )
                    sock.shutdown(2)
            return found

        monkeypatch.setattr(pair.owner._service, "answer", gated)


@pytest.fixture
def gate(own: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(own, monkeypatch)
    yield found
    found.opens.set()


class TestAnswersThatAreLost:
    def test_a_lease_that_is_answered_too_late(self, own: Pair, gate: Gate) -> None:
        gate.opens.clear()
        with pytest.raises(PeerTimeoutError):
            own.peer.lease(keys_of(range(4)), 20, timeout_s=0.2)
        gate.opens.set()
        assert until(lambda: gate.lent == ["lease"], SOON_S)
        assert until(lambda: own.num_leases == 0, SOON_S)

    def test_a_lease_whose_connection_ends_before_the_answer(self, own: Pair, gate: Gate) -> None:
        gate.cuts = 1
        with own.lease(range(4)) as lease:
            assert gate.lent == ["lease", "lease"]  # asked again
            assert until(lambda: own.num_leases == 1, SOON_S)
            assert wrong_rows(range(4), own.peer.read(lease, into=own.here)) == 0
        assert until(lambda: own.num_leases == 0, SOON_S)

    @pytest.mark.parametrize("cuts", [1, 2])
    def test_a_read_whose_connection_ends_before_the_answer(
        self, own: Pair, gate: Gate, cuts: int
    ) -> None:
        gate.cuts = cuts
        batch = own.peer.read(keys_of(range(4)), into=own.here)
        assert wrong_rows(range(4), batch) == 0
        assert gate.lent == ["lock"] * (cuts + 1)
        assert until(lambda: own.num_leases == 0, SOON_S)

    def test_a_read_that_is_answered_too_late(self, own: Pair, gate: Gate) -> None:
        gate.opens.clear()
        batch = own.peer.read(keys_of(range(4)), into=own.here, timeout_s=0.2)
        assert isinstance(failure(batch), PeerTimeoutError)
        gate.opens.set()
        assert until(lambda: gate.lent == ["lock"], SOON_S)
        assert until(lambda: own.num_leases == 0, SOON_S)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_an_answer_that_is_not_taken(
        self, own: Pair, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
    ) -> None:
        def struck(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(own.peer, "_hold_of", struck)
        with pytest.raises(error):
            own.lease(range(4))
        assert until(lambda: own.num_leases == 0, SOON_S)


def test_a_peer_that_was_declared_gone_and_lives(
    own: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reads end, and connecting again gives back what it has lent."""
    agent = own.reader._reader._agent
    lease, kept = own.lease(range(4)), own.lease(range(8))
    with monkeypatch.context() as endless:
        endless.setattr(agent, "state", lambda request: ("running", None))
        endless.setattr(agent, "post", lambda request: ("running", None))
        by_lease = own.peer.read(lease, into=own.here, timeout_s=0.2)
        by_keys = own.peer.read(keys_of(range(4)), into=own.here, timeout_s=0.2)
        for batch in (by_lease, by_keys):
            assert isinstance(failure(batch), PeerTimeoutError)
            own.here.batched_free(batch)
        assert own.reader.stats().quarantined_reads == 2
        pending = own.here.stats().pending_bytes
        assert pending == own.reader.stats().quarantined_bytes > 0
        own.peer.assume_gone()
        with pytest.raises(PeerGoneError, match=r"have not ended yet: connect again in 0.5 s"):
            own.reader.connect(own.owner.address)
        assert own.here.stats().pending_bytes == pending
        assert until(lambda: not own.reader.stats().reads_in_flight, SOON_S)
        assert until(lambda: not own.here.stats().pending_bytes, SOON_S)
    assert own.num_leases == 2
    again = own.reader.connect(own.owner.address)
    assert until(lambda: own.num_leases == 0, SOON_S)
    assert until(lambda: own.owner.stats().num_clients == 2, SOON_S)  # not those of before
    with again.lease(keys_of(range(4))) as anew:
        kept.release()  # of the other life: it was given back
        assert wrong_rows(range(4), again.read(anew, into=own.here)) == 0
        assert own.num_leases == 1


class TestNumbers:
    """Requests come on several connections, and are served in any order."""

    @pytest.fixture
    def lent(self) -> Iterator[Callable[[int | None], Any]]:
        heap = make_heap(8)
        batch, books = fill(heap, range(4)), leases.LentBlocks(heap)

        def lend(number: int | None) -> Any:
            return books.lend([(batch, 1)], 20.0, number=number)

        lend.books = books  # type: ignore[attr-defined]
        yield lend
        for number in [*books._leases]:
            books.take_back(number)
        heap.batched_free(batch)
        heap.close()

    def test_one_that_was_given_up_is_not_lent_any_more(self, lent: Any) -> None:
        lent.books.give_up(7)
        with pytest.raises(RuntimeError, match="given this lease up"):
            lent(7)
        assert lent.books.num_held == 0
        assert lent(8)[0] == 8

    def test_one_that_is_lent_is_not_lent_again(self, lent: Any) -> None:
        """The reader may have the first answer, and rely on it."""
        lent(7)
        with pytest.raises(RuntimeError, match="asked for it before"):
            lent(7)
        assert lent.books.num_held == 1
        lent.books.give_up(7)
        assert lent.books.num_held == 0

    def test_one_that_was_given_up_is_no_failure_of_its_owner(self, own: Pair) -> None:
        own.owner._lent.give_up(7)
        with pytest.raises(PeerError, match="has given this lease up"):
            own.peer._answer("lease", 5.0, ttl=1.0, lease=7, **key_fields(keys_of([1])))
        assert own.num_leases == own.owner.stats().failed_requests == 0

    def test_few_are_remembered(self, lent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leases, "MAX_GIVEN_UP", 3)
        for number in range(1, 6):
            lent.books.give_up(number)
        assert len(lent.books._given_up) == 3
        with pytest.raises(RuntimeError, match="given this lease up"):
            lent(5)


def test_a_connection_that_breaks_while_reads_are_asked_for_loses_none(
    own: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several wait for a connection, and the new one breaks at the first of them."""
    link, reader = own.peer.link, own.reader._reader
    push, breaks = Line.push, threading.Event()

    def pushed(line: Line, payload: bytes = b"") -> None:
        if payload and line is link.line and breaks.is_set():
            breaks.clear()
            raise BrokenPipeError("it breaks")
        push(line, payload)

    monkeypatch.setattr(Line, "push", pushed)
    with monkeypatch.context() as nobody_looks:
        nobody_looks.setattr(reader, "_look_for", lambda link: None)
        reader.ask(lambda: reader._questions.disconnect(link))
        batches = [own.peer.read(keys_of([number]), into=own.here) for number in range(4)]
        assert until(lambda: len(link.queued) == 4, SOON_S)
        breaks.set()
    reader.ask(lambda: reader._look_for(link))
    assert until(lambda: all(batch.transfer.done() for batch in batches), SOON_S)
    for number, batch in enumerate(batches):
        assert wrong_rows([number], batch) == 0
        own.here.batched_free(batch)


def test_what_a_peer_does_not_take_is_not_piled_up() -> None:
    """Each read has 10 MB of keys to send; the peer takes nothing for a while."""
    opens, is_busy = threading.Event(), threading.Event()

    def lookup(keys: list[bytes]) -> list[None]:
        is_busy.set()
        assert opens.wait(20)
        return [None] * len(keys)

    keys = [number.to_bytes(511, "big") for number in range(20_000)]
    there, here = HostMemoryAllocator(1 << 20), HostMemoryAllocator(8 << 20, align_bytes=64)
    with Node("owner", there, lookup) as owner, Node("reader", here) as reader:
        peer = reader.connect(owner.address)
        asks = threading.Thread(target=peer.lookup, args=([b"x"], 20))
        asks.start()
        try:
            assert is_busy.wait(20)
            batches = [here.batched_allocate([64], torch.uint8, len(keys)) for _ in range(4)]
            for batch in batches:
                peer.read(keys, into=batch, timeout_s=1.0)
            assert len(peer.link.line._unsent) < 511 * 25_000
            assert until(lambda: len(peer.link.queued) == 3, 0.9)
            for batch in batches:
                assert isinstance(failure(batch), PeerTimeoutError)
        finally:
            opens.set()
            asks.join()
        batch = here.batched_allocate([64], torch.uint8, len(keys))
        peer.read(keys, into=batch)  # it takes everything now
        assert isinstance(failure(batch), MissingKeysError)
        for each in (*batches, batch):
            here.batched_free(each)
    for heap in (there, here):
        heap.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_says_that_it_releases_nothing(own: Pair) -> None:
    lease = own.lease(range(4))

    def child() -> bool:
        for call in (lease.release, lambda: lease.state, lambda: lease.left_s):
            with pytest.raises(ClosedError, match=f"belongs to process {os.getppid()}: a forked"):
                call()
        with lease:
            assert "another process's" in repr(lease)
        lease.__del__()
        return True

    assert in_a_child(child)
    assert own.num_leases == 1
    assert lease.state == "held"
    assert lease.release()
    assert until(lambda: own.num_leases == 0, SOON_S)


def test_lives_of_a_peer_that_are_over_are_not_kept(own: Pair) -> None:
    for _ in range(3):
        heap = make_heap(1)
        with Node("passing", heap) as passing:
            peer = own.reader.connect(passing.address)
        with pytest.raises(PeerGoneError):
            peer.lookup([b"x"])
        assert until(lambda peer=peer: peer.is_gone, SOON_S)
        heap.close()
    own.reader.connect(own.owner.address)
    heap = make_heap(1)
    with Node("last", heap) as last:
        own.reader.connect(last.address)
        assert len(own.reader._peers) == 2
    heap.close()


def test_offers_are_bounded_by_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "MAX_OFFERED_BYTES", 100, raising=False)
    waiting = offers.Offers()
    offer = [offers.Offer("x", "127.0.0.1:1", (bytes(30),) * 2) for _ in range(3)]
    assert waiting.put(offer[0])
    assert not waiting.put(offer[1])
    assert waiting.put(offers.Offer("x", "127.0.0.1:1", (bytes(40),)))
    assert waiting.next(1) is offer[0]
    assert waiting.put(offer[1])
    assert not waiting.put(offer[2])
    assert [len(waiting.next(1).keys) for _ in range(2)] == [1, 2]
    assert waiting.next(0) is None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_asks_nixl_nothing(own: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = own.reader._reader._agent
    with own.lease(range(4)) as lease, monkeypatch.context() as endless:
        post = agent.post
        endless.setattr(agent, "post", lambda request: (post(request), ("running", None))[1])
        endless.setattr(agent, "state", lambda request: ("running", None))
        batch = own.peer.read(lease, into=own.here)

        def child() -> bool:
            agent.state = agent.post = None
            event = batch.transfer.parts[-1]._event
            with pytest.raises(TransferError, match="forked child"):
                batch.transfer.result(5)
            return event.query() is False

        assert in_a_child(child)
    assert wrong_rows(range(4), batch) == 0


def test_a_connection_that_a_closed_node_has_made_is_closed(
    own: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look for a peer may take longer than the node lives that wants to know."""
    is_closed, found = threading.Event(), []
    look = reader.probe

    def slow(*arguments: Any) -> Any:
        found.append(look(*arguments))
        assert is_closed.wait(20)
        return found[0]

    monkeypatch.setattr(reader, "probe", slow)
    for connection in [*own.owner._server._connections.values()]:
        connection.sock.shutdown(2)
    assert until(lambda: found, SOON_S)
    assert found[0].line.fileno() >= 0
    own.reader.close(10)
    is_closed.set()
    assert until(lambda: found[0].line.fileno() < 0, SOON_S)
