"""The tier's metrics, under vLLM's ``vllm:kv_offload_`` and with vLLM's units.

vLLM's own gauges of how much of the tier transfers hold, and its counters, keep their names. What a
heap of unlike chunks adds is named ``vllm:kv_offload_heap_...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)
from vllm.v1.kv_offload.cpu.common import CPUOffloadingMetrics

from kvheap.integrations.vllm.store_values import StoreStats

__all__ = ["HeapMetrics", "MetricsFeed", "build_metric_definitions"]

ALLOCATION_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
"""Chunks in one store; vLLM's buckets."""


class HeapMetrics:
    """Names of the metrics that vLLM's own tier does not have."""

    LIVE_BYTES = "vllm:kv_offload_heap_live_bytes"
    LIVE_CHUNKS = "vllm:kv_offload_heap_live_chunks"
    FREE_BYTES = "vllm:kv_offload_heap_free_bytes"
    LARGEST_FREE_EXTENT = "vllm:kv_offload_heap_largest_free_extent_bytes"
    PINNED_SHARE = "vllm:kv_offload_heap_pinned_perc"
    EVICTED_CHUNKS = "vllm:kv_offload_heap_evicted_chunks"
    EVICTED_BYTES = "vllm:kv_offload_heap_evicted_bytes"
    HIT_BYTES = "vllm:kv_offload_heap_hit_bytes"
    FAILED_CHUNKS = "vllm:kv_offload_heap_failed_chunks"
    REFUSED_STORES = "vllm:kv_offload_heap_refused_stores"


GAUGES = {
    CPUOffloadingMetrics.CPU_CACHE_USAGE_PERC: (
        "Fraction of the heap that active transfers hold (0.0 = idle, 1.0 = saturated)."
    ),
    CPUOffloadingMetrics.CPU_CACHE_WRITE_USAGE_PERC: (
        "Fraction of the heap held by stores that have not completed."
    ),
    CPUOffloadingMetrics.CPU_CACHE_READ_USAGE_PERC: (
        "Fraction of the heap held by loads that have not completed."
    ),
    HeapMetrics.FREE_BYTES: "Bytes of the heap that no chunk has, in each worker.",
    HeapMetrics.LARGEST_FREE_EXTENT: (
        "The most bytes that one chunk could take without an eviction, in each worker."
    ),
    HeapMetrics.PINNED_SHARE: "Fraction of the heap that is page-locked.",
}
GAUGES_BY_GROUP = {
    HeapMetrics.LIVE_BYTES: "Bytes of the chunks in the heap, in each worker.",
    HeapMetrics.LIVE_CHUNKS: "Chunks in the heap.",
}
COUNTERS = {
    HeapMetrics.EVICTED_BYTES: "Bytes evicted to make room, in each worker.",
    HeapMetrics.FAILED_CHUNKS: "Chunks dropped because a copy of theirs failed.",
    HeapMetrics.REFUSED_STORES: "Stores that found no room.",
}
COUNTERS_BY_GROUP = {
    HeapMetrics.EVICTED_CHUNKS: "Chunks evicted to make room.",
    HeapMetrics.HIT_BYTES: "Bytes of chunks that loads were told to read, in each worker.",
}
BY_GROUP = ("group",)


def build_metric_definitions(
    extra_config: Mapping[str, Any],
) -> dict[str, OffloadingMetricMetadata]:
    """What ``OffloadingSpec.build_metric_definitions`` returns for a kvheap tier.

    Args:
        extra_config: ``kv_connector_extra_config``.
    """
    definitions: dict[str, OffloadingMetricMetadata] = {}
    for name, text in GAUGES.items():
        definitions[name] = OffloadingGaugeMetadata(documentation=text)
    for name, text in GAUGES_BY_GROUP.items():
        definitions[name] = OffloadingGaugeMetadata(documentation=text, labelnames=BY_GROUP)
    for name, text in COUNTERS.items():
        definitions[name] = OffloadingCounterMetadata(documentation=text)
    for name, text in COUNTERS_BY_GROUP.items():
        definitions[name] = OffloadingCounterMetadata(documentation=text, labelnames=BY_GROUP)
    definitions[CPUOffloadingMetrics.CPU_ALLOCATION_SIZE] = OffloadingHistogramMetadata(
        documentation="Chunks for which a store needed room.", buckets=ALLOCATION_BUCKETS
    )
    if int(extra_config.get("store_threshold") or 0) >= 2:
        definitions[CPUOffloadingMetrics.STORES_SKIPPED] = OffloadingCounterMetadata(
            documentation="Chunks not stored because they were not offered often enough."
        )
    return definitions


class MetricsFeed:
    """Statistics of a store as vLLM's: gauges as they are, counters since the last call."""

    def __init__(self) -> None:
        self.allocations: list[int] = []
        """Chunks for which each store since the last call needed room."""
        self.skipped: int | None = None
        """Chunks not admitted since the last call; None: all are."""
        self.pinned_share: float | None = None
        """The page-locked share of the heap, if it is known."""
        self._told: dict[tuple[str, tuple[str, ...]], int] = {}

    def take(self, stats: StoreStats) -> OffloadingConnectorStats:
        """What is new since the last call."""
        feed = OffloadingConnectorStats()
        heap = stats.heap_bytes or 1
        writing, reading = stats.pending_bytes / heap, stats.loading_bytes / heap
        feed.set_gauge(CPUOffloadingMetrics.CPU_CACHE_USAGE_PERC, writing + reading)
        feed.set_gauge(CPUOffloadingMetrics.CPU_CACHE_WRITE_USAGE_PERC, writing)
        feed.set_gauge(CPUOffloadingMetrics.CPU_CACHE_READ_USAGE_PERC, reading)
        feed.set_gauge(HeapMetrics.FREE_BYTES, stats.free_bytes)
        feed.set_gauge(HeapMetrics.LARGEST_FREE_EXTENT, stats.largest_free_extent)
        if self.pinned_share is not None:
            feed.set_gauge(HeapMetrics.PINNED_SHARE, self.pinned_share)
        for group in stats.groups:
            label = (group.name,)
            feed.set_gauge(HeapMetrics.LIVE_BYTES, group.live_bytes, label)
            feed.set_gauge(HeapMetrics.LIVE_CHUNKS, group.chunks, label)
            self._add(feed, HeapMetrics.EVICTED_CHUNKS, group.evicted_chunks, label)
            self._add(feed, HeapMetrics.HIT_BYTES, group.hit_bytes, label)
        self._add(feed, HeapMetrics.EVICTED_BYTES, stats.evicted_bytes)
        self._add(feed, HeapMetrics.FAILED_CHUNKS, stats.failed_chunks)
        self._add(feed, HeapMetrics.REFUSED_STORES, stats.refused_stores)
        if self.skipped is not None:
            feed.increase_counter(CPUOffloadingMetrics.STORES_SKIPPED, self.skipped)
            self.skipped = 0
        for num_chunks in self.allocations:
            feed.observe_histogram(CPUOffloadingMetrics.CPU_ALLOCATION_SIZE, num_chunks)
        self.allocations = []
        return feed

    def _add(
        self, feed: OffloadingConnectorStats, name: str, count: int, label: tuple[str, ...] = ()
    ) -> None:
        """Add what a counter has grown by."""
        grown = count - self._told.get((name, label), 0)
        if grown:
            feed.increase_counter(name, grown, label)
            self._told[name, label] = count
