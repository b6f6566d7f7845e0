"""``Residents``: the chunks that are in the heap, and which of them leave to make room.

The life of each chunk, from its store to its last load, is :class:`ChunkStore`'s.

Needs no vLLM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from kvheap.errors import HeapCorruptionError
from kvheap.integrations.vllm.chunk_space import Chunk, ChunkSpace, Place
from kvheap.integrations.vllm.eviction import EvictionOrder

__all__ = ["GroupBooks", "Residents"]

K = TypeVar("K", bound=Hashable)

MOST_IDLE = 1 / 192
"""Share of the heap that free places of the wrong sizes may have before spans are emptied.

With 1/128, 1 % of a heap of 4,000 chunks of four sizes is idle; with 1/192, 0.6 %.
"""

CHEAP = 1 / 4
"""Share of a span that chunks may have for it to be emptied in place of older chunks."""


class GroupBooks:
    """A group's sizes and counters.

    Attributes:
        index: its number in the list of groups.
        name: what statistics call it.
        chunk_bytes: the bytes of a chunk that are copied.
        place_bytes: the bytes of a chunk's place.
        chunks: how many are in the heap, in any state.
        evicted: how many were evicted.
        hits: bytes that loads were told to read.
    """

    __slots__ = ("chunk_bytes", "chunks", "evicted", "hits", "index", "name", "place_bytes")

    def __init__(self, index: int, name: str, chunk_bytes: int, place_bytes: int) -> None:
        self.index = index
        self.name = name
        self.chunk_bytes = chunk_bytes
        self.place_bytes = place_bytes
        self.chunks = self.evicted = self.hits = 0


class Residents(Generic[K]):
    """The chunks that are found, in the order of their leaving.

    Args:
        space: the heap's places.
        order: which chunks leave first; no other object uses it.
        groups: the groups' counters, which this keeps.

    Attributes:
        chunks: by key, pending or ready.
        evictable_bytes: bytes of the places of those that may leave: no copy uses them. Whoever
            begins or ends a copy keeps it.
        evicted_bytes: bytes of the places of those that have left to make room.
        span_evictions: how many of these left to empty a span for chunks of another size.
    """

    __slots__ = (
        "_ages",
        "_most_idle_bytes",
        "_order",
        "chunks",
        "evictable_bytes",
        "evicted_bytes",
        "groups",
        "space",
        "span_evictions",
    )

    def __init__(
        self, space: ChunkSpace[K], order: EvictionOrder[K], groups: Sequence[GroupBooks]
    ) -> None:
        self.space = space
        self.groups = groups
        self.chunks: dict[K, Chunk[K]] = {}
        self.evictable_bytes = self.evicted_bytes = self.span_evictions = 0
        self._order = order
        self._most_idle_bytes = space.heap_bytes * MOST_IDLE
        # The keys by size, the one that was used longest ago first. Equal sizes need none.
        sizes = {group.place_bytes for group in groups}
        self._ages: dict[int, OrderedDict[K, None]] = {}
        if len(sizes) > 1:
            self._ages = {size: OrderedDict() for size in sizes}

    # -- come and go ---------------------------------------------------------------------------

    def enter(self, chunks: Iterable[Chunk[K]]) -> None:
        """Enter chunks that have places; the last to leave comes last. O(N * P)."""
        for chunk in chunks:
            self.chunks[chunk.key] = chunk
            self.groups[chunk.group].chunks += 1
            self._order.insert(chunk.key, chunk.span.size, chunk.group)
            if self._ages:
                self._ages[chunk.span.size][chunk.key] = None

    def touch(self, chunks: Sequence[Chunk[K]]) -> None:
        """Note that one request used chunks, the head of its prefix first. O(N * P)."""
        self._order.touch([chunk.key for chunk in chunks])
        if self._ages:
            for chunk in reversed(chunks):
                self._ages[chunk.span.size].move_to_end(chunk.key)

    def settle(self, keys: Sequence[K]) -> None:
        """Put the chunks of one request, the head first, in the order of their need."""
        self._order.settle(keys)

    def drop(self, chunks: Iterable[Chunk[K]]) -> None:
        """No longer find chunks; their places stay theirs until :meth:`free`."""
        for chunk in chunks:
            self._order.remove(chunk.key)
            del self.chunks[chunk.key]
            if self._ages:
                del self._ages[chunk.span.size][chunk.key]

    def free(self, chunks: Sequence[Chunk[K]]) -> None:
        """Free the places of chunks that are no longer found."""
        for chunk in chunks:
            self.groups[chunk.group].chunks -= 1
            del chunk.span.chunks[chunk.address]
        self.space.give_back([(chunk.span, chunk.address) for chunk in chunks])

    def clear(self) -> None:
        """Drop every chunk, and make every byte free."""
        self.chunks.clear()
        for ages in self._ages.values():
            ages.clear()
        self._order.reset()
        self.space.clear()
        self.evictable_bytes = 0
        for group in self.groups:
            group.chunks = 0

    def in_order(self) -> list[Chunk[K]]:
        """The chunks, those that would leave first before the others. O(n log n) at most."""
        return [self.chunks[key] for key in self._order]

    # -- make room -----------------------------------------------------------------------------

    def find_room(
        self, missing: dict[int, int], kept: frozenset[K], evicted: list[K]
    ) -> dict[int, list[Place[K]]] | None:
        """Places for chunks that are to be stored.

        The order decides who leaves. Most often the victims have the sizes of the chunks to come,
        which take their places. If not, more leave, until the places of wrong sizes are many
        enough to empty a span of them.

        Args:
            missing: how many chunks of each allocated size need a place; used up.
            kept: keys that must not leave.
            evicted: gets the keys that leave.

        Returns:
            By size, the places, the highest address first; None: there is no room, and no place
            is taken.
        """
        space, chunks = self.space, self.chunks
        wanted = _bytes_of(missing)
        if wanted > space.free_bytes and not self._could_free(wanted - space.free_bytes, kept):
            return None
        places = {}
        for size in sorted(missing, reverse=True):
            places[size] = space.take(size, missing[size])
            missing[size] -= len(places[size])
        wanted = _bytes_of(missing)
        if wanted:

            def is_pinned(key: K) -> bool:
                return chunks[key].loads != 0 or key in kept

            victims = self._next_in_order(wanted, is_pinned)
            victims = victims or self._in_emptiest_span(missing, kept)
            while victims:
                evicted += victims
                self._take_places(victims, missing, places)
                wanted = _bytes_of(missing)
                if not wanted:
                    break
                victims = []
                if space.idle_bytes < self._most_idle_bytes:
                    victims = self._next_in_order(wanted, is_pinned)
                else:
                    victims = self._in_emptiest_span(missing, kept, CHEAP)
                    victims = victims or self._oldest_of_size(missing, is_pinned)
                victims = victims or self._in_emptiest_span(missing, kept)
                victims = victims or self._next_in_order(wanted, is_pinned)
        if wanted:
            for taken in places.values():
                space.give_back(taken)
            return None
        for taken in places.values():
            taken.sort(key=_address_of, reverse=True)
        return places

    def _could_free(self, num_bytes: int, kept: frozenset[K]) -> bool:
        """Whether chunks that may leave have so many bytes together."""
        idle = [chunk for chunk in map(self.chunks.__getitem__, kept) if not chunk.loads]
        kept_bytes = sum([chunk.span.size for chunk in idle])
        return num_bytes <= self.evictable_bytes - kept_bytes

    def _next_in_order(self, wanted: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Chunks with the bytes that are wanted, or all that may leave; they left the order."""
        victims = self._order.evict_until(wanted, is_pinned)
        if not victims and 0 < self.evictable_bytes < wanted:
            free_bytes = self.space.free_bytes
            victims = self._order.evict_until(max(wanted - free_bytes, 1), is_pinned)
        return victims

    def _oldest_of_size(self, missing: dict[int, int], is_pinned: Callable[[K], bool]) -> list[K]:
        """Chunks of the largest missing size that were not used for longest; they left the order.

        Each makes one place, whatever the order thinks of chunks of that size.
        """
        size = max(size for size, count in missing.items() if count)
        may_go = (key for key in self._ages[size] if not is_pinned(key))
        keys = list(islice(may_go, missing[size]))
        self._order.evict(keys)
        return keys

    def _in_emptiest_span(
        self, missing: dict[int, int], kept: frozenset[K], share: float = 1.0
    ) -> list[K]:
        """The chunks of a span to empty for the largest missing size; they left the order.

        Args:
            missing: how many chunks of each size need a place.
            kept: keys that must not leave.
            share: of the span, that its chunks may have at most.
        """
        size = max(size for size, count in missing.items() if count)
        span = self.space.emptiest(size, lambda chunk: not chunk.loads and chunk.key not in kept)
        if span is None or len(span.chunks) * span.size > share * span.length:
            return []
        keys = [chunk.key for chunk in span.chunks.values()]
        self._order.evict(keys)
        self.span_evictions += len(keys)
        return keys

    def _take_places(
        self, victims: list[K], missing: dict[int, int], places: dict[int, list[Place[K]]]
    ) -> None:
        """Give the places of evicted chunks to chunks of their size, and free the others."""
        others = []
        for key in victims:
            chunk = self.chunks.pop(key)
            span, group = chunk.span, self.groups[chunk.group]
            size = span.size
            group.chunks -= 1
            group.evicted += 1
            self.evicted_bytes += size
            self.evictable_bytes -= size
            del span.chunks[chunk.address]
            if self._ages:
                del self._ages[size][key]
            if missing.get(size):
                missing[size] -= 1
                places[size].append((span, chunk.address))
            else:
                others.append((span, chunk.address))
        if others:
            self.space.give_back(others)
            for size in sorted(missing, reverse=True):
                if missing[size]:
                    found = self.space.take(size, missing[size])
                    missing[size] -= len(found)
                    places[size] += found

    def check(self) -> None:
        """Check the order and the keys by size against the chunks. O(n).

        Raises:
            HeapCorruptionError: something does not hold; the message names it.
        """
        by_size: dict[int, set[K]] = {size: set() for size in self._ages}
        for chunk in self.chunks.values() if self._ages else ():
            by_size[chunk.span.size].add(chunk.key)
        for what, is_right in (
            ("keys", all(key == chunk.key for key, chunk in self.chunks.items())),
            ("the order's chunks", len(self._order) == len(self.chunks)),
            ("keys by size", by_size == {size: set(keys) for size, keys in self._ages.items()}),
        ):
            if not is_right:
                raise HeapCorruptionError(f"{what}: wrong among {len(self.chunks)} chunks")


def _address_of(place: Place[K]) -> int:
    return place[1]


def _bytes_of(counts: dict[int, int]) -> int:
    """The bytes of so many chunks of each size."""
    return sum([size * count for size, count in counts.items()])
