"""Checks of blocks and runs whose numbers come from another process or a caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer

__all__ = ["integers", "is_run", "positive", "require_apart"]

ADDRESS_END = 1 << 63
"""Addresses are int64."""


def positive(name: str, value: Any) -> int:
    """A positive ``int`` below 2**63.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range.
    """
    number = as_integer(name, value)
    if not 0 < number < ADDRESS_END:
        raise ValueError(f"{name} must be positive and below 2**63, got {number}")
    return number


def integers(name: str, values: Int64Array | Sequence[int]) -> Int64Array:
    """Integers as int64 ``[N]``. Unlike a cast, this changes no number.

    Raises:
        ValueError: they are not integers in one dimension, or one does not fit int64.

    >>> integers("run_starts", [0.9])
    Traceback (most recent call last):
    ValueError: run_starts must be integers, got 0.9
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, (np.ndarray, Sequence)):
        raise ValueError(f"{name} must be a sequence or an array of integers, got {values!r}")
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        raise ValueError(f"{name} must be one-dimensional, got {values!r}") from None
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if not len(array):
        return np.empty(0, np.int64)
    if not isinstance(values, np.ndarray):
        # NumPy makes one dtype of all elements: it reads True among integers as 1.
        for kind in set(map(type, values)):
            if kind is bool or not issubclass(kind, (int, np.integer)):
                wrong = next(value for value in values if type(value) is kind)
                raise ValueError(f"{name} must be integers, got {wrong!r}")
        if array.dtype.kind not in "iu":  # larger than any of NumPy's integers
            raise ValueError(f"{name} must be below 2**63, got {max(values, key=abs)}")
    elif array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype} ({array[0]!r}, ...)")
    if array.dtype == np.uint64 and (array >= ADDRESS_END).any():
        raise ValueError(f"{name} must be below 2**63, got {array.max()}")
    return array.astype(np.int64, copy=False)


def is_run(start: object, count: object, block_bytes: object) -> bool:
    """Whether these are the numbers of one run; a quick look that allocates no array.

    >>> is_run(0, 4, 4096), is_run(0, 4, True), is_run(0, 1 << 62, 4096)
    (True, False, False)
    """
    if type(block_bytes) is not int or block_bytes <= 0:
        return False
    if type(start) not in _PLAIN or type(count) not in _PLAIN:
        return False
    first, number = as_integer("start", start), as_integer("count", count)
    return first >= 0 and 0 < number <= (ADDRESS_END - 1 - first) // block_bytes


_PLAIN = (int, np.int64)


def require_apart(name: str, starts: Int64Array, counts: Int64Array, block_bytes: int) -> None:
    """Refuse runs that are not disjoint ranges of whole blocks. O(R), or a sort if not ascending.

    Args:
        name: what the starts are called, for messages.
        starts: address of each run's first block, int64 ``[R]``, in any order.
        counts: blocks in each run, int64 ``[R]``.
        block_bytes: bytes of each block, positive.

    Raises:
        ValueError: there are more or fewer counts than starts; a start is negative, a count is not
            positive; or runs overlap, or end at 2**63 or beyond.
    """
    if len(starts) != len(counts):
        raise ValueError(
            f"every run needs a start and a count: got {len(starts)} {name} and "
            f"{len(counts)} run_counts"
        )
    if not len(starts):
        return
    if starts.min() < 0:
        raise ValueError(
            f"{name} must be non-negative, got {starts.min()}: blocks there leave the buffer"
        )
    if counts.min() <= 0:
        raise ValueError(f"run_counts must be positive, got {counts.min()}")
    too_far = counts > (ADDRESS_END - 1 - starts) // block_bytes
    if too_far.any():
        at = int(np.argmax(too_far))
        raise ValueError(
            f"{counts[at]} blocks of {block_bytes} bytes at {starts[at]} end at 2**63 or beyond"
        )
    ends = starts + counts * block_bytes
    if (ends[:-1] <= starts[1:]).all():
        return
    order = np.argsort(starts, kind="stable")
    overlap = ends[order[:-1]] > starts[order[1:]]
    if overlap.any():
        at = int(np.argmax(overlap))
        one, other = sorted((int(order[at]), int(order[at + 1])))
        raise ValueError(
            f"{name} overlap: [{starts[one]}, {ends[one]}) and [{starts[other]}, {ends[other]})"
        )
