"""``PagedKVCache``: where an engine keeps the KV of each token, in any of the engine layouts.

It has a base address for each layer and plane, and physical strides in bytes. The engine layouts
and the letters of their dimensions are in :mod:`kvheap.kernels.engine_layouts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kvheap.kernels.arguments import as_whole
from kvheap.kernels.arrays import Int64Array, alignment_of, combined_bits
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.chunk_shape import ChunkShape, NamedFormat, chunk_shape
from kvheap.kernels.engine_layouts import (
    INDEXER_BYTES,
    LAYOUTS,
    SCALE_BYTES,
    KVLayout,
    LayoutError,
    OtherTensorsError,
)
from kvheap.kernels.engine_planes import Plane
from kvheap.kernels.engine_tensors import EngineTensors, read_tensors
from kvheap.kernels.launch import resident
from kvheap.kernels.layout_choice import EngineFacts, Readings
from kvheap.kernels.paged_places import NO_REPORT, read_report
from kvheap.kernels.tensor_views import TensorFacts
from kvheap.kernels.transformers_cache import key_value_tensors

__all__ = [
    "INDEXER_BYTES",
    "LAYOUTS",
    "SCALE_BYTES",
    "KVLayout",
    "LayoutError",
    "PagedKVCache",
    "Plane",
]


@dataclass(frozen=True, eq=False)
class PagedKVCache:
    """The KV cache of an engine, as addresses and strides. Keeps its tensors alive.

    Made by :meth:`of`, :meth:`of_transformers` or :meth:`detect`. :meth:`chunk_layout` tells what
    a chunk of it is.

    Attributes:
        layout: the engine layout of the tensors.
        planes: each plane: K and V, one, or the parts of both.
        base_addresses: where block 0 of each layer and plane begins, int64 ``[L, planes]``.
        num_blocks: blocks B.
        block_size: slots of a block N.
        num_heads: KV heads H.
        head_dim: elements of one head in one plane.
        dtype: dtype of the elements.
        device: where the tensors are.
        tensors: the engine's tensors, layer by layer.
        filled_tokens: how many slots of a block were filled when this was made, for each layer; a
            store of others raises. None if that is not known.

    >>> tensors = [torch.zeros(2, 8, 16, 4, 64, dtype=torch.float16) for _ in range(3)]
    >>> cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    >>> cache.num_layers, cache.num_slots, cache.planes[0].slot_stride, cache.token_bytes
    (3, 128, 512, 3072)
    """

    layout: KVLayout
    planes: tuple[Plane, ...]
    base_addresses: Int64Array
    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    tensors: tuple[torch.Tensor, ...] = field(repr=False)
    filled_tokens: tuple[int, ...] | None = field(default=None, repr=False)
    kept: dict[object, Any] = field(default_factory=dict, repr=False)
    """Results that copies compute once for this cache and reuse."""

    @classmethod
    def of(
        cls,
        layout: str | KVLayout,
        tensors: EngineTensors,
        *,
        block_size: int | None = None,
        v_head_dim: int | None = None,
        widths: tuple[int, int] | None = None,
    ) -> PagedKVCache:
        """The cache that an engine keeps in ``tensors``, by the name of its engine layout.

        Args:
            layout: one of :data:`LAYOUTS`, or its name.
            tensors: one tensor or lists of tensors, as the engine layout says; a dict of one tensor
                for each layer counts as a list. Strides may be any that keep heads contiguous and
                elements apart.
            block_size: slots of a block, for engine layouts that only have slots; 1 if not given.
                For the others, the block size that the tensors must have.
            v_head_dim: elements of a head of V. Needed if it is not as large as one of K and both
                share a row, as in ``vllm-lbhnc``; else checked.
            widths: for ``values-scales``, the bytes of a token's values and of its scales, such as
                (576, 8) for DeepSeek-V4. Those of known records are checked; of other rows, nothing
                but the caller can tell one split from another, nor one ``v_head_dim`` from another.

        Raises:
            LayoutError: the name is unknown; or a tensor has another rank, device, dtype or size
                than the engine layout or the first layer requires, or strides that do not fit. The
                message names its layer.
            TypeError: one of ``tensors`` is not a tensor, or another argument has a wrong type.

        >>> pages = [torch.zeros(8, 64, 584, dtype=torch.uint8)]  # DeepSeek-V4
        >>> cache = PagedKVCache.of("values-scales", pages, widths=(576, 8))
        >>> [(plane.row_bytes, plane.slot_stride) for plane in cache.planes]
        [(576, 576), (8, 8)]
        """
        if isinstance(layout, str):
            if layout not in LAYOUTS:
                known = ", ".join(LAYOUTS)
                raise LayoutError(f"unknown engine layout {layout!r}; known are {known}")
            layout = LAYOUTS[layout]
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be the name of an engine layout, got {layout!r}")
        found = read_tensors(layout, tensors, TensorFacts(block_size, v_head_dim, widths))
        return cls(
            found.layout,
            found.planes,
            found.base_addresses,
            found.num_blocks,
            found.block_size,
            found.num_heads,
            found.head_dim,
            found.dtype,
            found.tensors[0].device,
            found.tensors,
        )

    @classmethod
    def of_transformers(
        cls, cache: object, *, num_kv_heads: int | None = None, head_dim: int | None = None
    ) -> PagedKVCache:
        """The cache that Hugging Face's transformers keep, without pages: row ``b`` is a block.

        Slot ``b * T + t`` is token ``t`` of row ``b``; a row has as many slots as its tensors have
        tokens. A ``DynamicCache`` makes new tensors with every token, and a ``StaticCache`` fills
        its tensors: make this again then. Tokens that were not filled can be loaded, not stored.

        Args:
            cache: an object whose ``layers`` have ``keys`` and ``values`` (transformers 5.24,
                ``cache_utils.py``: ``DynamicCache``, ``StaticCache``); one with lists
                ``key_cache`` and ``value_cache``; or a (K, V) pair for each layer, but not two
                pairs, which may be two lists: ``of`` takes them by name. All tensors are ``[B, H,
                T, D]``; V may have other D than K.
            num_kv_heads: KV heads H. With it, tensors ``[B, T, H, D]`` are refused.
            head_dim: elements of a head of K, checked if given.

        Raises:
            LayoutError: a layer has no K and V, keeps only a window of its tokens, or does not fit
                the others or what was given; the message names it.
            TypeError: ``cache`` is of another kind, or counts its tokens in no integer.

        >>> pairs = [(torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 7, 8)) for _ in range(3)]
        >>> cache = PagedKVCache.of_transformers(pairs, num_kv_heads=2)
        >>> cache.num_layers, cache.num_blocks, cache.block_size, cache.num_heads
        (3, 1, 7, 2)
        """
        if num_kv_heads is not None:
            num_kv_heads = as_whole("num_kv_heads", num_kv_heads)
        if head_dim is not None:
            head_dim = as_whole("head_dim", head_dim)
        pairs, filled = key_value_tensors(cache, num_kv_heads, head_dim)
        return replace(cls.of("kv-tuples-hnd", pairs), filled_tokens=filled)

    @classmethod
    def detect(
        cls,
        tensors: EngineTensors,
        *,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        v_head_dim: int | None = None,
        kv_cache_dtype: str | None = None,
        backend: str | None = None,
    ) -> PagedKVCache:
        """The cache that an engine keeps in ``tensors``; detects the engine layout.

        The engine layout is recognized by the tensors' shapes and strides, and by what the engine
        knows. Two caches can look the same and keep their bytes in different order (vLLM's on a CPU
        and ``vllm-lbhnc``; one head of K and V, and a latent vector): pass all that is known.

        Args:
            tensors: as for :meth:`of`.
            num_kv_heads: KV heads H; 1 for latent attention.
            head_dim: elements of one head; for latent attention, of a token.
            block_size: slots of a block.
            v_head_dim: elements of one head of V, if not ``head_dim``.
            kv_cache_dtype: the engine's name of it, such as ``"fp8_ds_mla"`` or ``"nvfp4"``.
            backend: the name of the engine's attention backend, such as ``"FLASH_ATTN"`` or
                ``"CPU_ATTN"``.

        Raises:
            LayoutError: no engine layout fits, or two that fit put a token at different addresses;
                the message has three lines. ``opaque``, ``vllm-packed`` and ``plane-tuples`` are
                only found if ``kv_cache_dtype`` or ``backend`` says so.
            TypeError: a number is not an integer, or ``kv_cache_dtype`` or ``backend`` not text.
        """
        facts = EngineFacts(
            as_whole("num_kv_heads", num_kv_heads),
            as_whole("head_dim", head_dim),
            as_whole("block_size", block_size),
            None if v_head_dim is None else as_whole("v_head_dim", v_head_dim),
            kv_cache_dtype,
            backend,
        )
        readings: Readings[PagedKVCache] = Readings(facts)
        for layout in facts.candidates():
            for given in facts.tensor_facts(layout, tensors):
                try:
                    cache = cls.of(
                        layout,
                        tensors,
                        block_size=given.block_size,
                        v_head_dim=given.v_head_dim,
                        widths=given.widths,
                    )
                except OtherTensorsError:
                    continue
                except (LayoutError, TypeError) as error:
                    readings.refuse(str(error))
                    continue
                readings.add(layout, cache, cache)
        return readings.only(cls.addresses_like)

    def chunk_layout(
        self,
        chunk_tokens: int = 256,
        fmt: NamedFormat | str | None = None,
        *,
        layers: range | None = None,
        heads: slice | None = None,
        convert: bool = False,
    ) -> ChunkShape:
        """What a chunk of this cache is, as ``heap.batched_store`` allocates it.

        Args:
            chunk_tokens: tokens of a chunk.
            fmt: its ``MemoryFormat``, or the name of one; None: KV_2LTD, or KV_MLA_FMT for caches
                without separate K and V, or with K and V of different size.
            layers: of these layers only.
            heads: of these heads only.
            convert: with elements of float8_e4m3fn and their scales.

        Raises:
            ValueError: ``chunk_tokens`` is not positive, the cache has no such layers or heads, the
                format is none for tokens or cannot hold this cache's KV, a chunk of pages would not
                be whole blocks, or the KV cannot be converted.
            TypeError: an argument has a wrong type.

        >>> tensors = [torch.zeros(2, 8, 16, 4, 64, dtype=torch.float16) for _ in range(3)]
        >>> chunk = PagedKVCache.of("vllm-flash-nhd", tensors).chunk_layout(32)
        >>> chunk.shape, chunk.fmt, chunk.size_bytes, chunk.num_chunks(100)
        ((2, 3, 32, 256), 'KV_2LTD', 98304, 4)
        """
        return chunk_shape(self, chunk_tokens, fmt, layers, heads, convert)

    @property
    def num_layers(self) -> int:
        """Layers L."""
        return len(self.base_addresses)

    @property
    def num_planes(self) -> int:
        """Planes: 2 for K and V, 1 for latent attention, more if their parts are apart."""
        return len(self.planes)

    @property
    def num_slots(self) -> int:
        """Slots of a layer: ``num_blocks * block_size``."""
        return self.num_blocks * self.block_size

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers, planes and heads."""
        return self.num_layers * self.num_heads * sum(plane.row_bytes for plane in self.planes)

    @property
    def plane_strides(self) -> Int64Array:
        """Bytes from the first plane of each layer to the others, int64 ``[L, planes - 1]``."""
        return self.base_addresses[:, 1:] - self.base_addresses[:, :1]

    @cached_property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides all addresses and strides."""
        values = [combined_bits(self.base_addresses)]
        for plane in self.planes:
            values.append(plane.row_bytes)
            values += [plane.block_stride] if self.num_blocks > 1 else []
            values += [plane.slot_stride] if self.block_size > 1 else []
            values += [plane.head_stride] if self.num_heads > 1 else []
        return alignment_of(*values)

    @property
    def is_key_value(self) -> bool:
        """Whether the planes are K and V, or the parts of K and then those of V."""
        return self.layout.is_key_value

    @property
    def chunk_planes(self) -> int:
        """Planes of a chunk of this cache: 2 if K and V have equally many bytes, else 1."""
        half = len(self.planes) // 2
        sides = [
            sum(p.row_bytes for p in side) for side in (self.planes[:half], self.planes[half:])
        ]
        return 2 if self.is_key_value and sides[0] == sides[1] else 1

    def error_word(self) -> torch.Tensor:
        """The word in which kernels report the lowest token out of range, int64 ``[1]``.

        See :mod:`kvheap.kernels.paged_places`.
        """
        found: torch.Tensor | None = self.kept.get("error")
        if found is None:
            found = resident(np.array([NO_REPORT], np.int64), self.device)
            self.kept["error"] = found
        return found

    def synchronize(self) -> None:
        """Wait for the current stream; raise if a slot was out of range since the last call.

        Only slots and block ids that were on a device are reported here; those on the host are
        refused at once.

        Raises:
            ValueError: a slot or block id was out of range. The message names the first such token
                of a copy, and its slot or block. It was skipped; the other tokens were copied.
        """
        error: torch.Tensor | None = self.kept.get("error")
        with Relaxed():
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            report = NO_REPORT if error is None else int(error.item())
        if error is None or report == NO_REPORT:
            return
        error.fill_(NO_REPORT)
        token, place = read_report(report)
        raise ValueError(
            f"token {token} of a copy had slot or block {place}: the cache has "
            f"{self.num_blocks} blocks of {self.block_size}"
        )

    def __repr__(self) -> str:
        """The engine layout, layers, blocks, heads, dtype, device and bytes."""
        planes = "" if self.num_planes == 1 else f" in {self.num_planes} planes"
        return (
            f"PagedKVCache({self.layout.name}: {self.num_layers} layers, {self.num_blocks} blocks "
            f"of {self.block_size} slots, {self.num_heads} heads of {self.head_dim}{planes}, "
            f"{self.dtype} on {self.device}, {self.num_slots * self.token_bytes} bytes)"
        )

    def addresses_like(self, other: PagedKVCache) -> bool:
        """Whether both caches have every byte of every token at the same address."""
        same = (self.planes, self.num_blocks, self.block_size, self.num_heads, self.dtype)
        others = (other.planes, other.num_blocks, other.block_size, other.num_heads, other.dtype)
        return same == others and np.array_equal(self.base_addresses, other.base_addresses)
