"""What vLLM's attention backends and dtypes tell about a cache: facts read in its source, by name.

Names are those of ``backends/registry.py`` and of each backend's ``get_name`` (vLLM 0.33.0). A
backend that may keep its cache in several ways is listed as such, so that nobody guesses which.
"""

from __future__ import annotations

__all__ = [
    "FUSED_BACKENDS",
    "MAY_SHUFFLE",
    "MIXING_BACKENDS",
    "NVFP4_BACKENDS",
    "ONE_PLANE_BACKENDS",
    "OTHER_NVFP4",
    "OTHER_NVFP4_SHAPE",
    "PACKED_BACKENDS",
    "PACKED_DTYPES",
]

PACKED_DTYPES = ("turboquant_", "octave_", "ultraquant_")
"""Beginnings of vLLM's ``kv_cache_dtype`` whose rows cannot be cut into K and V."""

PACKED_BACKENDS = (
    *("B12X", "ROCM_SEGMENTED_ATTN", "KPOOL_TAIL"),
    *("TURBOQUANT", "ROCM_OCTAVE", "ULTRAQUANT"),
)
"""vLLM's backends whose rows are copied as they are. The first two keep two head slots: one for all
heads of K, one for all heads of V (``customize_spec``, vLLM 0.33.0)."""

FUSED_BACKENDS = (
    *("FLASH_ATTN", "FLASH_ATTN_DIFFKV", "TRITON_FLASH_ATTN", "FLASHINFER", "TRITON_FLASHINFER"),
    *("TRITON_ATTN", "TRITON_ATTN_DIFFKV", "FLEX_ATTENTION", "HPC_ATTN"),
    *("CUTLASS_MSA", "TRITON_MSA", "STEP5_DSA", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"),
)
"""vLLM's backends that keep each token's K and then its V in a row (vLLM 0.33.0,
``backends/registry.py``). Any other name, such as CUSTOM, tells nothing: third parties use it."""

MIXING_BACKENDS = (
    "ROCM_ATTN",
    *("DEEPSEEK_V4_ROCM_MXFP4_INDEXER", "DEEPSEEK_V41_ROCM_MXFP4_INDEXER"),
)
"""vLLM's backends that mix the tokens of a block (vLLM 0.33.0,
``PagedAttention.write_to_paged_cache``, ``ops/rocm_paged_mxfp4_indexer.py``)."""

MAY_SHUFFLE = ("ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN")
"""vLLM's backends that mix tokens, and keep two head slots or K and V apart, if the environment
variable ``VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT`` says so (vLLM 0.33.0, ``rocm_aiter_fa.py``,
``rocm_aiter_unified_attn.py``). The first one calls itself FLASH_ATTN (``get_name``)."""

NVFP4_BACKENDS = ("FLASHINFER", "TRITON_FLASHINFER")
"""vLLM's backends that keep NVFP4 as :func:`~kvheap.kernels.engine_planes.planes_of` reads it."""

OTHER_NVFP4 = ("MINIMAX_M3_SPARSE",)
"""vLLM's backends that keep NVFP4 with V of a head beside K of it (vLLM 0.33.0,
``msa_cutlass_sparse_decode.py``)."""

OTHER_NVFP4_SHAPE = (128, 72)
"""Slots of a block and bytes of a row that those have: only head dim 128, in blocks of 128."""

ONE_PLANE_BACKENDS = ("MLA", "INDEXER", "DEEPSEEK", "SWA")
"""Parts of the names of vLLM's backends without K and V (vLLM 0.33.0, ``backends/registry.py`` and
each backend's ``get_name``)."""
