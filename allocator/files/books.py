"""``Books``: which chunks are in a file, at which places, and which of them leave next.

All chunks have one size, and the file is a row of places of that size, handed out by an
``AddressManager``. So nothing fragments: any free places will do, and the fewest runs are taken.

A chunk is *pending* until its bytes are written and the index has it, then *ready*: it is found,
and can be loaded. A chunk that is pending or being loaded is never evicted. One that is removed
meanwhile is *gone*: it is no longer found, and its place becomes free when its last copy has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kvheap.addresses.address_manager import AddressManager
from kvheap.errors import HeapCorruptionError
from kvheap.files.chunk_index import Entry
from kvheap.prefix.orders import EvictionOrder

__all__ = ["PENDING", "Books", "Chunk", "StorePlan"]

PENDING = -1
"""What a chunk has for a number of loads until it is ready."""

MAX_CLOCK = 1 << 62
"""An entry that was used later than this is none."""

GROUP = 0
"""All chunks are of one group for the order."""


class Chunk:
    """A chunk in the file.

    Attributes:
        key: what it is found by.
        address: its first byte in the file.
        digest: its checksum.
        loads: how many loads read it now; ``PENDING`` until it is ready.
        used: the clock when it was last used.
        indexed_used: what the index has for ``used``.
        is_gone: whether it was removed while it was copied.
    """

    __slots__ = ("address", "digest", "indexed_used", "is_gone", "key", "loads", "used")

    def __init__(self, key: bytes, address: int, digest: int, used: int) -> None:
        self.key = key
        self.address = address
        self.digest = digest
        self.loads = PENDING
        self.used = self.indexed_used = used
        self.is_gone = False

    @property
    def entry(self) -> Entry:
        """What the index should have of it."""
        return Entry(self.key, self.address, self.digest, self.used)

    def __repr__(self) -> str:
        """Key, place and state."""
        state = "pending" if self.loads == PENDING else f"loads={self.loads}"
        return f"Chunk({self.key!r} at {self.address}, {state}{', gone' if self.is_gone else ''})"


class StorePlan(NamedTuple):
    """What :meth:`Books.begin_store` decided.

    Attributes:
        chunks: the chunks to write, now pending, in the order of their keys.
        evicted: the keys that were evicted to make room.
        refused: how many keys found no room.
    """

    chunks: list[Chunk]
    evicted: list[bytes]
    refused: int


class Books:
    """Keys to chunks of one file, with an order of eviction. Not thread-safe.

    Costs are O(N) for N keys, times what the order takes for one.

    Args:
        num_places: how many chunks there can be.
        place_bytes: bytes of each place.
        order: which chunks leave first, a new object.
    """

    def __init__(self, num_places: int, place_bytes: int, order: EvictionOrder[bytes]) -> None:
        self.place_bytes = place_bytes
        self.file_bytes = num_places * place_bytes
        """Bytes of all places."""
        self._space = AddressManager.of_pages(num_places, place_bytes)
        self._order = order
        self._chunks: dict[bytes, Chunk] = {}
        self._gone: set[Chunk] = set()
        self._clock = 0
        self.idle = 0
        """How many chunks are ready and not being loaded; these may be evicted."""
        self.pending = 0
        """How many chunks are pending, and not gone."""
        self.find: Callable[[bytes], Chunk | None] = self._chunks.get
        """The chunk of a key, pending or ready; None: it is not there. O(1)."""

    def restore(self, entries: Iterable[Entry]) -> list[bytes]:
        """Enter the chunks of an earlier owner, before any other call. O(n log n).

        Returns:
            The keys of entries that cannot be: outside the file, or at the place of another one.
        """
        space, place_bytes = self._space, self.place_bytes
        file_bytes = self.file_bytes
        refused: list[bytes] = []
        taken: dict[int, Chunk] = {}
        for entry in sorted(entries, key=_used_of):  # of two at one place, the later one counts
            address = entry.address
            is_outside = address % place_bytes or address + place_bytes > file_bytes
            if is_outside or entry.used > MAX_CLOCK:
                refused.append(entry.key)
                continue
            chunk = Chunk(entry.key, address, entry.digest, entry.used)
            chunk.loads = 0
            other = taken.pop(address, None)
            if other is not None:
                refused.append(other.key)
            taken[address] = chunk
        if file_bytes:
            space.allocate(file_bytes)
        free = np.ones(file_bytes // place_bytes, np.bool_)
        free[np.fromiter(taken, np.int64, len(taken)) // place_bytes] = False
        if free.any():
            space.batched_free(np.flatnonzero(free) * place_bytes, place_bytes)
        for chunk in taken.values():
            self._chunks[chunk.key] = chunk
            self._order.insert(chunk.key, place_bytes, GROUP)
            self._clock = max(self._clock, chunk.used)
        self.idle = len(taken)
        return refused

    # -- look ----------------------------------------------------------------------------------

    def is_ready(self, key: bytes) -> bool:
        """Whether a key's chunk can be loaded. O(1)."""
        chunk = self.find(key)
        return chunk is not None and chunk.loads != PENDING

    def are_pending(self, keys: Sequence[bytes]) -> bool:
        """Whether any key's chunk is pending. O(1) while none is."""
        if not self.pending:
            return False
        return any((chunk := self.find(key)) is not None and chunk.loads == PENDING for key in keys)

    def ready(self) -> list[Chunk]:
        """The chunks that can be loaded. O(n)."""
        return [chunk for chunk in list(self._chunks.values()) if chunk.loads != PENDING]

    def __len__(self) -> int:
        """How many chunks are pending or ready."""
        return len(self._chunks)

    @property
    def free_places(self) -> int:
        """How many places no chunk has."""
        return self._space.stats().free_bytes // self.place_bytes

    # -- store ---------------------------------------------------------------------------------

    def begin_store(self, keys: Sequence[bytes]) -> StorePlan:
        """Find places for chunks, which are pending afterwards.

        Keys that are pending or ready stay what they are, and are not evicted by this call.

        Args:
            keys: the head of the prefix first, each once. If not all fit, the first ones are taken.
        """
        chunks, place_bytes = self._chunks, self.place_bytes
        new = [key for key in keys if key not in chunks]
        kept = {key for key in keys if key in chunks} if len(new) < len(keys) else set()
        free = self.free_places
        evicted: list[bytes] = []
        num_new = len(new)
        if num_new > free:
            kept_idle = sum([not chunks[key].loads for key in kept])
            num_new = min(num_new, free + self.idle - kept_idle)
            if num_new > free:

                def is_pinned(key: bytes) -> bool:
                    return chunks[key].loads != 0 or key in kept

                evicted = self._order.evict_until((num_new - free) * place_bytes, is_pinned)
                self._free([chunks.pop(key) for key in evicted])
                self.idle -= len(evicted)
        refused = len(new) - num_new
        if not num_new:
            return StorePlan([], evicted, refused)
        places = self._space.batched_allocate(place_bytes, num_new).addresses.tolist()
        last = self._clock = self._clock + num_new  # the head is the one used last
        planned = [
            Chunk(key, address, 0, last - at)
            for at, (key, address) in enumerate(zip(new, places, strict=False))
        ]
        for chunk in reversed(planned):
            chunks[chunk.key] = chunk
            self._order.insert(chunk.key, place_bytes, GROUP)
        self.pending += num_new
        return StorePlan(planned, evicted, refused)

    def end_store(self, chunks: Iterable[Chunk], is_stored: bool) -> None:
        """Say that chunks of a plan are ready, or that they failed and are no longer found."""
        ended = list(chunks)
        for chunk in ended:
            chunk.loads = 0
        num_found = sum([not chunk.is_gone for chunk in ended])
        self.pending -= num_found
        self.idle += num_found
        self._leave([chunk for chunk in ended if chunk.is_gone])
        if not is_stored:
            self._drop([chunk for chunk in ended if not chunk.is_gone])

    # -- load ----------------------------------------------------------------------------------

    def begin_load(self, keys: Sequence[bytes]) -> list[Chunk | None]:
        """Protect the ready chunks of keys until :meth:`end_load`; None for the other keys.

        This is a use of them, by one request, the head of its prefix first.
        """
        found = [
            chunk if (chunk := self.find(key)) is not None and chunk.loads != PENDING else None
            for key in keys
        ]
        for chunk in found:
            if chunk is not None:
                self.idle -= not chunk.loads
                chunk.loads += 1
        self.touch([*dict.fromkeys(chunk.key for chunk in found if chunk is not None)])
        return found

    def end_load(self, chunks: Iterable[Chunk | None]) -> None:
        """Say that a load has ended, well or not."""
        for chunk in chunks:
            if chunk is not None:
                chunk.loads -= 1
                if not chunk.loads:
                    if chunk.is_gone:
                        self._leave([chunk])
                    else:
                        self.idle += 1

    def touch(self, keys: Sequence[bytes]) -> None:
        """Tell the order that one request used chunks, the head first. Absent keys are skipped."""
        found = [chunk for key in keys if (chunk := self.find(key)) is not None]
        self._clock += len(found)
        for at, chunk in enumerate(found):
            chunk.used = self._clock - at
        self._order.touch([chunk.key for chunk in found])

    # -- drop ----------------------------------------------------------------------------------

    def forget(self, chunks: Iterable[Chunk]) -> list[bytes]:
        """No longer find chunks, now or, if they are being copied, once that has ended.

        Returns:
            The keys of those that were found until now.
        """
        found = [each for each in dict.fromkeys(chunks) if self.find(each.key) is each]
        for chunk in found:
            if chunk.loads:
                chunk.is_gone = True
                self.pending -= chunk.loads == PENDING
                self._gone.add(chunk)
                self._order.remove(chunk.key)
                del self._chunks[chunk.key]
        self._drop([chunk for chunk in found if not chunk.is_gone])
        return [chunk.key for chunk in found]

    def _drop(self, idle: list[Chunk]) -> None:
        """No longer find chunks that nobody copies, and free their places."""
        for chunk in idle:
            self._order.remove(chunk.key)
            del self._chunks[chunk.key]
        self.idle -= len(idle)
        self._free(idle)

    def _leave(self, gone: list[Chunk]) -> None:
        """Free the places of chunks that were removed earlier."""
        self._gone.difference_update(gone)
        self._free(gone)

    def _free(self, chunks: list[Chunk]) -> None:
        if chunks:
            addresses = np.array([chunk.address for chunk in chunks], np.int64)
            self._space.batched_free(addresses, self.place_bytes)

    # -- watch ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that every place is free or of one chunk, and every count. O(n log n).

        Raises:
            HeapCorruptionError: something does not hold; the message names it.
        """
        self._space.check()
        found = list(self._chunks.values())
        everything = found + list(self._gone)
        taken = sorted(chunk.address for chunk in everything)
        spots = {(address // self.place_bytes, address % self.place_bytes) for address in taken}
        free = self._space.snapshot()
        is_apart = all(
            not ((free[:, 0] <= address) & (address < free.sum(axis=1))).any() for address in taken
        )
        heap = self._space.stats()
        for what, is_right in (
            ("keys", all(key == chunk.key for key, chunk in self._chunks.items())),
            ("two chunks at one place", len(spots) == len(taken)),
            ("a place that is no place", all(not rest for _, rest in spots)),
            ("a chunk at a free place", is_apart),
            ("places", heap.allocated_bytes == len(taken) * self.place_bytes),
            ("loads", all(chunk.loads >= PENDING for chunk in everything)),
            ("removed chunks without a copy", all(chunk.loads for chunk in self._gone)),
            ("gone", all(chunk.is_gone == (chunk in self._gone) for chunk in everything)),
            ("idle chunks", self.idle == sum(not chunk.loads for chunk in found)),
            ("pending chunks", self.pending == sum(c.loads == PENDING for c in found)),
            ("the order's chunks", len(self._order) == len(found)),
            ("the order's keys", all(key in self._order for key in self._chunks)),
        ):
            if not is_right:
                raise HeapCorruptionError(f"{what}: wrong among {len(found)} chunks of a FileTier")


def _used_of(entry: Entry) -> int:
    return entry.used
