"""``KVHeapManager`` behind the interfaces of the installed vLLM, 0.32 or 0.33.

Skipped without vLLM; with ``KVHEAP_REQUIRE_VLLM`` set, its absence is a failure.
"""

from __future__ import annotations

import inspect
import pickle
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from naive_chunks import NaiveChunks
from vllm_scenes import part_of_vllm

from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.settings import TierSettings

base = part_of_vllm("vllm.v1.kv_offload.base")
cpu = part_of_vllm("vllm.v1.kv_offload.cpu.manager")
policies = part_of_vllm("vllm.v1.kv_offload.cpu.policies.base")
connector_metrics = part_of_vllm("vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics")
from kvheap.integrations.vllm.locations import ChunkLocations  # noqa: E402
from kvheap.integrations.vllm.manager import (  # noqa: E402
    CONFIG_INFO_KEYS,
    HAS_METADATA_ONLY,
    KVHeapManager,
)
from kvheap.integrations.vllm.metrics import build_metric_definitions  # noqa: E402

HIT, MISS, PENDING = (getattr(base.LookupResult, name) for name in ("HIT", "MISS", "HIT_PENDING"))

FULL, WINDOW = 2560, 1024
GROUPS = (ChunkGroup("full", FULL, 0), ChunkGroup("window", WINDOW, 2))


def key_of(name: str) -> Any:
    """The key of ``f12`` (group 0) or ``w12`` (group 2)."""
    return base.make_offload_key(name.encode().rjust(32, b"."), {"f": 0, "w": 2}[name[0]])


def keys_of(*names: str) -> list[Any]:
    return [key_of(name) for name in names]


def names_of(keys: Any) -> list[str]:
    return [base.get_offload_block_hash(key).decode().lstrip(".") for key in keys]


def manager_of(heap_bytes: int, *, events: bool = True, **extra: Any) -> KVHeapManager:
    settings = TierSettings.of({"cpu_bytes_to_use": heap_bytes, **extra})
    return KVHeapManager(GROUPS, settings, base.OffloadingKVEventsConfig(events, False))


class Request:
    """A request of the scheduler, which finds and stores chunks."""

    number = 0

    def __init__(self, manager: Any) -> None:
        Request.number += 1
        self.manager = manager
        self.context = base.ReqContext(f"r{Request.number}")
        self.policy = manager.on_new_request(self.context).policy

    def look(self, *names: str) -> list[Any]:
        return [self.manager.lookup(key_of(name), self.context) for name in names]

    def store(self, *names: str, end: bool = True, success: bool = True) -> Any:
        output = self.manager.prepare_store(keys_of(*names), self.context)
        if end and output is not None:
            self.manager.complete_store(set(output.keys_to_store), self.context, success)
        return output

    def load(self, *names: str, end: bool = True) -> Any:
        locations = self.manager.prepare_load(keys_of(*names), self.context)
        if end:
            self.manager.complete_load(set(keys_of(*names)), self.context)
        return locations

    def finish(self) -> None:
        self.manager.on_request_finished(self.context)


def taken(manager: KVHeapManager) -> list[tuple[str, list[str]]]:
    """The events since the last call."""
    events = []
    for event in manager.take_events():
        assert event.medium is base.Medium.CPU
        kind = "removed" if event.removed else "stored"
        if getattr(event, "metadata_only", False):
            kind = "metadata"
        events.append((kind, sorted(names_of(event.keys))))
    return events


class TestInterface:
    def test_every_abstract_method_of_the_installed_version_is_there(self) -> None:
        abstract = base.OffloadingManager.__abstractmethods__
        assert abstract == {"lookup", "on_new_request", "prepare_load", "prepare_store"}
        assert not KVHeapManager.__abstractmethods__

    def test_every_method_takes_what_the_installed_version_passes(self) -> None:
        for name, method in inspect.getmembers(base.OffloadingManager, inspect.isfunction):
            ours = inspect.signature(getattr(KVHeapManager, name))
            theirs = inspect.signature(method)
            assert list(ours.parameters) == list(theirs.parameters), name

    def test_nothing_private_of_vllm_is_overridden(self) -> None:
        theirs = {name for name in vars(base.OffloadingManager) if name.startswith("_")}
        ours = {name for name in vars(KVHeapManager) if name.startswith("_")}
        assert {name for name in theirs & ours if not name.startswith("__")} <= {"_abc_impl"}

    def test_a_request_stores_what_is_not_there_yet(self) -> None:
        assert Request(manager_of(1 << 20)).policy is base.OffloadPolicy.CHUNK_LEVEL

    def test_chunks_come_from_host_memory(self) -> None:
        request = Request(manager_of(1 << 20))
        assert request.manager.get_load_source(key_of("f0"), request.context).value == "host"

    def test_config_info_fills_its_labels(self) -> None:
        (info,) = manager_of(1 << 20, blocks_per_chunk=4).config_info()
        assert tuple(info) == CONFIG_INFO_KEYS
        assert (info["heap_bytes"], info["blocks_per_chunk"]) == (1 << 20, 4)
        assert info["chunk_bytes"] == "full: 2560, window: 1024"

    def test_two_groups_with_one_number_are_refused(self) -> None:
        groups = (ChunkGroup("a", 100, 1), ChunkGroup("b", 100))
        with pytest.raises(ValueError, match="'a' and 'b' both have number 1"):
            KVHeapManager(groups, TierSettings(1 << 20))

    def test_locations_travel(self) -> None:
        locations = Request(manager_of(1 << 20)).store("f0", "w0").store_spec
        assert pickle.loads(pickle.dumps(locations)) == locations
        assert isinstance(locations, base.LoadStoreSpec)
        with pytest.raises(ValueError, match=r"\[2\] and \[1\]"):
            ChunkLocations([1, 2], [3])


class TestLoadsAndStores:
    def test_each_group_has_its_own_bytes(self) -> None:
        request = Request(manager_of(1 << 20))
        output = request.store("f0", "f1", "w0", end=False)
        assert names_of(output.keys_to_store) == ["f0", "f1", "w0"]
        assert output.store_spec.sizes.tolist() == [FULL, FULL, WINDOW]
        assert output.evicted_keys == []
        assert request.look("f0", "f9") == [PENDING, MISS]
        request.manager.complete_store(set(output.keys_to_store), request.context)
        assert request.look("f0", "f1", "w0") == [HIT] * 3
        assert request.load("w0", "f0").sizes.tolist() == [WINDOW, FULL]

    def test_only_what_is_absent_is_stored(self) -> None:
        request = Request(manager_of(1 << 20))
        request.store("f0")
        output = request.store("f0", "w0", "w0")
        assert names_of(output.keys_to_store) == ["w0"]
        again = request.store("f0", "w0")
        assert (again.keys_to_store, len(again.store_spec), again.evicted_keys) == ([], 0, [])

    def test_what_does_not_fit_is_none_and_changes_nothing(self) -> None:
        request = Request(manager_of(4 * FULL))
        request.store("f0", "f1", "f2", "f3")
        request.load("f0", end=False)
        assert request.store("f4", "f5", "f6", "f7") is None
        assert request.look("f0", "f1", "f2", "f3") == [HIT] * 4
        assert request.manager.store.stats().evicted_chunks == 0

    def test_a_failed_store_is_gone(self) -> None:
        request = Request(manager_of(1 << 20))
        request.store("f0", success=False)
        assert request.look("f0") == [MISS]
        request.manager.store.check()

    @pytest.mark.parametrize("state", ["idle", "loading", "pending"])
    def test_forgotten_chunks_are_missed_in_every_state(self, state: str) -> None:
        request = Request(manager_of(1 << 20))
        request.store("f0", end=state != "pending")
        if state == "loading":
            request.load("f0", end=False)
        request.manager.forget(keys_of("f0", "f1"))
        assert request.look("f0") == [MISS]
        if state == "loading":
            request.manager.complete_load(set(keys_of("f0")), request.context)
        if state == "pending":
            request.manager.complete_store(set(keys_of("f0")), request.context)
        assert request.look("f0") == [MISS]
        stats = request.manager.store.stats()
        assert (stats.free_bytes, stats.failed_chunks) == (1 << 20, 1)
        request.manager.store.check()

    def test_reset_forgets_requests_too(self) -> None:
        manager = manager_of(1 << 20)
        old = Request(manager)
        old.store("f0", "f1")
        old.store("f2", end=False)
        old.load("f0", end=False)
        manager.reset_cache()
        assert old.look("f0", "f1", "f2") == [MISS] * 3
        old.finish()
        old.store("f0")
        old.finish()
        assert old.look("f0") == [HIT]
        manager.store.check()
        manager.shutdown()
        assert old.look("f0") == [MISS]


class TestOrder:
    def test_a_request_is_one_use_and_loses_its_tail_first(self) -> None:
        manager = manager_of(4 * FULL)
        request = Request(manager)
        for position, name in enumerate(("f0", "f1", "f2", "f3")):
            request.context.set_offload_key_position(key_of(name), position)
        for name in ("f0", "f1", "f3", "f2"):  # as chunked prefill may
            request.store(name)
        request.finish()
        assert [names_of(Request(manager).store(f"f{i}").evicted_keys) for i in (4, 5, 6)] == [
            ["f3"],
            ["f2"],
            ["f1"],
        ]

    def test_loading_is_a_use(self) -> None:
        manager = manager_of(2 * FULL)
        for name in ("f0", "f1"):
            request = Request(manager)
            request.store(name)
            request.finish()
        request = Request(manager)
        request.load("f0")
        request.finish()
        assert names_of(Request(manager).store("f2").evicted_keys) == ["f1"]

    def test_touch_is_a_use(self) -> None:
        manager = manager_of(2 * FULL)
        request = Request(manager)
        request.store("f0")
        request.store("f1")
        manager.touch(keys_of("f0", "f9"), request.context)
        assert names_of(request.store("f2").evicted_keys) == ["f1"]

    @pytest.mark.skipif(
        not hasattr(policies.CachePolicy, "on_request_access"),
        reason="vLLM 0.32 lets the chunks of a request push out the prefix that it stands on",
    )
    @pytest.mark.parametrize("seed", range(4))
    def test_equal_chunks_leave_as_from_vllms_own_tier(self, seed: int) -> None:
        """Requests one after the other, each with a prefix that others share."""
        rng = random.Random(seed)
        ours = manager_of(40 * FULL)
        theirs = cpu.CPUOffloadingManager(40, "lru", enable_events=True)
        for _ in range(300):
            document, length = rng.randint(0, 7), rng.randint(1, 12)
            names = [f"f{document}-{i}" for i in range(length)]
            evicted, found = [], []
            for manager in (ours, theirs):
                request = Request(manager)
                for position, name in enumerate(names):
                    request.context.set_offload_key_position(key_of(name), position)
                found.append(request.look(*names))
                hits = 0
                while hits < length and found[-1][hits] is HIT:
                    hits += 1
                if hits:
                    request.load(*names[:hits])
                output = request.store(*names[hits:]) if hits < length else None
                evicted.append(sorted(names_of(output.evicted_keys if output else [])))
                request.finish()
            assert found[0] == found[1]
            assert evicted[0] == evicted[1]


class TestThreshold:
    def test_chunks_are_stored_when_offered_again(self) -> None:
        request = Request(manager_of(1 << 20, store_threshold=2))
        assert request.store("f0", "f1").keys_to_store == []
        assert names_of(request.store("f1", "f2").keys_to_store) == ["f1"]
        assert request.look("f0", "f1", "f2") == [MISS, HIT, MISS]
        stats = request.manager.get_stats().data
        assert stats["data"]["vllm:kv_offload_stores_skipped"] == {(): 3}

    @pytest.mark.parametrize("seed", range(3))
    def test_as_in_vllms_own_tier(self, seed: int) -> None:
        rng = random.Random(seed)
        ours = manager_of(1000 * FULL, store_threshold=3, max_tracker_size=20)
        theirs = cpu.CPUOffloadingManager(1000, store_threshold=3, max_tracker_size=20)
        for _ in range(300):
            names = [f"f{i}" for i in rng.sample(range(40), rng.randint(1, 25))]
            outputs = [Request(manager).store(*names) for manager in (ours, theirs)]
            stored = [names_of(output.keys_to_store) for output in outputs]
            assert stored[0] == stored[1]


class TestEvents:
    def test_each_store_and_removal_is_told_once(self) -> None:
        manager = manager_of(2 * FULL)
        request = Request(manager)
        request.store("f0")
        request.store("f1", end=False)
        assert taken(manager) == [("stored", ["f0"])]
        assert taken(manager) == []
        manager.complete_store(keys_of("f1"), request.context)
        request.store("f2", end=False)
        assert taken(manager) == [("stored", ["f1"]), ("removed", ["f0"])]
        manager.forget(keys_of("f1"))
        assert taken(manager) == [("removed", ["f1"])]

    def test_a_chunk_that_failed_was_never_there(self) -> None:
        manager = manager_of(1 << 20)
        request = Request(manager)
        request.store("f0", success=False)
        assert taken(manager) == ([("metadata", ["f0"])] if HAS_METADATA_ONLY else [])
        request.store("f1", end=False)
        manager.forget(keys_of("f1"))
        manager.complete_store(keys_of("f1"), request.context)
        assert [kind for kind, _ in taken(manager) if kind != "metadata"] == []

    @pytest.mark.skipif(not HAS_METADATA_ONLY, reason="vLLM 0.32 has no such events")
    def test_cleanup_spares_what_was_stored_again(self) -> None:
        manager = manager_of(1 << 20)
        request = Request(manager)
        request.store("f0", "f1", success=False)
        request.store("f1")
        assert taken(manager) == [("metadata", ["f0"]), ("stored", ["f1"])]

    def test_reset_removes_what_was_announced(self) -> None:
        manager = manager_of(1 << 20)
        request = Request(manager)
        request.store("f0")
        request.store("f1", end=False)
        manager.reset_cache()
        assert taken(manager) == [("stored", ["f0"]), ("removed", ["f0"])]

    def test_without_publishing_nothing_is_kept(self) -> None:
        manager = manager_of(2 * FULL, events=False)
        Request(manager).store("f0", "f1")
        Request(manager).store("f2")
        manager.reset_cache()
        assert taken(manager) == []


class TestMetrics:
    def stats(self, manager: KVHeapManager) -> dict[str, Any]:
        stats = manager.get_stats()
        assert isinstance(stats, connector_metrics.OffloadingConnectorStats)
        return stats.data["data"]

    @pytest.fixture
    def busy(self) -> Iterator[KVHeapManager]:
        """A heap of 8 full chunks with a load, a store, an eviction, a refusal and a failure."""
        manager = manager_of(8 * FULL, store_threshold=0)
        request = Request(manager)
        request.store(*[f"f{i}" for i in range(8)])
        request.store("f8", "f9", end=False)
        request.load("f0", end=False)
        assert request.store(*[f"f{i}" for i in range(20, 28)]) is None
        manager.forget(keys_of("f1"))
        manager.note_pinned_share(0.5)
        yield manager
        manager.store.check()

    def test_gauges_and_counters(self, busy: KVHeapManager) -> None:
        data = self.stats(busy)
        name = "vllm:kv_offload_heap_"
        assert data["vllm:kv_offload_cpu_cache_usage_perc"] == {(): 3 / 8}
        assert data["vllm:kv_offload_cpu_cache_write_usage_perc"] == {(): 2 / 8}
        assert data["vllm:kv_offload_cpu_cache_read_usage_perc"] == {(): 1 / 8}
        assert data["vllm:kv_offload_cpu_allocation_size"] == {(): [8, 2]}
        assert data[f"{name}live_bytes"] == {("full",): 7 * FULL, ("window",): 0}
        assert data[f"{name}live_chunks"] == {("full",): 7, ("window",): 0}
        assert data[f"{name}free_bytes"] == {(): FULL}
        assert data[f"{name}largest_free_extent_bytes"] == {(): FULL}
        assert data[f"{name}evicted_chunks"] == {("full",): 2}
        assert data[f"{name}evicted_bytes"] == {(): 2 * FULL}
        assert data[f"{name}hit_bytes"] == {("full",): FULL}
        assert data[f"{name}failed_chunks"] == {(): 1}
        assert data[f"{name}refused_stores"] == {(): 1}
        assert data[f"{name}pinned_perc"] == {(): 0.5}

    def test_counters_tell_what_is_new(self, busy: KVHeapManager) -> None:
        first, second = self.stats(busy), self.stats(busy)
        gauges = {name for name, kind in busy.get_stats().data["types"].items() if kind == "gauge"}
        assert second.keys() == gauges
        assert gauges < first.keys()

    @pytest.mark.parametrize("threshold", [0, 2])
    def test_every_metric_is_defined_with_its_labels(
        self, busy: KVHeapManager, threshold: int
    ) -> None:
        manager = manager_of(8 * FULL, store_threshold=2) if threshold else busy
        Request(manager).store("w0")
        definitions = build_metric_definitions({"store_threshold": threshold})
        stats = manager.get_stats().data
        for name, values in stats["data"].items():
            kind = (
                type(definitions[name]).__name__.removeprefix("Offloading").removesuffix("Metadata")
            )
            assert kind.lower() == stats["types"][name]
            for labels in values:
                assert len(labels) == len(definitions[name].labelnames)
        assert all(name.startswith("vllm:kv_offload_") for name in definitions)


class ManagerMachine(RuleBasedStateMachine):
    """Requests whose stores and loads end in any order, or fail, with resets in between."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = manager_of(16 * FULL)
        self.naive = NaiveChunks(16 * FULL, {"f": FULL, "w": WINDOW})
        self.jobs: list[tuple[bool, Any, list[str]]] = []
        self.announced: set[str] = set()

    def request(self) -> Request:
        return Request(self.manager)

    @rule(
        numbers=st.lists(st.integers(0, 30), min_size=1, max_size=8), tags=st.text("fw", min_size=1)
    )
    def store(self, numbers: list[int], tags: str) -> None:
        names = [f"{tags[i % len(tags)]}{n}" for i, n in enumerate(numbers)]
        new, request = self.naive.absent(names), self.request()
        output = self.manager.prepare_store(keys_of(*names), request.context)
        if output is None:
            self.replay_evictions()
            return
        assert names_of(output.keys_to_store) == new
        self.naive.evict(names_of(output.evicted_keys))
        self.naive.begin(
            new, output.store_spec.addresses.tolist(), output.store_spec.sizes.tolist()
        )
        if new:
            self.jobs.append((True, request, new))

    def replay_evictions(self) -> None:
        """A refusal may come after evictions, where pinned chunks lie between."""
        gone = [name for name in self.naive.chunks if self.request().look(name) == [MISS]]
        self.naive.evict(gone)

    @precondition(lambda self: self.naive.chunks)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        ready = sorted(n for n, chunk in self.naive.chunks.items() if not chunk.is_pending)
        if not ready:
            return
        names = data.draw(st.lists(st.sampled_from(ready), min_size=1, unique=True, max_size=5))
        request = self.request()
        locations = self.manager.prepare_load(keys_of(*names), request.context)
        assert locations.addresses.tolist() == [self.naive.chunks[n].address for n in names]
        for name in names:
            self.naive.chunks[name].loads += 1
        self.jobs.append((False, request, names))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), fails=st.booleans())
    def job_ends(self, data: st.DataObject, fails: bool) -> None:
        """As the connector does: what failed is forgotten, then the job is completed."""
        is_store, request, names = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        if fails:
            self.manager.forget(keys_of(*names))
            for name in names:
                if name in self.naive.chunks:
                    self.naive.forget(name)
        if is_store:
            self.manager.complete_store(set(keys_of(*names)), request.context)
        else:
            self.manager.complete_load(set(keys_of(*names)), request.context)
        for name in names:
            if is_store:
                self.naive.end(name, True)
            else:
                self.naive.end_load(name)
        request.finish()

    @rule()
    def reset(self) -> None:
        self.manager.reset_cache()
        self.naive.reset()
        self.jobs.clear()

    @invariant()
    def all_agree(self) -> None:
        self.manager.store.check()
        request, naive = self.request(), self.naive
        for name in [f"{tag}{i}" for tag in "fw" for i in range(31)]:
            chunk = naive.chunks.get(name)
            expected = MISS if chunk is None else PENDING if chunk.is_pending else HIT
            assert request.look(name) == [expected]
        for kind, names in taken(self.manager):
            if kind == "stored":
                assert not self.announced & set(names)
                self.announced |= set(names)
            elif kind == "removed":
                assert self.announced >= set(names)
                self.announced -= set(names)
        assert self.announced == {n for n, c in naive.chunks.items() if not c.is_pending}


def test_random_completions_failures_and_resets() -> None:
    run_state_machine_as_test(
        ManagerMachine,
        settings=hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None),
    )
