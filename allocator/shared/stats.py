"""``SharedHeapStats``: a snapshot of a ``SharedHeap``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KeeperStats", "SharedHeapStats"]


@dataclass(frozen=True, slots=True)
class KeeperStats:
    """What only the owner knows; counts are since it opened the heap.

    Attributes:
        free_places: how many no chunk has.
        pending_chunks: how many are being stored.
        waiting_places: places that are not free yet: their chunk was evicted, removed or given up
            while somebody held or filled it.
        restored_chunks: how many of an earlier owner's were found at the opening.
        dropped_chunks: records that were of no use at the opening, as they were damaged.
        stored_chunks: how many were stored, by all processes.
        refused_chunks: how many found no room, because all others were in use.
        aborted_chunks: how many were given up, as by a process that died while it filled them.
        evicted_chunks: how many left to make room.
        removed_chunks: how many were removed by ``remove``.
        damaged_chunks: how many were removed because their bytes were damaged.
        broken_leases: places that were reused although somebody held them, after ``lease_s``.
        num_writers: other processes that are connected to have chunks stored.
    """

    free_places: int
    pending_chunks: int
    waiting_places: int
    restored_chunks: int
    dropped_chunks: int
    stored_chunks: int
    refused_chunks: int
    aborted_chunks: int
    evicted_chunks: int
    removed_chunks: int
    damaged_chunks: int
    broken_leases: int
    num_writers: int


@dataclass(frozen=True, slots=True)
class SharedHeapStats:
    """A snapshot of a heap.

    Attributes:
        heap_bytes: of the places for chunks.
        segment_bytes: of the whole file, with the index.
        chunk_bytes: of one chunk.
        place_bytes: of the place of one chunk.
        ready_chunks: how many can be held and loaded.
        is_owner: whether this process owns the heap.
        owner_pid: the process that owns it, or the last one that did and was killed; None: its last
            owner has closed it.
        keeper: what only the owner knows; None elsewhere.
    """

    heap_bytes: int
    segment_bytes: int
    chunk_bytes: int
    place_bytes: int
    ready_chunks: int
    is_owner: bool
    owner_pid: int | None
    keeper: KeeperStats | None
