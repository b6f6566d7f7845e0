"""Models' cache groups, made by vLLM's own planning from the specs of their layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from vllm_scenes import part_of_vllm


def planning() -> Any:
    """The module that plans caches: 0.33 moved it."""
    utils = part_of_vllm("vllm.v1.core.kv_cache_utils")
    if hasattr(utils, "get_kv_cache_config_from_groups"):
        return utils
    return part_of_vllm("vllm.v1.core.kv_cache_planning")


def engine_config(layout: str) -> Any:
    """As much of a ``VllmConfig`` as planning reads."""
    member = part_of_vllm("vllm.v1.kv_cache_layout").KVCacheLayout[layout]
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            prefix_cache_retention_interval=None,
            num_gpu_blocks_override=None,
            get_resolved_kv_cache_layout=lambda: member,
            enable_prefix_caching=True,
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        num_speculative_tokens=0,
        speculative_config=None,
    )


def worker_config(specs: Mapping[str, Any], layout: str = "LBHNC", num_bytes: int = 1 << 22) -> Any:
    """The ``KVCacheConfig`` of a worker whose layers have these specs."""
    config, plan = engine_config(layout), planning()
    groups = plan.get_kv_cache_groups(config, dict(specs))
    return plan.get_kv_cache_config_from_groups(config, groups, num_bytes)


def scheduler_config(of_worker: Any) -> Any:
    """What the scheduler gets of it."""
    utils = part_of_vllm("vllm.v1.core.kv_cache_utils")
    return utils.generate_scheduler_kv_cache_config([of_worker])


def views(of_worker: Any, layout: str) -> dict[str, torch.Tensor]:
    """By layer, the cache that vLLM's worker makes."""
    utils = part_of_vllm("vllm.v1.worker.utils")
    member = engine_config(layout).cache_config.get_resolved_kv_cache_layout()
    made: dict[str, torch.Tensor] = utils.allocate_kv_cache(of_worker, torch.device("cpu"), member)
    return made


def registered(
    of_worker: Any, layout: str, patch: Any, caches: dict[str, torch.Tensor] | None = None
) -> Any:
    """The ``CanonicalKVCaches`` that vLLM's own connector hands to a worker.

    Args:
        of_worker: the ``KVCacheConfig``.
        layout: of the caches.
        patch: undoes the changes to vLLM's modules.
        caches: by layer; None: new ones.
    """
    half = part_of_vllm("vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker")
    # How pages of several workers make one: not asked for here.
    patch.setattr(half, "derive_canonical_mappings", lambda *_: {})
    seen: list[Any] = []
    spec = SimpleNamespace(replicated_layout=False, get_worker=seen.append)
    worker = half.OffloadingConnectorWorker(spec, None, of_worker)
    worker.register_kv_caches(views(of_worker, layout) if caches is None else caches)
    return seen[0]
