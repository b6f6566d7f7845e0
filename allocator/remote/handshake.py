"""How two nodes come to trust each other: each proves that it knows the secret.

The server sends a nonce, the client sends it back with one of its own, and both derive the key of
this connection. So nothing that was recorded earlier is accepted, and metadata for NIXL is parsed
only if a holder of the secret has sent it on this connection.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from dataclasses import dataclass

from kvheap.addresses.block_runs import MemorySegment
from kvheap.blocks.block_layout import BlockLayout
from kvheap.remote.deadlines import Deadline
from kvheap.remote.errors import ProtocolError
from kvheap.remote.frames import MAX_FRAME_BYTES, Incoming, Outgoing
from kvheap.remote.line import Line
from kvheap.remote.messages import Fields, packed, unpacked

__all__ = ["NONCE_BYTES", "ServerHandshake", "Welcome", "call", "channel_key"]

NONCE_BYTES = 16
KNOWN_TO_ALL = b"kvheap: no secret, on loopback"


def channel_key(secret: bytes | None) -> bytes:
    """The key of the first frames."""
    return hmac.digest(secret or KNOWN_TO_ALL, b"kvheap.remote", "sha256")


def _session_key(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(key, server_nonce + client_nonce, "sha256")


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a node says of itself.

    Attributes:
        name: the node's name.
        uuid: of this life of it.
        agent: the name of its NIXL agent.
        metadata: of that agent, for NIXL.
        segments: the heap's buffers in its memory.
        device: where they are: ``cpu`` or ``cuda``, and the number of the GPU.
        layout: what its blocks hold, if it knows.
    """

    name: str
    uuid: str
    agent: str
    metadata: bytes
    segments: tuple[MemorySegment, ...]
    device: tuple[str, int]
    layout: BlockLayout | None

    @classmethod
    def of(cls, fields: Fields) -> Welcome:
        """From a message.

        Raises:
            ProtocolError: a value cannot be.
        """
        kind = fields.text("kind")
        if kind not in ("cpu", "cuda"):
            raise ProtocolError(f"kind must be cpu or cuda, got {kind!r}")
        return cls(
            fields.text("name"),
            fields.text("uuid"),
            fields.text("agent"),
            fields.data("metadata"),
            fields.segments(),
            (kind, fields.integer("device")),
            fields.layout(),
        )


class ServerHandshake:
    """The server's side: makes the greeting, and checks the hello."""

    __slots__ = ("_key", "_nonce", "incoming", "outgoing")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self.incoming = Incoming(key, "client")
        self.outgoing = Outgoing(key, "server")

    def greeting(self) -> bytes:
        """The first frame."""
        return self.outgoing.frame(packed(nonce=self._nonce))

    def accept(self, payload: bytes) -> str:
        """Check a hello; frames have the key of the connection from now on.

        Returns:
            The client's name.

        Raises:
            ProtocolError: it does not answer the greeting.
        """
        hello = unpacked(payload)
        if not hmac.compare_digest(hello.data("echo"), self._nonce):
            raise ProtocolError("a hello answers another greeting")
        name, nonce = hello.text("name"), hello.data("nonce", NONCE_BYTES)
        key = _session_key(self._key, self._nonce, nonce)
        self.incoming.rekey(key, MAX_FRAME_BYTES)
        self.outgoing.rekey(key)
        return name


def call(address: tuple[str, int], key: bytes, name: str, timeout_s: float) -> tuple[Line, Welcome]:
    """Connect to a node.

    Args:
        address: host and port.
        key: by :func:`channel_key`.
        name: the name of the node that calls.
        timeout_s: for everything.

    Returns:
        The connection, and what the node says of itself.

    Raises:
        PeerTimeoutError: it has not answered in time.
        ProtocolError: it is no node, or one of another version or with another secret.
        OSError: nobody listens there, or the network fails.
    """
    deadline = Deadline(timeout_s)
    sock = socket.create_connection(address, max(deadline.left_s, 1e-3))
    line = Line(
        sock, Incoming(key, "server"), Outgoing(key, "client"), f"{address[0]}:{address[1]}"
    )
    try:
        greeting = unpacked(line.receive(deadline))
        there, here = greeting.data("nonce", NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
        line.send(packed(nonce=here, echo=there, name=name), deadline)
        session = _session_key(key, there, here)
        line.rekey(session, MAX_FRAME_BYTES)
        return line, Welcome.of(unpacked(line.receive(deadline)))
    except BaseException:
        line.close()
        raise
