"""The workloads of ``bench_utilization.py``, on addresses alone.

They are those of Mooncake's allocator benchmark (kvcache-ai/Mooncake,
``mooncake-store/benchmarks/allocator_bench.cpp``). Every allocator gets the same requests, and
evicts at random from the same seed.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from _placement import Heap, MakeHeap

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MAX_ALIGN_BYTES = 4096
MAX_ALIGN_WASTE = 0.001

UNIFORM_HEAP_BYTES = 2 * GIB
UNIFORM_HEAP_BYTES_BELOW_1_KIB = 128 * MIB

RANDOM_HEAP_BYTES = 2 * GIB
RANDOM_SIZES = (1 * KIB, 64 * MIB)
RANDOM_ALIGN_BYTES = 1 * KIB
"""The smallest size. Rounding up to it wastes 512 B of 32 MiB on average, 0.0015 %."""

KV_BYTES = 3_274_752
INDEXER_BYTES = 643 * KIB
MAX_PAIRS_A_ROUND = 128
PAIRS_EVICTED_SHARE = 0.05
PAIRS_PUBLISHED_HEAP_BYTES = 1024 * GIB
PAIRS_SMALL_HEAP_BYTES = 64 * GIB
AGED_PARTS = 10

Floats = npt.NDArray[np.float64]


class Occupancy:
    """A heap with its live blocks, some of which are evicted at random when it is full.

    Attributes:
        heap_bytes: bytes of the heap.
        requested_bytes: bytes of the live blocks as requested, without alignment.
        allocations: number of successful allocations.
        full_at: utilization just before each eviction.
    """

    def __init__(self, heap: Heap, heap_bytes: int, seed: int) -> None:
        self._heap = heap
        self.heap_bytes = heap_bytes
        self.requested_bytes = 0
        self.allocations = 0
        self.full_at = array("d")
        self._addresses = array("q")
        self._sizes = array("q")
        self._chance = random.Random(f"evictions {seed}")

    @property
    def utilization(self) -> float:
        """Requested bytes over heap bytes."""
        return self.requested_bytes / self.heap_bytes

    def fill(self, size: int) -> None:
        """Fill a fresh heap with blocks of ``size`` bytes.

        They are allocated as one block, which gives the same addresses as one by one.
        """
        step = self._heap.compute_aligned_size(size)
        blocks = self.heap_bytes // step
        first, _ = self._heap.allocate(blocks * step)
        addresses = first + step * np.arange(blocks, dtype=np.int64)
        self._addresses.frombytes(addresses.tobytes())
        self._sizes.extend(array("q", [size]) * blocks)
        self.requested_bytes += blocks * size

    def allocate(self, size: int, evicted_share: float = 0.0) -> None:
        """Allocate a block. Until that succeeds, evict a share of the blocks, at least one."""
        while True:
            try:
                address, _ = self._heap.allocate(size)
            except RuntimeError:  # the heap is full; LMCache raises it too
                self.full_at.append(self.utilization)
                self._evict(max(1, int(len(self._addresses) * evicted_share)))
                continue
            self._addresses.append(address)
            self._sizes.append(size)
            self.requested_bytes += size
            self.allocations += 1
            return

    def _evict(self, count: int) -> None:
        addresses, sizes, heap = self._addresses, self._sizes, self._heap
        for _ in range(count):
            index = self._chance.randrange(len(addresses))
            address, size = addresses[index], sizes[index]
            addresses[index], sizes[index] = addresses[-1], sizes[-1]
            addresses.pop()
            sizes.pop()
            heap.free(address, heap.compute_aligned_size(size))
            self.requested_bytes -= size

    def check(self) -> None:
        """Raise if live blocks overlap or lie outside the heap."""
        starts = np.frombuffer(self._addresses, np.int64)
        order = np.argsort(starts, kind="stable")  # fast if nearly sorted
        starts, sizes = starts[order], np.frombuffer(self._sizes, np.int64)[order]
        ends = starts + sizes
        inside = starts[0] >= 0 and ends[-1] <= self.heap_bytes
        if not inside or (ends[:-1] > starts[1:]).any() or sizes.sum() != self.requested_bytes:
            raise RuntimeError(f"{type(self._heap)} handed out bytes twice, or outside the heap")


class Run(NamedTuple):
    """The result of one allocator with one seed: utilization samples, and allocations."""

    utilization: Floats
    allocations: int


Traffic = Callable[[Occupancy, random.Random, int], "array[float]"]
"""Warms a heap up, then runs a number of allocations or rounds; returns utilization samples."""


def uniform_traffic(
    occupancy: Occupancy, _: random.Random, count: int, *, size: int
) -> array[float]:
    occupancy.fill(size)
    return sampled(occupancy, (size for _ in range(count)))


def random_traffic(occupancy: Occupancy, requests: random.Random, count: int) -> array[float]:
    requested = 0
    while requested <= occupancy.heap_bytes:
        size = requests.randint(*RANDOM_SIZES)
        occupancy.allocate(size)
        requested += size
    return sampled(occupancy, (requests.randint(*RANDOM_SIZES) for _ in range(count)))


def sampled(occupancy: Occupancy, sizes: Iterator[int]) -> array[float]:
    """Allocate these sizes; the utilization after each."""
    occupancy.allocations = 0
    samples = array("d")
    for size in sizes:
        occupancy.allocate(size)
        samples.append(occupancy.utilization)
    return samples


def pairs_traffic(occupancy: Occupancy, requests: random.Random, rounds: int) -> array[float]:
    requested = 0
    while requested <= 2 * occupancy.heap_bytes:
        requested += one_round(occupancy, requests)
    occupancy.allocations = 0
    warmed_up = len(occupancy.full_at)
    for _ in range(rounds):
        one_round(occupancy, requests)
    return occupancy.full_at[warmed_up:]


def one_round(occupancy: Occupancy, requests: random.Random) -> int:
    """Allocate some KV blocks, then as many indexer blocks; returns the bytes requested."""
    blocks = requests.randint(1, MAX_PAIRS_A_ROUND)
    for size in (KV_BYTES, INDEXER_BYTES):
        for _ in range(blocks):
            occupancy.allocate(size, PAIRS_EVICTED_SHARE)
    return blocks * (KV_BYTES + INDEXER_BYTES)


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of traffic on heaps of one size, and how much of it is measured."""

    name: str
    heap_bytes: int
    align_bytes: int
    count: int
    traffic: Traffic
    parts: int = 1
    """The number of parts whose means are reported too."""

    def run(self, make: MakeHeap, seed: int) -> Run:
        """Run the traffic on a fresh heap; a seed gives every allocator the same requests."""
        heap = make(self.heap_bytes, self.align_bytes)
        occupancy = Occupancy(heap, self.heap_bytes, seed)
        samples = self.traffic(occupancy, random.Random(f"requests {seed}"), self.count)
        occupancy.check()
        return Run(np.array(samples), occupancy.allocations)


def align_for(*sizes: int) -> int:
    """The largest power of two up to 4096 that wastes at most 0.1 % of each of these sizes.

    It is 1 for 15 B, 64 for 29,491 B and 4096 for 1 MiB.
    """
    align_bytes = MAX_ALIGN_BYTES
    while any(-size % align_bytes > MAX_ALIGN_WASTE * size for size in sizes):
        align_bytes //= 2
    return align_bytes


def uniform_workload(size: int, count: int) -> Workload:
    heap_bytes = UNIFORM_HEAP_BYTES_BELOW_1_KIB if size < KIB else UNIFORM_HEAP_BYTES
    traffic = partial(uniform_traffic, size=size)
    return Workload("uniform", heap_bytes, align_for(size), count, traffic)


def random_workload(count: int) -> Workload:
    return Workload("random", RANDOM_HEAP_BYTES, RANDOM_ALIGN_BYTES, count, random_traffic)


def pairs_workload(heap_bytes: int, rounds: int) -> Workload:
    align_bytes = align_for(KV_BYTES, INDEXER_BYTES)
    return Workload("pairs", heap_bytes, align_bytes, rounds, pairs_traffic)


def aged_workload(rounds: int) -> Workload:
    pairs = pairs_workload(PAIRS_SMALL_HEAP_BYTES, rounds)
    return replace(pairs, name="aged", parts=AGED_PARTS)
