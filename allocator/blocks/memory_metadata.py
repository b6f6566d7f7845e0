"""Metadata of blocks, for other processes: plain values, no tensor, no allocator.

A scheduler allocates, and each worker has a buffer of its own. To tell a worker where blocks are
and what they hold, pickle these objects, or send ``to_dict()`` through msgpack or JSON. The worker
passes the result to ``heap.view``.

``MemoryObjMetadata`` has the fields of LMCache 0.5.6's class of the same name, and its dicts have
the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_format import MemoryFormat

__all__ = ["MemoryBatchMetadata", "MemoryObjMetadata"]


@dataclass(frozen=True, slots=True)
class MemoryObjMetadata:
    """A snapshot of one block.

    Attributes:
        shape: logical shape of the first group.
        dtype: dtype of the first group; None for plain bytes.
        address: offset in the heap, bytes.
        phy_size: allocated bytes.
        ref_count: reference count.
        pin_count: pin count.
        fmt: what the dimensions mean.
        shapes: the shapes of all groups, or None.
        dtypes: their dtypes, or None.
    """

    shape: torch.Size
    dtype: torch.dtype | None
    address: int
    phy_size: int
    ref_count: int
    pin_count: int = 0
    fmt: MemoryFormat = MemoryFormat.UNDEFINED
    shapes: list[torch.Size] | None = None
    dtypes: list[torch.dtype] | None = None

    def get_size(self) -> int:
        """Logical bytes of all groups."""
        if self.shapes and self.dtypes:
            groups = zip(self.shapes, self.dtypes, strict=True)
            return sum(shape.numel() * dtype.itemsize for shape, dtype in groups)
        return self.shape.numel() * (self.dtype.itemsize if self.dtype else 1)

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, strings and lists, for msgpack or JSON.

        >>> metadata = MemoryObjMetadata(torch.Size([2, 3]), torch.float16, 4096, 4096, 1)
        >>> MemoryObjMetadata.from_dict(metadata.to_dict()) == metadata
        True
        """
        return {
            "__type__": "MemoryObjMetadata",
            "shape": list(self.shape),
            "dtype": _dtype_name(self.dtype),
            "address": self.address,
            "phy_size": self.phy_size,
            "ref_count": self.ref_count,
            "pin_count": self.pin_count,
            "fmt": self.fmt.value,
            "shapes": [list(shape) for shape in self.shapes] if self.shapes else None,
            "dtypes": [_dtype_name(dtype) for dtype in self.dtypes] if self.dtypes else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryObjMetadata:
        """The inverse of :meth:`to_dict`; also reads LMCache's dicts.

        Raises:
            KeyError: a key is missing.
            ValueError: a dtype or format is unknown.
        """
        shapes, dtypes = values["shapes"], values["dtypes"]
        return cls(
            shape=torch.Size(values["shape"]),
            dtype=_dtype_of(values["dtype"]),
            address=values["address"],
            phy_size=values["phy_size"],
            ref_count=values["ref_count"],
            pin_count=values.get("pin_count", 0),
            fmt=MemoryFormat(values["fmt"]),
            shapes=[torch.Size(shape) for shape in shapes] if shapes else None,
            dtypes=[_require_dtype(dtype) for dtype in dtypes] if dtypes else None,
        )


@dataclass(frozen=True, slots=True)
class MemoryBatchMetadata:
    """N blocks of one block layout, as runs.

    Attributes:
        blocks: where they are.
        layout: what each of them holds.
    """

    blocks: AddressBatch
    layout: BlockLayout

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, strings and lists, for msgpack or JSON; O(R) for R runs."""
        return {
            "__type__": "MemoryBatchMetadata",
            "block_bytes": self.blocks.block_bytes,
            "run_starts": self.blocks.run_starts.tolist(),
            "run_counts": self.blocks.run_counts.tolist(),
            "shapes": [list(shape) for shape in self.layout.shapes],
            "dtypes": [_dtype_name(dtype) for dtype in self.layout.dtypes],
            "fmt": self.layout.fmt.value,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryBatchMetadata:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError: a key is missing.
            ValueError: a dtype, format or shape is invalid.
        """
        shapes: Sequence[Sequence[int]] = values["shapes"]
        dtypes = [_require_dtype(dtype) for dtype in values["dtypes"]]
        return cls(
            AddressBatch(
                values["block_bytes"],
                np.asarray(values["run_starts"], np.int64),
                np.asarray(values["run_counts"], np.int64),
            ),
            BlockLayout.of(shapes, dtypes, MemoryFormat(values["fmt"])),
        )


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype)


def _dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else _require_dtype(name)


def _require_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype
