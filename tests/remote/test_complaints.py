"""What others make a node say in its log is bounded, and none of it goes uncounted."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from remote_nodes import make_heap, need_nixl, until

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import Node, PeerError, complaints
    from kvheap.remote.endpoints import endpoint_of
    from kvheap.remote.frames import Outgoing
    from kvheap.remote.handshake import channel_key
    from kvheap.remote.messages import packed

MANY = 60


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The warnings of the log so far."""
    monkeypatch.setattr(complaints, "PERIOD_S", 1.0, raising=False)
    caplog.set_level(logging.WARNING, "kvheap")
    return lambda: [record.getMessage() for record in caplog.records]


def broken(keys: list[bytes]) -> Any:
    raise RuntimeError("no index")


@pytest.fixture
def node() -> Iterator[Any]:
    heap = make_heap(2)
    with Node("owner", heap, broken, secret="right") as node:
        yield node
    heap.close()


def send(address: str, data: bytes) -> None:
    with socket.create_connection(endpoint_of("address", address), 5) as sock:
        sock.sendall(data)
        sock.settimeout(5)
        with suppress(ConnectionResetError):
            while sock.recv(4096):
                continue


def left_out(lines: list[str]) -> int:
    """How many more there were, as the lines say."""
    found = [re.search(r" (\d+) more ", line) for line in lines]
    return sum(int(match[1]) for match in found if match is not None)


@pytest.mark.parametrize("what", ["garbage", "another secret"])
def test_refused_connections(node: Any, lines: Any, what: str) -> None:
    for number in range(MANY):
        hello = packed(nonce=bytes(16), echo=bytes(16), name=f"stranger {number}")
        frame = Outgoing(channel_key(b"wrong"), "client").frame(hello)
        send(node.address, b"GET / HTTP/1.1\r\n\r\n" if what == "garbage" else frame)
    assert until(lambda: node.stats().refused_connections == MANY, 5)
    assert until(lambda: left_out(lines()), 5)  # with nothing more to do for the node
    time.sleep(0.1)
    shown = [line for line in lines() if " more " not in line]
    assert len(lines()) <= 2 * (complaints.LINES + 1)
    assert len(shown) + left_out(lines()) == MANY
    send(node.address, b"later")
    assert until(lambda: "no node sends b'late" in lines()[-1], 5)


def test_what_was_left_out_is_said_at_the_end(lines: Any) -> None:
    heap = make_heap(2)
    with Node("owner", heap) as node:
        for _ in range(complaints.LINES + 5):
            send(node.address, b"what?")
    heap.close()
    shown = [line for line in lines() if " more " not in line]
    assert len(shown) + left_out(lines()) == complaints.LINES + 5


def test_requests_that_fail(node: Any, lines: Any) -> None:
    heap = make_heap(2)
    with Node("reader", heap, secret="right") as reader:
        peer = reader.connect(node.address)
        for _ in range(MANY):
            with pytest.raises(PeerError, match="no index"):
                peer.lookup([b"x"])
        assert until(lambda: left_out(lines()), 5)
        assert node.stats().failed_requests == MANY
    heap.close()
    assert len(lines()) <= 2 * (complaints.LINES + 1)
