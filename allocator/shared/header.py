"""The header of a segment: what it is for, which never changes, and who owns it, which does."""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.shared.errors import SegmentDamagedError, SegmentMismatchError
from kvheap.shared.geometry import HEADER_BYTES, STATE_BYTES, Geometry

__all__ = ["FORMAT_VERSION", "OwnerState", "decode_header", "encode_header", "require_identity"]

MAGIC = b"kvheap segment\0\0"
FORMAT_VERSION = 1

START = struct.Struct("<16sIIQ")
"""Magic, version, CRC-32 of the text, and its bytes."""

EPOCH, PID, MAX_PROBES, SOCKET, BOOT = 0, 1, 2, 4, 8
"""Numbers of the words of the state; the socket's name has two, and the boot five."""

SOCKET_BYTES, BOOT_BYTES = 16, 40


def encode_header(identity: Mapping[str, object], geometry: Geometry) -> bytes:
    """The part of a header that never changes.

    Raises:
        ValueError: the identity is too long.
    """
    text = json.dumps(
        {
            "identity": dict(identity),
            "num_places": geometry.num_places,
            "chunk_bytes": geometry.chunk_bytes,
            "place_bytes": geometry.place_bytes,
            "file_bytes": geometry.file_bytes,
        }
    ).encode()
    most = HEADER_BYTES - STATE_BYTES - START.size
    if len(text) > most:
        raise ValueError(
            f"namespace and layout must take at most {most} bytes in the header, got {len(text)}: "
            f"use a hash of the namespace"
        )
    return START.pack(MAGIC, FORMAT_VERSION, zlib.crc32(text), len(text)) + text


def decode_header(path: str, raw: bytes, file_bytes: int) -> tuple[dict[str, Any], Geometry]:
    """The identity and the geometry that a file says it has.

    Args:
        path: of the file, for messages.
        raw: the last bytes of the file.
        file_bytes: of the file.

    Raises:
        SegmentDamagedError: the file is no segment, or not a whole one.
        SegmentMismatchError: it is one of another version.
    """
    if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
        raise SegmentDamagedError(
            path, f"with its {file_bytes} bytes is no segment of kvheap, or was cut off"
        )
    _, version, crc, length = START.unpack_from(raw)
    if version != FORMAT_VERSION:
        raise SegmentMismatchError(path, "format_version", version, FORMAT_VERSION)
    text = raw[START.size : START.size + length]
    if length > HEADER_BYTES - STATE_BYTES or zlib.crc32(text) != crc:
        raise SegmentDamagedError(path, "has a damaged header")
    found = json.loads(text)
    geometry = Geometry(
        found["num_places"], found["chunk_bytes"], found["place_bytes"], found["file_bytes"]
    )
    if geometry.file_bytes != file_bytes:
        raise SegmentDamagedError(
            path, f"has {file_bytes} bytes instead of {geometry.file_bytes}: it was cut off"
        )
    return dict(found["identity"]), geometry


def require_identity(path: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raise unless a segment is for what it is to be used for.

    Raises:
        SegmentMismatchError: names what differs.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise SegmentMismatchError(path, name, found.get(name), value)


class OwnerState:
    """The part of the header that changes, in shared memory. Only the owner writes it.

    Args:
        page: its bytes, uint8 ``[STATE_BYTES]``.
    """

    def __init__(self, page: npt.NDArray[np.uint8]) -> None:
        self._bytes = memoryview(page)  # type: ignore[arg-type]  # an array is a Buffer
        self._words = self._bytes.cast("Q")

    @property
    def epoch(self) -> int:
        """How many owners there have been."""
        return self._words[EPOCH]

    @property
    def pid(self) -> int | None:
        """The process that owns the segment, or did; None: none yet, or it has closed it."""
        return self._words[PID] or None

    @property
    def max_probes(self) -> int:
        """How many buckets behind its own a key may be in."""
        return self._words[MAX_PROBES]

    @max_probes.setter
    def max_probes(self, value: int) -> None:
        self._words[MAX_PROBES] = value

    @property
    def socket_name(self) -> str:
        """Where the owner takes requests: an abstract name, which leaves no file behind."""
        at = SOCKET * 8
        return f"\0kvheap-{self._bytes[at : at + SOCKET_BYTES].hex()}"

    @property
    def boot(self) -> str:
        """In which boot of the machine the last owner began."""
        at = BOOT * 8
        return bytes(self._bytes[at : at + BOOT_BYTES]).rstrip(b"\0").decode("ascii", "replace")

    def begin(self, boot: str) -> None:
        """Become the owner, which needs the segment's lock."""
        self._words[EPOCH] += 1  # first: what was agreed with the owner before is void
        self._words[PID] = os.getpid()
        at = SOCKET * 8
        self._bytes[at : at + SOCKET_BYTES] = uuid.uuid4().bytes
        at = BOOT * 8
        self._bytes[at : at + BOOT_BYTES] = boot.encode("ascii", "replace")[:BOOT_BYTES].ljust(
            BOOT_BYTES, b"\0"
        )

    def end(self) -> None:
        """Note that the owner has closed it."""
        self._words[PID] = 0
