"""Whether the KV of a token is where vLLM keeps it, for every backend and physical order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress

import pytest
from engine_caches import EngineCache, because, check_blocks, check_detected, each, engine_code
from vllm_attention import SCENES, layouts_of, make
from vllm_layers import LAYERS
from vllm_scenes import ALL_LAYOUTS, BLOCK_COMPACT, LAYER_BY_LAYER

from kvheap import PagedKVCache
from kvheap.kernels.paged_layout import LayoutError

TOLD = ("kv_cache_dtype", "backend")
"""What an engine may leave out when it asks for its layout."""


NOT_YET = {
    **because(
        "K and V of different size",
        *("FLASH_ATTN_DIFFKV-1", "FLASH_ATTN_DIFFKV-3"),
        *("TRITON_ATTN_DIFFKV-1", "TRITON_ATTN_DIFFKV-3"),
    ),
    **because(
        "scales in the rows",
        *("TRITON_ATTN-int8_per_token_head-2", "TRITON_ATTN-int8_per_token_head-3"),
        *("TRITON_ATTN-fp8_per_token_head-2", "TRITON_ATTN-fp8_per_token_head-3"),
        *("TRITON_ATTN-int4_per_token_head-2", "TRITON_ATTN-int4_per_token_head-3"),
    ),
    **because(
        "all heads of K in one row, then those of V",
        *("B12X-1", "B12X-2", "B12X-3"),
        *("ROCM_SEGMENTED_ATTN-1", "ROCM_SEGMENTED_ATTN-2", "ROCM_SEGMENTED_ATTN-3"),
    ),
    **because("taken for vllm-lhbnc", "ROCM_ATTN-2", "ROCM_AITER_FA-shuffle-2"),
    **because("taken for vllm-lbhnc", "CPU_ATTN-2", "CPU_ATTN-3"),
    **because("pages of data and scales", "FLASHINFER-nvfp4-2", "FLASHINFER-nvfp4-3"),
    **because(
        "one packed row for K and V",
        *("TURBOQUANT-turboquant_k8v4", "TURBOQUANT-turboquant_3bit_nc", "ROCM_OCTAVE"),
    ),
    **because(
        "one row of one head: [B, 1, N, C]",
        *("MLA-auto", "MLA-fp8", "MLA-fp8_ds_mla", "MLA-nvfp4_ds_mla", "MLA-int8_per_token_head"),
        *("V4-auto", "V4-compressor", "V41-window", "V41-fp8_ds_mla", "V41-nvfp4_ds_mla"),
        *("RING-1", "RING-2"),
    ),
    **because(
        "values of a page, then its scales",
        *("INDEXER", "V4-fp8_ds_mla", "V4-window", "V4-indexer", "V4-packed"),
    ),
}
"""Cases whose engine layout is missing, and why; each must fail until it is taken off the list."""

NOT_YET_TOLD_LESS = because(
    "taken for vllm-lbhnc or vllm-lhbnc",
    *("B12X-2", "ROCM_ATTN-2", "ROCM_SEGMENTED_ATTN-2", "ROCM_AITER_FA-shuffle-2"),
    *("CPU_ATTN-2", "CPU_ATTN-3"),
)

NOT_YET_OPAQUE = because(
    "a dense block whose dimensions are in another order",
    *("FLASH_ATTN-2", "FLASH_ATTN-3", "FLASH_ATTN-split", "FLASH_ATTN-fp8"),
    *("TRITON_ATTN-2", "TRITON_ATTN-3", "TRITON_ATTN-split", "TRITON_ATTN-fp8"),
    *("FLASHINFER-2", "FLASHINFER-3", "FLASHINFER-split", "FLASHINFER-fp8"),
    *("FLEX_ATTENTION-2", "FLEX_ATTENTION-3", "FLEX_ATTENTION-split"),
    *("TRITON_ATTN-int8_per_token_head-2", "TRITON_ATTN-int8_per_token_head-3"),
    *("TRITON_ATTN-fp8_per_token_head-2", "TRITON_ATTN-fp8_per_token_head-3"),
    *("TRITON_ATTN-int4_per_token_head-2", "TRITON_ATTN-int4_per_token_head-3"),
    *("FLASH_ATTN_DIFFKV-3", "TRITON_ATTN_DIFFKV-3"),
    *("FLASHINFER-nvfp4-2", "FLASHINFER-nvfp4-3"),
    *("TURBOQUANT-turboquant_k8v4", "TURBOQUANT-turboquant_3bit_nc", "ROCM_OCTAVE"),
    *("RING-2", "HYBRID"),
)

IN_BLOCKS = {"CPU_ATTN-2", "CPU_ATTN-3"}
"""Cases without rows of tokens that are found all the same: whole blocks of them can be moved."""

NEEDS_A_NAME = {
    "ROCM_AITER_FA-2": "its blocks look the same whether shuffled or not: an environment variable",
}
"""Cases that may be refused: nothing that the engine knows tells them from others."""

CASES = [*SCENES, *LAYERS]


def caches(
    name: str, patch: pytest.MonkeyPatch, layouts: Sequence[str] = ALL_LAYOUTS
) -> Iterator[EngineCache]:
    """The caches of a case, in each physical order that its backend takes."""
    with engine_code():
        orders = layouts_of(SCENES[name], patch) if name in SCENES else LAYERS[name].orders
    for layout in orders:
        if layout not in layouts:
            continue
        with engine_code():
            made = (
                [make(SCENES[name], layout, patch)]
                if name in SCENES
                else LAYERS[name].caches(layout)
            )
        yield from made


@pytest.mark.parametrize("name", each(CASES, NOT_YET))
def test_a_cache_is_found_and_its_tokens_move(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in caches(name, monkeypatch):
        has_layout = cache.rows is not None or name in IN_BLOCKS
        may_be_refused = not has_layout or name in NEEDS_A_NAME
        with suppress(LayoutError) if may_be_refused else nullcontext():
            check_detected(cache, cache.detect())


@pytest.mark.parametrize("name", each(CASES, NOT_YET_TOLD_LESS))
def test_told_less_it_is_right_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in caches(name, monkeypatch, LAYER_BY_LAYER):
        checked: list[PagedKVCache] = []
        for left_out in (TOLD, *((told,) for told in TOLD)):
            with suppress(LayoutError):
                found = cache.detect(**dict.fromkeys(left_out))
                if not any(found.addresses_like(other) for other in checked):
                    check_detected(cache, found)
                checked.append(found)


@pytest.mark.parametrize("name", each(CASES, NOT_YET_OPAQUE))
def test_whole_blocks_move_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in caches(name, monkeypatch, BLOCK_COMPACT):
        check_blocks(cache, PagedKVCache.of("opaque", cache.tensors))
