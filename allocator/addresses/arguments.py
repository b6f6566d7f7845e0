"""Checks of arguments that are neither numbers of bytes nor tensors: flags, numbers, functions.

Needs no NumPy, as a prefix index without tensors does not.
"""

from __future__ import annotations

import math
from typing import Any

from kvheap.addresses.integers import as_integer, is_bool

__all__ = ["as_number", "as_seconds", "require_count", "require_flags", "require_function"]


def require_flags(**flags: Any) -> None:
    """Raise if a flag is neither True nor False: ``free="no"`` would count as True.

    Raises:
        TypeError: names the flag.
    """
    for name, value in flags.items():
        if not is_bool(value):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def as_seconds(name: str, value: Any) -> float:
    """A number of seconds, zero or more.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, or not a number in the sense of floats.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        seconds = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be a number of seconds, got {value!r}") from None
    if not seconds >= 0:
        raise ValueError(f"{name} must be a non-negative number of seconds, got {value}")
    return seconds


def require_count(name: str, value: Any, at_least: int = 0) -> int:
    """A whole number of at least ``at_least``.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is smaller.
    """
    number = as_integer(name, value)
    if number < at_least:
        rule = {0: "non-negative", 1: "positive"}.get(at_least, f"at least {at_least}")
        raise ValueError(f"{name} must be {rule}, got {number}")
    return number


def require_function(name: str, value: Any) -> None:
    """Raise if an argument is neither None nor callable.

    Raises:
        TypeError: names the argument.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {value!r}")


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
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be a {kind} finite number, got {value!r}") from None
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be a {kind} finite number, got {value!r}")
    return number
