"""Paged copies on a CPU: indexing of rows of memory, no Python work per token or block.

Memory is seen as overlapping rows of words, one for each word that a row can start at, from the
lowest address of either side to the highest, as a kernel sees it: so layers that are tensors of
their own are reached by one call. The cache's rows are picked by an index, the chunks are strided
views of up to six dimensions, as far as chunks lie in equal distances, as those of a new batch
mostly do: nothing is copied twice. Other chunks take a call each, or, where tokens are skipped or
many small chunks lie scattered, both sides are indexed over a copy.

Bytes read and written: those of the tokens, once each, and 8 for the index of each row.
Measured on 2 cores of an AMD EPYC, 8 layers of [2, 4096, 16, 8, 128] bf16, 1,024 random tokens in
4 chunks: one call with an output 5.7 GB/s of KV; a call for each layer and plane 5.3;
``index_select`` for each layer, plane and chunk 3.6; into a temporary 2.7. Into the cache:
``index_put_`` 7.1, ``index_copy_`` 3.7. LMCache 0.5.6: 2.7 and 3.1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import CPU_WORDS, alignment_of
from kvheap.kernels.paged_plan import Entry, Pairing
from kvheap.kernels.paged_slots import Places

__all__ = ["copy_on_cpu"]

Int64Array = npt.NDArray[np.int64]

MAX_ROWS = 1 << 20
"""Rows of one call, which is 8 MiB of index: beyond, layers are copied one group after another."""

DENSE_BYTES = 256 << 10
"""Bytes of one plane of a chunk, all its layers, from which ``index_select`` is called for each
chunk where they lie together: 7.1 GB/s of KV for heads of 256 bytes and 17.9 for blocks of 32 KiB,
where one call with an output for all chunks has 2.1 and 16.3; tokens of 2 KiB 7.3 and 7.4."""

FEW_RUNS = 8

SMALL_BYTES = 64 << 10
"""Runs of chunks, and bytes of a chunk's plane, from which on both sides are indexed over a copy:
a call for each chunk and plane costs about 25 us here, as long as 64 KiB take to copy once more.
2,000 scattered chunks of 32 KiB: loaded in 75 ms instead of 127, stored in 40 instead of 109."""


def copy_on_cpu(
    pairing: Pairing, places: Places, chunk_addresses: Int64Array, chunk_bytes: int, to_heap: bool
) -> None:
    """Copy the tokens at ``places`` to or from chunks.

    Args:
        pairing: the two sides.
        places: slots on the host, checked.
        chunk_addresses: absolute, int64 ``[chunks]``; layer-major where chunks hold one layer.
        chunk_bytes: bytes of a chunk.
        to_heap: into the chunks, or out of them.
    """
    places = places.as_slots(pairing.cache.block_size).merged(pairing)
    starts, unit = places.on_host(), places.unit_tokens
    whole = places.num_tokens // unit
    memory = _Memory.over(pairing, chunk_addresses, chunk_bytes)
    parts = [(starts[:whole], 0, unit)]
    rest = places.num_tokens - whole * unit
    if rest:  # the last unit is not full
        tail = np.full(rest, starts[-1]) if starts[-1] < 0 else starts[-1] + np.arange(rest)
        parts.append((tail, whole * unit, 1))
    for slots, first_token, unit_tokens in parts:
        if len(slots):
            step = _Step(pairing, memory, slots, first_token, unit_tokens, to_heap)
            step.run(chunk_addresses)


@dataclass(frozen=True, slots=True)
class _Memory:
    """All memory from the lowest address to the highest, as words.

    Twice, since torch lets no call read and write one tensor: rows of the cache and views of
    chunks never share a byte, but torch only sees that they might.
    """

    for_rows: torch.Tensor
    for_views: torch.Tensor
    start: int
    word_bytes: int

    @classmethod
    def over(cls, pairing: Pairing, chunk_addresses: Int64Array, chunk_bytes: int) -> _Memory:
        word_bits = int(np.bitwise_or.reduce(chunk_addresses))
        word = CPU_WORDS[alignment_of(pairing.alignment, word_bits)]
        bases = (entry.cache_base for entries in pairing.entries for entry in entries)
        start = min(int(chunk_addresses.min()), *bases)
        end = max(int(chunk_addresses.max()) + chunk_bytes, *map(_end_of, pairing.cache.tensors))
        size_bytes = (end - start) // word.itemsize * word.itemsize
        raw = (ctypes.c_char * size_bytes).from_address(start)
        first, second = (torch.frombuffer(raw, dtype=word) for _ in range(2))
        return cls(first, second, start, word.itemsize)

    @property
    def shift(self) -> int:
        """Bytes to words."""
        return self.word_bytes.bit_length() - 1

    def rows(self, row_words: int) -> torch.Tensor:
        """Every row of so many words: they overlap."""
        num_rows = len(self.for_rows) - row_words + 1
        return self.for_rows.as_strided((num_rows, row_words), (1, 1))

    def view(self, address: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """A strided view; strides in bytes but for the last dimension, which is contiguous."""
        in_words = (*(stride // self.word_bytes for stride in strides), 1)
        return self.for_views.as_strided(sizes, in_words, (address - self.start) // self.word_bytes)


def _end_of(tensor: torch.Tensor) -> int:
    """The address behind the last byte of a tensor of positive strides."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.data_ptr()) + (last + 1) * tensor.element_size()


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Units of equally spaced chunks: ``[chunks, pages, units of a page]``."""

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
    """Units of one length, of consecutive tokens."""

    pairing: Pairing
    memory: _Memory
    slots: Int64Array
    first_token: int
    unit_tokens: int
    to_heap: bool

    def run(self, chunk_addresses: Int64Array) -> None:
        chunk = self.pairing.chunk
        layers = self.pairing.num_layers
        groups: list[tuple[slice, Int64Array]]
        if chunk.is_per_layer:
            by_layer = chunk_addresses.reshape(layers, -1)
            groups = [(slice(i, i + 1), by_layer[i]) for i in range(layers)]
        else:
            rows_per_layer = len(self.slots) * self.pairing.pieces
            step = max(1, MAX_ROWS // rows_per_layer)
            groups = [(slice(i, i + step), chunk_addresses) for i in range(0, layers, step)]
        is_regular = (
            self.first_token == 0
            and bool((self.slots >= 0).all())
            and not self._are_small_and_scattered(groups[0][1])
        )
        for entries in self.pairing.entries:
            offsets = self._cache_offsets(entries[0])
            for layer_slice, addresses in groups:
                if is_regular:
                    self._copy_regular(entries[layer_slice], offsets, addresses)
                else:
                    self._copy_any(entries[layer_slice], offsets, addresses)

    def _are_small_and_scattered(self, addresses: Int64Array) -> bool:
        """Whether calls for single chunks would cost more than one copy in between."""
        num_runs = 1 + int(np.count_nonzero(np.diff(np.diff(addresses))))
        chunk = self.pairing.chunk
        copied = min(chunk.num_tokens, len(self.slots) * self.unit_tokens) * chunk.row_bytes
        layers = 1 if chunk.is_per_layer else self.pairing.num_layers
        return num_runs > FEW_RUNS and copied * layers < SMALL_BYTES

    def _cache_offsets(self, entry: Entry) -> Int64Array:
        """Bytes from the entry's base to each run, int64 ``[units, pieces]``."""
        block_size = self.pairing.cache.block_size
        blocks, in_block = np.divmod(self.slots, block_size)
        starts = blocks * entry.block_stride + in_block * entry.slot_stride
        heads = np.arange(self.pairing.pieces, dtype=np.int64) * entry.head_stride
        offsets: Int64Array = starts[:, None] + heads[None, :]
        return offsets

    def _row_words(self, entry: Entry) -> int:
        return entry.run_bytes * self.unit_tokens // self.memory.word_bytes

    def _copy_regular(
        self, entries: tuple[Entry, ...], offsets: Int64Array, addresses: Int64Array
    ) -> None:
        """Copy rectangles of chunks, each by one call."""
        memory, pairing, chunk = self.memory, self.pairing, self.pairing.chunk
        row_words = self._row_words(entries[0])
        rows = memory.rows(row_words)
        bases = np.array([entry.cache_base for entry in entries], np.int64) - memory.start
        for part in self._rectangles(addresses):
            picked = offsets[part.first_unit : part.first_unit + part.num_units]
            index = (bases[:, None, None] + picked[None]) >> memory.shift
            sizes = (len(entries), part.chunks, part.pages, part.units, pairing.pieces)
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
            elif view[:, 0].is_contiguous() and view[:, 0].nbytes >= DENSE_BYTES:
                for number in range(part.chunks):
                    flat = where[:, number].reshape(-1)
                    torch.index_select(rows, 0, flat, out=view[:, number].view(-1, row_words))
            else:
                torch.ops.aten.index.Tensor_out(rows, [where], out=view)

    def _rectangles(self, addresses: Int64Array) -> Iterator[_Rectangle]:
        """All units, from the first token of the first chunk on."""
        chunk, unit = self.pairing.chunk, self.unit_tokens
        per_page, per_chunk = chunk.page_tokens // unit, chunk.num_tokens // unit
        pages = per_chunk // per_page
        full, left = divmod(len(self.slots), per_chunk)
        begin = 0
        while begin < full:
            # A run of chunks in equal distances, upwards.
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
        """Copy units that are not skipped, wherever they are on either side."""
        memory, chunk = self.memory, self.pairing.chunk
        kept = np.flatnonzero(self.slots >= 0)
        if not len(kept):
            return
        tokens = self.first_token + kept * self.unit_tokens
        chunks, in_chunk = np.divmod(tokens, chunk.num_tokens)
        pages, in_page = np.divmod(in_chunk, chunk.page_tokens)
        places = addresses[chunks] + pages * chunk.page_stride + in_page * chunk.token_stride
        heads = np.arange(self.pairing.pieces, dtype=np.int64) * self.pairing.chunk_head_stride
        in_chunks = places[:, None] + heads[None, :] - memory.start
        in_cache = offsets[kept] - memory.start
        rows = memory.rows(self._row_words(entries[0]))

        def row_numbers(bases: list[int], starts: Int64Array) -> torch.Tensor:
            by_layer = np.array(bases, np.int64)[:, None, None] + starts[None]
            return torch.from_numpy(by_layer.reshape(-1) >> memory.shift)

        heap_rows = row_numbers([entry.chunk_offset for entry in entries], in_chunks)
        cache_rows = row_numbers([entry.cache_base for entry in entries], in_cache)
        source, target = (cache_rows, heap_rows) if self.to_heap else (heap_rows, cache_rows)
        rows.index_put_((target,), rows.index_select(0, source))
