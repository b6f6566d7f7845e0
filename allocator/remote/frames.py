"""Frames of the control channel: bounded, and authenticated before anything else looks at them.

A frame is a header (magic, version, length of the payload), 32 bytes of HMAC-SHA256 and the
payload. The code covers the direction, the number of the frame and the payload, so that no frame
can be changed, repeated, left out or sent back. Without a secret its key is known to all, and it
finds damage only.

No input or output here: bytes in, payloads out.
"""

from __future__ import annotations

import hmac
import struct
from typing import Literal

from kvheap.remote.errors import AuthenticationError, ProtocolError, VersionMismatchError

__all__ = ["MAX_FRAME_BYTES", "MAX_HELLO_BYTES", "VERSION", "Incoming", "Outgoing", "Side"]

VERSION = 2
"""Of the protocol. The header keeps its form in all versions."""

MAGIC = b"KVHR"
HEADER = struct.Struct(">4sHHI")
"""Magic, version, zero, bytes of the payload."""

CODE_BYTES = 32
COUNTED = struct.Struct(">cQ")

MAX_HELLO_BYTES = 16 << 10
"""Longest payload before the other side has shown that it knows the secret."""

MAX_FRAME_BYTES = 64 << 20
"""Longest payload afterwards: 65,536 keys of 511 bytes are 34 MB."""

Side = Literal["client", "server"]


def _code(key: bytes, side: Side, number: int, payload: bytes | memoryview) -> bytes:
    code = hmac.new(key, COUNTED.pack(side[:1].encode(), number), "sha256")
    code.update(payload)
    return code.digest()


class Outgoing:
    """Makes the frames of one direction.

    Args:
        key: of the code.
        side: who sends.
    """

    __slots__ = ("_key", "_number", "_side")

    def __init__(self, key: bytes, side: Side) -> None:
        self._key = key
        self._side: Side = side
        self._number = 0

    def rekey(self, key: bytes) -> None:
        """Use another key from the next frame on."""
        self._key = key

    def frame(self, payload: bytes) -> bytes:
        """The next frame."""
        code = _code(self._key, self._side, self._number, payload)
        self._number += 1
        return HEADER.pack(MAGIC, VERSION, 0, len(payload)) + code + payload


class Incoming:
    """Takes the frames of one direction apart.

    Args:
        key: of the code.
        side: who sends.
        max_bytes: longest payload that is accepted.
    """

    __slots__ = ("_buffer", "_key", "_number", "_side", "max_bytes")

    def __init__(self, key: bytes, side: Side, max_bytes: int = MAX_HELLO_BYTES) -> None:
        self._key = key
        self._side: Side = side
        self._number = 0
        self._buffer = bytearray()
        self.max_bytes = max_bytes

    def rekey(self, key: bytes, max_bytes: int) -> None:
        """Expect another key, and another limit, from the next frame on."""
        self._key = key
        self.max_bytes = max_bytes

    def feed(self, data: bytes) -> None:
        """Take bytes that have arrived."""
        self._buffer += data

    @property
    def is_partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)

    def next(self) -> bytes | None:
        """The payload of the next frame; None if it has not arrived as a whole.

        Raises:
            ProtocolError: this is no frame, or one too large; nothing more can be read.
            VersionMismatchError: it is of another version.
            AuthenticationError: its code is wrong.
        """
        buffer = self._buffer
        if len(buffer) < HEADER.size:
            if not MAGIC.startswith(bytes(buffer[:4])[: len(MAGIC)]) and buffer:
                raise ProtocolError(f"no node sends {bytes(buffer[:4])!r}")
            return None
        magic, version, zero, size = HEADER.unpack_from(buffer)
        if magic != MAGIC or zero:
            raise ProtocolError(f"no node sends {bytes(buffer[: HEADER.size])!r}")
        if version != VERSION:
            raise VersionMismatchError(
                f"the other node speaks version {version} of the protocol, this one version "
                f"{VERSION}: use one version of kvheap"
            )
        if size > self.max_bytes:
            raise ProtocolError(f"a frame has {size} bytes, at most {self.max_bytes} are allowed")
        start = HEADER.size + CODE_BYTES
        if len(buffer) < start + size:
            return None
        code = bytes(buffer[HEADER.size : start])
        with memoryview(buffer) as view:
            payload = bytes(view[start : start + size])
        if not hmac.compare_digest(code, _code(self._key, self._side, self._number, payload)):
            raise AuthenticationError(
                "a frame was not written by a node with the same secret, or was damaged"
            )
        self._number += 1
        del buffer[: start + size]
        return payload
