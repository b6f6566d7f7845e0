"""``PriorityBuckets``: a priority queue that chunks can leave from anywhere, in O(1)."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvheap.prefix.policies.base import CachedChunk

__all__ = ["PriorityBuckets"]


MIN_CLOSED_BUCKETS = 64
"""The heap of priorities is rebuilt once it has more closed ones than this, and than open ones."""


class PriorityBuckets:
    """Chunks by priority, which is kept in ``chunk.rank``; of equal ones the first added.

    Each priority has a bucket of chunks, and a heap has the priorities. Chunks of few sizes have
    few priorities, so ``add``, ``discard`` and ``take`` are O(1) for each chunk, amortized. Only
    where they open or close a bucket are they O(log B), for B buckets.
    """

    __slots__ = ("_buckets", "_priorities", "_rank_of")

    def __init__(self) -> None:
        self._rank_of: dict[CachedChunk, float] = {}
        self._buckets: dict[float, OrderedDict[CachedChunk, None]] = {}  # none is empty
        self._priorities: list[float] = []  # a heap; some may have no bucket any more

    def add(self, chunk: CachedChunk) -> None:
        """Put a chunk in at its priority, last among equals; one that is in moves there."""
        self.discard(chunk)
        rank = chunk.rank
        bucket = self._buckets.get(rank)
        if bucket is None:
            bucket = self._buckets[rank] = OrderedDict()
            heapq.heappush(self._priorities, rank)
            if len(self._priorities) > 2 * len(self._buckets) + MIN_CLOSED_BUCKETS:
                self._priorities = list(self._buckets)
                heapq.heapify(self._priorities)
        bucket[chunk] = None
        self._rank_of[chunk] = rank

    def discard(self, chunk: CachedChunk) -> None:
        """Take a chunk out, if it is in."""
        rank = self._rank_of.pop(chunk, None)
        if rank is not None:
            bucket = self._buckets[rank]
            del bucket[chunk]
            if not bucket:
                del self._buckets[rank]

    def take(self, num_bytes: int) -> list[CachedChunk]:
        """Take as many chunks out as have ``num_bytes``, in order of priority.

        Raises:
            IndexError: all chunks together have fewer.
        """
        taken: list[CachedChunk] = []
        while num_bytes > 0:
            rank = self._priorities[0]
            bucket = self._buckets.get(rank)
            if bucket is None:
                heapq.heappop(self._priorities)
                continue
            while bucket and num_bytes > 0:
                chunk, _ = bucket.popitem(last=False)
                del self._rank_of[chunk]
                taken.append(chunk)
                num_bytes -= chunk.size_bytes
            if not bucket:
                del self._buckets[rank]
        return taken

    def rebuild(self, chunks: Sequence[CachedChunk]) -> None:
        """Hold exactly ``chunks``; the order of those that were in stays. O(n + B log B)."""
        wanted = dict.fromkeys(chunks)
        lost = [chunk for chunk in wanted if chunk not in self._rank_of]
        known = [chunk for chunk in self._rank_of if chunk in wanted]
        self._rank_of, self._buckets, self._priorities = {}, {}, []
        for chunk in (*lost, *known):
            self.add(chunk)

    def check(self, expected: Sequence[CachedChunk], require: Callable[[bool, str], None]) -> None:
        """Call ``require(holds, message)`` for every invariant. O(n)."""
        require(set(self._rank_of) == set(expected), "the buckets hold other chunks")
        placed = {chunk: rank for rank, bucket in self._buckets.items() for chunk in bucket}
        require(placed == self._rank_of, "a chunk is in another bucket, or in none")
        require(all(chunk.rank == rank for chunk, rank in placed.items()), "a rank has changed")
        require(all(self._buckets.values()), "a bucket is empty")
        heap = self._priorities
        require(self._buckets.keys() <= set(heap), "a priority is missing from the heap")
        in_order = all(heap[(i - 1) // 2] <= heap[i] for i in range(1, len(heap)))
        require(in_order, "the heap of priorities is out of order")

    def __len__(self) -> int:
        """How many chunks are in."""
        return len(self._rank_of)

    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in."""
        return chunk in self._rank_of
