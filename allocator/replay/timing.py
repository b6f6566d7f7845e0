"""Timing in a replay: of the heap's calls, one by one, and of copies, on their device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch

from kvheap.addresses.address_manager import AddressManager
from kvheap.blocks.block_layout import Dtypes, Shapes
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.heaps.allocator_stats import AllocatorStats
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_slots import Slots

__all__ = ["Stopwatch", "TimedHeap"]


class TimedHeap:
    """A heap, with the methods that a ``PrefixStore`` uses, that records how long its calls take.

    Times are measured on the host, in seconds, from call to return. Calls that fail, or for which
    there is no room, are not recorded.

    Args:
        heap: the heap that does the work.

    Attributes:
        heap: as given.
        allocations: seconds and number of blocks of each ``batched_allocate`` or
            ``batched_store``; the launch of the copy is included.
        frees: seconds and number of blocks of each ``batched_free``.
    """

    def __init__(self, heap: TensorMemoryAllocator) -> None:
        self.heap = heap
        self.allocations: list[tuple[float, int]] = []
        self.frees: list[tuple[float, int]] = []

    @property
    def device(self) -> torch.device:
        """The heap's device."""
        return self.heap.device

    @property
    def address_manager(self) -> AddressManager:
        """The heap's address manager."""
        return self.heap.address_manager

    def batched_allocate(
        self,
        shape: Shapes,
        dtype: Dtypes,
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        source: torch.Tensor | None = None,
    ) -> MemoryBatch | None:
        """Allocate and fill blocks, timed; see ``TensorMemoryAllocator.batched_allocate``."""
        start = perf_counter()
        batch = self.heap.batched_allocate(shape, dtype, batch_size, fmt, source=source)
        return self._allocated(batch, start)

    def batched_store(
        self,
        cache: PagedKVCache,
        slots: Slots,
        chunk_tokens: int = 256,
        fmt: MemoryFormat | None = None,
    ) -> MemoryBatch | None:
        """Allocate and fill chunks, timed; see ``TensorMemoryAllocator.batched_store``."""
        start = perf_counter()
        return self._allocated(self.heap.batched_store(cache, slots, chunk_tokens, fmt), start)

    def _allocated(self, batch: MemoryBatch | None, start: float) -> MemoryBatch | None:
        if batch is not None:
            self.allocations.append((perf_counter() - start, len(batch)))
        return batch

    def batched_free(self, objs: Iterable[MemoryObj]) -> None:
        """Free blocks, timed; see ``TensorMemoryAllocator.batched_free``."""
        blocks = list(objs)
        start = perf_counter()
        self.heap.batched_free(blocks)
        self.frees.append((perf_counter() - start, len(blocks)))

    def max_batch(self, shape: Shapes, dtype: Dtypes) -> int:
        """How many blocks one ``batched_allocate`` could return now."""
        return self.heap.max_batch(shape, dtype)

    def stats(self) -> AllocatorStats:
        """The heap's counters."""
        return self.heap.stats()


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in copies: on a GPU from events, added up at the end; else from the clock.

    Attributes:
        device: where the copies run.
        calls: how many calls were timed.
    """

    device: torch.device
    calls: int = 0
    _seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of the ``with`` block, which is one call."""
        self.calls += 1
        if self.device.type == "cuda":
            begin, end = _timing_event(), _timing_event()
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = perf_counter()
            yield
            self._seconds += perf_counter() - start

    def total_seconds(self) -> float:
        """Seconds so far; waits for a GPU."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return self._seconds


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
