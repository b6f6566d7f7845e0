"""Integer arguments, and rounding."""

from __future__ import annotations

from operator import index as as_index
from typing import Any

import numpy as np

__all__ = ["as_integer", "round_up"]


def as_integer(name: str, value: Any) -> int:
    """``value`` as an ``int``; NumPy's integers are accepted, bools are not.

    Args:
        name: the argument's name, for the error message.
        value: what the caller passed.

    Raises:
        TypeError: ``value`` is not an integer.

    >>> as_integer("size", np.int32(5))
    5
    >>> as_integer("size", 5.0)
    Traceback (most recent call last):
    ...
    TypeError: size must be an integer, got 5.0
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return as_index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``value``.

    >>> round_up(0, 8), round_up(1, 8), round_up(8, 8)
    (0, 8, 8)
    """
    return -(-value // unit) * unit
