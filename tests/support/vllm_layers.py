"""Caches of vLLM's layers that keep one vector for a token, or a state: latent attention, indexers,
compressors, Mamba; alone and beside each other in one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from engine_caches import EngineCache
from vllm_scenes import (
    ALL_LAYOUTS,
    BLOCK_COMPACT,
    allocate,
    cache_of,
    engine_config,
    key_value_rows,
    layers_of,
    one_row,
    part_of_vllm,
    split_rows,
)


def mla_spec(kv_cache_dtype: str) -> Any:
    """Latent attention: 512 elements and 64 of positions, or as many bytes as the dtype packs."""
    layer = part_of_vllm("vllm.model_executor.layers.attention.mla_attention").MLAAttention
    backend = part_of_vllm("vllm.v1.attention.backends.mla.triton_mla").TritonMLABackend
    spec = layer.get_kv_cache_spec(
        SimpleNamespace(
            head_size=576,
            indexer=None,
            kv_cache_dtype=kv_cache_dtype,
            non_causal_multi_token_decode=False,
            sliding_window=None,
            topk_buffer_width=None,
        ),
        engine_config("LBNHC", block_size=16),
    )
    return part_of_vllm("vllm.v1.worker.utils").customize_attention_spec(backend, spec)


def indexer_spec() -> Any:
    """DeepSeek-V3.2's indexer: 128 fp8 values and their scale."""
    layer = part_of_vllm("vllm.model_executor.models.deepseek_v2").DeepseekV32IndexerCache
    cache_config = SimpleNamespace(block_size=16)
    return layer.get_kv_cache_spec(
        SimpleNamespace(head_dim=132, dtype=torch.uint8, cache_config=cache_config), None
    )


def v4_spec(kv_cache_dtype: str) -> Any:
    """DeepSeek-V4's compressed cache: 64 records to a block of 256 tokens."""
    layer = part_of_vllm("vllm.models.deepseek_v4.attention").DeepseekV4Attention
    return layer.get_kv_cache_spec(
        SimpleNamespace(
            compress_ratio=4,
            head_dim=512,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_torch_dtype=torch.bfloat16,
        ),
        engine_config("BLHNC", block_size=256),
    )


def v4_window_spec(record_bytes: int) -> Any:
    """The sliding-window cache of DeepSeek-V4 (584 bytes a token) or V4.1 (528)."""
    layer = part_of_vllm("vllm.v1.attention.backends.mla.sparse_swa").DeepseekV4SWACache
    return layer.get_kv_cache_spec(
        SimpleNamespace(
            block_size=32,
            bounded_replay=False,
            cache_config=SimpleNamespace(cache_dtype="fp8_ds_mla"),
            dtype=torch.uint8,
            head_dim=512,
            packed_block_stride_alignment=None,
            packed_bytes_per_token=record_bytes,
            packed_page_alignment={584: 576, 528: 512}[record_bytes],
            window_size=128,
        ),
        None,
    )


def v4_indexer_spec() -> Any:
    layer = part_of_vllm("vllm.models.deepseek_v4.attention").DeepseekV4IndexerCache
    cache_config = SimpleNamespace(block_size=256)
    return layer.get_kv_cache_spec(
        SimpleNamespace(
            head_dim=132, dtype=torch.uint8, cache_config=cache_config, compress_ratio=4
        ),
        engine_config("BLHNC", cache_dtype="fp8_ds_mla"),
    )


def v4_compressor_spec() -> Any:
    """The state of DeepSeek-V4's compressor: float32, 4 states to a block."""
    layer = part_of_vllm("vllm.models.deepseek_v4.compressor").CompressorStateCache
    return layer.get_kv_cache_spec(
        SimpleNamespace(block_size=4, dtype=torch.float32, sliding_window=8, state_dim=96),
        engine_config("BLHNC", cache_dtype="fp8_ds_mla"),
    )


def v41_spec(kv_cache_dtype: str) -> Any:
    """DeepSeek-V4.1's compressed cache: records of 528 or 288 bytes, scales behind the values."""
    layer = part_of_vllm("vllm.models.deepseek_v41.attention").DeepseekV4Attention
    record_bytes = 288 if kv_cache_dtype == "nvfp4_ds_mla" else 528
    return layer.get_kv_cache_spec(
        SimpleNamespace(
            compress_ratio=2,
            compressed_bytes_per_token=record_bytes,
            head_dim=512,
            is_kv_source=True,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_torch_dtype=torch.uint8,
            kv_page_alignment=512,
        ),
        engine_config("BLHNC", block_size=64),
    )


def ring_spec(num_heads: int) -> Any:
    """Rings of a few rows for each request, as in the tails of several indexers."""
    interface = part_of_vllm("vllm.v1.kv_cache_interface")
    return interface.CircularBufferSpec(
        block_size=8, num_kv_heads=num_heads, head_size=64, head_size_v=0, dtype=torch.bfloat16
    )


def mamba_spec(page_size_padded: int | None = None) -> Any:
    """A Mamba layer: a convolution's state of bfloat16 and one of float32 in each block."""
    layer = part_of_vllm("vllm.model_executor.layers.mamba.abstract").MambaBase
    return layer.get_kv_cache_spec(
        SimpleNamespace(
            get_state_shape=lambda: ((3, 40), (5, 8, 16)),
            get_state_dtype=lambda: (torch.bfloat16, torch.float32),
            is_kv_cache_tp_replicated=False,
            mamba_type=None,
        ),
        SimpleNamespace(
            cache_config=SimpleNamespace(
                mamba_block_size=64,
                mamba_cache_mode="none",
                mamba_page_size_padded=page_size_padded,
                use_replayssm=False,
            ),
            num_speculative_tokens=0,
        ),
    )


def full_spec(page_size_padded: int | None = None) -> Any:
    """Attention of 2 KV heads beside layers of another kind."""
    interface = part_of_vllm("vllm.v1.kv_cache_interface")
    return interface.FullAttentionSpec(
        block_size=16,
        num_kv_heads=2,
        head_size=64,
        dtype=torch.bfloat16,
        page_size_padded=page_size_padded,
    )


@dataclass(frozen=True)
class LayerScene:
    """A kind of layer.

    Attributes:
        spec: makes its spec.
        backend: the name of its backend.
        kv_cache_dtype: vLLM's ``CacheDType``.
        value_bytes: the values of a token, in pages of all values and then all scales; None if each
            token has one row.
        orders: the physical orders that it is kept in.
        is_state: whether a block is one state, not rows of tokens.
    """

    spec: Callable[[], Any]
    backend: str
    kv_cache_dtype: str = "auto"
    value_bytes: int | None = None
    orders: tuple[str, ...] = BLOCK_COMPACT
    is_state: bool = False

    def caches(self, layout: str) -> list[EngineCache]:
        return [self.cache(list(allocate([layers_of(self.spec())], layout).values()))]

    def cache(self, views: Sequence[torch.Tensor]) -> EngineCache:
        known = {
            "num_kv_heads": views[0].shape[1],
            "head_dim": views[0].shape[3],
            "block_size": views[0].shape[2],
            "kv_cache_dtype": self.kv_cache_dtype,
            "backend": self.backend,
        }
        if self.is_state:
            return cache_of(views, known, None)
        if self.value_bytes is not None:
            return cache_of(views, known, split_rows(views, self.value_bytes))
        return cache_of(views, known, one_row(views))


def _mla(kv_cache_dtype: str) -> LayerScene:
    return LayerScene(
        partial(mla_spec, kv_cache_dtype), "TRITON_MLA", kv_cache_dtype, orders=ALL_LAYOUTS
    )


V4 = LayerScene(partial(v4_spec, "fp8_ds_mla"), "FLASHMLA_SPARSE_DSV4", "fp8_ds_mla", 576)
V4_INDEXER = LayerScene(v4_indexer_spec, "DEEPSEEK_V4_INDEXER", "fp8_ds_mla", 128)
MAMBA = LayerScene(mamba_spec, "MAMBA2", orders=ALL_LAYOUTS, is_state=True)


@dataclass(frozen=True)
class V4Packed:
    """Latent pages and indexer pages of one group, side by side in each block."""

    orders: tuple[str, ...] = ("BLHNC", "BLNHC")

    def caches(self, layout: str) -> list[EngineCache]:
        group = {**layers_of(V4.spec(), "mla"), **layers_of(V4_INDEXER.spec(), "indexer")}
        views = allocate([group], layout)
        return [V4.cache(named(views, "mla")), V4_INDEXER.cache(named(views, "indexer"))]


@dataclass(frozen=True)
class Hybrid:
    """Attention and Mamba layers with pages of one size: each group has the whole buffer."""

    orders: tuple[str, ...] = BLOCK_COMPACT
    page_bytes: int = 16384

    def caches(self, layout: str) -> list[EngineCache]:
        attention = layers_of(full_spec(self.page_bytes), "attn")
        views = allocate([attention, layers_of(mamba_spec(self.page_bytes), "mamba")], layout)
        kv = named(views, "attn")
        known = {
            "num_kv_heads": 2,
            "head_dim": 64,
            "block_size": 16,
            "kv_cache_dtype": "auto",
            "backend": "FLASH_ATTN",
        }
        pairs = [view.transpose(1, 2).split(64, dim=-1) for view in kv]
        return [
            cache_of(kv, known, key_value_rows(pairs)),
            MAMBA.cache(named(views, "mamba")),
        ]


def named(views: Mapping[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    return [view for layer, view in views.items() if layer.endswith(f".{name}")]


LAYERS: dict[str, LayerScene | V4Packed | Hybrid] = {
    "MLA-auto": _mla("auto"),
    "MLA-fp8": _mla("fp8"),
    "MLA-fp8_ds_mla": _mla("fp8_ds_mla"),
    "MLA-nvfp4_ds_mla": _mla("nvfp4_ds_mla"),
    "MLA-int8_per_token_head": _mla("int8_per_token_head"),
    "INDEXER": LayerScene(indexer_spec, "DEEPSEEK_V32_INDEXER", "fp8", 128, ALL_LAYOUTS),
    "V4-fp8_ds_mla": V4,
    "V4-auto": LayerScene(partial(v4_spec, "auto"), "FLASHINFER_MLA_SPARSE_DSV4"),
    "V4-window": LayerScene(partial(v4_window_spec, 584), "DEEPSEEK_SPARSE_SWA", "fp8_ds_mla", 576),
    "V4-indexer": V4_INDEXER,
    "V4-compressor": LayerScene(v4_compressor_spec, "CompressorBackend"),
    "V4-packed": V4Packed(),
    "V41-window": LayerScene(partial(v4_window_spec, 528), "FLASHMLA_SPARSE_DSV41", "fp8_ds_mla"),
    "V41-fp8_ds_mla": LayerScene(
        partial(v41_spec, "fp8_ds_mla"), "FLASHMLA_SPARSE_DSV41", "fp8_ds_mla"
    ),
    "V41-nvfp4_ds_mla": LayerScene(
        partial(v41_spec, "nvfp4_ds_mla"), "FLASHMLA_MEGA_ATTN_DSV41", "nvfp4_ds_mla"
    ),
    "RING-1": LayerScene(partial(ring_spec, 1), "KPOOL_TAIL"),
    "RING-2": LayerScene(partial(ring_spec, 2), "KPOOL_TAIL"),
    "MAMBA": MAMBA,
    "HYBRID": Hybrid(),
}
"""By name."""
