"""The bytes of each group's chunks, beside what vLLM's own connector hands to a worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_groups import registered, scheduler_config, worker_config
from vllm_scenes import part_of_vllm

interface = part_of_vllm("vllm.v1.kv_cache_interface")
from kvheap.integrations.vllm.geometry import (  # noqa: E402
    groups_of,
    is_packed,
    unpadded_page,
)

Specs = dict[str, Any]


def full(heads: int = 2, **other: Any) -> Any:
    given = {"block_size": 16, "head_size": 32, "dtype": torch.bfloat16} | other
    return interface.FullAttentionSpec(num_kv_heads=heads, **given)


def window(heads: int = 2) -> Any:
    return interface.SlidingWindowSpec(
        block_size=16, num_kv_heads=heads, head_size=32, dtype=torch.bfloat16, sliding_window=64
    )


def state(page_bytes: int, values: int) -> Any:
    return interface.MambaSpec(
        block_size=16,
        shapes=((values,), (64,)),
        dtypes=(torch.float32, torch.bfloat16),
        page_size_padded=page_bytes,
        mamba_cache_mode="align",
    )


def layers(*specs: Any) -> Specs:
    return {f"model.layers.{i}": spec for i, spec in enumerate(specs)}


PAGE = 2 * 2 * 16 * 32 * 2
MODELS: dict[str, tuple[str, Specs, list[int]]] = {
    "plain": ("LBHNC", layers(*[full()] * 4), [4 * PAGE]),
    "hybrid": ("LBHNC", layers(*[window(), window(), full()] * 2), [2 * PAGE] * 3),
    "uneven": (
        "LBHNC",
        layers(*[full()] * 3, *[window()] * 8),
        [3 * PAGE, 3 * PAGE, 3 * PAGE, 2 * PAGE],
    ),
    "states": (
        "LBHNC",
        layers(*[full(), state(PAGE, 900), state(PAGE, 900), state(PAGE, 900)] * 2),
        [2 * PAGE, *[2 * (900 * 4 + 128)] * 3],
    ),
    "unlike heads": ("LBHNC", layers(full(2), full(4), full(4)), [PAGE + 4 * PAGE]),
    "padded": ("LBHNC", layers(*[full(page_size_padded=PAGE + 512)] * 2), [2 * PAGE]),
}
"""Layout, layers, and the bytes that the pages of each group have."""


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_agree_with_vllms_connector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, specs, page_bytes = MODELS[name]
    of_worker = worker_config(specs, layout)
    caches = registered(of_worker, layout, monkeypatch)
    for blocks_per_chunk in (1, 3):
        groups = groups_of(scheduler_config(of_worker), blocks_per_chunk)
        assert groups == groups_of(of_worker, blocks_per_chunk)
        assert [group.chunk_bytes for group in groups] == [
            size * blocks_per_chunk for size in page_bytes
        ]
        assert [group.chunk_bytes for group in groups] == [
            blocks_per_chunk * sum(ref.page_size_bytes for ref in refs)
            for refs in caches.group_data_refs
        ]
    assert not is_packed(of_worker)


def test_groups_have_their_numbers_and_kinds() -> None:
    groups = groups_of(worker_config(MODELS["hybrid"][1]), 1)
    assert [group.group_id for group in groups] == [0, 1, 2]
    assert sorted(group.name.rpartition("_")[0] for group in groups) == [
        "full_attention",
        "sliding_window",
        "sliding_window",
    ]


def test_blocks_per_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="blocks_per_chunk must be positive, got 0"):
        groups_of(worker_config(MODELS["plain"][1]), 0)


def test_caches_of_an_unknown_kind_are_named() -> None:
    with pytest.raises(NotImplementedError, match="KVCacheSpec cannot be offloaded"):
        unpadded_page(interface.KVCacheSpec(block_size=16))
