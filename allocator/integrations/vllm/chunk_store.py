"""``ChunkStore``: which chunks are in the heap, where, and which of them leave next.

It is the scheduler's half of a tier: keys, addresses and sizes, no bytes. The workers have heaps of
the same size, so one address holds for all of them.

A chunk is *pending* from :meth:`ChunkStore.begin_store` until its store ends, then *ready*: it is
found, and can be loaded. Chunks that are pending or being loaded are never evicted. A chunk that is
forgotten meanwhile is no longer found; its bytes become free when its last copy has ended.

Needs no vLLM.

>>> from kvheap.integrations.vllm.eviction import POLICIES
>>> groups = {"f": ChunkGroup("full", 1024), "w": ChunkGroup("window", 256)}
>>> store = ChunkStore(2048, groups, POLICIES["lru"](2048), tag_of=lambda key: key[0])
>>> plan = store.begin_store(["f0", "w0", "w1"])
>>> plan.addresses.tolist(), plan.sizes.tolist()
([0, 1024, 1280], [1024, 256, 256])
>>> store.end_store(plan.keys)
['f0', 'w0', 'w1']
>>> store.begin_load(["w1"])[0].tolist()
[1280]
>>> store.begin_store(["f1"]).evicted
['w0', 'f0']
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from itertools import islice
from typing import Generic, TypeVar

from numpy import array as as_array
from numpy import empty, int64

from kvheap.addresses.arguments import require_count
from kvheap.addresses.extents import Int64Array
from kvheap.errors import HeapCorruptionError, LifetimeError
from kvheap.integrations.vllm.chunk_space import (
    PENDING,
    Chunk,
    ChunkSpace,
    Place,
    place_bytes_of,
)
from kvheap.integrations.vllm.eviction import EvictionOrder
from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.store_values import GroupStats, StorePlan, StoreStats

__all__ = ["ChunkStore"]

K = TypeVar("K", bound=Hashable)


MOST_IDLE = 1 / 192
"""Share of the heap that free places of the wrong sizes may have before spans are emptied.

With 1/128, 1 % of a heap of 4,000 chunks of four sizes is idle; with 1/192, 0.6 %.
"""

CHEAP = 1 / 4
"""Share of a span that chunks may have for it to be emptied in place of older chunks."""

NOTHING: Int64Array = empty(0, int64)
NOTHING.setflags(write=False)


class _Group:
    """A group's sizes and counters."""

    __slots__ = ("chunk_bytes", "chunks", "evicted", "hits", "index", "name", "place_bytes")

    def __init__(self, index: int, group: ChunkGroup, place_bytes: int) -> None:
        self.index = index
        self.name = group.name
        self.chunk_bytes = group.chunk_bytes
        self.place_bytes = place_bytes
        self.chunks = self.evicted = self.hits = 0


class ChunkStore(Generic[K]):
    """Keys to chunks of one heap, with an order of eviction.

    Not thread-safe: it belongs to one scheduler. Costs below are for N keys, and P for what the
    order takes for one of them; none depends on how many chunks there are, unless it says so.

    =============  ==================================================================
    purpose        methods
    =============  ==================================================================
    look up        ``find``, ``is_ready``, ``in``, ``len``
    load           ``begin_load``, ``end_load``, ``touch``, ``settle``
    store          ``begin_store``, ``end_store``
    drop           ``forget``, ``reset``
    watch          ``stats``, ``check``
    =============  ==================================================================

    Args:
        heap_bytes: bytes of each worker's heap.
        groups: the groups by their tags.
        order: which chunks leave first, a new object that no other store uses.
        tag_of: the tag of a key's group.
        segment_bytes: no chunk crosses a multiple of this many bytes; see ``ChunkSpace``.

    Raises:
        ValueError: ``groups`` or the heap is empty, or a chunk of some group does not fit into
            the heap or a segment; the message names it.
        TypeError: ``heap_bytes`` is not an integer.
    """

    def __init__(
        self,
        heap_bytes: int,
        groups: Mapping[Hashable, ChunkGroup],
        order: EvictionOrder[K],
        tag_of: Callable[[K], Hashable],
        segment_bytes: int | None = None,
    ) -> None:
        heap_bytes = require_count("heap_bytes", heap_bytes, at_least=1)
        if not groups:
            raise ValueError("a ChunkStore needs at least one group, got none")
        longest = heap_bytes if segment_bytes is None else min(heap_bytes, segment_bytes)
        for group in groups.values():
            if group.allocated_bytes > longest:
                raise ValueError(
                    f"a chunk of group {group.name!r} takes {group.allocated_bytes} bytes, more "
                    f"than the {longest} bytes of "
                    f"{'the heap' if longest == heap_bytes else 'a segment'}: give more memory, or "
                    f"make chunks of fewer blocks"
                )
        place_bytes = place_bytes_of({group.allocated_bytes for group in groups.values()})
        self._groups = [
            _Group(index, group, place_bytes[group.allocated_bytes])
            for index, group in enumerate(groups.values())
        ]
        self._by_tag = dict(zip(groups, self._groups, strict=True))
        self._tag_of = tag_of
        self._order = order
        self._chunks: dict[K, Chunk[K]] = {}
        self._leaving: dict[K, Chunk[K]] = {}
        sizes = {group.place_bytes for group in self._groups}
        self._space: ChunkSpace[K] = ChunkSpace(heap_bytes, sizes, segment_bytes)
        self._most_idle_bytes = self._space.heap_bytes * MOST_IDLE
        # The keys by size, the one that was used longest ago first. Equal sizes need none.
        self._ages: dict[int, OrderedDict[K, None]] = {}
        if len(sizes) > 1:
            self._ages = {size: OrderedDict() for size in sizes}
        self._evictable_bytes = 0
        self._pending_bytes = 0
        self._clock = 0
        self._evicted_bytes = self._span_evictions = self._refused = self._failed = 0
        self.find: Callable[[K], Chunk[K] | None] = self._chunks.get
        """The chunk of a key, pending or ready; None: it is not there. O(1)."""

    # -- look up -------------------------------------------------------------------------------

    def is_ready(self, key: K) -> bool:
        """Whether a key's chunk can be loaded. O(1)."""
        chunk = self._chunks.get(key)
        return chunk is not None and chunk.loads != PENDING

    def __contains__(self, key: K) -> bool:
        """Whether a key's chunk is there, pending or ready. O(1)."""
        return key in self._chunks

    def __len__(self) -> int:
        """How many chunks are pending or ready. O(1)."""
        return len(self._chunks)

    # -- load ----------------------------------------------------------------------------------

    def begin_load(self, keys: Collection[K]) -> tuple[Int64Array, Int64Array]:
        """Protect ready chunks until :meth:`end_load`, and tell where they are. O(N).

        Loads nest. A key that is named twice is protected once.

        Returns:
            Addresses and bytes, both int64 ``[N]``, in the order of the keys.

        Raises:
            KeyError: a key, which it names, is not ready; nothing is protected.
        """
        find = self._chunks.get
        chunks: list[Chunk[K]] = []
        for key in keys:
            chunk = find(key)
            if chunk is None or chunk.loads == PENDING:
                raise KeyError(f"{key!r} is {'absent' if chunk is None else 'pending'}")
            chunks.append(chunk)
        clock = self._clock = self._clock + 1
        groups = self._groups
        for chunk in dict.fromkeys(chunks) if len(chunks) > 1 else chunks:
            if not chunk.loads:
                self._evictable_bytes -= chunk.span.size
            chunk.loads += 1
            chunk.used = clock
            groups[chunk.group].hits += chunk.chunk_bytes
        return (
            as_array([chunk.address for chunk in chunks], int64),
            as_array([chunk.chunk_bytes for chunk in chunks], int64),
        )

    def end_load(self, keys: Iterable[K]) -> None:
        """Say that a load has ended, well or not. O(N).

        Args:
            keys: of one load, or some of them. A key that is named twice counts once.

        Raises:
            LifetimeError: a key, which it names, is not being loaded; nothing changes.
        """
        chunks = []
        for key in dict.fromkeys(keys):
            chunk = self._chunks.get(key) or self._leaving.get(key)
            if chunk is None or chunk.loads <= 0:
                raise LifetimeError(f"the chunk of {key!r} is not being loaded: {chunk}")
            chunks.append(chunk)
        for chunk in chunks:
            chunk.loads -= 1
            if not chunk.loads:
                if chunk.key in self._leaving:
                    self._leave(chunk)
                else:
                    self._evictable_bytes += chunk.span.size

    def touch(self, keys: Iterable[K]) -> None:
        """Tell the order that one request used chunks, the head of its prefix first. O(N * P).

        Keys that are not there are skipped.
        """
        find = self._chunks.get
        clock = self._clock = self._clock + 1
        found = []
        for key in keys:
            chunk = find(key)
            if chunk is not None:
                chunk.used = clock
                found.append(chunk)
        if found:
            self._order.touch([chunk.key for chunk in found])
            if self._ages:
                for chunk in reversed(found):
                    self._ages[chunk.span.size].move_to_end(chunk.key)

    def settle(self, keys: Iterable[K]) -> None:
        """Tell the order which chunks belong to one request, the head of its prefix first.

        Not a use of them: chunks of a request that were stored in several steps come into the
        order in which they are needed. O(N * P).
        """
        found = [key for key in keys if key in self._chunks]
        if found:
            self._order.settle(found)

    # -- store ---------------------------------------------------------------------------------

    def begin_store(self, keys: Collection[K]) -> StorePlan[K]:
        """Find room for chunks, which are pending afterwards. O((N + V) * P) for V victims.

        If the heap is so fragmented that holes must be widened, O(F) for its F holes.

        Args:
            keys: the head of the prefix first. Those that are pending or ready stay what they
                are, and are not evicted by this call; nor are those whose chunk was forgotten and
                is still being copied stored anew.

        Returns:
            The plan. If the chunks do not fit, not even in place of all that may leave, it is
            refused, and nothing is evicted; only if what cannot leave is scattered over the heap
            may a refusal come after evictions.

        Raises:
            ValueError: a key, which it names, is of no group of this store; nothing changes.
        """
        chunks, by_tag, tag_of = self._chunks, self._by_tag, self._tag_of
        new = [key for key in dict.fromkeys(keys) if key not in chunks]
        if self._leaving:
            new = [key for key in new if key not in self._leaving]
        if not new:
            return StorePlan(new, NOTHING, NOTHING, [])
        try:
            groups = [by_tag[tag_of(key)] for key in new]
        except KeyError:
            raise self._of_no_group(new) from None
        counts: dict[int, int] = {}
        for group in groups:
            counts[group.place_bytes] = counts.get(group.place_bytes, 0) + 1
        kept = [key for key in keys if key in chunks] if len(new) < len(keys) else []
        evicted: list[K] = []
        places = self._find_room(counts, frozenset(kept), evicted)
        if places is None:
            self._refused += 1
            return StorePlan([], NOTHING, NOTHING, evicted, is_refused=True)
        clock = self._clock = self._clock + 1
        stored: list[Chunk[K]] = []
        for key, group in zip(new, groups, strict=True):
            span, address = places[group.place_bytes].pop()
            chunk = Chunk(key, span, address, group.index, group.chunk_bytes, clock)
            chunks[key] = chunk
            group.chunks += 1
            self._pending_bytes += group.place_bytes
            stored.append(chunk)
        for chunk in reversed(stored):  # so that a prefix loses its tail first
            self._order.insert(chunk.key, chunk.span.size, chunk.group)
            if self._ages:
                self._ages[chunk.span.size][chunk.key] = None
        return StorePlan(
            new,
            as_array([chunk.address for chunk in stored], int64),
            as_array([group.chunk_bytes for group in groups], int64),
            evicted,
        )

    def end_store(self, keys: Iterable[K], success: bool = True) -> list[K]:
        """Say that stores have ended. O(N * P).

        Args:
            keys: any that are pending; others are skipped.
            success: whether the bytes are there. If not, the chunks are gone.

        Returns:
            The keys that became ready; without ``success``, those that are gone.
        """
        find = self._chunks.get
        done: list[Chunk[K]] = []
        for key in keys:
            chunk = find(key)
            if chunk is not None and chunk.loads == PENDING:
                chunk.loads = 0
                done.append(chunk)
            elif chunk is None and self._leaving:
                chunk = self._leaving.get(key)
                if chunk is not None and chunk.loads == PENDING:
                    chunk.loads = 0
                    self._pending_bytes -= chunk.span.size
                    self._leave(chunk)
        ended_bytes = sum([chunk.span.size for chunk in done])
        self._pending_bytes -= ended_bytes
        if success:
            self._evictable_bytes += ended_bytes
        else:
            self._failed += len(done)
            for chunk in done:
                self._order.remove(chunk.key)
            self._drop(done)
            self._free(done)
        return [chunk.key for chunk in done]

    # -- drop ----------------------------------------------------------------------------------

    def forget(self, keys: Iterable[K]) -> list[K]:
        """Drop chunks whose bytes are not to be trusted. O(N * P).

        They are no longer found. The bytes of one that is pending or being loaded become free when
        its store or its last load ends; until then its key is not stored anew.

        Args:
            keys: any; those that are absent are skipped.

        Returns:
            The keys that were ready.
        """
        find = self._chunks.get
        found = [chunk for key in dict.fromkeys(keys) if (chunk := find(key)) is not None]
        idle = [chunk for chunk in found if not chunk.loads]
        for chunk in found:
            self._order.remove(chunk.key)
            if chunk.loads:
                self._leaving[chunk.key] = chunk
        self._failed += len(found)
        self._evictable_bytes -= sum([chunk.span.size for chunk in idle])
        self._drop(found)
        self._free(idle)
        return [chunk.key for chunk in found if chunk.loads != PENDING]

    def reset(self) -> list[K]:
        """Drop every chunk, whatever copies are under way; no end of theirs may follow. O(n).

        Returns:
            The keys that were ready.
        """
        ready = [key for key, chunk in self._chunks.items() if chunk.loads != PENDING]
        self._chunks.clear()
        self._leaving.clear()
        for ages in self._ages.values():
            ages.clear()
        self._order.reset()
        self._space.clear()
        self._evictable_bytes = self._pending_bytes = 0
        for group in self._groups:
            group.chunks = 0
        return ready

    def _leave(self, chunk: Chunk[K]) -> None:
        """Free a forgotten chunk whose last copy has ended."""
        del self._leaving[chunk.key]
        self._free([chunk])

    def _drop(self, chunks: list[Chunk[K]]) -> None:
        """No longer find chunks, which the order has forgotten."""
        for chunk in chunks:
            del self._chunks[chunk.key]
            if self._ages:
                del self._ages[chunk.span.size][chunk.key]

    def _free(self, chunks: list[Chunk[K]]) -> None:
        """Free the bytes of chunks that are no longer found."""
        for chunk in chunks:
            self._groups[chunk.group].chunks -= 1
            del chunk.span.chunks[chunk.address]
        self._space.give_back([(chunk.span, chunk.address) for chunk in chunks])

    # -- watch ---------------------------------------------------------------------------------

    @property
    def evictable_bytes(self) -> int:
        """Allocated bytes of the chunks that may be evicted. O(1)."""
        return self._evictable_bytes

    def stats(self) -> StoreStats:
        """Bytes and counts. O(groups)."""
        space, groups = self._space, self._groups
        return StoreStats(
            heap_bytes=space.heap_bytes,
            free_bytes=space.free_bytes,
            idle_bytes=space.idle_bytes,
            largest_free_extent=space.largest_free(),
            useful_bytes=sum([group.chunks * group.chunk_bytes for group in groups]),
            pending_bytes=self._pending_bytes,
            loading_bytes=space.used_bytes - self._pending_bytes - self._evictable_bytes,
            evicted_chunks=sum([group.evicted for group in groups]),
            evicted_bytes=self._evicted_bytes,
            span_evictions=self._span_evictions,
            refused_stores=self._refused,
            failed_chunks=self._failed,
            groups=tuple(
                GroupStats(
                    group.name,
                    group.chunks,
                    group.chunks * group.chunk_bytes,
                    group.evicted,
                    group.hits,
                )
                for group in groups
            ),
        )

    def check(self) -> None:
        """Check that every byte is free or of exactly one chunk, and every count. O(n log n).

        Raises:
            HeapCorruptionError: something does not hold; the message names it.
        """
        chunks, leaving = list(self._chunks.values()), list(self._leaving.values())
        self._space.check(chunks + leaving)
        idle = sum(chunk.span.size for chunk in chunks if not chunk.loads)
        pending = sum(c.span.size for c in chunks + leaving if c.loads == PENDING)
        by_group = [0] * len(self._groups)
        for chunk in chunks + leaving:
            by_group[chunk.group] += 1
        for what, is_right in (
            ("keys", all(key == chunk.key for key, chunk in self._chunks.items())),
            ("forgotten keys", all(key == chunk.key for key, chunk in self._leaving.items())),
            ("a key is twice there", not self._chunks.keys() & self._leaving.keys()),
            ("loads", all(chunk.loads >= PENDING for chunk in chunks)),
            ("forgotten chunks without a copy", all(chunk.loads for chunk in leaving)),
            ("evictable bytes", idle == self._evictable_bytes),
            ("pending bytes", pending == self._pending_bytes),
            ("the order's chunks", len(self._order) == len(chunks)),
            ("keys by size", not self._ages or self._keys_by_size() == self._ages_as_sets()),
            ("chunks by group", by_group == [group.chunks for group in self._groups]),
        ):
            if not is_right:
                raise HeapCorruptionError(f"{what}: wrong in {self!r}")

    def _keys_by_size(self) -> dict[int, set[K]]:
        keys: dict[int, set[K]] = {size: set() for size in self._ages}
        for chunk in self._chunks.values():
            keys[chunk.span.size].add(chunk.key)
        return keys

    def _ages_as_sets(self) -> dict[int, set[K]]:
        return {size: set(keys) for size, keys in self._ages.items()}

    def __repr__(self) -> str:
        """The counters."""
        return f"ChunkStore({self.stats()})"

    def _of_no_group(self, keys: list[K]) -> ValueError:
        key = next(key for key in keys if self._tag_of(key) not in self._by_tag)
        return ValueError(
            f"key {key!r} is of group {self._tag_of(key)!r}; this store has "
            f"{', '.join(map(repr, self._by_tag))}"
        )

    # -- make room -----------------------------------------------------------------------------

    def _find_room(
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
        space, chunks = self._space, self._chunks
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
        idle = [chunk for chunk in map(self._chunks.__getitem__, kept) if not chunk.loads]
        kept_bytes = sum([chunk.span.size for chunk in idle])
        return num_bytes <= self._evictable_bytes - kept_bytes

    def _next_in_order(self, wanted: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Chunks with the bytes that are wanted, or all that may leave; they left the order."""
        victims = self._order.evict_until(wanted, is_pinned)
        if not victims and 0 < self._evictable_bytes < wanted:
            free_bytes = self._space.free_bytes
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
        span = self._space.emptiest(size, lambda chunk: not chunk.loads and chunk.key not in kept)
        if span is None or len(span.chunks) * span.size > share * span.length:
            return []
        keys = [chunk.key for chunk in span.chunks.values()]
        self._order.evict(keys)
        self._span_evictions += len(keys)
        return keys

    def _take_places(
        self, victims: list[K], missing: dict[int, int], places: dict[int, list[Place[K]]]
    ) -> None:
        """Give the places of evicted chunks to chunks of their size, and free the others."""
        others = []
        for key in victims:
            chunk = self._chunks.pop(key)
            span, group = chunk.span, self._groups[chunk.group]
            size = span.size
            group.chunks -= 1
            group.evicted += 1
            self._evicted_bytes += size
            self._evictable_bytes -= size
            del span.chunks[chunk.address]
            if self._ages:
                del self._ages[size][key]
            if missing.get(size):
                missing[size] -= 1
                places[size].append((span, chunk.address))
            else:
                others.append((span, chunk.address))
        if others:
            self._space.give_back(others)
            for size in sorted(missing, reverse=True):
                if missing[size]:
                    found = self._space.take(size, missing[size])
                    missing[size] -= len(found)
                    places[size] += found


def _address_of(place: Place[K]) -> int:
    return place[1]


def _bytes_of(counts: dict[int, int]) -> int:
    """The bytes of so many chunks of each size."""
    return sum([size * count for size, count in counts.items()])
