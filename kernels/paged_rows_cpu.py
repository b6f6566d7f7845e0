"""Paged copy of few bytes on a CPU, where what the call itself costs decides.

NumPy views the memory of each side as overlapping rows, one starting at each byte, as
:mod:`kvheap.kernels.host_copy` does. Two index arrays name the rows of all units, layers, planes
and heads, and one assignment copies them through a temporary that stays in the CPU's cache. It
makes a handful of calls whatever the number of units, layers and runs, and starts no thread, which
others would have to wait for.

Each byte of the tokens is read and written twice, plus 16 bytes for the index of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.paged_dense_cpu import DenseRows
from kvheap.kernels.paged_grid_cpu import Grid, span_of
from kvheap.kernels.paged_plan import Entry, Pairing
from kvheap.kernels.paged_single_cpu import SingleRows
from kvheap.kernels.paged_slots import Places
from kvheap.kernels.words import memory_at

__all__ = ["RowCopy"]

MAX_BYTES = 512 << 10
"""The most bytes that are copied so; see benchmarks/NOTES.md."""

MAX_DIRECT_BYTES = 1 << 20
"""The most bytes if they need no temporary; torch copies more."""

MIN_ROW_BYTES = 4 << 10
"""Shorter rows of tokens are worth a look at whether they can be merged, if there are more bytes;
blocks, which seldom can, from a quarter of it."""

MIN_CHUNK_BYTES = 32 << 10
"""Smaller chunks that lie apart are not worth a call each."""

STEP_BYTES = 128 << 10
"""Bytes of one temporary, or a row if that is more."""

FEW_UNITS = 8
SMALL_UNIT = 16 << 10
"""More than a few units of fewer bytes than this are not worth an assignment each."""

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
        unit_step: bytes from one unit of an entry to the next; 0 if they differ.
        block_units: the first slot of each unit of a block, int64 ``[units of a block]``.
        dense: the rows, if those of a chunk, entry after entry, follow each other.
        grid: the rows by place, if those of all entries are at equal distances, as where all layers
            share one storage.
        single: the rows by block, if each block is one, as in a cache of one layer.
    """

    pairing: Pairing
    unit_tokens: int
    token_bytes: int
    kinds: tuple[_Rows, ...]
    unit_offsets: Int64Array
    unit_step: int
    block_units: Int64Array
    dense: DenseRows | None
    grid: Grid | None
    single: SingleRows | None

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
        kinds = tuple(_Rows.of(pairing, tuple(each), unit_tokens) for each in alike.values())
        unit_offsets = pages * chunk.page_stride + in_page * chunk.token_stride
        block_units = np.arange(0, pairing.cache.block_size, unit_tokens, dtype=np.int64)
        dense = _dense_rows(pairing, kinds, unit_offsets)
        grid = Grid.of(pairing, unit_tokens) if len(kinds) == 1 else None
        single = None
        if dense is not None and grid is not None and grid.is_row and len(block_units) == 1:
            single = SingleRows.of(dense, grid.cache_rows, len(unit_offsets))
        found = cls(
            pairing,
            unit_tokens,
            sum(len(entries) * runs * key[0] for key, entries in alike.items()),
            kinds,
            unit_offsets,
            _only(np.diff(unit_offsets)),
            block_units,
            dense,
            grid,
            single,
        )
        pairing.kept["rows", unit_tokens] = found
        return found

    def is_right_for(self, num_tokens: int) -> bool:
        """Whether :meth:`run` is to copy so many tokens."""
        return num_tokens * self.token_bytes <= MAX_BYTES

    def copy_grid(self, chunk_addresses: Int64Array, places: Places, to_heap: bool) -> bool:
        """Copy a few units without a temporary, if their rows are at equal distances.

        Arguments are those of :meth:`copy_dense`. Returns whether they were copied.
        """
        grid, count = self.grid, len(places.values)
        if (
            grid is None
            or places.are_blocks != grid.are_blocks
            or places.num_tokens != count * self.unit_tokens
            or not places.are_all_real
            or not self._is_few(count)
        ):
            return False
        addresses = self.addresses_of(chunk_addresses.tolist(), count, grid.chunk_offset)
        grid.copy_each(addresses, places.on_host().tolist(), to_heap)
        return True

    def _is_few(self, count: int) -> bool:
        """Whether so many units are worth an assignment each."""
        unit_bytes = self.token_bytes * self.unit_tokens
        most = MAX_LISTED if unit_bytes >= SMALL_UNIT else FEW_UNITS
        return count <= most and count * unit_bytes <= MAX_DIRECT_BYTES

    def addresses_of(self, chunk_addresses: Sequence[int], count: int, first: int) -> list[int]:
        """The address of the first row of each of so many units, in an entry at byte ``first``."""
        if len(self.unit_offsets) == 1:
            return [address + first for address in chunk_addresses]
        offsets = [offset + first for offset in self.unit_offsets.tolist()]
        return [address + offset for address in chunk_addresses for offset in offsets][:count]

    def copy_dense(
        self, chunk_addresses: Int64Array, alignment: int, places: Places, to_heap: bool
    ) -> int:
        """Copy whole chunks without a temporary, if the rows of a chunk follow each other.

        Args:
            chunk_addresses: absolute address of each chunk, int64 ``[N]``.
            alignment: a power of two that divides them.
            places: where the tokens are in the cache, on the host.
            to_heap: whether the chunks are written.

        Returns:
            How many chunks were copied, from the first one on: all that are full, or none.
        """
        per_chunk, values = len(self.unit_offsets), places.on_host()
        num_chunks = places.num_tokens // (per_chunk * self.unit_tokens)
        is_plain = places.are_all_real and not (places.are_blocks and len(self.block_units) > 1)
        dense = self.dense
        if not (dense is not None and is_plain and num_chunks):
            return 0
        rows, chunk_bytes = self.kinds[0], self.pairing.chunk.size_bytes
        min_row_bytes = MIN_ROW_BYTES // 4 if places.are_blocks else MIN_ROW_BYTES
        is_large = num_chunks * chunk_bytes > MAX_DIRECT_BYTES
        if is_large and rows.row_bytes < min_row_bytes:
            return 0
        addresses = chunk_addresses[:num_chunks]
        is_run = int(addresses[-1] - addresses[0]) == (num_chunks - 1) * chunk_bytes and (
            num_chunks < 3 or bool((np.diff(addresses) == chunk_bytes).all())
        )
        if not is_run and chunk_bytes < MIN_CHUNK_BYTES:
            return 0
        starts = self._starts(values[: num_chunks * per_chunk], places.are_blocks, rows)
        heads = (1,) * (rows.cache_offsets.ndim - 2)
        numbers = rows.cache_offsets + starts.reshape(num_chunks, 1, per_chunk, *heads)
        if is_run:
            parts = [(int(addresses[0]), numbers.reshape(-1))]
        else:
            parts = list(zip(addresses.tolist(), numbers.reshape(num_chunks, -1), strict=True))
        for address, of_part in parts:
            dense.copy_rows(address, of_part, alignment, to_heap)
        return num_chunks

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
        starts: Int64Array
        if are_blocks:
            starts = values * rows.block_stride
            if len(self.block_units) > 1:
                starts = (starts[:, None] + self.block_units * rows.slot_stride).reshape(-1)
            return starts
        block_size = self.pairing.cache.block_size
        if rows.block_stride == rows.slot_stride * block_size:
            starts = values * rows.slot_stride
        else:
            blocks, in_block = np.divmod(values, block_size)
            starts = blocks * rows.block_stride + in_block * rows.slot_stride
        return starts


def _dense_rows(
    pairing: Pairing, kinds: tuple[_Rows, ...], unit_offsets: Int64Array
) -> DenseRows | None:
    """The rows of a chunk, if they follow each other."""
    if len(kinds) > 1 or pairing.chunk.is_per_layer:
        return None
    rows = kinds[0]
    heads = (1,) * (rows.chunk_offsets.ndim - 2)
    starts = (rows.chunk_offsets + unit_offsets.reshape(-1, *heads)).reshape(-1)
    if len(starts) * rows.row_bytes != pairing.chunk.size_bytes:
        return None
    if (np.diff(starts, prepend=-rows.row_bytes) != rows.row_bytes).any():
        return None
    return DenseRows(
        span_of(pairing),
        rows.row_bytes,
        rows.row_bytes // pairing.cache.dtype.itemsize,
        rows.cache_rows,
        rows.cache_offsets,
        rows.block_stride,
        pairing.alignment,
    )


def _only(numbers: Int64Array) -> int:
    """The number that all of them are; 0 if they differ."""
    return int(numbers[0]) if len(numbers) and (numbers == numbers[0]).all() else 0


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
