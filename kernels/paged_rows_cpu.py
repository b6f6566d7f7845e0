"""Paged copy of few bytes on a CPU, where what the call itself costs decides.

NumPy views the memory of each side as overlapping rows, one starting at each byte, as
:mod:`kvheap.kernels.host_copy` does. Two index arrays name the rows of all units, layers, planes
and heads, and one assignment copies them through a temporary that stays in the CPU's cache. It
makes a handful of calls whatever the number of units, layers and runs, and starts no thread, which
others would have to wait for.

Each byte of the tokens is read and written twice, plus 16 bytes for the index of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.paged_plan import Entry, Pairing
from kvheap.kernels.paged_slots import Places
from kvheap.kernels.words import memory_at

__all__ = ["RowCopy", "span_of"]

MAX_BYTES = 256 << 10
"""The most bytes that are copied so; see benchmarks/NOTES.md."""

MAX_SMALL_ROW_BYTES = 16 << 10
"""Copies of several times as many bytes are, too, if their rows have fewer than this."""

MAX_BYTES_OF_SMALL_ROWS = 2 << 20

STEP_BYTES = 128 << 10
"""Bytes of one temporary, or a row if that is more."""

MAX_LISTED = 64
"""Up to this many numbers are compared one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of one length in a cache and its chunks: ``[entries]``, or ``[entries, 1, heads]``.

    Attributes:
        row_bytes: bytes of one unit of an entry, or of one head of it.
        cache_rows: all rows of the cache's memory, one starting at each byte.
        cache_offsets: the first byte of each entry, or of each head, in that memory.
        chunk_offsets: likewise in a chunk.
        last_offset: the highest of them.
        layers: the layer of each entry, if the chunks of each layer are apart.
        block_stride, slot_stride: bytes in the cache.
    """

    row_bytes: int
    cache_rows: npt.NDArray[np.void]
    cache_offsets: Int64Array
    chunk_offsets: Int64Array
    last_offset: int
    layers: Int64Array | None
    block_stride: int
    slot_stride: int

    @classmethod
    def of(cls, pairing: Pairing, entries: tuple[Entry, ...], unit_tokens: int) -> _Rows:
        """The rows of entries that have runs and strides in common."""
        first, heads = entries[0], np.arange(pairing.runs_per_token, dtype=np.int64)
        start, end = span_of(pairing)
        row_bytes = first.run_bytes * unit_tokens
        cache = np.array([entry.cache_base for entry in entries], np.int64) - start
        chunk = np.array([entry.chunk_offset for entry in entries], np.int64)
        layers = np.array([entry.layer for entry in entries], np.int64)
        if len(heads) == 1:
            places = cache[:, None], chunk[:, None]
        else:
            places = (
                cache[:, None, None] + heads * first.head_stride,
                chunk[:, None, None] + heads * pairing.chunk_head_stride,
            )
        return cls(
            row_bytes,
            memory_at(start, end - start - row_bytes + 1, f"V{row_bytes}", 1),
            *places,
            int(places[1].max()),
            layers if pairing.chunk.is_per_layer else None,
            first.block_stride,
            first.slot_stride,
        )


@dataclass(frozen=True, slots=True, eq=False)
class RowCopy:
    """Copies of one pairing in units of one length.

    Attributes:
        pairing: the cache and the chunk layout.
        unit_tokens: tokens of a unit.
        token_bytes: bytes of a token in all entries.
        kinds: the rows, a kind for each length and stride.
        unit_offsets: the first byte of each unit in an entry of a chunk, int64 ``[units]``.
        block_units: the first slot of each unit of a block, int64 ``[units of a block]``.
    """

    pairing: Pairing
    unit_tokens: int
    token_bytes: int
    kinds: tuple[_Rows, ...]
    unit_offsets: Int64Array
    block_units: Int64Array

    @classmethod
    def of(cls, pairing: Pairing, unit_tokens: int) -> RowCopy:
        """Compute what all copies have in common, once for each pairing."""
        found: RowCopy | None = pairing.kept.get(("rows", unit_tokens))
        if found is not None:
            return found
        alike: dict[tuple[int, ...], list[Entry]] = {}
        for entries in pairing.entries:
            first = entries[0]
            key = (first.run_bytes, first.block_stride, first.slot_stride, first.head_stride)
            alike.setdefault(key, []).extend(entries)
        chunk = pairing.chunk
        firsts = np.arange(0, chunk.num_tokens, unit_tokens, dtype=np.int64)
        pages, in_page = np.divmod(firsts, chunk.page_tokens)
        runs = pairing.runs_per_token
        found = cls(
            pairing,
            unit_tokens,
            sum(len(entries) * runs * key[0] for key, entries in alike.items()),
            tuple(_Rows.of(pairing, tuple(each), unit_tokens) for each in alike.values()),
            pages * chunk.page_stride + in_page * chunk.token_stride,
            np.arange(0, pairing.cache.block_size, unit_tokens, dtype=np.int64),
        )
        pairing.kept["rows", unit_tokens] = found
        return found

    def is_right_for(self, num_tokens: int) -> bool:
        """Whether copies of so many tokens are best made so."""
        num_bytes = num_tokens * self.token_bytes
        if num_bytes <= MAX_BYTES:
            return True
        has_small_rows = self.kinds[0].row_bytes < MAX_SMALL_ROW_BYTES
        return has_small_rows and num_bytes <= MAX_BYTES_OF_SMALL_ROWS

    def run(
        self, chunk_addresses: Int64Array, places: Places, first_token: int, to_heap: bool
    ) -> None:
        """Copy consecutive tokens between a cache and chunks of its own dtype, all on a CPU.

        Args:
            chunk_addresses: absolute address of each chunk, int64 ``[N]``.
            places: where the tokens are in the cache, on the host, in full units.
            first_token: the first of these tokens among those of the chunks.
            to_heap: whether the chunks are written.
        """
        pairing, unit_offsets = self.pairing, self.unit_offsets
        first, count = first_token // self.unit_tokens, places.num_tokens // self.unit_tokens
        # Where each unit is in the chunks, [units], or [layers, units].
        units = chunk_addresses
        if pairing.chunk.is_per_layer:
            units = units.reshape(pairing.num_layers, -1)
        if len(unit_offsets) > 1:
            units = units[..., None] + unit_offsets
            units = units.reshape(*units.shape[:-2], -1)
        if first or count < units.shape[-1]:
            units = units[..., first : first + count]
        values, kept = places.on_host(), None
        if not places.are_all_real:
            is_real = values >= 0
            if places.are_blocks:
                is_real = np.repeat(is_real, len(self.block_units))[:count]
            kept = np.flatnonzero(is_real)
            units = units[..., kept]
            if not len(kept):
                return
        lowest, highest = _bounds(units)
        units = units - lowest
        for rows in self.kinds:
            starts = self._starts(values, places.are_blocks, rows)
            if kept is not None:
                starts = starts[kept]
            elif len(starts) > count:
                starts = starts[:count]
            of_entries = units if rows.layers is None else units[rows.layers]
            if rows.chunk_offsets.ndim == 3:
                starts, of_entries = starts[:, None], of_entries[..., None]
            num_starts = highest - lowest + rows.last_offset + 1
            in_cache = (rows.cache_rows, rows.cache_offsets + starts)
            heap_rows = memory_at(lowest, num_starts, f"V{rows.row_bytes}", 1)
            in_heap = (heap_rows, rows.chunk_offsets + of_entries)
            if to_heap:
                _assign(*in_cache, *in_heap, rows.row_bytes)
            else:
                _assign(*in_heap, *in_cache, rows.row_bytes)

    def _starts(self, values: Int64Array, are_blocks: bool, rows: _Rows) -> Int64Array:
        """Bytes from an entry's base to each unit in the cache, int64 ``[units]``."""
        if are_blocks:
            starts = values * rows.block_stride
            if len(self.block_units) > 1:
                starts = (starts[:, None] + self.block_units * rows.slot_stride).reshape(-1)
            return starts
        block_size = self.pairing.cache.block_size
        if rows.block_stride == rows.slot_stride * block_size:
            return values * rows.slot_stride
        blocks, in_block = np.divmod(values, block_size)
        return blocks * rows.block_stride + in_block * rows.slot_stride


def _bounds(units: Int64Array) -> tuple[int, int]:
    """The lowest and the highest of some addresses; the interpreter is faster for a few."""
    if units.size > MAX_LISTED or units.ndim > 1:
        return int(units.min()), int(units.max())
    listed = units.tolist()
    return min(listed), max(listed)


def _assign(
    source: npt.NDArray[np.void],
    from_rows: Int64Array,
    target: npt.NDArray[np.void],
    to_rows: Int64Array,
    row_bytes: int,
) -> None:
    step = max(1, STEP_BYTES // row_bytes)
    if from_rows.size <= step:
        target[to_rows] = source[from_rows]
        return
    from_rows, to_rows = from_rows.reshape(-1), to_rows.reshape(-1)
    for begin in range(0, len(from_rows), step):
        target[to_rows[begin : begin + step]] = source[from_rows[begin : begin + step]]


def span_of(pairing: Pairing) -> tuple[int, int]:
    """The addresses of the cache's first byte and behind its last one, over all its tensors."""
    kept: dict[object, Any] = pairing.cache.kept
    found: tuple[int, int] | None = kept.get("span")
    if found is None:
        ends = []
        for tensor in pairing.cache.tensors:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            ends.append(tensor.data_ptr() + (last + 1) * tensor.element_size())
        found = min(tensor.data_ptr() for tensor in pairing.cache.tensors), max(ends)
        kept["span"] = found
    return found
