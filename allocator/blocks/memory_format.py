"""``MemoryFormat``: what the dimensions of a block's logical shape mean.

Names and values are those of LMCache 0.5.6's ``MemoryFormat``, so that both sides can exchange
metadata. ``token_dim()`` agrees with LMCache except for KV_T2D and KV_2TD: LMCache 0.5.6 returns 1
and 0 for them, which is the K/V dimension of the shapes given in its own comments. LMCache has no
formats numbered 101 and above; they are the page-first orders of host tiers, as SGLang 0.5.23 names
them (``srt/mem_cache/pool_host``: ``mha.py``, ``mla.py``, ``page_unified.py``).
"""

from __future__ import annotations

from enum import Enum

__all__ = ["MemoryFormat"]


class MemoryFormat(Enum):
    """Dimensions of one chunk: T tokens, L layers, D hidden dimension (heads x head dim)."""

    # Formats are parts of cache keys at each allocation; Enum's own hash is a Python function.
    __hash__ = object.__hash__

    UNDEFINED = 0
    KV_2LTD = 1
    """``[2, L, T, D]``: K and V of all layers."""
    KV_T2D = 2
    """``[T, 2, D]``: K and V of one layer, token by token."""
    KV_2TD = 3
    """``[2, T, D]``: K and V of one layer."""
    BINARY = 4
    """Compressed bytes in a tensor."""
    BINARY_BUFFER = 5
    """Bytes outside any tensor."""
    KV_MLA_FMT = 6
    """``[1, L, T, D]``: the latent vector of multi-head latent attention, all layers."""
    EC_TD = 7
    """``[T, D]``: entries of an encoder cache."""
    HS_TD = 8
    """``[T, D]``: hidden states."""
    KV_2TLD = 101
    """``[2, T, L, D]``: K and V, token by token with all layers: SGLang's ``page_first``."""
    KV_PL2TD = 102
    """``[P, L, 2, T, D]``: P pages of T tokens, each with all layers and K and V."""
    KV_TLD = 103
    """``[T, L, D]``: one plane, token by token with all layers: ``page_first`` of latent
    attention."""
    KV_PLTD = 104
    """``[P, L, T, D]``: P pages of T tokens in one plane: ``page_first_direct`` and
    ``page_unified`` of latent attention."""
    KV_2PHTLD = 105
    """``[2, P, H, T, L, D]``: K and V, P pages of T tokens, each head by head with all layers;
    D of one head: ``page_head``."""
    KV_PHL2TD = 106
    """``[P, H, L, 2, T, D]``: P pages of T tokens, each in H groups of heads with all layers and K
    and V; D of one group: ``page_unified``."""

    def token_dim(self) -> int:
        """Index of the token dimension; 0 for formats without tokens.

        >>> MemoryFormat.KV_2LTD.token_dim()
        2
        """
        return _TOKEN_DIM.get(self, 0)

    @property
    def dim_order(self) -> str | None:
        """One letter per dimension, outermost first; None if the format does not hold paged KV.

        P planes (K and V; one if there is no P), L layers, T tokens, D hidden dimension, G pages of
        T tokens, J groups of heads, with D of one group.

        >>> MemoryFormat.KV_2LTD.dim_order
        'PLTD'
        """
        return _DIM_ORDER.get(self)


_DIM_ORDER = {
    MemoryFormat.KV_2LTD: "PLTD",
    MemoryFormat.KV_MLA_FMT: "PLTD",
    MemoryFormat.KV_T2D: "TPD",
    MemoryFormat.KV_2TD: "PTD",
    MemoryFormat.KV_2TLD: "PTLD",
    MemoryFormat.KV_PL2TD: "GLPTD",
    MemoryFormat.KV_TLD: "TLD",
    MemoryFormat.KV_PLTD: "GLTD",
    MemoryFormat.KV_2PHTLD: "PGJTLD",
    MemoryFormat.KV_PHL2TD: "GJLPTD",
}

_TOKEN_DIM = {
    MemoryFormat.KV_2LTD: 2,
    MemoryFormat.KV_T2D: 0,
    MemoryFormat.KV_2TD: 1,
    MemoryFormat.KV_MLA_FMT: 2,
    MemoryFormat.KV_2TLD: 1,
    MemoryFormat.KV_PL2TD: 3,
    MemoryFormat.KV_TLD: 0,
    MemoryFormat.KV_PLTD: 2,
    MemoryFormat.KV_2PHTLD: 3,
    MemoryFormat.KV_PHL2TD: 4,
}
