"""Paged copy on a CPU where the rows of a chunk follow each other: one indexing call of torch.

Chunks in a run are then dense rows, and an index picks the rows of the cache in their order. No
byte goes through a temporary. The cache's memory is viewed as overlapping rows, one starting at
each word, so that one call reaches all layers, wherever they are.

Each byte of the tokens is read and written once, plus 8 bytes for the index of each row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.words import CPU_WORDS, memory_at, overlapping_rows, words_at

__all__ = ["DenseRows"]


@dataclass(frozen=True, slots=True, eq=False)
class DenseRows:
    """Rows of a cache that follow each other in a chunk, entry after entry.

    Attributes:
        span: the addresses of the cache's first byte, a multiple of any word, and behind its last.
        row_bytes: bytes of a row: of one unit of an entry, or of one head of it.
        row_offsets: the first byte of each row of a unit at place 0, from the start of the span,
            int64 ``[entries, 1]`` or ``[entries, 1, heads]``.
        place_bytes: bytes from one place to the next.
        alignment: a power of two that divides all of these.
    """

    span: tuple[int, int]
    row_bytes: int
    row_offsets: Int64Array
    place_bytes: int
    alignment: int
    _words: dict[int, _Words] = field(default_factory=dict, init=False)

    def copy_places(
        self, chunks: range, places: torch.Tensor, per_chunk: int, to_heap: bool
    ) -> bool:
        """Copy whole units between places of the cache and whole chunks at equal distances.

        Args:
            chunks: absolute address of each chunk.
            places: the place of each unit, counted in ``place_bytes``; integers ``[units]`` on the
                host, as many as the chunks have.
            per_chunk: units of a chunk.
            to_heap: whether the chunks are written.

        Returns:
            Whether they were copied. If not, their rows are not at equal distances.
        """
        num_rows, step = self.row_offsets.size * per_chunk, self.row_bytes
        if len(chunks) > 1 and chunks.step != num_rows * step:
            if num_rows > 1:
                return False
            step = chunks.step
        words = self._words_of(self.alignment | chunks.start | step)
        places = places.view(-1, 1, per_chunk, *words.heads)
        rows = torch.add(words.row_numbers, places, alpha=words.place_words).view(-1)
        self._copy(words, chunks.start, rows, step, to_heap)
        return True

    def copy_rows(self, address: int, offsets: Int64Array, alignment: int, to_heap: bool) -> None:
        """Copy rows between the cache and a run of memory.

        Args:
            address: absolute address of the run.
            offsets: the first byte of each row in the cache, from the start of the span.
            alignment: a power of two that divides the address.
            to_heap: whether the run is written.
        """
        words = self._words_of(self.alignment | alignment)
        rows = torch.from_numpy(offsets >> (words.word.itemsize.bit_length() - 1))
        self._copy(words, address, rows, self.row_bytes, to_heap)

    def _copy(
        self, words: _Words, address: int, rows: torch.Tensor, step: int, to_heap: bool
    ) -> None:
        run = words_at(address, rows.numel(), self.row_bytes, step, words.word)
        if to_heap:
            torch.index_select(words.rows, 0, rows, out=run)
        else:
            words.rows.index_copy_(0, rows, run)

    def _words_of(self, bits: int) -> _Words:
        """The cache in words of as many bytes as the lowest of some bits stands for, 16 at most."""
        found = self._words.get(bits & -bits)
        if found is None:
            word = CPU_WORDS[bits & -bits]
            found = self._words[bits & -bits] = _Words.of(self, word)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Words:
    """The cache in words of one size.

    Attributes:
        word: the dtype of a word.
        rows: all rows of the cache's memory, one starting at each word; they overlap.
        row_numbers: which of them are the rows of a unit at place 0, shaped as ``row_offsets``.
        place_words: words from one place to the next.
        heads: a one if ``row_offsets`` has heads.
    """

    word: torch.dtype
    rows: torch.Tensor
    row_numbers: torch.Tensor
    place_words: int
    heads: tuple[int, ...]

    @classmethod
    def of(cls, dense: DenseRows, word: torch.dtype) -> _Words:
        size, (start, end) = word.itemsize, dense.span
        num_bytes = (end - start) // size * size
        with torch.inference_mode(False):  # a copy outside of it may write these
            words = torch.from_numpy(memory_at(start, num_bytes, "u1", 1)).view(word)
            rows = overlapping_rows(words, dense.row_bytes // size)
            numbers = torch.from_numpy(dense.row_offsets // size)
        return cls(word, rows, numbers, dense.place_bytes // size, (1,) * (numbers.ndim - 2))
