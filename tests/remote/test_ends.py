"""What a reader survives: huge time limits, peers that are closed twice, a thread that has died."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from forked_child import in_a_child
from remote_nodes import LAYOUT, fill, keys_of, make_heap, need_nixl, until, wrong_rows

from kvheap import ClosedError, MemoryObj, TensorMemoryAllocator, TransferError
from kvheap.remote.deadlines import Deadline
from kvheap.remote.frames import Incoming, Outgoing
from kvheap.remote.line import Line

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import Node, PeerError, PeerTimeoutError

HUGE_S = [3e6, 1e10, 1e300, 10**30, sys.float_info.max]
"""Seconds; the first are more milliseconds than 31 bits hold."""


@pytest.fixture
def nodes() -> Iterator[tuple[Any, Any]]:
    there, here = make_heap(), make_heap()
    owner, reader = Node("owner", there), Node("reader", here)
    owner.publish(keys_of(range(8)), fill(there, range(8)))
    yield owner, reader
    reader.close(10), owner.close(10)


def read(reader: Any, peer: Any, **options: Any) -> int:
    """How many chunks of a read are wrong."""
    batch = peer.read(keys_of(range(8)), into=reader.heap, **options)
    batch.transfer.result(20)
    wrong = wrong_rows(range(8), batch)
    reader.heap.batched_free(batch)
    return wrong


class TestHugeTimeLimits:
    @pytest.mark.parametrize("seconds", HUGE_S)
    def test_every_call_takes_them(self, nodes: Any, seconds: float) -> None:
        owner, reader = nodes
        peer = reader.connect(owner.address, timeout_s=seconds)
        assert peer.lookup(keys_of(range(8)), timeout_s=seconds).all()
        assert peer.offer(keys_of(range(8)), timeout_s=seconds)
        assert owner.next_offer(timeout_s=seconds) is not None
        assert read(reader, peer, timeout_s=seconds) == 0
        assert read(reader, peer) == 0  # the thread that reads goes on
        reader.close(timeout_s=seconds)


class TestClosedPeers:
    def test_closing_a_peer_again_leaves_its_successor_alone(self, nodes: Any) -> None:
        owner, reader = nodes
        first = reader.connect(owner.address)
        first.close()
        until(lambda: reader.stats().num_peers == 0)
        second = reader.connect(owner.address)
        first.close()
        assert read(reader, second) == 0
        assert reader.stats().num_peers == 1

    def test_closing_a_peer_under_a_question_of_another_thread(self, nodes: Any) -> None:
        owner, reader = nodes
        peer = reader.connect(owner.address)
        errors: list[BaseException] = []
        has_ended = threading.Event()

        def ask() -> None:
            try:
                while not has_ended.is_set():
                    peer.lookup(keys_of(range(8)), timeout_s=30)
            except (ConnectionError, PeerError, ClosedError):
                pass  # it says that the connection was closed
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            peer.close()
            time.sleep(0.001)
        has_ended.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not errors

    def test_closing_a_peer_that_does_not_answer(self, nodes: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            here, there = socket.create_connection(silent.getsockname()), silent.accept()[0]
            line = Line(here, Incoming(b"", "server"), Outgoing(b"", "client"), "a peer")
            took: list[float] = []

            def wait() -> None:
                begin = time.monotonic()
                with suppress(OSError):
                    line.receive(Deadline(15.0))
                took.append(time.monotonic() - begin)

            thread = threading.Thread(target=wait)
            thread.start()
            time.sleep(0.2)
            line.close()
            thread.join(20)
            there.close()
        assert took[0] < 10

    def test_a_forked_child_leaves_the_connections_of_its_parent_alone(self, nodes: Any) -> None:
        owner, reader = nodes
        peer = reader.connect(owner.address)
        assert read(reader, peer) == 0
        num_clients = owner.stats().num_clients
        in_a_child(peer.close)
        time.sleep(0.3)
        assert owner.stats().num_clients == num_clients

    def test_closing_and_connecting_again_keeps_no_descriptors(self, nodes: Any) -> None:
        owner, reader = nodes
        counts = []
        for number in range(12):
            peer = reader.connect(owner.address)
            assert read(reader, peer) == 0
            peer.close()
            if number in (1, 11):
                until(lambda: reader.stats().num_peers == owner.stats().num_clients == 0)
                counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[1] <= counts[0] + 2  # of both sides; it was 20


class TestMessages:
    def test_names_are_printable(self) -> None:
        for name in ("\n", "a\0b", "\u2028"):
            with pytest.raises(ValueError, match="name must be printable, got"):
                Node(name, make_heap())

    def test_a_first_read_waits_no_longer_than_it_was_told(self) -> None:
        def slow(keys: list[bytes]) -> list[None]:
            has_ended.wait(20)
            return [None] * len(keys)

        has_ended = threading.Event()
        with Node("owner", make_heap(), slow) as owner, Node("reader", make_heap()) as reader:
            peer = reader.connect(owner.address)
            with pytest.raises(PeerTimeoutError, match=r"has not answered in 0.2 s"):
                peer.read(keys_of([1]), into=reader.heap, timeout_s=0.2)
            has_ended.set()

    def test_blocks_of_memory_that_joined_later(self) -> None:
        heap = TensorMemoryAllocator(torch.zeros(2 * LAYOUT.size_bytes, dtype=torch.uint8))
        later: dict[bytes, MemoryObj] = {}
        with (
            Node("owner", heap, lambda keys: [later.get(key) for key in keys]) as owner,
            Node("reader", make_heap()) as reader,
        ):
            first = fill(heap, range(2))
            heap.add_buffer(torch.zeros(1 << 20, dtype=torch.uint8))
            blocks = fill(heap, range(2, 8))
            with pytest.raises(ValueError, match="has joined the heap after node 'owner' was made"):
                owner.publish(keys_of(range(2, 8)), blocks)
            owner.publish(keys_of(range(2)), first)
            peer = reader.connect(owner.address)
            assert peer.lookup(keys_of(range(8))).tolist() == [True] * 2 + [False] * 6
            later.update(zip(keys_of(range(2, 8)), blocks, strict=True))
            batch = peer.read(keys_of(range(8)), into=reader.heap)
            assert batch is not None
            with pytest.raises(TransferError, match="joined a heap after its node was made"):
                batch.transfer.result(20)
            assert reader.stats().reads_in_flight == 0
