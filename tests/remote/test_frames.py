"""Frames: what is damaged, repeated, too large or of strangers is refused before it is read."""

from __future__ import annotations

import random

import pytest

from kvheap.remote.endpoints import as_secret, endpoint_of, is_loopback, require_secret
from kvheap.remote.errors import AuthenticationError, ProtocolError, VersionMismatchError
from kvheap.remote.frames import VERSION, Incoming, Outgoing

KEY = b"k" * 32


def payloads(incoming: Incoming, data: bytes, step: int = 1 << 20) -> list[bytes]:
    found = []
    for start in range(0, len(data), step):
        incoming.feed(data[start : start + step])
        found += [*iter(incoming.next, None)]
    return found


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_payloads_arrive_whole_and_in_order(step: int) -> None:
    sent = [b"", b"a", bytes(1000), b"end"]
    outgoing, incoming = Outgoing(KEY, "client"), Incoming(KEY, "client")
    data = b"".join(map(outgoing.frame, sent))
    assert payloads(incoming, data, step) == sent
    assert not incoming.is_partial


def test_every_damaged_byte_is_found() -> None:
    data = bytearray(Outgoing(KEY, "client").frame(b"some payload"))
    rng = random.Random(1)
    for at in range(len(data)):
        damaged = data.copy()
        damaged[at] ^= 1 << rng.randrange(8)
        incoming = Incoming(KEY, "client")
        try:
            assert payloads(incoming, bytes(damaged)) == []  # a longer one is waited for
            assert incoming.is_partial
            assert 8 <= at < 12
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    "frames",
    [
        lambda one, two: two + one,
        lambda one, two: one + one,
        lambda one, two: two,
    ],
    ids=["swapped", "repeated", "left out"],
)
def test_frames_have_their_place(frames: object) -> None:
    outgoing = Outgoing(KEY, "client")
    one, two = outgoing.frame(b"one"), outgoing.frame(b"two")
    with pytest.raises(AuthenticationError):
        payloads(Incoming(KEY, "client"), frames(one, two))  # type: ignore[operator]


def test_frames_have_their_direction_and_key() -> None:
    frame = Outgoing(KEY, "client").frame(b"one")
    for incoming in (Incoming(KEY, "server"), Incoming(b"x" * 32, "client")):
        with pytest.raises(AuthenticationError):
            payloads(incoming, frame)


def test_a_frame_of_another_version_is_named() -> None:
    frame = bytearray(Outgoing(KEY, "client").frame(b"one"))
    frame[5] = VERSION + 1
    with pytest.raises(VersionMismatchError, match=f"version {VERSION + 1}.*version {VERSION}"):
        payloads(Incoming(KEY, "client"), bytes(frame))


def test_a_large_frame_is_refused_by_its_header() -> None:
    incoming = Incoming(KEY, "client", max_bytes=100)
    with pytest.raises(ProtocolError, match="101 bytes, at most 100"):
        payloads(incoming, Outgoing(KEY, "client").frame(bytes(101))[:12])


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\0", b"KVHX" + bytes(8), b"SSH-2.0"])
def test_what_is_no_frame_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="no node sends"):
        payloads(Incoming(KEY, "client"), data)


class TestAddresses:
    @pytest.mark.parametrize(
        "text", ["", "7000", "127.0.0.1", "127.0.0.1:", ":7000", "::1:7000", "a:70000", "a:-1"]
    )
    def test_what_is_no_address_is_named(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"bind must be host:port.*got"):
            endpoint_of("bind", text)

    def test_others_than_loopback_need_a_secret(self) -> None:
        for host in ("0.0.0.0", "::", "10.0.0.1", "a-host", "127.0.0.1.example.org"):
            assert not is_loopback(host)
            with pytest.raises(ValueError, match="not loopback: pass a secret"):
                require_secret("bind", host, None)
            require_secret("bind", host, b"s")
        for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
            require_secret("bind", host, None)

    def test_secrets(self) -> None:
        assert as_secret("s") == as_secret(b"s") == b"s"
        assert as_secret(None) is None
        with pytest.raises(ValueError, match="empty"):
            as_secret("")
        with pytest.raises(TypeError, match="secret must be bytes"):
            as_secret(7)
