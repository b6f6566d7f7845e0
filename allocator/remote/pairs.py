"""``parts_of``: which bytes of a peer's blocks go where, in parts that one request moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.block_runs import BlockRuns, MemorySegment
from kvheap.kernels.pieces import Pieces
from kvheap.transfer.pairing import paired_runs

__all__ = ["OnePiece", "Part", "is_small", "parts_of", "parts_of_span", "span_of"]

POST_BYTES = 64 << 20
"""Bytes of one request to NIXL: while it is posted, others wait."""

SMALL_BYTES = 256 << 10
"""A read of so many bytes, by a lease taken before, is posted by its caller: about 0.1 ms."""

SMALL_PIECES = 64
"""The same for its descriptors."""


OnePiece: TypeAlias = "tuple[int, int, int]"
"""A single run on both sides, in numbers: address there, address here, bytes. Arrays would take
several times as long."""

Part: TypeAlias = "Pieces | OnePiece"
"""What one request moves: absolute addresses there (source) and here (target), and bytes."""


def span_of(blocks: BlockRuns) -> tuple[int, int] | None:
    """Address and bytes of blocks that are one run without padding; else None."""
    if blocks.num_runs != 1 or blocks.block_bytes != blocks.size_bytes:
        return None
    return int(blocks.starts[0]), int(blocks.counts[0]) * blocks.block_bytes


def parts_of_span(
    there: tuple[int, int] | None,
    blocks: AddressBatch,
    num_bytes: int,
    segments: Sequence[MemorySegment],
) -> list[Part] | None:
    """The same as :func:`parts_of` for blocks that are one run on both sides, without padding.

    Args:
        there: blocks of the peer, by :func:`span_of`.
        blocks: as many blocks to fill, of the same size.
        num_bytes: of all blocks, without padding.
        segments: buffers of their heap.

    Returns:
        The parts, the last one first; None if the blocks are not such a run.
    """
    run = blocks.only_run()
    if run is None or there is None:
        return None
    (source, there_bytes), (start, here_bytes) = there, run
    if there_bytes != num_bytes or here_bytes != num_bytes:
        return None
    for first, size, base in segments:
        if first <= start and start + num_bytes <= first + size:
            target = base + start - first
            if num_bytes <= POST_BYTES:
                return [(source, target, num_bytes)]
            return [
                (source + at, target + at, min(POST_BYTES, num_bytes - at))
                for at in reversed(range(0, num_bytes, POST_BYTES))
            ]
    return None


def parts_of(there: BlockRuns, here: BlockRuns) -> list[Part]:
    """Pairs the blocks of both sides, in the fewest runs.

    Args:
        there: blocks of the peer.
        here: as many blocks to fill, of the same size.

    Returns:
        The parts, the last one first. At least one if there are blocks.

    Raises:
        ValueError: the sides differ in the number or the size of their blocks.
    """
    pieces = paired_runs(there, here)
    if pieces.num_bytes <= POST_BYTES:
        return [pieces]
    parts: list[Part] = [*pieces.by_bytes(POST_BYTES)]
    return parts[::-1]


def is_small(parts: Sequence[Part], num_bytes: int) -> bool:
    """Whether a read is posted at once by its caller.

    Args:
        parts: of it.
        num_bytes: of all parts.
    """
    if len(parts) != 1 or num_bytes > SMALL_BYTES:
        return False
    return isinstance(parts[0], tuple) or len(parts[0]) <= SMALL_PIECES
