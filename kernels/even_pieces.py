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
    # As unsigned numbers, negative ones are above all others: one look finds what is outside.
    highest = int(np.maximum.reduce(targets.view(np.uint64)))
    if highest + size_bytes > target[1]:
        return None
    if int(np.maximum.reduce(sources.view(np.uint64))) + size_bytes > source[1]:
        return None
    to_targets = np.empty(count, np.int64)
    if not _are_apart(targets, size_bytes, highest, to_targets):
        return None
    to_sources = np.empty(count, np.int64)
    steps = np.subtract(sources[1:], sources[:-1], out=to_sources[1:])
    follows = steps == size_bytes
    has_runs = False
    if np.logical_or.reduce(follows):  # on one side, some of thousands do so by chance
        at = np.flatnonzero(follows)
        has_runs = bool((targets[at + 1] - targets[at] == size_bytes).any())
    np.add(sources, source[0], out=to_sources)
    np.add(targets, target[0], out=to_targets)
    pieces = Pieces(to_sources, to_targets, size_bytes)
    return pieces.merged() if has_runs else pieces


def _are_apart(targets: Int64Array, size_bytes: int, highest: int, scratch: Int64Array) -> bool:
    """Whether no two targets overlap; False also if that is not quick to tell.

    Args:
        targets: offsets, int64 ``[N]``, none negative.
        size_bytes: bytes of each.
        highest: the highest offset.
        scratch: to write to, int64 ``[N]``.
    """
    begins = targets[:FIRST_LOOK].tolist()
    if begins == sorted(begins):
        steps = np.subtract(targets[1:], targets[:-1], out=scratch[1:])
        if int(np.minimum.reduce(steps)) >= size_bytes:
            return True
    is_power_of_two = size_bytes & (size_bytes - 1) == 0
    if not is_power_of_two or int(np.bitwise_or.reduce(targets)) & (size_bytes - 1):
        return False
    shift = size_bytes.bit_length() - 1
    num_cells = (highest >> shift) + 1
    if num_cells > MAX_CELLS_PER_PIECE * len(targets):
        return False
    is_taken = np.zeros(num_cells, np.bool_)
    is_taken[np.right_shift(targets, shift, out=scratch)] = True
    return int(np.count_nonzero(is_taken)) == len(targets)
