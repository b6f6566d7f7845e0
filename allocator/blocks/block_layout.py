"""``BlockLayout``: what one block holds: one tensor, or several in a row, one per group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from kvheap.addresses.integers import as_integer
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.names import as_dtype, as_format

__all__ = ["BlockLayout", "Dtypes", "Shapes", "as_block_layout"]

if TYPE_CHECKING:
    from kvheap.kernels.chunk_shape import ChunkShape

MAX_BYTES = 1 << 63
"""Blocks must be smaller than this: addresses and sizes are int64."""

Shapes: TypeAlias = "Sequence[int] | Sequence[Sequence[int]]"
"""The shape of a block, or a list with the shape of each group."""

Dtypes: TypeAlias = "torch.dtype | str | Sequence[torch.dtype | str]"
"""The dtype of a block or its name, such as ``"bfloat16"``; or a list with that of each group."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Shapes, dtypes and format of a block's groups, which are stored one after another.

    A block of a hybrid model, for example, holds a chunk's attention KV and its recurrent state.

    Attributes:
        shapes: logical shape of each group.
        dtypes: logical dtype of each group.
        fmt: what the dimensions mean.
        offsets: byte offset of each group, followed by the end of the last one.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    fmt: MemoryFormat
    offsets: tuple[int, ...]

    @staticmethod
    def of(shapes: Shapes, dtypes: Dtypes, fmt: MemoryFormat | str) -> BlockLayout:
        """The layout of one group, or of several given as lists of equal length.

        Raises:
            TypeError: a dtype is neither a ``torch.dtype`` nor a name, a shape is not a sequence of
                integers, or ``fmt`` is neither a ``MemoryFormat`` nor a name.
            ValueError: the lists differ in length, a shape has no element, a name is unknown, a
                dtype is quantized, a block would have 2**63 bytes or more, or the offset of a group
                is not a multiple of its item size.

        >>> layout = BlockLayout.of([(2, 3), (5,)], [torch.float32, torch.int16],
        ...                         MemoryFormat.UNDEFINED)
        >>> layout.offsets, layout.size_bytes
        ((0, 24, 34), 34)
        """
        if type(fmt) is not MemoryFormat:
            fmt = as_format(fmt)
        if isinstance(dtypes, str):
            dtypes = as_dtype(dtypes)
        if isinstance(dtypes, torch.dtype):
            kind = type(shapes)
            if kind is torch.Size:
                return _single(shapes, dtypes, fmt)
            if (kind is list or kind is tuple) and (len(shapes) != 1 or type(shapes[0]) is int):
                return _single(_size(shapes), dtypes, fmt)
            if isinstance(shapes, Sequence) and len(shapes) == 1:
                first = shapes[0]
                shapes = first if isinstance(first, Sequence) else shapes
            return _single(_size(shapes), dtypes, fmt)
        if not _is_list(dtypes):
            raise TypeError(f"dtype must be a torch.dtype or a list of them, got {dtypes!r}")
        dtypes = [as_dtype(dtype) for dtype in dtypes]
        if not _is_list(shapes):
            raise TypeError(f"shape must be a sequence of integers, got {shapes!r}")
        is_one_shape = len(shapes) and not isinstance(shapes[0], Sequence)
        sizes = [_size(shapes)] if is_one_shape else [_size(shape) for shape in shapes]
        if len(sizes) != len(dtypes) or not len(dtypes):
            raise ValueError(
                f"a block needs one dtype for each shape, and at least one of each, got "
                f"{len(sizes)} shapes and {len(dtypes)} dtypes"
            )
        return _several(tuple(sizes), tuple(dtypes), fmt)

    @staticmethod
    def of_chunk(chunk: ChunkShape) -> BlockLayout:
        """The layout of a chunk of an engine's cache, as ``cache.chunk_layout`` returns it.

        Raises:
            TypeError: ``chunk`` is something else.
        """
        from kvheap.kernels.chunk_shape import ChunkShape  # whoever has one has imported it

        if not isinstance(chunk, ChunkShape):
            raise TypeError(
                f"chunk must be a ChunkShape, as cache.chunk_layout() returns it, got {chunk!r}"
            )
        return BlockLayout.of(chunk.shapes, chunk.dtypes, chunk.fmt)

    @property
    def size_bytes(self) -> int:
        """Bytes of all groups."""
        return self.offsets[-1]

    @property
    def alignment(self) -> int:
        """Required alignment of a block, in bytes: the largest item size of its groups."""
        return max(dtype.itemsize for dtype in self.dtypes)

    @property
    def packed(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a block in a tensor of blocks; uint8 if it has several groups."""
        if len(self.shapes) > 1:
            return (self.size_bytes,), torch.uint8
        return tuple(self.shapes[0]), self.dtypes[0]

    @property
    def packed_elements(self) -> int:
        """Elements of a block in a tensor of blocks; see :attr:`packed`."""
        return math.prod(self.packed[0])

    def view(self, block: torch.Tensor, group: int = 0) -> torch.Tensor:
        """Group ``group`` of ``block``, its bytes as uint8 ``[size_bytes]``, without a copy.

        Raises:
            TypeError: ``block`` is not a tensor, or ``group`` not an integer.
            ValueError: ``block`` is not such a tensor, or there is no such group.
        """
        try:
            begin, end = self.offsets[group], self.offsets[group + 1]
            return block[begin:end].view(self.dtypes[group]).view(self.shapes[group])
        except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
            raise self._not_viewable(block, group, error) from None

    def _not_viewable(self, block: Any, group: Any, error: Exception) -> Exception:
        """Why :meth:`view` has failed."""
        number = as_integer("group", group)
        if not 0 <= number < len(self.shapes):
            return ValueError(f"group must be between 0 and {len(self.shapes) - 1}, got {number}")
        if not isinstance(block, torch.Tensor):
            return TypeError(f"block must be a torch.Tensor, got {block!r}")
        if block.dtype != torch.uint8 or block.ndim != 1 or len(block) < self.size_bytes:
            return ValueError(
                f"block must be uint8 [{self.size_bytes}], got {block.dtype} {tuple(block.shape)}"
            )
        return error

    def __repr__(self) -> str:
        """Shapes, dtypes, format and bytes."""
        return f"BlockLayout({self}, {self.size_bytes} bytes)"

    def __str__(self) -> str:
        """Shapes, dtypes and format, as they appear in messages."""
        groups = zip(self.shapes, self.dtypes, strict=True)
        parts = " + ".join(f"{tuple(shape)} {dtype}" for shape, dtype in groups)
        return f"{parts} {self.fmt.name}"


def as_block_layout(name: str, value: Any) -> BlockLayout:
    """A layout, or the layout of a chunk of an engine's cache.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, BlockLayout):
        return value
    try:
        return BlockLayout.of_chunk(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a BlockLayout, got {value!r}: make one with "
            f"BlockLayout.of(shapes, dtypes, fmt), or pass cache.chunk_layout()"
        ) from None


def _size(shape: Any) -> torch.Size:
    if isinstance(shape, torch.Size):
        return shape
    kind = type(shape)
    try:
        if (kind is list or kind is tuple) and 1 not in shape:  # True is 1
            return torch.Size(shape)
    except (TypeError, ValueError, RuntimeError):
        pass
    return torch.Size(_integers(shape))


def _integers(shape: Any) -> list[int]:
    """The extents of a shape.

    Raises:
        TypeError: it is not a sequence of integers.
    """
    if not isinstance(shape, (Sequence, np.ndarray, torch.Tensor)) or isinstance(shape, _TEXT):
        raise TypeError(f"shape must be a sequence of integers, got {shape!r}")
    try:
        return [as_integer("shape", extent) for extent in shape]
    except TypeError:
        raise TypeError(f"shape must be a sequence of integers, got {shape!r}") from None


def _is_list(value: object) -> bool:
    kind = type(value)
    if kind is list or kind is tuple:
        return True
    return isinstance(value, Sequence) and not isinstance(value, _TEXT)


_TEXT = (str, bytes, bytearray, memoryview)


@lru_cache(maxsize=256)
def _single(shape: torch.Size, dtype: torch.dtype, fmt: MemoryFormat) -> BlockLayout:
    return _several((shape,), (dtype,), fmt)


@lru_cache(maxsize=256)
def _several(
    shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...], fmt: MemoryFormat
) -> BlockLayout:
    offsets = [0]
    # A Size keeps NumPy's integers, which JSON does not know.
    shapes = tuple(torch.Size([int(extent) for extent in shape]) for shape in shapes)
    for group, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        if str(dtype).startswith(("torch.qint", "torch.quint")):
            raise ValueError(f"{dtype} keeps its scales outside its bytes: use an integer dtype")
        if any(extent <= 0 for extent in shape):
            raise ValueError(f"shape must have at least one element, got {tuple(shape)}")
        if offsets[-1] % dtype.itemsize:
            raise ValueError(
                f"group {group} would begin at byte {offsets[-1]}, which is not a multiple of the "
                f"{dtype.itemsize}-byte items of its {dtype}; put the wider dtypes first"
            )
        offsets.append(offsets[-1] + math.prod(shape) * dtype.itemsize)  # numel() would overflow
    if offsets[-1] >= MAX_BYTES:
        extents = [tuple(shape) for shape in shapes]  # torch cannot print a Size of huge ones
        raise ValueError(f"a block must have fewer than 2**63 bytes, got shapes {extents}")
    return BlockLayout(shapes, dtypes, fmt, tuple(offsets))
