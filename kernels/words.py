"""Memory viewed as words, the elements that a CPU copy moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "CPU_WORDS",
    "GRAIN",
    "array_at",
    "as_bytes",
    "memory_at",
    "overlapping_rows",
    "view_words",
    "words_at",
]

CPU_WORDS = {
    16: torch.complex128,
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
    1: torch.uint8,
}
"""For each word size in bytes, the dtype that torch moves fastest; see benchmarks/NOTES.md."""


WORD_TYPES = {
    word: np.dtype(f"{'c' if size == 16 else 'u' if size == 1 else 'i'}{size}")
    for size, word in CPU_WORDS.items()
}
"""NumPy's dtype of each."""

GRAIN = 32768
"""torch does not share fewer elements among its threads (``at::internal::GRAIN_SIZE``)."""

FIRST_ADDRESS = 16
"""NumPy takes an address of 0 for none."""


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


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.view(torch.uint8)``, whatever the stride of a last dimension of one element.

    Such a stride is never used, but torch refuses a view of other items unless it is 1.

    >>> scales = torch.zeros(4, 1, 3).transpose(1, 2)
    >>> scales.is_contiguous(), scales.stride(), as_bytes(scales).shape
    (True, (3, 1, 3), torch.Size([4, 3, 4]))
    """
    if tensor.shape[-1] == 1 and tensor.stride(-1) != 1:
        tensor = tensor.as_strided(tensor.shape, (*tensor.stride()[:-1], 1))
    return tensor.view(torch.uint8)


def overlapping_rows(words: torch.Tensor, row_words: int) -> torch.Tensor:
    """All rows of ``row_words`` words in ``words``, one starting at each word, as a view.

    >>> overlapping_rows(torch.arange(4), 3).tolist()
    [[0, 1, 2], [1, 2, 3]]
    """
    return words.as_strided((len(words) - row_words + 1, row_words), (1, 1))


def memory_at(address: int, length: int, dtype: str, stride: int) -> npt.NDArray[Any]:
    """A view of memory as an array, which does not keep the memory alive.

    Args:
        address: absolute address of the first byte.
        length: number of elements.
        dtype: of an element, such as ``"u1"``, or ``"V576"`` for a row of 576 bytes.
        stride: bytes from one element to the next.
    """
    return np.asarray(_ArrayInterface(address, (length,), f"|{dtype}", (stride,)))


def array_at(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]
) -> npt.NDArray[Any]:
    """A view of memory as an array of any shape, which does not keep the memory alive.

    As :func:`memory_at`, in 0.3 us instead of 0.8.

    Args:
        address: absolute address of the first element, at least ``FIRST_ADDRESS``.
        shape: of the array.
        dtype: of an element.
        strides: bytes from one element to the next, not negative.
    """
    return np.ndarray(shape, dtype, _all_memory, address - FIRST_ADDRESS, strides)


def words_at(
    address: int, num_rows: int, row_bytes: int, step: int, word: torch.dtype
) -> torch.Tensor:
    """Rows of memory at equal distances, as words; it does not keep the memory alive.

    Args:
        address: absolute address of the first byte, a multiple of the word.
        num_rows: number of rows.
        row_bytes: bytes of each, a multiple of the word.
        step: bytes from one row to the next, a multiple of the word.
        word: the dtype of a word, one of :data:`CPU_WORDS`.

    Returns:
        ``[num_rows, words of a row]``.
    """
    shape, strides = (num_rows, row_bytes // word.itemsize), (step, word.itemsize)
    return torch.from_numpy(array_at(address, shape, WORD_TYPES[word], strides))


class _ArrayInterface:
    """Memory for ``np.asarray``; cheaper than a ctypes array, which needs a type per length."""

    def __init__(
        self, address: int, shape: tuple[int, ...], typestr: str, strides: tuple[int, ...]
    ) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 3,
        }


_all_memory = memory_at(FIRST_ADDRESS, 1 << 62, "u1", 1)
"""What arrays at an address are views of, because NumPy makes a view faster than an array. Nobody
reads it."""
