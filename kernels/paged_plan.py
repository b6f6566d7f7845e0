"""The runs of bytes in a copy between a paged KV cache and chunks.

A chunk keeps the KV of consecutive tokens in one range of memory. A :class:`Pairing` compares a
cache and a chunk layout: for each (layer, plane) it says where both begin, how far apart tokens and
heads are, and how many bytes are contiguous on both sides. It depends neither on slots nor on the
addresses of chunks, so it is made once and kept with the cache.

A cache may have several planes for each of the chunk's: a token's row then holds, for each head,
its bytes of each of these planes. If the chunk keeps groups of heads apart, each group counts as a
plane of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kvheap.kernels.arguments import as_whole
from kvheap.kernels.arrays import Int64Array, alignment_of
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.copy_engine import driver
from kvheap.kernels.paged_layout import PagedKVCache

__all__ = ["Entry", "Pairing", "Streams", "pairing_of"]

MAX_PAIRINGS = 256
"""Pairings kept with a cache, of about 26 KiB each for 32 layers; half are dropped beyond that."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One (layer, plane) in the cache and in a chunk; bytes."""

    cache_base: int
    chunk_offset: int
    block_stride: int
    slot_stride: int
    head_stride: int
    run_bytes: int
    """Bytes of one token that are contiguous on both sides."""
    layer: int
    """Position of the layer among those that are copied."""


@dataclass(frozen=True, eq=False)
class Pairing:
    """A cache and a chunk layout side by side.

    Attributes:
        cache, chunk: the two sides.
        layers, heads: the layers and heads to copy, as the caller gave them.
        chunk_layers: the same layers, as the chunk numbers them.
        chunk_head: index in the chunk of the first head to copy.
        num_heads: how many heads are copied.
        entries: for each plane, or each group of heads of a plane, one entry for each layer.
        runs_per_token: runs of one token in one entry: 1 if its heads are contiguous on both
            sides, else one for each head.
        chunk_head_stride: bytes from a head to the next in the chunk.
        tokens_merge: whether tokens in adjacent slots of a block are one run on both sides.
        blocks_merge: whether tokens of adjacent blocks are one run, too.
        alignment: the largest power of two up to 16 that divides all addresses, strides and runs.
    """

    cache: PagedKVCache
    chunk: ChunkLayout
    layers: range
    heads: slice | None
    chunk_layers: Sequence[int]
    chunk_head: int
    num_heads: int
    entries: tuple[tuple[Entry, ...], ...]
    runs_per_token: int
    chunk_head_stride: int
    tokens_merge: bool
    blocks_merge: bool
    alignment: int
    kept: dict[object, Any] = field(default_factory=dict, repr=False)
    """Results that copies compute once for this pairing and reuse."""

    @classmethod
    def of(
        cls,
        cache: PagedKVCache,
        chunk: ChunkLayout,
        layers: range | None = None,
        heads: slice | None = None,
    ) -> Pairing:
        """The pairing of a cache and a chunk layout.

        Args:
            cache: the engine's side.
            chunk: the heap's side.
            layers: the layers of the cache to copy, in steps of 1; None for all. The chunk holds
                all layers of the cache, or only these.
            heads: the heads to copy, in steps of 1; None for all. They are numbered on the side
                that has more heads. The other side has only these heads, or as many as the first
                side, and is then sliced in the same way.

        Raises:
            ValueError: the two sides differ in planes, layers or heads, or a range exceeds them.
        """
        offsets, chunk_head_bytes = _plane_offsets(cache, chunk)
        if chunk.row_bytes % (chunk_head_bytes * chunk.head_groups):
            raise ValueError(
                f"a token of the chunk has {chunk.row_bytes} bytes in a layer and plane, not a "
                f"whole number of heads of {chunk_head_bytes}"
            )
        chunk_heads = chunk.row_bytes // chunk_head_bytes
        cache_head, chunk_head, num_heads = _heads(cache.num_heads, chunk_heads, heads)
        cache_layers, chunk_layers = _layers(cache.num_layers, chunk, layers)
        per_group = chunk_heads // chunk.head_groups
        # Heads of one entry: they are in one group, and the same number in each entry.
        step = num_heads
        if chunk.head_groups > 1:
            step = math.gcd(per_group, chunk_head, num_heads)
        heads_merge = step == 1 or all(
            plane.head_stride == plane.row_bytes == chunk_head_bytes for plane in cache.planes
        )
        runs_per_token = 1 if heads_merge else step
        entries = tuple(
            tuple(
                Entry(
                    int(cache.base_addresses[layer, number])
                    + (cache_head + first) * plane.head_stride,
                    chunk_layer * chunk.layer_stride
                    + offsets[number]
                    + (chunk_head + first) // per_group * chunk.head_group_stride
                    + (chunk_head + first) % per_group * chunk_head_bytes,
                    plane.block_stride,
                    plane.slot_stride,
                    plane.head_stride,
                    plane.row_bytes * step // runs_per_token,
                    position,
                )
                for position, (layer, chunk_layer) in enumerate(
                    zip(cache_layers, chunk_layers, strict=True)
                )
            )
            for number, plane in enumerate(cache.planes)
            for first in range(0, num_heads, step)
        )
        tokens_merge, blocks_merge = _merges(cache, chunk, entries, runs_per_token)
        return cls(
            cache,
            chunk,
            cache_layers,
            heads,
            chunk_layers,
            chunk_head,
            num_heads,
            entries,
            runs_per_token,
            chunk_head_bytes,
            tokens_merge,
            blocks_merge,
            _alignment(cache, chunk, entries, runs_per_token, chunk_head_bytes),
        )

    @cached_property
    def num_layers(self) -> int:
        """Layers that are copied."""
        return len(self.entries[0])

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token that are copied."""
        of_layer = sum(entries[0].run_bytes for entries in self.entries)
        return of_layer * self.num_layers * self.runs_per_token

    def num_chunks(self, num_tokens: int) -> int:
        """How many chunks ``num_tokens`` tokens take."""
        return self.chunk.num_chunks(num_tokens, self.num_layers)

    @property
    def max_run_bytes(self) -> int:
        """Bytes of the longest run of one token."""
        return max(entries[0].run_bytes for entries in self.entries)

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """For each length of a run, in the order of :meth:`table`: its bytes, and its entries."""
        counts = Counter(entries[0].run_bytes for entries in self.entries)
        return tuple((run_bytes, count * self.num_layers) for run_bytes, count in counts.items())

    def table(self) -> Int64Array:
        """All entries as the kernels read them, int64 ``[planes * layers, 9]``.

        Plane by plane; planes whose runs are equally long follow each other. The columns, in bytes:
        the address of the entry in the cache, its offset in a chunk; the strides of blocks, slots
        and heads in the cache, and of pages, tokens and heads in a chunk; at last the layer, which
        is a number.
        """
        chunk = self.chunk
        strides = (chunk.page_stride, chunk.token_stride, self.chunk_head_stride)
        rows = [
            (
                entry.cache_base,
                entry.chunk_offset,
                entry.block_stride,
                entry.slot_stride,
                entry.head_stride,
                *strides,
                entry.layer,
            )
            for run_bytes, _ in self.groups
            for plane_entries in self.entries
            if plane_entries[0].run_bytes == run_bytes
            for entry in plane_entries
        ]
        return np.array(rows, np.int64)

    @cached_property
    def block_unit(self) -> int:
        """How many tokens of a block are one run on both sides, wherever it begins in a chunk."""
        if not self.tokens_merge:
            return 1
        return math.gcd(self.cache.block_size, self.chunk.num_tokens, self.chunk.page_tokens)


def pairing_of(
    cache: PagedKVCache, chunk: ChunkLayout, layers: range | None, heads: slice | None
) -> Pairing:
    """The pairing of a cache and a chunk layout, kept with the cache once it is made.

    A server needs the same few pairings for all its copies. Arguments are those of
    :meth:`Pairing.of`.

    Raises:
        ValueError: as :meth:`Pairing.of`.
        TypeError: ``layers`` is not a range, or ``heads`` not a slice of integers.
    """
    if layers is not None and not isinstance(layers, range):
        raise TypeError(f"layers must be a range, got {layers!r}")
    if heads is not None and not isinstance(heads, slice):
        raise TypeError(f"heads must be a slice, got {heads!r}")
    bounds = None
    if heads is not None:
        bounds = tuple(
            None if bound is None else as_whole("a bound of heads", bound)
            for bound in (heads.start, heads.stop, heads.step)
        )
        heads = slice(*bounds)
    key = (chunk, layers, bounds)
    found: Pairing | None = cache.kept.get(key)
    if found is None:
        found = Pairing.of(cache, chunk, layers, heads)
        _drop_oldest(cache)
        cache.kept[key] = found
    return found


def _plane_offsets(cache: PagedKVCache, chunk: ChunkLayout) -> tuple[list[int], int]:
    """Bytes to each of the cache's planes in a chunk's row of a head, and the bytes of that row."""
    name, row_bytes = cache.layout.name, [plane.row_bytes for plane in cache.planes]
    side, left = divmod(len(row_bytes), chunk.num_planes)
    if left or not side:
        raise ValueError(f"{name} has {len(row_bytes)} planes, the chunk {chunk.num_planes}")
    if chunk.num_planes > 1 and not cache.is_key_value:
        raise ValueError(f"{name} has no K and V planes, the chunk has {chunk.num_planes} planes")
    sides = [row_bytes[i : i + side] for i in range(0, len(row_bytes), side)]
    widths = {sum(widths) for widths in sides}
    if len(widths) > 1:
        raise ValueError(
            f"{name} has {[sum(widths) for widths in sides]} bytes of a head in its planes: planes "
            f"of unequal size need chunks with one plane, such as KV_MLA_FMT"
        )
    starts = [
        number * chunk.plane_stride + sum(widths[:part])
        for number, widths in enumerate(sides)
        for part in range(side)
    ]
    return starts, widths.pop()


def _drop_oldest(cache: PagedKVCache) -> None:
    """Make room for a pairing; chunks of ever new lengths must not fill the memory."""
    kept = cache.kept.copy()
    pairings = [key for key, value in kept.items() if isinstance(value, Pairing)]
    if len(pairings) < MAX_PAIRINGS:
        return
    streams: Streams | None = kept.get("streams")
    if streams is not None and not streams.wait():
        return
    for key in pairings[: MAX_PAIRINGS // 2]:
        cache.kept.pop(key, None)


class Streams:
    """The streams on which copies of a cache were launched: they may still read its tables."""

    def __init__(self) -> None:
        self._by_handle: dict[int, torch.cuda.Stream] = {}

    @classmethod
    def of(cls, cache: PagedKVCache) -> Streams:
        """Those of a cache, kept with it."""
        found: Streams | None = cache.kept.get("streams")
        return cache.kept.setdefault("streams", cls()) if found is None else found

    def note(self, stream: torch.cuda.Stream) -> None:
        """Note a stream on which a copy is launched."""
        self._by_handle[stream.cuda_stream] = stream

    def wait(self) -> bool:
        """Wait for all of them; False, without a wait, if one is being captured.

        A wait for the device would end any capture on it, whoever makes it.
        """
        streams = self._by_handle.copy()
        if any(driver().is_capturing(handle) for handle in streams):
            return False
        with Relaxed():
            for stream in streams.values():
                stream.record_event().synchronize()
        return True


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
    bounds = (heads.start, heads.stop)
    leaves = any(bound is not None and not -most <= bound <= most for bound in bounds)
    if step != 1 or end <= begin or leaves:
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


def _merges(
    cache: PagedKVCache,
    chunk: ChunkLayout,
    entries: tuple[tuple[Entry, ...], ...],
    runs_per_token: int,
) -> tuple[bool, bool]:
    """Whether tokens in adjacent slots are one run on both sides, and those of adjacent blocks."""
    firsts = [plane_entries[0] for plane_entries in entries]
    tokens_merge = runs_per_token == 1 and all(
        entry.run_bytes == chunk.token_stride
        and (cache.block_size == 1 or entry.slot_stride == entry.run_bytes)
        for entry in firsts
    )
    blocks_merge = tokens_merge and all(
        entry.block_stride == cache.block_size * entry.run_bytes for entry in firsts
    )
    return tokens_merge, blocks_merge


def _alignment(
    cache: PagedKVCache,
    chunk: ChunkLayout,
    entries: tuple[tuple[Entry, ...], ...],
    runs_per_token: int,
    chunk_head_stride: int,
) -> int:
    values = [chunk.token_stride]
    values += [chunk.page_stride] if chunk.page_tokens < chunk.num_tokens else []
    values += [chunk_head_stride] if runs_per_token > 1 else []
    for plane_entries in entries:
        first = plane_entries[0]
        values.append(first.run_bytes)
        values += [first.block_stride] if cache.num_blocks > 1 else []
        values += [first.slot_stride] if cache.block_size > 1 else []
        values += [first.head_stride] if runs_per_token > 1 else []
        for entry in plane_entries:
            values += [entry.cache_base, entry.chunk_offset]
    return alignment_of(*values)
