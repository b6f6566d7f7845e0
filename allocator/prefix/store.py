"""``PrefixStore``: chunks of KV by the hash of their prefix, the least recently used evicted.

A thin use of one ``TensorMemoryAllocator``, as a serving engine
has it: look up the longest stored prefix of a request, pin it, store what is missing in one batch,
evict when the heap is full. Not thread-safe: it belongs to one scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.replay.geometry import Geometry

if TYPE_CHECKING:
    from kvheap.kernels.paged_copy import BlockIds
    from kvheap.kernels.paged_layout import PagedKVCache

__all__ = ["PrefixStore", "RequestTooLargeError"]


class RequestTooLargeError(RuntimeError):
    """The chunks of one request do not fit the heap, with all that may be evicted gone."""


class PrefixStore:
    """A prefix cache over one heap, all chunks of one geometry.

    Args:
        allocator: where the chunks live.
        geometry: what a chunk is.

    Attributes:
        num_evicted: chunks evicted so far.
        allocate_seconds: host time and number of blocks of each successful ``batched_allocate``,
            or ``batched_store``, the launch of the copy included.
        free_seconds: the same of each ``batched_free``.
    """

    def __init__(self, allocator: TensorMemoryAllocator, geometry: Geometry) -> None:
        self.allocator = allocator
        self.geometry = geometry
        self.num_evicted = 0
        self.allocate_seconds: list[tuple[float, int]] = []
        self.free_seconds: list[tuple[float, int]] = []
        self._chunks: OrderedDict[int, MemoryObj] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """The number of chunks stored."""
        return len(self._chunks)

    def __contains__(self, hash_id: int) -> bool:
        """Whether the chunk is stored."""
        return hash_id in self._chunks

    def prefix_length(self, hash_ids: Sequence[int]) -> int:
        """How many leading ids are stored: what a request need not compute."""
        for position, hash_id in enumerate(hash_ids):
            if hash_id not in self._chunks:
                return position
        return len(hash_ids)

    def addresses(self, hash_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Where stored chunks are, int64 ``[N]``.

        Raises:
            KeyError: one of them is not stored.
        """
        chunks = self._chunks
        return np.array([chunks[hash_id].address for hash_id in hash_ids], np.int64)

    def chunks(self, hash_ids: Sequence[int]) -> list[MemoryObj]:
        """Stored chunks, in the order of the ids.

        Raises:
            KeyError: one of them is not stored.
        """
        return [self._chunks[hash_id] for hash_id in hash_ids]

    @contextmanager
    def in_flight(self, hash_ids: Sequence[int]) -> Iterator[None]:
        """Keep stored chunks from eviction inside the block, and then mark all as just used.

        The last id becomes the least recently used of them: when space runs out a request loses
        its tail first, since a tail without its head is of no use.
        """
        pinned = [self._chunks[hash_id] for hash_id in hash_ids if hash_id in self._chunks]
        held: list[MemoryObj] = []
        try:
            for chunk in pinned:
                chunk.pin()
                held.append(chunk)
            yield
        finally:
            for chunk in held:
                chunk.unpin()
            for hash_id in reversed(hash_ids):
                if hash_id in self._chunks:
                    self._chunks.move_to_end(hash_id)

    def store(self, hash_ids: Sequence[int], source: torch.Tensor) -> None:
        """Store new chunks in one batch, evicting others where the heap is full.

        Args:
            hash_ids: N distinct ids, none of them stored.
            source: ``[N, *shape]`` of the geometry's dtype, the chunks' contents.

        Raises:
            ValueError: an id is stored already or named twice; nothing is stored.
            RequestTooLargeError: the chunks do not fit; nothing is stored.
        """
        geometry = self.geometry
        self._store(
            hash_ids,
            lambda: self.allocator.batched_allocate(
                geometry.shape, geometry.dtype, len(hash_ids), geometry.fmt, source=source
            ),
        )

    def store_paged(self, hash_ids: Sequence[int], cache: PagedKVCache, slots: BlockIds) -> None:
        """The same, with the contents read where an engine keeps them.

        Args:
            hash_ids: N distinct ids, none of them stored.
            cache: the engine's KV cache.
            slots: the chunks' blocks, chunk after chunk.

        Raises:
            ValueError: an id is stored already or named twice, or the slots are not those of N
                chunks; nothing is stored.
            RequestTooLargeError: the chunks do not fit; nothing is stored.
        """
        chunk_tokens = self.geometry.shape[2]
        self._store(hash_ids, lambda: self.allocator.batched_store(cache, slots, chunk_tokens))

    def _store(self, hash_ids: Sequence[int], make_batch: Callable[[], MemoryBatch | None]) -> None:
        """Make the batch of new chunks, evicting others as long as there is no room (None)."""
        self._require_new(hash_ids)
        while True:
            start = perf_counter()
            batch = make_batch()
            if batch is not None:
                self.allocate_seconds.append((perf_counter() - start, len(batch)))
                # From lists, this update cannot be interrupted half-way.
                self._chunks.update(zip(hash_ids, list(batch), strict=True))
                return
            self._evict_for(len(hash_ids))

    def _require_new(self, hash_ids: Sequence[int]) -> None:
        if len(set(hash_ids)) != len(hash_ids):
            raise ValueError(f"an id is named twice in {list(hash_ids)}")
        for hash_id in hash_ids:
            if hash_id in self._chunks:
                raise ValueError(f"chunk {hash_id} is stored already")

    def _evict_for(self, num_chunks: int) -> None:
        """Free as many of the least recently used chunks as ``num_chunks`` more need."""
        chunk_bytes = self.allocator.address_manager.compute_aligned_size(self.geometry.chunk_bytes)
        stats = self.allocator.stats()
        # All chunks have one size, so every hole holds a whole number of them.
        missing = max(num_chunks - stats.free_bytes // chunk_bytes, 1)
        victims = self._least_recently_used(missing)
        if len(victims) < missing:
            raise RequestTooLargeError(
                f"a request needs {num_chunks} more chunks of {chunk_bytes} bytes than the heap of "
                f"{stats.heap_bytes} bytes can hold beside the {len(self)} chunks stored, of which "
                f"only {len(victims)} may be evicted"
            )
        # Forgotten before they are freed: a lookup must never find bytes that others may own.
        evicted = [(hash_id, self._chunks.pop(hash_id)) for hash_id in victims]
        start = perf_counter()
        try:
            self.allocator.batched_free([chunk for _, chunk in evicted])
        except BaseException:
            self._remember(evicted)
            raise
        self.free_seconds.append((perf_counter() - start, len(victims)))
        self.num_evicted += len(victims)

    def _remember(self, evicted: list[tuple[int, MemoryObj]]) -> None:
        """Put back, as the least recently used, what is not freed."""
        for hash_id, chunk in reversed(evicted):
            if chunk.is_valid():
                self._chunks[hash_id] = chunk
                self._chunks.move_to_end(hash_id, last=False)

    def _least_recently_used(self, count: int) -> list[int]:
        victims: list[int] = []
        for hash_id, chunk in self._chunks.items():
            if len(victims) == count:
                break
            if not chunk.pin_count:
                victims.append(hash_id)
        return victims
