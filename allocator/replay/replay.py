"""Replay request traffic through a ``PrefixStore``, checking every byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from kvheap.heaps.allocator_stats import AllocatorStats
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.prefix.policies import EvictionPolicy
from kvheap.prefix.store import PrefixStore
from kvheap.replay.copies import Copies, TensorCopies
from kvheap.replay.geometry import Geometry
from kvheap.replay.samples import HeapSample, mean_by_bin, occupancy
from kvheap.replay.timing import Stopwatch, TimedHeap
from kvheap.replay.trace import Request

__all__ = ["FurtherTier", "Replay"]

MAX_ADDRESS_RANGES = 256
"""The most equal address ranges that a sample distinguishes."""


class FurtherTier(Protocol):
    """Where chunks are kept behind the heap, such as a ``SecondTier``."""

    def keep(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> None:
        """Keep chunks that are stored and held."""

    def fetch(self, store: PrefixStore[int], hash_ids: Sequence[int]) -> list[int]:
        """Store those of ``hash_ids`` that are kept, and return them."""


class Replay:
    """Replays requests, in order, through one prefix store.

    For each request, the leading ids that are stored are hits: they are read and compared. The
    others are stored in one batch. Ids behind a missing one that are stored already are kept.

    Args:
        allocator: an empty heap.
        geometry: the geometry of a chunk.
        copies: how chunks are filled and read; None: with tensors.
        policy: which chunks are evicted first; None: the least recently used.
        tier: keeps what the heap evicts; None: nothing does.

    Attributes:
        store: the prefix store.
        heap: the heap of the store, with the times of all calls.
        geometry: as given.
        requests, block_refs, hits, stored, resident: counts so far; ``resident`` are references
            that were neither hits nor stored: behind a missing chunk, or named twice.
        fetched: chunks that the tier brought back; they are no hits, and are compared too.
        mismatches: references whose chunk did not hold what was stored.
        utilization_peak: highest allocated share of the heap after any request.
        samples: the heap over time, if sampling was requested.
    """

    def __init__(
        self,
        allocator: TensorMemoryAllocator,
        geometry: Geometry,
        copies: Copies | None = None,
        policy: EvictionPolicy | None = None,
        tier: FurtherTier | None = None,
    ) -> None:
        self.heap = TimedHeap(allocator)
        self.store: PrefixStore[int] = PrefixStore(self.heap, geometry.layout, policy)
        self.geometry = geometry
        self.requests = self.block_refs = self.hits = self.stored = self.resident = 0
        self.mismatches = self.fetched = 0
        self.utilization_peak = 0.0
        self.samples: list[HeapSample] = []
        self._tier = tier
        self._copies = TensorCopies(geometry, allocator.buffer) if copies is None else copies
        self._slot_bytes = allocator.address_manager.compute_aligned_size(geometry.chunk_bytes)
        # When each place in the heap was last written; chunks of one size each fill one place.
        num_slots = allocator.stats().heap_bytes // self._slot_bytes
        self._stored_at_ms = np.full(num_slots, np.nan)

    def run(
        self,
        requests: Sequence[Request],
        num_samples: int = 0,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Replay ``requests``, and take ``num_samples`` evenly spaced samples of the heap.

        Raises:
            RequestTooLargeError: the chunks of one request do not fit the heap.
        """
        sample_at = set(np.linspace(0, len(requests) - 1, num_samples, dtype=int).tolist())
        for number, request in enumerate(requests):
            self.serve(request.hash_ids, request.timestamp_ms)
            if number in sample_at:
                self.samples.append(self._sample(request.timestamp_ms))
            on_progress(number + 1)

    def serve(self, hash_ids: Sequence[int], timestamp_ms: int = 0) -> None:
        """Serve one request: check the hits, and store the misses.

        Raises:
            RequestTooLargeError: the chunks of the request do not fit the heap.
        """
        store = self.store
        num_hits = store.prefix_length(hash_ids)
        distinct = list(dict.fromkeys(hash_ids))
        missing = store.missing(distinct)
        with ExitStack() as held:
            stored = [hash_id for hash_id in distinct if hash_id in store]
            held.enter_context(store.hold(stored))
            store.touch(stored)
            self.mismatches += self._copies.count_mismatches(store, hash_ids[:num_hits])
            fetched = self._fetch(missing, held)
            if fetched:
                self._stored_at_ms[store.addresses(fetched) // self._slot_bytes] = timestamp_ms
                missing = store.missing(missing)
            if missing:
                for batch in self._copies.batches(missing):
                    self._copies.write(store, batch)
                    held.enter_context(store.hold(batch))
                self._stored_at_ms[store.addresses(missing) // self._slot_bytes] = timestamp_ms
            request = store.hold(distinct)
            if self._tier is not None:
                self._tier.keep(store, missing)
        request.release()  # as a whole, so that the tail of the request is evicted before its head
        self.requests += 1
        self.block_refs += len(hash_ids)
        self.hits += num_hits
        self.stored += len(missing)
        self.fetched += len(fetched)
        self.resident += len(hash_ids) - num_hits - len(missing) - len(fetched)
        self.utilization_peak = max(self.utilization_peak, self.stats().utilization)

    def _fetch(self, missing: Sequence[int], held: ExitStack) -> list[int]:
        """Bring back what the tier has, hold and compare it."""
        if self._tier is None:
            return []
        fetched = self._tier.fetch(self.store, missing)
        held.enter_context(self.store.hold(fetched))
        self.mismatches += self._copies.count_mismatches(self.store, fetched)
        return fetched

    def stats(self) -> AllocatorStats:
        """The heap now."""
        return self.heap.stats()

    def speeds_gbps(self) -> dict[str, float | None]:
        """GB/s of KV by the name of the copy, each byte counted once; None without such copies.

        With tensors, ``gather`` reads hits and ``scatter`` stores; with an engine, these are
        ``load`` and ``store``. The time of a store includes allocation and eviction.
        """
        copies = self._copies
        return {
            copies.read_name: self._gbps(self.hits, copies.read_time),
            copies.write_name: self._gbps(self.stored, copies.write_time),
        }

    def copy_calls(self) -> dict[str, tuple[float, float] | None]:
        """Mean microseconds and bytes of KV of one call by the name of the copy; None without any.

        Names and times are those of :meth:`speeds_gbps`.
        """
        copies = self._copies
        return {
            copies.read_name: self._call(self.hits, copies.read_time),
            copies.write_name: self._call(self.stored, copies.write_time),
        }

    def _call(self, num_chunks: int, time: Stopwatch) -> tuple[float, float] | None:
        if not time.calls:
            return None
        num_bytes = num_chunks * self.geometry.chunk_bytes
        return time.total_seconds() * 1e6 / time.calls, num_bytes / time.calls

    def _gbps(self, num_chunks: int, time: Stopwatch) -> float | None:
        seconds = time.total_seconds()
        return num_chunks * self.geometry.chunk_bytes / seconds / 1e9 if seconds else None

    def _sample(self, timestamp_ms: int) -> HeapSample:
        starts, sizes = self.heap.heap.free_extents().T
        stats = self.stats()
        num_bins = max(1, min(MAX_ADDRESS_RANGES, len(self._stored_at_ms)))
        return HeapSample(
            timestamp_ms=timestamp_ms,
            utilization=stats.utilization,
            hits=self.hits,
            block_refs=self.block_refs,
            occupancy=occupancy(starts, sizes, stats.heap_bytes, num_bins),
            age_ms=mean_by_bin(timestamp_ms - self._stored_at_ms, num_bins),
        )
