"""Metadata of blocks, for other processes: plain values, no tensor, no allocator.

A scheduler allocates, and each worker has a buffer of its own. To tell a worker where blocks are
and what they hold, send ``to_bytes()``, pickle these objects, or send ``to_dict()`` through msgpack
or JSON. The worker passes the result to ``heap.view``. For 16,384 blocks that are runs of their
own, ``to_bytes()`` are 17 to 66 KB, and ``to_dict()`` as JSON 216 to 252 KB.

``MemoryObjMetadata`` has the fields of LMCache 0.5.6's class of the same name, and its dicts have
the same keys; ``stored``, ``form`` and ``origin`` are added where they are known.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.arguments import require_count
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.metadata_bytes import packed, unpacked
from kvheap.blocks.metadata_reader import Reader
from kvheap.blocks.origin import Origin

__all__ = ["MemoryBatchMetadata", "MemoryObjMetadata"]

Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True, slots=True)
class MemoryObjMetadata:
    """A snapshot of one block.

    Attributes:
        shape: logical shape of the first group.
        dtype: dtype of the first group; None for plain bytes.
        address: offset in the heap, bytes.
        phy_size: allocated bytes.
        ref_count: reference count; at least 1, or the block is freed.
        pin_count: pin count.
        fmt: what the dimensions mean.
        shapes: the shapes of all groups; None for plain bytes.
        dtypes: their dtypes; None for plain bytes.
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

        >>> shape, dtype = torch.Size([2, 3]), torch.float16
        >>> metadata = MemoryObjMetadata(shape, dtype, 0, 4096, 1, shapes=[shape], dtypes=[dtype])
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

    def to_bytes(self) -> bytes:
        """Convert to bytes, which tell whether they were damaged; see ``metadata_bytes.py``.

        >>> shape, dtype = torch.Size([2, 3]), torch.float16
        >>> metadata = MemoryObjMetadata(shape, dtype, 0, 4096, 1, shapes=[shape], dtypes=[dtype])
        >>> MemoryObjMetadata.from_bytes(metadata.to_bytes()) == metadata
        True
        """
        return packed("MemoryObjMetadata", self.to_dict(), ())

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> MemoryObjMetadata:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: the bytes are damaged, of another version, or say what :meth:`to_bytes` does
                not.
            TypeError: ``data`` is not bytes.
        """
        values, arrays = unpacked("MemoryObjMetadata", data)
        with _forged("MemoryObjMetadata"):
            if arrays:
                raise ValueError(f"there are {len(arrays)} arrays")
            return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryObjMetadata:
        """The inverse of :meth:`to_dict`; also reads LMCache's dicts.

        Raises:
            KeyError: a key is missing.
            ValueError: a value is not what :meth:`to_dict` writes, or contradicts another; the
                message names it, or both.
        """
        read = Reader("MemoryObjMetadata", values)
        found = cls(
            shape=read.shape("shape"),
            dtype=read.optional("dtype", read.dtype),
            address=read.integer("address"),
            phy_size=read.integer("phy_size"),
            ref_count=read.integer("ref_count"),
            pin_count=read.integer("pin_count") if "pin_count" in values else 0,
            fmt=read.fmt("fmt"),
            shapes=read.optional("shapes", read.shapes),
            dtypes=read.optional("dtypes", read.dtypes),
            stored=read.token_set("stored") if "stored" in values else None,
            form=read.optional("form", read.text) if "form" in values else None,
            origin=read.origin("origin") if "origin" in values else None,
        )
        if found.dtype is not None:
            found.layout()
        else:
            found.require_plain_bytes()
        return found

    def layout(self) -> BlockLayout:
        """What the block holds, after a check that all that the metadata says fits together.

        Raises:
            ValueError: the block is freed, or plain bytes; a group is missing, ``shape`` or
                ``dtype`` is not that of the first group, or the block is smaller than its contents.
            TypeError: a value is of the wrong kind.
        """
        self.require_counts()
        if self.dtype is None:
            raise ValueError(f"plain bytes are in no heap, got {self!r}")
        if self.shapes is None or self.dtypes is None:
            raise ValueError(
                f"shapes and dtypes must be those of all groups of the block, got shape "
                f"{self.shape!r} and dtype {self.dtype}, but shapes {self.shapes!r} and dtypes "
                f"{self.dtypes!r}"
            )
        if not isinstance(self.shapes, (list, tuple)):
            raise TypeError(f"shapes must be a list with that of each group, got {self.shapes!r}")
        if not isinstance(self.dtypes, (list, tuple)):
            raise TypeError(f"dtypes must be a list with that of each group, got {self.dtypes!r}")
        if len(self.shapes) != len(self.dtypes):
            raise ValueError(
                f"shapes and dtypes differ in length: {self.shapes!r}, {self.dtypes!r}"
            )
        layout = BlockLayout.of(self.shapes, self.dtypes, self.fmt)
        if not isinstance(self.shape, (list, tuple)) or tuple(self.shape) != layout.shapes[0]:
            raise ValueError(f"shape is {self.shape!r}, but shapes[0] is {layout.shapes[0]!r}")
        if self.dtype is not layout.dtypes[0]:
            raise ValueError(f"dtype is {self.dtype!r}, but dtypes[0] is {layout.dtypes[0]}")
        if as_integer("phy_size", self.phy_size) < layout.size_bytes:
            raise ValueError(
                f"the block is too small: phy_size is {self.phy_size}, but {layout} has "
                f"{layout.size_bytes} bytes"
            )
        return layout

    def require_plain_bytes(self) -> None:
        """Raise if this is not what plain bytes are described by.

        Raises:
            ValueError: the bytes are freed, or ``shapes`` or ``dtypes`` describe groups.
            TypeError: a count is not an integer.
        """
        self.require_counts()
        if self.dtype is not None or self.shapes is not None or self.dtypes is not None:
            raise ValueError(
                f"dtype is {self.dtype}, as of plain bytes, but shapes is {self.shapes!r} and "
                f"dtypes is {self.dtypes!r}"
            )

    def require_counts(self) -> None:
        """Raise if the block is freed, or a count is none.

        Raises:
            ValueError: the reference count is below 1, or the pin count below 0.
            TypeError: a count is not an integer.
        """
        if as_integer("ref_count", self.ref_count) < 1:
            raise ValueError(
                f"ref_count is {self.ref_count}: the block at address {self.address} is freed"
            )
        if type(self.pin_count) is not int or self.pin_count < 0:
            require_count("pin_count", self.pin_count)


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
        values |= _told_of(self.stored, self.form, self.origins)
        return values

    def to_bytes(self) -> bytes:
        """Convert to bytes, which tell whether they were damaged; see ``metadata_bytes.py``.

        In address order, each run mostly takes 1 or 2 bytes, 2 to 4 in any other order, and 1 or 2
        more if runs differ in length. O(R) for R runs; blocks that were stored by themselves add
        O(N).

        Raises:
            TypeError, ValueError: as :meth:`require_whole`.

        >>> blocks = AddressBatch.of_addresses(range(0, 64000, 128), 64)
        >>> metadata = MemoryBatchMetadata(blocks, BlockLayout.of([8], "float32", "KV_2LTD"))
        >>> blocks.num_runs, len(metadata.to_bytes()), len(str(metadata.to_dict()))
        (500, 702, 5092)
        >>> MemoryBatchMetadata.from_bytes(metadata.to_bytes()) == metadata
        True
        """
        self.require_whole()
        arrays = [self.blocks.run_starts, self.blocks.run_counts]
        # Most blocks hold the same tokens of the same origin: each kind is told once.
        stored, origins = self.stored, self.origins
        if stored is not None:
            stored, kinds = _kinds_of(stored)
            arrays.append(kinds)
        if origins is not None and len(origins) > 1:
            origins, kinds = _kinds_of(origins)
            arrays.append(kinds)
        values: dict[str, Any] = {
            "block_bytes": self.blocks.block_bytes,
            "shapes": [list(shape) for shape in self.layout.shapes],
            "dtypes": [_dtype_name(dtype) for dtype in self.layout.dtypes],
            "fmt": self.layout.fmt.value,
            "num_tokens": self.num_tokens,
        }
        values |= _told_of(stored, self.form, origins)
        return packed("MemoryBatchMetadata", values, arrays)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> MemoryBatchMetadata:
        """The inverse of :meth:`to_bytes`. Whether the blocks fit a heap, ``heap.view`` checks.

        Raises:
            ValueError: the bytes are damaged, of another version, or say what :meth:`to_bytes` does
                not.
            TypeError: ``data`` is not bytes.
        """
        values, arrays = unpacked("MemoryBatchMetadata", data)
        with _forged("MemoryBatchMetadata"):
            read = Reader("MemoryBatchMetadata", values)
            stored = read.token_sets("stored") if "stored" in values else None
            origins = read.origins("origins") if "origins" in values else None
            starts, counts, *kinds = arrays
            if stored is not None:
                stored = _of_kinds("stored", stored, kinds.pop(0))
            if origins is not None and kinds:
                origins = _of_kinds("origins", origins, kinds.pop(0))
            if kinds:
                raise ValueError(f"there are {len(arrays)} arrays")
            return cls._read(read, starts, counts, values, stored, origins)

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
        stored = read.token_sets("stored") if "stored" in values else None
        origins = read.origins("origins") if "origins" in values else None
        starts, counts = read.integers("run_starts"), read.integers("run_counts")
        found = cls._read(read, starts, counts, values, stored, origins)
        ascending = read.flag("ascending") if "ascending" in values else True
        if ascending and not found.blocks.is_ascending:
            raise ValueError(f"run_starts must ascend, got {values['run_starts']!r}")
        return found

    @classmethod
    def _read(
        cls,
        read: Reader,
        run_starts: Int64Array | list[int],
        run_counts: Int64Array | list[int],
        values: Mapping[str, Any],
        stored: tuple[int | None, ...] | None,
        origins: tuple[Origin | None, ...] | None,
    ) -> MemoryBatchMetadata:
        """What the values and arrays of a batch say, checked."""
        layout = BlockLayout.of(read.shapes("shapes"), read.dtypes("dtypes"), read.fmt("fmt"))
        blocks = AddressBatch.of_runs(read.integer("block_bytes"), run_starts, run_counts)
        if blocks.block_bytes < layout.size_bytes:
            raise ValueError(
                f"block_bytes is {blocks.block_bytes}, but {layout} has {layout.size_bytes} bytes"
            )
        num_tokens = read.optional("num_tokens", read.integer) if "num_tokens" in values else None
        form = read.optional("form", read.text) if "form" in values else None
        found = cls(blocks, layout, num_tokens, stored, form, origins)
        found.require_whole()
        return found

    def require_whole(self) -> None:
        """Raise if a value is of the wrong kind, or contradicts another.

        Whether the blocks fit a heap, and the tokens the blocks, ``heap.view`` checks. O(1).

        Raises:
            TypeError: a value is of the wrong kind.
            ValueError: both ``num_tokens`` and ``stored`` say which tokens there are.
        """
        is_plain = self.stored is None and self.form is None and self.origins is None  # most are
        if is_plain and type(self.blocks) is AddressBatch and type(self.layout) is BlockLayout:
            return
        kinds: list[tuple[str, object, type | tuple[type, ...], str]] = [
            ("blocks", self.blocks, AddressBatch, "an AddressBatch"),
            ("layout", self.layout, BlockLayout, "a BlockLayout"),
            ("stored", self.stored, (type(None), tuple, list), "a list of sets of tokens or None"),
            ("form", self.form, (type(None), str), "a text or None"),
            ("origins", self.origins, (type(None), tuple, list), "a list of origins or None"),
        ]
        for name, value, kind, words in kinds:
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be {words}, got {value!r}")
        if self.num_tokens is not None and self.stored is not None:
            raise ValueError(
                f"num_tokens is {self.num_tokens}, but stored says which tokens each block holds: "
                f"{self.stored!r}"
            )


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype)


def _told_of(
    stored: Sequence[int | None] | None, form: str | None, origins: Sequence[Origin | None] | None
) -> dict[str, Any]:
    """What is known of the contents, for JSON or msgpack."""
    values: dict[str, Any] = {}
    if stored is not None:
        values["stored"] = [None if held is None else f"{held:x}" for held in stored]
    if form is not None:
        values["form"] = form
    if origins is not None:
        values["origins"] = [None if each is None else each.to_list() for each in origins]
    return values


def _kinds_of(values: Sequence[Kind]) -> tuple[tuple[Kind, ...], Int64Array]:
    """The distinct values, and which of them each value is, int64 ``[N]``."""
    kinds: dict[Kind, int] = {}
    numbers = [kinds.setdefault(value, len(kinds)) for value in values]
    return tuple(kinds), np.array(numbers, np.int64)


def _of_kinds(name: str, kinds: tuple[Kind, ...], numbers: Int64Array) -> tuple[Kind, ...]:
    """The inverse of :func:`_kinds_of`.

    Raises:
        ValueError: there is no such kind.
    """
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(kinds):
        raise ValueError(f"{name} must be of {len(kinds)} kinds, got {numbers.max()}")
    return tuple(kinds[number] for number in numbers.tolist())


@contextmanager
def _forged(kind: str) -> Iterator[None]:
    """Raise a ValueError for bytes that are undamaged and yet say what is wrong."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the bytes of a {kind} are not what it writes: {error}") from error
