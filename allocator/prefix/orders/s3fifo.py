"""``S3FIFOOrder``: three queues, so that chunks that are used once leave early."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Generic, TypeVar

from kvheap.prefix.orders.base import require_new, require_num_bytes, suffices

__all__ = ["S3FIFOOrder"]

K = TypeVar("K", bound=Hashable)

SMALL_SHARE = 0.1
"""Bytes of the small queue, as a share of the stored bytes; the paper's choice."""

MAX_USES = 3
"""Uses are counted up to this; the paper keeps them in two bits."""


class _Chunk:
    """What the order knows of a chunk."""

    __slots__ = ("is_small", "size_bytes", "uses")

    def __init__(self, size_bytes: int, is_small: bool) -> None:
        self.size_bytes = size_bytes
        self.is_small = is_small
        self.uses = 0


class S3FIFOOrder(Generic[K]):
    """Three static first-in, first-out queues (Yang, Zhang, Qiu, Yue and Rashmi, SOSP 2023).

    New chunks enter the small queue. Those that come to its end unused are evicted, and ghosts
    remember them; the others move to main, as do new chunks that ghosts remember. A chunk that
    comes to the end of main goes round again once for each of its uses. One use after the first
    moves a chunk to main, as in ``kvheap.prefix.policies.S3FIFO``; the paper asks for two.

    O(1) for each chunk, amortized over its uses, and for each pinned chunk that an eviction steps
    over.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[K, _Chunk] = OrderedDict()
        self._main: OrderedDict[K, _Chunk] = OrderedDict()
        self._ghosts: OrderedDict[K, int] = OrderedDict()
        self.reset()

    def insert(self, key: K, size_bytes: int, group: int) -> None:
        """Put a chunk into small, or into main if a ghost remembers it."""
        require_new(key, size_bytes, key in self)
        ghost_bytes = self._ghosts.pop(key, None)
        chunk = _Chunk(size_bytes, is_small=ghost_bytes is None)
        self._ghost_bytes -= ghost_bytes or 0
        self._bytes += size_bytes
        if chunk.is_small:
            self._small[key] = chunk
            self._small_bytes += size_bytes
        else:
            self._main[key] = chunk

    def touch(self, keys: Sequence[K]) -> None:
        """Count a use of each chunk; none changes its place."""
        for key in keys:
            chunk = self._small.get(key) or self._main.get(key)
            if chunk is not None and chunk.uses < MAX_USES:
                chunk.uses += 1

    def settle(self, keys: Sequence[K]) -> None:
        """Move chunks to the beginnings of their queues, the head last."""
        for key in reversed(keys):
            for queue in (self._small, self._main):
                if key in queue:
                    queue.move_to_end(key)

    def remove(self, key: K) -> None:
        """Forget a chunk; no ghost remembers it."""
        chunk = self._pop(key)
        self._bytes -= chunk.size_bytes
        if chunk.is_small:
            self._small_bytes -= chunk.size_bytes

    def evict_until(self, num_bytes: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Remove chunks from small while it exceeds its share, else from main."""
        require_num_bytes(num_bytes)
        if not suffices(self._sizes(), num_bytes, is_pinned):
            return []
        small, main = self._small, self._main
        small_share = SMALL_SHARE * self._bytes
        main_share = self._bytes - small_share
        victims: list[K] = []
        passed: list[tuple[OrderedDict[K, _Chunk], K, _Chunk]] = []
        try:
            while num_bytes > 0:
                exceeds = self._small_bytes > small_share
                queue = small if (exceeds and small) or not main else main
                key, chunk = next(iter(queue.items()))
                is_passed = is_pinned(key)
                del queue[key]
                if is_passed:
                    passed.append((queue, key, chunk))
                elif chunk.uses:
                    chunk.uses = 0 if chunk.is_small else chunk.uses - 1
                    main[key] = chunk
                    if chunk.is_small:
                        chunk.is_small = False
                        self._small_bytes -= chunk.size_bytes
                else:
                    victims.append(key)
                    num_bytes -= chunk.size_bytes
                    self._leave(key, chunk)
        finally:
            for queue, key, chunk in reversed(passed):
                queue[key] = chunk
                queue.move_to_end(key, last=False)
        self._trim_ghosts(main_share)
        return victims

    def evict(self, keys: Iterable[K]) -> None:
        """Remove chunks; ghosts remember those of small."""
        main_share = (1 - SMALL_SHARE) * self._bytes
        for key in keys:
            self._leave(key, self._pop(key))
        self._trim_ghosts(main_share)

    def _pop(self, key: K) -> _Chunk:
        return (self._small if key in self._small else self._main).pop(key)

    def _leave(self, key: K, chunk: _Chunk) -> None:
        """Count off an evicted chunk that has left its queue; a ghost remembers one of small."""
        self._bytes -= chunk.size_bytes
        if chunk.is_small:
            self._small_bytes -= chunk.size_bytes
            self._ghosts[key] = chunk.size_bytes
            self._ghost_bytes += chunk.size_bytes

    def _trim_ghosts(self, max_bytes: float) -> None:
        while self._ghost_bytes > max_bytes and self._ghosts:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _sizes(self) -> Iterator[tuple[K, int]]:
        for key, chunk in chain(self._small.items(), self._main.items()):
            yield key, chunk.size_bytes

    def reset(self) -> None:
        """Forget all chunks and ghosts."""
        for queue in (self._small, self._main, self._ghosts):
            queue.clear()
        self._bytes = self._small_bytes = self._ghost_bytes = 0

    def __repr__(self) -> str:
        """How many chunks are in the order."""
        return f"{type(self).__name__}({len(self)} chunks)"

    def __len__(self) -> int:
        """How many chunks are in the order."""
        return len(self._small) + len(self._main)

    def __iter__(self) -> Iterator[K]:
        """The chunks of the small queue, then those of the main one."""
        return chain(self._small, self._main)

    def __contains__(self, key: object) -> bool:
        """Whether a chunk is in the order."""
        return key in self._small or key in self._main
