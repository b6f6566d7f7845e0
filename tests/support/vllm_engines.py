"""vLLM's engine on a CPU, with tiny random models made here: no network, no weights.

Must be imported before vLLM: it sets the environment that the engine reads.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BLOCK_TOKENS = 32
HEAP_BYTES = 64 << 20

Prompt = list[int]
Answer = list[int]


def make_plain(folder: Path) -> str:
    """Two layers of full attention: one KV cache group. A block has 16 KiB in each layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **COMMON,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return saved(LlamaForCausalLM, config, folder)


def make_hybrid(folder: Path) -> str:
    """Six layers, of which four see a window of 64 tokens: three KV cache groups."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **COMMON,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
    )
    return saved(LlamaForCausalLM, config, folder)


def make_uneven(folder: Path) -> str:
    """Five layers, of which three see a window: a group of one layer beside groups of two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **COMMON,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        tie_word_embeddings=False,
    )
    return saved(LlamaForCausalLM, config, folder)


def make_gemma3(folder: Path) -> str:
    """Seven layers, of which six see a window, as in Gemma 3: a group for each of them."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **COMMON,
        intermediate_size=128,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=64,
        layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    )
    return saved(Gemma3ForCausalLM, config, folder)


def make_gpt_oss(folder: Path) -> str:
    """Four layers with sinks and experts, every other with a window, as in gpt-oss."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **COMMON,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return saved(GptOssForCausalLM, config, folder)


def make_mla(folder: Path) -> str:
    """Two layers that keep latents of 576 elements, as in DeepSeek-V2. In bfloat16 only."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        **COMMON,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=2,
        first_k_dense_replace=10,
    )
    return saved(DeepseekV2ForCausalLM, config, folder)


def make_states(folder: Path) -> str:
    """Three layers of gated delta nets and one of attention, as in Qwen3-Next. In bfloat16 only."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **COMMON | {"head_dim": 256},
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    return saved(Qwen3NextForCausalLM, config, folder)


@contextmanager
def packed_blocks() -> Iterator[None]:
    """Engines that are made meanwhile pack the pages of all layers into one block.

    vLLM does so for the layouts whose outermost dimension is the block. Its attention on CPUs
    declares another one only, but reads these as well.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    declared = CPUAttentionBackend.supported_kv_cache_layouts
    CPUAttentionBackend.supported_kv_cache_layouts = classmethod(  # type: ignore[method-assign]
        lambda _: (KVCacheLayout.BLHNC,)
    )
    try:
        yield
    finally:
        CPUAttentionBackend.supported_kv_cache_layouts = declared  # type: ignore[method-assign]


COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
    "initializer_range": 0.3,
}


def saved(model: Any, config: Any, folder: Path) -> str:
    import torch

    torch.manual_seed(0)
    model(config).to(torch.float32).save_pretrained(folder)
    return str(folder)


def prompt(number: int, num_tokens: int = 200, shared: int = 0) -> Prompt:
    """Tokens of prompt ``number``, the first ``shared`` of which all prompts have in common."""
    head = [2 + (i * 37) % 250 for i in range(shared)]
    return head + [
        2 + (number * 71 + i * 37 + i * i * number) % 250 for i in range(shared, num_tokens)
    ]


def connector_config(**extra: Any) -> dict[str, Any]:
    """``--kv-transfer-config`` of a kvheap tier whose copies the tests can make fail."""
    return {
        "kv_connector": "KVHeapConnector",
        "kv_connector_module_path": "kvheap.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "FaultySpec",
            "spec_module_path": "vllm_faults",
            "cpu_bytes_to_use": HEAP_BYTES,
            "offload_prompt_only": False,
            **extra,
        },
    }


class Engine:
    """An engine with a kvheap tier, until :meth:`close`.

    Args:
        model: folder of the model.
        extra: ``kv_connector_extra_config``; None: no connector.
        options: of ``vllm.LLM``.
    """

    def __init__(self, model: str, extra: dict[str, Any] | None = None, **options: Any) -> None:
        from vllm import LLM
        from vllm.config import KVEventsConfig, KVTransferConfig
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if extra is not None:
            options["kv_transfer_config"] = KVTransferConfig(**connector_config(**extra))
            options["kv_events_config"] = KVEventsConfig(
                enable_kv_cache_events=True, publisher="null"
            )
        defaults: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 256,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 8 << 20,
            "block_size": BLOCK_TOKENS,
            "max_num_seqs": 4,
            "enable_prefix_caching": True,
            "disable_log_stats": False,
        }
        try:
            self.llm = LLM(model=model, **(defaults | options))
        except BaseException:
            cleanup_dist_env_and_memory()  # of what was made for it
            raise
        self.cached: list[int] = []
        self.events: list[Any] = []
        self._answers: dict[str, Answer] = {}
        self._names: list[str] = []
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            self.scheduler.kv_event_publisher.publish = self._record

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler, if it is in this process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def connector(self) -> Any:
        """The scheduler's half of the connector."""
        return self.scheduler.connector

    @property
    def manager(self) -> Any:
        """The scheduler's half of the tier."""
        return self.connector.scheduler.manager.manager

    def generate(self, prompts: Sequence[Prompt], num_tokens: int = 16) -> list[Answer]:
        """The most likely continuations; :attr:`cached` has how many tokens were not computed."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=num_tokens, temperature=0, detokenize=False, ignore_eos=True
        )
        outputs = self.llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts], sampling, use_tqdm=False
        )
        self.cached = [output.num_cached_tokens for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def add(self, name: str, tokens: Prompt, num_tokens: int = 16) -> None:
        """Begin a request; :meth:`step` and :meth:`finish` go on with it."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=num_tokens, temperature=0, detokenize=False, ignore_eos=True
        )
        self._names.append(name)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, sampling)

    def step(self, count: int) -> None:
        """Run the engine for some steps."""
        for _ in range(count):
            for output in self.llm.llm_engine.step():
                if output.finished:
                    self._answers[output.request_id] = list(output.outputs[0].token_ids)

    def abort(self, name: str) -> None:
        """Give up a request."""
        self.llm.llm_engine.abort_request([name])
        self._names.remove(name)

    def unfinished(self) -> list[str]:
        """The requests of :meth:`add` that go on."""
        return [name for name in self._names if name not in self._answers]

    def finish(self) -> list[Answer]:
        """Run until all requests have ended; their answers, in the order of :meth:`add`."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.step(1)
        names, self._names = self._names, []
        return [self._answers.pop(name) for name in names]

    def forget_device(self) -> None:
        """Drop the engine's own prefix cache: what is found afterwards comes from the tier."""
        assert self.llm.reset_prefix_cache()

    def forget_all(self) -> None:
        """Drop the tier's chunks too."""
        assert self.llm.reset_prefix_cache(reset_connector=True)
        for _ in self.connector.take_events():
            """Chunks that are gone: the engine would publish it in its next step."""
        self.events.clear()

    def counters(self) -> dict[str, float]:
        """By name, the sum over the labels of vLLM's counters and gauges, and counts."""
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", getattr(metric, "count", None))
            if isinstance(value, int | float):
                found[metric.name] = found.get(metric.name, 0) + value
        return found

    def close(self) -> None:
        """End the engine, so that another can be made in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()

    def _record(self, batch: Any) -> None:
        self.events += batch.events
