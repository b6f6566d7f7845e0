"""Nodes of several processes, over TCP, which several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from remote_nodes import MANY, NUMBERS, TCP, NodeProcess, make_heap


@pytest.fixture(scope="module")
def reader() -> Iterator[Any]:
    """A node of this process, over TCP to the others."""
    from kvheap.remote import Node

    heap = make_heap(2 * MANY)
    with Node("reader", heap) as node:
        yield node
    heap.close()


@pytest.fixture(scope="module")
def owner() -> Iterator[NodeProcess]:
    """A process that outlives the tests."""
    with NodeProcess("owner", 2 * MANY, NUMBERS, tls=TCP) as process:
        yield process
