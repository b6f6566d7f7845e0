"""Integer arguments, and rounding."""

from __future__ import annotations

from operator import index as as_index
from typing import Any

__all__ = ["as_integer", "is_bool", "round_up"]


def is_bool(value: object) -> bool:
    """Whether a value is Python's or NumPy's True or False. Does not import NumPy."""
    return type(value).__name__ in ("bool", "bool_")


def as_integer(name: str, value: Any) -> int:
    """``value`` as an ``int``; those of NumPy and torch are accepted, bools are not.

    Args:
        name: the argument's name, for the error message.
        value: what the caller passed.

    Raises:
        TypeError: ``value`` is not an integer.

    >>> as_integer("size", 5)
    5
    >>> as_integer("size", 5.0)
    Traceback (most recent call last):
    ...
    TypeError: size must be an integer, got 5.0
    """
    if type(value) is int:
        return value
    if is_bool(value) or _is_tensor_of_bools(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return as_index(value)
    except (TypeError, RuntimeError):  # torch raises both
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _is_tensor_of_bools(value: object) -> bool:
    """Torch makes integers of its True and False."""
    is_of_torch = type(value).__module__.startswith("torch")
    return is_of_torch and str(getattr(value, "dtype", "")) == "torch.bool"


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``value``.

    >>> round_up(0, 8), round_up(1, 8), round_up(8, 8)
    (0, 8, 8)
    """
    return -(-value // unit) * unit
