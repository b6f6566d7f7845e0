"""Columns of numbers in JSON: short ones as lists, long ones compressed."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SnapshotError", "decoded", "encoded"]

LISTED = 256
"""Columns of up to so many numbers are lists, which people can read."""

DTYPES = ("<i8", "<i4", "|u1", "<f8")


class SnapshotError(ValueError):
    """A file is no snapshot, or is damaged; the message says what is wrong."""


def encoded(column: npt.NDArray[Any]) -> Any:
    """A column as JSON: a list, or ``{"dtype", "zlib"}`` with little-endian bytes in base64."""
    if len(column) <= LISTED and column.dtype.kind != "f":
        return column.tolist()
    packed = column.astype(column.dtype.newbyteorder("<"))
    return {
        "dtype": packed.dtype.str,
        "zlib": base64.b64encode(zlib.compress(packed.tobytes(), 6)).decode(),
    }


def decoded(name: str, column: Any, dtype: str, length: int) -> npt.NDArray[Any]:
    """The numbers of a column.

    Args:
        name: of the column, for messages.
        column: what :func:`encoded` returned.
        dtype: which numbers are expected.
        length: how many of them; no more are unpacked.

    Raises:
        SnapshotError: the column is damaged.
    """
    if isinstance(column, list):
        if not all(type(number) is int for number in column):
            raise SnapshotError(f"{name} must be integers, got {str(column)[:80]}")
        try:
            found = np.array(column, dtype)
        except (OverflowError, ValueError) as error:
            raise SnapshotError(f"{name} has a number that does not fit: {error}") from None
    else:
        if not isinstance(column, dict) or column.get("dtype") != dtype:
            raise SnapshotError(f"{name} must be a column of {dtype}, got {str(column)[:80]}")
        found = np.frombuffer(_unpacked(name, column, length * np.dtype(dtype).itemsize), dtype)
    if len(found) != length:
        raise SnapshotError(f"{name} must have {length} numbers, got {len(found)}")
    return found


def _unpacked(name: str, column: dict[str, Any], num_bytes: int) -> bytes:
    """The bytes of a column, which must be exactly so many."""
    try:
        packed = base64.b64decode(column.get("zlib", ""), validate=True)
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(packed, num_bytes + 1)
    except (zlib.error, binascii.Error, TypeError, ValueError) as error:
        raise SnapshotError(f"{name} is damaged: {error}") from None
    if len(data) != num_bytes or not unpacking.eof:
        raise SnapshotError(f"{name} is damaged: it must have {num_bytes} bytes")
    return data
