"""How rows of bytes are cut into words and tiles, for the kernels that copy them."""

from __future__ import annotations

from dataclasses import dataclass

from kvheap.kernels.launch import alignment_of, tl

__all__ = ["NUM_WARPS", "TilePlan"]

TILE_WORDS = 2048
"""Words of one program's tile: 16 KiB of 8-byte words, eight 16-byte loads in flight for each of
128 threads. Chosen by counting bytes in flight; not yet measured on a GPU."""

NUM_WARPS = 4

MIN_COLS = 16
"""Words of the narrowest tile row that is worth its waste: 128 bytes of 8-byte words, one line."""

MAX_WASTED_SHARE = 0.125
"""How much of a tile row may be masked off before a narrower one is taken."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How blocks are cut into words and tiles; the constants that a kernel is compiled for."""

    word_bytes: int
    words_per_vector: int
    rows: int
    cols: int
    num_blocks: int
    vectors: int
    col_tiles: int
    num_tiles: int

    @classmethod
    def of(
        cls, num_blocks: int, block_bytes: int, alignment: int, tile_words: int = TILE_WORDS
    ) -> TilePlan:
        """Plan for blocks whose sizes, strides, bases and addresses share ``alignment``."""
        access_bytes = alignment_of(alignment, block_bytes)
        word_bytes = min(access_bytes, 8)
        words = block_bytes // word_bytes
        cols = _tile_cols(words, tile_words)
        rows = tile_words // cols
        col_tiles = -(-words // cols)
        return cls(
            word_bytes=word_bytes,
            words_per_vector=access_bytes // word_bytes,
            rows=rows,
            cols=cols,
            num_blocks=num_blocks,
            vectors=block_bytes // access_bytes,
            col_tiles=col_tiles,
            num_tiles=-(-num_blocks // rows) * col_tiles,
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

    def strides(self, stride_bytes: int) -> int:
        """A stride in vectors."""
        return stride_bytes // (self.word_bytes * self.words_per_vector)


def _tile_cols(words: int, tile_words: int = TILE_WORDS) -> int:
    """The widest power of two that wastes little of a row of ``words``.

    >>> [_tile_cols(words) for words in (1, 72, 512, 5000)]
    [1, 16, 512, 1024]
    """
    cols = min(tile_words, 1 << (words - 1).bit_length())
    while cols > MIN_COLS and -(-words // cols) * cols > words * (1 + MAX_WASTED_SHARE):
        cols //= 2
    return cols
