"""Replay request traffic through a ``PrefixStore``, checking every byte.

Contents derive from the hash id, so what is gathered on a hit can be compared with what was
stored without keeping a copy: word ``w`` of chunk ``id`` is ``mix(id) + mix(~w)`` in wrapping
64-bit arithmetic. Two ids, or two places, that agree are as rare as a 64-bit hash makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from kvheap.heaps.tensor_allocator import AllocatorStats, TensorMemoryAllocator
from kvheap.kernels import gather_blocks
from kvheap.prefix.store import PrefixStore
from kvheap.replay.geometry import Geometry
from kvheap.replay.trace import Request

__all__ = ["Contents", "HeapSample", "Replay"]

Float64Array = npt.NDArray[np.float64]

CHECK_BYTES = 64 << 20
"""Hits are gathered and compared in pieces of about this size, so that memory stays bounded."""

MAP_BINS = 256
"""Address ranges that the heap's map tells apart."""


class Contents:
    """What every chunk of a geometry holds.

    Args:
        geometry: what a chunk is; its bytes are a multiple of 8.
        device: where the contents are made.
    """

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self._geometry = geometry
        self._device = device
        words = torch.arange(geometry.chunk_bytes // 8, dtype=torch.int64, device=device)
        self._words = _mix(~words)

    def of(self, hash_ids: Sequence[int]) -> torch.Tensor:
        """The chunks' contents, ``[N, *shape]`` of the geometry's dtype."""
        ids = torch.tensor(hash_ids, dtype=torch.int64, device=self._device)
        words = _mix(ids)[:, None] + self._words[None, :]
        return words.view(self._geometry.dtype).view(len(hash_ids), *self._geometry.shape)

    def count_mismatches(self, hash_ids: Sequence[int], chunks: torch.Tensor) -> int:
        """How many of ``chunks`` (``[N, *shape]``) differ in any byte from what they should be."""
        found = chunks.view(len(hash_ids), -1).view(torch.int64)
        expected = self.of(hash_ids).view(len(hash_ids), -1).view(torch.int64)
        if torch.equal(found, expected):
            return 0
        return int((found != expected).any(dim=1).sum())


def _mix(values: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014), which maps no two values to one."""
    values = (values ^ _shifted(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _shifted(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A right shift that brings in zeros; torch's own repeats the sign of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, slots=True)
class HeapSample:
    """The heap after one request, for a picture."""

    timestamp_ms: int
    utilization: float
    hits: int
    block_refs: int
    occupancy: Float64Array
    """Allocated share of each of up to ``MAP_BINS`` equal address ranges, 0.0 to 1.0."""
    age_ms: Float64Array
    """Mean time since the chunks of each of those ranges were stored; NaN before the first."""


@dataclass(slots=True)
class _Stopwatch:
    """Seconds spent in copies: on a GPU by events, which the end adds up, else by the clock."""

    device: torch.device
    seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def measure(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = _timing_event(), _timing_event()
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = perf_counter()
            yield
            self.seconds += perf_counter() - start

    def total_seconds(self) -> float:
        if self._events:
            torch.cuda.synchronize(self.device)
            self.seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return self.seconds


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Replay:
    """Requests in order through one prefix store.

    For each request the leading ids that are stored are hits: gathered and compared. The others
    are stored in one batch, but those that are stored already behind a gap, which are kept.

    Args:
        allocator: an empty heap.
        geometry: what a chunk is.

    Attributes:
        store: the prefix store.
        requests, block_refs, hits, stored, resident: counts so far; ``resident`` are references
            that were neither hits nor stored: behind a missing chunk, or named twice.
        mismatches: references whose chunk did not hold what was stored.
        utilization_peak: highest allocated share of the heap after any request.
        samples: the heap over time, where sampling was asked for.
    """

    def __init__(self, allocator: TensorMemoryAllocator, geometry: Geometry) -> None:
        device = allocator.buffer.device
        self.store = PrefixStore(allocator, geometry)
        self.geometry = geometry
        self.requests = self.block_refs = self.hits = self.stored = self.resident = 0
        self.mismatches = 0
        self.utilization_peak = 0.0
        self.samples: list[HeapSample] = []
        self._slot_bytes = allocator.address_manager.compute_aligned_size(geometry.chunk_bytes)
        # When each place in the heap was last stored to; chunks of one size never straddle two.
        num_slots = allocator.stats().heap_bytes // self._slot_bytes
        self._stored_at_ms = np.full(num_slots, np.nan)
        self._contents = Contents(geometry, device)
        self._read_time = _Stopwatch(device)
        self._write_time = _Stopwatch(device)

    def run(
        self,
        requests: Sequence[Request],
        num_samples: int = 0,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Replay ``requests``, taking ``num_samples`` samples of the heap, evenly apart.

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
        """One request: check the hits, store the misses."""
        store = self.store
        num_hits = store.prefix_length(hash_ids)
        missing = [i for i in dict.fromkeys(hash_ids[num_hits:]) if i not in store]
        with store.in_flight(hash_ids):
            self._check(hash_ids[:num_hits])
            if missing:
                self._store(missing)
                self._stored_at_ms[store.addresses(missing) // self._slot_bytes] = timestamp_ms
        self.requests += 1
        self.block_refs += len(hash_ids)
        self.hits += num_hits
        self.stored += len(missing)
        self.resident += len(hash_ids) - num_hits - len(missing)
        self.utilization_peak = max(self.utilization_peak, self.stats().utilization)

    def _store(self, hash_ids: Sequence[int]) -> None:
        """Store chunks that are missing."""
        source = self._contents.of(hash_ids)
        with self._write_time.measure():
            self.store.store(hash_ids, source)

    def _check(self, hash_ids: Sequence[int]) -> None:
        """Read chunks that are stored, and count those that are wrong."""
        geometry, buffer = self.geometry, self.store.allocator.buffer
        step = max(1, CHECK_BYTES // geometry.chunk_bytes)
        for begin in range(0, len(hash_ids), step):
            piece = hash_ids[begin : begin + step]
            shape = (len(piece), *geometry.shape)
            out = torch.empty(shape, dtype=geometry.dtype, device=buffer.device)
            with self._read_time.measure():
                gather_blocks(buffer, self.store.addresses(piece), out)
            self.mismatches += self._contents.count_mismatches(piece, out)

    def stats(self) -> AllocatorStats:
        """The heap now."""
        return self.store.allocator.stats()

    def speeds_gbps(self) -> dict[str, float | None]:
        """GB/s of KV by the name of the copy, each byte counted once; None where there was none.

        ``gather`` is what reads hits; ``scatter`` stores, and includes the time for allocation
        and eviction.
        """
        return {"gather": self._read_gbps(), "scatter": self._write_gbps()}

    def _read_gbps(self) -> float | None:
        seconds = self._read_time.total_seconds()
        return self.hits * self.geometry.chunk_bytes / seconds / 1e9 if seconds else None

    def _write_gbps(self) -> float | None:
        seconds = self._write_time.total_seconds()
        return self.stored * self.geometry.chunk_bytes / seconds / 1e9 if seconds else None

    def _sample(self, timestamp_ms: int) -> HeapSample:
        starts, sizes = self.store.allocator.snapshot().T
        stats = self.stats()
        num_bins = max(1, min(MAP_BINS, len(self._stored_at_ms)))
        return HeapSample(
            timestamp_ms=timestamp_ms,
            utilization=stats.utilization,
            hits=self.hits,
            block_refs=self.block_refs,
            occupancy=occupancy(starts, sizes, stats.heap_bytes, num_bins),
            age_ms=_mean_by_bin(timestamp_ms - self._stored_at_ms, num_bins),
        )


def occupancy(
    free_starts: npt.NDArray[np.int64],
    free_sizes: npt.NDArray[np.int64],
    heap_bytes: int,
    num_bins: int,
) -> Float64Array:
    """Allocated share of each of ``num_bins`` equal address ranges. O(F + bins).

    >>> occupancy(np.array([0, 6]), np.array([2, 2]), 8, 4)
    array([0., 1., 1., 0.])
    """
    edges = np.linspace(0, heap_bytes, num_bins + 1)
    # Free bytes below an address: linear inside an extent, flat between extents.
    corners = np.stack((free_starts, free_starts + free_sizes), axis=1).reshape(-1)
    free_at_end = np.cumsum(free_sizes)
    free_below = np.stack((free_at_end - free_sizes, free_at_end), axis=1).reshape(-1)
    if not len(corners):
        return np.ones(num_bins)
    free_in_bin = np.diff(np.interp(edges, corners, free_below))
    return 1.0 - free_in_bin / np.diff(edges)


def _mean_by_bin(values: Float64Array, num_bins: int) -> Float64Array:
    """Mean of the values that are not NaN in each of ``num_bins`` equal stretches, NaN if none."""
    known = ~np.isnan(values)
    bins = np.arange(len(values)) * num_bins // max(len(values), 1)
    counts = np.bincount(bins[known], minlength=num_bins)
    sums = np.bincount(bins[known], weights=values[known], minlength=num_bins)
    means = np.full(num_bins, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means
