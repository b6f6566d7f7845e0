"""Nodes whose constructor a signal handler's exception ends: nothing of them is left."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from foreign_code import Interrupted, interrupts, no_deadlock
from remote_nodes import need_nixl, until
from remote_pairs import Pair

from kvheap import HostMemoryAllocator

WHY_NOT = need_nixl()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    # Of sockets that an interrupted opening leaves to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

PLACES = ("kvheap.closing", "kvheap.forks") + tuple(
    f"kvheap.remote.{name}" for name in ("node", "server", "reader", "tasks")
)


@pytest.fixture
def heap() -> Iterator[HostMemoryAllocator]:
    with HostMemoryAllocator(1 << 16) as heap:
        yield heap


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def require_free(port: int) -> None:
    socket.create_server(("127.0.0.1", port)).close()


def num_threads() -> int:
    return sum(thread.name.startswith("kvheap-") for thread in threading.enumerate())


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_of_an_interrupted_opening(heap: HostMemoryAllocator, port: int) -> None:
    from kvheap.remote import Node

    made: list[Any] = []
    number = 0
    Node("the first", heap, bind=f"127.0.0.1:{port}").close()
    before = num_threads(), num_descriptors()
    while True:
        with no_deadlock():
            was_struck = interrupts(
                number,
                lambda: made.append(Node("a node", heap, bind=f"127.0.0.1:{port}")),
                Interrupted,
                modules=PLACES,
                but_not_inside=("threading",),
            )
        while made:
            made.pop().close()
        require_free(port)
        assert until(lambda: (num_threads(), num_descriptors()) == before, 5), number
        if not was_struck:
            break
        number += 3
    assert number > 40


@pytest.mark.parametrize("name", ["serve", "read"])
def test_a_thread_whose_start_was_interrupted_ends(
    heap: HostMemoryAllocator, port: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, but its caller has not been told: whoever starts a thread waits for it there."""
    from kvheap.remote import Node

    start = threading.Thread.start
    errors: list[Any] = []

    def struck(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith(f"kvheap-{name}"):
            raise Interrupted

    monkeypatch.setattr(threading, "excepthook", errors.append)
    before = num_threads()
    with monkeypatch.context() as patch, no_deadlock():
        patch.setattr(threading.Thread, "start", struck)
        with pytest.raises(Interrupted):
            Node("a node", heap, bind=f"127.0.0.1:{port}")
    assert until(lambda: num_threads() == before, 5)
    assert not errors
    require_free(port)


def test_an_interrupted_connect_leaves_no_connection() -> None:
    pair = Pair(256)
    made: list[Any] = []
    number = 0
    pair.peer.close()
    while True:
        with no_deadlock():
            was_struck = interrupts(
                number,
                lambda: made.append(pair.reader.connect(pair.owner.address)),
                Interrupted,
                modules=("kvheap.remote.node", "kvheap.remote.reader"),
                but_not_inside=("threading",),
            )
            made.append(pair.reader.connect(pair.owner.address))
            assert made[-1].lookup([b"x"]).tolist() == [False]
        while made:
            made.pop().close()
        assert until(lambda: not pair.reader.stats().num_peers, 5), number
        assert until(lambda: not pair.owner.stats().num_clients, 5), number
        if not was_struck:
            break
        number += 1
    assert number > 15
    pair.close()
