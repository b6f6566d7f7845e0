"""The device pools of SGLang, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_caches import EngineCache
from sglang_scenes import (
    HEAD_DIM,
    HEADS,
    NUM_LAYERS,
    NUM_PAGES,
    environment,
    key_value_cache,
    mha,
    page_cache,
    part_of_sglang,
    pool,
    row_cache,
    whole_pages,
)

V4 = {
    "page_size": 64,
    "dtype": torch.float8_e4m3fn,
    "qk_nope_head_dim": 448,
    "qk_rope_head_dim": 64,
    "module": "deepseek_v4_memory_pool",
}


INDEXER = {"name": "indexer", "given": {"block_size": 64}}


def hnd(patch: pytest.MonkeyPatch) -> EngineCache:
    with environment(SGLANG_USE_HND_KVCACHE=True):
        return key_value_cache(mha())


def pairs_of_two_layers(patch: pytest.MonkeyPatch) -> EngineCache:
    """(K, V) of each layer instead of K of all and V of all: with two layers, both nest alike."""
    with environment(SGLANG_USE_HND_KVCACHE=True):
        made = mha(layer_num=2)
    pairs = list(zip(made.k_buffer, made.v_buffer, strict=True))
    return key_value_cache(made, pairs, num_layers=2, name="kv-tuples-hnd")


def slot_pairs_of_two_layers(patch: pytest.MonkeyPatch) -> EngineCache:
    """The same of slots: there is no engine layout for it, so nothing may be found."""
    made = mha(layer_num=2)
    pairs = list(zip(made.k_buffer, made.v_buffer, strict=True))
    return replace(key_value_cache(made, pairs, num_layers=2), rows=None)


def lists_of_two_layers(patch: pytest.MonkeyPatch) -> EngineCache:
    with environment(SGLANG_USE_HND_KVCACHE=True):
        return key_value_cache(mha(layer_num=2), num_layers=2, name="sglang-mha-hnd")


def vectorized(patch: pytest.MonkeyPatch) -> EngineCache:
    """AITER's: K [pages, H, D / x, page, x], V [pages, H, page / x, D, x]."""
    patch.setattr(part_of_sglang("sglang.srt.mem_cache.memory_pool"), "_use_aiter", True)
    with environment(SGLANG_AITER_KV_CACHE_LAYOUT="vectorized_5d"):
        made = mha()
    return whole_pages([*made.k_buffer, *made.v_buffer], 16)


def vectorized_lists(patch: pytest.MonkeyPatch) -> EngineCache:
    """The same as a list of K and one of V, as the others are: no tokens may be found in it."""
    made = vectorized(patch)
    lists = [made.tensors[:NUM_LAYERS], made.tensors[NUM_LAYERS:]]
    return replace(made, tensors=lists, name="")


def unified(patch: pytest.MonkeyPatch) -> EngineCache:
    """Views of one buffer in which each token has K and V of all layers."""
    spec = part_of_sglang("sglang.srt.mem_cache.unified_memory_pool").MHASubPoolSpec(
        name="full",
        grow_direction="up",
        layer_num=NUM_LAYERS,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        store_dtype=torch.bfloat16,
    )
    build = part_of_sglang("sglang.srt.mem_cache.layout.token_major").build_dense_views
    slots = NUM_PAGES * 16
    raw = torch.zeros(spec.entry_bytes() * slots, dtype=torch.uint8)
    sides = [
        build(raw, layout=spec.layout(), part_name=part, num_slots=slots) for part in ("k", "v")
    ]
    made = type("Pool", (), {"head_num": HEADS, "k_buffer": sides[0], "v_buffer": sides[1]})
    return key_value_cache(made)


def mla(
    patch: pytest.MonkeyPatch, cls: str = "MLATokenToKVPool", dtype: torch.dtype = torch.bfloat16
) -> EngineCache:
    made = pool(cls, kv_lora_rank=512, qk_rope_head_dim=64, dtype=dtype)
    return row_cache(made.kv_buffer, 16)


def sparse_mla() -> Any:
    return pool(
        "DSATokenToKVPool",
        page_size=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        index_head_dim=128,
        kv_cache_dim=576,
        skip_topk_layers=[False, True, False],
    )


def index_keys(patch: pytest.MonkeyPatch) -> EngineCache:
    """Keys of an indexer, and the scales behind those of a page."""
    buffers = [buffer for buffer in sparse_mla().index_k_with_scale_buffer if len(buffer)]
    return page_cache(buffers, 64, (128, 64 * 128, 4), (128, 4), **INDEXER)


def fp4_data(patch: pytest.MonkeyPatch) -> EngineCache:
    return key_value_cache(mha("MHATokenToKVPoolFP4"))


def fp4_scales(patch: pytest.MonkeyPatch) -> EngineCache:
    return row_cache(mha("MHATokenToKVPoolFP4").k_scale_buffer, 16)


def mxfp8_data(patch: pytest.MonkeyPatch) -> EngineCache:
    return key_value_cache(mha("MHATokenToKVPoolMXFP8"))


def mxfp8_scales(patch: pytest.MonkeyPatch) -> EngineCache:
    made = mha("MHATokenToKVPoolMXFP8", head_dim=64)
    scales = (made.k_scale_buffer, made.v_scale_buffer)
    view = type("Pool", (), {"head_num": HEADS, "k_buffer": scales[0], "v_buffer": scales[1]})
    return key_value_cache(view)


def mxfp8_interleaved_scales(patch: pytest.MonkeyPatch) -> EngineCache:
    made = mha("MHATokenToKVPoolMXFP8", head_dim=64, page_size=128)
    return whole_pages([*made.k_scale_buffer, *made.v_scale_buffer], 128)


def nvfp4_pages(patch: pytest.MonkeyPatch) -> EngineCache:
    """MiniMax-M3's: data and scales of K and of V, one behind the other in each page."""
    made = pool(
        "MiniMaxM3Nvfp4MainKVPool",
        "minimax_m3_nvfp4_pool",
        page_size=128,
        head_num=HEADS,
        head_dim=128,
    )
    return whole_pages(made.rows, 128)


def keys_only(patch: pytest.MonkeyPatch) -> EngineCache:
    return row_cache(mha("MHATokenToKOnlyPool").k_buffer, 16, num_heads=HEADS)


def v4(patch: pytest.MonkeyPatch, layout: str) -> EngineCache:
    """DeepSeek-V4's rows, in one of SGLang's layouts of a page."""
    made = pool("DeepSeekV4SingleKVPool", kv_layout=layout, **V4)
    kept = made.kv_layout
    widths = (kept.data_bytes, kept.scale_bytes)
    name = "mla" if kept.is_interleaved else "values-scales"
    given = {"block_size": 64} if kept.is_interleaved else {"block_size": 64, "widths": widths}
    return page_cache(made.kv_buffer, 64, kept.row_addressing(64), widths, name=name, given=given)


def v4_uniform(patch: pytest.MonkeyPatch) -> EngineCache:
    made = pool("DeepSeekV4UniformFP8KVPool", **V4)
    given = {"block_size": 64}
    return page_cache(made.kv_buffer, 64, (512, 0, 0), (512, 0), name="mla", given=given)


def v4_indexer(patch: pytest.MonkeyPatch) -> EngineCache:
    made = pool(
        "DeepSeekV4IndexerPool",
        "deepseek_v4_memory_pool",
        page_size=64,
        index_head_dim=128,
        use_fp4_indexer=False,
    )
    buffers = made.index_k_with_scale_buffer
    return page_cache(buffers, 64, (128, 64 * 128, 4), (128, 4), **INDEXER)


Make = Callable[[pytest.MonkeyPatch], EngineCache]

POOLS: dict[str, Make] = {
    "MHA": lambda patch: key_value_cache(mha()),
    "MHA-fp8": lambda patch: key_value_cache(mha(dtype=torch.float8_e4m3fn)),
    "MHA-1": lambda patch: key_value_cache(mha(head_num=1)),
    "MHA-page-1": lambda patch: key_value_cache(mha(page_size=1), page_size=1),
    "MHA-v_head_dim": lambda patch: key_value_cache(mha(v_head_dim=16)),
    "MHA-hnd": hnd,
    "MHA-pairs-2-layers": pairs_of_two_layers,
    "MHA-slot-pairs-2-layers": slot_pairs_of_two_layers,
    "MHA-hnd-2-layers": lists_of_two_layers,
    "MHA-vectorized_5d": vectorized,
    "MHA-vectorized_5d-lists": vectorized_lists,
    "MHA-unified": unified,
    "MHA-fp4": fp4_data,
    "MHA-fp4-scales": fp4_scales,
    "MHA-mxfp8": mxfp8_data,
    "MHA-mxfp8-scales": mxfp8_scales,
    "MHA-mxfp8-scales-interleaved": mxfp8_interleaved_scales,
    "MHA-nvfp4-pages": nvfp4_pages,
    "K": keys_only,
    "MLA": mla,
    "MLA-fp8": lambda patch: mla(patch, dtype=torch.float8_e4m3fn),
    "MLA-fp4": lambda patch: mla(patch, "MLATokenToKVPoolFP4"),
    "DSA": lambda patch: row_cache(sparse_mla().kv_buffer, 64),
    "DSA-index": index_keys,
    "V4-v4": lambda patch: v4(patch, "v4"),
    "V4-v41": lambda patch: v4(patch, "v41"),
    "V4-v41_fp4": lambda patch: v4(patch, "v41_fp4"),
    "V4-v41_new": lambda patch: v4(patch, "v41_new"),
    "V4-v41_fp4_new": lambda patch: v4(patch, "v41_fp4_new"),
    "V4-uniform_fp8": v4_uniform,
    "V4-indexer": v4_indexer,
}
"""What makes each pool's cache."""
