"""Caches of vLLM's layers that keep K and V, for each backend and each way to keep them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_caches import KEYS, VALUES, EngineCache, Rows, as_bytes
from vllm_scenes import (
    ALL_LAYOUTS,
    BLOCK_COMPACT,
    PAGE_BY_PAGE,
    allocate,
    backend_class,
    cache_of,
    engine_config,
    key_value_rows,
    layers_of,
    one_row,
    part_of_vllm,
    torch_dtype,
    written_by,
)


@dataclass(frozen=True)
class Scene:
    """A backend and what its caches depend on; sizes differ, so that none can be mixed up.

    Attributes:
        backend: member of ``AttentionBackendEnum``.
        kv_cache_dtype: vLLM's ``CacheDType``.
        split_blocks: whether blocks are split into two of the kernels'.
        impl: attributes of the backend's impl that differ from those for bfloat16.
        environment: environment variables of vLLM.
    """

    backend: str
    kv_cache_dtype: str = "auto"
    num_kv_heads: int = 3
    head_size: int = 64
    head_size_v: int = 64
    block_size: int = 16
    split_blocks: bool = False
    impl: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


SHUFFLE = {"VLLM_ROCM_USE_AITER": "1", "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT": "1"}
FP8 = {"kv_cache_dtype": "fp8", "cache_dtype": "fp8", "kv_torch_dtype": torch.float8_e4m3fn}


def _scenes() -> dict[str, Scene]:
    scenes = {}
    for backend in ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "FLEX_ATTENTION", "ROCM_AITER_FA"):
        for heads in (1, 2, 3):
            scenes[f"{backend}-{heads}"] = Scene(backend, num_kv_heads=heads)
        scenes[f"{backend}-split"] = Scene(backend, block_size=32, split_blocks=True)
    for backend in ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"):
        scenes[f"{backend}-fp8"] = Scene(backend, "fp8", impl=FP8)
    for dtype in ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"):
        mode = dtype.upper()
        impl = {"_is_per_token_head_quant": True, "_kv_quant_mode": mode}
        for heads in (2, 3):
            scenes[f"TRITON_ATTN-{dtype}-{heads}"] = Scene(
                "TRITON_ATTN", dtype, num_kv_heads=heads, impl=impl
            )
    for backend in ("FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV"):
        for heads in (1, 3):
            scenes[f"{backend}-{heads}"] = Scene(
                backend, num_kv_heads=heads, head_size=96, head_size_v=64
            )
    for backend in ("B12X", "ROCM_ATTN", "ROCM_SEGMENTED_ATTN"):
        for heads in (1, 2, 3):
            scenes[f"{backend}-{heads}"] = Scene(backend, num_kv_heads=heads, block_size=64)
    for heads in (2, 3):
        scenes[f"ROCM_AITER_FA-shuffle-{heads}"] = Scene(
            "ROCM_AITER_FA", num_kv_heads=heads, environment=SHUFFLE
        )
        scenes[f"CPU_ATTN-{heads}"] = Scene("CPU_ATTN", num_kv_heads=heads)
        scenes[f"FLASHINFER-nvfp4-{heads}"] = Scene(
            "FLASHINFER", "nvfp4", num_kv_heads=heads, impl={"is_kvcache_nvfp4": True}
        )
    for dtype in ("turboquant_k8v4", "turboquant_3bit_nc"):
        scenes[f"TURBOQUANT-{dtype}"] = Scene("TURBOQUANT", dtype)
    scenes["ROCM_OCTAVE"] = Scene("ROCM_OCTAVE", "octave_k3v4", head_size=128, head_size_v=128)
    return scenes


SCENES = _scenes()


def layouts_of(scene: Scene, patch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The physical orders that the scene's backend takes; blocks are split in two of them only."""
    set_environment(scene, patch)
    found = backend_class(scene.backend).supported_kv_cache_layouts()
    if scene.kv_cache_dtype == "nvfp4":
        return BLOCK_COMPACT  # its pages must be dense
    names = ALL_LAYOUTS if found is None else tuple(layout.name for layout in found)
    return tuple(name for name in names if not scene.split_blocks or name in PAGE_BY_PAGE)


def set_environment(scene: Scene, patch: pytest.MonkeyPatch) -> None:
    for name, value in scene.environment.items():
        patch.setenv(name, value)
    if scene.environment:
        # vLLM asks for its variables once, and takes AITER for available on ROCm only.
        aiter = part_of_vllm("vllm._aiter_ops").rocm_aiter_ops
        patch.setattr(aiter, "is_shuffle_kv_cache_enabled", lambda: True)


def spec_of(scene: Scene) -> Any:
    """The layer's spec, as the backend has it."""
    if scene.kv_cache_dtype.startswith("octave"):
        octave = part_of_vllm("vllm.v1.attention.ops.rocm_octave")
        octave.register_rope_dim(scene.head_size, scene.head_size)
    attention = part_of_vllm("vllm.model_executor.layers.attention.attention").Attention
    backend = backend_class(scene.backend)
    layer = SimpleNamespace(
        attn_backend=backend,
        attn_type="decoder",
        head_size=scene.head_size,
        head_size_v=scene.head_size_v,
        kv_cache_dtype=scene.kv_cache_dtype,
        kv_cache_torch_dtype=torch_dtype(scene.kv_cache_dtype),
        num_kv_heads=scene.num_kv_heads,
        sliding_window=None,
    )
    spec = attention.get_kv_cache_spec(layer, engine_config("LBNHC", block_size=scene.block_size))
    return part_of_vllm("vllm.v1.worker.utils").customize_attention_spec(backend, spec)


def make(scene: Scene, layout: str, patch: pytest.MonkeyPatch) -> EngineCache:
    """The scene's cache in a physical order."""
    set_environment(scene, patch)
    kernel_block_size = scene.block_size // 2 if scene.split_blocks else None
    views = list(allocate([layers_of(spec_of(scene))], layout, kernel_block_size).values())
    known = {
        "num_kv_heads": scene.num_kv_heads,
        "head_dim": scene.head_size,
        "v_head_dim": scene.head_size_v,
        "block_size": views[0].shape[2],
        "kv_cache_dtype": scene.kv_cache_dtype,
        "backend": scene.backend,
    }
    return cache_of(views, known, _rows(scene, views, patch))


def _rows(scene: Scene, views: Sequence[torch.Tensor], patch: pytest.MonkeyPatch) -> Rows | None:
    if scene.kv_cache_dtype == "nvfp4":
        return _nvfp4_rows(scene, views)
    calls = [
        written_by(
            patch,
            backend_class(scene.backend),
            view,
            head_size=scene.head_size,
            num_kv_heads=scene.num_kv_heads,
            **_state(scene),
        )
        for view in views
    ]
    writer = calls[0][0]
    if writer.endswith("_diffkv"):
        sizes = [scene.head_size, scene.head_size_v]
        return key_value_rows([args[2].split(sizes, dim=-1) for _, args in calls])
    if writer in ("octave_cache_store", "store_kv"):
        return one_row(views)
    if writer in ("write_to_paged_cache", "cpu_attn_reshape_and_cache"):
        return None
    if writer == "reshape_and_cache_shuffle_triton":
        return None
    key_cache = calls[0][1][2]
    assert "reshape_and_cache_flash" in writer, writer
    if key_cache.dim() == 5:  # [B, H, D / x, N, x]
        return None
    return key_value_rows([args[2:4] for _, args in calls])


def _state(scene: Scene) -> dict[str, Any]:
    state = dict(scene.impl)
    if "_kv_quant_mode" in state:
        modes = part_of_vllm("vllm.v1.kv_cache_interface").KVQuantMode
        state["_kv_quant_mode"] = modes[state["_kv_quant_mode"]]
    return state


def _nvfp4_rows(scene: Scene, views: Sequence[torch.Tensor]) -> Rows:
    """K data, K scales, V data and V scales of each page, as FlashInfer gets them."""
    flashinfer = importlib.import_module("vllm.v1.attention.backends.flashinfer")
    cut = [flashinfer._nvfp4_kv_views(view, scene.num_kv_heads) for view in views]

    def rows(layer: int, block: int, offset: int) -> list[tuple[int, torch.Tensor]]:
        data, scales, order = cut[layer]
        at = (block, slice(None), offset) if order == "HND" else (block, offset)
        return [
            (plane, as_bytes(row))
            for plane in (KEYS, VALUES)
            for part in (data[plane], scales[plane])
            for row in part[at]
        ]

    return rows
