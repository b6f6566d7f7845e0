"""Checks of the arguments of kernel launchers: tensors and whole numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch

__all__ = ["as_whole", "require_tensor"]


def require_tensor(name: str, value: Any, advice: str = "") -> None:
    """Raise if an argument is not a tensor.

    Raises:
        TypeError: names the argument and what it is; ``advice`` follows.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {value!r}{advice}")


def as_whole(name: str, value: Any) -> int:
    """An argument as an ``int``; NumPy's integers are accepted, bools are not.

    Raises:
        TypeError: it is not an integer.
    """
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
