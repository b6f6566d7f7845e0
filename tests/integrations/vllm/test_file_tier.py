"""kvheap's files behind vLLM's host memory: as vLLM's manager calls it, and inside the engine."""

from __future__ import annotations

import gc
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_cpu_scenes import need_engine, need_vllm

need_vllm()
pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

import vllm_engines  # noqa: E402  # before vLLM: it sets what the engine reads
from vllm.v1.kv_offload import config as configs  # noqa: E402
from vllm.v1.kv_offload.base import LookupResult, make_offload_key  # noqa: E402
from vllm.v1.kv_offload.tiering.base import TransferJob  # noqa: E402
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory  # noqa: E402
from vllm_engines import Engine, prompt  # noqa: E402

from kvheap.files import TierInUseError, TierMismatchError  # noqa: E402
from kvheap.integrations.vllm.file_tier import KVHeapFileTier, namespace_of  # noqa: E402

SLOTS, SLOT = 12, 8192

BLOCK_BYTES = 2 * 16384
"""A block of the plain model."""

HEADS = [prompt(number, 200, shared=160) for number in range(3)]

KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(20)]

CONFIG = configs.OffloadingConfig(
    groups=(configs.OffloadingGroupConfig(16, ("layer.0", "layer.1"), 0),),
    worker_kv_bytes_per_block=SLOT,
    enable_kv_cache_events=False,
    extra_config={},
    engine_id="an engine",
    model=configs.OffloadingModelConfig("a model", "bfloat16"),
    cache=configs.OffloadingCacheConfig(16, 1),
    parallel=configs.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    kv_cache_layout="NHD",
)


@dataclass
class Spec:
    config: Any = CONFIG


class Scene:
    """Host memory of slots, and a tier behind it, made as vLLM makes it."""

    def __init__(self, folder: Path, config: Any = CONFIG, **options: Any) -> None:
        self.mapping = mmap.mmap(-1, SLOTS * SLOT)
        self.memory = np.frombuffer(self.mapping, np.uint8).reshape(SLOTS, SLOT)
        self.view = memoryview(self.memory)
        settings = {
            "type": "KVHeapFileTier",
            "module_path": "kvheap.integrations.vllm.file_tier",
            "path": str(folder),
            "size_bytes": 10 * SLOT,
            **options,
        }
        made = SecondaryTierFactory.create_secondary_tier(settings, self.view, Spec(config))
        assert isinstance(made, KVHeapFileTier)
        self.made = made
        self.number = 0

    def job(self, kind: str, rows: dict[int, int]) -> Any:
        """Do a job for keys, by number, in slots; its result."""
        self.number += 1
        keys = [KEYS[key] for key in rows]
        job = TransferJob(self.number, keys, np.array([*rows.values()]), kind == "load", None)
        (self.made.submit_load if kind == "load" else self.made.submit_store)(job)
        self.made.drain_jobs()
        (result,) = self.made.get_finished_jobs()
        assert result.job_id == self.number
        return result

    def fill(self, rows: dict[int, int]) -> None:
        for key, slot in rows.items():
            self.memory[slot] = expected(key)

    def close(self) -> None:
        self.made.shutdown()
        self.view.release()  # as vLLM does: nobody may hold on to it
        del self.memory, self.view
        gc.collect()
        self.mapping.close()


def expected(key: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(key).integers(0, 256, SLOT, np.uint8)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "tier")
    yield scene
    scene.close()


class TestAsVllmCallsIt:
    def test_chunks_come_back_in_other_slots(self, scene: Scene) -> None:
        rows = {0: 3, 1: 1, 2: 7, 3: 0}
        scene.fill(rows)
        assert scene.made.lookup(KEYS[0], None) is LookupResult.MISS
        result = scene.job("store", rows)
        assert result.success
        assert result.transfer_bytes == 4 * SLOT
        assert scene.made.lookup(KEYS[0], None) is LookupResult.HIT
        scene.memory[:] = 0
        assert scene.job("load", {2: 9, 0: 4}).success
        assert np.array_equal(scene.memory[9], expected(2))
        assert np.array_equal(scene.memory[4], expected(0))
        assert not scene.memory[[0, 1, 2, 3, 5, 6, 7, 8, 10, 11]].any()
        assert list(scene.made.get_finished_jobs()) == []

    def test_it_is_bounded_and_evicts_what_was_not_touched(self, scene: Scene) -> None:
        for first in (0, 5):
            rows = {first + at: at for at in range(5)}
            scene.fill(rows)
            assert scene.job("store", rows).success
        scene.made.touch(KEYS[:5], None)
        rows = {10 + at: at for at in range(5)}
        scene.fill(rows)
        assert scene.job("store", rows).success
        hits = [scene.made.lookup(key, None) is LookupResult.HIT for key in KEYS[:15]]
        assert hits == [True] * 5 + [False] * 5 + [True] * 5

    def test_what_is_damaged_is_computed_again(self, tmp_path: Path, scene: Scene) -> None:
        rows = {0: 0, 1: 1, 2: 2}
        scene.fill(rows)
        scene.job("store", rows)
        with open(tmp_path / "tier" / "chunks", "r+b") as file:
            file.seek(SLOT + 5)
            file.write(b"damaged")
        result = scene.job("load", {0: 5, 1: 6, 2: 7})
        assert not result.success
        assert result.successful_keys == (KEYS[0], KEYS[2])
        assert scene.made.lookup(KEYS[1], None) is LookupResult.MISS
        result = scene.job("load", {1: 6})
        assert not result.success
        assert result.successful_keys is None

    def test_a_later_engine_finds_the_chunks(self, tmp_path: Path) -> None:
        scene = Scene(tmp_path / "tier")
        rows = {0: 0, 1: 1}
        scene.fill(rows)
        scene.job("store", rows)
        with pytest.raises(TierInUseError):
            Scene(tmp_path / "tier")
        scene.close()
        scene = Scene(tmp_path / "tier", eviction_policy="adaptive", durable=True)
        assert scene.job("load", {1: 8}).success
        assert np.array_equal(scene.memory[8], expected(1))
        scene.close()

    @pytest.mark.parametrize(
        "config",
        [
            replace(CONFIG, model=configs.OffloadingModelConfig("another", "bfloat16")),
            replace(CONFIG, model=configs.OffloadingModelConfig("a model", "fp8")),
            replace(CONFIG, kv_cache_layout="HND"),
            replace(CONFIG, canonical_layout=True),
            replace(CONFIG, parallel=replace(CONFIG.parallel, tp_size=2)),
            replace(CONFIG, parallel=replace(CONFIG.parallel, rank=1)),
            replace(CONFIG, groups=(replace(CONFIG.groups[0], layer_names=("layer.0",)),)),
            replace(CONFIG, cache=configs.OffloadingCacheConfig(32, 1)),
        ],
    )
    def test_another_models_chunks_are_refused(self, tmp_path: Path, config: Any) -> None:
        Scene(tmp_path / "tier").close()
        with pytest.raises(TierMismatchError, match="namespace"):
            Scene(tmp_path / "tier", config)
        assert namespace_of(config) != namespace_of(CONFIG)
        Scene(tmp_path / "tier").close()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size_bytes": SLOT - 1}, "size must be at least"),
            ({"eviction_policy": "none"}, "policy must be one of"),
            ({"locality": "near"}, "near"),
        ],
    )
    def test_wrong_options(self, tmp_path: Path, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Scene(tmp_path / "tier", **options)
        Scene(tmp_path / "tier").close()


def test_an_engine_finds_what_an_earlier_one_has_computed(tmp_path: Path) -> None:
    need_engine()
    model = vllm_engines.make_plain(tmp_path / "model")
    plain = Engine(model, enable_prefix_caching=False, max_num_seqs=1)
    answers = plain.generate(HEADS)
    plain.close()
    tier = {
        "type": "KVHeapFileTier",
        "module_path": "kvheap.integrations.vllm.file_tier",
        "path": str(tmp_path / "tier"),
        "size_bytes": 64 * BLOCK_BYTES,
    }
    extra: dict[str, Any] = {
        "spec_name": "FaultyTieringSpec",
        "cpu_bytes_to_use": 12 * BLOCK_BYTES,
        "secondary_tiers": [tier],
    }
    engine = Engine(model, extra)
    assert engine.generate(HEADS) == answers
    engine.forget_all()  # of the memory
    assert engine.generate(HEADS) == answers
    assert sum(engine.cached) == 3 * 192
    engine.close()
    state = json.loads((tmp_path / "tier" / "tier.json").read_text())
    assert state["is_closed"]
    later = Engine(model, extra)
    assert later.generate(HEADS) == answers
    assert sum(later.cached) == 3 * 192
    assert later.counters()["vllm:kv_offload_tiering_read_bytes"] > 0
    later.close()
