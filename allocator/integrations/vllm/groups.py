"""``ChunkGroup``: what one chunk of a KV cache group takes in the heap.

A group is a set of an engine's layers that share one block table: full attention, sliding window,
latent, indexer, state. A chunk holds the KV of ``blocks_per_chunk`` consecutive blocks of *one*
group, so it needs the pages of that group's layers only. A slot that serves every group is as
large as the largest of them.

Needs no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvheap.addresses.arguments import require_count
from kvheap.addresses.integers import as_integer, round_up

__all__ = ["CHUNK_ALIGN_BYTES", "ChunkGroup"]

CHUNK_ALIGN_BYTES = 256
"""Chunks begin at multiples of this many bytes, and take a multiple of them.

The widest access of a GPU is 16 bytes, a sector 32 and a line 128; a page of 4 KiB, the default of
a heap, would waste up to 10 % of the chunks of a small group.
"""


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """The chunks of one KV cache group.

    Attributes:
        name: what statistics call the group.
        chunk_bytes: the bytes of one chunk in one worker's heap: ``blocks_per_chunk`` times the
            pages, without their padding, of the group's layers.
        group_id: the engine's number of the group, which its keys carry; None: the position in the
            list that the group is given in.
        pieces: where the group's bytes are if the engine packs the pages of all groups into one
            block: the offset in a block and the bytes of each piece, in the order in which a chunk
            holds them. Empty: the engine hands out tensors in which the group has whole pages.

    Raises:
        TypeError: ``chunk_bytes`` or ``group_id`` is not an integer.
        ValueError: ``chunk_bytes`` is not positive, ``group_id`` is negative, or ``name`` is empty.

    >>> ChunkGroup("sliding_window", 100_000).allocated_bytes
    100096
    """

    name: str
    chunk_bytes: int
    group_id: int | None = None
    pieces: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a ChunkGroup needs a name, got an empty string")
        chunk_bytes = as_integer("chunk_bytes", self.chunk_bytes)
        if chunk_bytes <= 0:
            raise ValueError(
                f"chunk_bytes of group {self.name!r} must be positive, got {chunk_bytes}"
            )
        object.__setattr__(self, "chunk_bytes", chunk_bytes)
        if self.group_id is not None:
            object.__setattr__(self, "group_id", require_count("group_id", self.group_id))

    @property
    def allocated_bytes(self) -> int:
        """``chunk_bytes`` rounded up to ``CHUNK_ALIGN_BYTES``."""
        return round_up(self.chunk_bytes, CHUNK_ALIGN_BYTES)
