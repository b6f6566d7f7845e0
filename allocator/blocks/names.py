"""Dtypes and formats by their names, as configuration files and other processes write them."""

from __future__ import annotations

from typing import Any

import torch

from kvheap.blocks.memory_format import MemoryFormat

__all__ = ["as_dtype", "as_format"]

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)} | {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
"""Dtypes by torch's names for them, with and without the name of the module."""


def as_dtype(value: Any) -> torch.dtype:
    """A dtype, or the dtype of a name.

    Raises:
        ValueError: torch has no dtype of this name.
        TypeError: it is neither a dtype nor a name.

    >>> as_dtype("bfloat16"), as_dtype("torch.half")
    (torch.bfloat16, torch.float16)
    """
    if isinstance(value, torch.dtype):
        return value
    if not isinstance(value, str):
        raise TypeError(f"dtype must be a torch.dtype, got {value!r}")
    found = _DTYPES.get(value.removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {value!r}: use a torch.dtype, or its name as 'bfloat16'")
    return found


def as_format(value: Any) -> MemoryFormat:
    """A format, or the format of a name.

    Raises:
        ValueError: there is no format of this name.
        TypeError: it is neither a format nor a name.

    >>> as_format("KV_2LTD")
    <MemoryFormat.KV_2LTD: 1>
    """
    if isinstance(value, MemoryFormat):
        return value
    if not isinstance(value, str):
        raise TypeError(f"fmt must be a MemoryFormat, got {value!r}")
    found = MemoryFormat.__members__.get(value.removeprefix("MemoryFormat."))
    if found is None:
        raise ValueError(
            f"unknown format {value!r}; known are {', '.join(MemoryFormat.__members__)}"
        )
    return found
