"""vLLM's KV caches, built on a CPU by vLLM's own functions.

Written against vLLM 0.33.0. A layer or backend gives its ``KVCacheSpec``,
``get_kv_cache_config_from_groups`` places the layers in one buffer, and ``allocate_kv_cache`` makes
the views that connectors get. Where a token is in such a view, the backend's own code says: it is
run up to the operator that writes the token, and what that operator is given is kept.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_caches import KEYS, VALUES, EngineCache, Rows, as_bytes, runs_of
from stub_packages import stub

REQUIRE = "KVHEAP_REQUIRE_VLLM"
"""With this environment variable set, a module of vLLM that is missing is a failure."""

INSTALL = (
    "needs vLLM: pip install -c constraints-vllm.txt '.[vllm-deps]' && "
    "pip install --no-deps vllm==0.33.0"
)

STUBS = ("flashinfer", "torchvision")
"""Packages whose kernels and pictures no cache needs."""

NUM_LAYERS, NUM_BLOCKS = 2, 4
ALL_LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
BLOCK_COMPACT = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
"""The layouts whose pages are contiguous, which padded pages need."""

LAYER_BY_LAYER = ("LBHNC", "LBNHC", "LHBNC")
"""The layouts with one layer behind the other; those of others look the same, with gaps."""

PAGE_BY_PAGE = ("LBHNC", "LBNHC")
"""The layouts in which a layer's blocks follow each other, so that kernels may split them."""


def part_of_vllm(name: str) -> Any:
    """Import a module of vLLM.

    Without it the test is skipped, or fails where the environment says that vLLM is there.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if os.environ.get(REQUIRE):
        importlib.import_module("vllm")
    else:
        pytest.importorskip("vllm", reason=INSTALL, exc_type=ImportError)
    # transformers asks once whether torchvision is there: before its name is an empty package.
    importlib.import_module("transformers.utils").is_torchvision_available()
    stub(STUBS)
    return importlib.import_module(name)


def backend_class(name: str) -> Any:
    """An attention backend by the name of its member of ``AttentionBackendEnum``."""
    registry = part_of_vllm("vllm.v1.attention.backends.registry")
    return registry.AttentionBackendEnum[name].get_class()


def torch_dtype(kv_cache_dtype: str) -> torch.dtype:
    """The dtype of the elements of a cache; "auto" is that of the model, bfloat16."""
    if kv_cache_dtype == "auto":
        return torch.bfloat16
    return part_of_vllm("vllm.utils.torch_utils").STR_DTYPE_TO_TORCH_DTYPE[kv_cache_dtype]


def engine_config(layout: str, **cache: Any) -> Any:
    """As much of a ``VllmConfig`` as caches are made from."""
    member = part_of_vllm("vllm.v1.kv_cache_layout").KVCacheLayout[layout]
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            prefix_cache_retention_interval=None,
            num_gpu_blocks_override=NUM_BLOCKS,
            get_resolved_kv_cache_layout=lambda: member,
            skip_page_size_padded=None,
            **cache,
        ),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        num_speculative_tokens=0,
    )


def allocate(
    groups: Sequence[Mapping[str, Any]], layout: str, kernel_block_size: int | None = None
) -> dict[str, torch.Tensor]:
    """The views of the layers that vLLM registers, by name.

    Args:
        groups: for each cache group, its layers' names and specs.
        layout: the name of a ``KVCacheLayout``.
        kernel_block_size: into what blocks the backend's kernels split those of the first group.
    """
    interface = part_of_vllm("vllm.v1.kv_cache_interface")
    planning = part_of_vllm("vllm.v1.core.kv_cache_planning")
    worker = part_of_vllm("vllm.v1.worker.utils")
    config = engine_config(layout)
    made = []
    for specs in groups:
        first = next(iter(specs.values()))
        alike = all(spec == first for spec in specs.values())
        spec = first if alike else interface.UniformTypeKVCacheSpecs.from_specs(dict(specs))
        made.append(interface.KVCacheGroupSpec(list(specs), spec))
    placed = planning.get_kv_cache_config_from_groups(config, made, 1 << 40)
    sizes = [next(iter(specs.values())).block_size for specs in groups]
    sizes[0] = kernel_block_size or sizes[0]
    member = config.cache_config.get_resolved_kv_cache_layout()
    return worker.allocate_kv_cache(placed, torch.device("cpu"), member, sizes)


def layers_of(spec: Any, name: str = "attn") -> dict[str, Any]:
    return {f"model.layers.{layer}.{name}": spec for layer in range(NUM_LAYERS)}


class Recorder:
    """Stands for compiled operators: keeps what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kept: self.calls.append((name, args))


def written_by(
    patch: pytest.MonkeyPatch, backend: Any, view: torch.Tensor, **state: Any
) -> tuple[str, tuple[Any, ...]]:
    """The operator that writes tokens to ``view``, and its arguments, as the backend calls it.

    Args:
        patch: undoes the changes to vLLM's modules.
        backend: the backend's class.
        view: the cache of a layer, [B, H, N, C].
        state: attributes of the backend's ``impl``, which is not initialized.
    """
    impl_class = backend.get_impl_cls()
    recorder = Recorder()
    for cls in impl_class.__mro__[:-1]:
        module = importlib.import_module(cls.__module__)
        patch.setattr(module, "ops", recorder, raising=False)
        for name in OPERATORS:
            patch.setattr(module, name, getattr(recorder, name), raising=False)
        if hasattr(module, "PagedAttention"):
            name = "write_to_paged_cache"
            patch.setattr(module.PagedAttention, name, getattr(recorder, name))
    patch.setattr(torch.ops, "_C", recorder, raising=False)
    patch.setattr(torch.ops, "_C_cache_ops", recorder, raising=False)
    impl = object.__new__(impl_class)
    for name, value in {**IMPL, **state, "_store_kv": recorder.store_kv}.items():
        setattr(impl, name, value)
    scales = SimpleNamespace(_k_scale=1, _v_scale=1, _k_scale_float=1, _v_scale_float=1, isa="")
    key = torch.zeros(1, impl.num_kv_heads, impl.head_size)
    impl.do_kv_cache_update(scales, key, key, view, torch.arange(1))
    (call,) = recorder.calls
    return call


OPERATORS = {
    "reshape_and_cache_flash",
    "reshape_and_cache_shuffle_triton",
    "triton_reshape_and_cache_flash",
    "triton_reshape_and_cache_flash_diffkv",
    "triton_reshape_and_cache_flash_per_token_head_quant",
}
"""Operators that write tokens, which backends import by name if the platform has them."""

IMPL = {
    "attn_type": "decoder",
    "cache_dtype": "auto",
    "fmt": SimpleNamespace(kernel_code=0),
    "fp8_dtype": torch.float8_e4m3fn,
    "is_kvcache_nvfp4": False,
    "kv_cache_dtype": "auto",
    "kv_sharing_target_layer_name": None,
    "kv_torch_dtype": torch.bfloat16,
    "nvfp4_fa2": False,
    "_ensure_on_device": lambda *_: None,
    "_is_per_token_head_quant": False,
    "_k_scale_cache": None,
    "_set_kv_ptr_range": False,
    "_signs": lambda *_: (None, None),
    "_use_interleaved_v_cache": False,
}
"""What ``do_kv_cache_update`` reads of an impl, for caches of bfloat16."""


def cache_of(
    views: Sequence[torch.Tensor],
    known: Mapping[str, Any],
    rows: Rows | None,
    pieces: Callable[[int, int], list[torch.Tensor]] | None = None,
) -> EngineCache:
    """The cache of some layers' views [B, H, N, C]; ``known`` needs ``block_size``."""
    return EngineCache(
        tensors={f"model.layers.{layer}.attn": view for layer, view in enumerate(views)},
        known=known,
        num_layers=len(views),
        num_blocks=views[0].shape[0],
        block_size=views[0].shape[2],
        rows=rows,
        pieces=pieces or (lambda layer, block: runs_of(views[layer][block])),
    )


def key_value_rows(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Rows:
    """Rows of K and V of a layer as the operators take them: two of [B, N, H, D]."""

    def rows(layer: int, block: int, offset: int) -> list[tuple[int, torch.Tensor]]:
        return [
            (plane, as_bytes(head))
            for plane, side in zip((KEYS, VALUES), pairs[layer], strict=True)
            for head in side[block, offset]
        ]

    return rows


def one_row(views: Sequence[torch.Tensor]) -> Rows:
    """One row for each head slot and token of views [B, H, N, C]."""

    def rows(layer: int, block: int, offset: int) -> list[tuple[int, torch.Tensor]]:
        return [(KEYS, as_bytes(head)) for head in views[layer][block, :, offset]]

    return rows


def split_rows(views: Sequence[torch.Tensor], value_bytes: int) -> Rows:
    """Values of a block's tokens, then their scales: views [B, 1, N, C] of bytes."""

    def rows(layer: int, block: int, offset: int) -> list[tuple[int, torch.Tensor]]:
        page = as_bytes(views[layer][block])
        tokens, token_bytes = views[layer].shape[2:]
        values, scales = page.split([tokens * value_bytes, tokens * (token_bytes - value_bytes)])
        return [(p, part.view(tokens, -1)[offset]) for p, part in enumerate((values, scales))]

    return rows
