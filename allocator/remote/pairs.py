"""``parts_of``: which bytes of a peer's blocks go where, in parts that one request moves."""

from __future__ import annotations

from kvheap.addresses.block_runs import BlockRuns
from kvheap.kernels.pieces import Pieces
from kvheap.transfer.pairing import paired_runs

__all__ = ["parts_of"]

POST_BYTES = 64 << 20
"""Bytes of one request to NIXL: while it is posted, others wait."""


def parts_of(there: BlockRuns, here: BlockRuns) -> list[Pieces]:
    """Pairs the blocks of both sides, in the fewest runs.

    Args:
        there: blocks of the peer.
        here: as many blocks to fill, of the same size.

    Returns:
        The parts, the last one first. At least one if there are blocks.

    Raises:
        ValueError: the sides differ in the number or the size of their blocks.
    """
    if there.num_runs == here.num_runs == 1:
        size, count = there.size_bytes, int(there.counts[0])
        is_dense = size == here.size_bytes == there.block_bytes == here.block_bytes
        if is_dense and count == int(here.counts[0]) and count * size <= POST_BYTES:
            return [Pieces(there.starts, here.starts, count * size)]
    pieces = paired_runs(there, here)
    if pieces.num_bytes <= POST_BYTES:
        return [pieces]
    return [*pieces.by_bytes(POST_BYTES)][::-1]
