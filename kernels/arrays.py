"""Integer arrays of addresses, sizes and slots: their type, their checks, and their alignment.

Imports NumPy only.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "INT32_END",
    "INT64_END",
    "MAX_ACCESS_BYTES",
    "Int64Array",
    "alignment_of",
    "as_array",
    "combined_bits",
    "int64_array",
    "require_all",
]

Int64Array: TypeAlias = npt.NDArray[np.int64]

INT64 = np.dtype(np.int64)

INT32_END = 1 << 31
"""Kernels count programs, rows and slots with signed 32-bit integers, which divide faster."""

INT64_END = 1 << 63
"""The first integer that int64 cannot hold."""

MAX_ACCESS_BYTES = 16
"""The widest load or store of one thread on sm_80 to sm_100."""


def alignment_of(*values: int) -> int:
    """The largest power of two up to 16 that divides all ``values``.

    >>> alignment_of(4096, 24), alignment_of(0)
    (8, 16)
    """
    bits = MAX_ACCESS_BYTES
    for value in values:
        bits |= value
    return bits & -bits


def combined_bits(values: Int64Array) -> int:
    """The bitwise OR of all values of an array of any shape.

    A power of two divides the result exactly if it divides every value.

    >>> alignment_of(combined_bits(np.array([4096, 24])))
    8
    """
    return int(np.bitwise_or.reduce(values, axis=None, initial=0))


def int64_array(name: str, values: npt.ArrayLike, *, allow_scalar: bool = False) -> Int64Array:
    """Check a caller's integers and return them as int64 ``[N]``, without a copy if they are int64.

    With ``allow_scalar``, a single integer is allowed too and gives shape ``[]``.

    Raises:
        TypeError: the values are not integers.
        ValueError: they are not one-dimensional, or one is 2**63 or more.

    >>> int64_array("slots", [3, 1])
    array([3, 1])
    >>> int64_array("slots", [[3, 1]])
    Traceback (most recent call last):
    ValueError: slots must be one-dimensional, got shape (1, 2)
    """
    if type(values) is np.ndarray and values.dtype is INT64 and values.ndim == 1:
        return values
    array = as_array(name, values)
    if array.ndim != 1 and not (allow_scalar and array.ndim == 0):
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype} ({array.flat[0]!r}, ...)")
    if array.dtype == np.uint64:
        require_all(name, array, array < INT64_END, "must be below 2**63")
    return array.astype(np.int64, copy=False)


def as_array(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """A caller's values as an array of any dtype.

    Raises:
        ValueError: they are lists of several lengths.
    """
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} must be one-dimensional, got {values!r}") from None


def require_all(
    name: str, values: npt.NDArray[np.integer], is_right: npt.NDArray[np.bool_], rule: str
) -> None:
    """Check that every value keeps a rule.

    Args:
        name: the caller's name for the values.
        values: one integer, or integers ``[N]``.
        is_right: whether each value keeps the rule, bools of the same shape.
        rule: the rule, in words that follow the name, such as ``"must be positive"``.

    Raises:
        ValueError: a value breaks the rule; the message names the first one.
    """
    if np.all(is_right):
        return
    if values.ndim == 0:
        raise ValueError(f"{name} {rule}, got {int(values)}")
    at = int(np.argmin(is_right))
    raise ValueError(f"{name} {rule}: {name}[{at}] is {int(values[at])}")
