"""Paged copy on a CPU, by indexing rows of memory. It does no Python work for each token or block.

Memory is viewed as overlapping rows of words, one starting at each word, from the lowest address of
either side to the highest, so that one call reaches layers in separate tensors. An index picks rows
of the cache. Chunks at equal distances, as in most new batches, form a strided view of up to six
dimensions; other chunks take one call each. Either way, every byte is copied once. If tokens are
skipped, or many small chunks are scattered, both sides are indexed and the bytes pass through a
temporary.

Each byte of the tokens is read and written once, plus 8 bytes for the index of each row.
benchmarks/NOTES.md compares the speed with that of other methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kvheap.kernels.arrays import Int64Array, alignment_of, combined_bits
from kvheap.kernels.paged_grid_cpu import span_of
from kvheap.kernels.paged_plan import Entry, Pairing
from kvheap.kernels.paged_rows_cpu import RowCopy
from kvheap.kernels.paged_slots import Places
from kvheap.kernels.token_copy import TokenCopy
from kvheap.kernels.words import CPU_WORDS, memory_at, overlapping_rows

__all__ = ["copy_on_cpu"]

MAX_ROWS = 1 << 20
"""The most rows of one call, with 8 MiB of index; longer copies take several calls, by layers."""

DENSE_PLANE_BYTES = 256 << 10
"""A contiguous plane of a chunk (all layers) with at least this many bytes is stored by its own
call; see benchmarks/NOTES.md."""

FEW_CHUNK_RUNS = 8
"""Up to this many runs of equally spaced chunks, each run is copied by its own call."""

SMALL_PLANE_BYTES = 64 << 10
"""If a chunk's plane has fewer bytes than this, more than ``FEW_CHUNK_RUNS`` runs of chunks are
copied through a temporary; see benchmarks/NOTES.md."""


def copy_on_cpu(copy: TokenCopy) -> None:
    """Copy at least one token between a cache and chunks of its own dtype, all on a CPU."""
    pairing, places, addresses = copy.pairing, copy.places, copy.chunks.addresses
    rows = RowCopy.of(pairing, places.unit_tokens)
    if rows.copy_grid(addresses, places, copy.to_heap):
        return
    if not rows.is_right_for(places.num_tokens):
        done = rows.copy_dense(addresses, copy.chunks.alignment, places, copy.to_heap)
        if done:
            addresses, places = addresses[done:], places.after(done * pairing.chunk.num_tokens)
            if not len(addresses):
                return
    if rows.is_right_for(places.num_tokens):
        if places.num_tokens % places.unit_tokens == 0:
            rows.run(addresses, places, 0, copy.to_heap)
            return
        for part, first_token in _parts(places.as_slots(pairing.cache.block_size)):
            rows = RowCopy.of(pairing, part.unit_tokens)
            rows.run(addresses, part, first_token, copy.to_heap)
        return
    memory = _Memory.over(pairing, addresses, copy.chunks.size_bytes)
    slots = places.as_slots(pairing.cache.block_size).merged(pairing)
    for part, first_token in _parts(slots):
        unit_tokens = part.unit_tokens
        step = _Step(pairing, memory, part.on_host(), first_token, unit_tokens, copy.to_heap)
        step.run(addresses)


def _parts(slots: Places) -> Iterator[tuple[Places, int]]:
    """Places as slots in units that are all full, and the first token of each part."""
    starts, unit, num_tokens = slots.on_host(), slots.unit_tokens, slots.num_tokens
    num_full, rest = divmod(num_tokens, unit)
    if num_full:
        yield Places(starts[:num_full], False, unit, num_full * unit), 0
    if rest:  # the last unit is only partly filled: copy it token by token
        tail = np.full(rest, starts[-1]) if starts[-1] < 0 else starts[-1] + np.arange(rest)
        yield Places(tail, False, 1, rest), num_full * unit


@dataclass(frozen=True, slots=True)
class _Memory:
    """All memory from the lowest address of either side to the highest, as words.

    Two tensors cover the same memory, because torch refuses to read and write one tensor in one
    call. Rows of the cache and views of chunks never share a byte, but torch cannot know that.
    """

    for_rows: torch.Tensor
    for_views: torch.Tensor
    start: int
    word_bytes: int

    @classmethod
    def over(cls, pairing: Pairing, chunk_addresses: Int64Array, chunk_bytes: int) -> _Memory:
        word = CPU_WORDS[alignment_of(pairing.alignment, combined_bits(chunk_addresses))]
        cache_start, cache_end = span_of(pairing)
        start = min(int(chunk_addresses.min()), cache_start)
        end = max(int(chunk_addresses.max()) + chunk_bytes, cache_end)
        size_bytes = (end - start) // word.itemsize * word.itemsize
        raw = memory_at(start, size_bytes, "u1", 1)
        first, second = (torch.from_numpy(raw).view(word) for _ in range(2))
        return cls(first, second, start, word.itemsize)

    @property
    def shift(self) -> int:
        """Bits to shift a number of bytes by, to count words."""
        return self.word_bytes.bit_length() - 1

    def rows(self, row_words: int) -> torch.Tensor:
        """All rows of ``row_words`` words, one starting at each word: they overlap."""
        return overlapping_rows(self.for_rows, row_words)

    def view(self, address: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """A strided view; ``strides`` are in bytes and omit the last dimension, which is a word."""
        in_words = (*(stride // self.word_bytes for stride in strides), 1)
        return self.for_views.as_strided(sizes, in_words, (address - self.start) // self.word_bytes)


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Units of a run of equally spaced chunks: ``[chunks, pages, units of a page]``."""

    first_unit: int
    address: int
    chunks: int
    chunk_stride: int
    pages: int
    units: int

    @property
    def num_units(self) -> int:
        return self.chunks * self.pages * self.units


@dataclass(frozen=True, slots=True)
class _Step:
    """A part of a copy: consecutive tokens, in units of one length."""

    pairing: Pairing
    memory: _Memory
    slots: Int64Array
    first_token: int
    unit_tokens: int
    to_heap: bool

    def run(self, chunk_addresses: Int64Array) -> None:
        chunk = self.pairing.chunk
        layers = self.pairing.num_layers
        calls: list[tuple[slice, Int64Array]]  # which layers, and where their chunks are
        if chunk.is_per_layer:
            by_layer = chunk_addresses.reshape(layers, -1)
            calls = [(slice(i, i + 1), by_layer[i]) for i in range(layers)]
        else:
            rows_per_layer = len(self.slots) * self.pairing.runs_per_token
            step = max(1, MAX_ROWS // rows_per_layer)
            calls = [(slice(i, i + step), chunk_addresses) for i in range(0, layers, step)]
        is_regular = (
            self.first_token == 0
            and bool((self.slots >= 0).all())
            and not self._are_small_and_scattered(calls[0][1])
        )
        for entries in self.pairing.entries:
            offsets = self._cache_offsets(entries[0])
            for layer_slice, addresses in calls:
                if is_regular:
                    self._copy_regular(entries[layer_slice], offsets, addresses)
                else:
                    self._copy_any(entries[layer_slice], offsets, addresses)

    def _are_small_and_scattered(self, addresses: Int64Array) -> bool:
        """Whether a call for each run of chunks would cost more than a temporary."""
        num_runs = 1 + int(np.count_nonzero(np.diff(np.diff(addresses))))
        chunk = self.pairing.chunk
        copied = min(chunk.num_tokens, len(self.slots) * self.unit_tokens) * chunk.row_bytes
        layers = 1 if chunk.is_per_layer else self.pairing.num_layers
        return num_runs > FEW_CHUNK_RUNS and copied * layers < SMALL_PLANE_BYTES

    def _cache_offsets(self, entry: Entry) -> Int64Array:
        """Bytes from the entry's base to each run, int64 ``[units, runs of a token]``."""
        block_size = self.pairing.cache.block_size
        blocks, in_block = np.divmod(self.slots, block_size)
        starts = blocks * entry.block_stride + in_block * entry.slot_stride
        heads = np.arange(self.pairing.runs_per_token, dtype=np.int64) * entry.head_stride
        offsets: Int64Array = starts[:, None] + heads[None, :]
        return offsets

    def _row_words(self, entry: Entry) -> int:
        return entry.run_bytes * self.unit_tokens // self.memory.word_bytes

    def _copy_regular(
        self, entries: tuple[Entry, ...], offsets: Int64Array, addresses: Int64Array
    ) -> None:
        """Copy run after run of chunks, most by one call each."""
        memory, pairing, chunk = self.memory, self.pairing, self.pairing.chunk
        row_words = self._row_words(entries[0])
        rows = memory.rows(row_words)
        bases = np.array([entry.cache_base for entry in entries], np.int64) - memory.start
        for part in self._rectangles(addresses):
            picked = offsets[part.first_unit : part.first_unit + part.num_units]
            index = (bases[:, None, None] + picked[None]) >> memory.shift
            sizes = (len(entries), part.chunks, part.pages, part.units, pairing.runs_per_token)
            strides = (
                chunk.layer_stride,
                part.chunk_stride,
                chunk.page_stride,
                chunk.token_stride * self.unit_tokens,
                pairing.chunk_head_stride,
            )
            view = memory.view(part.address + entries[0].chunk_offset, (*sizes, row_words), strides)
            where = torch.from_numpy(index.reshape(sizes))
            if not self.to_heap:
                rows.index_put_((where,), view)
            elif view[:, 0].is_contiguous() and view[:, 0].nbytes >= DENSE_PLANE_BYTES:
                for number in range(part.chunks):
                    flat = where[:, number].reshape(-1)
                    torch.index_select(rows, 0, flat, out=view[:, number].view(-1, row_words))
            else:
                torch.ops.aten.index.Tensor_out(rows, [where], out=view)

    def _rectangles(self, addresses: Int64Array) -> Iterator[_Rectangle]:
        """All units, from the first token of the first chunk on, in the fewest rectangles."""
        chunk, unit = self.pairing.chunk, self.unit_tokens
        per_page, per_chunk = chunk.page_tokens // unit, chunk.num_tokens // unit
        pages = per_chunk // per_page
        full, left = divmod(len(self.slots), per_chunk)
        begin = 0
        while begin < full:
            # A run of chunks at equal distances, upwards.
            gaps = np.diff(addresses[begin:full])
            same = gaps == gaps[0] if len(gaps) and gaps[0] > 0 else np.zeros(1, np.bool_)
            count = len(gaps) + 1 if same.all() and len(gaps) else int(same.argmin()) + 1
            stride = int(gaps[0]) if count > 1 else 0
            start = int(addresses[begin])
            yield _Rectangle(begin * per_chunk, start, count, stride, pages, per_page)
            begin += count
        if left:
            address, first = int(addresses[full]), full * per_chunk
            pages, rest = divmod(left, per_page)
            if pages:
                yield _Rectangle(first, address, 1, 0, pages, per_page)
            if rest:
                address += pages * chunk.page_stride
                yield _Rectangle(first + pages * per_page, address, 1, 0, 1, rest)

    def _copy_any(
        self, entries: tuple[Entry, ...], offsets: Int64Array, addresses: Int64Array
    ) -> None:
        """Copy the units that are not skipped through a temporary, wherever they are."""
        memory, chunk = self.memory, self.pairing.chunk
        kept = np.flatnonzero(self.slots >= 0)
        if not len(kept):
            return
        tokens = self.first_token + kept * self.unit_tokens
        chunks, in_chunk = np.divmod(tokens, chunk.num_tokens)
        pages, in_page = np.divmod(in_chunk, chunk.page_tokens)
        places = addresses[chunks] + pages * chunk.page_stride + in_page * chunk.token_stride
        runs = np.arange(self.pairing.runs_per_token, dtype=np.int64)
        in_chunks = places[:, None] + runs[None, :] * self.pairing.chunk_head_stride - memory.start
        in_cache = offsets[kept] - memory.start
        rows = memory.rows(self._row_words(entries[0]))

        def row_numbers(bases: list[int], starts: Int64Array) -> torch.Tensor:
            by_layer = np.array(bases, np.int64)[:, None, None] + starts[None]
            return torch.from_numpy(by_layer.reshape(-1) >> memory.shift)

        heap_rows = row_numbers([entry.chunk_offset for entry in entries], in_chunks)
        cache_rows = row_numbers([entry.cache_base for entry in entries], in_cache)
        source, target = (cache_rows, heap_rows) if self.to_heap else (heap_rows, cache_rows)
        rows.index_put_((target,), rows.index_select(0, source))
