"""What else connects to the socket of a ``SharedHeap``'s owner, and what it says there."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from contextlib import suppress
from errno import EMFILE
from pathlib import Path
from typing import Any

import pytest
from shared_heaps import (
    attach,
)
from small_shared_heaps import KEYS, MANY, put, settled

from kvheap import SharedHeap


class TestForeignMessages:
    """Whatever else connects to the owner's socket."""

    def connected(self, heap: SharedHeap) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(20)
        peer.connect(heap._segment.state.socket_name)
        return peer

    def test_rubbish_is_refused_and_the_others_go_on(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        rng = random.Random(3)
        for length in [*range(1, 40), 5000]:
            with self.connected(heap) as peer:
                kind = bytes([rng.randrange(9)])
                body = kind + rng.randbytes(length)
                peer.sendall(struct.pack("<I", len(body)) + body)
                with suppress(ConnectionError):
                    answer = peer.recv(1 << 16)
                    assert not answer or answer[4] in (0, 1, 7)
        for head in (struct.pack("<I", 1 << 31), bytes(4)):
            with self.connected(heap) as peer:
                peer.sendall(head)
                assert peer.recv(10) == b""
        with self.connected(heap) as slow:
            slow.sendall(b"\x01")
            assert put(replica, KEYS) == [True] * 4
            assert put(heap, MANY[:4]) == [True] * 4
        heap.check(contents=True)
        assert settled(heap).free_places == 0

    def test_without_descriptors_who_is_connected_goes_on(
        self, heap: SharedHeap, replica: SharedHeap, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accept = socket.socket.accept
        fails = iter([True, True])
        num_failed: list[int] = []

        def accept_some(self: socket.socket) -> Any:
            if next(fails, False):
                num_failed.append(1)
                raise OSError(EMFILE, os.strerror(EMFILE))
            return accept(self)

        assert put(replica, KEYS[:1]) == [True]
        monkeypatch.setattr(socket.socket, "accept", accept_some)
        with attach(heap.path) as other, self.connected(heap):
            assert put(replica, KEYS[1:2]) == [True]
            assert put(other, KEYS[2:3]) == [True]
        assert len(num_failed) == 2

    def test_too_many_wait_for_an_owner_that_is_busy(self, heap: SharedHeap, path: Path) -> None:
        goes_on = threading.Event()
        heap._owner.service.tell(goes_on.wait)  # type: ignore[union-attr]
        peers = []
        with suppress(BlockingIOError):
            while True:
                peers.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                peers[-1].setblocking(False)
                peers[-1].connect(heap._segment.state.socket_name)
        with attach(path, timeout_s=0.1) as other:
            with pytest.raises(TimeoutError, match="it may be stopped, or busy"):
                put(other, KEYS)
            goes_on.set()
        with attach(path) as other:
            assert put(other, KEYS) == [True] * 4
        for peer in peers:
            peer.close()

    def test_places_of_another_are_not_published(
        self, heap: SharedHeap, replica: SharedHeap
    ) -> None:
        with replica.begin(KEYS[:1]) as store, self.connected(heap) as peer:
            body = bytes([3]) + struct.pack("<QQQI", store._ticket.number, store.places[0], 0, 0)
            peer.sendall(struct.pack("<I", len(body)) + body)
            assert peer.recv(1000)[4] == 1
            assert not heap.lookup(KEYS[:1]).any()
