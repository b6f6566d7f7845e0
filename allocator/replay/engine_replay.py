"""Replay request traffic with an engine's paged KV cache at the other end of every copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvheap.engine.chunks import load
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.replay.engine_cache import EngineCache
from kvheap.replay.geometry import Geometry
from kvheap.replay.replay import Replay

__all__ = ["EngineReplay"]


class EngineReplay(Replay):
    """Requests in order through one prefix store and the engine's blocks.

    Hits are loaded from the heap into random blocks of the engine, and compared there; misses are
    written to such blocks, and stored from there. What does not fit the engine at once goes piece
    by piece. A request that names a chunk twice has it in the engine once.

    Args:
        allocator: an empty heap.
        geometry: what a chunk is.
        engine: the engine's cache, of that geometry, on the heap's device.
    """

    def __init__(
        self, allocator: TensorMemoryAllocator, geometry: Geometry, engine: EngineCache
    ) -> None:
        super().__init__(allocator, geometry)
        self.engine = engine

    def speeds_gbps(self) -> dict[str, float | None]:
        """GB/s of KV by the name of the copy, each byte counted once; None where there was none.

        ``load`` is what brings hits into the engine; ``store`` includes the time for allocation
        and eviction.
        """
        return {"load": self._read_gbps(), "store": self._write_gbps()}

    def _check(self, hash_ids: Sequence[int]) -> None:
        engine = self.engine
        for piece in self._pieces(list(dict.fromkeys(hash_ids))):
            block_ids = engine.take(len(piece))
            chunks, slots = self.store.chunks(piece), engine.slots(block_ids)
            with self._read_time.measure():
                load(chunks, engine.cache, slots)
            self.mismatches += self._contents.count_mismatches(piece, engine.read(block_ids))

    def _store(self, hash_ids: Sequence[int]) -> None:
        engine = self.engine
        for piece in self._pieces(hash_ids):
            block_ids = engine.take(len(piece))
            engine.write(block_ids, self._contents.of(piece))
            slots = engine.slots(block_ids)
            with self._write_time.measure():
                self.store.store_paged(piece, engine.cache, slots)

    def _pieces(self, hash_ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """The ids, as many at a time as the engine has room for."""
        step = self.engine.num_chunks
        for begin in range(0, len(hash_ids), step):
            yield hash_ids[begin : begin + step]
