"""``Geometry``: where the parts of a segment are.

::

    places    chunks, all of one size, rounded up to pages; at the start of the file
    records   for each place, which chunk it has
    uses      for each place, when the chunk was last used; written by every process
    cells     a hash table from keys to places
    header    what the segment is for, and who owns it; at the end of the file

The header is at the end, so that a file that was cut off has none.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvheap.addresses.integers import round_up

__all__ = [
    "BUCKET_CELLS",
    "HEADER_BYTES",
    "PAGE_BYTES",
    "RECORD_BYTES",
    "STATE_BYTES",
    "WORD_BYTES",
    "Geometry",
]

RECORD_BYTES = 128
WORD_BYTES = 8

PAGE_BYTES = 4096
"""Places begin at multiples of it."""

BUCKET_CELLS = 8
"""Cells of one bucket of the hash table: a cache line."""

CELLS_PER_PLACE = 2

STATE_BYTES = 4096
"""The end of the header, which changes."""

HEADER_BYTES = STATE_BYTES + 12288

LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a segment.

    Attributes:
        num_places: how many chunks there can be.
        chunk_bytes: bytes of each.
        place_bytes: bytes of the place of each, a multiple of the page size.
        file_bytes: of the whole file.
    """

    num_places: int
    chunk_bytes: int
    place_bytes: int
    file_bytes: int

    @classmethod
    def of(cls, num_places: int, chunk_bytes: int, place_bytes: int, unit_bytes: int) -> Geometry:
        """The geometry on a file system whose files have multiples of ``unit_bytes``."""
        least = cls(num_places, chunk_bytes, place_bytes, 0)
        return cls(
            num_places,
            chunk_bytes,
            place_bytes,
            round_up(least.cells_end + HEADER_BYTES, unit_bytes),
        )

    @property
    def data_bytes(self) -> int:
        """Bytes of all places."""
        return self.num_places * self.place_bytes

    @property
    def records_at(self) -> int:
        """Offset of the records."""
        return self.data_bytes

    @property
    def uses_at(self) -> int:
        """Offset of the uses."""
        return self.records_at + self.num_places * RECORD_BYTES

    @property
    def cells_at(self) -> int:
        """Offset of the hash table."""
        return round_up(self.uses_at + self.num_places * WORD_BYTES, LINE_BYTES)

    @property
    def num_buckets(self) -> int:
        """Buckets of the hash table."""
        return -(-self.num_places * CELLS_PER_PLACE // BUCKET_CELLS)

    @property
    def cells_end(self) -> int:
        """Offset behind the hash table."""
        return self.cells_at + self.num_buckets * BUCKET_CELLS * WORD_BYTES

    @property
    def header_at(self) -> int:
        """Offset of the header."""
        return self.file_bytes - HEADER_BYTES

    @property
    def state_at(self) -> int:
        """Offset of the part of the header that changes."""
        return self.file_bytes - STATE_BYTES
