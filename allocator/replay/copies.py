"""How a replay fills chunks and reads them back, by way of tensors or of an engine's cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from kvheap.engine.chunks import load
from kvheap.kernels import gather_blocks
from kvheap.prefix.store import PrefixStore
from kvheap.replay.contents import Contents
from kvheap.replay.engine_cache import EngineCache
from kvheap.replay.geometry import Geometry
from kvheap.replay.timing import Stopwatch

__all__ = ["Copies", "EngineCopies", "TensorCopies"]

GATHER_PIECE_BYTES = 64 << 20
"""Hits are gathered and compared in pieces of about so many bytes, so that memory stays bounded."""


class Copies(ABC):
    """Both directions of the copies of one replay.

    Args:
        geometry: the geometry of a chunk.
        device: where the copies run.

    Attributes:
        geometry: as given.
        contents: what each chunk should hold.
        read_time, write_time: the time spent in copies from and to the heap.
        read_name, write_name: the names of the copies from and to the heap.
    """

    read_name: str
    write_name: str

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self.geometry = geometry
        self.contents = Contents(geometry, device)
        self.read_time = Stopwatch(device)
        self.write_time = Stopwatch(device)

    @abstractmethod
    def batches(self, hash_ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """The ids of new chunks, split into batches that one :meth:`write` can take."""

    @abstractmethod
    def write(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> None:
        """Store new chunks with their contents, in one batch.

        Raises:
            RequestTooLargeError: they do not fit the heap.
        """

    @abstractmethod
    def count_mismatches(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> int:
        """Read ready chunks from the heap, and count those that do not hold their contents."""


class TensorCopies(Copies):
    """Chunks are stored from a tensor and gathered into another.

    Args:
        geometry: the geometry of a chunk.
        buffer: the heap's bytes.
    """

    read_name, write_name = "gather", "scatter"

    def __init__(self, geometry: Geometry, buffer: torch.Tensor) -> None:
        super().__init__(geometry, buffer.device)
        self._buffer = buffer

    def batches(self, hash_ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """All ids at once."""
        yield hash_ids

    def write(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> None:
        """Store new chunks from one tensor."""
        source = self.contents.of(hash_ids)
        with self.write_time.measure():
            store.store(hash_ids, source)

    def count_mismatches(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> int:
        """Gather ready chunks in pieces, and count those that do not hold their contents."""
        geometry, buffer = self.geometry, self._buffer
        mismatches = 0
        for piece in _pieces(hash_ids, max(1, GATHER_PIECE_BYTES // geometry.chunk_bytes)):
            shape = (len(piece), *geometry.shape)
            out = torch.empty(shape, dtype=geometry.dtype, device=buffer.device)
            with self.read_time.measure():
                gather_blocks(buffer, store.addresses(piece), out)
            mismatches += self.contents.count_mismatches(piece, out)
        return mismatches


class EngineCopies(Copies):
    """Chunks go to and from random blocks of an engine's cache.

    Hits are loaded into such blocks and compared there. New chunks are written to such blocks and
    stored from them. Chunks that do not fit the engine at once are copied piece by piece.

    Args:
        engine: the engine's cache, on the heap's device.
    """

    read_name, write_name = "load", "store"

    def __init__(self, engine: EngineCache) -> None:
        super().__init__(engine.geometry, engine.device)
        self.engine = engine

    def batches(self, hash_ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """The ids, in batches of as many chunks as the engine has room for."""
        return _pieces(hash_ids, self.engine.num_chunks)

    def write(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> None:
        """Store new chunks from the engine's cache."""
        engine = self.engine
        block_ids = engine.take(len(hash_ids))
        engine.write(block_ids, self.contents.of(hash_ids))
        slots = engine.slots(block_ids)
        with self.write_time.measure():
            store.store_from_engine(hash_ids, engine.cache, slots)

    def count_mismatches(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> int:
        """Load ready chunks into the engine's cache, each once, and count the wrong ones there."""
        engine = self.engine
        mismatches = 0
        for piece in _pieces(list(dict.fromkeys(hash_ids)), engine.num_chunks):
            block_ids = engine.take(len(piece))
            chunks, slots = store.chunks(piece), engine.slots(block_ids)
            with self.read_time.measure():
                load(chunks, engine.cache, slots)
            mismatches += self.contents.count_mismatches(piece, engine.read(block_ids))
        return mismatches


def _pieces(hash_ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """At most ``size`` ids at a time."""
    for begin in range(0, len(hash_ids), size):
        yield hash_ids[begin : begin + size]
