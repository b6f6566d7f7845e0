"""What of a restart needs vLLM's interfaces: a worker's file, the manager, and the identity.

Skipped without vLLM; with ``KVHEAP_REQUIRE_VLLM`` set, its absence is a failure.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm_scenes import part_of_vllm

from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.heap_label import LABEL_BYTES, HeapReport
from kvheap.integrations.vllm.restart import RestartIndex
from kvheap.integrations.vllm.settings import TierSettings

base = part_of_vllm("vllm.v1.kv_offload.base")
config = part_of_vllm("vllm.v1.kv_offload.config")
from kvheap.integrations.vllm.chunk_memory import FileMemory  # noqa: E402
from kvheap.integrations.vllm.connector import WorkerHeap  # noqa: E402
from kvheap.integrations.vllm.identity import (  # noqa: E402
    hash_seed,
    identity_of,
    layout_of,
    model_files,
)
from kvheap.integrations.vllm.manager import KVHeapManager  # noqa: E402
from kvheap.integrations.vllm.spec import (  # noqa: E402
    GROUPS_KEY,
    IDENTITY_KEY,
    KVHeapOffloadingSpec,
)

HEAP_BYTES = 1 << 20
GROUPS = (ChunkGroup("full", 2560, 0), ChunkGroup("window", 1024, 2))
HIT, MISS = base.LookupResult.HIT, base.LookupResult.MISS


def key_of(number: int, group_id: int = 0) -> Any:
    return base.make_offload_key(number.to_bytes(32, "big"), group_id)


def memory_of(path: Path, is_indexed: bool = True, size_bytes: int = HEAP_BYTES) -> FileMemory:
    return FileMemory(str(path), size_bytes, pin=False, is_indexed=is_indexed)


ONE = np.array([512]), np.array([256])


class TestFileMemory:
    def test_the_heap_begins_behind_the_label(self, tmp_path: Path) -> None:
        memory = memory_of(tmp_path / "heap")
        (address,) = memory.absolute(*ONE).tolist()
        assert address == memory.tensor.data_ptr() + 512
        assert memory.tensor.nbytes == HEAP_BYTES
        memory.tensor[512:768] = 7
        with pytest.raises(ValueError, match="are not ready"):
            memory.absolute(np.array([HEAP_BYTES]), np.array([256]))
        memory.close()
        data = (tmp_path / "heap").read_bytes()
        assert data[LABEL_BYTES + 512 : LABEL_BYTES + 768] == bytes([7]) * 256
        assert set(data[LABEL_BYTES : LABEL_BYTES + 512]) == {0}

    @pytest.mark.parametrize("is_indexed", [True, False])
    def test_the_first_job_changes_the_id(self, tmp_path: Path, is_indexed: bool) -> None:
        path = tmp_path / "heap"
        first = memory_of(path)
        first.label.renew()
        first.close()
        memory_of(path, is_indexed).close()
        second = memory_of(path, is_indexed)
        assert second.label.previous == first.label.current, "opening it has changed it"
        second.absolute(*ONE)
        second.close()
        assert memory_of(path).label.previous == second.label.current

    def test_only_what_has_an_index_is_flushed_at_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed: list[int] = []
        monkeypatch.setattr(os, "fsync", flushed.append)
        for is_indexed, times in ((True, 3), (False, 1)):
            memory = memory_of(tmp_path / "heap", is_indexed)
            memory.absolute(*ONE)
            memory.close()
            memory.close()
            assert len(flushed) == times
            flushed.clear()

    def test_a_view_that_is_left_does_not_keep_the_file(self, tmp_path: Path) -> None:
        memory = memory_of(tmp_path / "heap")
        left = memory.tensor[:10]
        memory.close()
        memory_of(tmp_path / "heap").close()
        assert left.tolist() == [0] * 10

    def test_a_failed_start_does_not_keep_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ValueError, match="huge_pages"):
            FileMemory(str(tmp_path / "heap"), 4096, pin=False, huge_pages="explicit")
        memory_of(tmp_path / "heap").close()

    def test_a_file_that_cannot_be_made_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(FileNotFoundError, match=r"\['heap_path'\]: no file of .*/none/heap"):
            memory_of(tmp_path / "none" / "heap")

        def full(fd: int, offset: int, length: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(OSError, match=r"\['heap_path'\].*1052672 bytes.*No space left"):
                memory_of(tmp_path / "heap")
        memory_of(tmp_path / "heap").close()


class Life:
    """A manager, and the file of one worker."""

    def __init__(self, folder: Path, has_events: bool = True) -> None:
        self.memory = memory_of(folder / "heap.0")
        label = self.memory.label
        label.renew()
        self.manager = KVHeapManager(
            GROUPS,
            TierSettings(HEAP_BYTES),
            base.OffloadingKVEventsConfig(has_events, False),
            RestartIndex(str(folder / "index"), {"model": "m"}, 1),
        )
        report = HeapReport(
            0, self.memory.path, label.previous, label.why, label.current, "a layout"
        )
        self.manager.restore_index([report])
        self.request = base.ReqContext(req_id="r", kv_transfer_params=None)

    def end(self) -> None:
        self.memory.close()
        self.manager.shutdown()
        self.manager.shutdown()


class TestManager:
    def test_chunks_are_found_loaded_and_announced(self, tmp_path: Path) -> None:
        keys = [key_of(at, group) for at in range(4) for group in (0, 2)]
        life = Life(tmp_path)
        assert list(life.manager.take_events()) == []
        output = life.manager.prepare_store(keys, life.request)
        life.manager.complete_store(keys[:6], life.request)
        addresses = dict(
            zip(output.keys_to_store, output.store_spec.addresses.tolist(), strict=True)
        )
        life.end()
        assert life.manager.lookup(keys[0], life.request) == MISS
        again = Life(tmp_path)
        (event,) = again.manager.take_events()
        assert set(event.keys) == set(keys[:6])
        assert not event.removed
        found = [again.manager.lookup(key, again.request) for key in keys]
        assert found == [HIT] * 6 + [MISS] * 2
        locations = again.manager.prepare_load(keys[:6], again.request)
        assert locations.addresses.tolist() == [addresses[key] for key in keys[:6]]
        assert locations.sizes.tolist() == [2560, 1024] * 3
        again.manager.complete_load(keys[:6], again.request)
        again.manager.reset_cache()
        (event,) = again.manager.take_events()
        assert set(event.keys) == set(keys[:6])
        assert event.removed
        again.end()
        assert Life(tmp_path).manager.lookup(keys[0], again.request) == MISS

    def test_without_an_index_reports_mean_nothing(self) -> None:
        manager = KVHeapManager(GROUPS, TierSettings(HEAP_BYTES))
        manager.restore_index([HeapReport(0, "/h", "a", "", "b", "")])
        manager.shutdown()

    def test_a_report_travels_between_processes(self) -> None:
        heap = WorkerHeap(HeapReport(0, "/h", "a", "", "b", "layout"))
        assert pickle.loads(pickle.dumps(heap)) == heap


def offloading_config(extra: dict[str, Any], **changes: Any) -> Any:
    parallel = {
        "rank": 0,
        "world_size": 1,
        "tp_size": 1,
        "pp_size": 1,
        "pcp_size": 1,
        "dcp_size": 1,
        "data_parallel_index": 0,
        "data_parallel_size": 1,
        "data_parallel_rank_local": None,
        "is_parallelism_agnostic": True,
    }
    return config.OffloadingConfig(
        groups=tuple(
            config.OffloadingGroupConfig(
                tokens_per_block=16, layer_names=(f"layer.{number}",), group_id=number
            )
            for number in (0, 2)
        ),
        worker_kv_bytes_per_block=4096,
        enable_kv_cache_events=False,
        extra_config=extra,
        engine_id="e",
        model=config.OffloadingModelConfig("m", "bfloat16"),
        cache=config.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=config.OffloadingParallelConfig(**(parallel | changes)),
    )


class TestSpec:
    def spec(self, folder: Path, **changes: Any) -> KVHeapOffloadingSpec:
        extra = {
            "cpu_bytes_to_use": HEAP_BYTES,
            "heap_path": str(folder / "heap"),
            "index_path": str(folder / "index"),
            GROUPS_KEY: GROUPS,
            IDENTITY_KEY: {"model": "m"},
        }
        return KVHeapOffloadingSpec(offloading_config(extra, **changes))

    @pytest.mark.parametrize(
        ("parallel", "name"),
        [
            ({}, "index.lock"),
            ({"data_parallel_size": 2}, "index.dp0.lock"),
            ({"data_parallel_index": 1, "data_parallel_size": 2}, "index.dp1.lock"),
            ({"data_parallel_index": 1}, "index.dp1.lock"),  # of a dense model
        ],
    )
    def test_each_replica_has_an_index(
        self, tmp_path: Path, parallel: dict[str, int], name: str
    ) -> None:
        spec = self.spec(tmp_path, **parallel)
        manager = spec.get_manager()
        assert os.listdir(tmp_path) == [name]
        manager.shutdown()

    def test_two_engines_do_not_share_an_index(self, tmp_path: Path) -> None:
        manager = self.spec(tmp_path).get_manager()
        with pytest.raises(BlockingIOError, match=r"index_path.*used by another engine"):
            self.spec(tmp_path).get_manager()
        manager.shutdown()
        self.spec(tmp_path).get_manager().shutdown()

    def test_a_folder_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"\['index_path'\]: cannot write to .*none"):
            self.spec(tmp_path / "none").get_manager()

    def test_a_worker_without_a_file_reports_nothing(self, tmp_path: Path) -> None:
        assert self.spec(tmp_path).report_heap("layout") is None


class TestIdentity:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(100))
        return folder

    def identity(self, model: Path, offloading: Any = None, **changes: Any) -> dict[str, str]:
        hf_config = SimpleNamespace(
            to_json_string=lambda use_diff: json.dumps({"layers": changes.get("layers", 2)})
        )
        values = {"revision": None, "quantization": None, "dtype": torch.bfloat16}
        values |= {name: changes[name] for name in values.keys() & changes.keys()}
        vllm_config: Any = SimpleNamespace(
            model_config=SimpleNamespace(model=str(model), hf_config=hf_config, **values),
            cache_config=SimpleNamespace(
                prefix_caching_hash_algo=changes.get("algorithm", "sha256")
            ),
            speculative_config=None,
        )
        return identity_of(vllm_config, offloading or offloading_config({}), GROUPS)

    def test_it_is_the_same_for_the_same(self, model: Path) -> None:
        assert self.identity(model) == self.identity(model)

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"revision": "v2"}, "revision"),
            ({"quantization": "fp8"}, "quantization"),
            ({"dtype": torch.float16}, "dtype"),
            ({"layers": 3}, "model's configuration"),
            ({"algorithm": "sha256_cbor"}, "block hashes"),
            ({"offloading": offloading_config({}, tp_size=2, world_size=2)}, "parallelism"),
        ],
    )
    def test_what_differs_is_seen(self, model: Path, change: dict[str, Any], name: str) -> None:
        one, other = self.identity(model), self.identity(model, **change)
        assert {key for key in one if one[key] != other[key]} == {name}

    def test_other_files_of_the_model_are_seen(self, model: Path) -> None:
        before = model_files(str(model), None)
        assert before.startswith("2 files, ")
        (model / "README.md").write_text("of no matter")
        assert model_files(str(model), None) == before
        weights = model / "model.safetensors"
        state = weights.stat()
        weights.write_bytes(bytes(100))
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert model_files(str(model), None) == before
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        assert model_files(str(model), None) != before
        shutil.rmtree(model)
        assert model_files(str(model), None) == "not in a folder"
        assert model_files("kvheap/no-such-model", "main") == "not in a folder"
        assert model_files("s3://bucket/model", None) == "not in a folder"

    def test_the_seed_of_block_hashes(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        seeds = {self.identity(model)["block hashes' seed"]}
        for seed in ("0", "1"):
            monkeypatch.setenv("PYTHONHASHSEED", seed)
            assert hash_seed("sha256") == seed
            seeds.add(self.identity(model)["block hashes' seed"])
        assert len(seeds) == 3

    def test_a_seed_that_is_random_is_a_mistake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As that of hashes that are not cryptographic; their package may not be there."""
        monkeypatch.setattr(
            "kvheap.integrations.vllm.identity.resolve_none_hash_seed",
            lambda function: os.urandom(32).hex(),
        )
        with pytest.raises(ValueError, match=r"'index_path'.*sha256_cbor.*PYTHONHASHSEED"):
            hash_seed("sha256_cbor")

    def test_layouts(self) -> None:
        """The number of blocks may differ, and nothing else."""

        def layout(
            shape: tuple[int, ...], order: tuple[int, ...], num_blocks: int, **of: Any
        ) -> str:
            dtype = of.get("dtype", torch.bfloat16)
            tensor = torch.zeros([shape[at] for at in order], dtype=dtype)
            back = tensor.permute([order.index(at) for at in range(len(order))])
            return layout_of({"a": back, "b": [back, back]}, num_blocks)

        plain = layout((2, 7, 16, 4, 8), (0, 1, 2, 3, 4), 7)
        assert plain == layout((2, 11, 16, 4, 8), (0, 1, 2, 3, 4), 11)
        assert "cpu torch.bfloat16 [2, 1 * blocks, 16, 4, 8]" in plain
        others = [
            layout((2, 7, 16, 4, 8), (0, 1, 3, 2, 4), 7),
            layout((2, 7, 16, 4, 8), (1, 0, 2, 3, 4), 7),
            layout((2, 14, 8, 4, 8), (0, 1, 2, 3, 4), 7),
            layout((2, 7, 16, 4, 8), (0, 1, 2, 3, 4), 7, dtype=torch.float16),
            layout((7, 2, 16, 4, 8), (0, 1, 2, 3, 4), 7),
        ]
        assert len({plain, *others}) == 6
        assert layout_of({}, 7).startswith("nothing")
