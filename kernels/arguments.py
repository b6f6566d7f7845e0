"""Checks of the arguments of kernel launchers: tensors and whole numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch

__all__ = ["as_whole", "require_memory", "require_sms", "require_tensor", "require_values"]


def require_tensor(name: str, value: Any, advice: str = "") -> None:
    """Raise if an argument is not a tensor.

    Raises:
        TypeError: names the argument and what it is; ``advice`` follows.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {value!r}{advice}")


def require_values(name: str, tensor: torch.Tensor) -> None:
    """Raise if the bytes of a tensor are not its values, as those of a lazy conj or neg view.

    Raises:
        ValueError: names the argument.
    """
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name} is a lazy conj or neg view: its bytes are not its values")


def require_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise if the memory of a tensor was taken away, all or part of it, as FSDP does between uses.

    Torch does not look at this itself: it would read and write what is no longer the tensor's, or
    give the storage new memory without a word.

    Raises:
        ValueError: names the argument.
    """
    if tensor.layout is not torch.strided:
        return
    size_bytes = tensor.nbytes
    if not size_bytes:
        return
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size_bytes = (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()
    end = tensor.storage_offset() * tensor.element_size() + size_bytes
    held = tensor.untyped_storage().nbytes()
    if end > held:
        raise ValueError(
            f"{name} ends at byte {end} of its storage, which was resized to {held} bytes: give "
            f"it its memory back first"
        )


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


def require_sms(max_sms: Any) -> None:
    """Raise unless this can be a number of multiprocessors, or None.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than 1.
    """
    if max_sms is not None and as_whole("max_sms", max_sms) < 1:
        raise ValueError(f"max_sms must be at least 1, got {max_sms}")
