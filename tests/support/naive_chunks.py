"""A naive model of a store of chunks: dictionaries, and one owner for every 256 bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNIT = 256


@dataclass
class NaiveChunk:
    address: int
    chunk_bytes: int
    is_pending: bool = True
    loads: int = 0
    is_forgotten: bool = False


class NaiveChunks:
    """What a store must hold after each call, computed from what it answered.

    Args:
        heap_bytes: of the heap.
        chunk_bytes: by the first letter of a key, the bytes of its chunk.
    """

    def __init__(self, heap_bytes: int, chunk_bytes: Mapping[str, int]) -> None:
        self.num_units = heap_bytes // UNIT
        self.chunk_bytes = chunk_bytes
        self.reset()

    def reset(self) -> None:
        self.chunks: dict[str, NaiveChunk] = {}
        self.leaving: dict[str, NaiveChunk] = {}
        self.owners: dict[int, str] = {}

    def restart(self) -> None:
        """Only chunks that are ready are left, and nobody loads them."""
        for chunks in (self.chunks, self.leaving):
            for key, chunk in list(chunks.items()):
                if chunk.is_pending or chunks is self.leaving:
                    self.remove(key, chunks.pop(key))
                chunk.loads = 0

    def units(self, key: str, address: int) -> range:
        assert address % UNIT == 0
        return range(address // UNIT, address // UNIT - (-self.chunk_bytes[key[0]] // UNIT))

    def absent(self, keys: Iterable[str]) -> list[str]:
        known = self.chunks.keys() | self.leaving.keys()
        return [key for key in dict.fromkeys(keys) if key not in known]

    def may_leave(self) -> set[str]:
        return {key for key, c in self.chunks.items() if not c.is_pending and not c.loads}

    def num_bytes(self, keys: Iterable[str]) -> int:
        """Allocated bytes of chunks of these keys."""
        return sum(len(self.units(key, 0)) for key in keys) * UNIT

    @property
    def free_bytes(self) -> int:
        return (self.num_units - len(self.owners)) * UNIT

    def remove(self, key: str, chunk: NaiveChunk) -> None:
        for unit in self.units(key, chunk.address):
            assert self.owners.pop(unit) == key

    def evict(self, keys: Iterable[str]) -> None:
        for key in keys:
            assert key in self.may_leave(), f"{key} was evicted"
            self.remove(key, self.chunks.pop(key))

    def begin(self, keys: list[str], addresses: list[int], sizes: list[int]) -> None:
        assert len(keys) == len(addresses) == len(sizes)
        for key, address, size in zip(keys, addresses, sizes, strict=True):
            assert size == self.chunk_bytes[key[0]]
            for unit in self.units(key, address):
                assert 0 <= unit < self.num_units
                assert unit not in self.owners, f"{key} lies on {self.owners[unit]}"
                self.owners[unit] = key
            self.chunks[key] = NaiveChunk(address, size)

    def forget(self, key: str) -> None:
        chunk = self.chunks.pop(key)
        if chunk.is_pending or chunk.loads:
            self.leaving[key] = chunk
        else:
            self.remove(key, chunk)

    def end(self, key: str, success: bool) -> None:
        """The store of a pending chunk has ended."""
        if key in self.leaving:
            self.remove(key, self.leaving.pop(key))
        elif success:
            self.chunks[key].is_pending = False
        else:
            self.remove(key, self.chunks.pop(key))

    def end_load(self, key: str) -> None:
        chunk = self.chunks.get(key) or self.leaving[key]
        chunk.loads -= 1
        if key in self.leaving and not chunk.loads:
            self.remove(key, self.leaving.pop(key))
