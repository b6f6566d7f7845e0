"""kvheap's tier inside vLLM's engine: the tokens are the same, whatever fails in the tier.

The engine runs on a CPU with tiny random models. What it answers without any tier, one request at
a time and without its own prefix cache, is what every test compares with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from vllm_cpu_scenes import need_engine

need_engine()

import vllm_engines  # noqa: E402  # before vLLM: it sets what the engine reads
from vllm_engines import BLOCK_TOKENS, Answer, Engine, Prompt, prompt  # noqa: E402
from vllm_faults import FAULTS  # noqa: E402

BLOCK_BYTES = 2 * 16384
"""A block of the plain model: two layers, K and V of two heads of 32 float32, 32 tokens."""

HEADS = [prompt(number, 200, shared=160) for number in range(3)]
"""Three prompts of 200 tokens, the first 160 of which are the same."""

CROWD = [prompt(10 + number, 200) for number in range(6)]
"""Six prompts with nothing in common."""

GROWING = [prompt(30 + number, 90) for number in range(4)]
"""Four prompts whose answers take more blocks than they do."""

SCRIPT = Path(vllm_engines.__file__).with_name("vllm_rounds.py")

LIVES = SCRIPT.with_name("vllm_lives.py")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": vllm_engines.make_plain(folder / "plain"),
        "hybrid": vllm_engines.make_hybrid(folder / "hybrid"),
    }


@pytest.fixture(scope="module")
def answers(models: dict[str, str]) -> dict[str, dict[str, list[Answer]]]:
    """By model, the answers to HEADS and CROWD without a tier."""
    found = {}
    for name, model in models.items():
        engine = Engine(model, enable_prefix_caching=False, max_num_seqs=1)
        found[name] = {"heads": engine.generate(HEADS), "crowd": engine.generate(CROWD)}
        assert engine.cached == [0] * len(CROWD)
        if name == "plain":
            found[name]["growing"] = engine.generate(GROWING, 100)
        engine.close()
    return found


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    FAULTS.clear()
    yield
    FAULTS.clear()


@pytest.fixture(scope="class")
def engine(
    request: pytest.FixtureRequest,
    models: dict[str, str],
    answers: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    """One engine for all tests of a class, as the class describes it."""
    folder = str(tmp_path_factory.mktemp("files"))
    extra = json.loads(json.dumps(request.cls.EXTRA).replace("FOLDER", folder))
    engine = Engine(models[request.cls.MODEL], extra, **getattr(request.cls, "OPTIONS", {}))
    yield engine
    engine.close()


def rounds(engine: Engine, prompts: list[Prompt], expected: list[Answer], count: int) -> list[int]:
    """Ask again and again, each time without the engine's own cache; the cached tokens of each."""
    cached = []
    for _ in range(count):
        engine.forget_device()
        assert engine.generate(prompts, len(expected[0])) == expected
        cached.append(sum(engine.cached))
    return cached


def of_tier(engine: Engine) -> tuple[set[Any], set[Any]]:
    """By the events: the chunks that were stored in the tier, and those that are still there."""
    stored, live = set(), set()
    for event in engine.events:
        kind = type(event).__name__
        if getattr(event, "medium", None) == "CPU" and kind == "BlockStored":
            assert live.isdisjoint(event.block_hashes), "stored twice"
            stored.update(event.block_hashes)
            live.update(event.block_hashes)
        elif getattr(event, "medium", None) == "CPU" and kind == "BlockRemoved":
            assert live.issuperset(event.block_hashes), "removed, but not there"
            live.difference_update(event.block_hashes)
    return stored, live


class TestSharedPrefix:
    MODEL = "plain"
    EXTRA: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def empty(self, engine: Engine) -> None:
        engine.forget_all()
        FAULTS.clear()

    def test_tokens_are_the_same_and_not_computed_twice(self, engine: Engine, answers: Any) -> None:
        expected, before = answers["plain"]["heads"], engine.counters()
        assert engine.generate(HEADS) == expected
        cold = engine.counters()
        blocks = 160 // BLOCK_TOKENS + len(HEADS)  # the shared ones, and one more of each prompt
        assert FAULTS.stored_bytes == blocks * BLOCK_BYTES
        assert FAULTS.loads == 0
        assert rounds(engine, HEADS, expected, 1) == [3 * 192]
        warm = engine.counters()
        assert FAULTS.loaded_bytes == blocks * BLOCK_BYTES
        assert FAULTS.stored_bytes == blocks * BLOCK_BYTES, "stored twice"
        for name, start, end, num_bytes in (
            ("vllm:kv_offload_store_bytes", before, cold, FAULTS.stored_bytes),
            ("vllm:kv_offload_load_bytes", cold, warm, FAULTS.loaded_bytes),
        ):
            assert end[name] - start.get(name, 0) == num_bytes
        hits = "vllm:external_prefix_cache_hits"
        assert warm[hits] - cold[hits] >= 192

    def test_loads_are_what_makes_them_the_same(self, engine: Engine, answers: Any) -> None:
        """A load that gives zeros changes the tokens: what the other tests compare is loaded."""
        engine.generate(HEADS)
        engine.forget_device()
        FAULTS.zero_loads = True
        assert engine.generate(HEADS) != answers["plain"]["heads"]
        assert FAULTS.loads > 0

    @pytest.mark.parametrize("every", [1, 2])
    @pytest.mark.parametrize("what", ["stores", "loads", "both"])
    def test_copies_that_fail_cost_a_computation(
        self, engine: Engine, answers: Any, what: str, every: int
    ) -> None:
        FAULTS.fail_stores = 0 if what == "loads" else every
        FAULTS.fail_loads = 0 if what == "stores" else every
        expected = answers["plain"]["heads"]
        assert engine.generate(HEADS) == expected
        cached = rounds(engine, HEADS, expected, 4)
        assert FAULTS.failed > 0
        if every == 1:  # only what one request leaves to the next in the engine's own cache
            assert max(cached) <= 2 * 160
        FAULTS.clear()
        assert rounds(engine, HEADS, expected, 2)[-1] == 3 * 192, "does not recover"
        engine.manager.store.check()

    def test_a_failed_load_is_not_tried_for_ever(self, engine: Engine, answers: Any) -> None:
        engine.generate(HEADS[:1])
        engine.forget_device()
        FAULTS.clear()
        FAULTS.fail_loads = 1
        assert engine.generate(HEADS[:1]) == answers["plain"]["heads"][:1]
        assert FAULTS.loads == 1
        assert engine.cached == [0]

    def test_a_reset_forgets_the_chunks(self, engine: Engine, answers: Any) -> None:
        engine.generate(HEADS)
        engine.forget_all()
        assert engine.generate(HEADS) == answers["plain"]["heads"]
        assert FAULTS.loads == 0
        assert rounds(engine, HEADS, answers["plain"]["heads"], 1) == [3 * 192]

    def test_a_reset_while_copies_are_under_way(self, engine: Engine, answers: Any) -> None:
        """Their results come after the reset, and mean nothing any more."""
        expected = answers["plain"]["heads"]
        for steps in range(1, 12):
            FAULTS.clear()
            engine.forget_device()
            for number, tokens in enumerate(HEADS):
                engine.add(f"{steps}-{number}", tokens)
            engine.step(steps)
            engine.connector.reset_cache()
            assert engine.finish() == expected
            engine.manager.store.check()
        assert rounds(engine, HEADS, expected, 2)[-1] == 3 * 192

    def test_a_request_that_is_aborted(self, engine: Engine, answers: Any) -> None:
        """Whatever its copies are doing at that step; afterwards all is as if it had not been."""
        engine.generate(HEADS[:1])
        for steps in range(6):
            engine.forget_device()
            for number, tokens in enumerate(HEADS):
                engine.add(f"{steps}-{number}", tokens)
            engine.step(steps)
            engine.abort(f"{steps}-0")
            assert engine.finish() == answers["plain"]["heads"][1:]
        assert rounds(engine, HEADS, answers["plain"]["heads"], 2)[-1] == 3 * 192
        engine.manager.store.check()

    def test_events_say_what_is_in_the_tier(self, engine: Engine, answers: Any) -> None:
        FAULTS.fail_stores = FAULTS.fail_loads = 3
        for _ in range(4):
            engine.forget_device()
            engine.generate([*HEADS, *CROWD[:3]])
        stored, live = of_tier(engine)
        assert FAULTS.failed > 1
        assert len(live) == len(engine.manager.store)
        assert len(stored) > len(HEADS)


class TestEviction:
    """A heap of ten chunks, of which one prompt takes six."""

    MODEL = "plain"
    EXTRA: ClassVar[dict[str, Any]] = {"cpu_bytes_to_use": 10 * BLOCK_BYTES + 100}

    @pytest.mark.parametrize("every", [0, 2])
    def test_tokens_are_the_same_while_chunks_leave(
        self, engine: Engine, answers: Any, every: int
    ) -> None:
        engine.forget_all()
        FAULTS.fail_stores = FAULTS.fail_loads = every
        rounds(engine, CROWD, answers["plain"]["crowd"], 3)
        rounds(engine, HEADS, answers["plain"]["heads"], 3)
        _, live = of_tier(engine)
        assert len(live) == len(engine.manager.store) <= 10
        assert engine.manager.store.stats().evicted_chunks > 0
        engine.manager.store.check()

    def test_what_was_used_last_is_there(self, engine: Engine, answers: Any) -> None:
        engine.forget_all()
        rounds(engine, CROWD, answers["plain"]["crowd"], 1)
        assert rounds(engine, CROWD[:1], answers["plain"]["crowd"][:1], 2)[-1] == 192


class TestPreemption:
    """Four requests that outgrow the engine's blocks, prompts in pieces of 64 tokens."""

    MODEL = "plain"
    EXTRA: ClassVar[dict[str, Any]] = {
        "cpu_bytes_to_use": 40 * BLOCK_BYTES,
        "eviction_policy": "s3fifo",
    }
    OPTIONS: ClassVar[dict[str, Any]] = {
        "num_gpu_blocks_override": 12,
        "max_num_batched_tokens": 64,
    }

    @pytest.mark.parametrize("every", [0, 2])
    def test_tokens_are_the_same(self, engine: Engine, answers: Any, every: int) -> None:
        engine.forget_all()
        FAULTS.fail_stores = FAULTS.fail_loads = every
        rounds(engine, GROWING, answers["plain"]["growing"], 3)
        rounds(engine, CROWD, answers["plain"]["crowd"], 2)
        assert engine.counters()["vllm:num_preemptions"] > 0
        assert FAULTS.loads > 0
        engine.manager.store.check()


class HybridCases:
    """Sliding and full attention: three groups, of which a request keeps unlike chunks."""

    def test_tokens_are_the_same_and_not_computed_twice(self, engine: Engine, answers: Any) -> None:
        engine.forget_all()
        expected = answers["hybrid"]["heads"]
        assert engine.generate(HEADS) == expected
        assert rounds(engine, HEADS, expected, 2) == [3 * 192] * 2
        assert FAULTS.loaded_bytes > 0
        engine.manager.store.check()

    def test_loads_are_what_makes_them_the_same(self, engine: Engine, answers: Any) -> None:
        engine.forget_all()
        engine.generate(HEADS)
        engine.forget_device()
        FAULTS.zero_loads = True
        assert engine.generate(HEADS) != answers["hybrid"]["heads"]

    def test_copies_that_fail_cost_a_computation(self, engine: Engine, answers: Any) -> None:
        engine.forget_all()
        FAULTS.fail_stores = FAULTS.fail_loads = 2
        rounds(engine, HEADS, answers["hybrid"]["heads"], 4)
        rounds(engine, CROWD, answers["hybrid"]["crowd"], 2)
        assert FAULTS.failed > 2
        engine.manager.store.check()


class TestHybrid(HybridCases):
    MODEL = "hybrid"
    EXTRA: ClassVar[dict[str, Any]] = {}


class TestHybridInChunksOfTwo(HybridCases):
    MODEL = "hybrid"
    EXTRA: ClassVar[dict[str, Any]] = {"blocks_per_chunk": 2}

    @pytest.mark.parametrize("num_tokens", [97, 104])
    def test_chunks_without_their_first_blocks_are_not_found(
        self, engine: Engine, num_tokens: int
    ) -> None:
        """A window has moved on: the engine has the second block of a chunk, and not the first."""
        prompts = [prompt(30, num_tokens)]
        engine.forget_all()
        expected = engine.generate(prompts, 60)
        engine.connector.reset_cache()  # the engine's own cache stays
        FAULTS.heap().fill_(0x41)
        assert engine.generate(prompts, 60) == expected
        assert engine.cached == [96]
        for _ in range(3):
            engine.forget_device()
            assert engine.generate(prompts, 60) == expected
        assert engine.cached[0] >= 64
        engine.manager.store.check()


class TestHybridInASmallHeap(HybridCases):
    """Chunks of all groups leave, and requests are preempted."""

    MODEL = "hybrid"
    EXTRA: ClassVar[dict[str, Any]] = {
        "cpu_bytes_to_use": 30 * 16384,
        "eviction_policy": "adaptive",
    }
    OPTIONS: ClassVar[dict[str, Any]] = {
        "num_gpu_blocks_override": 48,
        "max_num_batched_tokens": 64,
    }

    def test_tokens_are_the_same_and_not_computed_twice(self, engine: Engine, answers: Any) -> None:
        rounds(engine, CROWD, answers["hybrid"]["crowd"], 3)
        rounds(engine, HEADS, answers["hybrid"]["heads"], 3)
        assert engine.manager.store.stats().evicted_chunks > 0
        engine.manager.store.check()


class TestTiering:
    """Host memory for twelve slots, and a folder behind it."""

    MODEL = "plain"
    EXTRA: ClassVar[dict[str, Any]] = {
        "spec_name": "FaultyTieringSpec",
        "cpu_bytes_to_use": 12 * BLOCK_BYTES,
        "secondary_tiers": [{"type": "fs", "root_dir": "FOLDER"}],
    }

    def test_chunks_come_back_from_the_disk(self, engine: Engine, answers: Any) -> None:
        expected = answers["plain"]["heads"]
        assert engine.generate(HEADS) == expected
        engine.forget_all()  # of the memory; the files stay
        assert engine.generate(HEADS) == expected
        assert sum(engine.cached) == 3 * 192
        assert FAULTS.loaded_bytes > 0
        assert engine.counters()["vllm:kv_offload_tiering_read_bytes"] > 0

    def test_loads_are_what_makes_them_the_same(self, engine: Engine, answers: Any) -> None:
        engine.generate(HEADS)
        engine.forget_all()
        FAULTS.zero_loads = True
        assert engine.generate(HEADS) != answers["plain"]["heads"]

    def test_copies_that_fail_cost_a_computation(self, engine: Engine, answers: Any) -> None:
        FAULTS.fail_stores = FAULTS.fail_loads = 2
        rounds(engine, CROWD, answers["plain"]["crowd"], 3)
        assert FAULTS.failed > 2


class TestMistakes:
    """What a user gets wrong ends the engine's start, and is named."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"evict_policy": "lru"}, "evict_policy.*eviction_policy"),
            ({"eviction_policy": "newest"}, "eviction_policy.*newest"),
            ({"cpu_bytes_to_use": "much"}, "cpu_bytes_to_use.*much"),
            ({"cpu_bytes_to_use": None}, "cpu_bytes_to_use"),
            ({"huge_pages": True}, "huge_pages"),
            ({"numa_node": -1}, "numa_node"),
            ({"secondary_tiers": []}, "secondary_tiers"),
            ({"blocks_per_chunk": "two"}, "blocks_per_chunk"),
            ({"index_path": "/tmp/index"}, "index_path.*heap_path"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_extra_config(self, models: dict[str, str], change: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Engine(models["plain"], change)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kv_load_failure_policy": "fail"}, "kv_load_failure_policy.*recompute"),
            (
                {"kv_connector": "OffloadingConnector", "kv_connector_module_path": None},
                "kv_connector.*KVHeapConnector",
            ),
        ],
        ids=["kv_load_failure_policy", "kv_connector"],
    )
    def test_transfer_config(
        self,
        models: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        change: dict[str, Any],
        message: str,
    ) -> None:
        made = vllm_engines.connector_config

        def changed(**extra: Any) -> dict[str, Any]:
            return made(**extra) | change

        monkeypatch.setattr(vllm_engines, "connector_config", changed)
        with pytest.raises(ValueError, match=message):
            Engine(models["plain"], {})

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("lazy_offload", "lazy_offload.*remove it"),
            ("num_cpu_blocks", "num_cpu_blocks.*cpu_bytes_to_use"),
            ("cpu_bytes_to_use_per_rank", "per_rank.*of all workers as 'cpu_bytes_to_use'"),
            ("disk_path", "disk_path.*KVHeapTieringSpec"),
            ("cache_policy_module_path", "cache_policy_module_path.*eviction_policy"),
        ],
    )
    def test_keys_of_vllms_other_tiers_say_what_to_do(self, key: str, message: str) -> None:
        from kvheap.integrations.vllm.settings import TierSettings

        with pytest.raises(ValueError, match=message):
            TierSettings.of({"cpu_bytes_to_use": 1 << 20, key: 1})

    def test_tiers_take_no_keys_of_the_heap(self, models: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="heap_path"):
            Engine(
                models["plain"],
                {"spec_name": "FaultyTieringSpec", "heap_path": str(tmp_path / "heap")},
            )


class TestScriptsForVLLM:
    """What was written for vLLM's ``OffloadingConnector`` runs when the connector is changed."""

    @pytest.mark.parametrize(
        ("extra", "spec"),
        [
            ({"block_size": 64, "store_threshold": 1}, "KVHeapOffloadingSpec"),
            (
                {"spec_name": "TieringOffloadingSpec", "blocks_per_chunk": 2}
                | {"secondary_tiers": [{"type": "fs", "root_dir": "FOLDER"}]},
                "KVHeapTieringSpec",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_another_connector_is_all(
        self,
        models: dict[str, str],
        answers: Any,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        extra: dict[str, Any],
        spec: str,
    ) -> None:
        made = vllm_engines.connector_config
        given = json.loads(json.dumps(extra).replace("FOLDER", str(tmp_path)))

        def changed(**_: Any) -> dict[str, Any]:
            config = made()
            config["kv_connector_extra_config"] = {"cpu_bytes_to_use": 8 << 20, **given}
            return config

        monkeypatch.setattr(vllm_engines, "connector_config", changed)
        engine = Engine(models["plain"], {})
        expected = answers["plain"]["heads"]
        assert engine.generate(HEADS) == expected
        assert rounds(engine, HEADS, expected, 1)[0] >= 160
        counters = engine.counters()
        assert counters["vllm:kv_offload_load_bytes"] > 0
        assert any(name.startswith("vllm:kv_offload_heap_") for name in counters) == (
            spec == "KVHeapOffloadingSpec"
        )
        engine.close()


def in_processes(model: str, out: Path, timeout_s: int, **options: Any) -> dict[str, Any]:
    """Two rounds in a process of their own, whose engine has processes of its own."""
    found, _ = run(SCRIPT, model, options, out, "1", timeout_s)
    return found


def run(
    script: Path, model: str, options: Any, out: Path, has_processes: str, timeout_s: int
) -> tuple[dict[str, Any], str]:
    """What a script of an engine wrote, and what it said. It may have been killed."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": has_processes,
        "PYTHONPATH": os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(script), model, json.dumps(options), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found, done.stderr


class TestRestart:
    """An engine after another, each in a process of its own, on the same heap."""

    COLD: ClassVar[list[int]] = [0, 160, 160]  # each prompt finds the shared head of the first
    WARM: ClassVar[list[int]] = [192, 192, 192]

    @pytest.fixture
    def live(
        self, models: dict[str, str], answers: Any, tmp_path: Path
    ) -> Callable[..., tuple[list[int], str]]:
        """One life of an engine: the cached tokens of HEADS, and what the engine said."""

        def live(
            model: str = "plain", has_processes: str = "0", is_right: bool = True, **life: Any
        ) -> tuple[list[int], str]:
            paths = {"heap_path": str(tmp_path / "heap"), "index_path": str(tmp_path / "index")}
            life["extra"] = paths | life.get("extra", {})
            found, said = run(LIVES, models[model], life, tmp_path / "found", has_processes, 300)
            (right,) = found["answers"]
            assert (right == answers[model]["heads"]) is is_right
            (cached,) = found["cached"]
            return cached, said

        return live

    def test_the_next_process_finds_the_chunks(self, live: Any, tmp_path: Path) -> None:
        assert live()[0] == self.COLD
        kept = {name: (tmp_path / name).read_bytes() for name in ("heap.0", "index")}
        assert live(end="kill")[0] == self.WARM
        assert not (tmp_path / "index").exists()
        assert live()[0] == self.COLD, "a killed engine leaves no chunks to find"
        (tmp_path / "index").write_bytes(kept["index"])
        cached, said = live()
        assert cached == self.COLD
        assert "its bytes were changed after the index was written" in said
        # The control: the tokens come from the file's bytes, behind the page of its label.
        (tmp_path / "index").write_bytes(kept["index"])
        label, heap = kept["heap.0"][:4096], kept["heap.0"][4096:]
        (tmp_path / "heap.0").write_bytes(label + bytes(len(heap)))
        assert live(is_right=False)[0] == self.WARM

    def test_hybrid_models_in_other_processes(self, live: Any, tmp_path: Path) -> None:
        """vLLM may kill the scheduler's process before it shuts it down; the index is there."""
        options = {"model": "hybrid", "has_processes": "1"}
        assert live(**options)[0][0] == 0  # the others come when they come
        assert (tmp_path / "index").exists()
        assert live(**options)[0] == self.WARM
        cached, said = live(**options, extra={"cpu_bytes_to_use": 32 << 20})
        assert cached[0] == 0
        assert "bytes of a heap is 33554432, was 67108864" in said


def require_rounds(found: dict[str, Any], expected: list[Answer]) -> None:
    assert found["answers"] == [expected, expected]
    assert found["cached"][1] == [192] * 3
    counters = found["counters"]
    assert counters["vllm:kv_offload_load_bytes"] == counters["vllm:kv_offload_store_bytes"] > 0


def test_an_engine_in_another_process(models: dict[str, str], answers: Any, tmp_path: Path) -> None:
    found = in_processes(models["plain"], tmp_path / "found", 300)
    require_rounds(found, answers["plain"]["heads"])


@pytest.mark.tensor_parallel
def test_two_workers(models: dict[str, str], answers: Any, tmp_path: Path) -> None:
    """Each has one of the two KV heads, and the same addresses in a heap of its own."""
    found = in_processes(models["plain"], tmp_path / "found", 600, tensor_parallel_size=2)
    require_rounds(found, answers["plain"]["heads"])


@pytest.mark.tensor_parallel
def test_two_workers_with_the_same_latents(tmp_path: Path) -> None:
    """One heap for both: the bytes are stored once, and each worker loads them."""
    model = vllm_engines.make_mla(tmp_path / "model")
    options = {"dtype": "bfloat16", "max_num_seqs": 1, "tensor_parallel_size": 2}
    found = in_processes(model, tmp_path / "found", 600, **options)
    warm = found["answers"][1]
    assert found["cached"][1] == [192] * 3
    assert warm == found["own"], "not what the engine's own cache gives"
    counters = found["counters"]
    blocks = 160 // BLOCK_TOKENS + len(HEADS)
    stored = blocks * 2 * BLOCK_TOKENS * 576 * 2
    assert counters["vllm:kv_offload_store_bytes"] == stored
    assert counters["vllm:kv_offload_load_bytes"] == 2 * stored
