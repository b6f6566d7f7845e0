"""What a ``ChunkStore`` answers: plans, statistics, and records for a later process.

Needs no vLLM.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvheap.addresses.extents import Int64Array

__all__ = ["ChunkRecords", "GroupStats", "StorePlan", "StoreStats"]

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class StorePlan(Generic[K]):
    """What :meth:`ChunkStore.begin_store` decided.

    Attributes:
        keys: what is to be stored, now pending: those that were absent, in the order given.
        addresses: where each goes, int64 ``[N]``.
        sizes: bytes to copy to each, int64 ``[N]``.
        evicted: what was evicted to make room.
        is_refused: the chunks do not fit: ``keys`` is empty, and nothing is stored.
    """

    keys: list[K]
    addresses: Int64Array
    sizes: Int64Array
    evicted: list[K]
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class ChunkRecords(Generic[K]):
    """The chunks that :meth:`ChunkStore.restore` finds again, those that leave first before others.

    Attributes:
        keys: N different ones.
        addresses: where each chunk begins, int64 ``[N]``.
        groups: the number of its group in the store's list, int64 ``[N]``.
        spans: start, length and bytes of a place, of the spans that have such chunks, int64
            ``[S, 3]``; those that lose free places first come first.
    """

    keys: list[K]
    addresses: Int64Array
    groups: Int64Array
    spans: Int64Array


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Counts of one group; the last two since the store was made.

    Attributes:
        name: of the group.
        chunks: how many are in the heap, in any state.
        live_bytes: their bytes, without what rounding adds.
        evicted_chunks: how many were evicted.
        hit_bytes: bytes that loads were told to read.
    """

    name: str
    chunks: int
    live_bytes: int
    evicted_chunks: int
    hit_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot of a :class:`ChunkStore`; counts are since it was made.

    Attributes:
        heap_bytes, free_bytes: of the heap.
        idle_bytes: of the free bytes, those in places that serve one size.
        largest_free_extent: the most bytes that one chunk could take without an eviction.
        useful_bytes: bytes of all chunks, without what rounding adds.
        pending_bytes: allocated to chunks whose store has not ended.
        loading_bytes: allocated to ready chunks that loads read now.
        evicted_chunks, evicted_bytes: what has left to make room.
        span_evictions: of these, chunks that left to empty a span for chunks of another size.
        refused_stores: calls of ``begin_store`` that stored nothing, for lack of room.
        failed_chunks: chunks whose store failed, and ready ones that were forgotten.
        groups: by group.
    """

    heap_bytes: int
    free_bytes: int
    idle_bytes: int
    largest_free_extent: int
    useful_bytes: int
    pending_bytes: int
    loading_bytes: int
    evicted_chunks: int
    evicted_bytes: int
    span_evictions: int
    refused_stores: int
    failed_chunks: int
    groups: tuple[GroupStats, ...]
