"""How rows are cut into words and tiles."""

from __future__ import annotations

import pytest

from kvheap.kernels.tiles import TILE_WORDS, TilePlan


@pytest.mark.parametrize(
    ("row_bytes", "alignment", "word_bytes", "words_per_vector"),
    [(4096, 4096, 8, 2), (4096, 8, 8, 1), (132, 16, 4, 1), (656, 16, 8, 2), (7, 16, 1, 1)],
)
def test_the_widest_word_that_divides_everything_is_taken(
    row_bytes: int, alignment: int, word_bytes: int, words_per_vector: int
) -> None:
    plan = TilePlan.of(10, row_bytes, alignment)
    assert (plan.word_bytes, plan.words_per_vector) == (word_bytes, words_per_vector)
    assert plan.access_bytes == word_bytes * words_per_vector


@pytest.mark.parametrize("row_bytes", [1, 72 * 8, 5000, 1 << 30])
def test_tiles_cover_every_word_once(row_bytes: int) -> None:
    for num_rows in (1, 1000, 1 << 20):
        plan = TilePlan.of(num_rows, row_bytes, 16)
        words = plan.vectors * plan.words_per_vector
        assert words * plan.word_bytes == row_bytes
        assert (plan.col_tiles - 1) * plan.cols < words <= plan.col_tiles * plan.cols
        assert plan.rows * plan.cols == TILE_WORDS
        row_tiles = plan.num_tiles // plan.col_tiles
        assert (row_tiles - 1) * plan.rows < num_rows <= row_tiles * plan.rows
