"""``GDSF``: evict what is worth least; the heads of prefixes, which many requests share, stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvheap.addresses.arguments import as_number
from kvheap.prefix.policies.base import CachedChunk, EvictionPolicy, total_bytes
from kvheap.prefix.policies.buckets import PriorityBuckets
from kvheap.prefix.policies.ghosts import GhostList

__all__ = ["GDSF"]

REMEMBERED_SHARE = 2.0
"""Evicted bytes whose uses are remembered, as a multiple of the stored bytes; see
benchmarks/NOTES.md. One remembered chunk takes about 300 bytes of host memory."""


class GDSF(EvictionPolicy):
    """Greedy dual size frequency with ageing (Cherkasova, HP Labs report HPL-98-69R1, 1998).

    A chunk's priority is ``clock + uses * cost / size``, computed when a request uses it. The
    chunk with the lowest priority is evicted, and the clock rises to its priority: whatever is
    not used any more is overtaken sooner or later, however often it was used once.

    A request that uses a tail uses its head too. So among chunks of one size a head has at least
    the uses and the clock of its tail, and does not go before it. Of equal priorities the tail
    goes first, then what was used longer ago.

    Departures from the source: the uses of evicted chunks are remembered and count again when a
    chunk comes back, for :data:`REMEMBERED_SHARE` times the stored bytes. A chunk in use has no
    priority, and gets it from the clock at the end of its last hold. A request that stores its
    chunks a few at a time should hold all of them together at its end: the clock may have risen
    meanwhile, and the head must not have an older one than the tail.

    Every operation is O(1) for each chunk, but O(log B) where a priority comes up or goes that no
    other chunk has, B of them in all.

    Args:
        cost: what it costs to recompute a chunk of so many bytes. None: its size, so that every
            byte is worth the same, and chunks of one prefix in groups of different sizes have
            equal priorities. ``lambda size_bytes: 1`` keeps small chunks longer. Costs are finite
            and not negative.

    Raises:
        TypeError: ``cost`` is not a function.
    """

    name = "gdsf"

    def __init__(self, cost: Callable[[int], float] | None = None) -> None:
        if cost is not None and not callable(cost):
            raise TypeError(f"cost must be a function of a chunk's bytes, got {cost!r}")
        self._cost = cost
        self._order = PriorityBuckets()
        self._ghosts = GhostList()
        self._clock = 0.0
        self._stored_bytes = 0  # those of chunks in use included

    def insert(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks in, with one use more than they had when they were evicted."""
        recall = self._ghosts.recall
        for chunk in reversed(chunks):
            chunk.uses = (recall(chunk) or 0) + 1
        self._stored_bytes += total_bytes(chunks)
        self.put_back(chunks)

    def touch(self, chunks: Sequence[CachedChunk]) -> None:
        """Count a use of each chunk, and compute the priorities of those in the order anew."""
        for chunk in chunks:
            chunk.uses += 1
        order = self._order
        self.put_back([chunk for chunk in chunks if chunk in order])

    def take_out(self, chunks: Sequence[CachedChunk]) -> None:
        """Take chunks out."""
        discard = self._order.discard
        for chunk in chunks:
            discard(chunk)

    def put_back(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks in at the priorities that the clock gives them now."""
        add, clock, cost = self._order.add, self._clock, self._cost
        for chunk in reversed(chunks):
            size_bytes = chunk.size_bytes
            value = 1.0
            if cost is not None:
                value = as_number(f"cost({size_bytes})", cost(size_bytes)) / size_bytes
            chunk.rank = clock + chunk.uses * value
            add(chunk)

    def remove(self, chunks: Sequence[CachedChunk]) -> None:
        """Forget chunks, and do not remember their uses."""
        self.take_out(chunks)
        self._stored_bytes -= total_bytes(chunks)

    def evict(self, num_bytes: int) -> Sequence[CachedChunk]:
        """Take the chunks of the lowest priorities, and remember their uses."""
        victims = self._order.take(num_bytes)
        remember = self._ghosts.remember
        for victim in victims:
            remember(victim, victim.uses)
        self._clock = max(self._clock, victims[-1].rank)
        self._stored_bytes -= total_bytes(victims)
        self._ghosts.trim(REMEMBERED_SHARE * self._stored_bytes)
        return victims

    def clear(self) -> None:
        """Forget all chunks and uses, and reset the clock."""
        self._order.rebuild([])
        self._ghosts.clear()
        self._clock = 0.0
        self._stored_bytes = 0

    def repair(self, evictable: Sequence[CachedChunk], in_use: Sequence[CachedChunk]) -> None:
        """Rebuild the order from the priorities, and count the bytes anew. O(n log n)."""
        self._ghosts.repair()
        self._order.rebuild(evictable)
        self._stored_bytes = total_bytes(evictable) + total_bytes(in_use)

    def check(
        self,
        evictable: Sequence[CachedChunk],
        in_use: Sequence[CachedChunk],
        require: Callable[[bool, str], None],
    ) -> None:
        """The order holds exactly the evictable chunks, and the bytes are right."""
        self._order.check(evictable, require)
        self._ghosts.check(require)
        stored_bytes = total_bytes(evictable) + total_bytes(in_use)
        require(self._stored_bytes == stored_bytes, "the stored bytes are miscounted")

    def __len__(self) -> int:
        """How many chunks are in the order."""
        return len(self._order)

    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in the order."""
        return chunk in self._order
