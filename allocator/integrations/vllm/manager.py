"""``KVHeapManager``: the scheduler's half of the tier, behind vLLM's ``OffloadingManager``.

It translates: keys, places and order are :class:`ChunkStore`'s. What it adds is what only vLLM
knows: requests, events, and metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import fields, replace
from operator import itemgetter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingKVEventsConfig,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    make_offload_key,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvheap.integrations.vllm.chunk_store import ChunkStore
from kvheap.integrations.vllm.eviction import POLICIES
from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.heap_label import HeapReport
from kvheap.integrations.vllm.locations import ChunkLocations
from kvheap.integrations.vllm.metrics import MetricsFeed
from kvheap.integrations.vllm.offers import OfferCounts
from kvheap.integrations.vllm.restart import RestartIndex
from kvheap.integrations.vllm.settings import TierSettings

__all__ = ["CONFIG_INFO_KEYS", "KVHeapManager"]

HIT, MISS, HIT_PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING

TAG_BYTES = 4
"""A key ends in its group's number, in so many bytes."""

HAS_METADATA_ONLY = "metadata_only" in {field.name for field in fields(OffloadingEvent)}
"""Whether an event can say that chunks are gone that were never announced (vLLM 0.33)."""

CONFIG_INFO_KEYS = ("heap_bytes", "blocks_per_chunk", "eviction_policy", "chunk_bytes")
"""Labels that :meth:`KVHeapManager.config_info` fills, for the spec's ``config_info_keys``."""

NOWHERE = ChunkLocations([], [])


class _Access:
    """The chunks that one request has used or stored, the first one first."""

    __slots__ = ("has_stored", "keys", "reset_count")

    def __init__(self, reset_count: int) -> None:
        self.reset_count = reset_count
        self.keys: dict[OffloadKey, None] = {}
        self.has_stored = False


class KVHeapManager(OffloadingManager):  # type: ignore[misc,unused-ignore]
    """Chunks of unlike groups in one heap, each with its own bytes.

    Args:
        groups: what a chunk of each group takes. Keys carry a group's ``group_id``, or its position
            here if it has none.
        settings: of the tier.
        kv_events_config: whether vLLM publishes events; None: it does not.
        index: keeps the books for the next process; None: it begins with an empty tier.

    Raises:
        ValueError: a chunk is larger than the heap, or two groups have one number.
    """

    def __init__(
        self,
        groups: Sequence[ChunkGroup],
        settings: TierSettings,
        kv_events_config: OffloadingKVEventsConfig | None = None,
        index: RestartIndex | None = None,
    ) -> None:
        tagged: dict[Hashable, ChunkGroup] = {}
        for position, group in enumerate(groups):
            group_id = position if group.group_id is None else group.group_id
            tag = bytes(make_offload_key(b"", group_id))
            if tag in tagged:
                raise ValueError(
                    f"groups {tagged[tag].name!r} and {group.name!r} both have number {group_id}"
                )
            tagged[tag] = group
        self.settings = settings
        self._groups = tuple(groups)
        self._store: ChunkStore[OffloadKey] = ChunkStore(
            settings.heap_bytes,
            tagged,
            POLICIES[settings.eviction_policy](settings.heap_bytes),
            tag_of=itemgetter(slice(-TAG_BYTES, None)),
        )
        self._find = self._store.find
        self._index = index
        self._reset_count = 0
        self._events: list[OffloadingEvent] | None = None
        if kv_events_config is not None and kv_events_config.enable_kv_cache_events:
            self._events = []
        self._feed = MetricsFeed()
        self._offers: OfferCounts[OffloadKey] | None = None
        if settings.store_threshold >= 2:
            self._offers = OfferCounts(settings.store_threshold, settings.max_tracker_size)
            self._feed.skipped = 0

    @property
    def store(self) -> ChunkStore[OffloadKey]:
        """The books: for statistics and checks."""
        return self._store

    # -- loads ---------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a chunk can be loaded, will be, or is not there. O(1)."""
        chunk = self._find(key)
        if chunk is None:
            return MISS
        return HIT if chunk.loads >= 0 else HIT_PENDING

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        """Host memory."""
        return CacheHitSource.HOST

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> ChunkLocations:
        """Protect chunks until :meth:`complete_load`, and tell where they are.

        Raises:
            KeyError: a chunk, which it names, is not ready; nothing is protected.
        """
        addresses, sizes = self._store.begin_load(keys)
        self._use(keys, self._access(req_context))
        return ChunkLocations.of_arrays(addresses, sizes)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """A request uses chunks that it need not load."""
        self._store.touch(keys)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """A load has ended, well or not."""
        self._store.end_load(keys)

    # -- stores --------------------------------------------------------------------------------

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """Find room for chunks that are not there yet. None: they do not fit."""
        store, find, access = self._store, self._find, self._access(req_context)
        offered: Collection[OffloadKey] = keys
        if self._offers is not None:
            offered = self._admitted(keys, self._offers)
        plan = store.begin_store(offered)
        if plan.evicted and self._events is not None:
            self._events.append(OffloadingEvent(plan.evicted, Medium.CPU, removed=True))
        if len(plan.keys) < len(keys):
            ready = [key for key in keys if (chunk := find(key)) is not None and chunk.loads >= 0]
            self._use(ready, access)
        if plan.is_refused:
            return None
        if not plan.keys:
            return PrepareStoreOutput([], NOWHERE, [])
        access.keys.update(dict.fromkeys(plan.keys))
        access.has_stored = True
        self._feed.allocations.append(len(plan.keys))
        return PrepareStoreOutput(
            plan.keys, ChunkLocations.of_arrays(plan.addresses, plan.sizes), plan.evicted
        )

    def _admitted(
        self, keys: Collection[OffloadKey], offers: OfferCounts[OffloadKey]
    ) -> list[OffloadKey]:
        """The keys that are there, or have been offered often enough."""
        find, distinct = self._find, dict.fromkeys(keys)
        often = set(offers.admitted(distinct))
        admitted = [key for key in distinct if key in often or find(key) is not None]
        assert self._feed.skipped is not None
        self._feed.skipped += len(distinct) - len(admitted)
        return admitted

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """Stores have ended: from now on the chunks are found, or gone."""
        done = self._store.end_store(keys, success)
        if done and self._events is not None:
            if success:
                self._events.append(OffloadingEvent(done, Medium.CPU, removed=False))
            elif HAS_METADATA_ONLY:
                gone: dict[str, Any] = {"metadata_only": True}
                self._events.append(OffloadingEvent(done, Medium.CPU, removed=True, **gone))

    def forget(self, keys: Iterable[OffloadKey]) -> None:
        """Drop chunks of which a copy has failed; see ``ChunkStore.forget``."""
        gone = self._store.forget(keys)
        if gone and self._events is not None:
            self._events.append(OffloadingEvent(gone, Medium.CPU, removed=True))

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Begin a request: chunks that it finds stored already are not stored again."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Tell the order which chunks belong together, and which of them is the prefix's head."""
        access: _Access | None = req_context.get_state(_Access)
        if access is None or access.reset_count != self._reset_count or not access.has_stored:
            return
        access.has_stored = False
        self._store.settle(_in_prefix_order(list(access.keys), req_context))

    def _use(self, keys: Collection[OffloadKey], access: _Access) -> None:
        """Count the chunks as used by a request, unless it has used or stored them before.

        At once, so that the chunks that the request brings do not push out those it stands on.
        """
        met = access.keys
        if new := [key for key in keys if key not in met]:
            met.update(dict.fromkeys(new))
            self._store.touch(new)

    def _access(self, req_context: ReqContext) -> _Access:
        access: _Access | None = req_context.get_state(_Access)
        if access is None or access.reset_count != self._reset_count:
            access = _Access(self._reset_count)
            req_context.set_state(access)
        return access

    # -- the whole -----------------------------------------------------------------------------

    def take_events(self) -> Iterable[OffloadingEvent]:
        """The events since the last call."""
        if not self._events:
            return []
        events, self._events = self._events, []
        return [event for raw in events if (event := self._current(raw)) is not None]

    def _current(self, event: OffloadingEvent) -> OffloadingEvent | None:
        """An event without the keys that were stored again before it was taken."""
        if not getattr(event, "metadata_only", False):
            return event
        keys = [key for key in event.keys if key not in self._store]
        return replace(event, keys=keys) if keys else None

    def reset_cache(self) -> None:
        """Drop every chunk. What is under way ends unheard; vLLM flushes it before the next one."""
        gone = self._store.reset()
        self._reset_count += 1
        if gone and self._events is not None:
            self._events.append(OffloadingEvent(gone, Medium.CPU, removed=True))

    def note_pinned_share(self, share: float) -> None:
        """Report in the metrics which share of the heap is page-locked, from 0 to 1."""
        self._feed.pinned_share = share

    def get_stats(self) -> OffloadingConnectorStats:
        """Metrics: gauges as they are, counters since the last call. O(groups)."""
        return self._feed.take(self._store.stats())

    def config_info(self) -> list[dict[str, str | int | float | bool]]:
        """What does not change: vLLM 0.33 publishes it once."""
        chunk_bytes = ", ".join(f"{group.name}: {group.chunk_bytes}" for group in self._groups)
        values = (
            self.settings.heap_bytes,
            self.settings.blocks_per_chunk,
            self.settings.eviction_policy,
            chunk_bytes,
        )
        return [dict(zip(CONFIG_INFO_KEYS, values, strict=True))]

    def restore_index(self, reports: Iterable[HeapReport]) -> None:
        """Find the chunks that an earlier process left in the heaps.

        Args:
            reports: of all workers, about their heaps.
        """
        if self._index is None:
            return
        found = self._index.restore(self._store, reports)
        if found and self._events is not None:
            self._events.append(OffloadingEvent(found, Medium.CPU, removed=False))

    def shutdown(self) -> None:
        """Write the index, if there is to be one; drop every chunk, without events."""
        if self._index is not None:
            self._index.save(self._store)
        self._store.reset()
        self._reset_count += 1


def _in_prefix_order(keys: list[OffloadKey], req_context: ReqContext) -> list[OffloadKey]:
    """The keys of a request by their position in it, over all groups, if all are known."""
    position: Callable[[OffloadKey], int | None] = req_context.get_offload_key_position
    positions = [found for key in keys if (found := position(key)) is not None]
    if len(positions) < len(keys):
        return keys
    return [keys[at] for _, at in sorted(zip(positions, range(len(keys)), strict=True))]
