"""Named KV geometries: how many bytes of KV a model keeps for each chunk of 512 tokens.

Layers, KV heads, head dimensions and dtypes are those of each model's published ``config.json``
(Hugging Face: meta-llama/Meta-Llama-3-8B and -70B, mistralai/Mistral-7B-v0.1, Qwen/Qwen3-8B and
Qwen2.5-0.5B, openai/gpt-oss-20b, deepseek-ai/DeepSeek-V3). MLA keeps ``kv_lora_rank +
qk_rope_head_dim`` = 512 + 64 elements for each token and layer. NVFP4 keeps 4 bits of an
element, and a byte of scale for each 16: 9 bytes for 16 elements (vLLM 0.33.0,
``nvfp4_kv_cache_full_dim``). ``tiny`` and the ``small`` geometries are not of models: they are for
tests, and for runs that time everything except copying.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.kernels.paged_layout import INDEXER_BYTES
from kvheap.replay.trace import CHUNK_TOKENS

__all__ = ["GEOMETRIES", "Geometry", "Kind"]

OPAQUE_BLOCK_TOKENS = 16
"""Tokens of a block of the opaque geometry."""

Kind = Literal["attention", "nvfp4", "latent", "indexer", "opaque"]
"""What an engine keeps for each token: K and V; both with scales in NVFP4; one latent vector; 128
values and a scale. For ``opaque``, it keeps whole blocks with unknown contents."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What one chunk holds.

    Attributes:
        name: the name on the command line.
        kind: what is kept for each token.
        shape: ``[2, L, T, H * C]`` for attention and NVFP4 (C counts bytes there), else
            ``[1, L, T, D]``; T counts tokens, or the engine's blocks if they are opaque.
        dtype: of the elements.
        num_heads: KV heads H; 1 for kinds without heads.
    """

    name: str
    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    num_heads: int = 1

    def with_chunks_of(self, num_tokens: int) -> Geometry:
        """The same KV in chunks of another number of tokens.

        Raises:
            ValueError: the tokens are not whole blocks of an opaque geometry, or not positive.

        >>> GEOMETRIES["tiny"].with_chunks_of(16).chunk_bytes
        128
        """
        length, left = divmod(self.shape[2] * num_tokens, self.chunk_tokens)
        if num_tokens <= 0 or left:
            raise ValueError(
                f"chunks of {self.name} have a multiple of "
                f"{self.chunk_tokens // self.shape[2]} tokens, got {num_tokens}"
            )
        shape = torch.Size((*self.shape[:2], length, self.shape[3]))
        return replace(self, shape=shape)

    @property
    def fmt(self) -> MemoryFormat:
        """What the dimensions mean."""
        is_key_value = self.kind in ("attention", "nvfp4")
        return MemoryFormat.KV_2LTD if is_key_value else MemoryFormat.KV_MLA_FMT

    @property
    def layout(self) -> BlockLayout:
        """A chunk as a heap keeps it."""
        return BlockLayout.of(self.shape, self.dtype, self.fmt)

    @property
    def num_layers(self) -> int:
        """Layers L."""
        return self.shape[1]

    @property
    def head_dim(self) -> int:
        """Elements of one head, or its bytes in NVFP4; of one token for kinds without heads."""
        return self.shape[3] // self.num_heads

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk; an opaque block stands for 16."""
        return self.shape[2] * (OPAQUE_BLOCK_TOKENS if self.kind == "opaque" else 1)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk."""
        return math.prod(self.shape) * self.dtype.itemsize


def _attention(
    name: str, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> Geometry:
    shape = torch.Size((2, layers, CHUNK_TOKENS, kv_heads * head_dim))
    return Geometry(name, "attention", shape, dtype, kv_heads)


def _nvfp4(name: str, layers: int, kv_heads: int, head_dim: int) -> Geometry:
    row_bytes = head_dim // 2 + head_dim // 16
    shape = torch.Size((2, layers, CHUNK_TOKENS, kv_heads * row_bytes))
    return Geometry(name, "nvfp4", shape, torch.uint8, kv_heads)


def _latent_attention(name: str, layers: int, latent_dim: int) -> Geometry:
    shape = torch.Size((1, layers, CHUNK_TOKENS, latent_dim))
    return Geometry(name, "latent", shape, torch.bfloat16)


def _of_bytes(name: str, kind: Kind, layers: int, length: int, row_bytes: int) -> Geometry:
    return Geometry(name, kind, torch.Size((1, layers, length, row_bytes)), torch.uint8)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        _attention("tiny", 1, 1, 2, torch.float16),
        _attention("small", 2, 2, 4, torch.float16),
        _nvfp4("small-nvfp4", 2, 2, 64),
        _latent_attention("small-mla", 2, 8),
        _of_bytes("small-indexer", "indexer", 2, CHUNK_TOKENS, INDEXER_BYTES),
        _of_bytes("small-opaque", "opaque", 2, CHUNK_TOKENS // OPAQUE_BLOCK_TOKENS, 192),
        _attention("llama-3-8b", 32, 8, 128),
        _nvfp4("llama-3-8b-nvfp4", 32, 8, 128),
        _attention("llama-3-70b", 80, 8, 128),
        _attention("llama-3-70b-tp4", 80, 2, 128),
        _attention("mistral-7b", 32, 8, 128),
        _attention("qwen2.5-0.5b", 24, 2, 64),
        _attention("qwen3-8b", 36, 8, 128),
        _attention("gpt-oss-20b", 24, 8, 64),
        _latent_attention("deepseek-v3", 61, 576),
    )
}
"""Geometries by name. ``small-opaque`` has 32 blocks of 192 bytes in each layer."""
