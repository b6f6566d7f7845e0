"""Named KV geometries: how many bytes of KV a model keeps for each chunk of 512 tokens.

Layers, KV heads, head dimensions and dtypes are those of each model's published ``config.json``
(Hugging Face: meta-llama/Meta-Llama-3-8B and -70B, mistralai/Mistral-7B-v0.1, Qwen/Qwen3-8B,
openai/gpt-oss-20b, deepseek-ai/DeepSeek-V3); for MLA, ``kv_lora_rank + qk_rope_head_dim`` = 512 +
64 elements a token and layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvheap.memory_format import MemoryFormat
from kvheap.trace import CHUNK_TOKENS

__all__ = ["GEOMETRIES", "Geometry"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape, dtype and format of one chunk."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    fmt: MemoryFormat

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk."""
        return math.prod(self.shape) * self.dtype.itemsize


def _attention(
    name: str, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> Geometry:
    shape = torch.Size((2, layers, CHUNK_TOKENS, kv_heads * head_dim))
    return Geometry(name, shape, dtype, MemoryFormat.KV_2LTD)


def _latent_attention(name: str, layers: int, latent_dim: int) -> Geometry:
    shape = torch.Size((1, layers, CHUNK_TOKENS, latent_dim))
    return Geometry(name, shape, torch.bfloat16, MemoryFormat.KV_MLA_FMT)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        _attention("tiny", 1, 1, 2, torch.float16),
        _attention("llama-3-8b", 32, 8, 128),
        _attention("llama-3-70b", 80, 8, 128),
        _attention("llama-3-70b-tp4", 80, 2, 128),
        _attention("mistral-7b", 32, 8, 128),
        _attention("qwen3-8b", 36, 8, 128),
        _attention("gpt-oss-20b", 24, 8, 64),
        _latent_attention("deepseek-v3", 61, 576),
    )
}
"""By name; ``tiny`` is no model: 4 KiB a chunk, for tests and for timing what is not copying."""
