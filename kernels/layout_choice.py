"""Chooses an engine layout by tensors and by what their engine knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from kvheap.kernels.engine_backends import (
    FUSED_BACKENDS,
    MAY_SHUFFLE,
    MIXING_BACKENDS,
    NVFP4_BACKENDS,
    ONE_PLANE_BACKENDS,
    OTHER_NVFP4,
    OTHER_NVFP4_SHAPE,
    PACKED_BACKENDS,
    PACKED_DTYPES,
)
from kvheap.kernels.engine_layouts import (
    LAYOUTS,
    SCALE_BYTES,
    SPLIT_RECORDS,
    KVLayout,
    LayoutError,
)
from kvheap.kernels.tensor_views import TensorFacts

__all__ = ["EngineFacts", "Readings", "SizedCache"]

LATENT_ROWS = (288, 320, 576)
"""Elements of a latent vector of known models, of which half is not the size of a usual head:
MiniCPM3 (256 + 32), DeepSeek and Kimi (512 + 64); and 320 (256 + 64)."""

ROW_RECORDS: Mapping[str, tuple[int, ...]] = {
    "fp8_ds_mla": (656, 528),
    "nvfp4_ds_mla": (352, 288),
}
"""Bytes of a token by vLLM's ``kv_cache_dtype``, where each token's scales follow its values (vLLM
0.33.0, ``mla_attention.py`` and ``deepseek_v41/common/ops/cache_utils.py``)."""

EITHER_WAY = (528, 288)
"""Rows of DeepSeek-V4.1, whose scales are apart or not in layouts of the same size."""

DEEPSEEK_V4_HEAD_DIM = 512
"""What DeepSeek-V4 calls its head size, whatever the bytes of a token (vLLM 0.33.0)."""

PAGE_ALIGNMENT: Mapping[int, int] = {584: 576, 528: 512, 288: 256}
"""Bytes that SGLang pads a block of such rows to a multiple of (``kv_layout.py``)."""

ONLY_NAMED = ("opaque", "plane-tuples", "vllm-packed")
"""Engine layouts that fit too much to be guessed."""

PAIRS_OR_LISTS: Mapping[str, str] = {
    "kv-tuples": "sglang-mha",
    "kv-tuples-hnd": "sglang-mha-hnd",
    "kv-tuples-slots": "sglang-mha",
}
"""Two lists of two tensors are (K, V) of two layers, or K of both layers and V of both; with slots
in blocks, ``sglang-mha`` takes the latter once ``flatten(0, 1)`` has joined blocks and slots."""

HOST_PAGES = "a host pool of SGLang (not among the names)"
"""``[2, pages, L, N, H, C]`` (page_first_direct) or ``[2, pages, H, N, L, C]`` (page_head; SGLang
0.5.23, ``memory_pool_host.py``): with two layers or heads, it looks like two blocks of an engine
layout ``[B, L, 2, ...]``."""

INDEXER_ROWS = tuple(row for row, (_, scales) in SPLIT_RECORDS.items() if scales == SCALE_BYTES)
"""Bytes of a token in an indexer's cache."""

MAX_REASONS = 3
"""Of the engine layouts that nearly fit, a message names so many."""


class SizedCache(Protocol):
    """What a reading of tensors says about sizes."""

    @property
    def num_heads(self) -> int:
        """KV heads."""

    @property
    def head_dim(self) -> int:
        """Elements of one head."""

    @property
    def block_size(self) -> int:
        """Slots of a block."""

    @property
    def num_blocks(self) -> int:
        """Blocks."""

    @property
    def num_layers(self) -> int:
        """Layers."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine knows about its cache; see ``PagedKVCache.detect``."""

    num_kv_heads: int
    head_dim: int
    block_size: int
    v_head_dim: int | None = None
    kv_cache_dtype: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("kv_cache_dtype", "backend"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be the engine's name of it, a str, got {value!r}")

    def candidates(self) -> Iterator[KVLayout]:
        """The engine layouts that this engine may use."""
        for layout in LAYOUTS.values():
            if self._may_use(layout):
                yield layout

    def _may_use(self, layout: KVLayout) -> bool:
        dtype, backend = self.kv_cache_dtype, self._backend
        if backend in MIXING_BACKENDS:
            return False
        if self._is_packed:
            return layout.name == "vllm-packed"
        if layout.name in ONLY_NAMED:
            return layout.name == "vllm-packed" and self._has_scales
        if layout.content == "values-scales" and self._has_scales:
            return False
        if dtype is not None and self._is_nvfp4 != (layout.content == "nvfp4"):
            return False
        if layout.content == "nvfp4" and self._keeps_no_such_nvfp4:
            return False
        if not backend:
            return True
        if any(part in backend for part in ONE_PLANE_BACKENDS):
            return not layout.is_key_value
        if backend == "CPU_ATTN":
            return layout.content == "key-rows"
        return not self._keeps_fused_rows or (layout.is_key_value and layout.content != "key-rows")

    @property
    def _backend(self) -> str:
        return (self.backend or "").upper()

    @property
    def _keeps_fused_rows(self) -> bool:
        """Whether the backend is one of vLLM's that are known to keep K then V in a row."""
        return self._backend in FUSED_BACKENDS

    @property
    def _may_shuffle(self) -> bool:
        """Whether an environment variable may decide if the tokens of a block are mixed."""
        if not _is_rocm():
            return self._backend in MAY_SHUFFLE
        others = set(FUSED_BACKENDS) - {*MAY_SHUFFLE, "FLASH_ATTN"}
        return self._backend not in others

    @property
    def _is_nvfp4(self) -> bool:
        dtype = self.kv_cache_dtype
        return dtype is not None and dtype.startswith("nvfp4") and dtype not in ROW_RECORDS

    @property
    def _keeps_no_such_nvfp4(self) -> bool:
        """Whether the backend is known, and does not keep NVFP4 as FlashInfer does."""
        is_known = self._keeps_fused_rows or self._backend in OTHER_NVFP4
        return is_known and self._backend not in NVFP4_BACKENDS

    @property
    def _rules_out_nvfp4(self) -> bool:
        """Whether rows of K and V cannot be those of NVFP4; "auto" may stand for any dtype."""
        return self.kv_cache_dtype not in (None, "auto") and not self._is_nvfp4

    @property
    def _is_packed(self) -> bool:
        is_dtype = (self.kv_cache_dtype or "").startswith(PACKED_DTYPES)
        return is_dtype or self._backend in PACKED_BACKENDS

    @property
    def _has_scales(self) -> bool:
        """Whether each token and head has scales of its own in its row."""
        return (self.kv_cache_dtype or "").endswith("_per_token_head")

    def hint(self) -> str | None:
        """What to do if this engine's cache cannot be one of the candidates."""
        if self._backend in MIXING_BACKENDS:
            return f"{self.backend} mixes the tokens of a block: use opaque"
        if self._is_nvfp4 and self._keeps_no_such_nvfp4:
            return f"{self.backend} does not keep NVFP4 as FlashInfer does: use opaque"
        return None

    def tensor_facts(self, layout: KVLayout, tensors: Any) -> Iterator[TensorFacts]:
        """What to read the tensors with; one of them for each pair of widths that may fit."""
        if layout.name != "values-scales":
            yield TensorFacts(self.block_size, self._value_dim(layout, tensors))
            return
        first = _first_tensor(tensors)
        if first is None or first.dim() < 2 or first.element_size() != 1 or self.block_size < 1:
            return
        for row, widths in SPLIT_RECORDS.items():
            if row in ROW_RECORDS.get(self.kv_cache_dtype or "", ()):
                continue
            page = self.block_size * row
            unit = PAGE_ALIGNMENT.get(row, 1)
            sizes = (page, -(-page // unit) * unit) if first.dim() == 2 else (row,)
            if first.shape[-1] in sizes:
                yield TensorFacts(self.block_size, None, widths)

    def _value_dim(self, layout: KVLayout, tensors: Any) -> int | None:
        """Elements of a head of V with its scales, if they are known and tell something."""
        if layout.content not in ("key-value", "fused", "key-rows"):
            return None
        is_half = layout.content != "key-value" and not self._has_other_v
        if self.v_head_dim is not None and not is_half:
            return self._with_scales(self.v_head_dim)
        if not is_half or not self._rules_out_nvfp4:
            return None
        # Told, so that a row of K and V is not taken for one of NVFP4, which may be as wide.
        half, first = self._with_scales(self.head_dim), _first_tensor(tensors)
        is_two_halves = first is not None and first.dim() and first.shape[-1] == 2 * half
        return half if is_two_halves else None

    @property
    def _has_other_v(self) -> bool:
        return self.v_head_dim not in (None, self.head_dim)

    def _with_scales(self, head_dim: int, count: int = 1) -> int:
        """Elements of a head with the scales that some dtypes put behind them.

        vLLM 0.33.0, ``customize_spec`` of ``triton_attn.py`` (a scale for K, a scale for V) and
        ``mla_attention.py`` (two for the latent); the elements have one byte.
        """
        if not self._has_scales:
            return head_dim
        is_int4 = (self.kv_cache_dtype or "").startswith("int4")
        return (head_dim // 2 if is_int4 else head_dim) + count * SCALE_BYTES

    def mismatch(self, layout: KVLayout, cache: SizedCache) -> str | None:
        """Why a reading is not of this engine's cache; None if it may be."""
        rows = self._rows(layout, cache)
        if (cache.num_heads, cache.head_dim) in rows and cache.block_size == self.block_size:
            return None
        seen = (cache.num_heads, cache.head_dim, cache.block_size)
        return f"{layout.name}: H, C, N would be {seen}"

    def _rows(self, layout: KVLayout, cache: SizedCache) -> tuple[tuple[int, int], ...]:
        """Heads and sizes of a head that the facts may mean in an engine layout."""
        heads, head_dim, row = self.num_kv_heads, self.head_dim, cache.head_dim
        if layout.name == "vllm-packed" and self._is_packed:
            if (self.kv_cache_dtype or "").startswith(PACKED_DTYPES):
                return ((heads, row),)
            return ((heads, head_dim), (2, heads * head_dim))
        if layout.content == "nvfp4":
            return ((heads, 9 * head_dim // 16),)
        if layout.content == "values-scales":
            if row not in SPLIT_RECORDS:
                return ()  # a name can say that rows end in a scale, their width cannot
            known = [row, SPLIT_RECORDS[row][0]]
            known += [DEEPSEEK_V4_HEAD_DIM] if row in PAGE_ALIGNMENT else []
            return ((heads, row),) if head_dim in known else ()
        if layout.content != "one":
            return ((heads, self._with_scales(head_dim)),)
        if row in ROW_RECORDS.get(self.kv_cache_dtype or "", ()):
            return ((heads, row),)
        return ((heads, head_dim), (heads, self._with_scales(head_dim, 2)))

    def also_fits(self, layout: KVLayout, cache: SizedCache) -> str | None:
        """Another engine layout with the same shape, which nothing here rules out."""
        if layout.content == "values-scales" and _is_rocm() and cache.head_dim in INDEXER_ROWS:
            return "opaque"  # with tiles of 16 tokens: ``rocm_aiter_mla_sparse.py``, vLLM 0.33.0
        if layout.content == "values-scales":
            if self.kv_cache_dtype in ROW_RECORDS or "INDEXER" in self._backend:
                return None
            # A latent of this head dim may have two scales behind it: 576 + 8 bytes.
            rows = (self.head_dim, self.head_dim + 2 * SCALE_BYTES, *EITHER_WAY)
            return "mla" if cache.head_dim in rows else None
        if layout.name in PAIRS_OR_LISTS and cache.num_layers == 2 and not self._has_other_v:
            return PAIRS_OR_LISTS[layout.name]
        if layout.dims.startswith("BLP") and cache.num_blocks == 2:
            return HOST_PAGES
        if layout.content == "nvfp4":
            seen = (cache.block_size, cache.head_dim)
            is_either = seen == OTHER_NVFP4_SHAPE and self._backend not in NVFP4_BACKENDS
            return "opaque" if is_either else None
        if layout.content == "key-value" and "P" in layout.dims and self._may_shuffle:
            return "opaque"
        if layout.content not in ("fused", "key-rows") or self._has_other_v:
            return None
        if self._may_shuffle and cache.num_heads == 2:
            return "opaque"
        if self._keeps_fused_rows or layout.content == "key-rows":
            return None
        if cache.num_heads == 1 and 2 * self.head_dim in LATENT_ROWS:
            return "mla"
        # Two slots of one head of K and V, or one slot for both heads of K and one for those of V.
        return "vllm-packed" if cache.num_heads == 2 else None

    def __str__(self) -> str:
        """H, C and N, and what else is known."""
        words = f"H, C, N = {(self.num_kv_heads, self.head_dim, self.block_size)}"
        for name in ("v_head_dim", "kv_cache_dtype", "backend"):
            value = getattr(self, name)
            words += "" if value is None else f", {name}={value!r}"
        return words


def _is_rocm() -> bool:
    """Whether this is the torch of an engine on AMD's GPUs."""
    return torch.version.hip is not None


def _first_tensor(tensors: Any) -> torch.Tensor | None:
    while not isinstance(tensors, torch.Tensor):
        if isinstance(tensors, Mapping):
            tensors = list(tensors.values())
        if not isinstance(tensors, Sequence) or isinstance(tensors, str) or not len(tensors):
            return None
        tensors = tensors[0]
    return tensors


_Cache = TypeVar("_Cache")


@dataclass(slots=True)
class Readings(Generic[_Cache]):
    """The readings of the same tensors that fit, and why others do not."""

    facts: EngineFacts
    found: dict[str, _Cache] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    sizes_differ: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Note why an engine layout does not fit tensors that have its dimensions."""
        self.refused.append(reason)

    def add(self, layout: KVLayout, cache: _Cache, sizes: SizedCache) -> None:
        """Note a reading, if it fits what the engine knows."""
        mismatch = self.facts.mismatch(layout, sizes)
        if mismatch is not None:
            self.sizes_differ.append(mismatch)
            return
        self.found.setdefault(layout.name, cache)
        other = self.facts.also_fits(layout, sizes)
        if other is not None:
            self.others.append(other)

    def only(self, are_alike: Callable[[_Cache, _Cache], bool]) -> _Cache:
        """The only reading, or the first of several that mean the same addresses.

        Raises:
            LayoutError: there is none, or two that mean different addresses.
        """
        if not self.found:
            hint = self.facts.hint()
            reasons = [hint] if hint else [*self.sizes_differ, *self.refused][:MAX_REASONS]
            raise LayoutError(
                f"no engine layout fits {self.facts}:\n"
                f"{'; '.join(reasons) or 'none has tensors of these dimensions'}\n"
                f"PagedKVCache.of(name, tensors) tells more about one engine layout"
            )
        distinct: dict[str, _Cache] = {}
        for name, cache in self.found.items():
            if not any(are_alike(cache, other) for other in distinct.values()):
                distinct[name] = cache
        others = dict.fromkeys(name for name in self.others if name not in self.found)
        names = [*distinct, *others]
        if len(names) > 1:
            raise LayoutError(
                f"several engine layouts fit, choose one by name: {', '.join(names)}\n"
                f"(for {self.facts})\n"
                f"PagedKVCache.of(name, tensors), or say more: kv_cache_dtype=, backend="
            )
        return distinct[names[0]]
