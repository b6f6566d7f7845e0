"""What a copy between a paged KV cache and chunks consists of: runs of bytes, and where they are.

A chunk keeps the KV of consecutive tokens in one piece of memory. A :class:`Pairing` lays a cache
and a chunk side by side: for each (layer, plane) where both begin and how far apart tokens and
heads are, and how many bytes lie together on both sides. It depends on neither slots nor
addresses, so it is made once and kept with the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import alignment_of
from kvheap.kernels.paged_layout import PagedKVCache

__all__ = ["ChunkLayout", "Pairing"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Where in a chunk the KV of a token is; bytes.

    Attributes:
        num_tokens: tokens of a chunk.
        page_tokens: tokens that lie ``token_stride`` apart; ``num_tokens`` but for paged orders.
        num_planes: planes.
        num_layers: layers; 1 where there is a chunk for each layer.
        row_bytes: of one token in one layer and plane, all heads.
        is_per_layer: whether a chunk holds one layer.
        page_stride, token_stride, plane_stride, layer_stride: from one to the next.
    """

    num_tokens: int
    page_tokens: int
    num_planes: int
    num_layers: int
    row_bytes: int
    is_per_layer: bool
    page_stride: int
    token_stride: int
    plane_stride: int
    layer_stride: int

    @classmethod
    def of(cls, order: str, shape: Sequence[int], item_bytes: int) -> ChunkLayout:
        """A contiguous chunk, by the order of its dimensions.

        Args:
            order: letters of the dimensions, outermost first: P planes, L layers, T tokens, D
                elements of all heads, G pages of T tokens.
            shape: their sizes; D may be split in heads and elements.
            item_bytes: bytes of an element.

        Raises:
            ValueError: the shape has another rank.

        >>> layout = ChunkLayout.of("PLTD", (2, 32, 256, 1024), 2)
        >>> layout.token_stride, layout.layer_stride, layout.plane_stride
        (2048, 524288, 16777216)
        """
        extents = tuple(shape)
        if len(extents) == len(order) + 1:
            extents = (*extents[:-2], extents[-2] * extents[-1])
        if len(extents) != len(order):
            raise ValueError(f"a chunk {' '.join(order)} cannot have shape {tuple(shape)}")
        sizes = dict(zip(order, extents, strict=True))
        strides: dict[str, int] = {}
        stride = item_bytes
        for letter in reversed(order):
            strides[letter] = stride
            stride *= sizes[letter]
        num_tokens = sizes["T"] * sizes.get("G", 1)
        return cls(
            num_tokens=num_tokens,
            page_tokens=sizes["T"],
            num_planes=sizes["P"],
            num_layers=sizes.get("L", 1),
            row_bytes=sizes["D"] * item_bytes,
            is_per_layer="L" not in sizes,
            page_stride=strides.get("G", 0),
            token_stride=strides["T"],
            plane_stride=strides["P"],
            layer_stride=strides.get("L", 0),
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.num_planes * self.num_layers * self.num_tokens * self.row_bytes

    def with_item_bytes(self, item_bytes: int) -> ChunkLayout:
        """The same order with wider elements; this one's have one byte."""
        return ChunkLayout(
            self.num_tokens,
            self.page_tokens,
            self.num_planes,
            self.num_layers,
            self.row_bytes * item_bytes,
            self.is_per_layer,
            self.page_stride * item_bytes,
            self.token_stride * item_bytes,
            self.plane_stride * item_bytes,
            self.layer_stride * item_bytes,
        )

    def view(self, elements: torch.Tensor, num_heads: int) -> torch.Tensor:
        """A chunk's elements as ``[planes, layers, tokens, heads, dims]``, without a copy."""
        item_bytes = elements.element_size()
        head_dim = self.row_bytes // item_bytes // num_heads
        sizes = (self.num_planes, self.num_layers, self.num_tokens, num_heads, head_dim)
        strides = (self.plane_stride, self.layer_stride, self.token_stride, head_dim * item_bytes)
        return elements.as_strided(
            sizes, (*(s // item_bytes for s in strides), 1), elements.storage_offset()
        )

    def num_chunks(self, num_tokens: int, num_layers: int) -> int:
        """How many chunks so many tokens of so many layers take."""
        chunks = -(-num_tokens // self.num_tokens)
        return chunks * num_layers if self.is_per_layer else chunks


@dataclass(frozen=True, slots=True)
class Entry:
    """One (layer, plane) on both sides; bytes."""

    cache_base: int
    chunk_offset: int
    block_stride: int
    slot_stride: int
    head_stride: int
    run_bytes: int
    """Bytes of a token that lie together on both sides."""
    layer: int
    """Number of the layer among those that are copied."""


@dataclass(frozen=True, eq=False)
class Pairing:
    """A cache and a chunk side by side.

    Attributes:
        cache, chunk: the two sides.
        layers, heads: which are copied, as given.
        chunk_layers: the same layers as the chunk numbers them.
        chunk_head: the first of the heads in the chunk.
        num_heads: how many heads.
        entries: for each plane, one for each layer.
        pieces: runs of one token in one (layer, plane): its heads, or 1 where they lie together.
        chunk_head_stride: from a piece to the next, in the chunk.
        tokens_merge: whether tokens in neighbouring slots of a block are one run on both sides.
        blocks_merge: whether neighbouring blocks are, too.
        alignment: what divides all of it, up to 16.
    """

    cache: PagedKVCache
    chunk: ChunkLayout
    layers: range
    heads: slice | None
    chunk_layers: Sequence[int]
    chunk_head: int
    num_heads: int
    entries: tuple[tuple[Entry, ...], ...]
    pieces: int
    chunk_head_stride: int
    tokens_merge: bool
    blocks_merge: bool
    alignment: int
    tables: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    """For the kernel: the table on the cache's device, by the bytes it counts in."""

    @classmethod
    def of(
        cls,
        cache: PagedKVCache,
        chunk: ChunkLayout,
        layers: range | None = None,
        heads: slice | None = None,
    ) -> Pairing:
        """Pair them.

        Args:
            cache: the engine's side.
            chunk: the heap's side.
            layers: only those layers of the cache, in steps of 1; None for all. The chunk holds
                all layers of the cache, or just these.
            heads: only those heads, in steps of 1; None for all. Counted on the side that has
                more; the other has just as many as are copied, or the same, and is then sliced
                alike.

        Raises:
            ValueError: the two sides do not hold the same, or a range leaves them.
        """
        rows = [plane.row_bytes for plane in cache.planes]
        is_joined = chunk.num_planes == 1 and cache.num_planes > 1
        if not is_joined and chunk.num_planes != cache.num_planes:
            raise ValueError(
                f"{cache.layout.name} has {cache.num_planes} planes, the chunk {chunk.num_planes}"
            )
        chunk_head_bytes = sum(rows) if is_joined else rows[0]
        if chunk.row_bytes % chunk_head_bytes:
            raise ValueError(
                f"a token of the chunk has {chunk.row_bytes} bytes a layer and plane: no whole "
                f"number of heads of {chunk_head_bytes}"
            )
        chunk_heads = chunk.row_bytes // chunk_head_bytes
        cache_head, chunk_head, num_heads = _heads(cache.num_heads, chunk_heads, heads)
        cache_layers, chunk_layers = _layers(cache.num_layers, chunk, layers)
        chunk_planes = (
            np.cumsum([0, *rows[:-1]])
            if is_joined
            else (np.arange(cache.num_planes) * chunk.plane_stride)
        )
        together = num_heads == 1 or all(
            plane.head_stride == plane.row_bytes == chunk_head_bytes for plane in cache.planes
        )
        pieces = 1 if together else num_heads
        entries = tuple(
            tuple(
                Entry(
                    int(cache.base_addresses[layer, number]) + cache_head * plane.head_stride,
                    chunk_layer * chunk.layer_stride
                    + int(chunk_planes[number])
                    + chunk_head * chunk_head_bytes,
                    plane.block_stride,
                    plane.slot_stride,
                    plane.head_stride,
                    plane.row_bytes * num_heads // pieces,
                    position,
                )
                for position, (layer, chunk_layer) in enumerate(
                    zip(cache_layers, chunk_layers, strict=True)
                )
            )
            for number, plane in enumerate(cache.planes)
        )
        firsts = [plane_entries[0] for plane_entries in entries]
        tokens_merge = pieces == 1 and all(
            entry.run_bytes == chunk.token_stride
            and (cache.block_size == 1 or entry.slot_stride == entry.run_bytes)
            for entry in firsts
        )
        blocks_merge = tokens_merge and all(
            entry.block_stride == cache.block_size * entry.run_bytes for entry in firsts
        )
        return cls(
            cache,
            chunk,
            cache_layers,
            heads,
            chunk_layers,
            chunk_head,
            num_heads,
            entries,
            pieces,
            chunk_head_bytes,
            tokens_merge,
            blocks_merge,
            _alignment(cache, chunk, entries, pieces, chunk_head_bytes),
        )

    @property
    def num_layers(self) -> int:
        """Layers that are copied."""
        return len(self.entries[0])

    @property
    def max_run_bytes(self) -> int:
        """Bytes of the longest run of one token."""
        return max(entries[0].run_bytes for entries in self.entries)

    def table(self) -> Int64Array:
        """All entries as numbers, int64 ``[planes * layers, 7]``, plane by plane."""
        rows = [
            (
                entry.cache_base,
                entry.chunk_offset,
                entry.block_stride,
                entry.slot_stride,
                entry.head_stride,
                entry.run_bytes,
                entry.layer,
            )
            for plane_entries in self.entries
            for entry in plane_entries
        ]
        return np.array(rows, np.int64)

    @property
    def block_unit(self) -> int:
        """Tokens of a block that are one run on both sides, wherever chunks begin and end."""
        if not self.tokens_merge:
            return 1
        return math.gcd(self.cache.block_size, self.chunk.num_tokens, self.chunk.page_tokens)


def _heads(cache_heads: int, chunk_heads: int, heads: slice | None) -> tuple[int, int, int]:
    """First head in the cache, first in the chunk, and how many."""
    if heads is None:
        if cache_heads != chunk_heads:
            raise ValueError(
                f"the cache has {cache_heads} heads, the chunk {chunk_heads}: say with heads= "
                f"which to copy"
            )
        return 0, 0, cache_heads
    most = max(cache_heads, chunk_heads)
    begin, end, step = heads.indices(most)
    if step != 1 or end <= begin or (heads.stop is not None and heads.stop > most):
        raise ValueError(f"heads must be a slice of the {most} heads in steps of 1, got {heads}")
    count = end - begin
    for name, number in (("cache", cache_heads), ("chunk", chunk_heads)):
        if number not in (most, count):
            raise ValueError(
                f"the {name} has {number} heads: neither all {most} nor just the {count} of {heads}"
            )
    return (
        begin if cache_heads == most else 0,
        begin if chunk_heads == most else 0,
        count,
    )


def _layers(
    cache_layers: int, chunk: ChunkLayout, layers: range | None
) -> tuple[range, range | list[int]]:
    """The layers to copy, as the cache and as the chunk number them."""
    wanted = range(cache_layers) if layers is None else layers
    if wanted.step != 1 or not 0 <= wanted.start < wanted.stop <= cache_layers:
        raise ValueError(
            f"layers must be a range in steps of 1 of the {cache_layers} layers, got {wanted}"
        )
    if chunk.is_per_layer:
        return wanted, [0] * len(wanted)
    if chunk.num_layers == cache_layers:
        return wanted, wanted
    if chunk.num_layers == len(wanted):
        return wanted, range(len(wanted))
    raise ValueError(
        f"the chunk has {chunk.num_layers} layers: neither the cache's {cache_layers} nor the "
        f"{len(wanted)} that are copied"
    )


def _alignment(
    cache: PagedKVCache,
    chunk: ChunkLayout,
    entries: tuple[tuple[Entry, ...], ...],
    pieces: int,
    chunk_head_stride: int,
) -> int:
    values = [chunk.token_stride]
    values += [chunk.page_stride] if chunk.page_tokens < chunk.num_tokens else []
    values += [chunk_head_stride] if pieces > 1 else []
    for plane_entries in entries:
        first = plane_entries[0]
        values.append(first.run_bytes)
        values += [first.block_stride] if cache.num_blocks > 1 else []
        values += [first.slot_stride] if cache.block_size > 1 else []
        values += [first.head_stride] if pieces > 1 else []
        for entry in plane_entries:
            values += [entry.cache_base, entry.chunk_offset]
    return alignment_of(*values)
