"""Models whose KV cache groups differ, from their published configurations.

Grouped and placed by vLLM's own planning. Needs the vllm package, no GPU and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import config as connector_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler
from vllm.v1 import kv_cache_interface as interface
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_offload import config as offload
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from kvheap.integrations.vllm.geometry import groups_of, is_packed
from kvheap.integrations.vllm.groups import ChunkGroup

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # vLLM 0.32
    planning = kv_cache_utils

window_in_chunks = getattr(
    connector_config,
    "get_sliding_window_size_in_chunks",
    getattr(scheduler, "get_sliding_window_size_in_chunks", None),
)
"""vLLM's own answer to how many chunks of a group one request needs; None: all."""

Specs = Mapping[str, Any]


def full(heads: int, head_dim: int, block_size: int = 16) -> Any:
    return interface.FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=head_dim, dtype=torch.bfloat16
    )


def sliding(heads: int, head_dim: int, window: int) -> Any:
    return interface.SlidingWindowSpec(
        block_size=16,
        num_kv_heads=heads,
        head_size=head_dim,
        dtype=torch.bfloat16,
        sliding_window=window,
    )


def states(block_size: int, page_bytes: int, *shapes: tuple[int, ...]) -> Any:
    """States of a recurrent layer, in the model's bfloat16; pages padded to those of attention."""
    return interface.MambaSpec(
        block_size=block_size,
        shapes=shapes,
        dtypes=(torch.bfloat16,) * len(shapes),
        page_size_padded=page_bytes,
        mamba_cache_mode="align",
    )


def layers(num_layers: int, spec_of: Callable[[int], Any]) -> dict[str, Any]:
    specs = {f"layers.{layer}": spec_of(layer) for layer in range(num_layers)}
    return {name: spec for name, spec in specs.items() if spec is not None}


def deepseek_v4() -> dict[str, Any]:
    """DeepSeek-V4-Flash with fp8_ds_mla, as vLLM's ``models/deepseek_v4`` declares its caches.

    43 layers, each with a sliding window of 128 tokens; 20 compress 4 tokens to a record of 584
    bytes and have an indexer of 132 bytes a record, 23 compress 128; each compressor has states.
    """
    common = {"num_kv_heads": 1, "alignment": 576}
    specs: dict[str, Any] = {}

    def states_of(block_size: int, state_dim: int, window: int) -> Any:
        return interface.SlidingWindowMLASpec(
            block_size=block_size,
            head_size=state_dim,
            dtype=torch.float32,
            sliding_window=window,
            **common,
        )

    for layer in range(43):
        ratio = 4 if layer >= 3 and layer % 2 else 128
        name = f"layers.{layer}"
        record = {"dtype": torch.uint8, "model_version": "deepseek_v4", "state_content_bytes": 584}
        specs[f"{name}.swa"] = interface.SlidingWindowMLASpec(
            block_size=64, head_size=512, sliding_window=128, **record, **common
        )
        specs[f"{name}.latent"] = interface.MLAAttentionSpec(
            block_size=256, head_size=512, tokens_per_state=ratio, **record, **common
        )
        if ratio == 4:
            specs[f"{name}.compressor"] = states_of(4, 2048, 8)
            specs[f"{name}.indexer"] = interface.MLAAttentionSpec(
                block_size=256, head_size=132, dtype=torch.uint8, tokens_per_state=4, **common
            )
            specs[f"{name}.indexer.compressor"] = states_of(4, 512, 8)
        else:
            specs[f"{name}.compressor"] = states_of(8, 1024, 128)
    return specs


@dataclass(frozen=True, slots=True)
class Model:
    """A model's layers.

    Attributes:
        name: of the model.
        source: where its numbers are from.
        specs: of its layers, by name.
        layout: in which vLLM places them.
    """

    name: str
    source: str
    specs: Specs
    layout: str = "LBHNC"


def models() -> list[Model]:
    """The models, plain ones first."""
    qwen_page, nemotron_page = 544 * 2048, 528 * 4096
    return [
        Model(
            "Llama-3.1-8B",
            "config.json: 32 layers, 8 KV heads of 128",
            layers(32, lambda _: full(8, 128)),
        ),
        Model(
            "gpt-oss-20b",
            "config.json: 24 layers, every other with a window of 128, 8 KV heads of 64",
            layers(24, lambda i: full(8, 64) if i % 2 else sliding(8, 64, 128)),
        ),
        Model(
            "Gemma-3-27B",
            "config.json: 62 layers, 5 of 6 with a window of 1024, 16 KV heads of 128",
            layers(62, lambda i: full(16, 128) if i % 6 == 5 else sliding(16, 128, 1024)),
        ),
        Model(
            "Gemma-3-4B",
            "config.json: 34 layers, 5 of 6 with a window of 1024, 4 KV heads of 256",
            layers(34, lambda i: full(4, 256) if i % 6 == 5 else sliding(4, 256, 1024)),
        ),
        Model(
            "Qwen3-Next-80B-A3B",
            "config.json: 48 layers, 1 of 4 full with 2 KV heads of 256, else gated delta nets: "
            "states of 32 x 128 x 128 and 8192 x 3",
            layers(
                48,
                lambda i: (
                    full(2, 256, 544)
                    if i % 4 == 3
                    else states(544, qwen_page, (3, 8192), (32, 128, 128))
                ),
            ),
        ),
        Model(
            "Nemotron-H-8B",
            "config.json: 4 of 52 layers attend with 8 KV heads of 128, 24 are Mamba 2: states of "
            "128 x 64 x 128 and 10240 x 3",
            layers(
                28,
                lambda i: (
                    full(8, 128, 528)
                    if i % 7 == 3
                    else states(528, nemotron_page, (3, 10240), (128, 64, 128))
                ),
            ),
        ),
        Model("DeepSeek-V4-Flash", deepseek_v4.__doc__ or "", deepseek_v4(), "BLHNC"),
    ]


@dataclass(frozen=True, slots=True)
class Tier:
    """A model's chunks, of one block each, in vLLM's own tier and in a heap.

    Attributes:
        groups: of the heap, with the bytes that each group's pages have.
        slot_bytes: of a chunk of any group in vLLM's tier.
        tokens_per_chunk: by group.
        window_chunks: by group, how many chunks of it a request needs; None: all.
        is_packed: the pages of all layers are side by side in a block, which vLLM's tier keeps
            whole.
    """

    groups: list[ChunkGroup]
    slot_bytes: int
    tokens_per_chunk: list[int]
    window_chunks: list[int | None]
    is_packed: bool

    def num_slots(self, num_bytes: int) -> int:
        """Of vLLM's tier."""
        return num_bytes // self.slot_bytes

    def chunks_of(self, num_tokens: int) -> list[int]:
        """By group, the chunks that a tier keeps of a request, as vLLM 0.33 counts them."""
        counts = []
        for tokens, window in zip(self.tokens_per_chunk, self.window_chunks, strict=True):
            chunks = -(-num_tokens // tokens)
            counts.append(chunks if window is None else min(chunks, window))
        return counts


def tier_of(model: Model) -> Tier:
    """Plan a model's cache with vLLM, and size vLLM's tier with ``CPUOffloadingSpec`` itself."""
    member = KVCacheLayout[model.layout]
    engine = SimpleNamespace(
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
    grouped = planning.get_kv_cache_groups(engine, dict(model.specs))
    of_worker = planning.get_kv_cache_config_from_groups(engine, grouped, 64 << 30)
    cache = kv_cache_utils.generate_scheduler_kv_cache_config([of_worker])
    groups = groups_of(cache, 1)
    specs = [cache.kv_cache_groups[group.group_id or 0].kv_cache_spec for group in groups]
    config = offload.OffloadingConfig(
        groups=(),
        worker_kv_bytes_per_block=cache.kv_cache_tensors[0].size // cache.num_blocks,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": 64 << 30},
        engine_id="",
        model=offload.OffloadingModelConfig(model.name, "bfloat16"),
        cache=offload.OffloadingCacheConfig(16, 1),
        parallel=offload.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
    )
    return Tier(
        groups,
        CPUOffloadingSpec(config).kv_bytes_per_chunk,
        [spec.block_size for spec in specs],
        [window_in_chunks(spec, spec.block_size) for spec in specs],
        is_packed(cache),
    )
