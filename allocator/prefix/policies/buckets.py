"""``PriorityBuckets``: a priority queue that chunks can leave from anywhere, in O(1)."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvheap.prefix.policies.base import CachedChunk

__all__ = ["PriorityBuckets"]


class PriorityBuckets:
    """Chunks by their priority, which is kept in ``chunk.rank``; of equal ones the first added.

    Each priority has a bucket, a list that chunks can leave from anywhere, and a heap has the
    priorities. Few priorities differ when chunks have few sizes, so ``add`` and ``pop`` are O(1)
    but for those that open or close a bucket, which are O(log B) for B buckets. ``discard`` is
    O(1).
    """

    __slots__ = ("_bucket_of", "_buckets", "_priorities")

    def __init__(self) -> None:
        self._bucket_of: dict[CachedChunk, OrderedDict[CachedChunk, None]] = {}
        self._buckets: dict[float, OrderedDict[CachedChunk, None]] = {}
        self._priorities: list[float] = []  # a heap of the keys of _buckets

    def add(self, chunk: CachedChunk) -> None:
        """Put a chunk in at its priority, last among equals; one that is in moves there."""
        self.discard(chunk)
        bucket = self._buckets.get(chunk.rank)
        if bucket is None:
            bucket = self._buckets[chunk.rank] = OrderedDict()
            heapq.heappush(self._priorities, chunk.rank)
        bucket[chunk] = None
        self._bucket_of[chunk] = bucket

    def discard(self, chunk: CachedChunk) -> None:
        """Take a chunk out, if it is in."""
        bucket = self._bucket_of.pop(chunk, None)
        if bucket is not None:
            bucket.pop(chunk, None)

    def pop(self) -> CachedChunk:
        """Take the first chunk of the lowest priority out.

        Raises:
            IndexError: there is none.
        """
        while True:
            bucket = self._buckets[self._priorities[0]]
            if bucket:
                chunk, _ = bucket.popitem(last=False)
                self._bucket_of.pop(chunk, None)
                return chunk
            del self._buckets[heapq.heappop(self._priorities)]

    def rebuild(self, chunks: Sequence[CachedChunk]) -> None:
        """Hold exactly ``chunks``; the order of those that were in stays. O(n + B log B)."""
        wanted = set(chunks)
        known = [chunk for chunk in self._bucket_of if chunk in wanted]
        lost = wanted.difference(known)
        ordered = [*(chunk for chunk in chunks if chunk in lost), *known]
        self._bucket_of, self._buckets, self._priorities = {}, {}, []
        for chunk in ordered:
            self.add(chunk)

    def check(self, expected: Sequence[CachedChunk], require: Callable[[bool, str], None]) -> None:
        """Call ``require(holds, message)`` for every invariant. O(n)."""
        require(set(self._bucket_of) == set(expected), "the buckets hold other chunks")
        placed = [(rank, chunk) for rank, bucket in self._buckets.items() for chunk in bucket]
        require(len(placed) == len(self._bucket_of), "a chunk is in two buckets, or in none")
        require(all(chunk.rank == rank for rank, chunk in placed), "a chunk is in another bucket")
        heap = self._priorities
        require(sorted(heap) == sorted(self._buckets), "the heap has other priorities")
        in_order = all(heap[(i - 1) // 2] <= heap[i] for i in range(1, len(heap)))
        require(in_order, "the heap of priorities is out of order")

    def __len__(self) -> int:
        """How many chunks are in."""
        return len(self._bucket_of)

    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in."""
        return chunk in self._bucket_of
