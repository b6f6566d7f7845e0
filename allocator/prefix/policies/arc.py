"""``ARC``: two lists, of chunks used once and of chunks used again, that share the space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvheap.prefix.policies.base import CachedChunk, EvictionPolicy
from kvheap.prefix.policies.ghosts import GhostList
from kvheap.prefix.policies.lists import ChunkLists

__all__ = ["ARC"]

ONCE, AGAIN = "once", "again"
"""The paper's lists T1 and T2; their ghosts are its B1 and B2."""


class ARC(EvictionPolicy):
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003).

    Chunks that were used once and chunks that were used again are in two lists, the least recently
    used first, and each list has ghosts of what it lost lately. A chunk that comes back while the
    ghosts of a list remember it shows that this list was too short, and shifts the target between
    the two.

    Departures from the paper: all counts are of bytes. The cache is as large as what is stored
    when an eviction begins, since the policy is told no capacity. An eviction makes room for a
    whole batch, before it is known what ghosts remember of that. A chunk in use has no place in
    its list, and is the most recently used one there when its last hold ends. Of one request the
    tail goes first.

    Every operation is O(1) for each chunk, amortized over the ghosts that it forgets.
    """

    name = "arc"

    def __init__(self) -> None:
        self._lists = ChunkLists(ONCE, AGAIN)
        self._ghosts = {ONCE: GhostList(), AGAIN: GhostList()}
        self._target_bytes = 0.0  # how long ONCE should be; the paper's p

    def insert(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks into the list of those used once, or again if ghosts remember them."""
        for chunk in reversed(chunks):
            self._lists.enter(chunk, AGAIN if self._recall(chunk) else ONCE)

    def _recall(self, chunk: CachedChunk) -> bool:
        """Whether ghosts remember a chunk; if so, shift the target."""
        once, again = self._ghosts[ONCE], self._ghosts[AGAIN]
        once_bytes, again_bytes = once.num_bytes, again.num_bytes
        if once.recall(chunk) is not None:
            step = chunk.size_bytes * max(1.0, again_bytes / once_bytes)
            self._target_bytes = min(self._target_bytes + step, float(self._lists.total_bytes))
            return True
        if again.recall(chunk) is not None:
            step = chunk.size_bytes * max(1.0, once_bytes / again_bytes)
            self._target_bytes = max(self._target_bytes - step, 0.0)
            return True
        return False

    def touch(self, chunks: Sequence[CachedChunk]) -> None:
        """Move chunks to the recently used end of the list of those used again."""
        for chunk in reversed(chunks):
            self._lists.move(chunk, AGAIN)

    def take_out(self, chunks: Sequence[CachedChunk]) -> None:
        """Take chunks out of their lists."""
        for chunk in chunks:
            self._lists.take_out(chunk)

    def put_back(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks at the recently used end of their lists, the head last."""
        for chunk in reversed(chunks):
            self._lists.put_back(chunk)

    def remove(self, chunks: Sequence[CachedChunk]) -> None:
        """Forget chunks; no ghost remembers them."""
        for chunk in chunks:
            self._lists.leave(chunk)

    def evict(self, num_bytes: int) -> Sequence[CachedChunk]:
        """Take the least recently used chunks of the list that exceeds its target."""
        lists = self._lists
        stored_bytes = lists.total_bytes
        victims: list[CachedChunk] = []
        while num_bytes > 0:
            exceeds = lists.num_bytes[ONCE] > self._target_bytes
            victim = lists.first(ONCE, AGAIN) if exceeds else lists.first(AGAIN, ONCE)
            assert victim is not None
            victims.append(victim)
            num_bytes -= victim.size_bytes
            lists.leave(victim)
            self._ghosts[victim.queue].remember(victim)
        # ONCE and its ghosts have at most the bytes of the cache, all together twice as many.
        self._ghosts[ONCE].trim(stored_bytes - lists.num_bytes[ONCE])
        self._ghosts[AGAIN].trim(stored_bytes - self._ghosts[ONCE].num_bytes)
        return victims

    def clear(self) -> None:
        """Forget all chunks and ghosts, and reset the target."""
        self._lists.clear()
        for ghosts in self._ghosts.values():
            ghosts.clear()
        self._target_bytes = 0.0

    def repair(self, evictable: Sequence[CachedChunk], in_use: Sequence[CachedChunk]) -> None:
        """Keep the orders; chunks that they lost become the least recently used. O(n)."""
        self._lists.repair(evictable, in_use)
        for ghosts in self._ghosts.values():
            ghosts.repair()

    def check(
        self,
        evictable: Sequence[CachedChunk],
        in_use: Sequence[CachedChunk],
        require: Callable[[bool, str], None],
    ) -> None:
        """Each list holds its evictable chunks, and its bytes are right."""
        self._lists.check(evictable, in_use, require)
        for ghosts in self._ghosts.values():
            ghosts.check(require)

    def __len__(self) -> int:
        """How many chunks are in the lists."""
        return len(self._lists)

    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in a list."""
        return chunk in self._lists
