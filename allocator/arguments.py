"""Numbers that callers pass: whole ones, and finite ones. Needs no NumPy."""

from __future__ import annotations

import math
from operator import index as as_index
from typing import Any

__all__ = ["as_number", "as_whole"]


def as_whole(name: str, value: Any, minimum: int = 0) -> int:
    """``value`` as an ``int``; integers of other kinds are accepted, bools are not.

    Args:
        name: the argument's name, for the error message.
        value: what the caller passed.
        minimum: the least that is accepted.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is below ``minimum``.

    >>> as_whole("num_bytes", 5)
    5
    >>> as_whole("num_bytes", float("nan"))
    Traceback (most recent call last):
    ...
    TypeError: num_bytes must be an integer, got nan (float)
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        found = as_index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} must be an integer, got {value!r} ({kind})") from None
    if found < minimum:
        kind = {0: "non-negative", 1: "positive"}.get(minimum, f"at least {minimum}")
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    return found


def as_number(name: str, value: Any, *, positive: bool = False) -> float:
    """``value`` as a ``float``: finite, and not negative; with ``positive``, not 0 either.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: ``value`` is not finite, or too small.

    >>> as_number("stream_wait_s", 1)
    1.0
    >>> as_number("stream_wait_s", float("nan"))
    Traceback (most recent call last):
    ...
    ValueError: stream_wait_s must be a non-negative finite number, got nan
    """
    kind = "positive" if positive else "non-negative"
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a {kind} finite number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be a {kind} finite number, got {value!r}")
    return number
