"""What nodes tell each other, as msgpack maps; every value of the other side is checked.

=========  ======================================  =========================================
message    fields                                  answer
=========  ======================================  =========================================
greeting   nonce                                   hello
hello      nonce, echo, name                       welcome
welcome    name, uuid, agent, metadata, segments,
           device, layout
lookup     keys                                    found: a byte for each key; layout
lock       keys, ttl, lease                        missing; or lease, ttl, layout, and the
                                                   blocks as absolute runs
lease      keys, ttl, lease                        found; and the same for those
unlock     lease                                   none
offer      keys, name, address                     taken
=========  ======================================  =========================================

The reader chooses the number of a lease: if it does not get the answer, it can give the lease back
none the less. Keys are a list; or, if all have one length, joined, with their length as
``key_bytes``. Requests have a number, which the answer repeats. An answer may be an error instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from kvheap.addresses.block_runs import BlockRuns, MemorySegment
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.metadata_reader import Reader
from kvheap.interrupts import is_interrupt
from kvheap.remote.errors import ProtocolError
from kvheap.remote.packages import need_msgpack

__all__ = [
    "MAX_KEYS",
    "MAX_KEY_BYTES",
    "Fields",
    "KeyList",
    "as_keys",
    "key_fields",
    "layout_fields",
    "new_lease_number",
    "packed",
    "unpacked",
]

T = TypeVar("T")

MAX_KEYS = 1 << 16
"""Keys of one request."""

MAX_KEY_BYTES = 511
"""Bytes of a key, as in a ``FileTier``."""

MAX_SEGMENTS = 1024

LEASE_NUMBER_BITS = 63
"""Whoever does not have a lease cannot name it, and so not end it. It is not bound to a connection:
one may break, and a reader takes leases on one and gives them back on another."""


def packed(**fields: Any) -> bytes:
    """A message as bytes."""
    found: bytes = need_msgpack().packb(fields, use_bin_type=True)
    return found


def unpacked(payload: bytes) -> Fields:
    """The fields of a message, whose values are still to be checked.

    Raises:
        ProtocolError: it is no message.
    """
    try:
        fields = need_msgpack().unpackb(payload, raw=False, strict_map_key=True)
    except Exception as error:
        if is_interrupt(error):
            raise
        raise ProtocolError(f"a message cannot be read: {error!r}") from None
    if type(fields) is not dict:
        raise ProtocolError(f"a message must be a map, got a {type(fields).__name__}")
    return Fields(fields)


class Fields:
    """The fields of a message; every method raises ``ProtocolError`` for what cannot be."""

    __slots__ = ("_fields",)

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __contains__(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self._fields

    def text(self, name: str, max_length: int = 1024) -> str:
        """A text."""
        found = self._of(name, str)
        if len(found) > max_length:
            raise ProtocolError(f"{name} has {len(found)} characters, at most {max_length}")
        return found

    def data(self, name: str, size: int | None = None) -> bytes:
        """Bytes, ``size`` of them if given."""
        found = self._of(name, bytes)
        if size is not None and len(found) != size:
            raise ProtocolError(f"{name} must have {size} bytes, got {len(found)}")
        return found

    def integer(self, name: str) -> int:
        """An integer of 0 to 2**63 - 1."""
        found = self._of(name, int)
        if not 0 <= found < 1 << 63:
            raise ProtocolError(f"{name} must be an integer of 63 bits, got {found}")
        return found

    def seconds(self, name: str) -> float:
        """A positive finite number."""
        found = self._of(name, float)
        if not 0 < found < float("inf"):
            raise ProtocolError(f"{name} must be a positive number of seconds, got {found}")
        return found

    def keys(self) -> list[bytes]:
        """Keys, as :func:`key_fields` has written them."""
        if type(self._fields.get("keys")) is not bytes:
            try:
                return as_keys(self._of("keys", list))
            except (TypeError, ValueError) as error:
                raise ProtocolError(str(error)) from None
        joined, size = self.data("keys"), self.integer("key_bytes")
        if not 0 < size <= MAX_KEY_BYTES or len(joined) % size:
            raise ProtocolError(f"{len(joined)} bytes are no keys of {size} bytes each")
        if len(joined) > MAX_KEYS * size:
            raise ProtocolError(
                f"keys must be at most {MAX_KEYS} a call, got {len(joined) // size}"
            )
        if not joined:
            return []
        found: list[bytes] = np.frombuffer(joined, f"V{size}").tolist()
        return found

    def array(self, name: str) -> Int64Array:
        """Integers, int64 ``[N]``."""
        found = self.data(name)
        if len(found) % 8:
            raise ProtocolError(f"{name} must be of 8 bytes each, got {len(found)} bytes")
        return np.frombuffer(found, "<i8").astype(np.int64)

    def runs(self) -> BlockRuns:
        """Blocks of the other machine."""
        runs = BlockRuns(
            self.array("starts"),
            self.array("counts"),
            self.integer("size_bytes"),
            self.integer("block_bytes"),
        )
        try:
            return runs.checked()
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"the peer's blocks cannot be: {error}") from None

    def segments(self) -> tuple[MemorySegment, ...]:
        """The buffers of the other heap."""
        rows = self._of("segments", list)
        if not 0 < len(rows) <= MAX_SEGMENTS:
            raise ProtocolError(f"segments must be 1 to {MAX_SEGMENTS}, got {len(rows)}")
        found = []
        for row in rows:
            if type(row) is not list or [*map(type, row)] != [int, int, int] or min(row) < 0:
                raise ProtocolError(f"a segment must be three sizes, got {row!r}")
            found.append(MemorySegment(*row))
        return tuple(found)

    def layout(self) -> BlockLayout | None:
        """What blocks of the other heap hold; None if it has not said so."""
        fields = self._fields.get("layout")
        if fields is None:
            return None
        try:
            read = Reader("layout", fields)
            return BlockLayout.of(read.shapes("shapes"), read.dtypes("dtypes"), read.fmt("fmt"))
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the layout of the peer's blocks cannot be: {error}") from None

    def _of(self, name: str, kind: type[T]) -> T:
        found = self._fields.get(name)
        if type(found) is not kind:
            raise ProtocolError(f"{name} must be of type {kind.__name__}, got {found!r:.80}")
        return found


def new_lease_number() -> int:
    """The number of a lease that is asked for."""
    return secrets.randbits(LEASE_NUMBER_BITS) or 1  # 0 would be none


def layout_fields(layout: BlockLayout | None) -> dict[str, Any] | None:
    """A layout as a message has it."""
    if layout is None:
        return None
    return {
        "shapes": [list(shape) for shape in layout.shapes],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in layout.dtypes],
        "fmt": layout.fmt.value,
    }


class KeyList(list[bytes]):
    """Keys that have been checked.

    Attributes:
        key_bytes: the length of each; None if they differ, or there are none.
    """

    __slots__ = ("key_bytes",)

    def __init__(self, keys: Iterable[bytes], key_bytes: int | None) -> None:
        super().__init__(keys)
        self.key_bytes = key_bytes


def key_fields(keys: Sequence[bytes]) -> dict[str, Any]:
    """Keys as a message has them: joined if they have one length, which both sides do faster."""
    size = keys.key_bytes if isinstance(keys, KeyList) else None
    return {"keys": keys} if size is None else {"keys": b"".join(keys), "key_bytes": size}


def as_keys(keys: Iterable[Any] | Sequence[Any]) -> KeyList:
    """Keys as a list.

    Raises:
        TypeError: one is not bytes.
        ValueError: there are too many, or one is empty or too long.
    """
    found = KeyList(keys, None)
    if len(found) > MAX_KEYS:
        raise ValueError(f"keys must be at most {MAX_KEYS} a call, got {len(found)}")
    if [*map(type, found)].count(bytes) < len(found):
        wrong = next(key for key in found if type(key) is not bytes)
        raise TypeError(f"a key must be bytes, got {wrong!r}")
    lengths = [*map(len, found)]
    if found and lengths.count(lengths[0]) == len(found):
        found.key_bytes = lengths[0]
        lengths = lengths[:1]
    if found and (min(lengths) < 1 or max(lengths) > MAX_KEY_BYTES):
        wrong = next(key for key in found if not 1 <= len(key) <= MAX_KEY_BYTES)
        raise ValueError(
            f"a key must have 1 to {MAX_KEY_BYTES} bytes, got {len(wrong)} in {wrong[:40]!r}: hash "
            f"longer ones"
        )
    return found
