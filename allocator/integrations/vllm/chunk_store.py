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

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from numpy import array as as_array
from numpy import empty, int64

from kvheap.addresses.arguments import require_count
from kvheap.addresses.extents import Int64Array
from kvheap.errors import HeapCorruptionError, LifetimeError
from kvheap.integrations.vllm.chunk_space import PENDING, Chunk, ChunkSpace, place_bytes_of
from kvheap.integrations.vllm.eviction import EvictionOrder
from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.residents import GroupBooks, Residents
from kvheap.integrations.vllm.store_values import ChunkRecords, GroupStats, StorePlan, StoreStats

__all__ = ["ChunkStore"]

K = TypeVar("K", bound=Hashable)

NOTHING: Int64Array = empty(0, int64)
NOTHING.setflags(write=False)


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
    restart        ``records``, ``restore``
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
            GroupBooks(index, group.name, group.chunk_bytes, place_bytes[group.allocated_bytes])
            for index, group in enumerate(groups.values())
        ]
        self._by_tag = dict(zip(groups, self._groups, strict=True))
        self._tag_of = tag_of
        sizes = {group.place_bytes for group in self._groups}
        self._space: ChunkSpace[K] = ChunkSpace(heap_bytes, sizes, segment_bytes)
        self._residents: Residents[K] = Residents(self._space, order, self._groups)
        self._chunks = self._residents.chunks
        self._leaving: dict[K, Chunk[K]] = {}
        self._pending_bytes = 0
        self._clock = 0
        self._refused = self._failed = 0
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
        groups, residents = self._groups, self._residents
        for chunk in dict.fromkeys(chunks) if len(chunks) > 1 else chunks:
            if not chunk.loads:
                residents.evictable_bytes -= chunk.span.size
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
                    self._residents.evictable_bytes += chunk.span.size

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
            self._residents.touch(found)

    def settle(self, keys: Iterable[K]) -> None:
        """Tell the order which chunks belong to one request, the head of its prefix first.

        Not a use of them: chunks of a request that were stored in several steps come into the
        order in which they are needed. O(N * P).
        """
        found = [key for key in keys if key in self._chunks]
        if found:
            self._residents.settle(found)

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
        places = self._residents.find_room(counts, frozenset(kept), evicted)
        if places is None:
            self._refused += 1
            return StorePlan([], NOTHING, NOTHING, evicted, is_refused=True)
        clock = self._clock = self._clock + 1
        stored: list[Chunk[K]] = []
        for key, group in zip(new, groups, strict=True):
            span, address = places[group.place_bytes].pop()
            stored.append(Chunk(key, span, address, group.index, group.chunk_bytes, clock))
            self._pending_bytes += group.place_bytes
        self._residents.enter(reversed(stored))  # so that a prefix loses its tail first
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
            self._residents.evictable_bytes += ended_bytes
        else:
            self._failed += len(done)
            self._residents.drop(done)
            self._residents.free(done)
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
        self._leaving.update([(chunk.key, chunk) for chunk in found if chunk.loads])
        self._failed += len(found)
        self._residents.evictable_bytes -= sum([chunk.span.size for chunk in idle])
        self._residents.drop(found)
        self._residents.free(idle)
        return [chunk.key for chunk in found if chunk.loads != PENDING]

    def reset(self) -> list[K]:
        """Drop every chunk, whatever copies are under way; no end of theirs may follow. O(n).

        Returns:
            The keys that were ready.
        """
        ready = [key for key, chunk in self._chunks.items() if chunk.loads != PENDING]
        self._leaving.clear()
        self._residents.clear()
        self._pending_bytes = 0
        return ready

    def _leave(self, chunk: Chunk[K]) -> None:
        """Free a forgotten chunk whose last copy has ended."""
        del self._leaving[chunk.key]
        self._residents.free([chunk])

    # -- another process -----------------------------------------------------------------------

    def records(self) -> ChunkRecords[K]:
        """What a later process needs to find the chunks that are ready. O(n log n)."""
        ready = [chunk for chunk in self._residents.in_order() if chunk.loads != PENDING]
        return ChunkRecords(
            [chunk.key for chunk in ready],
            as_array([chunk.address for chunk in ready], int64),
            as_array([chunk.group for chunk in ready], int64),
            self._space.spans_of(ready),
        )

    def restore(self, records: ChunkRecords[K]) -> None:
        """Find the chunks of an earlier process, whose bytes are where they were. O(n log n).

        Args:
            records: of a store of as many bytes, with the same groups in the same order.

        Raises:
            ValueError: the store is not empty, or the records are not those of such a store; the
                message names what does not fit. Nothing changes.
        """
        if self._chunks or self._leaving:
            raise ValueError(
                f"only an empty store can be restored, this one has {len(self)} chunks"
            )
        keys, groups = records.keys, self._groups
        numbers = records.groups.tolist()
        if not len(keys) == len(records.addresses) == len(numbers):
            raise ValueError(
                f"{len(keys)} keys have {len(records.addresses)} addresses and {len(numbers)} "
                f"groups"
            )
        by_tag, tag_of = self._by_tag, self._tag_of
        for key, number in zip(keys, numbers, strict=True):
            group = by_tag.get(tag_of(key))
            if group is None:
                raise self._of_no_group([key])
            if group.index != number:
                raise ValueError(f"{key!r} is of group {group.index}, recorded is {number}")
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key is recorded twice among {len(keys)}")
        sizes = as_array([groups[number].place_bytes for number in numbers], int64)
        spans = self._space.restore(records.spans, records.addresses, sizes)
        chunks = []
        for at, address in enumerate(records.addresses.tolist()):
            group = groups[numbers[at]]
            chunks.append(Chunk(keys[at], spans[at], address, group.index, group.chunk_bytes, at))
            chunks[-1].loads = 0
        self._space.fill()
        self._residents.enter(chunks)
        self._residents.evictable_bytes = self._space.used_bytes
        self._clock = len(chunks)

    # -- watch ---------------------------------------------------------------------------------

    @property
    def evictable_bytes(self) -> int:
        """Allocated bytes of the chunks that may be evicted. O(1)."""
        return self._residents.evictable_bytes

    def stats(self) -> StoreStats:
        """Bytes and counts. O(groups)."""
        space, groups, residents = self._space, self._groups, self._residents
        return StoreStats(
            heap_bytes=space.heap_bytes,
            free_bytes=space.free_bytes,
            idle_bytes=space.idle_bytes,
            largest_free_extent=space.largest_free(),
            useful_bytes=sum([group.chunks * group.chunk_bytes for group in groups]),
            pending_bytes=self._pending_bytes,
            loading_bytes=space.used_bytes - self._pending_bytes - residents.evictable_bytes,
            evicted_chunks=sum([group.evicted for group in groups]),
            evicted_bytes=residents.evicted_bytes,
            span_evictions=residents.span_evictions,
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
        self._residents.check()
        idle = sum(chunk.span.size for chunk in chunks if not chunk.loads)
        pending = sum(c.span.size for c in chunks + leaving if c.loads == PENDING)
        by_group = [0] * len(self._groups)
        for chunk in chunks + leaving:
            by_group[chunk.group] += 1
        for what, is_right in (
            ("forgotten keys", all(key == chunk.key for key, chunk in self._leaving.items())),
            ("a key is twice there", not self._chunks.keys() & self._leaving.keys()),
            ("loads", all(chunk.loads >= PENDING for chunk in chunks)),
            ("forgotten chunks without a copy", all(chunk.loads for chunk in leaving)),
            ("evictable bytes", idle == self.evictable_bytes),
            ("pending bytes", pending == self._pending_bytes),
            ("chunks by group", by_group == [group.chunks for group in self._groups]),
        ):
            if not is_right:
                raise HeapCorruptionError(f"{what}: wrong in {self!r}")

    def __repr__(self) -> str:
        """The counters."""
        return f"ChunkStore({self.stats()})"

    def _of_no_group(self, keys: list[K]) -> ValueError:
        key = next(key for key in keys if self._tag_of(key) not in self._by_tag)
        return ValueError(
            f"key {key!r} is of group {self._tag_of(key)!r}; this store has "
            f"{', '.join(map(repr, self._by_tag))}"
        )
