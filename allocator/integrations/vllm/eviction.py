"""The order in which chunks of unlike sizes leave a full heap.

POLICY's file replaces this one when it is merged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

__all__ = ["LRU", "POLICIES", "EvictionOrder"]

K = TypeVar("K", bound=Hashable)


class EvictionOrder(Protocol[K]):
    """Which chunks leave first. It keeps keys and sizes, and frees nothing."""

    def insert(self, key: K, size_bytes: int, group: int) -> None:
        """Enter a chunk whose store begins."""

    def touch(self, keys: Sequence[K]) -> None:
        """A request used these chunks, the head of its prefix first."""

    def settle(self, keys: Sequence[K]) -> None:
        """Order the chunks of a request, the head of its prefix first, without counting a use."""

    def remove(self, key: K) -> None:
        """A chunk left for another reason than an eviction."""

    def evict(self, keys: Iterable[K]) -> None:
        """Remove chunks that the caller evicts by a choice of its own."""

    def evict_until(self, num_bytes: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Remove chunks of at least ``num_bytes`` together; ``[]``, and no change: impossible."""

    def reset(self) -> None:
        """Forget all chunks and what was learnt from them."""

    def __len__(self) -> int:
        """How many chunks there are."""


class LRU:
    """The chunk that was used longest ago leaves first; a request loses its tail first."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[Hashable, int] = OrderedDict()

    def insert(self, key: Hashable, size_bytes: int, group: int) -> None:
        """Enter a chunk as the last to leave."""
        self._sizes[key] = size_bytes

    def touch(self, keys: Sequence[Hashable]) -> None:
        """Make the keys the last to leave, the first of them the very last."""
        sizes = self._sizes
        for key in reversed(keys):
            if key in sizes:
                sizes.move_to_end(key)

    settle = touch
    """Order the chunks of a request, the head of its prefix first, without counting a use."""

    def remove(self, key: Hashable) -> None:
        """Forget a key."""
        del self._sizes[key]

    def evict_until(self, num_bytes: int, is_pinned: Callable[[Any], bool]) -> list[Any]:
        """Remove the oldest keys of at least ``num_bytes`` together."""
        victims = []
        for key, size in self._sizes.items():
            if num_bytes <= 0:
                break
            if not is_pinned(key):
                victims.append(key)
                num_bytes -= size
        if num_bytes > 0:
            return []
        for key in victims:
            del self._sizes[key]
        return victims

    def evict(self, keys: Iterable[Hashable]) -> None:
        """Forget keys."""
        for key in keys:
            del self._sizes[key]

    def reset(self) -> None:
        """Forget all keys."""
        self._sizes.clear()

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._sizes)


POLICIES: Mapping[str, Callable[[int], EvictionOrder[Any]]] = {"lru": lambda heap_bytes: LRU()}
"""By the name that users write, what makes a new order for a heap of so many bytes."""
