"""Metadata of blocks, for other processes: plain values, no tensor, no allocator.

A scheduler allocates, and each worker has a buffer of its own. To tell a worker where blocks are
and what they hold, pickle these objects, or send ``to_dict()`` through msgpack or JSON. The worker
passes the result to ``heap.view``.

``MemoryObjMetadata`` has the fields of LMCache 0.5.6's class of the same name, and its dicts have
the same keys; ``stored``, ``form`` and ``origin`` are added where they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.metadata_reader import Reader
from kvheap.blocks.origin import Origin

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
        stored: which tokens were stored in it, bit ``t`` for token ``t``; None if not known.
        form: in what units, see ``StoredTokens.form``; None if not known.
        origin: from which layers and heads of a cache; None if not known, or all.
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
    stored: int | None = None
    form: str | None = None
    origin: Origin | None = None

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
        values: dict[str, Any] = {
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
        if self.stored is not None:
            values["stored"] = f"{self.stored:x}"
        if self.form is not None:
            values["form"] = self.form
        if self.origin is not None:
            values["origin"] = self.origin.to_list()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryObjMetadata:
        """The inverse of :meth:`to_dict`; also reads LMCache's dicts.

        Raises:
            KeyError: a key is missing.
            ValueError: a value is not what :meth:`to_dict` writes; the message names it.
        """
        read = Reader("MemoryObjMetadata", values)
        shapes = read.optional_list("shapes", read.shapes)
        dtypes = read.optional_list("dtypes", read.dtypes)
        if shapes is not None and dtypes is not None and len(shapes) != len(dtypes):
            raise ValueError(f"shapes and dtypes differ in length: {shapes!r}, {dtypes!r}")
        return cls(
            shape=read.shape("shape"),
            dtype=read.optional("dtype", read.dtype),
            address=read.integer("address"),
            phy_size=read.integer("phy_size"),
            ref_count=read.integer("ref_count"),
            pin_count=read.integer("pin_count") if "pin_count" in values else 0,
            fmt=read.fmt("fmt"),
            shapes=shapes,
            dtypes=dtypes,
            stored=read.token_set("stored") if "stored" in values else None,
            form=read.optional("form", read.text) if "form" in values else None,
            origin=read.origin("origin") if "origin" in values else None,
        )


@dataclass(frozen=True, slots=True)
class MemoryBatchMetadata:
    """N blocks of one block layout, as runs.

    Attributes:
        blocks: where they are.
        layout: what each of them holds.
        num_tokens: how many tokens they hold, see ``MemoryBatch.num_tokens``; None if that is not
            known, or ``stored`` says more.
        stored: which tokens each block holds, if they are not the first ones of the batch: bit
            ``t`` for token ``t``, None for a block of which nothing is known.
        form: in what units they were stored, see ``StoredTokens.form``; None if not known.
        origins: from which layers and heads of a cache each block was stored, or one for all of
            them; None if that is not known, or from all.
    """

    blocks: AddressBatch
    layout: BlockLayout
    num_tokens: int | None = None
    stored: tuple[int | None, ...] | None = None
    form: str | None = None
    origins: tuple[Origin | None, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, strings and lists, for msgpack or JSON; O(R) for R runs.

        Blocks that were stored by themselves add O(N), under the key ``stored``.
        """
        values: dict[str, Any] = {
            "__type__": "MemoryBatchMetadata",
            "block_bytes": self.blocks.block_bytes,
            "run_starts": self.blocks.run_starts.tolist(),
            "run_counts": self.blocks.run_counts.tolist(),
            "ascending": self.blocks.is_ascending,
            "shapes": [list(shape) for shape in self.layout.shapes],
            "dtypes": [_dtype_name(dtype) for dtype in self.layout.dtypes],
            "fmt": self.layout.fmt.value,
            "num_tokens": self.num_tokens,
        }
        if self.stored is not None:
            values["stored"] = [None if held is None else f"{held:x}" for held in self.stored]
        if self.form is not None:
            values["form"] = self.form
        if self.origins is not None:
            values["origins"] = [None if o is None else o.to_list() for o in self.origins]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryBatchMetadata:
        """The inverse of :meth:`to_dict`. Whether the blocks fit a heap, ``heap.view`` checks.

        Raises:
            KeyError: a key is missing.
            ValueError: a value is not what :meth:`to_dict` writes, the runs overlap or are in
                another order than ``ascending`` says, or a block is smaller than its contents; the
                message names the value.
        """
        read = Reader("MemoryBatchMetadata", values)
        layout = BlockLayout.of(read.shapes("shapes"), read.dtypes("dtypes"), read.fmt("fmt"))
        blocks = AddressBatch.of_runs(
            read.integer("block_bytes"), read.integers("run_starts"), read.integers("run_counts")
        )
        if blocks.block_bytes < layout.size_bytes:
            raise ValueError(
                f"block_bytes is {blocks.block_bytes}, but {layout} has {layout.size_bytes} bytes"
            )
        ascending = read.flag("ascending") if "ascending" in values else True
        if ascending and not blocks.is_ascending:
            raise ValueError(f"run_starts must ascend, got {values['run_starts']!r}")
        num_tokens = read.optional("num_tokens", read.integer) if "num_tokens" in values else None
        stored = read.token_sets("stored") if "stored" in values else None
        form = read.optional("form", read.text) if "form" in values else None
        origins = read.origins("origins") if "origins" in values else None
        return cls(blocks, layout, num_tokens, stored, form, origins)


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype)
