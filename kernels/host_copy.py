"""Copies of pieces between places in host memory: small ones in thousands, large ones one by one.

Pieces of :data:`LARGE_BYTES` and more are moved one by one, each by a C call that leaves the
interpreter to other threads, and cut where threads should share them. Smaller ones are copied as
rows: memory is seen as an array of overlapping elements, one for each byte that a row can start
at, whose dtype is ``V<row bytes>``, so that indexing it is one ``memcpy`` for each row, at any
alignment. Pieces of one size are rows of that size, those above :data:`ROW_BYTES` several rows.
Others are sorted into classes, two for each power of two, and all pieces of a class are covered by
as many rows of one length, of which the last ends where its piece ends and may repeat bytes of the
one before, on both sides alike: no byte outside a piece is read or written.

Bytes read and written: those of the pieces, once each, and up to half as many again in a class of
mixed sizes; through a temporary that stays in the cache where both sides are scattered. Where one
side is one run there is none: rows are written from it as they lie, or gathered into it by
``index_select``, if all of it is whole words of 8 or 16 bytes.

Measured on 2 cores of an AMD EPYC, 64 MiB in random pieces between buffers of 192 MiB, GB/s, each
byte counted once, best of several runs; one ``copy_`` of as many bytes has 16 to 17:

======  =========  ========  ========  =======  ===============  ==========  ====================
piece   both       into one  from one  mixed    ``index_copy_``  a memmove   ``process_vm_readv``
        scattered  run       run       sizes    of 16-byte       for each,   of 1,024 pieces a
                                       (both)   words (both)     2 threads   call, 2 threads
======  =========  ========  ========  =======  ===============  ==========  ====================
256 B   5.0        7.6       10.1      2.2      3.4              0.4         0.8
1 KiB   6.2        8.4       9.8       4.6      5.2              1.2         2.7
4 KiB   8.5        12.7      15.1      6.2      7.2              3.0         5.2
16 KiB  9.1        11.3      13.4      6.9      8.4              9.3         7.9
64 KiB  13.3       12.9      14.0      10.9     11.9             13.3        10.7
======  =========  ========  ========  =======  ===============  ==========  ====================

``process_vm_readv`` takes pieces of any sizes as they are, but many containers refuse it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import CPU_WORDS, alignment_of
from kvheap.kernels.pieces import Pieces

__all__ = ["copy_on_host"]

Int64Array = npt.NDArray[np.int64]

LARGE_BYTES = 32 << 10
"""Bytes of a piece from which it is moved by a call of its own. Scattered on both sides, 2 threads:
rows and calls have 8.5 and 6.7 GB/s for 8 KiB, 9.2 and 9.3 for 16, 10.8 and 12.2 for 32, 12.1 and
12.7 for 64. A call needs the interpreter for about 0.4 us, so that more threads wait for each
other sooner. (Where source and target differ modulo 8, glibc moves 32 to 64 KiB at 3 GB/s here.)"""

ROW_BYTES = 4 << 10
"""The longest row. 16 KiB in rows of 2, 4 and 8 KiB: 7.0, 7.9 and 7.8 GB/s."""

STEP_BYTES = 512 << 10
"""Bytes of one indexing call, and of its temporary, unless MIN_ROWS are more. A quarter to four
times as many made no difference."""

MIN_ROWS = 512
"""Rows of one indexing call: NumPy keeps the interpreter to itself for up to 500."""

CLASS_BITS = 1
"""Bits of a size below its highest that tell its class. 1,000 pieces of 1 to 127 bytes, 0 to 3
bits: 0.29, 0.41, 0.55 and 0.67 ms; 64 MiB in pieces of 1,024 bytes, one in five 2,047: 2.2, 3.2
and 3.3 GB/s."""

FEW = 24
"""Pieces from which a class is copied as rows: that costs about 11 us, a call for each 0.4."""

THREAD_BYTES = 4 << 20
"""Bytes for each thread, below which fewer threads copy. With two instead of one, 4 MiB took 0.7 to
1.2 times as long, 8 MiB 0.6 to 1.1, 16 MiB 0.6 to 0.8."""

SHARE_BYTES = MIN_ROWS * ROW_BYTES
"""The least share of a thread's work."""

SHARES = 4
"""Shares for each thread: where one is held up, others do what it has not begun."""

MAX_THREADS = 8
"""Threads by default at most. A guess: a few keep a host's memory busy; measured were only 2."""

SELECT_WORDS = 32768
"""Words that ``index_select`` copies in the thread that calls it: beyond, it starts others."""


def copy_on_host(pieces: Pieces, threads: int | None = None) -> None:
    """Copy all pieces, and return when they are copied.

    O(N + bytes). Python work is a few calls for each class of sizes and 512 rows of pieces below
    :data:`LARGE_BYTES`, and for each piece above one call, made from C. Temporary memory: up to
    100 bytes for each piece, 16 for each further row, and for each thread 2 MiB.

    Args:
        pieces: absolute addresses of host memory that the caller keeps alive; each target apart
            from the other targets and from all sources.
        threads: at most so many copy, the caller's among them; by default as many as torch uses,
            up to :data:`MAX_THREADS`.

    Raises:
        ValueError: ``threads`` is not positive; nothing is copied.

    When this raises anything, KeyboardInterrupt included, no thread is copying any more, and some
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
    if threads == 1 and len(pieces) <= FEW:
        _move_each(pieces)
        return
    share_bytes = num_bytes
    if threads > 1:
        share_bytes = max(SHARE_BYTES, -(-num_bytes // (threads * SHARES)))
    one_by_one, classes = _classified(pieces)
    tasks: list[Callable[[], None]] = [
        partial(_move_each, share) for share in _shares(one_by_one.cut(share_bytes), share_bytes)
    ]
    tasks += [
        partial(_copy_rows, share) for group in classes for share in _shares(group, share_bytes)
    ]
    _Work(tasks).run(min(threads, len(tasks)))


def _classified(pieces: Pieces) -> tuple[Pieces, list[Pieces]]:
    """Pieces to move one by one, and classes of the others, each of nearly equal sizes."""
    sizes = pieces.sizes
    if isinstance(sizes, int):
        if sizes >= LARGE_BYTES or len(pieces) <= FEW:
            return pieces, []
        return pieces[:0], [pieces]
    is_large = sizes >= LARGE_BYTES
    if is_large.any():
        large, pieces = pieces[is_large], pieces[~is_large]
    else:
        large = pieces[:0]
    # The exponent and the first bits of the mantissa; all these sizes are exact in 24 bits.
    bits = pieces.size_array().astype(np.float32).view(np.int32) >> (23 - CLASS_BITS)
    numbers = (bits - (127 << CLASS_BITS)).astype(np.uint8)
    pieces = pieces[np.argsort(numbers, kind="stable")]  # a radix sort for single bytes
    counts = np.bincount(numbers)
    ends = np.cumsum(counts)
    classes = [
        pieces[end - count : end]
        for count, end in zip(counts.tolist(), ends.tolist(), strict=True)
        if count
    ]
    one_by_one = [large, *(group for group in classes if len(group) <= FEW)]
    return Pieces.joined(one_by_one), [group for group in classes if len(group) > FEW]


def _shares(pieces: Pieces, share_bytes: int) -> Iterator[Pieces]:
    """The pieces in their order, in groups of about ``share_bytes``."""
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
    """Copy piece after piece, in a loop in C that lets other threads run during each."""
    targets, sources = pieces.targets.tolist(), pieces.sources.tolist()
    deque(map(ctypes.memmove, targets, sources, pieces.size_array().tolist()), maxlen=0)


def _copy_rows(pieces: Pieces) -> None:
    """Copy pieces of nearly equal sizes, none twice another's or more."""
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
    """The address of each row: one behind the other, the last one up to the end of its piece."""
    if per_piece == 1:
        return starts
    within = np.arange(per_piece, dtype=np.int64) * row_bytes
    last = np.asarray(sizes - row_bytes)[..., None]
    rows: Int64Array = starts[:, None] + np.minimum(within, last)
    return rows.reshape(-1)


def _is_run(starts: Int64Array, row_bytes: int) -> bool:
    """Whether each row follows the one before."""
    if starts[-1] - starts[0] != (len(starts) - 1) * row_bytes:  # mostly tells
        return False
    return bool((np.diff(starts) == row_bytes).all())


def _move(sources: Int64Array, targets: Int64Array, row_bytes: int) -> None:
    """Copy rows from anywhere to anywhere."""
    source_rows, source_numbers = _all_rows(sources, row_bytes)
    target_rows, target_numbers = _all_rows(targets, row_bytes)
    step = max(MIN_ROWS, STEP_BYTES // row_bytes)
    for begin in range(0, len(sources), step):
        part = slice(begin, begin + step)
        target_rows[target_numbers[part]] = source_rows[source_numbers[part]]


def _scatter(source: int, targets: Int64Array, row_bytes: int) -> None:
    """Copy rows that lie in a run from ``source`` on."""
    target_rows, numbers = _all_rows(targets, row_bytes)
    target_rows[numbers] = _array(source, len(targets), f"V{row_bytes}", row_bytes)


def _gather(sources: Int64Array, target: int, row_bytes: int, word: torch.dtype) -> None:
    """Copy rows to a run from ``target`` on, all of it whole words."""
    low = int(sources.min())
    span_bytes = int(sources.max()) + row_bytes - low
    words = torch.from_numpy(_array(low, span_bytes, "u1", 1)).view(word)
    row_words = row_bytes // word.itemsize
    rows = words.as_strided((len(words) - row_words + 1, row_words), (1, 1))
    numbers = torch.from_numpy((sources - low) // word.itemsize)
    num_bytes = len(sources) * row_bytes
    out = torch.from_numpy(_array(target, num_bytes, "u1", 1)).view(word).view(-1, row_words)
    step = SELECT_WORDS // row_words
    for begin in range(0, len(sources), step):
        part = slice(begin, begin + step)
        torch.index_select(rows, 0, numbers[part], out=out[part])


def _all_rows(starts: Int64Array, row_bytes: int) -> tuple[npt.NDArray[np.void], Int64Array]:
    """Every row from the lowest start to the highest, which overlap, and the number of each."""
    low = starts.min()
    rows = _array(int(low), int(starts.max() - low) + 1, f"V{row_bytes}", 1)
    return rows, starts - low


def _array(address: int, length: int, dtype: str, stride: int) -> npt.NDArray[Any]:
    """Memory as an array; nothing keeps it alive."""
    return np.asarray(_Memory(address, length, dtype, stride))


class _Memory:
    """What NumPy asks for an array, with less ado than a ctypes array, whose length is a type."""

    def __init__(self, address: int, length: int, dtype: str, stride: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (length,),
            "strides": (stride,),
            "typestr": f"|{dtype}",
            "version": 3,
        }


class _Work:
    """Tasks that the caller and helpers take from one queue until it is empty or one fails."""

    def __init__(self, tasks: Sequence[Callable[[], None]]) -> None:
        self._tasks = deque(tasks)
        self._num_busy = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def run(self, threads: int) -> None:
        """Do all tasks; return or raise when no helper is at one."""
        try:
            with suppress(RuntimeError):  # a system out of threads, or an interpreter that exits
                for _ in range(threads - 1):
                    _helpers(os.getpid()).submit(self._help)
            self._drain()
        finally:
            self._close()
        if self._error is not None:
            raise self._error

    def _drain(self) -> None:
        try:
            while True:
                try:
                    task = self._tasks.popleft()
                except IndexError:
                    return
                task()
        except BaseException:
            self._tasks.clear()
            raise

    def _help(self) -> None:
        with self._changed:
            if not self._tasks:  # begun too late, maybe long after the caller has left
                return
            self._num_busy += 1
        try:
            self._drain()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._num_busy -= 1
                self._changed.notify_all()

    def _close(self) -> None:
        """Wait for busy helpers, however often a signal's handler raises meanwhile."""
        self._tasks.clear()
        interrupt: BaseException | None = None
        while True:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: not self._num_busy)
                break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


@cache
def _helpers(pid: int) -> ThreadPoolExecutor:
    """Threads of this process; one that was forked needs its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kvheap-copy")
