"""Block copy on a CPU; also the reference for the kernels.

If the blocks form one run on both sides, a single ``copy_`` copies them. Blocks of
:data:`MOVE_BYTES` and more, up to :data:`MAX_MOVED_BYTES` in all, are moved one by one in the
calling thread. Otherwise the buffer is viewed as overlapping rows, one for each word that a block
can start at, and indexing calls pick the rows: up to :data:`MAX_MOVED_BYTES` so many that none
starts torch's threads, which it would wait for where cores are busy; beyond, a single one. A word
has 16 bytes, or the largest smaller power of two that divides all addresses, strides and the block
size.

Each byte of the blocks is read and written once, plus 8 bytes for each address. Several runs do not
get one ``copy_`` each, because every ``copy_`` waits for all of torch's threads; see
benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections import deque
from ctypes import memmove
from itertools import repeat

import numpy as np
import torch

from kvheap.kernels.arrays import Int64Array, alignment_of
from kvheap.kernels.block_sides import Dense, Scattered, Side
from kvheap.kernels.words import CPU_WORDS, GRAIN

__all__ = ["copy_on_cpu", "fill_on_cpu", "repeated_byte"]

MOVE_BYTES = 8 << 10
"""Blocks of at least so many bytes are moved one by one; see benchmarks/NOTES.md."""

MAX_MOVED_BYTES = 16 << 20
"""More bytes are copied by torch, with all its threads; see benchmarks/NOTES.md."""


MIN_PART_WORD = 8
"""In words of fewer bytes, calls of so many elements would be too many."""


def copy_on_cpu(source: Side, target: Side, block_bytes: int) -> None:
    """Copy blocks of ``block_bytes``, at least one, between CPU tensors.

    Args:
        source: the side to read.
        target: the side to write; it must be scattered if ``source`` is dense.
        block_bytes: bytes of each block, positive.
    """
    sources, targets = source.starts(), target.starts()
    num_bytes = len(sources) * block_bytes
    if _is_one_run(sources, block_bytes) and _is_one_run(targets, block_bytes):
        first, place = int(sources[0]), int(targets[0])
        target.flat()[place : place + num_bytes].copy_(source.flat()[first : first + num_bytes])
        return
    if block_bytes >= MOVE_BYTES and num_bytes <= MAX_MOVED_BYTES:
        sources, targets = sources + source.flat().data_ptr(), targets + target.flat().data_ptr()
        moves = map(memmove, targets.tolist(), sources.tolist(), repeat(block_bytes))
        deque(moves, maxlen=0)
        return
    word = _widest_word(block_bytes, source, target)
    blocks = source.rows(block_bytes, word)
    parts = _parts(len(sources), block_bytes, word)
    if isinstance(source, Scattered):
        numbers = source.row_numbers(word)
        if isinstance(target, Dense):
            out = target.rows(block_bytes, word)
        else:
            out = torch.empty((len(numbers), blocks.shape[1]), dtype=word, device="cpu")
        for part in parts:
            torch.index_select(blocks, 0, numbers[part], out=out[part])
        if isinstance(target, Dense):
            return
        blocks = out
    assert isinstance(target, Scattered)
    places, rows = target.row_numbers(word), target.rows(block_bytes, word)
    if word == torch.uint8:  # NumPy indexes single bytes faster
        rows.numpy()[places.numpy()] = blocks.numpy()
        return
    for part in parts:
        rows.index_copy_(0, places[part], blocks[part])


def fill_on_cpu(target: Scattered, block_bytes: int, value: int) -> None:
    """Set every byte of the blocks (at least one block) to ``value`` (0 to 255)."""
    word = _widest_word(block_bytes, target)
    if word.itemsize >= 8:
        rows = target.rows(block_bytes, torch.int64)
        rows.index_fill_(0, target.row_numbers(torch.int64), repeated_byte(value, 8))
    else:
        rows = target.rows(block_bytes, torch.uint8)
        rows.numpy()[target.starts()] = value


def repeated_byte(byte: int, word_bytes: int) -> int:
    """The signed word whose bytes are all ``byte``.

    >>> hex(repeated_byte(0x5A, 4)), repeated_byte(0xFF, 8)
    ('0x5a5a5a5a', -1)
    """
    return int.from_bytes(bytes([byte]) * word_bytes, "little", signed=True)


def _widest_word(block_bytes: int, *sides: Side) -> torch.dtype:
    """The widest word that divides the block size and every block's address and storage offset."""
    alignments = [alignment_of(side.alignment, side.offset_bytes) for side in sides]
    return CPU_WORDS[alignment_of(block_bytes, *alignments)]


def _parts(count: int, block_bytes: int, word: torch.dtype) -> list[slice]:
    """The blocks of each indexing call: so few that torch starts no thread, if that pays."""
    if count * block_bytes > MAX_MOVED_BYTES or word.itemsize < MIN_PART_WORD:
        return [slice(None)]
    most = max(1, GRAIN * word.itemsize // block_bytes)
    return [slice(first, first + most) for first in range(0, count, most)]


def _is_one_run(starts: Int64Array, block_bytes: int) -> bool:
    return bool((np.diff(starts) == block_bytes).all())
