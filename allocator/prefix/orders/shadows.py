"""``ShadowCache``: what a small cache under some rule would have found."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from kvheap.prefix.orders.classes import ChunkClasses, ClassedChunk
from kvheap.prefix.orders.reuse import Table

__all__ = ["ShadowCache"]

K = TypeVar("K", bound=Hashable)

SLACK_DIVISOR = 16
"""By a share of its bytes a shadow is too large before it evicts, and half as much too small after:
several evictions at once cost less."""


class ShadowCache(Generic[K]):
    """A cache without contents, for a sample of the keys and as small a share of the bytes.

    It sees each use of a sampled key, and counts the bytes of those that it would have found.
    Sampling by key keeps the reuse of each chunk whole (Waldspurger et al., SHARDS, FAST 2015);
    choosing between rules by what samples find is set dueling (Qureshi et al., ISCA 2007).

    Args:
        max_bytes: what it holds.
        newest_too: whether under its rule a chunk used lately may be worth less than older ones.

    Attributes:
        found_bytes: of the chunks that were there when they were used; its user lets it decay.
    """

    __slots__ = (
        "_classes",
        "_max_bytes",
        "_newest_too",
        "_num_bytes",
        "_places",
        "_slack_bytes",
        "found_bytes",
    )

    def __init__(self, max_bytes: int, newest_too: bool) -> None:
        self._slack_bytes = max_bytes // SLACK_DIVISOR
        self._max_bytes = max_bytes - self._slack_bytes // 2
        self._newest_too = newest_too
        self._classes: ChunkClasses[K] = ChunkClasses()
        self._places: dict[K, OrderedDict[K, ClassedChunk[K]]] = {}
        self._num_bytes = 0
        self.found_bytes = 0.0

    def extend(self, num_classes: int) -> None:
        """Have so many classes more."""
        self._classes.extend(num_classes)

    def use(self, chunk: ClassedChunk[K], worths: Table) -> None:
        """Take a chunk in that has just been used, and evict what is worth least instead."""
        key, now = chunk.key, chunk.used_at
        place = self._places.get(key)
        if place is None:
            self._num_bytes += chunk.size_bytes
        else:
            del place[key]
            self.found_bytes += chunk.size_bytes
        self._places[key] = place = self._classes.lists[chunk.number]
        place[key] = chunk
        if self._num_bytes > self._max_bytes + self._slack_bytes:
            victims = []
            for victim in self._classes.cheapest(worths, now + 1, self._newest_too, key.__eq__):
                victims.append(victim)
                self._num_bytes -= victim.size_bytes
                if self._num_bytes <= self._max_bytes:
                    break
            for victim in victims:
                del self._places.pop(victim.key)[victim.key]
