"""The control channel against clients and servers that are slow, damaged, wrong or strangers."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EMFILE
from typing import Any

import pytest
from remote_nodes import fill, key_of, keys_of, make_heap, need_nixl, until

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import (
        AuthenticationError,
        Node,
        PeerGoneError,
        PeerTimeoutError,
        ProtocolError,
        VersionMismatchError,
        frames,
        server,
    )
    from kvheap.remote.ask import AskLine
    from kvheap.remote.deadlines import Deadline
    from kvheap.remote.handshake import call, channel_key
    from kvheap.remote.messages import packed
    from kvheap.remote.probe import probe


@pytest.fixture(scope="module")
def owner() -> Iterator[Any]:
    heap = make_heap()
    with Node("owner", heap, secret="a secret") as node:
        node.publish(keys_of(range(4)), fill(heap, range(4)))
        yield node


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with Node("client", make_heap(), secret="a secret") as node:
        yield node


def where(node: Any) -> tuple[str, int]:
    host, _, port = node.address.rpartition(":")
    return host, int(port)


def refused(node: Any) -> int:
    return int(node.stats().refused_connections)


def serves(client: Any, owner: Any) -> None:
    """The owner still answers others."""
    assert client.connect(owner.address).lookup(keys_of([1, 9])).tolist() == [True, False]


class TestWrongClients:
    @pytest.mark.parametrize(
        "data",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            bytes(100),
            b"KVHR" + b"\xff" * 60,
            b"KVHR\0\1\0\0\xff\xff\xff\xff",
        ],
        ids=["http", "zeros", "version", "4 GiB"],
    )
    def test_what_no_node_sends_ends_the_connection(
        self, owner: Any, client: Any, data: bytes
    ) -> None:
        before = refused(owner)
        with socket.create_connection(where(owner)) as sock:
            sock.sendall(data)
            assert until(lambda: refused(owner) == before + 1)
        serves(client, owner)

    def test_another_secret_is_refused_by_both_sides(self, owner: Any) -> None:
        with (
            Node("stranger", make_heap(), secret="another") as stranger,
            pytest.raises(AuthenticationError, match=owner.address),
        ):
            stranger.connect(owner.address)
        before = refused(owner)
        with socket.create_connection(where(owner)) as sock:  # a client that does not look
            hello = packed(nonce=bytes(16), echo=bytes(16), name="x")
            sock.sendall(frames.Outgoing(channel_key(b"another"), "client").frame(hello))
            assert until(lambda: refused(owner) == before + 1)

    def test_a_recorded_hello_is_refused(self, owner: Any) -> None:
        before = refused(owner)
        with socket.create_connection(where(owner)) as sock:
            hello = packed(nonce=bytes(16), echo=bytes(16), name="x")
            sock.sendall(frames.Outgoing(channel_key(b"a secret"), "client").frame(hello))
            assert until(lambda: refused(owner) == before + 1)

    @pytest.mark.parametrize(
        "message",
        [
            {},
            {"kind": 7, "number": 1},
            {"kind": "erase", "number": 1},
            {"kind": "lookup", "number": -1, "keys": []},
            {"kind": "lookup", "number": 1, "keys": "ab"},
            {"kind": "lookup", "number": 1, "keys": ["a"]},
            {"kind": "lookup", "number": 1, "keys": [b""]},
            {"kind": "lookup", "number": 1, "keys": [bytes(512)]},
            {"kind": "lookup", "number": 1, "keys": [b"a"] * 65_537},
            {"kind": "lock", "number": 1, "keys": [], "ttl": 1.0},
            {"kind": "lock", "number": 1, "keys": [b"a"], "ttl": float("nan")},
            {"kind": "lock", "number": 1, "keys": [b"a"], "ttl": -1.0},
            {"kind": "unlock", "lease": "x"},
            {"kind": "offer", "number": 1, "keys": [b"a"], "name": "x" * 2000, "address": "a"},
        ],
        ids=str,
    )
    def test_requests_that_cannot_be(
        self, owner: Any, client: Any, message: dict[str, Any]
    ) -> None:
        before, deadline = refused(owner), Deadline(5)
        line, _ = call(where(owner), channel_key(b"a secret"), "x", 5)
        line.send(packed(**message), deadline)
        assert until(lambda: refused(owner) == before + 1)
        line.close()
        serves(client, owner)

    def test_random_bytes_after_the_handshake(self, owner: Any, client: Any) -> None:
        rng = random.Random(3)
        for _ in range(20):
            before = refused(owner)
            line, _ = call(where(owner), channel_key(b"a secret"), "x", 5)
            line.send(rng.randbytes(rng.randrange(1, 200)), Deadline(5))  # a good frame, no message
            assert until(lambda before=before: refused(owner) == before + 1)
            line.close()
        serves(client, owner)


class TestSlowClients:
    def test_many_silent_and_slow_ones_hold_nobody_up(
        self, owner: Any, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "PATIENCE_S", 0.5)
        monkeypatch.setattr(server, "MAX_STRANGERS", 8)
        socks = [socket.create_connection(where(owner)) for _ in range(20)]
        frame = frames.Outgoing(channel_key(b"a secret"), "client").frame(bytes(200))
        try:
            serves(client, owner)
            for at in range(30):  # a byte at a time
                for sock in socks:
                    with suppress(OSError):
                        sock.send(frame[at : at + 1])
                time.sleep(0.02)
            serves(client, owner)
            assert until(lambda: all(map(is_closed, socks)))
        finally:
            for sock in socks:
                sock.close()

    def test_one_that_makes_way_just_when_it_says_something(self, client: Any) -> None:
        """The thread learns of the new client and of the old one's byte at the same time."""
        is_busy, goes_on = threading.Event(), threading.Event()

        def look(keys: list[bytes]) -> list[None]:
            is_busy.set()
            assert goes_on.wait(60)
            return [None] * len(keys)

        with Node("owner", make_heap(), look, secret="a secret") as owner:
            peer = client.connect(owner.address)
            strangers = [socket.create_connection(where(owner))]
            while len(strangers) < server.MAX_STRANGERS:
                strangers.append(socket.create_connection(where(owner)))
            for stranger in strangers:
                assert stranger.recv(1)  # it was accepted
            asking = threading.Thread(target=peer.lookup, args=(keys_of([1]),))
            asking.start()
            assert is_busy.wait(60)
            strangers.append(socket.create_connection(where(owner)))
            strangers[0].sendall(b"K")
            goes_on.set()
            asking.join(60)
            assert until(lambda: refused(owner) == 1)
            assert peer.lookup(keys_of([1])).tolist() == [False]
            for stranger in strangers:
                stranger.close()

    def test_without_descriptors_who_is_connected_goes_on(
        self, owner: Any, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        peer = client.connect(owner.address)
        accept = socket.socket.accept
        looks: list[float] = []

        def accept_late(self: socket.socket) -> Any:
            looks.append(time.monotonic())
            if looks[-1] < looks[0] + 0.3:
                raise OSError(EMFILE, os.strerror(EMFILE))
            return accept(self)

        monkeypatch.setattr(socket.socket, "accept", accept_late)
        with socket.create_connection(where(owner)) as sock:
            assert peer.lookup(keys_of([1, 9])).tolist() == [True, False]
            assert sock.recv(1)  # it was accepted in the end
        assert len(looks) < 20  # the thread did not spin

    def test_a_thread_that_fails_does_not_look_like_a_node_that_is_gone(
        self, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is registered may still be read, so readers must not use their blocks again."""
        with Node("owner", make_heap(), secret="a secret") as owner:
            peer = client.connect(owner.address)
            with monkeypatch.context() as patch:
                patch.setattr(owner._server, "_drop_late", lambda: 1 / 0)
                with suppress(Exception):
                    peer.lookup(keys_of([1]), timeout_s=0.2)
                assert until(lambda: owner.stats().num_clients == 0)
            key = channel_key(b"a secret")
            assert not probe(where(owner), key, "client", owner.uuid).is_gone
        assert probe(where(owner), key, "client", owner.uuid).is_gone

    def test_an_idle_connection_may_stay(self, owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server, "PATIENCE_S", 0.1)
        line, _ = call(where(owner), channel_key(b"a secret"), "x", 5)
        time.sleep(0.3)
        line.send(packed(kind="lookup", number=1, keys=keys_of([1])), Deadline(5))
        assert line.receive(Deadline(5))
        line.close()


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            continue
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def false_server(answer: Any) -> Iterator[str]:
    """A server that calls ``answer(sock)`` for each client."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                answer(sock)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


class TestWrongServers:
    def test_one_that_says_nothing(self, client: Any) -> None:
        gate = threading.Event()
        with false_server(lambda sock: gate.wait(10)) as address:
            with pytest.raises(PeerTimeoutError, match=r"has not answered in 0.2 s"):
                client.connect(address, timeout_s=0.2)
            gate.set()

    def test_one_that_hangs_up(self, client: Any) -> None:
        with false_server(lambda sock: None) as address, pytest.raises(PeerGoneError):
            client.connect(address)

    def test_one_of_another_kind(self, client: Any) -> None:
        with (
            false_server(lambda sock: sock.sendall(b"220 mail ready\r\n")) as address,
            pytest.raises(ProtocolError, match="no node sends b'220 mail"),
        ):
            client.connect(address)

    def test_one_of_another_version(
        self, client: Any, owner: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def answer(sock: socket.socket) -> None:
            frame = bytearray(frames.Outgoing(bytes(32), "server").frame(b"x"))
            frame[5] = 9
            sock.sendall(frame)

        with (
            false_server(answer) as address,
            pytest.raises(VersionMismatchError, match="version 9 of the protocol, this one"),
        ):
            client.connect(address)

    def test_damaged_metadata_never_reaches_nixl(
        self, client: Any, owner: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A relay that flips one bit of what the owner says, anywhere."""
        rng = random.Random(5)
        seen: list[bytes] = []
        add = type(client_agent(client)).add
        monkeypatch.setattr(
            type(client_agent(client)),
            "add",
            lambda self, metadata: seen.append(metadata) or add(self, metadata),
        )

        def answer(sock: socket.socket) -> None:
            sock.settimeout(2)
            with socket.create_connection(where(owner)) as there:
                there.settimeout(2)
                try:
                    sock.sendall(there.recv(1 << 16))
                    there.sendall(sock.recv(1 << 16))
                    welcome = bytearray(there.recv(1 << 16))
                    at = rng.randrange(12, len(welcome))
                    welcome[at] ^= 1 << rng.randrange(8)
                    sock.sendall(welcome)
                    sock.recv(1)
                except OSError:
                    return

        with false_server(answer) as address:
            for _ in range(20):
                with pytest.raises(AuthenticationError):
                    client.connect(address, timeout_s=5)
        assert not seen


def client_agent(node: Any) -> Any:
    return node._reader._agent


def test_a_node_does_not_connect_to_itself(client: Any) -> None:
    with pytest.raises(ValueError, match="where this node itself listens"):
        client.connect(client.address)


def test_nobody_listens(client: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(PeerGoneError, match=f"no node listens at 127.0.0.1:{port}"):
        client.connect(f"127.0.0.1:{port}")


def test_a_lookup_of_many_keys(client: Any, owner: Any) -> None:
    found = client.connect(owner.address).lookup([key_of(n) for n in range(65_536)])
    assert found.sum() == 4


def test_a_peer_that_hangs_up_while_it_ends_is_gone(client: Any) -> None:
    """A process that is killed may close the connections that wait before it stops to listen."""
    listener = socket.create_server(("127.0.0.1", 0))
    where = "127.0.0.1", listener.getsockname()[1]
    ask = AskLine(call_of(client), where, channel_key(b"a secret"), "client", "ending", "uuid")
    ask.close()

    def hang_up() -> None:
        for _ in range(3):
            sock, _ = listener.accept()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()  # resets it
        listener.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(PeerGoneError, match="'ending' is gone: nobody listens"):
        ask.ask("lookup", 5.0, keys=[b"a"])
    thread.join()


def call_of(client: Any) -> Any:
    """A connection that is only to be closed."""
    return call(where(client), channel_key(b"a secret"), "x", 5)[0]
