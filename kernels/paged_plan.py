"""What a copy between a paged KV cache and chunks consists of: runs of bytes, and where they are.

A chunk keeps the KV of consecutive tokens in one piece of memory. A :class:`Pairing` lays a cache
and a chunk side by side: for each (layer, plane) where both begin and how far apart tokens and
heads are, and how many bytes lie together on both sides. It depends on neither slots nor
addresses, so it is made once and kept with the cache.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import alignment_of
from kvheap.kernels.paged_layout import PagedKVCache

__all__ = ["BlockIds", "ChunkLayout", "Pairing", "Places", "Slots", "count_tokens", "first_tokens"]

Int64Array = npt.NDArray[np.int64]

SKIPPED = -1
"""The slot (or block id) of a token that is not copied."""

SlotMapping: TypeAlias = "npt.NDArray[np.integer] | torch.Tensor | Sequence[int]"


@dataclass(frozen=True, slots=True)
class BlockIds:
    """Tokens by the whole blocks that hold them, instead of a slot for each.

    Attributes:
        ids: block ids in the order of the tokens, integers ``[blocks]``, on the host or on the
            cache's device; -1 skips a block.
        num_tokens: how many tokens they hold; None: every block is full. The last block may be
            partly filled.
    """

    ids: SlotMapping
    num_tokens: int | None = None


Slots: TypeAlias = "BlockIds | SlotMapping"
"""Where tokens are in a cache: their slots, or the blocks that hold them."""


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
    if not isinstance(wanted, range):
        raise TypeError(f"layers must be a range, got {wanted!r}")
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


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of one copy are in the cache, in units of tokens that stay together.

    Attributes:
        values: int64 on the host, or int32 or int64 on the device: slots of the first token of
            each unit, or block ids.
        are_blocks: which of the two.
        unit_tokens: tokens of a unit; for block ids it divides the block.
        num_tokens: all tokens.
    """

    values: Int64Array | torch.Tensor
    are_blocks: bool
    unit_tokens: int
    num_tokens: int

    @classmethod
    def of(cls, slots: Slots, pairing: Pairing, eager: bool, distinct: bool) -> Places:
        """Read slots or block ids.

        Args:
            slots: as users give them.
            pairing: what is copied.
            eager: also look at what is on a device, which waits for it.
            distinct: in eager mode, refuse a slot that is named twice.

        Raises:
            ValueError: out of range, not one-dimensional, or on another device.
            TypeError: they are not integers.
        """
        cache = pairing.cache
        are_blocks = isinstance(slots, BlockIds)
        name, limit = ("block ids", cache.num_blocks) if are_blocks else ("slots", cache.num_slots)
        given = slots.ids if isinstance(slots, BlockIds) else slots
        values = _integers(name, given, cache.device)
        if eager and isinstance(values, torch.Tensor):
            _require_range(name, values.cpu().numpy(), limit)
        elif not isinstance(values, torch.Tensor):
            _require_range(name, values, limit)
        if eager and distinct:
            _require_distinct(name, values)
        num_tokens = len(values)
        if isinstance(slots, BlockIds):
            num_tokens = _tokens_of_blocks(slots, len(values), cache.block_size)
        unit = pairing.block_unit if are_blocks else 1
        return cls(values, are_blocks, unit, num_tokens)

    def on_host(self) -> Int64Array:
        """The values, where they are on the host."""
        assert not isinstance(self.values, torch.Tensor)
        return self.values

    def as_slots(self, block_size: int) -> Places:
        """Block ids on the host as the slots of their units."""
        if not self.are_blocks:
            return self
        ids = self.on_host()
        offsets = np.arange(0, block_size, self.unit_tokens, dtype=np.int64)
        starts = np.where(ids[:, None] < 0, SKIPPED, ids[:, None] * block_size + offsets)
        num_units = -(-self.num_tokens // self.unit_tokens)
        return Places(starts.reshape(-1)[:num_units], False, self.unit_tokens, self.num_tokens)

    def as_mapping(self) -> Int64Array:
        """Slots on the host, one for each token."""
        starts = self.on_host()
        offsets = np.arange(self.unit_tokens, dtype=np.int64)
        slots = np.where(starts[:, None] < 0, SKIPPED, starts[:, None] + offsets)
        return slots.reshape(-1)[: self.num_tokens]

    def merged(self, pairing: Pairing) -> Places:
        """Slots on the host with units as long as all of them allow. O(units), in arrays.

        >>> from kvheap.kernels.paged_layout import PagedKVCache
        >>> cache = PagedKVCache.of("mla", [torch.zeros(8, 4, 2)])
        >>> pairing = Pairing.of(cache, ChunkLayout.of("PLTD", (1, 1, 8, 2), 4))
        >>> Places.of([4, 5, 6, 7, 0, 1, 2, 3], pairing, False, False).merged(pairing)
        Places(values=array([4, 0]), are_blocks=False, unit_tokens=4, num_tokens=8)
        """
        starts, unit = self.on_host(), self.unit_tokens
        if not pairing.tokens_merge or len(starts) < 2:
            return self
        before, after = starts[:-1], starts[1:]
        joined = (after == before + unit) & (before >= 0)
        if not pairing.blocks_merge:
            joined &= after % pairing.cache.block_size != 0
        joined |= (after < 0) & (before < 0)
        breaks = np.flatnonzero(~joined) + 1
        factor = math.gcd(
            int(np.gcd.reduce(breaks)) if len(breaks) else 0,
            pairing.chunk.num_tokens // unit,
            pairing.chunk.page_tokens // unit,
        )
        return Places(starts[::factor], False, unit * factor, self.num_tokens)


def count_tokens(slots: Slots, block_size: int) -> int:
    """How many tokens slots or blocks stand for.

    Raises:
        ValueError: the blocks cannot hold ``num_tokens``.
    """
    if isinstance(slots, BlockIds):
        return _tokens_of_blocks(slots, len(slots.ids), block_size)
    return len(slots)


def first_tokens(slots: Slots, num_tokens: int, block_size: int) -> Slots:
    """The first tokens of more."""
    if isinstance(slots, BlockIds):
        return BlockIds(slots.ids[: -(-num_tokens // block_size)], num_tokens)
    return slots[:num_tokens]


def _integers(name: str, given: SlotMapping, device: torch.device) -> Int64Array | torch.Tensor:
    if isinstance(given, torch.Tensor) and given.device.type != "cpu":
        if given.device != device:
            raise ValueError(f"{name} are on {given.device}, the cache on {device}")
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} on a device must be int32 or int64, got {given.dtype}")
        if given.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {tuple(given.shape)}")
        return given.contiguous()
    array = given.detach().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype} ({array.flat[0]!r}, ...)")
    return array.astype(np.int64, copy=False)


def _require_range(name: str, values: npt.NDArray[np.integer], limit: int) -> None:
    if not len(values):
        return
    lowest, highest = int(values.min()), int(values.max())
    if lowest < SKIPPED or highest >= limit:
        at = int(values.argmin() if lowest < SKIPPED else values.argmax())
        raise ValueError(f"{name}[{at}] is {int(values[at])}: the cache has {limit}, and -1 skips")


def _require_distinct(name: str, values: Int64Array | torch.Tensor) -> None:
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
    ordered = np.sort(array[array >= 0])
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        raise ValueError(
            f"{name} to load into must differ: {ordered[int(repeated.argmax())]} twice"
        )


def _tokens_of_blocks(blocks: BlockIds, num_blocks: int, block_size: int) -> int:
    most = num_blocks * block_size
    if blocks.num_tokens is None:
        return most
    num_tokens = operator.index(blocks.num_tokens)
    if not most - block_size < num_tokens <= most and (num_tokens or num_blocks):
        raise ValueError(
            f"{num_blocks} blocks of {block_size} slots hold {max(most - block_size + 1, 0)} to "
            f"{most} tokens, got num_tokens={num_tokens}"
        )
    return num_tokens
