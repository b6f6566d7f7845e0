"""The binary form of metadata: a few named values, and arrays of integers in as few bytes as fit.

========  =======================================================================================
bytes     contents, little-endian
========  =======================================================================================
4         ``KVHM``
1         the version of the form, 1
1         number of arrays
4         length of the values
...       the values: JSON, UTF-8, with the name of the metadata's class as ``__type__``
each      an array: its length (8), first value, unit and lowest step (8 each), width (1), steps
8         BLAKE2b of all bytes before
========  =======================================================================================

An array is kept as steps from each value to the next: the steps are divided by a unit that divides
them all, counted from the lowest one, and written with 1, 2, 4 or 8 bytes each, or 0 if they are
equal and another array says how many there are. So the runs of a batch in address order, whose
addresses are multiples of a block, mostly take one byte each.

What is read is no larger in memory than 8 bytes for each byte, or a known length: a few damaged or
forged bytes cannot ask for gigabytes. The hash finds damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvheap.addresses.extents import Int64Array

__all__ = ["packed", "unpacked"]

MAGIC = b"KVHM"
VERSION = 1
HASH_BYTES = 8
HEAD = struct.Struct("<4sBBI")
ARRAY = struct.Struct("<QqqqB")
WIDTHS = {0: "u1", 1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}

MAX_ARRAYS = 255


def packed(kind: str, values: Mapping[str, Any], arrays: Sequence[Int64Array]) -> bytes:
    """The bytes of values and arrays.

    Args:
        kind: the name of the metadata's class.
        values: what JSON can hold.
        arrays: int64 ``[N]`` each. The second one may be read only with the length of the first.

    >>> data = packed("Runs", {"size": 64}, [np.arange(0, 64000, 64), np.ones(1000, np.int64)])
    >>> len(data), unpacked("Runs", data)[1][0][:3]
    (1112, array([  0,  64, 128]))
    """
    text = json.dumps({"__type__": kind, **values}, separators=(",", ":")).encode()
    parts = [HEAD.pack(MAGIC, VERSION, len(arrays), len(text)), text]
    for number, array in enumerate(arrays):
        parts.append(_packed_array(array, at_least=0 if number == 1 else 1))
    data = b"".join(parts)
    return data + _hash(data)


def unpacked(kind: str, data: bytes | bytearray | memoryview) -> tuple[dict[str, Any], list[Any]]:
    """The inverse of :func:`packed`.

    Args:
        kind: the name of the metadata's class, for messages.
        data: the bytes.

    Returns:
        The values, and the arrays, int64 ``[N]`` each.

    Raises:
        TypeError: ``data`` is not bytes.
        ValueError: they are damaged, of another version, or not made by :func:`packed`.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"the bytes of a {kind} must be bytes, got {data!r}")
    data = bytes(data)
    if len(data) < HEAD.size + HASH_BYTES or not data.startswith(MAGIC):
        raise ValueError(f"these {len(data)} bytes are no {kind}: they begin with {data[:4]!r}")
    _, version, num_arrays, num_values = HEAD.unpack_from(data)
    if version != VERSION:
        raise ValueError(
            f"the bytes of a {kind} are of version {version}, but this kvheap reads version "
            f"{VERSION} only"
        )
    body = data[:-HASH_BYTES]
    if _hash(body) != data[-HASH_BYTES:]:
        raise ValueError(f"the {len(data)} bytes of a {kind} are damaged: their hash is another")
    at = HEAD.size + num_values
    try:
        values = json.loads(body[HEAD.size : at])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the values of a {kind} are not JSON: {error}") from None
    if not isinstance(values, dict) or at > len(body):
        raise ValueError(f"the values of a {kind} must be a dict, got {values!r}")
    arrays: list[Int64Array] = []
    for number in range(num_arrays):
        known = len(arrays[0]) if number == 1 else None
        array, at = _unpacked_array(kind, body, at, known)
        arrays.append(array)
    if at != len(body):
        raise ValueError(f"the bytes of a {kind} go on for {len(body) - at} behind their end")
    return values, arrays


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def _packed_array(array: Int64Array, at_least: int) -> bytes:
    if not len(array):
        return ARRAY.pack(0, 0, 1, 0, at_least)
    steps = np.diff(array)
    unit = int(np.gcd.reduce(steps)) or 1 if len(steps) else 1
    steps //= unit
    lowest = int(steps.min()) if len(steps) else 0
    codes = steps.view(np.uint64) - np.uint64(lowest % (1 << 64))
    largest = int(codes.max()) if len(codes) else 0
    width = next(each for each in WIDTHS if each >= at_least and largest < 1 << 8 * each)
    head = ARRAY.pack(len(array), int(array[0]), unit, lowest, width)
    return head + (codes.astype(WIDTHS[width]).tobytes() if width else b"")


def _unpacked_array(kind: str, body: bytes, at: int, known: int | None) -> tuple[Int64Array, int]:
    if len(body) - at < ARRAY.size:
        raise ValueError(f"an array of a {kind} is cut off at byte {at}")
    length, first, unit, lowest, width = ARRAY.unpack_from(body, at)
    at += ARRAY.size
    num_steps = max(length - 1, 0)
    if width not in WIDTHS or (not width and length != known):
        raise ValueError(f"an array of a {kind} has {length} values in {width} bytes each")
    if num_steps * width > len(body) - at:
        raise ValueError(
            f"an array of a {kind} has {length} values of {width} bytes, but only "
            f"{len(body) - at} bytes follow"
        )
    array = np.empty(length, np.int64)
    if length:
        array[0] = first
        codes = np.frombuffer(body, WIDTHS[width], num_steps * bool(width), at).astype(np.uint64)
        steps = (codes + np.uint64(lowest % (1 << 64))).view(np.int64) if width else lowest
        array[1:] = steps
        array[1:] *= unit
        np.cumsum(array, out=array)  # what is out of range wraps around, and is refused as a run
    return array, at + num_steps * width
