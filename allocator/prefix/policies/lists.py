"""``ChunkLists``: two lists of chunks with their bytes, for policies that divide the space."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvheap.prefix.policies.base import CachedChunk, total_bytes

__all__ = ["ChunkLists"]


class ChunkLists:
    """Lists of chunks by name, each first in, first out; ``chunk.queue`` names a chunk's list.

    A chunk that is taken out, because it is in use, still belongs to its list, and its bytes still
    count there. Every operation is O(1).

    Args:
        names: of the lists.

    Attributes:
        num_bytes: bytes of each list by name, those of chunks that are taken out included.
    """

    __slots__ = ("_orders", "num_bytes")

    def __init__(self, *names: str) -> None:
        self._orders: dict[str, OrderedDict[CachedChunk, None]] = {
            name: OrderedDict() for name in names
        }
        self.num_bytes = dict.fromkeys(names, 0)

    @property
    def total_bytes(self) -> int:
        """Bytes of all lists."""
        return sum(self.num_bytes.values())

    def enter(self, chunk: CachedChunk, name: str) -> None:
        """Append a new chunk to a list."""
        chunk.queue = name
        self._orders[name][chunk] = None
        self.num_bytes[name] += chunk.size_bytes

    def leave(self, chunk: CachedChunk) -> None:
        """Forget a chunk."""
        self._orders[chunk.queue].pop(chunk, None)
        self.num_bytes[chunk.queue] -= chunk.size_bytes

    def move(self, chunk: CachedChunk, name: str) -> None:
        """Move a chunk to the end of a list; one that is taken out stays so."""
        order, target = self._orders[chunk.queue], self._orders[name]
        is_in = chunk in order
        self.num_bytes[chunk.queue] -= chunk.size_bytes
        self.num_bytes[name] += chunk.size_bytes
        chunk.queue = name
        if is_in:
            del order[chunk]
            target[chunk] = None

    def take_out(self, chunk: CachedChunk) -> None:
        """Take a chunk out of the order of its list."""
        self._orders[chunk.queue].pop(chunk, None)

    def put_back(self, chunk: CachedChunk) -> None:
        """Append a chunk that was taken out to its list."""
        self._orders[chunk.queue][chunk] = None

    def first(self, *names: str) -> CachedChunk | None:
        """The first chunk of the first of these lists that has one; None if none has."""
        for name in names:
            order = self._orders[name]
            if order:
                return next(iter(order))
        return None

    def clear(self) -> None:
        """Forget all chunks."""
        for name, order in self._orders.items():
            order.clear()
            self.num_bytes[name] = 0

    def repair(self, evictable: Sequence[CachedChunk], in_use: Sequence[CachedChunk]) -> None:
        """Hold exactly these chunks. Those that were lost come first in their lists. O(n)."""
        for name, order in self._orders.items():
            here = dict.fromkeys(chunk for chunk in evictable if chunk.queue == name)
            lost = [chunk for chunk in here if chunk not in order]
            known = [chunk for chunk in order if chunk in here]
            self._orders[name] = OrderedDict.fromkeys([*lost, *known])
            self.num_bytes[name] = total_bytes(here)
            self.num_bytes[name] += total_bytes(c for c in in_use if c.queue == name)

    def check(
        self,
        evictable: Sequence[CachedChunk],
        in_use: Sequence[CachedChunk],
        require: Callable[[bool, str], None],
    ) -> None:
        """Call ``require(holds, message)`` for every invariant. O(n)."""
        for name, order in self._orders.items():
            here = {chunk for chunk in evictable if chunk.queue == name}
            require(set(order) == here, f"the list {name} holds other chunks")
            used = [chunk for chunk in in_use if chunk.queue == name]
            expected = total_bytes(here) + total_bytes(used)
            require(self.num_bytes[name] == expected, f"the bytes of {name} are miscounted")

    def __len__(self) -> int:
        """How many chunks are in the lists' orders."""
        return sum(map(len, self._orders.values()))

    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in the order of a list."""
        return any(chunk in order for order in self._orders.values())
