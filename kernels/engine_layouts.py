"""The engine layouts: how serving engines arrange their paged KV caches, by name.

``L`` layers, ``B`` blocks, ``N`` slots of a block (its tokens), ``H`` KV heads, ``C`` elements of
one head. A *plane* is one part of a token's KV in a layer: K or V; the single vector of latent
attention; the values or the scales of quantized rows.

Sources, beside those named below: vLLM 0.33.0 (``v1/kv_cache_interface.py``: the logical shape is
``[L, B, H, N, content]``, and ``KVCacheLayout`` says in which order it is in memory), SGLang 0.5.23
(``srt/mem_cache/memory_pool.py``), LMCache 0.5.6 (``v1/gpu_connector/kv_format``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "INDEXER_BYTES",
    "LAYOUTS",
    "NVFP4_ROWS",
    "SCALE_BYTES",
    "SPLIT_RECORDS",
    "Content",
    "KVLayout",
    "LayoutError",
    "OtherTensorsError",
]

SCALE_BYTES = 4
"""Bytes of the indexer's scale for a token, a float32 (vLLM's ``indexer_k_quant_and_cache``)."""

INDEXER_BYTES = 132
"""Bytes of a token in the indexer's cache: 128 fp8 values and their scale."""

SPLIT_RECORDS: Mapping[int, tuple[int, int]] = {
    584: (576, 8),
    528: (512, 16),
    288: (256, 32),
    INDEXER_BYTES: (128, SCALE_BYTES),
    68: (64, SCALE_BYTES),
}
"""Bytes of a token, and of its values and its scales, where pages keep all values and then all
scales: DeepSeek-V4 (584), V4.1 in fp8 (528) and in NVFP4 (288), the indexer in fp8 (132) and in fp4
(68). SGLang 0.5.23, ``kernels/ops/attention/dsv4/kv_layout.py`` and
``deepseek_v4_memory_pool.py``. vLLM 0.33.0 splits 584 and 132 so
(``deepseek_v41/common/ops/cache_utils.py``), but keeps the scales of a token of 528 or 288 bytes
behind its values, and so does SGLang in its ``*_NEW`` layouts."""

NVFP4_ROWS: Mapping[int, int] = {9 * dim // 16: dim for dim in (64, 96, 128, 192, 256, 512)}
"""Bytes of a head and slot in an NVFP4 cache, data and scales, and the head dim that they stand for
(vLLM 0.33.0, ``nvfp4_kv_cache_full_dim``)."""

Content = Literal[
    "one", "key-value", "fused", "key-rows", "nvfp4", "values-scales", "parts", "blocks"
]
"""What a tensor keeps for a token: ``one`` row; K or V, in a dimension or tensor of their own
(``key-value``); K then V in one row (``fused``); all K rows of a head and block, then all V rows
(``key-rows``); K data, K scales, V data, V scales of a block (``nvfp4``); the values of all tokens
of a block, then their scales (``values-scales``); one of several rows of unequal width
(``parts``); ``blocks`` of bytes."""

_NUM_PLANES: Mapping[Content, int] = {
    "one": 1,
    "blocks": 1,
    "key-value": 2,
    "fused": 2,
    "key-rows": 2,
    "values-scales": 2,
    "nvfp4": 4,
    "parts": 0,
}


class LayoutError(ValueError):
    """Tensors do not fit an engine layout, or the name of an engine layout is unknown."""


class OtherTensorsError(LayoutError):
    """Tensors nest in another way, or have another number of dimensions, than an engine layout."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One engine layout.

    Attributes:
        name: what users call it.
        nesting: lists around the tensors: ``""`` for one tensor, ``"L"`` for one tensor for each
            layer, ``"LP"`` for the planes of each layer, ``"PL"`` for a list of K and a list of V.
            If ``dims`` begin with L, one tensor for each layer will do, too.
        dims: a letter for each dimension of a tensor: L, B, N, H and C as above, P for K and V,
            S for all slots (B x N), F for K then V of one head, X for any number of dimensions,
            whose bytes are copied as they are.
        tensors: nesting and dimensions in words, for error messages.
        content: what the tensors keep for a token.
        order: physical order of the dimensions, outermost first; "" if any order is allowed.
        whole_blocks: whether only whole blocks can be copied, because the engine mixes the bytes of
            the tokens of a block.
    """

    name: str
    nesting: str
    dims: str
    tensors: str
    content: Content = "key-value"
    order: str = ""
    whole_blocks: bool = False

    @property
    def num_planes(self) -> int:
        """Planes of a layer: 2 for K and V; 0 if there are as many as the tensors of a layer."""
        return _NUM_PLANES[self.content]

    @property
    def is_key_value(self) -> bool:
        """Whether the planes are K and V; in halves if there are more than two."""
        return self.content in ("key-value", "fused", "key-rows", "nvfp4")


def _fused(order: str) -> KVLayout:
    """One of the physical orders of vLLM's standard logical shape."""
    name = f"vllm-{order.lower()}"
    words = f"[L, B, H, N, 2C] or L x [B, H, N, 2C], K then V, strides as {order}"
    return KVLayout(name, "", "LBHNF", words, "fused", order.replace("C", "F"))


_NVFP4 = "[L, B, 2H, N, D/2 + D/16] or L x [B, 2H, N, D/2 + D/16] of bytes, dense blocks"

LAYOUTS: Mapping[str, KVLayout] = {
    layout.name: layout
    for layout in (
        KVLayout("vllm-flash-nhd", "L", "PBNHC", "L x [2, B, N, H, C]"),
        KVLayout("vllm-flash-hnd", "L", "PBHNC", "L x [2, B, H, N, C]"),
        KVLayout("vllm-flashinfer-nhd", "L", "BPNHC", "L x [B, 2, N, H, C]"),
        KVLayout("vllm-flashinfer-hnd", "L", "BPHNC", "L x [B, 2, H, N, C]"),
        *map(_fused, ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")),
        KVLayout(
            "vllm-cpu",
            "",
            "LBHNF",
            "[L, B, H, N, 2C] or L x [B, H, N, 2C] on a CPU, K rows then V rows of each head",
            "key-rows",
            "LBHNF",
            whole_blocks=True,
        ),
        KVLayout("vllm-nvfp4", "", "LBHNC", _NVFP4, "nvfp4", whole_blocks=True),
        KVLayout("vllm-nvfp4-linear", "", "LBHNC", _NVFP4, "nvfp4"),
        KVLayout("vllm-packed", "", "LBHNC", "[L, B, H, N, C] or L x [B, H, N, C]", "one"),
        KVLayout("vllm-cross-layer", "", "BLPNHC", "[B, L, 2, N, H, C]"),
        KVLayout(
            "mla", "L", "BNC", "L x [B, N, C], [B, 1, N, C], [B, N, 1, C] or [B, N * C]", "one"
        ),
        KVLayout(
            "indexer",
            "L",
            "BNC",
            "L x [B, N, values + 4 bytes], [B, 1, N, values + 4] or [B, N * 132] of bytes",
            "values-scales",
        ),
        KVLayout(
            "values-scales",
            "L",
            "BNC",
            "L x [B, N, values + scales], [B, 1, N, values + scales] or [B, page] of bytes",
            "values-scales",
        ),
        KVLayout("sglang-mha", "PL", "SHC", "K and V: L x [B * N, H, C]"),
        KVLayout("sglang-mha-hnd", "PL", "BHNC", "K and V: L x [B, H, N, C]"),
        KVLayout("sglang-mla", "L", "SHC", "L x [B * N, 1, C]", "one"),
        KVLayout("sglang-rows", "L", "SHC", "L x [B * N, H, C] or [B * N, C]", "one"),
        KVLayout("trtllm", "", "BLPHNC", "[B, L, 2, H, N, C]"),
        KVLayout("kv-tuples", "LP", "BNHC", "L x (K, V) of [B, N, H, C]"),
        KVLayout("kv-tuples-hnd", "LP", "BHNC", "L x (K, V) of [B, H, N, C]"),
        KVLayout("kv-tuples-slots", "LP", "SHC", "L x (K, V) of [B * N, H, C]"),
        KVLayout(
            "plane-tuples",
            "LP",
            "BNHC",
            "L x (one or more of [B, N, H, any] or [B, N, any])",
            "parts",
        ),
        KVLayout(
            "opaque",
            "L",
            "BX",
            "L x [B, ...], whole blocks as bytes; L x (several [B, ...]); or [L, B, H, N, C]",
            "blocks",
        ),
    )
}
"""All engine layouts by name.

``vllm-<order>`` are the physical orders of vLLM's standard logical shape (vLLM #42082). In the
others of vLLM:

- ``vllm-cpu`` is what ``CPU_ATTN`` makes of LBHNC on a CPU: it views a head's part of a block as
  ``[2N, C]``, K rows and then V rows, and packs the keys for the machine's instruction set. Shape,
  dtype and strides are those of ``vllm-lbhnc``: only the name tells them apart.
- ``vllm-nvfp4`` is FlashInfer's: a block keeps the data of K, the scales of K, the data of V, the
  scales of V, each ``[H, N, row]``, or ``[N, H, row]`` if slots are outermost. On compute
  capability 10 (``reshape_and_cache_nvfp4_kernel``), the scales of V of each four tokens are mixed,
  so whole blocks are copied, which is right everywhere. ``vllm-nvfp4-linear`` also copies single
  tokens, as the kernels of capability 8, 9 and 12 keep them. MiniMax M3 keeps NVFP4 otherwise, V of
  a head beside its K (``msa_cutlass_sparse_decode.py``): that is ``opaque``.
- ``vllm-packed`` copies each row as it is: quantized rows with scales of their own (TurboQuant,
  per-token-head scales), backends with a head slot for K and one for V, anything with one plane.

``sglang-rows`` is what SGLang keeps in one plane: K without V, scales of rows.

Blocks of ``opaque`` hold no tokens: each block counts as one slot."""
