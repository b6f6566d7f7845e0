"""``AllocatorStats``: what a heap says of itself at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from kvheap.addresses.heap_stats import HeapStats

__all__ = ["AllocatorStats"]


@dataclass(frozen=True, slots=True)
class AllocatorStats(HeapStats):
    """A snapshot of the heap's counters and properties."""

    device: str
    align_bytes: int
    segments: int
    """Number of buffers that make up the heap."""
    pinned_bytes: int
    """Bytes of the heap that are page-locked host memory."""
    pending_bytes: int
    """Freed bytes that a stream still uses; they count as allocated."""
    dropped_blocks: int
    """Blocks that were dropped without being freed and then reclaimed, so far."""
    expired_leases: int
    """Leases, of one block or of many, that have expired so far."""
    failed_allocations: int
    """Allocations for which the heap had no room, so far."""
    view_only: bool
    """Whether another process keeps the books: the numbers are then those at the fork, and those of
    an empty heap if this one is attached."""
