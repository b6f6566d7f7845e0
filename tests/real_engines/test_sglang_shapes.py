"""Whether the KV of a token is where SGLang keeps it, for every pool."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
from engine_caches import check_detected, each, engine_code
from sglang_pools import POOLS, sparse_mla

from kvheap import PagedKVCache
from kvheap.kernels.engine_layouts import LayoutError

NOT_YET: dict[str, str] = {}
"""Pools whose engine layout is missing, and why; each must fail until it is taken off the list."""

NOT_YET_UNNAMED: dict[str, str] = {}


@pytest.mark.parametrize("name", each(POOLS, NOT_YET))
def test_a_pool_is_found_and_its_tokens_move(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_code():
        cache = POOLS[name](monkeypatch)
    with suppress(LayoutError) if cache.rows is None else nullcontext():
        check_detected(cache, cache.found())


@pytest.mark.parametrize("name", each(POOLS, NOT_YET_UNNAMED))
def test_without_a_name_it_is_right_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_code():
        cache = POOLS[name](monkeypatch)
    with suppress(LayoutError):
        check_detected(cache, cache.detect())


def test_a_layer_without_rows_is_refused() -> None:
    buffers = sparse_mla().index_k_with_scale_buffer
    assert [len(buffer) for buffer in buffers] == [5, 0, 5]
    with pytest.raises(LayoutError, match="layer 1"):
        PagedKVCache.of("indexer", buffers, block_size=64)
