"""Paged KV caches: where an engine keeps the KV of each token, whatever its layout.

A :class:`PagedKVCache` is read off the engine's own tensors: a base address for each layer and
plane, and physical strides in bytes. Shapes alone are never enough: engines pad blocks, and hand
out permuted views.

``L`` layers, ``B`` blocks, ``N`` slots of a block (its tokens), ``H`` KV heads, ``C`` elements of
one head. A *plane* is what one token keeps apart from the rest: K and V; for latent attention
there is one, for the sparse-attention indexer there are values and scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.launch import alignment_of

__all__ = ["LAYOUTS", "KVLayout", "LayoutError", "PagedKVCache", "Plane"]

Int64Array = npt.NDArray[np.int64]

EngineTensors: TypeAlias = (
    "torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]] "
    "| Mapping[str, torch.Tensor]"
)
"""What an engine registers: one tensor, one for each layer, or lists of K and V."""

SCALE_BYTES = 4
"""The indexer keeps one float32 scale a token (vLLM's ``indexer_k_quant_and_cache``)."""

INDEXER_BYTES = 132
"""128 fp8 values and their scale."""

MAX_SLOTS = 1 << 31
"""Slots are divided as 32-bit integers by the kernel."""


NO_ERROR = (1 << 63) - 1
"""The error word while no slot was out of range."""


class LayoutError(ValueError):
    """Tensors that are not what a layout consists of."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How an engine arranges its KV cache.

    Attributes:
        name: what users call it.
        nesting: lists around the tensors: ``""`` for one tensor, ``"L"`` one a layer, ``"LP"`` a
            (K, V) pair a layer, ``"PL"`` a list of K and a list of V.
        dims: a letter for each dimension of a tensor: L, B, N, H and C as above, P for K and V,
            S for all slots (B x N), F for K then V of one head, I for values and scales of an
            indexer, X for any number of dimensions that are not looked into.
        order: physical order of the dimensions, outermost first; "" where any will do.
        tensors: the same in words.
    """

    name: str
    nesting: str
    dims: str
    tensors: str
    order: str = ""

    @property
    def num_planes(self) -> int:
        """2 where K and V (or values and scales) are apart, else 1."""
        return 2 if set("PFI") & set(self.nesting + self.dims) else 1


def _fused(order: str) -> KVLayout:
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
"""By name. ``vllm-<order>`` are the physical orders of vLLM's standard logical shape (vLLM
#42082); ``opaque`` blocks hold no tokens: one block counts as one slot."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One of the planes, the same in all layers; bytes.

    Attributes:
        row_bytes: contiguous bytes of one head of one token.
        block_stride: from a block to the next.
        slot_stride: from a token to the next in its block.
        head_stride: from a head to the next.
    """

    row_bytes: int
    block_stride: int
    slot_stride: int
    head_stride: int


@dataclass(frozen=True, eq=False)
class PagedKVCache:
    """The KV cache of an engine, as addresses and strides. Keeps its tensors alive.

    Made by :meth:`of` or :meth:`detect`.

    Attributes:
        layout: how it is arranged.
        planes: one or two planes.
        base_addresses: where block 0 of each layer and plane begins, int64 ``[L, planes]``.
        num_blocks: blocks B.
        block_size: tokens of a block N.
        num_heads: KV heads H.
        head_dim: elements of one head in one plane.
        dtype: of the elements.
        device: where they are.

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
    kept: dict[object, Any] = field(default_factory=dict, repr=False)
    """What copies work out once for this cache."""

    # -- make one ------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, layout: str | KVLayout, tensors: EngineTensors, *, block_size: int | None = None
    ) -> PagedKVCache:
        """The cache that ``tensors`` are, by the name of their layout.

        Args:
            layout: one of :data:`LAYOUTS`.
            tensors: the engine's, as the layout says; a dict of one tensor a layer will do for
                lists. Each with any strides that keep its elements apart and heads contiguous.
            block_size: tokens of a block, for layouts that only know slots; 1 if not given. For
                the others it is looked up, and only compared.

        Raises:
            LayoutError: a tensor has another rank, device, dtype or size than the layout or the
                first layer says, or strides that do not fit; the message names its layer.
            TypeError: something else than a tensor is among them.
        """
        if isinstance(layout, str):
            if layout not in LAYOUTS:
                raise LayoutError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
            layout = LAYOUTS[layout]
        layout, flat = _flatten(layout, tensors)
        dims = [_Dims.of(layout, tensor, label) for label, tensor in flat]
        for (label, tensor), found in zip(flat[1:], dims[1:], strict=True):
            _require_alike(layout, label, tensor, flat[0][1], found, dims[0])
        if layout.order:
            for (label, _), found in zip(flat, dims, strict=True):
                found.require_order(layout, label)
        first = flat[0][1]
        geometry = _Geometry.of(layout, dims[0], first.element_size(), block_size)
        tensors_by_layer = [tensor for _, tensor in flat]
        num_slots = geometry.num_blocks * geometry.block_size
        if num_slots >= MAX_SLOTS:
            raise LayoutError(f"{layout.name} has {num_slots} slots; fewer than 2**31 are needed")
        return cls(
            layout,
            geometry.planes,
            _base_addresses(layout, tensors_by_layer, dims[0], geometry),
            geometry.num_blocks,
            geometry.block_size,
            geometry.num_heads,
            geometry.head_dim,
            first.dtype,
            first.device,
            tuple(tensors_by_layer),
        )

    @classmethod
    def detect(
        cls, tensors: EngineTensors, *, num_kv_heads: int, head_dim: int, block_size: int
    ) -> PagedKVCache:
        """The cache that ``tensors`` are, found by their shapes and strides.

        Args:
            tensors: as for :meth:`of`.
            num_kv_heads: KV heads H; 1 for latent attention.
            head_dim: elements of one head; for latent attention, of a token.
            block_size: tokens of a block.

        Raises:
            LayoutError: no layout fits, or two fit that put a token at different addresses.
                ``opaque`` is never guessed.
        """
        found: dict[str, PagedKVCache] = {}
        refused: list[str] = []
        for name in LAYOUTS:
            if name == "opaque":
                continue
            try:
                cache = cls.of(name, tensors, block_size=block_size)
            except (LayoutError, TypeError) as error:
                refused.append(f"{name}: {error}")
                continue
            expected_dim = INDEXER_BYTES if name == "indexer" else head_dim
            seen = (cache.num_heads, cache.head_dim, cache.block_size)
            if seen == (num_kv_heads, expected_dim, block_size):
                found[name] = cache
            else:
                refused.append(f"{name}: H, C, N would be {seen}")
        if not found:
            raise LayoutError(
                f"no layout fits H, C, N = {(num_kv_heads, head_dim, block_size)}: "
                + "; ".join(refused)
            )
        first = next(iter(found.values()))
        if any(not first.addresses_like(other) for other in found.values()):
            raise LayoutError(f"several layouts fit, name one: {', '.join(found)}")
        return first

    # -- look ----------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Layers L."""
        return len(self.base_addresses)

    @property
    def num_planes(self) -> int:
        """Planes: 2 for K and V, 1 for latent attention."""
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
        """From the first plane of each layer to the others, bytes, int64 ``[L, planes - 1]``."""
        return self.base_addresses[:, 1:] - self.base_addresses[:, :1]

    @cached_property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides all addresses and strides."""
        bits = [int(np.bitwise_or.reduce(self.base_addresses, axis=None))]
        for plane in self.planes:
            bits.append(plane.row_bytes)
            bits += [plane.block_stride] if self.num_blocks > 1 else []
            bits += [plane.slot_stride] if self.block_size > 1 else []
            bits += [plane.head_stride] if self.num_heads > 1 else []
        return alignment_of(*bits)

    @property
    def is_key_value(self) -> bool:
        """Whether the planes are K and V."""
        return self.num_planes == 2 and "I" not in self.layout.dims

    def error_word(self) -> torch.Tensor:
        """Where kernels note the lowest token whose slot is out of range, int64 ``[1]``."""
        found: torch.Tensor | None = self.kept.get("error")
        if found is None:
            # Complete when it returns, so that any stream may use it.
            found = torch.tensor([NO_ERROR], dtype=torch.int64).to(self.device)
            self.kept["error"] = found
        return found

    def synchronize(self) -> None:
        """Wait for the current stream; refuse slots out of range since the last call.

        Slots on the host are refused at once; only those that were on a device end here.

        Raises:
            ValueError: names the first such token of a copy, and its slot. It was skipped, and
                all others were copied.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        error: torch.Tensor | None = self.kept.get("error")
        report = NO_ERROR if error is None else int(error.item())
        if error is None or report == NO_ERROR:
            return
        error.fill_(NO_ERROR)
        token, low = divmod(report, 1 << 32)
        raise ValueError(
            f"token {token} of a copy had slot or block {low - MAX_SLOTS}: the cache has "
            f"{self.num_blocks} blocks of {self.block_size}"
        )

    def addresses_like(self, other: PagedKVCache) -> bool:
        """Whether both put every byte of every token at the same address."""
        same = (self.planes, self.num_blocks, self.block_size, self.num_heads, self.dtype)
        others = (other.planes, other.num_blocks, other.block_size, other.num_heads, other.dtype)
        return same == others and np.array_equal(self.base_addresses, other.base_addresses)


def _flatten(layout: KVLayout, tensors: Any) -> tuple[KVLayout, list[tuple[str, torch.Tensor]]]:
    """The tensors in a row, layers outermost, each with what to call it."""
    if isinstance(tensors, Mapping):
        tensors = list(tensors.values())
    nesting = layout.nesting
    if nesting == "" and layout.order and not isinstance(tensors, torch.Tensor):
        # One tensor a layer of a layout whose layers may also be one tensor.
        nesting = "L"
        layout = KVLayout(
            layout.name, "L", layout.dims[1:], layout.tensors, layout.order.replace("L", "")
        )
    if nesting == "":
        if not isinstance(tensors, torch.Tensor):
            raise LayoutError(f"{layout.name} is one tensor {layout.tensors}, got {_kind(tensors)}")
        return layout, [("the tensor", tensors)]
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Sequence):
        raise LayoutError(f"{layout.name} is {layout.tensors}, got {_kind(tensors)}")
    if nesting == "PL":
        if len(tensors) != 2 or any(isinstance(part, torch.Tensor) for part in tensors):
            raise LayoutError(f"{layout.name} is a list of K and a list of V, got {_kind(tensors)}")
        keys, values = tensors
        if len(keys) != len(values):
            raise LayoutError(f"{layout.name}: {len(keys)} layers of K, {len(values)} of V")
        tensors = list(zip(keys, values, strict=True))
    if not len(tensors):
        raise LayoutError(f"{layout.name} needs at least one layer")
    flat: list[tuple[str, torch.Tensor]] = []
    for layer, entry in enumerate(tensors):
        if nesting == "L":
            flat.append((f"layer {layer}", entry))
            continue
        if isinstance(entry, torch.Tensor) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise LayoutError(
                f"layer {layer} of {layout.name} must be a pair (K, V), got {_kind(entry)}"
            )
        flat += [(f"layer {layer}, {name}", entry[i]) for i, name in enumerate("KV")]
    return layout, flat


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Sequence):
        return f"{len(value)} of {type(value[0]).__name__ if len(value) else 'nothing'}"
    return repr(value)


@dataclass(frozen=True, slots=True)
class _Dims:
    """Sizes, and strides in bytes, of one tensor's dimensions by letter."""

    sizes: dict[str, int]
    strides: dict[str, int]

    @classmethod
    def of(cls, layout: KVLayout, tensor: Any, label: str) -> _Dims:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{label} of {layout.name} must be a tensor, got {_kind(tensor)}")
        if tensor.device.type not in ("cpu", "cuda"):
            raise LayoutError(f"{label} is on {tensor.device}: a CPU or CUDA device is needed")
        dims = layout.dims
        rank_fits = tensor.dim() >= 2 if "X" in dims else tensor.dim() == len(dims)
        if not rank_fits:
            raise LayoutError(
                f"{label} of {layout.name} must be {layout.tensors}, got shape "
                f"{tuple(tensor.shape)}"
            )
        item_bytes = tensor.element_size()
        sizes = dict(zip(dims, tensor.shape, strict=False))
        strides = {d: s * item_bytes for d, s in zip(dims, tensor.stride(), strict=False)}
        if "X" in dims:
            if tensor.numel() and not tensor[0].is_contiguous():
                raise LayoutError(
                    f"{label}: each block must be contiguous, got strides {tensor.stride()}"
                )
            sizes["X"], strides["X"] = math.prod(tensor.shape[1:]), item_bytes
        found = cls(sizes, strides)
        found._require_sizes(layout, label, tensor)
        found._require_strides(layout, label, tensor)
        return found

    def _require_sizes(self, layout: KVLayout, label: str, tensor: torch.Tensor) -> None:
        shape = tuple(tensor.shape)
        if 0 in shape:
            raise LayoutError(f"{label} of {layout.name} is empty: shape {shape}")
        if self.sizes.get("P", 2) != 2:
            raise LayoutError(
                f"{label} of {layout.name} must be {layout.tensors}: a dimension of 2 for K and V, "
                f"got shape {shape}"
            )
        if self.sizes.get("F", 2) % 2:
            raise LayoutError(
                f"{label} of {layout.name} must hold K then V in its last dimension, got shape "
                f"{shape}"
            )
        if "I" in self.sizes and (tensor.element_size() != 1 or self.sizes["I"] <= SCALE_BYTES):
            raise LayoutError(
                f"{label} of {layout.name} must be bytes [B, N, values + {SCALE_BYTES}], got "
                f"{tensor.dtype} of shape {shape}"
            )
        if layout.name == "sglang-mla" and self.sizes["H"] != 1:
            raise LayoutError(f"{label} of {layout.name} must have one head, got shape {shape}")

    def _require_strides(self, layout: KVLayout, label: str, tensor: torch.Tensor) -> None:
        """Elements of a head must be neighbours, and no two elements share a byte."""
        last = layout.dims[-1]
        if self.sizes[last] > 1 and self.strides[last] != tensor.element_size():
            raise LayoutError(
                f"{label} of {layout.name}: the last dimension must be contiguous, got strides "
                f"{tensor.stride()}"
            )
        if "I" in self.sizes and self.sizes["N"] > 1 and self.strides["N"] != self.sizes["I"]:
            raise LayoutError(
                f"{label} of {layout.name}: each block must be contiguous, got strides "
                f"{tensor.stride()}"
            )
        end = tensor.element_size()
        for stride, dim in sorted((self.strides[d], d) for d in self.sizes if self.sizes[d] > 1):
            if stride < end:
                raise LayoutError(
                    f"{label} of {layout.name}: elements overlap, or a stride is not positive: "
                    f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
                )
            end += stride * (self.sizes[dim] - 1)

    def require_order(self, layout: KVLayout, label: str) -> None:
        order = [dim for dim in layout.order if self.sizes[dim] > 1]
        strides = [self.strides[dim] for dim in order]
        if strides != sorted(strides, reverse=True):
            raise LayoutError(
                f"{label} of {layout.name} must be laid out in the order {' '.join(order)}, "
                f"outermost first, but those strides are {strides} bytes"
            )


def _require_alike(
    layout: KVLayout,
    label: str,
    tensor: torch.Tensor,
    first_tensor: torch.Tensor,
    found: _Dims,
    first: _Dims,
) -> None:
    for what in ("device", "dtype", "shape"):
        here, there = getattr(tensor, what), getattr(first_tensor, what)
        if here != there:
            raise LayoutError(
                f"{label} of {layout.name} has {what} {_plain(here)}, the first tensor "
                f"{_plain(there)}"
            )
    for dim, size in found.sizes.items():
        if size > 1 and found.strides[dim] != first.strides[dim]:
            raise LayoutError(
                f"{label} of {layout.name} has strides {tensor.stride()}, the first tensor "
                f"{first_tensor.stride()}"
            )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What the sizes and strides of one tensor say of the cache."""

    planes: tuple[Plane, ...]
    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int

    @classmethod
    def of(
        cls, layout: KVLayout, dims: _Dims, item_bytes: int, block_size: int | None
    ) -> _Geometry:
        sizes, strides = dims.sizes, dims.strides
        if "S" in sizes:
            slots_per_block = 1 if block_size is None else block_size
            if slots_per_block <= 0 or sizes["S"] % slots_per_block:
                raise LayoutError(
                    f"{layout.name}: {sizes['S']} slots are not whole blocks of {slots_per_block}"
                )
            num_blocks, slot_stride = sizes["S"] // slots_per_block, strides["S"]
            block_stride = slots_per_block * slot_stride
        else:
            slots_per_block = sizes.get("N", 1)
            if block_size is not None and "N" in sizes and block_size != slots_per_block:
                raise LayoutError(
                    f"{layout.name}: blocks have {slots_per_block} slots, not {block_size}"
                )
            num_blocks, block_stride = sizes["B"], strides["B"]
            slot_stride = strides["N"] if slots_per_block > 1 else block_stride
        if "I" in sizes:
            values = sizes["I"] - SCALE_BYTES
            planes = tuple(
                Plane(row_bytes, block_stride, row_bytes, row_bytes)
                for row_bytes in (values, SCALE_BYTES)
            )
            return cls(planes, num_blocks, slots_per_block, 1, sizes["I"])
        head_dim = sizes["F"] // 2 if "F" in sizes else sizes.get("C", sizes.get("X", 0))
        row_bytes = head_dim * item_bytes
        num_heads = sizes.get("H", 1)
        head_stride = strides["H"] if num_heads > 1 else row_bytes
        plane = Plane(row_bytes, block_stride, slot_stride, head_stride)
        return cls((plane,) * layout.num_planes, num_blocks, slots_per_block, num_heads, head_dim)


def _base_addresses(
    layout: KVLayout, tensors: list[torch.Tensor], dims: _Dims, geometry: _Geometry
) -> Int64Array:
    """Address of block 0 of each layer and plane, int64 ``[L, planes]``."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    if "P" in layout.nesting:
        return starts.reshape(-1, 2)
    if "L" in dims.sizes:
        starts = starts + np.arange(dims.sizes["L"], dtype=np.int64) * dims.strides["L"]
    plane_offsets = np.array(list(_plane_offsets(dims, geometry)), np.int64)
    return starts[:, None] + plane_offsets[None, :]


def _plane_offsets(dims: _Dims, geometry: _Geometry) -> Iterator[int]:
    yield 0
    if "P" in dims.sizes:
        yield dims.strides["P"]
    elif "F" in dims.sizes:
        yield geometry.planes[0].row_bytes
    elif "I" in dims.sizes:
        yield geometry.block_size * geometry.planes[0].row_bytes
