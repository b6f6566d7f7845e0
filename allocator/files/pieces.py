"""How chunks are cut into calls: neighbours in the file move together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.files.data_file import MAX_BUFFERS

__all__ = ["PIECE_BYTES", "cut_into_pieces"]

PIECE_BYTES = 4 << 20
"""The most that one call moves, so that threads share long runs; see benchmarks/NOTES.md."""


def cut_into_pieces(
    addresses: Int64Array, place_bytes: int, max_buffers_per_block: int
) -> list[Int64Array]:
    """The chunks of each call, in the order of the file.

    Args:
        addresses: of the chunks in the file, int64 ``[N]``.
        place_bytes: bytes of each.
        max_buffers_per_block: how many buffers a chunk can need.

    Returns:
        Row numbers of the chunks of each call, int64 ``[R]``.

    >>> pieces = cut_into_pieces(np.array([8192, 20480, 4096]), 4096, 1)
    >>> [piece.tolist() for piece in pieces]
    [[2, 0], [1]]
    """
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order]
    # A chunk that is named twice is no neighbour of itself.
    breaks = np.flatnonzero(np.diff(ordered) != place_bytes) + 1
    bounds = [0, *breaks.tolist(), len(order)]
    longest = max(1, min(PIECE_BYTES // place_bytes, MAX_BUFFERS // max_buffers_per_block))
    return [
        order[at : min(at + longest, last)]
        for first, last in pairwise(bounds)
        for at in range(first, last, longest)
    ]
