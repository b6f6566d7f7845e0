"""``LRUOrder``: the chunk that was used longest ago leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from kvheap.prefix.orders.base import require_new, require_num_bytes

__all__ = ["LRUOrder"]

K = TypeVar("K", bound=Hashable)


class LRUOrder(Generic[K]):
    """Least recently used first; of one request the tail first. O(1) for each chunk.

    >>> order = LRUOrder[str]()
    >>> for key in "cba":  # one request, its tail first
    ...     order.insert(key, 10, group=0)
    >>> order.evict_until(15, lambda key: key == "c")
    ['b', 'a']
    """

    def __init__(self) -> None:
        self._sizes: OrderedDict[K, int] = OrderedDict()  # least recently used first

    def insert(self, key: K, size_bytes: int, group: int) -> None:
        """Enter a chunk as the last to leave."""
        require_new(key, size_bytes, key in self._sizes)
        self._sizes[key] = size_bytes

    def touch(self, keys: Sequence[K]) -> None:
        """Make chunks the last to leave, the head the very last."""
        sizes = self._sizes
        for key in reversed(keys):
            if key in sizes:
                sizes.move_to_end(key)

    settle = touch

    def remove(self, key: K) -> None:
        """Forget a chunk."""
        del self._sizes[key]

    def evict(self, keys: Iterable[K]) -> None:
        """Remove chunks."""
        for key in keys:
            del self._sizes[key]

    def evict_until(self, num_bytes: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Remove the least recently used chunks."""
        require_num_bytes(num_bytes)
        victims = []
        for key, size_bytes in self._sizes.items():
            if not is_pinned(key):
                victims.append(key)
                num_bytes -= size_bytes
                if num_bytes <= 0:
                    break
        else:
            return []
        self.evict(victims)
        return victims

    def reset(self) -> None:
        """Forget all chunks."""
        self._sizes.clear()

    def __repr__(self) -> str:
        """How many chunks are in the order."""
        return f"{type(self).__name__}({len(self)} chunks)"

    def __len__(self) -> int:
        """How many chunks are in the order."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[K]:
        """The chunks in the order of their leaving."""
        return iter(self._sizes)

    def __contains__(self, key: object) -> bool:
        """Whether a chunk is in the order."""
        return key in self._sizes
