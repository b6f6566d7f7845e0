"""Nodes whose constructor a signal handler's exception ends: nobody listens any more."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from foreign_code import Interrupted, interrupts, no_deadlock
from remote_nodes import need_nixl

from kvheap import HostMemoryAllocator

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def test_nobody_listens_after_an_interrupted_opening() -> None:
    from kvheap.remote import Node

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    made: list[Any] = []
    number = 0
    with HostMemoryAllocator(1 << 16) as heap:
        while True:
            with no_deadlock():
                was_struck = interrupts(
                    number,
                    lambda: made.append(Node("a node", heap, bind=address)),
                    Interrupted,
                    modules=("kvheap.closing", "kvheap.forks"),
                )
            while made:
                made.pop().close()
            Node("the next", heap, bind=address).close()
            if not was_struck:
                break
            number += 2
    assert number > 8
