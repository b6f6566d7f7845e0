"""Leases that are taken before the reads: what they hold, how they are given back, and refusals."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from foreign_code import interrupts
from forked_child import in_a_child
from remote_nodes import LAYOUT, fill, key_of, keys_of, make_heap, need_nixl, until, wrong_rows
from remote_pairs import Pair, failure

from kvheap import BlockInUseError, BlockLayout, BlockRuns, ClosedError, LifetimeError

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import (
        MissingKeysError,
        Node,
        PeerError,
        PeerGoneError,
        PeerLease,
        ProtocolError,
        StaleReadError,
        leases,
        service,
    )
    from kvheap.remote.deadlines import Deadline, now_s
    from kvheap.remote.handshake import call, channel_key
    from kvheap.remote.messages import packed
    from kvheap.remote.peer_lease import Hold
    from kvheap.remote.reads import ReadEvent
    from kvheap.remote.turn import Turn, Visit


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    """Nothing is left behind of what a test leases and reads."""
    before = shared.here.stats().allocated_bytes
    yield shared
    shared.require_idle()
    assert shared.here.stats().allocated_bytes == before


@pytest.fixture
def own() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


class TestReads:
    @pytest.mark.parametrize(
        "numbers",
        [[5], range(128), range(127, -1, -1), [3, 3, 9, 3], [*range(0, 128, 2), *range(1, 128, 2)]],
        ids=["one", "all", "reversed", "twice", "strided"],
    )
    def test_chunks_arrive_in_the_order_of_the_keys_again_and_again(
        self, pair: Pair, numbers: Any
    ) -> None:
        with pair.lease(numbers) as lease:
            assert lease.found.all()
            assert lease.found.dtype == np.bool_
            assert lease.keys == tuple(keys_of(numbers))
            assert (len(lease), lease.state) == (len(numbers), "held")
            assert 0 < lease.left_s <= 20
            locks = pair.owner.stats().locks
            batch = pair.peer.read(lease, into=pair.here)
            assert wrong_rows(numbers, batch) == 0
            pair.here.buffer.zero_()
            assert pair.peer.read(lease, into=batch) is batch
            assert wrong_rows(numbers, batch) == 0
            assert pair.owner.stats().locks == locks  # nobody was asked
            assert pair.num_leases == 1
            pair.here.batched_free(batch)
        assert (lease.state, lease.left_s) == ("released", 0.0)

    def test_what_is_not_there_is_told_and_not_read(self, pair: Pair) -> None:
        with pair.lease([1, 900, 2, 901, 3]) as lease:
            assert lease.found.tolist() == [True, False, True, False, True]
            assert lease.keys == tuple(keys_of([1, 2, 3]))
            assert "3 of 5 chunks of peer 'owner'" in repr(lease)
            batch = pair.peer.read(lease, into=pair.here)
            assert wrong_rows([1, 2, 3], batch) == 0
            pair.here.batched_free(batch)

    def test_a_lease_on_nothing(self, pair: Pair) -> None:
        lease = pair.lease([900, 901])
        assert not lease.found.any()
        assert (len(lease), lease.state, lease.release()) == (0, "released", False)
        with pytest.raises(ValueError, match="holds no chunks: none of them was found"):
            pair.peer.read(lease, into=pair.here)

    def test_two_threads_read_by_one_lease(self, pair: Pair) -> None:
        def some(_: int) -> int:
            wrong = 0
            for _ in range(20):
                batch = pair.peer.read(lease, into=pair.here)
                wrong += wrong_rows(range(16), batch)
                pair.here.batched_free(batch)
            return wrong

        with pair.lease(range(16)) as lease, ThreadPoolExecutor(2) as pool:
            assert [*pool.map(some, range(2))] == [0, 0]

    def test_small_and_large_reads_at_once(self, own: Pair) -> None:
        big = own.there.batched_allocate([2048], torch.int64, 300, LAYOUT.fmt)
        own.owner.publish(keys_of(range(1000, 1300)), big)
        target = own.here.batched_allocate([2048], torch.int64, 300, LAYOUT.fmt)
        large, small = own.lease(range(1000, 1300)), own.lease([7])
        for _ in range(20):
            own.peer.read(large, into=target)
            beside = own.peer.read(small, into=own.here)
            assert wrong_rows([7], beside) == 0
            target.transfer.result(20)
            own.here.batched_free(beside)

    def test_blocks_may_be_freed_at_once(self, pair: Pair) -> None:
        with pair.lease(range(128)) as lease:
            for _ in range(50):
                batch = pair.peer.read(lease, into=pair.here)
                if batch is not None:  # else those before are still being filled
                    pair.here.batched_free(batch)
        assert until(lambda: pair.here.stats().pending_bytes == 0)

    def test_a_full_heap_reads_nothing(self, own: Pair) -> None:
        rest = own.here.batched_allocate([2048], torch.int64, 510, LAYOUT.fmt)
        with own.lease(range(3)) as lease:
            assert own.peer.read(lease, into=own.here) is None
        assert rest is not None

    def test_padded_blocks(self, own: Pair) -> None:
        kv = torch.randn(6, 1000)
        padded = own.there.batched_allocate([1000], torch.float32, 6, source=kv)
        own.owner.publish(keys_of(range(500, 506)), padded)
        batch = own.peer.read(own.lease(range(500, 506)), into=own.here)
        assert all(torch.equal(block.tensor, row) for block, row in zip(batch, kv, strict=True))
        one = own.peer.read(own.lease([503]), into=own.here)
        assert torch.equal(one[0].tensor, kv[3])

    @pytest.mark.parametrize("count", [1, 128], ids=["small", "large"])
    def test_one_that_has_begun_is_not_withdrawn(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch, count: int
    ) -> None:
        """Its caller, who is interrupted then, must not take its blocks for free."""
        reads: list[Any] = []
        begin = pair.reader._reader.begin_held
        monkeypatch.setattr(
            pair.reader._reader,
            "begin_held",
            lambda link, read: (reads.append(read), begin(link, read)),
        )
        with pair.lease(range(count)) as lease:
            batch = pair.peer.read(lease, into=pair.here)
            batch.transfer.result()
            assert not reads[0].withdraw()
            pair.here.batched_free(batch)


class TestUnderWay:
    """A small read that NIXL has not moved when it was posted, as over TCP."""

    @pytest.fixture
    def read(self, own: Pair, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Begins one, and the tasks that the reader's thread was woken up for."""
        agent, reader = own.reader._reader._agent, own.reader._reader
        post, tasks = agent.post, []
        submit = reader.submit

        def read() -> tuple[Any, list[Any]]:
            with own.lease(range(4)) as lease, monkeypatch.context() as patch:
                patch.setattr(agent, "post", lambda request: (post(request), ("running", None))[1])
                patch.setattr(reader, "submit", lambda task: (tasks.append(task), submit(task)))
                batch = own.peer.read(lease, into=own.here)
                return batch, [*tasks]

        return read

    def test_nobody_is_woken_up_and_whoever_asks_looks(
        self, own: Pair, monkeypatch: pytest.MonkeyPatch, read: Any
    ) -> None:
        ended: list[int] = []
        end = ReadEvent.end
        monkeypatch.setattr(
            ReadEvent, "end", lambda event: (ended.append(threading.get_ident()), end(event))
        )
        me, asked = threading.get_ident(), 0
        for _ in range(20):  # now and then the reader looks by itself
            batch, tasks = read()
            assert not tasks
            assert until(batch.transfer.done, 5)
            asked += ended[-1] == me
            assert wrong_rows(range(4), batch) == 0
            own.here.batched_free(batch)
        assert asked

    def test_the_reader_finds_one_that_nobody_asks_for(self, own: Pair, read: Any) -> None:
        read()
        assert until(own.is_idle, 5)
        assert not own.here.leaks()


class TestHolding:
    def test_leased_blocks_stay_until_the_release(self, own: Pair) -> None:
        lease = own.lease(range(4))
        with pytest.raises(BlockInUseError):
            own.there.batched_free(own.batch)
        own.owner.withdraw(keys_of(range(128)))  # evicted from the books, but leased
        assert not own.peer.lookup(keys_of(range(4))).any()
        batch = own.peer.read(lease, into=own.here)
        assert wrong_rows(range(4), batch) == 0
        assert lease.release()
        assert not lease.release()
        assert until(lambda: own.num_leases == 0)
        own.there.batched_free(own.batch)

    @pytest.mark.parametrize("how", ["released", "dropped", "in a circle", "on another thread"])
    def test_a_lease_that_is_not_needed_is_given_back_soon(self, pair: Pair, how: str) -> None:
        lease = pair.lease(range(4))
        assert pair.num_leases == 1
        if how == "released":
            assert lease.release()
        elif how == "in a circle":
            circle = [lease]
            circle.append(circle)  # type: ignore[arg-type]
            del circle
        elif how == "on another thread":
            box = [lease]
            thread = threading.Thread(target=box.clear)
            del lease
            thread.start()
            thread.join()
        lease = None
        gc.collect()
        assert until(lambda: pair.num_leases == 0, 5)

    def test_a_lease_dropped_at_once_stays_for_its_read(self, pair: Pair) -> None:
        for _ in range(20):
            batch = pair.peer.read(pair.lease(range(128)), into=pair.here)
            assert wrong_rows(range(128), batch) == 0
            pair.here.batched_free(batch)

    def test_it_is_given_back_only_after_its_reads(self) -> None:
        order: list[Any] = []
        runs = BlockRuns(np.array([4096]), np.array([1]), 4096, 4096)
        layout = BlockLayout.of([1024], torch.float32, LAYOUT.fmt)
        hold = Hold(None, None, "x", 7, Deadline(20), runs, layout, order.append)
        hold.begin("one", now_s())
        hold.begin("two", now_s())
        hold.release()
        hold.end("one")
        assert not order
        with pytest.raises(LifetimeError, match="'x' was released"):
            hold.begin("three", now_s())
        assert not order
        hold.end("two")
        hold.end("two")
        hold.release()
        assert order == [hold]

    def test_one_that_has_expired_is_refused(self, pair: Pair) -> None:
        lease = pair.lease(range(4), 0.1)
        assert until(lambda: lease.state == "expired")
        assert lease.left_s == 0.0
        with pytest.raises(StaleReadError, match=r"lease of 0.1 s.*'owner' has expired"):
            pair.peer.read(lease, into=pair.here)
        batch = pair.here.batched_allocate([2048], torch.int64, 4, LAYOUT.fmt)
        with pytest.raises(StaleReadError):
            pair.peer.read(lease, into=batch)
        assert batch.transfer is None
        pair.here.batched_free(batch)
        assert not lease.release()

    def test_the_owner_has_the_last_word_on_its_length(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service, "MAX_LEASE_S", 0.2)
        lease = pair.lease(range(4), 1e9)
        assert lease.left_s <= 0.2
        assert until(lambda: pair.num_leases == 0, 5)  # it ends there, whatever is done here
        assert lease.state == "expired"

    def test_it_is_over_here_before_it_is_over_there(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Counted from before the question, however long the answer takes."""
        answer = pair.peer._ask.ask

        def slow(*arguments: Any, **fields: Any) -> Any:
            found = answer(*arguments, **fields)
            time.sleep(0.3)
            return found

        monkeypatch.setattr(pair.peer._ask, "ask", slow)
        asked = now_s()
        lease = pair.lease([1], 5.0)
        assert lease.left_s <= 5.0 - (now_s() - asked) + 1e-3

    def test_too_many_of_one_connection(self, own: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, number in [("FEW_LEASES", 0), ("MAX_LEASES_EACH", 3), ("MAX_BLOCKS_EACH", 20)]:
            monkeypatch.setattr(leases, name, number)
        held = [own.lease(range(8)), own.lease(range(8), 0.2)]
        with pytest.raises(PeerError, match="leases on 16 blocks, and asks for 8, at most 20"):
            own.lease(range(8))
        held.append(own.lease([1]))
        with pytest.raises(PeerError, match="holds 3 leases, at most 3"):
            own.lease([1])
        second = Node("second", make_heap(8))
        others = second.connect(own.owner.address).lease([key_of(1)])  # they have their own
        assert len(others) == 1
        time.sleep(0.2)  # the second has expired
        assert len(own.lease([2])) == 1
        for each in (*held, others):
            each.release()
        second.close(10)


class TestEnds:
    def test_a_released_one_is_refused(self, pair: Pair) -> None:
        lease = pair.lease(range(4))
        lease.release()
        with pytest.raises(LifetimeError, match="'owner' was released"):
            pair.peer.read(lease, into=pair.here)

    def test_closing_the_peer_gives_its_leases_back(self, own: Pair) -> None:
        lease = own.lease(range(4))
        own.peer.close()
        assert until(lambda: own.num_leases == 0, 5)
        with pytest.raises(LifetimeError):
            own.peer.read(lease, into=own.here)
        with pytest.raises(ClosedError, match=r"'owner'.*was closed"):
            own.lease([1])
        assert until(lambda: own.num_leases == 0, 5)
        assert not own.here.leaks()
        again = own.reader.connect(own.owner.address)
        batch = again.read(again.lease(keys_of(range(4))), into=own.here)
        assert wrong_rows(range(4), batch) == 0

    def test_a_lease_of_a_peer_that_was_declared_gone_harms_no_later_one(self, own: Pair) -> None:
        lease = own.lease(range(4), 1.0)
        own.peer.assume_gone()
        with pytest.raises(PeerGoneError):
            own.peer.read(lease, into=own.here)
        again = own.reader.connect(own.owner.address)  # it was wrong: the same life
        lease.release()
        own.reader._reader.ask(lambda: None)  # that has been done
        batch = again.read(again.lease(keys_of(range(4))), into=own.here)
        assert wrong_rows(range(4), batch) == 0

    def test_closing_the_node_gives_its_leases_back(self, own: Pair) -> None:
        lease = own.lease(range(4))
        own.reader.close(10)
        assert until(lambda: own.num_leases == 0, 5)
        for call in (lambda: own.peer.read(lease, into=own.here), lambda: own.lease([1])):
            with pytest.raises(ClosedError, match=r"'reader'.*is closed"):
                call()
        assert lease.state == "released"

    def test_one_dropped_after_its_node_was_closed_writes_nowhere(self, own: Pair) -> None:
        """The descriptors that were the node's may be others' by then."""
        lease = own.lease(range(4))
        hold = lease.hold
        own.reader.close(10)
        pipes = [os.pipe() for _ in range(20)]  # take the numbers that have become free
        for inside, _ in pipes:
            os.set_blocking(inside, False)
        own.reader._reader.give_back(own.peer.link, hold)
        own.peer.close()
        for inside, outside in pipes:
            with pytest.raises(BlockingIOError):
                os.read(inside, 1)
            os.close(inside)
            os.close(outside)

    def test_an_owner_that_closes_waits_for_leases(self, own: Pair) -> None:
        lease = own.lease(range(4))
        with pytest.raises(TimeoutError, match="hold 1 leases"):
            own.owner.close(0.05)
        batch = own.peer.read(lease, into=own.here)  # nobody needs to answer for that
        assert wrong_rows(range(4), batch) == 0
        with pytest.raises(PeerGoneError, match="closing"):
            own.lease([1])
        lease.release()
        own.owner.close(10)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    def test_a_forked_child_neither_uses_nor_ends_it(self, own: Pair) -> None:
        lease = own.lease(range(4))

        def child() -> bool:
            with pytest.raises(ClosedError, match="belongs to process"):
                own.peer.read(lease, into=own.here)
            with pytest.raises(ClosedError, match="belongs to process"):
                own.lease([1])
            with pytest.raises(ClosedError, match="belongs to process"):
                lease.release()
            lease.__del__()
            return True

        assert in_a_child(child)
        time.sleep(0.2)
        assert own.num_leases == 1
        batch = own.peer.read(lease, into=own.here)
        assert wrong_rows(range(4), batch) == 0

    def test_a_lost_connection_loses_no_lease(self, own: Pair) -> None:
        lease = own.lease(range(4))
        lost = own.peer.link.line
        for connection in [*own.owner._server._connections.values()]:
            connection.sock.shutdown(2)
        batch = own.peer.read(lease, into=own.here)
        assert wrong_rows(range(4), batch) == 0
        lease.release()  # told once there is a connection again
        assert until(lambda: own.num_leases == 0, 10)
        assert own.peer.link.line is not lost


class TestRefusals:
    def test_arguments(self, pair: Pair) -> None:
        for keys, error, text in [
            ([], ValueError, "at least one"),
            ("ab", TypeError, "'ab'"),
            (["a"], TypeError, "a key must be bytes, got 'a'"),
            ([b""], ValueError, "1 to 511 bytes, got 0"),
            ([b"a"] * 65_537, ValueError, "at most 65536"),
        ]:
            with pytest.raises(error, match=text):
                pair.peer.lease(keys)
        for wrong in (0, -1, float("nan"), "1", None):
            with pytest.raises((TypeError, ValueError), match="ttl_s must be"):
                pair.peer.lease([b"a"], ttl_s=wrong)
            with pytest.raises((TypeError, ValueError), match="timeout_s must be"):
                pair.peer.lease([b"a"], timeout_s=wrong)

    def test_a_lease_of_another_peer(self, own: Pair) -> None:
        other = Node("other", make_heap(8))
        other.publish([b"a"], fill(other.heap, [1]))
        peer = own.reader.connect(other.address)
        with (
            peer.lease([b"a"]) as lease,
            pytest.raises(ValueError, match=r"a lease of Peer\('owner"),
        ):
            own.peer.read(lease, into=own.here)
        assert until(lambda: other.stats().leases == 0)
        peer.close()
        other.close(10)

    def test_batches_that_do_not_fit(self, pair: Pair) -> None:
        with pair.lease(range(4)) as lease:
            other = pair.here.batched_allocate([4096], torch.int32, 4, LAYOUT.fmt)
            with pytest.raises(ValueError, match=r"into must have blocks of.*as peer 'owner' has"):
                pair.peer.read(lease, into=other)
            three = pair.here.batched_allocate([2048], torch.int64, 3, LAYOUT.fmt)
            with pytest.raises(ValueError, match="4 keys need as many blocks, got 3"):
                pair.peer.read(lease, into=three)
            with pytest.raises(ValueError, match="into must be the node's heap"):
                pair.peer.read(lease, into=pair.there)
            with pytest.raises(ValueError, match="into must be of the node's heap"):
                pair.peer.read(lease, into=pair.batch)
            for each in (other, three):
                assert each.transfer is None
                pair.here.batched_free(each)

    def test_several_layouts(self, own: Pair) -> None:
        small = own.there.batched_allocate([64], torch.float32, 1)
        own.owner.publish([b"small"], small)
        with pytest.raises(PeerError, match="several layouts"):
            own.peer.lease([b"small", key_of(1)])
        with own.peer.lease([b"small"]) as lease:
            batch = own.peer.read(lease, into=own.here)  # of that layout, whatever was read before
            assert batch.layout == small.layout
        assert own.owner.stats().leases <= 1

    def test_a_lookup_that_fails(self, own: Pair) -> None:
        there = make_heap(8)
        with Node("owner", there, lambda keys: 1 / 0) as owner:  # type: ignore[arg-type,return-value]
            peer = own.reader.connect(owner.address)
            with pytest.raises(PeerError, match="its lease failed: ZeroDivisionError"):
                peer.lease([b"a"])
            peer.close()

    @pytest.mark.parametrize(
        "fields",
        [
            {"keys": []},
            {"keys": [b"a"], "ttl": float("nan")},
            {"keys": [b"a"], "ttl": -1.0},
            {"keys": [b"a"], "ttl": 1},
            {"keys": "ab"},
            {},
        ],
        ids=str,
    )
    def test_requests_that_cannot_be(self, pair: Pair, fields: dict[str, Any]) -> None:
        before = pair.owner.stats().refused_connections
        host, _, port = pair.owner.address.rpartition(":")
        line, _ = call((host, int(port)), channel_key(None), "x", 5)
        line.send(packed(**({"kind": "lease", "number": 1, "ttl": 1.0} | fields)), Deadline(5))
        assert until(lambda: pair.owner.stats().refused_connections == before + 1)
        line.close()
        assert pair.num_leases == 0

    @pytest.mark.parametrize(
        "change",
        [
            {"found": b"\1"},
            {"found": b"\1\1\1"},
            {"layout": None},
            {"starts": bytes(8)},
            {"counts": (3).to_bytes(8, "little")},
            {"size_bytes": 8},
            {"lease": -1},
            {"ttl": 0.0},
        ],
        ids=str,
    )
    def test_answers_that_cannot_be(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
    ) -> None:
        answer = pair.peer._ask._exchange

        def changed(*arguments: Any) -> Any:
            fields = answer(*arguments)
            real.append(fields.integer("lease"))
            fields._fields.update(change)
            return fields

        real: list[int] = []
        monkeypatch.setattr(pair.peer._ask, "_exchange", changed)
        with pytest.raises(ProtocolError):
            pair.lease([1, 2])
        pair.owner._lent.take_back(real[0])


class TestLog:
    """The error is the caller's; the log has a line of it at most."""

    def test_a_read_that_fails(self, own: Pair, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "kvheap")
        batch = own.peer.read([key_of(1), key_of(999)], into=own.here)
        assert isinstance(failure(batch), MissingKeysError)
        with pytest.raises(Exception, match="does not have"):
            batch.transfer.result()
        records = [each for each in caplog.records if "failed" in each.getMessage()]
        assert len(records) == 1
        assert records[0].levelno == logging.INFO
        assert not [each for each in caplog.records if each.exc_info]
        assert "Traceback" not in caplog.text


class TestTurn:
    def test_one_thread_at_a_time_and_the_code_above_it(self) -> None:
        turn, one, above = Turn(), Visit(), Visit()
        assert turn.take(one)
        assert not turn.take(above)
        assert turn.share(above)
        turn.free.extend(above.back)  # it was only shared
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(lambda: turn.share(Visit())).result()
            assert not pool.submit(lambda: turn.take_soon(Visit())).result()
        turn.free.extend(one.back)
        turn.free.extend(one.back)
        assert turn.free == turn.free[:1]
        later = Visit()
        assert turn.share(later)
        assert later.has_turn
        assert not turn.is_free

    def test_who_waits_comes_first(self) -> None:
        turn, visit = Turn(), Visit()
        assert turn.take(visit)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: turn.wait(Visit()))
            assert until(lambda: turn.is_wanted)
            turn.free.extend(visit.back)
            assert not turn.take(Visit())
            waiting.result(5)
        assert not turn.take(Visit())

    def test_an_interrupt_at_any_place_leaves_it_free(self) -> None:
        turn, number = Turn(), 0

        def work() -> None:
            visit = Visit()
            try:
                turn.take(visit)
            finally:
                turn.free.extend(visit.back)

        while interrupts(number, work, modules=("kvheap.remote.turn",), function="work"):
            assert turn.is_free
            assert len(turn.free) == 1
            number += 1
        assert number > 5


def test_a_lease_is_what_it_is_called() -> None:
    lease = PeerLease(np.array([False]), [], None)
    assert repr(lease) == "PeerLease(released, 0 of 1 chunks)"
