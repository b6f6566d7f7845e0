"""Whether the KV of a token is where vLLM keeps it, for every backend and physical order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress

import pytest
from engine_caches import EngineCache, check_blocks, check_detected, each, engine_code
from vllm_attention import SCENES, layouts_of, make
from vllm_layers import LAYERS
from vllm_scenes import ALL_LAYOUTS, BLOCK_COMPACT, LAYER_BY_LAYER

from kvheap import PagedKVCache
from kvheap.kernels.paged_layout import LayoutError

TOLD = ("kv_cache_dtype", "backend")
"""What an engine may leave out when it asks for its layout."""


NOT_YET: dict[str, str] = {}
"""Cases whose engine layout is missing, and why; each must fail until it is taken off the list."""

NOT_YET_TOLD_LESS: dict[str, str] = {}

NOT_YET_OPAQUE: dict[str, str] = {}

IN_BLOCKS = {"CPU_ATTN-2", "CPU_ATTN-3"}
"""Cases without rows of tokens that are found all the same: whole blocks of them can be moved."""

NEEDS_A_NAME = {
    "ROCM_AITER_FA-2": "its blocks look the same whether shuffled or not: an environment variable",
    "ROCM_AITER_UNIFIED_ATTN-2": "the same",
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
