"""``ChunkShape``: what a chunk of an engine's cache is: shapes, dtypes, format and bytes.

``batched_store`` allocates such chunks. Formats are those of ``kvheap.MemoryFormat``, by their
names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch

from kvheap.kernels.arguments import as_whole
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.engine_layouts import KVLayout
from kvheap.kernels.engine_planes import Plane

__all__ = [
    "CHUNK_ORDERS",
    "CONVERTIBLE",
    "ChunkShape",
    "NamedFormat",
    "chunk_shape",
    "require_convertible_to",
]

CHUNK_ORDERS: Mapping[str, str] = MappingProxyType(
    {
        "KV_2LTD": "PLTD",
        "KV_MLA_FMT": "PLTD",
        "KV_T2D": "TPD",
        "KV_2TD": "PTD",
        "KV_2TLD": "PTLD",
        "KV_PL2TD": "GLPTD",
        "KV_TLD": "TLD",
        "KV_PLTD": "GLTD",
        "KV_2PHTLD": "PGJTLD",
        "KV_PHL2TD": "GJLPTD",
    }
)
"""By format, one letter for each dimension of a chunk, as ``ChunkLayout.of`` reads them."""

CONVERTIBLE = (torch.bfloat16, torch.float16)
"""Dtypes that can be converted to float8_e4m3fn with scales."""

SCALE_BYTES = 4


class NamedFormat(Protocol):
    """A format, such as a ``MemoryFormat``."""

    @property
    def name(self) -> str:
        """Its name."""
        ...


class ChunkedCache(Protocol):
    """The part of a ``PagedKVCache`` that decides what its chunks are."""

    @property
    def layout(self) -> KVLayout:
        """The engine layout."""
        ...

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Its planes."""
        ...

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        ...

    @property
    def num_heads(self) -> int:
        """Heads."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        ...

    @property
    def chunk_planes(self) -> int:
        """Planes of a chunk: 2 if K and V have equally many bytes, else 1."""
        ...

    @property
    def is_key_value(self) -> bool:
        """Whether the planes are K and V, or their parts."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """What a chunk is. Made by ``PagedKVCache.chunk_layout``.

    It may be passed as the layout of a ``PrefixStore`` or a ``FileTier``;
    ``BlockLayout.of_chunk(chunk)`` is the layout of such blocks, and
    ``heap.batched_allocate(chunk.shapes, chunk.dtypes, n, chunk.fmt)`` allocates n of them.

    Attributes:
        shapes: shape of each group: one, or elements and scales if KV is converted.
        dtypes: dtype of each group.
        fmt: name of the ``MemoryFormat``, which says what the dimensions mean.
        num_tokens: tokens of a chunk.
        num_layers: layers that are stored: in one chunk, or each in chunks of its own
            (``layout.is_per_layer``).
        num_heads: heads that it holds.
        layout: where the KV of each token is in it, in bytes.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    fmt: str
    num_tokens: int
    num_layers: int
    num_heads: int
    layout: ChunkLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first group."""
        return self.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first group."""
        return self.dtypes[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of a chunk, all groups."""
        groups = zip(self.shapes, self.dtypes, strict=True)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in groups)

    def num_chunks(self, num_tokens: int) -> int:
        """How many chunks so many tokens take, those of all layers."""
        return self.layout.num_chunks(num_tokens, self.num_layers)

    def __str__(self) -> str:
        """Tokens, layers, heads, shapes, format and bytes."""
        parts = zip(self.shapes, self.dtypes, strict=True)
        groups = " + ".join(f"{shape} {dtype}" for shape, dtype in parts)
        each = f"{'one of ' if self.layout.is_per_layer else ''}{self.num_layers} layers"
        return (
            f"{self.num_tokens} tokens of {each} and {self.num_heads} heads: {groups} {self.fmt}, "
            f"{self.size_bytes} bytes"
        )

    def __repr__(self) -> str:
        """As ``str``."""
        return f"ChunkShape({self})"


def chunk_shape(
    cache: ChunkedCache,
    chunk_tokens: int,
    fmt: NamedFormat | str | None = None,
    layers: range | None = None,
    heads: slice | None = None,
    convert: bool = False,
) -> ChunkShape:
    """What a chunk of a cache is; see ``PagedKVCache.chunk_layout``.

    Raises:
        ValueError, TypeError: as ``PagedKVCache.chunk_layout``.
    """
    chunk_tokens = as_whole("chunk_tokens", chunk_tokens)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}")
    if not isinstance(convert, bool):
        raise TypeError(f"convert must be True or False, got {convert!r}")
    if fmt is None:
        fmt = "KV_2LTD" if cache.chunk_planes == 2 else "KV_MLA_FMT"
    name = _name_of(fmt)
    num_layers = cache.num_layers if layers is None else _count_layers(cache, layers)
    num_heads = cache.num_heads if heads is None else _count_heads(cache, heads)
    if convert:
        require_convertible_to(cache, name)
    shape = _shape(cache, name, chunk_tokens, num_layers, num_heads)
    layout = ChunkLayout.of(CHUNK_ORDERS[name], shape, cache.dtype.itemsize)
    shapes: tuple[tuple[int, ...], ...] = (shape,)
    dtypes: tuple[torch.dtype, ...] = (cache.dtype,)
    if convert:
        scales = (layout.num_planes, layout.num_layers, num_heads)
        shapes, dtypes = (shape, scales), (torch.float8_e4m3fn, torch.float32)
        if math.prod(shape) % SCALE_BYTES:  # the wider dtype first
            shapes, dtypes = shapes[::-1], dtypes[::-1]
    return ChunkShape(shapes, dtypes, name, chunk_tokens, num_layers, num_heads, layout)


def require_convertible_to(cache: ChunkedCache, fmt: str) -> None:
    """Raise if KV of a cache cannot be converted to chunks of a format.

    Raises:
        ValueError: says what a conversion needs.
    """
    if cache.layout.whole_blocks:
        raise ValueError(
            f"convert=True needs rows of single tokens, and {cache.layout.name} holds no rows that "
            f"could be converted"
        )
    if cache.dtype not in CONVERTIBLE:
        raise ValueError(
            f"convert=True needs a cache of bfloat16 or float16: only these can be converted, got "
            f"{cache.dtype}"
        )
    planes = _planes_of(fmt)
    if len(cache.planes) != planes:
        raise ValueError(
            f"convert=True needs a plane of the chunk for each of the cache's, such as K and V of "
            f"one size in KV_2LTD: {cache.layout.name} has planes of "
            f"{[plane.row_bytes for plane in cache.planes]} bytes a head, {fmt} has {planes}"
        )


def _name_of(fmt: Any) -> str:
    """The name of a format, which is given by itself or by a ``MemoryFormat``."""
    name = fmt if isinstance(fmt, str) else getattr(fmt, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"fmt must be a MemoryFormat or its name, got {fmt!r}")
    name = name.removeprefix("MemoryFormat.")
    if name not in CHUNK_ORDERS:
        raise ValueError(
            f"{name} is not a format for tokens of a paged cache; those are "
            f"{', '.join(CHUNK_ORDERS)}"
        )
    return name


def _planes_of(fmt: str) -> int:
    return 2 if "P" in CHUNK_ORDERS[fmt] and fmt != "KV_MLA_FMT" else 1


def _shape(
    cache: ChunkedCache, fmt: str, chunk_tokens: int, num_layers: int, num_heads: int
) -> tuple[int, ...]:
    """The shape of a chunk; KV_PHL2TD has one group of heads.

    Raises:
        ValueError: the format cannot hold this cache's KV, or a chunk of pages would not be a whole
            number of the cache's blocks.
    """
    order, planes = CHUNK_ORDERS[fmt], _planes_of(fmt)
    row_bytes = sum(plane.row_bytes for plane in cache.planes) * num_heads
    if planes == 2 and not cache.is_key_value:
        raise ValueError(f"{fmt} holds K and V planes; {cache.layout.name} has none")
    if planes > cache.chunk_planes:
        raise ValueError(
            f"{fmt} holds K and V of one size, but this cache has planes of "
            f"{[plane.row_bytes for plane in cache.planes]} bytes a head: use KV_MLA_FMT"
        )
    heads = num_heads if fmt == "KV_2PHTLD" else 1
    pages, left = divmod(chunk_tokens, cache.block_size)
    if "G" in order and left:
        raise ValueError(f"{chunk_tokens} tokens are not whole pages of {cache.block_size} tokens")
    sizes = {"P": planes, "L": num_layers, "T": chunk_tokens, "G": pages, "J": heads}
    sizes["D"] = row_bytes // planes // heads // cache.dtype.itemsize
    if "G" in order:
        sizes["T"] = cache.block_size
    return tuple(sizes[letter] for letter in order)


def _count_layers(cache: ChunkedCache, layers: range) -> int:
    if not isinstance(layers, range):
        raise TypeError(f"layers must be a range, got {layers!r}")
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= cache.num_layers:
        raise ValueError(
            f"layers must be a range in steps of 1 of the {cache.num_layers} layers, got {layers}"
        )
    return len(layers)


def _count_heads(cache: ChunkedCache, heads: slice) -> int:
    if not isinstance(heads, slice):
        raise TypeError(f"heads must be a slice, got {heads!r}")
    bounds: Sequence[Any] = (heads.start, heads.stop, heads.step)
    for bound in bounds:
        if bound is not None:
            as_whole("a bound of heads", bound)
    most = cache.num_heads
    begin, end, step = heads.indices(most)
    leaves = any(bound is not None and not -most <= bound <= most for bound in bounds[:2])
    if step != 1 or end <= begin or leaves:
        raise ValueError(
            f"heads must be a slice of the cache's {most} heads in steps of 1, got {heads}"
        )
    return end - begin
