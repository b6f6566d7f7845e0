"""Memory viewed as words, the elements that a CPU copy moves."""

from __future__ import annotations

import torch

__all__ = ["CPU_WORDS", "overlapping_rows", "view_words"]

CPU_WORDS = {
    16: torch.complex128,
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
    1: torch.uint8,
}
"""For each word size in bytes, the dtype that torch moves fastest; see benchmarks/NOTES.md."""


def view_words(
    tensor: torch.Tensor,
    word: torch.dtype,
    offset_bytes: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    """The storage of ``tensor`` as words, from ``offset_bytes`` on; ``stride`` counts words."""
    view = torch.empty(0, dtype=word, device=tensor.device)
    return view.set_(tensor.untyped_storage(), offset_bytes // word.itemsize, size, stride)


def overlapping_rows(words: torch.Tensor, row_words: int) -> torch.Tensor:
    """All rows of ``row_words`` words in ``words``, one starting at each word, as a view.

    >>> overlapping_rows(torch.arange(4), 3).tolist()
    [[0, 1, 2], [1, 2, 3]]
    """
    return words.as_strided((len(words) - row_words + 1, row_words), (1, 1))
