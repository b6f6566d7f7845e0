"""``ShadowCache``: what a small cache under some rule would have found."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from kvheap.prefix.orders.classes import ChunkClasses, ClassedChunk
from kvheap.prefix.orders.reuse import NUM_CLASSES
from kvheap.prefix.orders.rules import Rule

__all__ = ["ShadowCache"]

K = TypeVar("K", bound=Hashable)

SLACK_DIVISOR = 16
"""By a share of its bytes a shadow is too large before it evicts, and half as much too small after:
several evictions at once cost less."""


class ShadowCache(Generic[K]):
    """A cache without contents, for a sample of the keys and as small a share of the bytes.

    It sees each use of a sampled key, and tells whether it would have found it. Sampling by key
    keeps the reuse of each chunk whole (Waldspurger et al., SHARDS, FAST 2015); choosing between
    rules by what samples find is set dueling (Qureshi et al., ISCA 2007).

    Args:
        max_bytes: what it holds.
        rule: what it evicts.
    """

    __slots__ = (
        "_classes",
        "_first_bytes",
        "_max_bytes",
        "_num_bytes",
        "_places",
        "_rule",
        "_slack",
    )

    def __init__(self, max_bytes: int, rule: Rule) -> None:
        self._slack = max_bytes // SLACK_DIVISOR
        self._max_bytes = max_bytes - self._slack // 2
        self._rule = rule
        self._classes: ChunkClasses[K] = ChunkClasses(NUM_CLASSES)
        self._places: dict[K, OrderedDict[K, ClassedChunk[K]]] = {}
        self._num_bytes = 0
        self._first_bytes = 0  # of chunks used once

    def use(self, chunk: ClassedChunk[K]) -> bool:
        """Take a chunk in that has just been used, and evict what is worth least instead.

        Returns:
            Whether the chunk was there.
        """
        key, now, lists = chunk.key, chunk.used_at, self._classes.lists
        place = self._places.get(key)
        is_found = place is not None
        if place is None:
            self._num_bytes += chunk.size_bytes
        else:
            del place[key]
            if place is lists[0]:
                self._first_bytes -= chunk.size_bytes
        self._places[key] = place = lists[chunk.number]
        place[key] = chunk
        if place is lists[0]:
            self._first_bytes += chunk.size_bytes
        if self._num_bytes > self._max_bytes + self._slack:
            self._evict(key, now)
        return is_found

    def _evict(self, kept: K, now: int) -> None:
        worths = self._rule.worths(self._first_bytes, self._num_bytes)
        victims = []
        newest_too = self._rule.newest_too
        for victim in self._classes.cheapest(worths, now + 1, newest_too, kept.__eq__):
            victims.append(victim)
            self._num_bytes -= victim.size_bytes
            if self._num_bytes <= self._max_bytes:
                break
        first = self._classes.lists[0]
        for victim in victims:
            place = self._places.pop(victim.key)
            del place[victim.key]
            if place is first:
                self._first_bytes -= victim.size_bytes
