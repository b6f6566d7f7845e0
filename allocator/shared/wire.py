"""The messages between the owner of a segment and processes that have chunks stored.

A message is its length, a kind, and a body of little-endian numbers and keys. No pickle.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

from kvheap.shared.chunk_table import MAX_KEY_BYTES
from kvheap.shared.keeper import Filled, Ticket

__all__ = [
    "LENGTH",
    "MAX_MESSAGE_BYTES",
    "Kind",
    "decode_filled",
    "decode_keys",
    "decode_ticket",
    "encode_filled",
    "encode_keys",
    "encode_ticket",
    "framed",
]

LENGTH = struct.Struct("<I")
NUMBER = struct.Struct("<Q")
FILLED = struct.Struct("<QQI")

MAX_MESSAGE_BYTES = 16 << 20


class Kind(IntEnum):
    """What a message is."""

    DONE = 0
    FAILED = 1
    BEGIN = 2
    PUBLISH = 3
    ABORT = 4
    REMOVE = 5
    REPORT = 6
    CLOSING = 7


def framed(kind: Kind, body: bytes) -> bytes:
    """A message.

    Raises:
        ValueError: it is too long.
    """
    if len(body) >= MAX_MESSAGE_BYTES:
        raise ValueError(f"keys must take less than {MAX_MESSAGE_BYTES} bytes, got {len(body)}")
    return LENGTH.pack(1 + len(body)) + bytes([kind]) + body


def encode_keys(keys: Sequence[bytes]) -> bytes:
    """Keys."""
    count = len(keys)
    return LENGTH.pack(count) + struct.pack(f"<{count}H", *map(len, keys)) + b"".join(keys)


def decode_keys(body: bytes) -> list[bytes]:
    """Keys, each once.

    Raises:
        ValueError: they are none.
    """
    (count,) = _unpacked("<I", body)
    lengths = _unpacked(f"<{count}H", body, LENGTH.size)
    at = LENGTH.size + 2 * count
    keys = []
    for length in lengths:
        keys.append(body[at : at + length])
        at += length
    is_right = at == len(body) and len(set(keys)) == count
    if not is_right or (lengths and not 0 < min(lengths) <= max(lengths) <= MAX_KEY_BYTES):
        raise ValueError(f"a message of {len(body)} bytes does not hold {count} keys")
    return keys


def encode_ticket(ticket: Ticket) -> bytes:
    """A ticket."""
    return NUMBER.pack(ticket.number) + struct.pack(f"<{len(ticket.places)}q", *ticket.places)


def decode_ticket(body: bytes) -> Ticket:
    """A ticket.

    Raises:
        ValueError: it is none.
    """
    count = (len(body) - NUMBER.size) // 8
    return Ticket(_unpacked("<Q", body)[0], list(_unpacked(f"<{count}q", body, NUMBER.size)))


def encode_filled(number: int, filled: Sequence[Filled]) -> bytes:
    """Chunks of a store that are complete."""
    packed = [FILLED.pack(each.place, each.digest, each.num_tokens) for each in filled]
    return NUMBER.pack(number) + b"".join(packed)


def decode_filled(body: bytes) -> tuple[int, list[Filled]]:
    """The number of a store, and chunks of it that are complete.

    Raises:
        ValueError: it is not that.
    """
    rest = body[NUMBER.size :]
    if len(rest) % FILLED.size:
        raise ValueError(f"a message of {len(body)} bytes does not hold chunks")
    return _unpacked("<Q", body)[0], [Filled(*each) for each in FILLED.iter_unpack(rest)]


def _unpacked(form: str, body: bytes, at: int = 0) -> tuple[int, ...]:
    try:
        return struct.unpack_from(form, body, at)
    except struct.error as error:
        raise ValueError(f"a message of {len(body)} bytes is cut off: {error}") from None
