from __future__ import annotations

import gc
import inspect
import logging
import os
import threading
import time
import weakref
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("prometheus_client", reason="needs prometheus_client: kvheap[prometheus]")

from forked_child import in_a_child
from prometheus_client import CollectorRegistry
from promlint import lint
from watched_world import LAYOUT, MadeUp, Scrape, chunks, heap_of, whole_world

from kvheap import (
    AddressManager,
    BufferAllocator,
    DoubleFreeError,
    HostMemoryAllocator,
    MixedMemoryAllocator,
    PinMemoryAllocator,
    PrefixStore,
    TransferError,
    foreign_transfer,
    offload,
)
from kvheap.errors import ClosedError
from kvheap.files.tier_stats import FileTierStats
from kvheap.heaps.allocator_stats import AllocatorStats
from kvheap.metrics import Kind, Metrics, gauge, watch
from kvheap.metrics.calls import rest
from kvheap.metrics.tables import (
    ADDRESSES,
    FILE_TIER,
    HEAP,
    KINDS,
    NODE,
    PREFIX_STORE,
    SHARED_HEAP,
)
from kvheap.prefix.store import StoreStats

STATES = ("live", "pinned", "pending", "quarantined", "free", "other")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Any:
    made = Metrics(registry)
    yield made
    made.close()


def states(scrape: Scrape, heap: str) -> dict[str, float]:
    """Pages of a heap by state, but for those with none."""
    found = {
        state: scrape.value("kvheap_heap_bytes", heap=heap, state=state) / 4096 for state in STATES
    }
    return {state: pages for state, pages in found.items() if pages}


class Work:
    """A transfer of others: it runs, fails without an end, or ends."""

    def __init__(self) -> None:
        self.state = "runs"

    def query(self) -> bool:
        if self.state == "fails":
            raise RuntimeError("the peer is silent")
        return self.state == "ends"


class TestNames:
    def test_every_metric_follows_the_rules_of_prometheus(self, tmp_path: Path) -> None:
        with whole_world(tmp_path) as scrape:
            assert lint(scrape.families) == []

    def test_describe_names_what_collect_returns(self, tmp_path: Path) -> None:
        described = {family.name for family in Metrics(CollectorRegistry()).describe()}
        with whole_world(tmp_path) as scrape:
            found = {family.name for family in scrape.families}
        assert found == described

    def test_a_registry_takes_one_collector(self, registry: CollectorRegistry) -> None:
        Metrics(registry)
        with pytest.raises(ValueError, match="kvheap_open"):
            Metrics(registry)

    @pytest.mark.parametrize("name", KINDS)
    def test_every_kind_is_of_a_class(self, name: str) -> None:
        module, _, qualified = name.rpartition(".")
        if find_spec(module.rpartition(".")[0]) is None:
            pytest.skip(f"there is no {module} here")
        found = getattr(__import__(module, fromlist=[qualified]), qualified)
        assert (found.__module__, found.__qualname__) == (module, qualified)

    @pytest.mark.parametrize(
        ("kind", "stats", "left_out"),
        [
            (HEAP, AllocatorStats, {"heap_bytes", "allocated_bytes", "pending_bytes", "device",
                                    "align_bytes", "segments"}),
            (PREFIX_STORE, StoreStats, {"ready_chunks", "ready_bytes"}),
            (FILE_TIER, FileTierStats, {"chunk_bytes", "place_bytes", "dropped_chunks",
                                        "is_direct", "is_durable"}),
        ],
    )  # fmt: skip
    def test_no_statistic_is_forgotten(self, kind: Kind, stats: Any, left_out: set[str]) -> None:
        exported = {field for metric in kind.metrics for field in metric.fields.values()}
        assert {field.name for field in fields(stats)} - exported == left_out


class TestHeaps:
    def test_bytes_by_state_add_up(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        heap = heap_of(64, address_manager=(manager := AddressManager(64 * 4096)))
        metrics.watch(heap, "h")
        before = Scrape(registry).value("kvheap_quarantined_transfers")
        batches = [heap.batched_allocate([4096], torch.uint8, n) for n in (4, 3, 2, 5)]
        one, two, three, four = batches
        one[0].pin()
        one[2].pin(ttl=60)
        works = [Work(), Work()]
        for batch, work in zip((two, three), works, strict=True):
            foreign_transfer(work, source=batch)
            heap.batched_free(batch)
        works[1].state = "fails"
        heap.lease(four, ttl=60, rows=[1, 2])
        manager.allocate(4096)  # another user of the address space
        heap.stats()
        scrape = Scrape(registry)
        assert states(scrape, "h") == {
            "live": 2 + 3, "pinned": 2 + 2, "pending": 3, "quarantined": 2, "other": 1, "free": 49
        }  # fmt: skip
        assert scrape.value("kvheap_heap_live_blocks") == 9
        assert scrape.value("kvheap_heap_pinned_blocks") == 4
        assert scrape.value("kvheap_quarantined_transfers") == before + 1
        assert scrape.value("kvheap_failed_transfers_total", path="foreign") >= 1
        works[0].state = works[1].state = "ends"
        heap.stats()
        after = states(Scrape(registry), "h")
        assert (after.get("pending"), after.get("quarantined"), after["free"]) == (None, None, 54)

    def test_failures_leaks_and_extents(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        heap = heap_of(8)
        metrics.watch(heap, "h")
        assert heap.batched_allocate([4096], torch.uint8, 9) is None
        kept = heap.batched_allocate([4096], torch.uint8, 4)
        heap.batched_allocate([4096], torch.uint8, 2)  # dropped
        gc.collect()
        heap.free(kept[1])
        heap.stats()
        scrape = Scrape(registry)
        assert scrape.value("kvheap_heap_failed_allocations_total", heap="h") == 1
        assert scrape.value("kvheap_heap_dropped_blocks_total", heap="h") == 2
        assert scrape.value("kvheap_heap_free_extents", heap="h") == 2
        assert scrape.value("kvheap_heap_largest_free_extent_bytes", heap="h") == 4 * 4096
        assert scrape.value("kvheap_heap_oldest_block_age_seconds", heap="h") > 0

    def test_what_is_dropped_vanishes_and_is_not_kept(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        heap, other = heap_of(), heap_of()
        metrics.watch(heap, "h")
        metrics.watch(other, "o")
        reference = weakref.ref(heap)
        Scrape(registry)
        del heap
        assert reference() is None  # at once: nothing refers to it in a circle
        scrape = Scrape(registry)
        assert scrape.values("kvheap_heap_free_extents", heap="h") == []
        assert scrape.values("kvheap_heap_free_extents", heap="o") == [1]
        assert metrics.watch(heap_of(), "h") == "h"  # the name is free again

    def test_a_closed_heap_is_closed_and_nothing_else(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        heap = heap_of()
        metrics.watch(heap, "h")
        heap.close()
        scrape = Scrape(registry)
        assert scrape.value("kvheap_open", kind="heap", name="h") == 0
        assert scrape.values("kvheap_heap_bytes") == []
        assert scrape.values("kvheap_scrape_errors_total") == []

    def test_names_are_unique(self, metrics: Metrics) -> None:
        heap, other = heap_of(), heap_of()
        assert metrics.watch(heap) == "TensorMemoryAllocator-0"
        assert metrics.watch(other) == "TensorMemoryAllocator-1"
        with pytest.raises(ValueError, match="watched already, as 'TensorMemoryAllocator-0'"):
            metrics.watch(heap, "again")
        with pytest.raises(ValueError, match="got 'TensorMemoryAllocator-1', which is Tensor"):
            metrics.watch(third := heap_of(), "TensorMemoryAllocator-1")
        metrics.unwatch("TensorMemoryAllocator-1")
        assert metrics.watch(third, "TensorMemoryAllocator-1")
        with pytest.raises(KeyError, match="'nobody'"):
            metrics.unwatch("nobody")

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: 3, "stats.. can be watched, got 3"),
            (lambda: HostMemoryAllocator, "got <class"),
            (BufferAllocator, "stats.. can be watched"),
            (
                lambda: MixedMemoryAllocator(PinMemoryAllocator(4096, allow_unpinned=True)),
                "which is its pin_allocator",
            ),
        ],
    )
    def test_what_cannot_be_watched(self, metrics: Metrics, make: Any, match: str) -> None:
        with pytest.raises(TypeError, match=match):
            metrics.watch(make())

    def test_wrong_arguments(self, metrics: Metrics) -> None:
        with pytest.raises(TypeError, match="name must be a text, got 3"):
            metrics.watch(heap_of(), 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="kind must be a Kind, got 'heap'"):
            metrics.watch(heap_of(), kind="heap")  # type: ignore[arg-type]

    def test_an_engine_allocates_while_it_is_scraped(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        heap = heap_of(1024)
        metrics.watch(heap, "h")
        kept = [heap.batched_allocate([4096], torch.uint8, 1) for _ in range(600)]
        has_ended = threading.Event()
        wrong: list[object] = []

        def scrape() -> None:
            while not has_ended.is_set():
                found = states(Scrape(registry), "h")
                if sum(found.values()) != 1024 or min(found.values()) < 0:
                    wrong.append(found)

        threads = [threading.Thread(target=scrape) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            batch = heap.batched_allocate([4096], torch.uint8, 64)
            batch[3].pin()
            batch[3].unpin()
            heap.batched_free(batch)
        has_ended.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert heap.memcheck()
        assert len(kept) == 600

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.parametrize("is_shared", [True, False])
    def test_a_forked_child_scrapes(
        self, metrics: Metrics, registry: CollectorRegistry, is_shared: bool
    ) -> None:
        heap = HostMemoryAllocator(1 << 20, shared=True) if is_shared else heap_of(256)
        metrics.watch(heap, "h")
        batch = heap.batched_allocate([4096], torch.uint8, 3)

        def child() -> list[float]:
            scrape = Scrape(registry)
            return [
                scrape.value("kvheap_heap_view_only"),
                scrape.value("kvheap_heap_bytes", state="live"),
                scrape.value("kvheap_heap_calls_total", call="allocate"),
            ]

        assert in_a_child(child) == [is_shared, 3 * 4096, 1]
        assert len(batch) == 3


class TestCalls:
    def test_each_call_is_counted_once(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        heap, other = heap_of(), heap_of()
        metrics.watch(heap, "h")
        heap.free(heap.allocate([64], torch.float32))
        heap.batched_free(heap.batched_allocate([64], torch.float32, 3))
        batch = heap.batched_allocate([64], torch.float32, 2, source=torch.ones(2, 64))
        heap.batched_free(batch, out=torch.empty(2, 64))
        heap.batched_free(list(heap.batched_allocate([64], torch.float32, 2)))
        assert heap.batched_allocate([64], torch.float32, 999) is None
        other.free(other.allocate([64], torch.float32))
        scrape = Scrape(registry)
        assert scrape.value("kvheap_heap_calls_total", call="allocate") == 5
        assert scrape.value("kvheap_heap_calls_total", call="free") == 4

    def test_one_in_sixteen_is_timed(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        heap = heap_of()
        metrics.watch(heap, "h")
        for _ in range(33):
            heap.free(heap.allocate([64], torch.float32))
        scrape = Scrape(registry)
        name = "kvheap_heap_call_duration_seconds"
        assert scrape.value(f"{name}_count", call="free") == 3
        assert 0 < scrape.value(f"{name}_sum", call="free") < 1
        counts = scrape.values(f"{name}_bucket", call="free")
        assert counts == sorted(counts)
        assert counts[-1] == 3

    def test_an_error_is_a_call(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        heap = heap_of()
        metrics.watch(heap, "h")
        batch = heap.batched_allocate([64], torch.float32, 3)
        heap.batched_free(batch)
        with pytest.raises(DoubleFreeError):
            heap.batched_free(batch)
        assert Scrape(registry).value("kvheap_heap_calls_total", call="free") == 2

    def test_buckets_hold_what_they_say(self) -> None:
        from kvheap.metrics.calls import BOUNDS_NS, CallTimes

        times, durations = CallTimes(), [0, 1, 1023, 1024, 1025, 1 << 20, (1 << 30) + 1, 1 << 40]
        for each in durations:
            times.add(each)
        expected = [int(np.sum(np.array(durations) <= bound)) for bound in BOUNDS_NS]
        assert times.cumulative() == [*expected, len(durations)]

    def test_engine_copies_are_counted(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        from kvheap import PagedKVCache

        layers = [torch.randn(2, 16, 16, 2, 8).half() for _ in range(2)]
        cache = PagedKVCache.of("vllm-flash-nhd", layers)
        heap = heap_of()
        metrics.watch(heap, "h")
        batch = heap.batched_store(cache, torch.arange(64), chunk_tokens=32)
        heap.batched_load(batch, cache, torch.arange(64)).result()
        scrape = Scrape(registry)
        counts = {
            call: scrape.value("kvheap_heap_calls_total", call=call)
            for call in ("allocate", "free", "store", "load")
        }
        assert counts == {"allocate": 1, "free": 0, "store": 1, "load": 1}

    def test_methods_are_their_own_unless_something_is_watched(
        self, registry: CollectorRegistry
    ) -> None:
        from kvheap import TensorMemoryAllocator

        gc.collect()
        rest()  # heaps of other tests are gone
        before = TensorMemoryAllocator.allocate_blocks
        made = Metrics(registry)
        heap = heap_of()
        made.watch(heap, "h", calls=False)
        assert TensorMemoryAllocator.allocate_blocks is before
        made.unwatch("h")
        made.watch(heap, "h")
        assert TensorMemoryAllocator.allocate_blocks is not before
        watched = TensorMemoryAllocator.allocate_blocks
        assert inspect.signature(watched) == inspect.signature(before)
        assert (watched.__name__, watched.__doc__) == (before.__name__, before.__doc__)
        assert vars(watched)["_torchdynamo_disable"]  # no compiler looks into it
        made.unwatch("h")
        assert TensorMemoryAllocator.allocate_blocks is before
        made.watch(heap, "h")
        del heap
        gc.collect()
        Scrape(registry)
        assert TensorMemoryAllocator.allocate_blocks is before

    def test_two_registries_watch_one_heap(self) -> None:
        registries = [CollectorRegistry(), CollectorRegistry()]
        both = [Metrics(each) for each in registries]
        heap = heap_of()
        for each in both:
            each.watch(heap, "h")
        both[0].close()
        heap.allocate([64], torch.float32)
        assert Scrape(registries[1]).value("kvheap_heap_calls_total", call="allocate") == 1
        assert Scrape(registries[0]).names == set()

    def test_hits_and_misses_of_a_store(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        store: PrefixStore[str] = PrefixStore(heap_of(), LAYOUT)
        metrics.watch(store, "s")
        store.store(["a", "b"], chunks(2))
        store.prefix_length(["a", "b", "c", "d", "e"])
        store.prefix_length(["x"])
        store.prefix_length(iter(["a", "x"]))
        scrape = Scrape(registry)
        assert scrape.value("kvheap_prefix_lookups_total", store="s") == 3
        assert scrape.value("kvheap_prefix_hit_chunks_total", store="s") == 3
        assert scrape.value("kvheap_prefix_missed_chunks_total", store="s") == 4

    def test_evictions_and_states_of_a_store(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        store: PrefixStore[str] = PrefixStore(heap_of(4), LAYOUT)
        metrics.watch(store, "s")
        store.store(["a", "b", "c"], chunks(3))
        hold = store.hold(["a"])
        store.store(["d", "e"], chunks(2))
        scrape = Scrape(registry)
        assert scrape.value("kvheap_prefix_evicted_chunks_total") == 1
        assert scrape.value("kvheap_prefix_evicted_bytes_total") == 4096
        assert scrape.value("kvheap_prefix_chunks", state="held") == 1
        assert scrape.value("kvheap_prefix_chunks", state="evictable") == 3
        hold.release()
        store.close()
        assert Scrape(registry).value("kvheap_open", kind="store") == 0


class TestTransfers:
    def test_by_direction_and_path(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        near, far = heap_of(), heap_of()
        metrics.watch(near, "h")
        before = Scrape(registry)
        batch = near.batched_allocate([4096], torch.uint8, 3)
        offload(batch, into=far).transfer.result()
        with pytest.raises(TransferError):
            foreign_transfer(_failed, target=batch, name="a peer with any name").result()
        after = Scrape(registry)

        def change(name: str, **labels: str) -> float:
            earlier = before.values(name, **labels)
            return after.value(name, **labels) - (earlier[0] if earlier else 0)

        assert change("kvheap_transfers_total", direction="h2h", path="host") == 1
        assert change("kvheap_transfer_bytes_total", direction="h2h", path="host") == 3 * 4096
        assert change("kvheap_transfer_runs_total", direction="h2h", path="host") == 1
        assert change("kvheap_transfers_total", path="foreign") == 1
        assert change("kvheap_failed_transfers_total", path="foreign") == 1
        assert change("kvheap_failed_transfers_total", path="host") == 0

    def test_failures_are_found_without_scrapes(
        self, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kvheap.metrics import transfer_counts as counting

        monkeypatch.setattr(counting, "MAX_WATCHED", 4)
        heap = heap_of()
        metrics.watch(heap, "h")
        batch = heap.batched_allocate([4096], torch.uint8, 1)
        for _ in range(50):
            with pytest.raises(TransferError):
                foreign_transfer(_failed, target=batch).result()
        counts = counting.transfer_counts
        assert len(vars(counts)["_watched"]) <= 5


def _failed() -> Any:
    from concurrent.futures import Future

    future: Future[None] = Future()
    future.set_exception(TransferError("it has failed, and ended"))
    return future


@dataclass(frozen=True)
class PoolStats:
    used_bytes: int
    lease_s: float
    is_owner: bool
    name: str


class Pool:
    """As another package would make one."""

    closed = False

    def __init__(self) -> None:
        self.error: Exception | None = None

    def stats(self) -> PoolStats:
        if self.error is not None:
            raise self.error
        return PoolStats(5, 1.5, True, "a name")


class TestOfParts:
    """Objects whose classes are not asked for here: their tables, with made-up numbers."""

    @pytest.mark.parametrize("kind", [NODE, SHARED_HEAP], ids=lambda kind: kind.name)
    def test_names_follow_the_rules(
        self, metrics: Metrics, registry: CollectorRegistry, kind: Kind
    ) -> None:
        made = MadeUp(kind)
        metrics.watch(made, "m", kind=kind)
        scrape = Scrape(registry)
        assert lint(scrape.families) == []
        for metric in kind.metrics:
            assert scrape.values(metric.name, **{kind.name: "m"}) == [3] * len(metric.fields)

    def test_what_only_others_know_is_left_out(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        class View:
            def stats(self) -> dict[str, Any]:
                return {"heap_bytes": 4096, "ready_chunks": 2, "is_owner": False, "keeper": None}

        view = View()
        metrics.watch(view, "v", kind=SHARED_HEAP)
        scrape = Scrape(registry)
        assert scrape.values("kvheap_shared_heap_chunks") == [2]
        assert scrape.values("kvheap_shared_heap_stored_chunks_total") == []
        assert scrape.value("kvheap_open", name="v") == 1


class TestAnyObject:
    def test_its_numbers_are_exported(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        pool = Pool()
        assert metrics.watch(pool) == "Pool-0"
        scrape = Scrape(registry)
        assert scrape.value("kvheap_pool_used_bytes", pool="Pool-0") == 5
        assert scrape.value("kvheap_pool_lease_seconds", pool="Pool-0") == 1.5
        assert scrape.value("kvheap_pool_is_owner", pool="Pool-0") == 1
        assert lint(scrape.families) == []

    def test_a_kind_says_what_they_mean(
        self, metrics: Metrics, registry: CollectorRegistry
    ) -> None:
        kind = Kind(
            "pool", (gauge("kvheap_pools_bytes", {"used": "used_bytes"}, "Text.", "state"),)
        )
        pool = Pool()
        metrics.watch(pool, "p", kind=kind)
        assert Scrape(registry).value("kvheap_pools_bytes", pool="p", state="used") == 5

    def test_an_error_hides_that_object_only(
        self,
        metrics: Metrics,
        registry: CollectorRegistry,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        pool, heap = Pool(), heap_of()
        metrics.watch(pool, "p")
        metrics.watch(heap, "h")
        pool.error = RuntimeError("broken")
        with caplog.at_level(logging.ERROR, "kvheap"):
            Scrape(registry)
            scrape = Scrape(registry)
        assert scrape.value("kvheap_scrape_errors_total", name="p") == 2
        assert scrape.values("kvheap_heap_free_extents") == [1]
        assert [record.message for record in caplog.records] == [
            "the metrics of 'p' cannot be read"
        ]

    def test_one_that_is_closed(self, metrics: Metrics, registry: CollectorRegistry) -> None:
        pool = Pool()
        metrics.watch(pool, "p")
        pool.error = ClosedError("closed")
        assert Scrape(registry).value("kvheap_open", kind="pool", name="p") == 0


def test_addresses_alone_need_no_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from kvheap import AddressManager; from kvheap.metrics import watch\n"
        "from prometheus_client import REGISTRY, generate_latest\n"
        "manager = AddressManager(1 << 20); watch(manager, 'm')\n"
        "assert b'kvheap_address_space_free_extents' in generate_latest(REGISTRY)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_default_registry() -> None:
    from prometheus_client import REGISTRY

    heap, other = heap_of(), heap_of()
    name = watch(heap)
    assert watch(other) != name
    scrape = Scrape(REGISTRY)
    assert scrape.value("kvheap_heap_free_extents", heap=name) == 1
    assert ADDRESSES.name == "address_space"
