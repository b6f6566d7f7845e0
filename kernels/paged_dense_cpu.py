"""Paged copy on a CPU where the rows of a chunk follow each other: an index picks them by one call.

Chunks in a run are then dense rows, and an index picks the rows of the cache in their order. The
cache's memory is viewed as overlapping rows, so that one call reaches all layers, wherever they
are. NumPy copies few bytes, whose views cost less. More of them are copied by torch, without a
temporary, and here its threads decide:

- A call of at most ``GRAIN`` elements runs on the calling thread alone. A longer one is shared by
  torch's threads, and each call waits for all of them: where other work keeps the cores busy, for
  milliseconds, whatever it copies.
- So they are started only where the loop that this replaces, an indexing call for each layer,
  starts them too. Other copies are made of calls of at most ``GRAIN`` words; if they are large,
  helper threads take some of these calls, and nobody waits for a helper that has taken none.

Each byte of the tokens is read and written once, or twice through NumPy's temporary, plus 8 bytes
for the index of each row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.host_copy import MAX_THREADS, THREAD_BYTES
from kvheap.kernels.shared_work import do_all
from kvheap.kernels.words import CPU_WORDS, GRAIN, array_at, memory_at, overlapping_rows, words_at

__all__ = ["MAX_NUMPY_BYTES", "MIN_SHARED_BYTES", "DenseRows", "copy_in_steps", "starts_threads"]

MIN_SHARED_BYTES = 512 << 10
"""torch's threads share no fewer bytes: the grain of a call in words of 16 bytes."""

MAX_NUMPY_BYTES = 8 << 20
"""The most bytes that NumPy copies: about a millisecond, in which no other thread runs Python."""

STEP_BYTES = 128 << 10
"""Bytes of a temporary of NumPy, or a row if that is more; see benchmarks/NOTES.md."""


def starts_threads(num_rows: int, row_elements: int) -> bool:
    """Whether an ``index_select(out=)`` of so many rows starts torch's threads.

    Rows of fewer elements than ``GRAIN`` are shared among the threads, and so is each longer one;
    rows of just as many are copied one by one (torch 2.13.0, ``index_select_out_cpu_``; an
    ``index_copy_`` shares these, too).

    >>> starts_threads(4, 8192), starts_threads(5, 8192), starts_threads(64, 32768)
    (False, True, False)
    """
    return num_rows * row_elements > GRAIN and row_elements != GRAIN


@dataclass(frozen=True, slots=True, eq=False)
class DenseRows:
    """Rows of a cache that follow each other in a chunk, entry after entry.

    Attributes:
        span: the addresses of the cache's first byte, a multiple of any word, and behind its last.
        row_bytes: bytes of a row: of one unit of an entry, or of one head of it.
        row_elements: elements of a row.
        cache_rows: all rows of the cache's memory, one starting at each byte; they overlap.
        row_offsets: the first byte of each row of a unit at place 0, from the start of the span,
            int64 ``[entries, 1]`` or ``[entries, 1, heads]``.
        place_bytes: bytes from one place to the next.
        alignment: a power of two that divides all of these.
    """

    span: tuple[int, int]
    row_bytes: int
    row_elements: int
    cache_rows: npt.NDArray[np.void]
    row_offsets: Int64Array
    place_bytes: int
    alignment: int
    _words: dict[int, _Words] = field(default_factory=dict, init=False)

    def is_shared(self, num_units: int) -> bool:
        """Whether torch's threads share a copy of so many units, as they share those of a loop."""
        return starts_threads(num_units, self.row_elements) and torch.get_num_threads() > 1

    def are_rows(self, chunks: range, per_chunk: int) -> bool:
        """Whether the rows of chunks at equal distances are at equal distances, too.

        Args:
            chunks: absolute address of each chunk.
            per_chunk: units of a chunk.
        """
        num_rows = self.row_offsets.size * per_chunk
        return num_rows == 1 or len(chunks) == 1 or chunks.step == num_rows * self.row_bytes

    def copy_places(self, chunks: range, places: Int64Array, per_chunk: int, to_heap: bool) -> None:
        """Copy whole units between places of the cache and whole chunks.

        Args:
            chunks: absolute address of each chunk; :meth:`are_rows`.
            places: the place of each unit, counted in ``place_bytes``, int64 ``[units]``; as many
                as the chunks have.
            per_chunk: units of a chunk.
            to_heap: whether the chunks are written.
        """
        num_rows, address = self.row_offsets.size * per_chunk, chunks.start
        step = chunks.step if num_rows == 1 else self.row_bytes
        num_bytes = len(chunks) * num_rows * self.row_bytes
        heads = (1,) * (self.row_offsets.ndim - 2)
        by_chunk = places.reshape(-1, 1, per_chunk, *heads)
        if num_bytes <= MAX_NUMPY_BYTES and not (
            num_bytes > MIN_SHARED_BYTES and self.is_shared(len(places))
        ):
            numbers = (self.row_offsets + by_chunk * self.place_bytes).reshape(-1)
            run = array_at(address, numbers.shape, self.cache_rows.dtype, (step,))
            copy_in_steps(self.cache_rows, numbers, run, to_heap)
            return
        words = self._words_of(self.alignment | address | step)
        if words.units is not None:
            self._copy(words, words.units, address, places, step, to_heap)
            return
        numbers = (words.row_numbers + by_chunk * words.place_words).reshape(-1)
        self._copy(words, words.rows, address, numbers, step, to_heap)

    def copy_units(self, address: int, step: int, places: Int64Array, to_heap: bool) -> None:
        """Copy units that are one row each by one call, which torch's threads share.

        Args:
            address: absolute address of the first one outside of the cache.
            step: bytes from there to the next.
            places: the place of each in the cache, int64 ``[units]``.
            to_heap: whether the cache is read.
        """
        words = self._words_of(self.alignment | address | step)
        assert words.units is not None
        run = words_at(address, len(places), self.row_bytes, step, words.word)
        _copy_rows(words.units, torch.from_numpy(places), run, to_heap)

    def copy_rows(self, address: int, offsets: Int64Array, alignment: int, to_heap: bool) -> None:
        """Copy rows between the cache and a run of memory.

        Args:
            address: absolute address of the run.
            offsets: the first byte of each row in the cache, from the start of the span.
            alignment: a power of two that divides the address.
            to_heap: whether the run is written.
        """
        words = self._words_of(self.alignment | alignment)
        numbers = offsets >> (words.word.itemsize.bit_length() - 1)
        self._copy(words, words.rows, address, numbers, self.row_bytes, to_heap)

    def _copy(
        self,
        words: _Words,
        source: torch.Tensor,
        address: int,
        numbers: Int64Array,
        step: int,
        to_heap: bool,
    ) -> None:
        """Copy rows of ``source`` by torch, in as many calls as keep its threads out of it."""
        num_rows, most = len(numbers), max(1, GRAIN * words.word.itemsize // self.row_bytes)
        is_one = num_rows <= most or torch.get_num_threads() == 1
        if is_one or self.is_shared(num_rows // self.row_offsets.size):
            run = words_at(address, num_rows, self.row_bytes, step, words.word)
            _copy_rows(source, torch.from_numpy(numbers), run, to_heap)
            return
        with torch.inference_mode(False):  # as helper threads are
            run = words_at(address, num_rows, self.row_bytes, step, words.word)
            parts = torch.split(torch.from_numpy(numbers), most)
            pairs = zip(parts, torch.split(run, most), strict=True)
            calls = [partial(_copy_rows, source, *pair, to_heap) for pair in pairs]
        num_bytes = num_rows * self.row_bytes
        threads = min(torch.get_num_threads(), MAX_THREADS, num_bytes // THREAD_BYTES)
        if threads > 1:
            do_all(calls, threads)
        else:
            for call in calls:
                call()

    def _words_of(self, bits: int) -> _Words:
        """The cache in words of as many bytes as the lowest of some bits stands for, 16 at most."""
        found = self._words.get(bits & -bits)
        if found is None:
            word = CPU_WORDS[bits & -bits]
            found = self._words[bits & -bits] = _Words.of(self, word)
        return found


def copy_in_steps(
    rows: npt.NDArray[np.void],
    numbers: list[int] | Int64Array,
    run: npt.NDArray[np.void],
    to_heap: bool,
) -> None:
    """Copy the rows of these numbers to or from a run by NumPy, which takes no other thread.

    A temporary, which a store needs and a load may, has ``STEP_BYTES`` and stays in the CPU's
    cache.

    Args:
        rows: rows of the cache.
        numbers: which of them, int64 ``[N]``.
        run: the rows outside of the cache, ``[N]``.
        to_heap: whether the run is written.
    """
    count, most = len(numbers), max(1, STEP_BYTES // rows.itemsize)
    if count <= most:
        if to_heap:
            run[...] = rows[numbers]
        else:
            rows[numbers] = run
        return
    for first in range(0, count, most):
        part = slice(first, first + most)
        if to_heap:
            run[part] = rows[numbers[part]]
        else:
            rows[numbers[part]] = run[part]


def _copy_rows(rows: torch.Tensor, numbers: torch.Tensor, run: torch.Tensor, to_heap: bool) -> None:
    """Copy the rows of these numbers to or from a run, by one call."""
    if to_heap:
        torch.index_select(rows, 0, numbers, out=run)
    else:
        rows.index_copy_(0, numbers, run)


@dataclass(frozen=True, slots=True, eq=False)
class _Words:
    """The cache in words of one size.

    Attributes:
        word: the dtype of a word.
        rows: all rows of the cache's memory, one starting at each word; they overlap.
        units: those of each place, if a unit is one row; else None.
        row_numbers: which of them are the rows of a unit at place 0, shaped as ``row_offsets``.
        place_words: words from one place to the next.
    """

    word: torch.dtype
    rows: torch.Tensor
    units: torch.Tensor | None
    row_numbers: Int64Array
    place_words: int

    @classmethod
    def of(cls, dense: DenseRows, word: torch.dtype) -> _Words:
        size, (start, end) = word.itemsize, dense.span
        num_bytes = (end - start) // size * size
        with torch.inference_mode(False):  # a copy outside of it may write these
            words = torch.from_numpy(memory_at(start, num_bytes, "u1", 1)).view(word)
            rows, units = overlapping_rows(words, dense.row_bytes // size), None
            if dense.row_offsets.size == 1:
                place_words = max(1, dense.place_bytes // size)
                units = rows[int(dense.row_offsets.flat[0]) // size :: place_words]
        return cls(word, rows, units, dense.row_offsets // size, dense.place_bytes // size)
