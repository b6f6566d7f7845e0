"""Copies pieces between places in host memory: large pieces one by one, small ones in bulk.

Pieces of :data:`LARGE_BYTES` and more are moved one by one, each by a C call that releases the GIL;
they are cut if several threads share them. Smaller pieces are copied as rows. Memory is viewed as
an array of overlapping elements of dtype ``V<row bytes>``, one starting at each byte; indexing it
costs one ``memcpy`` for each row, at any alignment. Pieces of one size are one row each, or several
rows if they are longer than :data:`ROW_BYTES`. Pieces of different sizes are sorted into classes,
two for each power of two. All pieces of a class are covered by the same number of rows of one
length. The last row ends where its piece ends and may repeat bytes of the row before, at the same
offset on both sides, so that no byte outside a piece is read or written.

Each byte of the pieces is read and written once; in a class of mixed sizes, up to half as many
bytes are copied a second time. If both sides are scattered, the bytes pass through a temporary that
stays in the CPU's cache. If the source is one run, rows are written straight from it. If the target
is one run and everything is whole words of 8 or 16 bytes, ``index_select`` gathers rows straight
into it. benchmarks/NOTES.md compares the speed with that of other methods.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.arrays import Int64Array, alignment_of
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.shared_work import do_all
from kvheap.kernels.words import CPU_WORDS, memory_at, overlapping_rows

__all__ = ["copy_on_host"]

LARGE_BYTES = 32 << 10
"""Pieces of at least this many bytes are moved by a C call each; see benchmarks/NOTES.md."""

ROW_BYTES = 4 << 10
"""Bytes of the longest row; see benchmarks/NOTES.md."""

CALL_BYTES = 512 << 10
"""Bytes of one indexing call and of its temporary, or ``MIN_CALL_ROWS`` rows if that is more; see
benchmarks/NOTES.md."""

MIN_CALL_ROWS = 512
"""The fewest rows of one indexing call: NumPy holds the GIL for calls of up to 500 rows."""

CLASS_BITS = 1
"""How many bits below the highest bit of a size decide its class; see benchmarks/NOTES.md."""

MAX_SINGLE_MOVES = 24
"""The pieces of a class with at most this many are moved one by one; see benchmarks/NOTES.md."""

THREAD_BYTES = 4 << 20
"""A copy gets one more thread only for this many more bytes; see benchmarks/NOTES.md."""

SHARE_BYTES = MIN_CALL_ROWS * ROW_BYTES
"""The smallest share of the work that a thread takes, in bytes."""

SHARES = 4
"""Shares for each thread, so that others take over the work of a thread that is held up."""

MAX_THREADS = 8
"""The largest default number of threads. A guess: measured on 2 cores only."""

SELECT_WORDS = 32768
"""Up to this many words, ``index_select`` copies in the calling thread and starts no others."""


def copy_on_host(pieces: Pieces, threads: int | None = None) -> None:
    """Copy all pieces, and return when they are copied.

    O(N + bytes). Python makes a few calls for each class of sizes and for each 512 rows of pieces
    below :data:`LARGE_BYTES`; larger pieces cost one call each, which is made from C. Temporary
    memory: up to 100 bytes for each piece, 16 for each further row, and 2 MiB for each thread.

    Args:
        pieces: absolute addresses of host memory that the caller keeps alive. Targets must overlap
            neither each other nor any source.
        threads: the largest number of threads that copy, including the caller's; by default as many
            as torch uses, up to :data:`MAX_THREADS`.

    Raises:
        ValueError: ``threads`` is not positive; nothing is copied.

    If this raises anything, including KeyboardInterrupt, no thread is copying any more, and some
    pieces may have been copied.

    >>> source, target = np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
    >>> to = target.ctypes.data
    >>> copy_on_host(Pieces.of(source.ctypes.data + np.array([0, 6]), [to + 4, to + 1], [3, 2]))
    >>> target
    array([0, 6, 7, 0, 0, 1, 2, 0], dtype=uint8)
    """
    if threads is None:
        threads = min(torch.get_num_threads(), MAX_THREADS)
    elif threads < 1:
        raise ValueError(f"threads must be positive, got {threads}")
    pieces = pieces.merged()
    num_bytes = pieces.num_bytes
    threads = min(threads, max(1, num_bytes // THREAD_BYTES))
    if threads == 1 and len(pieces) <= MAX_SINGLE_MOVES:
        _move_each(pieces)
        return
    share_bytes = num_bytes
    if threads > 1:
        share_bytes = max(SHARE_BYTES, -(-num_bytes // (threads * SHARES)))
    singles, classes = _classified(pieces)
    tasks: list[Callable[[], None]] = [
        partial(_move_each, share) for share in _shares(singles.cut(share_bytes), share_bytes)
    ]
    tasks += [
        partial(_copy_rows, share) for alike in classes for share in _shares(alike, share_bytes)
    ]
    do_all(tasks, min(threads, len(tasks)))


def _classified(pieces: Pieces) -> tuple[Pieces, list[Pieces]]:
    """The pieces to move one by one, and the others in classes of similar sizes."""
    sizes = pieces.sizes
    if isinstance(sizes, int):
        if sizes >= LARGE_BYTES or len(pieces) <= MAX_SINGLE_MOVES:
            return pieces, []
        return pieces[:0], [pieces]
    is_large = sizes >= LARGE_BYTES
    if is_large.any():
        large, pieces = pieces[is_large], pieces[~is_large]
    else:
        large = pieces[:0]
    # A class is the exponent and the first bits of the mantissa; these sizes are exact in 24 bits.
    bits = pieces.size_array().astype(np.float32).view(np.int32) >> (23 - CLASS_BITS)
    numbers = (bits - (127 << CLASS_BITS)).astype(np.uint8)
    pieces = pieces[np.argsort(numbers, kind="stable")]  # NumPy sorts single bytes by radix
    counts = np.bincount(numbers)
    ends = np.cumsum(counts)
    classes = [
        pieces[end - count : end]
        for count, end in zip(counts.tolist(), ends.tolist(), strict=True)
        if count
    ]
    singles = [large, *(alike for alike in classes if len(alike) <= MAX_SINGLE_MOVES)]
    return Pieces.joined(singles), [alike for alike in classes if len(alike) > MAX_SINGLE_MOVES]


def _shares(pieces: Pieces, share_bytes: int) -> Iterator[Pieces]:
    """The pieces in their order, in shares of about ``share_bytes``."""
    if pieces.num_bytes <= share_bytes:
        if len(pieces):
            yield pieces
        return
    if isinstance(pieces.sizes, int):
        step = max(1, -(-share_bytes // pieces.sizes))
        bounds = [*range(step, len(pieces), step), len(pieces)]
    else:
        ends = np.cumsum(pieces.sizes)
        walls = np.arange(share_bytes, int(ends[-1]), share_bytes)
        bounds = [*(np.searchsorted(ends, walls) + 1).tolist(), len(pieces)]
    begin = 0
    for end in bounds:
        if end > begin:
            yield pieces[begin:end]
        begin = end


def _move_each(pieces: Pieces) -> None:
    """Copy piece after piece, in a loop in C that releases the GIL during each ``memmove``."""
    targets, sources, sizes = pieces.targets.tolist(), pieces.sources.tolist(), pieces.sizes
    each_bytes = repeat(sizes) if isinstance(sizes, int) else sizes.tolist()
    deque(map(ctypes.memmove, targets, sources, each_bytes), maxlen=0)


def _copy_rows(pieces: Pieces) -> None:
    """Copy pieces of similar sizes: each has less than twice the size of any other."""
    sizes = pieces.sizes
    least, most = (sizes, sizes) if isinstance(sizes, int) else (sizes.min(), sizes.max())
    per_piece = max(1 if least == most else 2, -(-int(most) // ROW_BYTES))
    row_bytes = -(-int(most) // per_piece)
    sources = _row_starts(pieces.sources, sizes, per_piece, row_bytes)
    targets = _row_starts(pieces.targets, sizes, per_piece, row_bytes)
    if _is_run(sources, row_bytes):
        _scatter(int(sources[0]), targets, row_bytes)
        return
    if _is_run(targets, row_bytes):
        word_bytes = alignment_of(pieces.alignment, row_bytes)
        if word_bytes >= 8:
            _gather(sources, int(targets[0]), row_bytes, CPU_WORDS[word_bytes])
            return
    _move(sources, targets, row_bytes)


def _row_starts(
    starts: Int64Array, sizes: Int64Array | int, per_piece: int, row_bytes: int
) -> Int64Array:
    """The address of each row: rows follow each other, and the last ends where its piece ends."""
    if per_piece == 1:
        return starts
    within = np.arange(per_piece, dtype=np.int64) * row_bytes
    last = np.asarray(sizes - row_bytes)[..., None]
    rows: Int64Array = starts[:, None] + np.minimum(within, last)
    return rows.reshape(-1)


def _is_run(starts: Int64Array, row_bytes: int) -> bool:
    """Whether each row follows the one before."""
    if starts[-1] - starts[0] != (len(starts) - 1) * row_bytes:  # the cheap test first
        return False
    return bool((np.diff(starts) == row_bytes).all())


def _move(sources: Int64Array, targets: Int64Array, row_bytes: int) -> None:
    """Copy scattered rows to scattered targets, through a temporary."""
    source_rows, source_numbers = _all_rows(sources, row_bytes)
    target_rows, target_numbers = _all_rows(targets, row_bytes)
    step = max(MIN_CALL_ROWS, CALL_BYTES // row_bytes)
    for begin in range(0, len(sources), step):
        part = slice(begin, begin + step)
        target_rows[target_numbers[part]] = source_rows[source_numbers[part]]


def _scatter(source: int, targets: Int64Array, row_bytes: int) -> None:
    """Copy a run of rows that begins at ``source`` to scattered targets."""
    target_rows, numbers = _all_rows(targets, row_bytes)
    target_rows[numbers] = memory_at(source, len(targets), f"V{row_bytes}", row_bytes)


def _gather(sources: Int64Array, target: int, row_bytes: int, word: torch.dtype) -> None:
    """Copy scattered rows of whole words to a run of rows that begins at ``target``."""
    low = int(sources.min())
    span_bytes = int(sources.max()) + row_bytes - low
    words = torch.from_numpy(memory_at(low, span_bytes, "u1", 1)).view(word)
    row_words = row_bytes // word.itemsize
    rows = overlapping_rows(words, row_words)
    numbers = torch.from_numpy((sources - low) // word.itemsize)
    num_bytes = len(sources) * row_bytes
    out = torch.from_numpy(memory_at(target, num_bytes, "u1", 1)).view(word).view(-1, row_words)
    step = SELECT_WORDS // row_words
    for begin in range(0, len(sources), step):
        part = slice(begin, begin + step)
        torch.index_select(rows, 0, numbers[part], out=out[part])


def _all_rows(starts: Int64Array, row_bytes: int) -> tuple[npt.NDArray[np.void], Int64Array]:
    """All overlapping rows from the lowest to the highest start, and the numbers of those given."""
    low = starts.min()
    rows = memory_at(int(low), int(starts.max() - low) + 1, f"V{row_bytes}", 1)
    return rows, starts - low
