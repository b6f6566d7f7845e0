"""Whether the installed vLLM has backends, dtypes or layers that the cases do not know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from engine_sources import assert_known, files_with, folder_of
from vllm_attention import SCENES
from vllm_layers import LAYERS
from vllm_scenes import part_of_vllm

from kvheap.kernels.engine_layouts import LAYOUTS

VERSION = "vLLM 0.33.0"

BACKENDS = {
    "B12X": "B12X-3",
    "CPU_ATTN": "CPU_ATTN-3",
    "FLASHINFER": "FLASHINFER-3",
    "FLASH_ATTN": "FLASH_ATTN-3",
    "FLASH_ATTN_DIFFKV": "FLASH_ATTN_DIFFKV-3",
    "FLEX_ATTENTION": "FLEX_ATTENTION-3",
    "ROCM_AITER_FA": "ROCM_AITER_FA-3",
    "ROCM_ATTN": "ROCM_ATTN-3",
    "ROCM_OCTAVE": "ROCM_OCTAVE",
    "ROCM_SEGMENTED_ATTN": "ROCM_SEGMENTED_ATTN-3",
    "TRITON_ATTN": "TRITON_ATTN-3",
    "TRITON_ATTN_DIFFKV": "TRITON_ATTN_DIFFKV-3",
    "TURBOQUANT": "TURBOQUANT-turboquant_k8v4",
    # Two backends over one cache.
    "TRITON_FLASHINFER": "FLASHINFER-3",
    "TRITON_FLASH_ATTN": "FLASH_ATTN-3",
    # Not run here, but they split a cache as FLASH_ATTN does: see SPLITS.
    "CUTLASS_MSA": "FLASH_ATTN-3",
    "HPC_ATTN": "FLASH_ATTN-3",
    "MINIMAX_M3_SPARSE": "FLASH_ATTN-3",
    "ROCM_AITER_UNIFIED_ATTN": "FLASH_ATTN-3",
    "STEP5_DSA": "FLASH_ATTN-3",
    "TRITON_MSA": "FLASH_ATTN-3",
    # One packed piece for each head and token, as TURBOQUANT, which it derives from.
    "ULTRAQUANT": "TURBOQUANT-turboquant_k8v4",
    # The cache is the layer's, whichever of these reads it.
    "AMX_MLA": "MLA-auto",
    "CPU_MLA": "MLA-auto",
    "CUTLASS_MLA": "MLA-auto",
    "FLASHINFER_MLA": "MLA-auto",
    "FLASHINFER_MLA_SPARSE": "MLA-auto",
    "FLASHINFER_MLA_SPARSE_SM120": "MLA-auto",
    "FLASHINFER_MLA_SPARSE_SM90": "MLA-auto",
    "FLASHMLA": "MLA-auto",
    "FLASHMLA_SPARSE": "MLA-fp8_ds_mla",
    "FLASH_ATTN_MLA": "MLA-auto",
    "FLASH_ATTN_MLA_SPARSE": "MLA-auto",
    "FLASH_ATTN_MLA_SPARSE_FA4": "MLA-auto",
    "ROCM_AITER_MLA": "MLA-auto",
    "ROCM_AITER_MLA_SPARSE": "MLA-auto",
    "ROCM_AITER_TRITON_MLA": "MLA-auto",
    "TOKENSPEED_MLA": "MLA-fp8",
    "TRITON_MLA": "MLA-int8_per_token_head",
    "XPU_MLA_SPARSE": "MLA-auto",
    "FLASHINFER_MLA_SPARSE_DSV4": "V4-auto",
    "FLASHMLA_SPARSE_DSV4": "V4-fp8_ds_mla",
    "ROCM_FLASHMLA_SPARSE_DSV4": "V4-fp8_ds_mla",
    "FLASHINFER_MLA_SPARSE_DSV41": "V4-auto",
    "FLASHMLA_MEGA_ATTN_DSV41": "V41-fp8_ds_mla",
    "FLASHMLA_SPARSE_DSV41": "V41-fp8_ds_mla",
    "ROCM_FLASHMLA_SPARSE_DSV41": "V4-fp8_ds_mla",
    # No cache.
    "CUSTOM": None,
    "NO_ATTENTION": None,
    "TORCH_SDPA": None,
}
"""The case that has a backend's cache."""

STATES = {
    "CUSTOM": None,
    "GDN_ATTN": "MAMBA",
    "LINEAR": "MAMBA",
    "MAMBA1": "MAMBA",
    "MAMBA2": "MAMBA",
    "SHORT_CONV": "MAMBA",
}

CACHE_DTYPES = {
    "auto": "FLASH_ATTN-3",
    "bfloat16": "FLASH_ATTN-3",
    "float16": "FLASH_ATTN-3",
    "fp8": "FLASH_ATTN-fp8",
    "fp8_ds_mla": "MLA-fp8_ds_mla",
    "fp8_e4m3": "FLASH_ATTN-fp8",
    "fp8_e5m2": "FLASH_ATTN-fp8",
    "fp8_inc": "FLASH_ATTN-fp8",
    "fp8_per_token_head": "TRITON_ATTN-fp8_per_token_head-3",
    "int4_per_token_head": "TRITON_ATTN-int4_per_token_head-3",
    "int8_per_token_head": "TRITON_ATTN-int8_per_token_head-3",
    "nvfp4": "FLASHINFER-nvfp4-3",
    "nvfp4_4over6": "FLASHINFER-nvfp4-3",
    "nvfp4_ds_mla": "MLA-nvfp4_ds_mla",
    "octave_k3v3": "ROCM_OCTAVE",
    "octave_k3v3_compact": "ROCM_OCTAVE",
    "octave_k3v4": "ROCM_OCTAVE",
    "turboquant_3bit_nc": "TURBOQUANT-turboquant_3bit_nc",
    "turboquant_4bit_nc": "TURBOQUANT-turboquant_3bit_nc",
    "turboquant_k3v4_nc": "TURBOQUANT-turboquant_3bit_nc",
    "turboquant_k8v4": "TURBOQUANT-turboquant_k8v4",
    "ultraquant_4bit": "TURBOQUANT-turboquant_k8v4",
}

SPECS = {
    "AttentionSpec",
    "ChunkedLocalAttentionSpec",
    "CircularBufferSpec",
    "CrossAttentionSpec",
    "EncoderOnlyAttentionSpec",
    "FullAttentionSpec",
    "HiSparseHotSpec",
    "HiSparseResidentSpec",
    "HiddenStateCacheSpec",
    "MLAAttentionSpec",
    "MambaSpec",
    "RSWASpec",
    "SinkFullAttentionSpec",
    "SlidingWindowMLASpec",
    "SlidingWindowSpec",
    "UniformTypeKVCacheSpecs",
}

PACKED_BY = {
    "model_executor/layers/attention/mla_attention.py": "MLA-fp8_ds_mla",
    "models/deepseek_v4/attention.py": "V4-fp8_ds_mla",
    "models/deepseek_v41/attention.py": "V41-fp8_ds_mla",
    "models/kimi_k3/nvidia/mla.py": "MLA-fp8_ds_mla",
    "models/minimax_m3/amd/model.py": "B12X-3",
    "models/minimax_m3/nvidia/sparse_attention_msa.py": "FLASHINFER-nvfp4-3",
    "v1/attention/backends/b12x.py": "B12X-3",
    "v1/attention/backends/flashinfer.py": "FLASHINFER-nvfp4-3",
    "v1/attention/backends/mla/sparse_swa.py": "V4-window",
    "v1/attention/backends/rocm_aiter_fa.py": "ROCM_AITER_FA-shuffle-3",
    "v1/attention/backends/rocm_attn.py": "ROCM_ATTN-3",
    "v1/attention/backends/rocm_octave_attn.py": "ROCM_OCTAVE",
    "v1/attention/backends/triton_attn.py": "TRITON_ATTN-int8_per_token_head-3",
    "v1/attention/backends/turboquant_attn.py": "TURBOQUANT-turboquant_k8v4",
    "v1/attention/backends/ultraquant_attn.py": "TURBOQUANT-turboquant_k8v4",
    "v1/kv_cache_interface.py": "FLASH_ATTN-3",
}
"""Files that give the content of a page another size than K and V, or other head slots."""

SPLITS = {
    "models/qwen4_exp/amd/qsa.py",
    "models/qwen4_exp/nvidia/qsa.py",
    "models/step5/nvidia/sparse_attention.py",
    "v1/attention/backends/flash_attn.py",
    "v1/attention/backends/flash_attn_diffkv.py",
    "v1/attention/backends/flex_attention.py",
    "v1/attention/backends/hpc_attn.py",
    "v1/attention/backends/rocm_aiter_fa.py",
    "v1/attention/backends/rocm_aiter_unified_attn.py",
    "v1/attention/backends/triton_attn.py",
}
"""Files with code that cuts a view into K and V of each head, as FLASH_ATTN does."""


def sources() -> Path:
    """vLLM's sources."""
    part_of_vllm("vllm")
    return folder_of("vllm")


def subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_every_backend_has_a_case() -> None:
    registry = part_of_vllm("vllm.v1.attention.backends.registry")
    found = [member.name for member in registry.AttentionBackendEnum]
    assert_known("attention backends", found, BACKENDS, VERSION)
    found = [member.name for member in registry.MambaAttentionBackendEnum]
    assert_known("backends of states", found, STATES, VERSION)


def test_every_cache_dtype_has_a_case() -> None:
    found = get_args(part_of_vllm("vllm.config.cache").CacheDType)
    assert_known("dtypes of caches", found, CACHE_DTYPES, VERSION)


def test_every_physical_order_is_an_engine_layout() -> None:
    orders = [layout.name for layout in part_of_vllm("vllm.v1.kv_cache_layout").KVCacheLayout]
    missing = [name for name in orders if f"vllm-{name.lower()}" not in LAYOUTS]
    assert not missing, f"physical orders that are no engine layout: {missing}"


def test_every_spec_is_known() -> None:
    interface = part_of_vllm("vllm.v1.kv_cache_interface")
    found = [cls.__name__ for cls in subclasses(interface.KVCacheSpec)]
    assert_known("specs of caches", found, SPECS, VERSION)


def test_everybody_who_packs_pages_is_known() -> None:
    folder = sources()
    found = files_with(folder, "state_content_bytes=") | files_with(folder, "num_head_slots=")
    assert_known("files that pack pages in a way of their own", found, PACKED_BY, VERSION)


def test_those_that_are_not_run_split_as_others_do() -> None:
    folder = sources()
    found = files_with(folder, "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)")
    assert_known("files that cut K and V out of each row", found, SPLITS, VERSION)


@pytest.mark.parametrize("table", [BACKENDS, STATES, CACHE_DTYPES, PACKED_BY])
def test_the_lists_name_cases(table: dict[str, str | None]) -> None:
    assert {case for case in table.values() if case} <= {*SCENES, *LAYERS}
