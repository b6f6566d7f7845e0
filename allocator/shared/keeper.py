"""``Keeper``: the owner's books: which chunk is at which place, and which of them leave next.

All chunks have one size, so any free place will do. A chunk is *pending* from :meth:`Keeper.begin`
until it is published, then *ready*. A place whose chunk was evicted, removed or given up becomes
free when nobody has a lock on it: until then it is *waiting*. Who reads a chunk is waited for at
most ``lease_s``; who fills a place is waited for as long as it takes, since it would go on writing.

Everything here runs on one thread, see ``service``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from kvheap.addresses.address_manager import AddressManager
from kvheap.errors import HeapCorruptionError
from kvheap.prefix.orders import EvictionOrder
from kvheap.shared.chunk_table import ChunkTable, Record
from kvheap.shared.leases import PlaceLocks
from kvheap.shared.stats import KeeperStats

__all__ = ["FULL", "PENDING", "READY", "Filled", "Keeper", "Ticket"]

READY, PENDING, FULL = -1, -2, -3
"""What :meth:`Keeper.begin` says instead of a place: the key's chunk is there, is being stored, or
has no room."""

WAITING_SHARE = 4
"""If all chunks are in use, one in so many places leaves them at most, for small stores."""

GROUP = 0
"""All chunks are of one group for the order."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a store is to fill.

    Attributes:
        number: of the store.
        places: for each key its place, or ``READY``, ``PENDING`` or ``FULL``.
    """

    number: int
    places: list[int]


@dataclass(frozen=True, slots=True)
class Filled:
    """A chunk whose bytes are complete.

    Attributes:
        place: where it is.
        digest: of its bytes.
        num_tokens: how many tokens it holds; 0: not known.
    """

    place: int
    digest: int
    num_tokens: int


@dataclass(slots=True)
class _Chunk:
    key: bytes
    place: int
    store: int  # 0: it is ready


@dataclass(slots=True)
class _Counts:
    restored_chunks: int = 0
    dropped_chunks: int = 0
    stored_chunks: int = 0
    refused_chunks: int = 0
    aborted_chunks: int = 0
    evicted_chunks: int = 0
    removed_chunks: int = 0
    damaged_chunks: int = 0
    broken_leases: int = 0
    num_writers: int = 0


class Keeper:
    """The books of one segment. Not thread-safe.

    Args:
        table: its records.
        locks: who reads and fills places.
        place_bytes: bytes of a place.
        order: which chunks leave first, a new object.
        lease_s: how long a reader is waited for whose chunk was evicted or removed.
        is_trusted: whether the records are of this boot of the machine.
    """

    def __init__(
        self,
        table: ChunkTable,
        locks: PlaceLocks,
        place_bytes: int,
        order: EvictionOrder[bytes],
        lease_s: float,
        *,
        is_trusted: bool,
    ) -> None:
        self._table = table
        self._locks = locks
        self._place_bytes = place_bytes
        self._lease_s = lease_s
        self._order = order
        self._space = AddressManager.of_pages(table.num_places, place_bytes)
        self._chunks: dict[bytes, _Chunk] = {}
        self._ready: dict[int, _Chunk] = {}  # by place
        self._stores: dict[int, tuple[Hashable, dict[int, _Chunk]]] = {}  # by number: what is left
        self._last_store = 0
        self._waiting: dict[int, float] = {}  # by place: until when readers are waited for
        self._counts = _Counts()
        self._restore(is_trusted)
        self._seen_uses = table.uses.copy()

    # -- from an earlier owner -----------------------------------------------------------------

    def _restore(self, is_trusted: bool) -> None:
        table = self._table
        found: dict[bytes, Record] = {}
        uses = table.uses
        for place in table.ready_places().tolist():
            record = table.read(place) if is_trusted else None
            if record is None:
                self._counts.dropped_chunks += 1
                continue
            other = found.get(record.key)
            if other is not None:
                self._counts.dropped_chunks += 1
                if uses[other.place] > uses[place]:
                    continue
            found[record.key] = record
        records = sorted(found.values(), key=lambda record: int(uses[record.place]))
        taken = {record.place for record in records}
        for place in range(table.num_places):
            if place not in taken:
                table.forget(place, None)
        table.rebuild(records)
        self._locks.fence()
        if self._locks.are_any():
            until = time.monotonic() + self._lease_s
            for place in range(table.num_places):
                if place not in taken and (
                    self._locks.is_read(place) or self._locks.is_filled(place)
                ):
                    self._waiting[place] = until
        used = np.array(sorted([*taken, *self._waiting]), np.int64) * self._place_bytes
        if len(used):
            self._space.reserve(used, self._place_bytes)
        for record in records:
            chunk = _Chunk(record.key, record.place, 0)
            self._chunks[record.key] = self._ready[record.place] = chunk
            self._order.insert(record.key, self._place_bytes, GROUP)
        self._counts.restored_chunks = len(records)

    # -- store ---------------------------------------------------------------------------------

    def begin(self, owner: Hashable, keys: Sequence[bytes]) -> Ticket:
        """Find places for chunks, which are pending afterwards. A full heap evicts others.

        Args:
            owner: who stores them; see :meth:`abort_all`.
            keys: the head of the prefix first, each once. If not all fit, the first ones are taken.
        """
        self.free_waiting()
        chunks = self._chunks
        places: list[int] = []
        new: list[int] = []
        for at, key in enumerate(keys):
            chunk = chunks.get(key)
            places.append(FULL if chunk is None else PENDING if chunk.store else READY)
            if chunk is None:
                new.append(at)
        num_free = self._num_free()
        if len(new) > num_free:
            kept = {key for key in keys if key in chunks}
            self._make_room(len(new) - num_free, kept)
            num_free = self._num_free()
        self._counts.refused_chunks += max(len(new) - num_free, 0)
        new = new[:num_free]
        self._last_store += 1
        left: dict[int, _Chunk] = {}
        if new:
            size = self._place_bytes
            found = (self._space.batched_allocate(size, len(new)).addresses // size).tolist()
            for at, place in zip(new, found, strict=True):
                places[at] = place
                left[place] = chunks[keys[at]] = _Chunk(keys[at], place, self._last_store)
            self._stores[self._last_store] = (owner, left)
        return Ticket(self._last_store, places)

    def publish(self, owner: Hashable, number: int, filled: Iterable[Filled]) -> int:
        """Make chunks ready whose bytes are complete. Those that were removed meanwhile are not.

        Args:
            owner: as for :meth:`begin`.
            number: of the store.
            filled: the chunks, the head of the prefix first.

        Returns:
            How many are ready.

        Raises:
            ValueError: a place is not this store's; nothing is changed.
        """
        left = self._left(owner, number)
        ended = list(filled)
        places = [each.place for each in ended]
        if len(set(places)) < len(places) or not left.keys() >= set(places):
            raise ValueError(f"store {number} has places {sorted(left)}, got {places}")
        gone = []
        ready = []
        for each in ended:
            chunk = left.pop(each.place)
            if self._chunks.get(chunk.key) is not chunk:
                gone.append(each.place)
                continue
            self._table.publish(each.place, chunk.key, each.digest, each.num_tokens)
            chunk.store = 0
            self._ready[chunk.place] = chunk
            ready.append(chunk)
        for chunk in reversed(ready):
            self._order.insert(chunk.key, self._place_bytes, GROUP)
        self._table.touch([chunk.place for chunk in ready])
        for chunk in ready:
            self._seen_uses[chunk.place] = self._table.uses[chunk.place]
        self._counts.stored_chunks += len(ready)
        if not left:
            self._stores.pop(number, None)
        self._give_back(gone)
        return len(ready)

    def abort(self, owner: Hashable, number: int) -> None:
        """Give up what is left of a store; one that has ended stays as it is."""
        found = self._stores.get(number)
        if found is None or found[0] != owner:
            return
        del self._stores[number]
        for chunk in found[1].values():
            if self._chunks.get(chunk.key) is chunk:
                del self._chunks[chunk.key]
        self._counts.aborted_chunks += len(found[1])
        self._give_back(found[1])

    def abort_all(self, owner: Hashable) -> None:
        """Give up all stores of somebody who is gone."""
        for number in [number for number, (who, _) in self._stores.items() if who == owner]:
            self.abort(owner, number)

    def _left(self, owner: Hashable, number: int) -> dict[int, _Chunk]:
        who, left = self._stores.get(number, (None, {}))
        return left if who == owner else {}

    # -- drop ----------------------------------------------------------------------------------

    def remove(self, keys: Iterable[bytes]) -> list[bytes]:
        """Let nobody find chunks any more, pending ones too; returns the keys that were there."""
        removed = []
        places = []
        for key in dict.fromkeys(keys):
            chunk = self._chunks.pop(key, None)
            if chunk is None:
                continue
            removed.append(key)
            if not chunk.store:  # of others, the store gives the place back
                self._order.remove(key)
                del self._ready[chunk.place]
                self._table.forget(chunk.place, key)
                places.append(chunk.place)
        self._counts.removed_chunks += len(removed)
        self._give_back(places)
        return removed

    def drop_damaged(self, place: int, generation: int, content: memoryview) -> bool:
        """Remove a chunk if its bytes are damaged indeed; returns whether they were."""
        chunk = self._ready.get(place)
        if chunk is None or self._table.generation(place) != generation:
            return False
        record = self._table.read(place)  # None: it is damaged itself
        if record is not None and record.digest == self._table.digest_of(record.key, content):
            return False
        self.remove([chunk.key])
        self._counts.removed_chunks -= 1
        self._counts.damaged_chunks += 1
        return True

    # -- room ----------------------------------------------------------------------------------

    def free_waiting(self) -> None:
        """Free the places that nobody reads or fills any more. O(waiting places)."""
        if not self._waiting:
            return
        now = time.monotonic()
        free = []
        for place, until in self._waiting.items():
            if self._locks.is_filled(place):
                continue
            if self._locks.is_read(place):
                if now < until:
                    continue
                self._counts.broken_leases += 1
            free.append(place)
        for place in free:
            del self._waiting[place]
        self._free(free)

    @property
    def has_waiting(self) -> bool:
        """Whether places wait for others."""
        return bool(self._waiting)

    def _give_back(self, places: Iterable[int]) -> None:
        """Free places whose chunks nobody finds any more, once nobody uses them."""
        places = list(places)
        if not places:
            return
        self._locks.fence()
        if self._locks.are_any():
            until = time.monotonic() + self._lease_s
            self._waiting.update(dict.fromkeys(places, until))
            self.free_waiting()
        else:
            self._free(places)

    def _free(self, places: Sequence[int]) -> None:
        if places:
            size = self._place_bytes
            self._space.batched_free(np.array(places, np.int64) * size, size)

    def _num_free(self) -> int:
        return self._space.stats().free_bytes // self._place_bytes

    def _make_room(self, num_places: int, kept: set[bytes]) -> None:
        """Evict chunks that nobody uses; of those in use, let as many leave when they can."""
        self._learn_uses()
        chunks, locks = self._chunks, self._locks
        are_any = locks.are_any()

        def is_pinned(key: bytes) -> bool:
            if key in kept:
                return True
            place = chunks[key].place
            return are_any and (locks.is_read(place) or locks.is_filled(place))

        if not self._evict(num_places, is_pinned):
            num_idle = sum([not is_pinned(key) for key in self._order])
            if num_idle:
                self._evict(num_idle, is_pinned)
            most = max(num_places, self._table.num_places // WAITING_SHARE)
            num_left = min(num_places - num_idle, most - len(self._waiting))
            num_others = len(self._order) - sum([key in self._order for key in kept])
            if min(num_left, num_others) > 0:
                self._evict(min(num_left, num_others), kept.__contains__)

    def _evict(self, num_places: int, is_pinned: Callable[[bytes], bool]) -> bool:
        victims = self._order.evict_until(num_places * self._place_bytes, is_pinned)
        places = []
        for key in victims:
            place = self._chunks.pop(key).place
            del self._ready[place]
            self._table.forget(place, key)
            places.append(place)
        self._counts.evicted_chunks += len(places)
        self._give_back(places)
        return bool(victims)

    def _learn_uses(self) -> None:
        """Tell the order which chunks all processes have used since the last time."""
        uses = self._table.uses.copy()
        changed = np.flatnonzero(uses != self._seen_uses)
        self._seen_uses = uses
        if not len(changed):
            return
        latest_first = changed[np.argsort(uses[changed])[::-1]].tolist()
        ready = self._ready
        self._order.touch([ready[place].key for place in latest_first if place in ready])

    # -- watch ---------------------------------------------------------------------------------

    def note_writers(self, num_writers: int) -> None:
        """Note how many others are connected."""
        self._counts.num_writers = num_writers

    def stats(self) -> KeeperStats:
        """Counts. O(1)."""
        counts = {field.name: getattr(self._counts, field.name) for field in fields(_Counts)}
        return KeeperStats(
            free_places=self._num_free(),
            pending_chunks=sum(len(left) for _, left in self._stores.values()),
            waiting_places=len(self._waiting),
            **counts,
        )

    def check(self) -> None:
        """Check the books against the free list, the records and the cells. O(places log places).

        Raises:
            HeapCorruptionError: something does not hold; the message names it.
        """
        self._space.check()
        table, size = self._table, self._place_bytes
        ready = {chunk.place: chunk for chunk in self._chunks.values() if not chunk.store}
        pending = [chunk for _, left in self._stores.values() for chunk in left.values()]
        taken = [*ready, *[chunk.place for chunk in pending], *self._waiting]
        free = self._space.snapshot() // size
        free_places = {
            place for start, count in free.tolist() for place in range(start, start + count)
        }
        records = {place: table.read(place) for place in table.ready_places().tolist()}
        for what, is_right in (
            ("keys", all(key == chunk.key for key, chunk in self._chunks.items())),
            ("two chunks at one place", len(set(taken)) == len(taken)),
            ("a chunk at a free place", free_places.isdisjoint(taken)),
            ("places", len(free_places) + len(taken) == table.num_places),
            ("ready chunks", ready == self._ready),
            ("records", records.keys() == ready.keys()),
            ("damaged records", all(record is not None for record in records.values())),
            (
                "keys of records",
                all(r is None or r.key == ready[p].key for p, r in records.items() if p in ready),
            ),
            ("cells", table.cell_places() == sorted(ready)),
            ("found places", all(table.find(c.key) == place for place, c in ready.items())),
            ("the order's chunks", len(self._order) == len(ready)),
            ("the order's keys", all(chunk.key in self._order for chunk in ready.values())),
        ):
            if not is_right:
                raise HeapCorruptionError(
                    f"{what}: wrong among {len(taken)} places of a SharedHeap"
                )
