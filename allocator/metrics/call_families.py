"""The metrics of what is measured of single objects: calls of heaps, look-ups of prefix stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvheap.metrics.families import Families

if TYPE_CHECKING:
    from kvheap.metrics.calls import CallTimes, HeapCalls, StoreLookups

__all__ = ["add_calls", "declare_calls", "declare_lookups"]

CALLS = "kvheap_heap_calls"
SECONDS = "kvheap_heap_call_duration_seconds"


def declare_calls(families: Families) -> None:
    """Name the metrics of the calls of heaps."""
    families.declare(
        CALLS,
        "counter",
        "Calls of a heap since it is watched, those that failed included. store and load are those "
        "of an engine's cache; a store includes a call of allocate.",
        ("heap", "call"),
    )
    families.declare_histogram(
        SECONDS,
        "Seconds that calls of a heap took on their thread; one call in 16 is timed. Copies on a "
        "device go on behind the call.",
        ("heap", "call"),
    )


def declare_lookups(families: Families) -> None:
    """Name the metrics of the look-ups of prefix stores."""
    families.declare(
        "kvheap_prefix_lookups",
        "counter",
        "Look-ups of a request's prefix since the store is watched.",
        ("store",),
    )
    families.declare(
        "kvheap_prefix_hit_chunks",
        "counter",
        "Hits: the leading chunks that look-ups found.",
        ("store",),
    )
    families.declare(
        "kvheap_prefix_missed_chunks",
        "counter",
        "Misses: chunks that look-ups asked for and that follow the last one found.",
        ("store",),
    )


def add_calls(families: Families, name: str, calls: HeapCalls | StoreLookups) -> None:
    """Add what was measured of one object."""
    from kvheap.metrics.calls import BOUNDS_NS, HeapCalls  # needs torch, which is loaded by now

    if not isinstance(calls, HeapCalls):
        declare_lookups(families)
        families.add("kvheap_prefix_lookups", (name,), calls.lookups)
        families.add("kvheap_prefix_hit_chunks", (name,), calls.hit_chunks)
        families.add("kvheap_prefix_missed_chunks", (name,), calls.missed_chunks)
        return
    declare_calls(families)
    bounds = (*(repr(bound / 1e9) for bound in BOUNDS_NS), "+Inf")
    for call in ("allocate", "free", "store", "load"):
        times: CallTimes = getattr(calls, call)
        families.add(CALLS, (name, call), times.num_calls)
        counts = times.cumulative()
        families.add_histogram(SECONDS, (name, call), bounds, counts, times.total_ns / 1e9)
