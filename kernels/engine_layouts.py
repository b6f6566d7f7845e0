"""The engine layouts: how serving engines arrange their paged KV caches, by name.

``L`` layers, ``B`` blocks, ``N`` slots of a block (its tokens), ``H`` KV heads, ``C`` elements of
one head. A *plane* is one part of a token's KV in a layer: K or V; the single vector of latent
attention; the values or the scales of the sparse-attention indexer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["INDEXER_BYTES", "LAYOUTS", "SCALE_BYTES", "KVLayout", "LayoutError"]

SCALE_BYTES = 4
"""Bytes of the indexer's scale for a token, a float32 (vLLM's ``indexer_k_quant_and_cache``)."""

INDEXER_BYTES = 132
"""Bytes of a token in the indexer's cache: 128 fp8 values and their scale."""


class LayoutError(ValueError):
    """Tensors do not fit an engine layout, or the name of an engine layout is unknown."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One engine layout.

    Attributes:
        name: what users call it.
        nesting: lists around the tensors: ``""`` for one tensor, ``"L"`` for one tensor for each
            layer, ``"LP"`` for a (K, V) pair for each layer, ``"PL"`` for a list of K and a list of
            V.
        dims: a letter for each dimension of a tensor: L, B, N, H and C as above, P for K and V,
            S for all slots (B x N), F for K then V of one head, I for values and scales of an
            indexer, X for any number of dimensions, whose bytes are copied as they are.
        order: physical order of the dimensions, outermost first; "" if any order is allowed.
        tensors: nesting and dimensions in words, for error messages.
    """

    name: str
    nesting: str
    dims: str
    tensors: str
    order: str = ""

    @property
    def num_planes(self) -> int:
        """2 for K and V, or for values and scales; else 1."""
        return 2 if set("PFI") & set(self.nesting + self.dims) else 1


def _fused(order: str) -> KVLayout:
    """One of the physical orders of vLLM's standard logical shape."""
    name = f"vllm-{order.lower()}"
    words = f"[L, B, H, N, 2C] or L x [B, H, N, 2C], K then V, strides as {order}"
    return KVLayout(name, "", "LBHNF", words, order.replace("C", "F"))


LAYOUTS: Mapping[str, KVLayout] = {
    layout.name: layout
    for layout in (
        KVLayout("vllm-flash-nhd", "L", "PBNHC", "L x [2, B, N, H, C]"),
        KVLayout("vllm-flash-hnd", "L", "PBHNC", "L x [2, B, H, N, C]"),
        KVLayout("vllm-flashinfer-nhd", "L", "BPNHC", "L x [B, 2, N, H, C]"),
        KVLayout("vllm-flashinfer-hnd", "L", "BPHNC", "L x [B, 2, H, N, C]"),
        *map(_fused, ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")),
        KVLayout("vllm-cross-layer", "", "BLPNHC", "[B, L, 2, N, H, C]"),
        KVLayout("mla", "L", "BNC", "L x [B, N, C]"),
        KVLayout("indexer", "L", "BNI", "L x [B, N, values + 4 bytes] of uint8"),
        KVLayout("sglang-mha", "PL", "SHC", "K and V: L x [B * N, H, C]"),
        KVLayout("sglang-mla", "L", "SHC", "L x [B * N, 1, C]"),
        KVLayout("trtllm", "", "BLPHNC", "[B, L, 2, H, N, C]"),
        KVLayout("kv-tuples", "LP", "BNHC", "L x (K, V) of [B, N, H, C]"),
        KVLayout("kv-tuples-hnd", "LP", "BHNC", "L x (K, V) of [B, H, N, C]"),
        KVLayout("opaque", "L", "BX", "L x [B, ...], whole blocks as bytes"),
    )
}
"""All engine layouts by name. ``vllm-<order>`` are the physical orders of vLLM's standard logical
shape (vLLM #42082). Blocks of ``opaque`` hold no tokens: each block counts as one slot."""
