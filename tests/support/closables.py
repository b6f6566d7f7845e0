"""Everything in kvheap that has threads, locks or registered memory, and ends by a ``close()``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_mooncake import FakeStore

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat, SharedHeap
from kvheap.integrations.mooncake import MooncakeTier

__all__ = ["KINDS", "LAYOUT", "PLACE", "Kind", "blocks"]

LAYOUT = BlockLayout.of([2048], torch.int64, MemoryFormat.UNDEFINED)
PLACE = LAYOUT.size_bytes

KEYS = [b"a", b"b"]

Calls = dict[str, Callable[[], Any]]


def blocks(heap: Any, count: int = len(KEYS)) -> Any:
    source = torch.arange(count * 2048).reshape(count, 2048)
    return heap.batched_allocate([2048], torch.int64, count, LAYOUT.fmt, source=source)


class Kind:
    """How a test opens one, uses it, and keeps it busy.

    Args:
        folder: for its files.
    """

    is_kept = True
    """Whether it stays when nobody has it any more."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "it"
        self.heap = HostMemoryAllocator(16 * PLACE)

    def open(self) -> Any:
        raise NotImplementedError

    def calls(self, it: Any) -> Calls:
        """Every method that an open one answers."""
        raise NotImplementedError

    def keep_busy(self, it: Any, during: Callable[[], object]) -> None:
        """Let something run that its end waits for: ``during``, on a thread that it waits for."""
        raise NotImplementedError

    def close(self) -> None:
        """What the test does not close by itself."""


class FileTierKind(Kind):
    def open(self) -> Any:
        pytest.importorskip("lmdb")
        pytest.importorskip("xxhash")
        from kvheap.files import FileTier

        return FileTier(self.path, 4 * PLACE, LAYOUT, namespace="a model")

    def calls(self, it: Any) -> Calls:
        batch = blocks(self.heap)
        return {
            "lookup": lambda: it.lookup(KEYS),
            "keys": it.keys,
            "check": it.check,
            "store": lambda: it.store(KEYS, batch).result(60),
            "load": lambda: it.load(KEYS, self.heap).result(60),
            "touch": lambda: it.touch(KEYS),
            "remove": lambda: it.remove(KEYS),
        }

    def keep_busy(self, it: Any, during: Callable[[], object]) -> None:
        it._threads.submit("short", during)


class OwnerKind(Kind):
    def open(self) -> Any:
        pytest.importorskip("xxhash")
        return SharedHeap(str(self.path), 4 * PLACE, LAYOUT, namespace="a model")

    def calls(self, it: Any) -> Calls:
        source = torch.zeros(2, 2048, dtype=torch.int64)
        return {
            "heap": lambda: it.heap,
            "store": lambda: it.store(KEYS, source),
            "begin": lambda: it.begin([b"c"]).abort(),
            "lookup": lambda: it.lookup(KEYS),
            "prefix_length": lambda: it.prefix_length(KEYS),
            "keys": it.keys,
            "stats": it.stats,
            "hold": lambda: it.hold(KEYS).release(),
            "load": lambda: it.load(KEYS, self.heap),
            "touch": lambda: it.touch(KEYS),
            "remove": lambda: it.remove(KEYS),
        }

    def keep_busy(self, it: Any, during: Callable[[], object]) -> None:
        it._owner.service.tell(during)


class AttachedKind(OwnerKind):
    is_kept = False
    owner: Any = None

    def open(self) -> Any:
        self.owner = super().open()
        return SharedHeap.attach(str(self.path), LAYOUT, namespace="a model")

    def keep_busy(self, it: Any, during: Callable[[], object]) -> None:
        def locked() -> None:
            channel = it._channel
            with channel._lock:  # as while it connects to an owner that is stopped
                channel._holder = threading.get_ident()
                is_locked.set()
                during()
                channel._holder = 0

        is_locked = threading.Event()
        threading.Thread(target=locked).start()
        assert is_locked.wait(60)

    def close(self) -> None:
        if self.owner is not None:  # else the test is skipped
            self.owner.close()


class NodeKind(Kind):
    def open(self) -> Any:
        pytest.importorskip("nixl", reason="needs NIXL: see constraints-nixl.txt")
        pytest.importorskip("msgpack")
        from kvheap.remote import Node

        return Node("it", self.heap)

    def calls(self, it: Any) -> Calls:
        batch = blocks(self.heap)
        return {
            "publish": lambda: it.publish(KEYS, batch),
            "withdraw": lambda: it.withdraw(KEYS),
            "next_offer": lambda: it.next_offer(0.0),
        }

    def keep_busy(self, it: Any, during: Callable[[], object]) -> None:
        it._reader.submit(during)


class MooncakeKind(Kind):
    is_kept = False

    def open(self) -> Any:
        self.store = FakeStore()
        return MooncakeTier(self.store, self.heap, LAYOUT, namespace="a model")

    def calls(self, it: Any) -> Calls:
        batch = blocks(self.heap)
        return {
            "put": lambda: it.put(KEYS, batch),
            "get": lambda: it.get(KEYS, batch),
            "lookup": lambda: it.lookup(KEYS),
            "remove": lambda: it.remove(KEYS),
        }

    def keep_busy(self, it: Any, during: Callable[[], object]) -> None:
        def called(name: str) -> None:
            is_running.set()
            during()

        is_running = threading.Event()
        self.store.during = called
        threading.Thread(target=it.lookup, args=(KEYS,)).start()
        assert is_running.wait(60)


KINDS = {
    "FileTier": FileTierKind,
    "SharedHeap, owner": OwnerKind,
    "SharedHeap, attached": AttachedKind,
    "Node": NodeKind,
    "MooncakeTier": MooncakeKind,
}
