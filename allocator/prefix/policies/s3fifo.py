"""``S3FIFO``: three queues, so that chunks that are used once leave early."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvheap.addresses.arguments import require_count
from kvheap.prefix.policies.base import CachedChunk, EvictionPolicy
from kvheap.prefix.policies.ghosts import GhostList
from kvheap.prefix.policies.lists import ChunkLists

__all__ = ["S3FIFO"]

SMALL_SHARE = 0.1
"""Bytes of the small queue, as a share of the stored bytes; the paper's choice."""

MAX_USES = 3
"""Uses are counted up to this; the paper keeps them in two bits."""

SMALL, MAIN = "small", "main"


class S3FIFO(EvictionPolicy):
    """Three static first-in, first-out queues (Yang, Zhang, Qiu, Yue and Rashmi, SOSP 2023).

    New chunks enter the small queue, which has a tenth of the bytes. Those that come to its end
    without having been used again are evicted, and the ghost queue remembers their fingerprints;
    the others move to the main queue. New chunks that the ghost queue remembers enter main at
    once. A chunk that comes to the end of main goes round again once for each of its uses, of
    which at most :data:`MAX_USES` count.

    Departures from the paper: shares are of the bytes that are stored when an eviction begins,
    since the policy is told no capacity; the ghost queue remembers as many bytes as main may hold.
    A chunk in use has no place in its queue, and enters it anew when its last hold ends. Of one
    request the tail enters a queue first.

    Every operation is O(1) for each chunk, amortized over its uses.

    Args:
        min_uses: how many uses, after the first, move a chunk from small to main; positive. The
            paper's is 2. With 1 small caches find more, large ones less; see benchmarks/NOTES.md.

    Raises:
        ValueError: ``min_uses`` is not between 1 and :data:`MAX_USES`.
        TypeError: ``min_uses`` is not an integer.
    """

    name = "s3fifo"

    def __init__(self, min_uses: int = 1) -> None:
        min_uses = require_count("min_uses", min_uses)
        if not 1 <= min_uses <= MAX_USES:
            raise ValueError(f"min_uses must be between 1 and {MAX_USES}, got {min_uses}")
        self._min_uses = min_uses
        self._lists = ChunkLists(SMALL, MAIN)
        self._ghosts = GhostList()

    def insert(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks into small, or into main if the ghost queue remembers them."""
        for chunk in reversed(chunks):
            chunk.uses = 0
            self._lists.enter(chunk, SMALL if self._ghosts.recall(chunk) is None else MAIN)

    def touch(self, chunks: Sequence[CachedChunk]) -> None:
        """Count a use of each chunk; none changes its place."""
        for chunk in chunks:
            if chunk.uses < MAX_USES:
                chunk.uses += 1

    def take_out(self, chunks: Sequence[CachedChunk]) -> None:
        """Take chunks out of their queues."""
        for chunk in chunks:
            self._lists.take_out(chunk)

    def put_back(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks in at the beginning of their queues, the head last."""
        for chunk in reversed(chunks):
            self._lists.put_back(chunk)

    def remove(self, chunks: Sequence[CachedChunk]) -> None:
        """Forget chunks; the ghost queue does not remember them."""
        for chunk in chunks:
            self._lists.leave(chunk)

    def evict(self, num_bytes: int) -> Sequence[CachedChunk]:
        """Take chunks from small while it exceeds its share, else from main."""
        lists = self._lists
        small_bytes = SMALL_SHARE * lists.total_bytes
        main_bytes = lists.total_bytes - small_bytes
        victims: list[CachedChunk] = []
        while num_bytes > 0:
            exceeds = lists.num_bytes[SMALL] > small_bytes
            chunk = lists.first(SMALL, MAIN) if exceeds else lists.first(MAIN, SMALL)
            assert chunk is not None
            is_small = chunk.queue == SMALL
            if chunk.uses >= (self._min_uses if is_small else 1):
                chunk.uses = 0 if is_small else chunk.uses - 1
                lists.move(chunk, MAIN)
                continue
            victims.append(chunk)
            num_bytes -= chunk.size_bytes
            lists.leave(chunk)
            if is_small:
                self._ghosts.remember(chunk)
        self._ghosts.trim(main_bytes)
        return victims

    def clear(self) -> None:
        """Forget all chunks and ghosts."""
        self._lists.clear()
        self._ghosts.clear()

    def repair(self, evictable: Sequence[CachedChunk], in_use: Sequence[CachedChunk]) -> None:
        """Keep the order; chunks that it lost are the next to be looked at. O(n)."""
        self._lists.repair(evictable, in_use)
        self._ghosts.repair()

    def check(
        self,
        evictable: Sequence[CachedChunk],
        in_use: Sequence[CachedChunk],
        require: Callable[[bool, str], None],
    ) -> None:
        """Each queue holds its evictable chunks, and its bytes are right."""
        self._lists.check(evictable, in_use, require)
        self._ghosts.check(require)

    def __len__(self) -> int:
        """How many chunks are in the queues."""
        return len(self._lists)

    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in a queue."""
        return chunk in self._lists
