"""How the kernels cut rows of bytes into words and tiles.

A copy is a matrix of rows by words; a row is a block, a run of tokens, or a piece. One program
moves one tile of it, ``ROWS`` rows by ``COLS`` words.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvheap.kernels.arrays import alignment_of
from kvheap.kernels.launch import jit, tl

__all__ = ["NUM_WARPS", "TILE_WORDS", "TilePlan", "tile_bounds"]

TILE_WORDS = 2048
"""Words of one program's tile, 16 KiB of 8-byte words: eight 16-byte loads for each of 128
threads. Reasoned, not yet measured on a GPU."""

NUM_WARPS = 4
"""Warps of one program, for tiles of ``TILE_WORDS``."""

MIN_COLS = 16
"""Tile rows are not made narrower than this to waste less: 128 bytes of 8-byte words, one line."""

MAX_WASTED_SHARE = 0.125
"""The share of a tile row that may be masked off before a narrower tile is chosen."""


@jit()
def tile_bounds(  # type: ignore[no-untyped-def]
    tile, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The rows and the columns of a tile, int64; tiles of the same rows follow each other."""
    # Divide in 32 bits, which is cheaper; multiply in 64.
    rows = (tile // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tile % col_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    return rows, cols


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How a matrix of equal rows is cut into words and tiles.

    Attributes:
        word_bytes: bytes of a word: 8, 4, 2 or 1.
        words_per_vector: words of one load or store: 2 if accesses have 16 bytes, else 1.
        rows, cols: rows and words of a tile, both powers of two.
        num_rows: rows of the matrix.
        vectors: loads or stores that one row takes.
        col_tiles: tiles side by side in one row.
        num_tiles: all tiles, and so the programs of a launch.
    """

    word_bytes: int
    words_per_vector: int
    rows: int
    cols: int
    num_rows: int
    vectors: int
    col_tiles: int
    num_tiles: int

    @classmethod
    def of(
        cls, num_rows: int, row_bytes: int, alignment: int, tile_words: int = TILE_WORDS
    ) -> TilePlan:
        """The plan for rows whose bases, addresses and strides are multiples of ``alignment``.

        Args:
            num_rows: rows of the matrix.
            row_bytes: bytes of each.
            alignment: a power of two.
            tile_words: words of a tile, a power of two.
        """
        access_bytes = alignment_of(alignment, row_bytes)
        word_bytes = min(access_bytes, 8)
        words = row_bytes // word_bytes
        cols = _tile_cols(words, tile_words)
        rows = tile_words // cols
        col_tiles = -(-words // cols)
        return cls(
            word_bytes=word_bytes,
            words_per_vector=access_bytes // word_bytes,
            rows=rows,
            cols=cols,
            num_rows=num_rows,
            vectors=row_bytes // access_bytes,
            col_tiles=col_tiles,
            num_tiles=-(-num_rows // rows) * col_tiles,
        )

    def constants(self) -> dict[str, object]:
        """The kernels' constexpr arguments."""
        word = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[self.word_bytes]
        return {
            "WORD": word,
            "WORD_BYTES": self.word_bytes,
            "VECTOR": self.words_per_vector,
            "ROWS": self.rows,
            "COLS": self.cols,
        }

    @property
    def access_bytes(self) -> int:
        """Bytes of one load or store: 16, 8, 4, 2 or 1."""
        return self.word_bytes * self.words_per_vector


def _tile_cols(words: int, tile_words: int) -> int:
    """The widest power of two that wastes little of a row of ``words``.

    >>> [_tile_cols(words, 2048) for words in (1, 72, 512, 5000)]
    [1, 16, 512, 1024]
    """
    cols = min(tile_words, 1 << (words - 1).bit_length())
    while cols > MIN_COLS and -(-words // cols) * cols > words * (1 + MAX_WASTED_SHARE):
        cols //= 2
    return cols
