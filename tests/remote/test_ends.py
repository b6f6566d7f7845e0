"""What a reader survives: huge time limits, peers that are closed twice, a thread that has died."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from remote_nodes import fill, keys_of, make_heap, need_nixl, until, wrong_rows

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import Node

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
