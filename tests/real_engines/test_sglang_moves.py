"""Whether tokens that kvheap stores and loads elsewhere end as those that SGLang itself moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_caches import each, engine_code, flat, heap
from sglang_pools import sparse_mla
from sglang_scenes import environment, mha

from kvheap import PagedKVCache

Move = Callable[[torch.Tensor, torch.Tensor], None]
"""Moves tokens to the slots of the first argument, from those of the second."""

NOT_YET: dict[str, str] = {}


def pool_of(name: str) -> tuple[list[torch.Tensor], str, int, Move]:
    """The buffers of a pool, its engine layout and page size, and how SGLang moves its tokens."""
    if name == "DSA-index":
        made = sparse_mla()
        buffers = [buffer for buffer in made.index_k_with_scale_buffer if len(buffer)]
        return buffers, "indexer", 64, made.index_key_cache.move
    variable = "SGLANG_USE_HND_KVCACHE" if name == "MHA-hnd" else "SGLANG_NATIVE_MOVE_KV_CACHE"
    with environment(**{variable: True}):
        made = mha()
    layout = "sglang-mha-hnd" if name == "MHA-hnd" else "sglang-mha"
    return [made.k_buffer, made.v_buffer], layout, 16, made.move_kv_cache


@pytest.mark.parametrize("name", each(("MHA", "MHA-hnd", "DSA-index"), NOT_YET))
def test_tokens_end_where_sglang_moves_them(name: str) -> None:
    with engine_code():
        tensors, layout, page_size, move = pool_of(name)
    buffers = list(flat(tensors))
    for buffer in buffers:
        buffer.random_(0, 100)
    before = [buffer.clone() for buffer in buffers]
    slots = torch.randperm(5 * page_size)
    source, target = slots[:25], slots[-25:]
    with engine_code():
        move(target, source)
    expected = [buffer.clone() for buffer in buffers]
    assert not all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    for buffer, saved in zip(buffers, before, strict=True):
        buffer.copy_(saved)
    cache = PagedKVCache.of(layout, tensors, block_size=page_size)
    chunks = heap()
    batch = chunks.batched_store(cache, source, 8)
    assert batch is not None
    chunks.batched_load(batch, cache, target)
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))
