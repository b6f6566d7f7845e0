"""``FileTierStats``: a snapshot of a ``FileTier``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FileTierStats"]


@dataclass(frozen=True, slots=True)
class FileTierStats:
    """A snapshot of a tier; counts are since it was opened.

    Attributes:
        file_bytes: of the places for chunks.
        free_bytes: of the places that no chunk has.
        chunk_bytes: of one chunk.
        place_bytes: of the place of one chunk.
        ready_chunks: how many can be loaded.
        pending_chunks: how many are being stored.
        loading_chunks: how many ready ones are being loaded.
        restored_chunks: how many of an earlier owner's were found at the opening.
        dropped_chunks: entries of the index that were of no use at the opening.
        stored_chunks: how many were stored.
        refused_chunks: how many found no room, because all others were in use.
        failed_chunks: how many could not be written, or not be read for the time being.
        loaded_chunks: how many were loaded.
        missed_chunks: how many loads asked for that were not there.
        damaged_chunks: how many were removed because their bytes were damaged or unreadable.
        evicted_chunks: how many left to make room.
        removed_chunks: how many were removed by ``remove``.
        written_bytes, read_bytes: of places.
        direct_bytes: of both, what went past the page cache.
        is_direct: whether aligned memory is moved past the page cache (``O_DIRECT``).
        is_durable: whether chunks outlive a loss of power once they are stored.
    """

    file_bytes: int
    free_bytes: int
    chunk_bytes: int
    place_bytes: int
    ready_chunks: int
    pending_chunks: int
    loading_chunks: int
    restored_chunks: int
    dropped_chunks: int
    stored_chunks: int
    refused_chunks: int
    failed_chunks: int
    loaded_chunks: int
    missed_chunks: int
    damaged_chunks: int
    evicted_chunks: int
    removed_chunks: int
    written_bytes: int
    read_bytes: int
    direct_bytes: int
    is_direct: bool
    is_durable: bool
