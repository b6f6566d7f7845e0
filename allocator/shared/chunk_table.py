"""``ChunkTable``: which chunk is at which place, in shared memory.

For each place there is a record with a number, its *generation*. The owner makes it even when the
chunk is complete, and odd before the chunk is forgotten, in both cases by one store of eight bytes:

- to publish: the chunk's bytes are there; then the record is written; then its number is even;
- to forget: the number is odd; only then may the place be used again.

So whenever the owner is killed, an even number stands for a complete chunk and a complete record. A
checksum over the record, its number and its place tells whether something else has written there.

The owner writes. Everybody else reads at the same time: what is found by a key is a hint, until the
place is leased and its record is read again (see ``leases``). Anybody may write when a chunk was
used, which is a hint for the order of eviction.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array
from kvheap.files.packages import need_xxhash
from kvheap.shared.geometry import BUCKET_CELLS, RECORD_BYTES, WORD_BYTES
from kvheap.shared.segment import Segment

__all__ = ["MAX_KEY_BYTES", "ChunkTable", "Record"]

START = struct.Struct("<QQQIHxx")
"""Generation, checksum of the rest, digest of the chunk, number of tokens, bytes of the key."""

CHECKED_AT = 16
"""Where what the checksum covers begins; it covers the generation and the place too."""

SEED = struct.Struct("<QQ")

MAX_KEY_BYTES = RECORD_BYTES - START.size
"""A key is a hash, with a group or a rank."""

WORDS_PER_RECORD = RECORD_BYTES // WORD_BYTES

PLACE_BITS = 32
"""A cell has a part of the key's hash, and below it the number of the place plus one."""

PLACE_MASK = (1 << PLACE_BITS) - 1


class Record(NamedTuple):
    """What is at a place.

    Attributes:
        place: number of the place.
        generation: of the record.
        key: what the chunk is found by.
        digest: of its bytes.
        num_tokens: how many tokens it holds; 0: not known.
    """

    place: int
    generation: int
    key: bytes
    digest: int
    num_tokens: int


class ChunkTable:
    """The records, uses and cells of a mapped segment.

    Args:
        segment: the segment.

    Raises:
        ImportError: xxhash is not installed.
    """

    def __init__(self, segment: Segment) -> None:
        self._hash: Callable[..., int] = need_xxhash("a SharedHeap").xxh3_64_intdigest
        geometry = segment.geometry
        self.num_places = geometry.num_places
        self._state = segment.state
        records = segment.array(geometry.records_at, self.num_places * RECORD_BYTES)
        uses = segment.array(geometry.uses_at, self.num_places * WORD_BYTES)
        num_bytes = geometry.num_buckets * BUCKET_CELLS * WORD_BYTES
        self._num_buckets = geometry.num_buckets
        self._records = memoryview(records)  # type: ignore[arg-type]  # an array is a Buffer
        self._words = self._records.cast("Q")
        self._generations: npt.NDArray[np.uint64] = records.view(np.uint64)[::WORDS_PER_RECORD]
        self.uses: npt.NDArray[np.uint64] = uses.view(np.uint64)
        """When each place's chunk was last used, on the clock of :meth:`touch`."""
        self._all_cells: npt.NDArray[np.uint64] = segment.array(geometry.cells_at, num_bytes).view(
            np.uint64
        )
        self._cells = memoryview(self._all_cells).cast("B").cast("Q")  # type: ignore[arg-type]

    # -- everybody -----------------------------------------------------------------------------

    def find(self, key: bytes) -> int:
        """The place that probably has a key's chunk; -1: none has. O(1)."""
        hashed = self._hash(key)
        tag = hashed >> PLACE_BITS
        bucket = hashed % self._num_buckets
        for _ in range(min(self._state.max_probes, self._num_buckets - 1) + 1):
            at = bucket * BUCKET_CELLS
            for cell in self._cells[at : at + BUCKET_CELLS].tolist():
                if cell >> PLACE_BITS == tag and cell & PLACE_MASK:
                    place = (cell & PLACE_MASK) - 1
                    if place < self.num_places and self._has(place, key):
                        return int(place)
            bucket = (bucket + 1) % self._num_buckets
        return -1

    def _has(self, place: int, key: bytes) -> bool:
        at = place * RECORD_BYTES
        generation = self._words[place * WORDS_PER_RECORD]
        if generation & 1 or not generation:
            return False
        start = at + START.size
        return (
            int.from_bytes(self._records[at + 28 : at + 30], "little") == len(key)
            and self._records[start : start + len(key)] == key
        )

    def generation(self, place: int) -> int:
        """The number of a place's record; odd or 0: it has no chunk."""
        return self._words[place * WORDS_PER_RECORD]

    def read(self, place: int) -> Record | None:
        """The record of a place; None: it has no chunk, or its record is damaged."""
        raw = bytes(self._records[place * RECORD_BYTES : (place + 1) * RECORD_BYTES])
        generation, check, digest, num_tokens, length = START.unpack_from(raw)
        if generation & 1 or not generation or not 0 < length <= MAX_KEY_BYTES:
            return None
        if check != self._check(raw, place, generation, length):
            return None
        return Record(place, generation, raw[START.size : START.size + length], digest, num_tokens)

    def ready_places(self) -> Int64Array:
        """The places that have a chunk, int64 ``[R]``. O(places)."""
        generations = self._generations.copy()
        return np.flatnonzero((generations & 1 == 0) & (generations != 0))

    def touch(self, places: Sequence[int]) -> None:
        """Note that one request used the chunks of places, the head of its prefix first."""
        now = time.monotonic_ns()
        uses = self.uses
        for at, place in enumerate(places):
            uses[place] = now - at

    def digest_of(self, key: bytes, content: memoryview) -> int:
        """The checksum of a chunk."""
        return self._hash(content, seed=self._hash(key))

    # -- the owner -----------------------------------------------------------------------------

    def publish(self, place: int, key: bytes, digest: int, num_tokens: int) -> None:
        """Let everybody find a chunk whose bytes are complete."""
        word = place * WORDS_PER_RECORD
        changing = self._words[word] | 1
        self._words[word] = changing
        generation = changing + 1
        raw = bytearray(START.pack(changing, 0, digest, num_tokens, len(key)) + key)
        check = self._check(raw, place, generation, len(key))
        at = place * RECORD_BYTES
        self._records[at + WORD_BYTES : at + len(raw)] = (
            check.to_bytes(WORD_BYTES, "little") + raw[CHECKED_AT:]
        )
        self._words[word] = generation
        self._insert(key, place)

    def forget(self, place: int, key: bytes | None) -> None:
        """Let nobody find a place's chunk any more, before the place is used again.

        Args:
            place: its number.
            key: of the chunk; None: it is not in the cells.
        """
        word = place * WORDS_PER_RECORD
        self._words[word] |= 1
        if key is not None:
            self._remove(key, place)

    def rebuild(self, records: Iterable[Record]) -> None:
        """Make the cells anew, for all chunks there are; others find none meanwhile."""
        self._all_cells[:] = 0
        self._state.max_probes = 0
        for record in records:
            self._insert(record.key, record.place)

    def cell_places(self) -> list[int]:
        """The places that the cells name, in order. O(places)."""
        places = self._all_cells & np.uint64(PLACE_MASK)
        return sorted((places[places != 0].astype(np.int64) - 1).tolist())

    def _insert(self, key: bytes, place: int) -> None:
        hashed = self._hash(key)
        cell = hashed >> PLACE_BITS << PLACE_BITS | (place + 1)
        bucket = hashed % self._num_buckets
        for probe in range(self._num_buckets):
            at = bucket * BUCKET_CELLS
            for offset, found in enumerate(self._cells[at : at + BUCKET_CELLS].tolist()):
                if not found & PLACE_MASK:
                    if probe > self._state.max_probes:
                        self._state.max_probes = probe
                    self._cells[at + offset] = cell
                    return
            bucket = (bucket + 1) % self._num_buckets

    def _remove(self, key: bytes, place: int) -> None:
        hashed = self._hash(key)
        cell = hashed >> PLACE_BITS << PLACE_BITS | (place + 1)
        bucket = hashed % self._num_buckets
        for _ in range(min(self._state.max_probes, self._num_buckets - 1) + 1):
            at = bucket * BUCKET_CELLS
            for offset, found in enumerate(self._cells[at : at + BUCKET_CELLS].tolist()):
                if found == cell:
                    self._cells[at + offset] = 0
                    return
            bucket = (bucket + 1) % self._num_buckets

    def _check(self, raw: bytes | bytearray, place: int, generation: int, length: int) -> int:
        return self._hash(
            SEED.pack(generation, place) + bytes(raw[CHECKED_AT : START.size + length])
        )
