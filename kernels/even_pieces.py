"""``even_pieces``: pieces of one size between two buffers, checked and merged in few passes.

Thousands of pieces cost the host a few passes over their addresses. When the processor has just
slept, its caches are empty, and what counts is how much memory these passes touch. So all that is
computed on the way goes where the result will be: nothing is touched but the caller's addresses,
the result, and a byte for each place that a target can have.

The usual case only: whatever is unusual, or wrong, is left to ``Pieces``, which takes more passes
and tells what is wrong.
"""

from __future__ import annotations

import numpy as np

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.pieces import FIRST_LOOK, MAX_CELLS_PER_PIECE, Pieces

__all__ = ["even_pieces"]

FEW_CELLS_PER_PIECE = 4
"""A table of so many places for each target takes less time than a look at the highest target."""


def even_pieces(
    sources: Int64Array,
    targets: Int64Array,
    size_bytes: int,
    source: tuple[int, int],
    target: tuple[int, int],
) -> Pieces | None:
    """Pieces of one size between two buffers that have no byte in common. O(N).

    Args:
        sources: byte offsets in the source, int64 ``[N]``.
        targets: byte offsets in the target, int64 ``[N]``.
        size_bytes: bytes of each piece, positive.
        source: absolute address of the source, and its bytes.
        target: the same of the target.

    Returns:
        The pieces with absolute addresses, with those merged that follow each other on both sides;
        None if any leaves its buffer or two targets overlap, or if that is not quick to tell:
        targets must ascend, or else be multiples of a size that is a power of two.

    >>> even_pieces(np.array([0, 64]), np.array([192, 64]), 64, (4096, 128), (8192, 256))
    Pieces(2 x 64 bytes, 128 bytes)
    >>> even_pieces(np.array([0, 64]), np.array([64, 64]), 64, (4096, 128), (8192, 256))
    """
    count = len(sources)
    if count < 2 or count != len(targets):
        return None
    if _highest(sources) + size_bytes > source[1]:
        return None
    to_targets = np.empty(count, np.int64)
    if not _are_apart(targets, size_bytes, target[1], to_targets):
        return None
    to_sources = np.empty(count, np.int64)
    steps = np.subtract(sources[1:], sources[:-1], out=to_sources[1:])
    follows = steps == size_bytes
    at = follows.nonzero()[0]  # on one side, some of thousands do so by chance
    has_runs = len(at) > 0 and bool((targets[at + 1] - targets[at] == size_bytes).any())
    np.add(sources, source[0], out=to_sources)
    np.add(targets, target[0], out=to_targets)
    pieces = Pieces(to_sources, to_targets, size_bytes)
    return pieces.merged() if has_runs else pieces


def _highest(offsets: Int64Array) -> int:
    """The highest offset, as an unsigned number: a negative one is above all others."""
    return int(np.maximum.reduce(offsets.view(np.uint64)))


def _are_apart(targets: Int64Array, size_bytes: int, num_bytes: int, scratch: Int64Array) -> bool:
    """Whether targets are in their buffer and no two overlap; False also if not quick to tell.

    Args:
        targets: offsets, int64 ``[N]``.
        size_bytes: bytes of each.
        num_bytes: bytes of the buffer.
        scratch: to write to, int64 ``[N]``.
    """
    begins = targets[:FIRST_LOOK].tolist()
    if begins == sorted(begins):
        steps = np.subtract(targets[1:], targets[:-1], out=scratch[1:])
        if int(np.minimum.reduce(steps)) >= size_bytes:
            return _highest(targets) + size_bytes <= num_bytes  # steps may have wrapped around
    if size_bytes & (size_bytes - 1):
        return False
    bits = int(np.bitwise_or.reduce(targets))
    if bits < 0 or bits & (size_bytes - 1):  # one is negative, or no multiple
        return False
    shift = size_bytes.bit_length() - 1
    num_cells = num_bytes >> shift
    if num_cells > FEW_CELLS_PER_PIECE * len(targets):  # most may be behind the last target
        num_cells = min(num_cells, (_highest(targets) >> shift) + 1)
        if num_cells > MAX_CELLS_PER_PIECE * len(targets):
            return False
    is_taken = np.zeros(num_cells, np.bool_)
    try:
        is_taken[np.right_shift(targets, shift, out=scratch)] = True
    except IndexError:  # beyond the buffer
        return False
    return int(np.count_nonzero(is_taken)) == len(targets)
