"""kvheap's tier in vLLM's engine when copies fail, raise or are slow, and when a heap is tiny.

Whatever happens, tokens are those of an engine without a tier, no request waits for ever, and once
nothing fails any more the tier is used as before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from vllm_cpu_scenes import need_engine

need_engine()

import vllm_engines  # noqa: E402  # before vLLM: it sets what the engine reads
from vllm_engines import Answer, Engine, prompt  # noqa: E402
from vllm_faults import FAULTS  # noqa: E402

HEADS = [prompt(number, 200, shared=160) for number in range(3)]

POOL = [
    *((tokens, 16) for tokens in HEADS),
    *((prompt(10 + number, 200), 16) for number in range(2)),
    *((prompt(30 + number, 90 + 7 * number), 60) for number in range(3)),
    (prompt(5, 64, shared=60), 20),
    (prompt(6, 33), 20),
]
"""Prompts and how many tokens are asked for: shared heads, long ones, growing ones, short ones."""

MODELS = {
    "plain": (vllm_engines.make_plain, 2 * 16384),
    "hybrid": (vllm_engines.make_hybrid, 2 * 8192),
}
"""What makes a model, and the bytes of a chunk of one block of each of its groups."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[Answer]]]:
    """By name, the folder of a model, and its answers to POOL without a tier."""
    found = {}
    for name, (make, _) in MODELS.items():
        folder = make(tmp_path_factory.mktemp(name) / "model")
        engine = Engine(folder, enable_prefix_caching=False, max_num_seqs=1)
        found[name] = (folder, [engine.generate([p], n)[0] for p, n in POOL])
        engine.close()
    return found


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    FAULTS.clear()
    logging.getLogger("kvheap").setLevel(logging.CRITICAL)  # what is made up is logged
    yield
    logging.getLogger("kvheap").setLevel(logging.NOTSET)
    FAULTS.clear()


class Soup:
    """Requests of the pool that come, are aborted and end, while the tier is reset.

    Args:
        engine: with a tier.
        expected: the answers to POOL.
        random: draws all of it.
    """

    def __init__(self, engine: Engine, expected: list[Answer], random: Random) -> None:
        self.engine = engine
        self.expected = expected
        self.random = random
        self.asked: dict[str, int] = {}

    def run(self, count: int, aborts: float = 0.0, resets: float = 0.0) -> None:
        """Ask some prompts; each answer must be right.

        Args:
            count: of the requests.
            aborts, resets: how likely each is after a step.
        """
        engine, random = self.engine, self.random
        to_come = [random.randrange(len(POOL)) for _ in range(count)]
        names: dict[str, int] = {}
        steps = 0
        while to_come or engine.llm.llm_engine.has_unfinished_requests():
            while to_come and random.random() < 0.5:
                name, number = f"{len(self.asked)}", to_come.pop()
                self.asked[name] = names[name] = number
                engine.add(name, *POOL[number])
            engine.step(1)
            steps += 1
            assert steps < 3000, "a request waits for ever"
            drawn = random.random()
            if drawn < aborts and (open_requests := engine.unfinished()):
                name = random.choice(open_requests)
                engine.abort(name)
                del names[name]
            elif drawn < aborts + resets:
                engine.connector.reset_cache()
        for (name, number), answer in zip(names.items(), engine.finish(), strict=True):
            assert answer == self.expected[number], f"request {name}, prompt {number}"
        engine.manager.store.check()

    def require_recovered(self) -> None:
        """Nothing is under way for ever, and all heads are found again."""
        FAULTS.clear()
        self.engine.connector.reset_cache()
        for _ in range(3):  # stored, and perhaps offered before
            self.engine.forget_device()
            assert self.engine.generate(HEADS) == self.expected[: len(HEADS)]
        self.engine.forget_device()
        self.engine.generate(HEADS[:1])
        stats = self.engine.manager.store.stats()
        assert stats.loading_bytes == 0
        assert not self.engine.connector.scheduler.has_pending_push_work()
        self.engine.manager.store.check()


def test_a_heap_for_no_chunk_is_refused_at_start(models: Any) -> None:
    with pytest.raises(ValueError, match=r"cpu_bytes_to_use.* give at least 32768"):
        Engine(models["plain"][0], {"cpu_bytes_to_use": 32768 - 256})


WAYS: dict[str, dict[str, Any]] = {
    "all fail": {"fail_share": 1.0},
    "all are refused": {"fail_share": 1.0, "by": "refused"},
    "all raise": {"fail_share": 1.0, "by": "raises"},
    "the first ones fail": {"fail_first": 5},
    "the first ones raise, slowly": {"fail_first": 5, "by": "raises", "slow": 4},
    "a third fails": {"fail_share": 0.3},
    "a third is refused, slowly": {"fail_share": 0.3, "by": "refused", "slow": 3},
    "slow": {"slow": 6},
    "nobody answers": {"break_polls": 1},
    "some answers are lost": {"break_polls": 3, "slow": 2},
    "waiting fails": {"break_waits": 1, "slow": 9},
    "all at once": {"break_polls": 5, "break_waits": 2, "slow": 4, "fail_share": 0.2},
}


TIERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "preempted": (
        "plain",
        {"cpu_bytes_to_use": 20},
        {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 64},
    ),
    "chunks of 4, async scheduling": (
        "plain",
        {"cpu_bytes_to_use": 40, "blocks_per_chunk": 4, "eviction_policy": "arc"},
        {"max_num_batched_tokens": 64, "async_scheduling": True},
    ),
    "one chunk": ("plain", {"cpu_bytes_to_use": 1}, {"async_scheduling": False}),
    "hybrid, preempted, async scheduling": (
        "hybrid",
        {"cpu_bytes_to_use": 30, "eviction_policy": "adaptive"},
        {
            "num_gpu_blocks_override": 48,
            "max_num_batched_tokens": 64,
            "async_scheduling": True,
        },
    ),
    "hybrid, chunks of 2, twice offered": (
        "hybrid",
        {"cpu_bytes_to_use": 200, "blocks_per_chunk": 2, "store_threshold": 2},
        {"async_scheduling": False},
    ),
}
"""Model, extra config with ``cpu_bytes_to_use`` in chunks of one block, and options."""


@pytest.fixture(scope="module", params=TIERS)
def soup(request: pytest.FixtureRequest, models: Any) -> Iterator[Soup]:
    model, extra, options = TIERS[request.param]
    folder, expected = models[model]
    bytes_to_use = extra["cpu_bytes_to_use"] * MODELS[model][1]
    FAULTS.clear()
    engine = Engine(folder, extra | {"cpu_bytes_to_use": bytes_to_use}, **options)
    yield Soup(engine, expected, Random(request.param))
    FAULTS.clear()
    engine.close()


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_same_whatever_fails(soup: Soup, way: str) -> None:
    for name, value in WAYS[way].items():
        setattr(FAULTS, name, value)
    FAULTS.random = Random(way)
    soup.run(6)
    soup.engine.llm.reset_prefix_cache()
    soup.run(6, aborts=0.02, resets=0.02)


def test_afterwards_nothing_is_stuck(soup: Soup) -> None:
    soup.require_recovered()


def test_loads_were_tried(soup: Soup, request: pytest.FixtureRequest) -> None:
    """What the tests above stand on."""
    FAULTS.clear()
    soup.run(10)
    for _ in range(3):
        soup.engine.forget_device()
        soup.engine.generate(HEADS[:1])
    assert FAULTS.stores > 0
    if soup.engine.manager.store.stats().heap_bytes > 32768:
        assert FAULTS.loads > 0
        assert FAULTS.loaded_bytes > 0
