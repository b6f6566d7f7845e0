"""``LRU``: evict what was used least recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvheap.prefix.policies.base import CachedChunk, EvictionPolicy

__all__ = ["LRU"]


class LRU(EvictionPolicy):
    """Least recently used first; of one request the tail first.

    Every operation is O(1) for each chunk.

    Departure from the textbook: a chunk in use has no place in the order, and is the most
    recently used one when its last hold ends.
    """

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[CachedChunk, None] = OrderedDict()  # least recently used first

    def insert(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks at the recently used end, the head last."""
        order = self._order
        for chunk in reversed(chunks):
            order[chunk] = None

    def touch(self, chunks: Sequence[CachedChunk]) -> None:
        """Move chunks to the recently used end, the head last."""
        order = self._order
        for chunk in reversed(chunks):
            if chunk in order:
                order.move_to_end(chunk)

    def take_out(self, chunks: Sequence[CachedChunk]) -> None:
        """Take chunks out of the order."""
        order = self._order
        for chunk in chunks:
            order.pop(chunk, None)

    def put_back(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks at the recently used end, the head last."""
        self.insert(chunks)

    def remove(self, chunks: Sequence[CachedChunk]) -> None:
        """Forget chunks."""
        self.take_out(chunks)

    def evict(self, num_bytes: int) -> Sequence[CachedChunk]:
        """Take the least recently used chunks."""
        victims = []
        while num_bytes > 0:
            chunk, _ = self._order.popitem(last=False)
            victims.append(chunk)
            num_bytes -= chunk.size_bytes
        return victims

    def clear(self) -> None:
        """Forget all chunks."""
        self._order.clear()

    def repair(self, evictable: Sequence[CachedChunk], in_use: Sequence[CachedChunk]) -> None:
        """Keep the order; chunks that it lost become the least recently used. O(n)."""
        wanted = dict.fromkeys(evictable)
        lost = [chunk for chunk in wanted if chunk not in self._order]
        known = [chunk for chunk in self._order if chunk in wanted]
        self._order = OrderedDict.fromkeys([*lost, *known])

    def check(
        self,
        evictable: Sequence[CachedChunk],
        in_use: Sequence[CachedChunk],
        require: Callable[[bool, str], None],
    ) -> None:
        """The order holds exactly the evictable chunks."""
        require(set(self._order) == set(evictable), "the order holds other chunks")

    def __len__(self) -> int:
        """How many chunks are in the order."""
        return len(self._order)

    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in the order."""
        return chunk in self._order
