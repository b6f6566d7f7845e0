"""``CallTimes``: how long the calls of a heap take, and how often a store's look-ups hit.

Measured by wrapping the methods of all heaps or all stores for as long as one is watched: while
none is, a call costs what it costs. One call in :data:`CALLS_PER_SAMPLE` is timed, as reading the
clock twice costs more than the rest; all are counted. See benchmarks/NOTES.md.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

from kvheap.blocks.block_allocator import BlockAllocator
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.kernels.untraced import untraced
from kvheap.prefix.store import PrefixStore
from kvheap.probes import Place, Probe

__all__ = [
    "BOUNDS_NS",
    "CALLS",
    "CALLS_PER_SAMPLE",
    "CallTimes",
    "HeapCalls",
    "StoreLookups",
    "rest",
    "unwatch_calls",
    "watch_calls",
]

CALLS_PER_SAMPLE = 16
"""A power of two."""

CALLS: tuple[tuple[Place, str], ...] = (
    ((TensorMemoryAllocator, "allocate_blocks"), "allocate"),
    ((BlockAllocator, "batched_free"), "free"),
    ((BlockAllocator, "free"), "free"),
    ((TensorMemoryAllocator, "batched_store"), "store"),
    ((TensorMemoryAllocator, "batched_load"), "load"),
)
"""The methods of a heap that are timed, each with what the metrics call it. Every allocation is one
call of ``allocate_blocks``."""

FIRST_BIT, LAST_BIT = 10, 30

BOUNDS_NS = tuple(1 << bit for bit in range(FIRST_BIT, LAST_BIT + 1))
"""Upper bounds of the buckets in nanoseconds: from a microsecond to a second, each twice the one
before, which a number of bits tells."""

SKIPPED = CALLS_PER_SAMPLE - 1

clock = time.perf_counter_ns


class CallTimes:
    """The number of calls of one kind, and a histogram of the durations of some of them.

    No lock is taken: CPython switches threads only between the statements below.

    Attributes:
        num_calls: number of all calls.
        by_bits: number of timed calls by the bits of their duration in nanoseconds less one: those
            with at most B bits took at most ``2**B`` nanoseconds.
        total_ns: nanoseconds of the timed calls.
    """

    __slots__ = ("by_bits", "num_calls", "total_ns")

    def __init__(self) -> None:
        self.by_bits = [0] * 65
        self.num_calls = self.total_ns = 0

    def add(self, ns: int) -> None:
        """Add the duration of a call."""
        self.by_bits[(ns - 1).bit_length()] += 1
        self.total_ns += ns

    def cumulative(self) -> list[int]:
        """Number of timed calls up to each of ``BOUNDS_NS``, and of all of them."""
        by_bits = self.by_bits.copy()
        counts = [sum(by_bits[: FIRST_BIT + 1])]
        for bit in range(FIRST_BIT + 1, LAST_BIT + 1):
            counts.append(counts[-1] + by_bits[bit])
        return [*counts, sum(by_bits)]


class HeapCalls:
    """The calls of one heap, by what the metrics call them."""

    __slots__ = ("allocate", "free", "load", "num_users", "store")

    def __init__(self) -> None:
        self.num_users = 0
        self.allocate, self.free = CallTimes(), CallTimes()
        self.store, self.load = CallTimes(), CallTimes()


class StoreLookups:
    """The look-ups of one prefix store: how many, what they found, and what else they asked for."""

    __slots__ = ("hit_chunks", "lookups", "missed_chunks", "num_users")

    def __init__(self) -> None:
        self.num_users = self.lookups = self.hit_chunks = self.missed_chunks = 0


def watch_calls(obj: Any) -> HeapCalls | StoreLookups:
    """Measure the calls of a heap or a prefix store from now on, until :func:`unwatch_calls`."""
    is_store = isinstance(obj, PrefixStore)
    if obj.watched_calls is None:
        obj.watched_calls = StoreLookups() if is_store else HeapCalls()
    probe, watched_objects = _STORES if is_store else _HEAPS
    watched_objects.add(obj)
    if not probe.is_attached:
        probe.attach()
    watched: HeapCalls | StoreLookups = obj.watched_calls
    watched.num_users += 1
    return watched


def unwatch_calls(obj: Any) -> None:
    """End what :func:`watch_calls` began, once for each of its calls."""
    watched: HeapCalls | StoreLookups | None = obj.watched_calls
    if watched is not None:
        watched.num_users -= 1
        if not watched.num_users:
            obj.watched_calls = None
            for _, watched_objects in (_HEAPS, _STORES):
                watched_objects.discard(obj)
    rest()


def rest() -> None:
    """Put the methods back if nothing is watched any more."""
    for probe, watched_objects in (_HEAPS, _STORES):
        if probe.is_attached and not watched_objects:
            probe.detach()


def _timed(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A method of heaps, with the signature of its own, as any other costs as much again."""
    call = next(call for (_, each), call in CALLS if each == name)

    def allocate_blocks(
        heap: Any, layout: Any, batch_size: int, source: Any = None, allow_partial: bool = False
    ) -> Any:
        calls = heap.watched_calls
        if calls is None:
            return method(heap, layout, batch_size, source, allow_partial)
        times = calls.allocate
        number = times.num_calls
        times.num_calls = number + 1
        if number & SKIPPED:
            return method(heap, layout, batch_size, source, allow_partial)
        began = clock()
        try:
            return method(heap, layout, batch_size, source, allow_partial)
        finally:
            times.add(clock() - began)

    def batched_free(heap: Any, objs: Any, out: Any = None) -> Any:
        calls = heap.watched_calls
        if calls is None:
            return method(heap, objs, out)
        times = calls.free
        number = times.num_calls
        times.num_calls = number + 1
        if number & SKIPPED:
            return method(heap, objs, out)
        began = clock()
        try:
            return method(heap, objs, out)
        finally:
            times.add(clock() - began)

    def any_call(heap: Any, *arguments: Any, **options: Any) -> Any:
        calls = heap.watched_calls
        if calls is None:
            return method(heap, *arguments, **options)
        times = getattr(calls, call)
        number = times.num_calls
        times.num_calls = number + 1
        if number & SKIPPED:
            return method(heap, *arguments, **options)
        began = clock()
        try:
            return method(heap, *arguments, **options)
        finally:
            times.add(clock() - began)

    found: dict[str, Callable[..., Any]] = {
        "allocate_blocks": allocate_blocks,
        "batched_free": batched_free,
    }
    return untraced(wraps(method)(found.get(name, any_call)))


def _counted(method: Callable[..., int], name: str) -> Callable[..., int]:
    @untraced
    @wraps(method)
    def prefix_length(store: Any, keys: Any) -> int:
        length = method(store, keys)
        lookups = store.watched_calls
        if lookups is not None:
            lookups.lookups += 1
            lookups.hit_chunks += length
            if hasattr(keys, "__len__"):
                lookups.missed_chunks += len(keys) - length
        return length

    return prefix_length


_HEAPS: tuple[Probe, weakref.WeakSet[Any]] = (
    Probe([place for place, _ in CALLS], _timed),
    weakref.WeakSet(),
)
_STORES: tuple[Probe, weakref.WeakSet[Any]] = (
    Probe([(PrefixStore, "prefix_length")], _counted),
    weakref.WeakSet(),
)
