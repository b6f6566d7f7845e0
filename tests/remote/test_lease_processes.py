"""Reads by leases that were taken before, from processes that are frozen, killed and started again.

The same four points as for other reads: only NIXL's word or a peer known to be gone ends a read,
what arrives after the lease is an error, the owner's memory stays, and a killed peer is named.
"""

from __future__ import annotations

import time
from typing import Any

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

from kvheap import TransferError

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import PeerGoneError, StaleReadError


def begun(node: Any, peer: Any, lease: Any, timeout_s: float = 30) -> Any:
    """A batch that is being filled: NIXL has begun, and has far to go."""
    batch = peer.read(lease, into=node.heap, timeout_s=timeout_s)
    assert until(lambda: any(read.running for read in peer.link.running))
    return batch


def cause_of(batch: Any, text: str) -> BaseException:
    with pytest.raises(TransferError, match=text) as raised:
        batch.transfer.result(10)
    assert raised.value.__cause__ is not None
    return raised.value.__cause__


def close_to_empty(node: Any) -> None:
    """Everything that reads had is free again."""
    assert until(lambda: not node.heap.stats().pending_bytes)
    assert until(lambda: not node.stats().reads_in_flight)
    node.heap.memcheck()
    assert not node.heap.leaks()


class TestFrozenOwner:
    def test_a_lease_that_is_over_before_the_bytes_are_there(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        peer = reader.connect(owner.address)
        lease = peer.lease(keys_of(NUMBERS), ttl_s=1.0)
        batch = begun(reader, peer, lease)
        owner.freeze()
        try:
            assert until(lambda: lease.state == "expired")
            assert not batch.transfer.done()  # NIXL has not said so
            with pytest.raises(StaleReadError):
                peer.read(lease, into=reader.heap)
        finally:
            owner.thaw()
        assert isinstance(cause_of(batch, "arrived after its lease of 1 s"), StaleReadError)
        assert not batch.transfer.is_quarantined
        reader.heap.batched_free(batch)
        close_to_empty(reader)
        assert until(lambda: owner.ask("node.stats().leases") == 0)

    def test_a_read_that_failed_keeps_its_blocks_until_nixl_is_done(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        peer = reader.connect(owner.address)
        batch = begun(reader, peer, peer.lease(keys_of(NUMBERS)), 0.3)
        owner.freeze()
        try:
            cause_of(batch, r"'owner': the bytes have not arrived in 0.3 s")
            assert batch.transfer.is_quarantined
            reader.heap.batched_free(batch)
            assert reader.heap.stats().pending_bytes == MANY * LAYOUT.size_bytes
            others = fill(reader.heap, NUMBERS)  # everything else that there is
            assert reader.heap.batched_allocate([2048], torch.int64, 1) is None
        finally:
            owner.thaw()
        assert until(lambda: not reader.heap.stats().pending_bytes)
        assert wrong_rows(NUMBERS, others) == 0
        reader.heap.batched_free(others)
        close_to_empty(reader)
        # The lease was dropped long ago, and the read kept it until it had ended.
        assert until(lambda: owner.ask("node.stats().leases") == 0)

    def test_a_lease_released_in_the_middle_is_kept_for_the_read(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        peer = reader.connect(owner.address)
        lease = peer.lease(keys_of(NUMBERS))
        batch = begun(reader, peer, lease)
        owner.freeze()
        assert lease.release()
        time.sleep(0.1)
        owner.thaw()
        assert wrong_rows(NUMBERS, batch) == 0
        reader.heap.batched_free(batch)
        close_to_empty(reader)
        assert until(lambda: owner.ask("node.stats().leases") == 0)


class TestFrozenReader:
    @pytest.mark.parametrize("what", ["a small read", "a large read"])
    def test_what_arrives_after_the_lease_is_an_error(self, owner: NodeProcess, what: str) -> None:
        """Whoever posts it, and whenever it is frozen: the check comes after NIXL's word."""
        count = 4 if what == "a small read" else MANY
        with NodeProcess("frozen", MANY, tls=TCP) as frozen:
            frozen.ask(f"peer = node.connect({owner.address!r})")
            frozen.ask("peer.read(keys_of(range(4)), into=heap).transfer.result()")
            frozen.ask(f"lease = peer.lease(keys_of(range({count})), ttl_s=0.5)")
            if what == "a small read":  # stops itself where its state is asked
                frozen.ask(
                    "import os, signal; agent = node._reader._agent; state = agent.post; "
                    "agent.post = lambda request: "
                    "(os.kill(os.getpid(), signal.SIGSTOP), state(request))[1]"
                )
                frozen.tell("found = peer.read(lease, into=heap)")
                assert until(lambda: frozen.state == "T")
            else:
                frozen.tell("found = peer.read(lease, into=heap)")
                time.sleep(0.02)
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
            frozen.ask("heap.batched_free(found)")
            assert frozen.ask("until(lambda: not heap.stats().pending_bytes)") is True
        owner.ask("heap.batched_free(batch)")
        owner.ask("batch = fill(heap, numbers)")
        owner.ask("node.publish(keys_of(numbers), batch)")


class TestGoneOwner:
    def test_a_killed_peer_is_named_and_its_leases_are_worth_nothing(
        self, reader: Any, owner: NodeProcess
    ) -> None:
        with (
            NodeProcess("victim", MANY, NUMBERS, tls=TCP) as victim,
            NodeProcess("second", MANY, range(8), tls=TCP) as second,
        ):
            peer, other = reader.connect(victim.address), reader.connect(owner.address)
            lease, beside = peer.lease(keys_of(NUMBERS)), other.lease(keys_of(range(64)))
            batch = begun(reader, peer, lease)
            victim.kill()
            began = time.monotonic()
            assert isinstance(cause_of(batch, "'victim' is gone"), PeerGoneError)
            assert time.monotonic() - began < 1.0
            reader.heap.batched_free(batch)
            batch = other.read(beside, into=reader.heap)
            assert wrong_rows(range(64), batch) == 0
            reader.heap.batched_free(batch)
            for call in (lambda: peer.read(lease, into=reader.heap), lambda: peer.lease([b"a"])):
                with pytest.raises(PeerGoneError, match="'victim'"):
                    call()
            lease.release()
            beside.release()

            # Another life at the same address, under the same name: the old lease is not its.
            again = NodeProcess("victim", MANY, range(8), tls=TCP, bind=victim.address)
            with again:
                later = reader.connect(again.address)
                with pytest.raises(PeerGoneError, match="'victim'"):
                    peer.read(lease, into=reader.heap)
                with pytest.raises(ValueError, match="keys must be a lease of"):
                    later.read(lease, into=reader.heap)
                batch = later.read(later.lease(keys_of(range(8))), into=reader.heap)
                assert wrong_rows(range(8), batch) == 0
                reader.heap.batched_free(batch)

            # One that is killed while it holds a lease, and read before anybody has noticed.
            peer = reader.connect(second.address)
            lease = peer.lease(keys_of(range(8)))
            second.kill()
            began = time.monotonic()
            batch = reader.heap.batched_allocate([2048], torch.int64, 8, LAYOUT.fmt)
            with pytest.raises((PeerGoneError, TransferError), match="'second' is gone"):
                peer.read(lease, into=batch).transfer.result(10)
            assert time.monotonic() - began < 1.0
            reader.heap.batched_free(batch)
        close_to_empty(reader)

    def test_a_reader_that_is_killed_holds_blocks_until_its_deadline(
        self, owner: NodeProcess
    ) -> None:
        with NodeProcess("killed", 8, tls=TCP) as killed:
            killed.ask(f"peer = node.connect({owner.address!r})")
            killed.ask("lease = peer.lease(keys_of(range(4)), ttl_s=1.0)")
            assert owner.ask("node.stats().leases") == 1
            killed.kill()
        time.sleep(0.2)
        assert owner.ask("node.stats().leases") == 1  # it might only be cut off
        assert until(lambda: owner.ask("node.stats().leases") == 0, 5)


def test_an_owner_that_closes_waits_for_a_leased_read(reader: Any) -> None:
    with NodeProcess("leaving", MANY, NUMBERS, tls=TCP) as leaving:
        peer = reader.connect(leaving.address)
        lease = peer.lease(keys_of(NUMBERS))
        leaving.tell("node.close(20)")
        time.sleep(0.1)
        batch = begun(reader, peer, lease)
        lease.release()
        assert wrong_rows(NUMBERS, batch) == 0
        assert leaving.answer() is None
        reader.heap.batched_free(batch)
        assert until(lambda: peer.is_gone)
        assert key_of(1) in lease.keys
    close_to_empty(reader)
