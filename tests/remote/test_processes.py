"""What must hold between processes that are frozen, killed, started again and closed.

1. Only NIXL's word, or a peer that is known to be gone, ends a read.
2. What arrives after the lease is not taken for the chunk.
3. The owner's memory stays mapped until it is deregistered.
4. A killed peer is named within a second, and harms nobody else.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from remote_nodes import (
    LAYOUT,
    MANY,
    NUMBERS,
    TCP,
    NodeProcess,
    fill,
    key_of,
    keys_of,
    need_nixl,
    until,
    wrong_rows,
)

from kvheap import BlockRuns, TransferError
from kvheap.transfer.pairing import paired_runs

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import (
        MissingKeysError,
        PeerGoneError,
        PeerTimeoutError,
        StaleReadError,
    )


def begun(node: Any, peer: Any, keys: list[bytes], timeout_s: float) -> Any:
    """A batch that is being filled: NIXL has begun, and has far to go."""
    batch = peer.read(keys, into=node.heap, timeout_s=timeout_s)
    assert until(lambda: peer.link.running)
    return batch


def read_all(peer: Any, numbers: range, batch: Any) -> None:
    peer.read(keys_of(numbers), into=batch, timeout_s=20).transfer.result(10)


def read_directly(node: Any, peer: Any, address: int) -> str:
    """Read all chunks without asking for a lease; how that ends."""
    batch = node.heap.batched_allocate([2048], torch.int64, MANY, LAYOUT.fmt)
    pieces = paired_runs(BlockRuns(np.array([address]), np.array([MANY]), 16384, 16384), batch)
    agent, welcome = node._reader._agent, peer.link.welcome

    def read() -> str:
        request = agent.read(welcome.agent, pieces, welcome.device)
        state = agent.post(request)[0]
        while state == "running":
            state = agent.state(request)[0]
        agent.release(request)
        return str(state)

    try:
        return str(node._reader.ask(read))
    finally:
        node.heap.batched_free(batch)


def refuses(peer: Any) -> bool:
    try:
        peer.lookup([key_of(1)])
    except PeerGoneError:
        return True
    return False


def pending(node: Any) -> int:
    return int(node.heap.stats().pending_bytes)


def close_to_empty(node: Any) -> None:
    """Everything that reads had is free again."""
    assert until(lambda: not pending(node))
    assert until(lambda: not node.stats().reads_in_flight)
    node.heap.memcheck()
    assert not node.heap.leaks()


class TestFrozenOwner:
    def test_a_read_that_failed_keeps_its_blocks_until_nixl_is_done(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        peer = reader.connect(owner.address)
        batch = begun(reader, peer, keys_of(NUMBERS), 0.3)
        owner.freeze()
        try:
            with pytest.raises(TransferError, match=r"'owner'.*not arrived in 0.3 s") as raised:
                batch.transfer.result(5)
            assert isinstance(raised.value.__cause__, PeerTimeoutError)
            assert batch.transfer.is_quarantined
            reader.heap.batched_free(batch)
            assert pending(reader) == MANY * LAYOUT.size_bytes
            stats = reader.stats()
            assert (stats.quarantined_reads, stats.quarantined_bytes) == (1, pending(reader))
            others = fill(reader.heap, NUMBERS)  # everything else that there is
            assert reader.heap.batched_allocate([2048], torch.int64, 1) is None
            with pytest.raises(PeerTimeoutError, match=r"'owner' has not answered in 0.2 s"):
                peer.lookup([key_of(1)], timeout_s=0.2)
        finally:
            owner.thaw()
        assert until(lambda: not pending(reader))
        assert wrong_rows(NUMBERS, others) == 0
        reader.heap.batched_free(others)
        close_to_empty(reader)

    def test_a_lock_that_is_not_answered_ends_the_read(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        peer = reader.connect(owner.address)
        owner.freeze()
        try:
            batch = peer.read(keys_of(range(4)), into=reader.heap, timeout_s=0.2)
            with pytest.raises(TransferError, match=r"'owner': it has not answered in 0.2 s"):
                batch.transfer.result(5)
            assert not batch.transfer.is_quarantined
            reader.heap.batched_free(batch)
            assert not pending(reader)
        finally:
            owner.thaw()
        again = peer.read(keys_of(range(4)), into=reader.heap)
        assert wrong_rows(range(4), again) == 0
        reader.heap.batched_free(again)
        assert until(lambda: owner.ask("node.stats().leases") == 0)

    def test_a_read_goes_on_when_its_owner_does(self, reader: Any, owner: NodeProcess) -> None:
        peer = reader.connect(owner.address)
        batch = begun(reader, peer, keys_of(NUMBERS), 30)
        owner.freeze()
        time.sleep(0.2)
        owner.thaw()
        assert wrong_rows(NUMBERS, batch) == 0
        reader.heap.batched_free(batch)
        close_to_empty(reader)

    def test_closing_a_peer_in_the_middle_disturbs_no_read(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        peer = reader.connect(owner.address)
        batch = begun(reader, peer, keys_of(NUMBERS), 30)
        peer.close()
        assert wrong_rows(NUMBERS, batch) == 0
        reader.heap.batched_free(batch)
        close_to_empty(reader)
        assert until(lambda: reader.stats().num_peers == 0)


class TestFrozenReader:
    def test_what_arrives_after_the_lease_is_an_error(self, owner: NodeProcess) -> None:
        owner.ask("remote.service.MAX_LEASE_S = 0.5")
        with NodeProcess("frozen", MANY, tls=TCP) as frozen:
            frozen.ask(f"peer = node.connect({owner.address!r})")
            frozen.ask("peer.read(keys_of(range(4)), into=heap).transfer.result()")
            assert until(lambda: owner.ask("node.stats().leases") == 0)
            frozen.tell(f"found = peer.read(keys_of(range({MANY})), into=heap)")
            assert until(lambda: owner.ask("node.stats().leases"))
            frozen.freeze()
            # The owner's blocks become other chunks'.
            assert until(lambda: owner.ask("node.stats().leases") == 0)
            owner.ask("node.withdraw(keys_of(numbers))")
            owner.ask("heap.batched_free(batch)")
            owner.ask("batch = fill(heap, range(50_000, 50_000 + len(numbers)))")
            frozen.thaw()
            frozen.answer()
            with pytest.raises(RuntimeError, match="arrived after its lease"):
                frozen.ask("found.transfer.result()")
            assert frozen.ask("type(found.transfer.error.__cause__).__name__") == (
                StaleReadError.__name__
            )
            assert frozen.ask("found.transfer.is_quarantined") is False
            frozen.ask("heap.batched_free(found)")
            assert frozen.ask("heap.stats().pending_bytes") == 0
        owner.ask("remote.service.MAX_LEASE_S = 60.0")
        owner.ask("heap.batched_free(batch)")
        owner.ask("batch = fill(heap, numbers)")
        owner.ask("node.publish(keys_of(numbers), batch)")


class TestGoneOwner:
    def test_a_killed_peer_is_named_within_a_second_and_the_others_go_on(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        with (
            NodeProcess("victim", MANY, NUMBERS, tls=TCP) as victim,
            NodeProcess("second", MANY, range(8), tls=TCP) as second,
        ):
            peer, other = reader.connect(victim.address), reader.connect(owner.address)
            batch = begun(reader, peer, keys_of(NUMBERS), 30)
            beside = other.read(keys_of(range(64)), into=reader.heap)
            victim.kill()
            began = time.monotonic()
            with pytest.raises(TransferError, match="'victim' is gone") as raised:
                batch.transfer.result(10)
            seconds = time.monotonic() - began
            assert isinstance(raised.value.__cause__, PeerGoneError)
            assert seconds < 1.0
            reader.heap.batched_free(batch)
            assert pending(reader) == MANY * LAYOUT.size_bytes  # for a moment
            assert wrong_rows(range(64), beside) == 0
            reader.heap.batched_free(beside)
            close_to_empty(reader)
            assert peer.is_gone
            for call in (peer.lookup, peer.offer, lambda keys: peer.read(keys, into=reader.heap)):
                with pytest.raises(PeerGoneError, match="'victim'"):
                    call([key_of(1)])

            # Another life at the same address, under the same name.
            again = NodeProcess("victim", MANY, range(8), tls=TCP, bind=victim.address)
            with again:
                peer = reader.connect(again.address)
                assert peer.lookup(keys_of([0, 7, 8])).tolist() == [True, True, False]
                batch = peer.read(keys_of(range(8)), into=reader.heap)
                assert wrong_rows(range(8), batch) == 0
                reader.heap.batched_free(batch)

            # One that is killed while nobody reads; asked before anybody has noticed.
            peer = reader.connect(second.address)
            second.kill()
            began = time.monotonic()
            batch = reader.heap.batched_allocate([2048], torch.int64, 8, LAYOUT.fmt)
            with pytest.raises((PeerGoneError, TransferError), match="'second' is gone"):
                read_all(peer, range(8), batch)
            assert time.monotonic() - began < 1.0
            reader.heap.batched_free(batch)
        close_to_empty(reader)

    def test_a_machine_that_vanished_is_gone_once_the_user_says_so(self, reader: Any) -> None:
        with NodeProcess("vanished", MANY, NUMBERS, tls=TCP) as vanished:
            peer = reader.connect(vanished.address)
            batch = begun(reader, peer, keys_of(NUMBERS), 0.2)
            vanished.freeze()  # and never goes on
            with pytest.raises(TransferError, match="'vanished'"):
                batch.transfer.result(5)
            reader.heap.batched_free(batch)
            assert not peer.is_gone
            time.sleep(0.7)
            assert pending(reader) == MANY * LAYOUT.size_bytes
            peer.assume_gone()
            close_to_empty(reader)
            assert peer.is_gone


class TestClosingOwner:
    def test_a_heap_that_is_closed_under_its_node_stays_mapped(self, reader: Any) -> None:
        with NodeProcess("closing", MANY, NUMBERS, tls=TCP) as closing:
            peer = reader.connect(closing.address)
            there = closing.ask("int(batch.block_runs().starts[0])")
            batch = begun(reader, peer, keys_of(NUMBERS), 30)
            closing.tell("heap.close()")  # waits for the reader
            assert wrong_rows(NUMBERS, batch) == 0
            assert closing.answer() is None
            reader.heap.batched_free(batch)
            # The memory is still there: a reader that knows the addresses harms nobody.
            closing.ask("batch = heap = None")
            assert read_directly(reader, peer, there) == "done"
            with pytest.raises(TransferError, match=r"'closing'.*closed"):
                peer.read([key_of(1)], into=reader.heap).transfer.result(10)
            assert closing.ask("node.stats().failed_requests") == 0
            closing.ask("node.close(10)")
            assert until(lambda: peer.is_gone)
        close_to_empty(reader)

    def test_a_node_that_is_closed_waits_for_its_readers(self, reader: Any) -> None:
        with NodeProcess("leaving", MANY, NUMBERS, tls=TCP) as leaving:
            peer = reader.connect(leaving.address)
            batch = begun(reader, peer, keys_of(NUMBERS), 30)
            leaving.tell("node.close(20)")
            assert until(lambda: refuses(peer))
            refused = peer.read([key_of(1)], into=reader.heap)
            with pytest.raises(TransferError, match="'leaving'"):
                refused.transfer.result(10)
            assert wrong_rows(NUMBERS, batch) == 0
            assert leaving.answer() is None
            for each in (batch, refused):
                reader.heap.batched_free(each)
            assert until(lambda: peer.is_gone)
            with pytest.raises(PeerGoneError, match="no node listens"):
                reader.connect(leaving.address)
        close_to_empty(reader)


def test_what_was_evicted_after_the_lookup_is_named(reader: Any, owner: NodeProcess) -> None:
    peer = reader.connect(owner.address)
    assert peer.lookup(keys_of([3, 4, 99_999])).tolist() == [True, True, False]
    owner.ask("node.withdraw(keys_of([4]))")
    before = reader.heap.stats().allocated_bytes
    batch = peer.read(keys_of([3, 4]), into=reader.heap)
    with pytest.raises(TransferError) as raised:
        batch.transfer.result(10)
    assert isinstance(raised.value.__cause__, MissingKeysError)
    assert raised.value.__cause__.missing == (key_of(4),)
    reader.heap.batched_free(batch)
    assert reader.heap.stats().allocated_bytes == before
    assert until(lambda: owner.ask("node.stats().leases") == 0)
    owner.ask("node.publish(keys_of(numbers), batch)")
