"""kvheap's tier under models whose caches differ: windows, latents, states, packed blocks.

What an engine without a tier answers is what each test compares with: cold, and from its own
prefix cache, since some kernels round differently when a part of a prompt is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm_cpu_scenes import need_engine

need_engine()

import vllm_engines  # noqa: E402  # before vLLM: it sets what the engine reads
from vllm_engines import Answer, Engine, prompt  # noqa: E402
from vllm_faults import FAULTS  # noqa: E402

HEADS = [prompt(number, 200, shared=160) for number in range(3)]

ONE_BY_ONE = {"dtype": "bfloat16", "max_num_seqs": 1}
"""In bfloat16, what else is in a batch changes the tokens of a random model."""


@dataclass(frozen=True)
class Model:
    """A model, and what an engine with it has.

    Attributes:
        make: saves it in a folder.
        page_bytes: by group, the bytes of a chunk of one block.
        options: of the engine.
        extra: of the tier.
        around: in which the engine is made.
    """

    make: Callable[[Path], str]
    page_bytes: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[None]] = nullcontext


LAYER = 2 * 32 * 32 * 4
"""Bytes that a layer has of a block of 32 tokens: K and V of one head of 32 float32."""

MODELS = {
    "gemma3": Model(vllm_engines.make_gemma3, [LAYER] * 7, extra={"eviction_policy": "arc"}),
    "gpt-oss": Model(vllm_engines.make_gpt_oss, [2 * LAYER] * 2, extra={"blocks_per_chunk": 3}),
    "latents": Model(vllm_engines.make_mla, [2 * 32 * 576 * 2], ONE_BY_ONE),
    "states": Model(
        vllm_engines.make_states,
        [135_680] * 3 + [262_144],
        ONE_BY_ONE | {"kv_cache_memory_bytes": 64 << 20},
    ),
    "packed": Model(
        vllm_engines.make_uneven,
        [2 * LAYER, LAYER, 2 * LAYER],
        extra={"blocks_per_chunk": 2},
        around=vllm_engines.packed_blocks,
    ),
}


@dataclass
class Scene:
    """An engine with a tier, and what one without it answers."""

    model: Model
    engine: Engine
    cold: list[Answer]
    warm: list[Answer]

    def ask(self) -> list[Answer]:
        """Without the engine's own cache."""
        self.engine.forget_device()
        return self.engine.generate(HEADS)


@pytest.fixture(scope="module", params=MODELS)
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    model = MODELS[request.param]
    folder = model.make(tmp_path_factory.mktemp(request.param) / "model")
    FAULTS.clear()
    with model.around():
        plain = Engine(folder, **model.options)
        cold, warm = plain.generate(HEADS), plain.generate(HEADS)
        assert plain.cached == [192] * 3
        plain.close()
        engine = Engine(folder, model.extra, **model.options)
    yield Scene(model, engine, cold, warm)
    FAULTS.clear()
    engine.close()


@pytest.fixture(autouse=True)
def empty(scene: Scene) -> None:
    scene.engine.forget_all()
    FAULTS.clear()


def test_chunks_have_the_bytes_of_their_group(scene: Scene) -> None:
    n = scene.model.extra.get("blocks_per_chunk", 1)
    groups = FAULTS.specs[-1].groups
    assert [group.chunk_bytes // n for group in groups] == scene.model.page_bytes
    assert sum(group.chunk_bytes % n for group in groups) == 0


def test_tokens_are_the_same_and_not_computed_twice(scene: Scene) -> None:
    assert scene.engine.generate(HEADS) == scene.cold
    stored = FAULTS.stored_bytes
    assert scene.ask() == scene.warm
    assert scene.engine.cached == [192] * 3
    assert FAULTS.loaded_bytes > 0
    assert scene.ask() == scene.warm
    assert FAULTS.stored_bytes <= stored * 1.5, "stored twice"
    scene.engine.manager.store.check()


def test_loads_are_what_makes_them_the_same(scene: Scene) -> None:
    scene.engine.generate(HEADS)
    FAULTS.zero_loads = True
    assert scene.ask() != scene.warm
    assert FAULTS.loads > 0


@pytest.mark.parametrize("every", [1, 2])
def test_copies_that_fail_cost_a_computation(scene: Scene, every: int) -> None:
    """Each answer is the one of a prompt that was there, or of one that was not."""
    FAULTS.fail_stores = 0 if every == 1 else every
    FAULTS.fail_loads = every
    for _ in range(3):
        for answer, cold, warm in zip(scene.ask(), scene.cold, scene.warm, strict=True):
            assert answer in (cold, warm)
    assert FAULTS.failed > 0
    FAULTS.clear()
    scene.ask()
    assert scene.ask() == scene.warm
    assert scene.engine.cached == [192] * 3
    scene.engine.manager.store.check()
