"""Reads the geometry of an engine's KV cache from its tensors: addresses, strides and sizes.

It uses the tensors' physical strides, in bytes. Shapes alone are not enough, because engines pad
blocks and use permuted views.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from kvheap.kernels.arrays import INT32_END, Int64Array
from kvheap.kernels.engine_layouts import SCALE_BYTES, KVLayout, LayoutError

__all__ = ["CacheGeometry", "EngineTensors", "Plane", "read_tensors"]

EngineTensors: TypeAlias = (
    "torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]] "
    "| Mapping[str, torch.Tensor]"
)
"""The tensors that an engine registers: one tensor, one for each layer, or lists of K and V."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Strides of one plane of a cache, in bytes. They are the same in all layers.

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


@dataclass(frozen=True, slots=True, eq=False)
class CacheGeometry:
    """Where the KV of a cache is, as read from its tensors.

    The attributes are documented under the same names in
    :class:`~kvheap.kernels.paged_layout.PagedKVCache`.
    """

    layout: KVLayout
    tensors: tuple[torch.Tensor, ...]
    planes: tuple[Plane, ...]
    base_addresses: Int64Array
    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int


def read_tensors(
    layout: KVLayout, tensors: EngineTensors, block_size: int | None = None
) -> CacheGeometry:
    """The geometry of the cache that an engine keeps in ``tensors``.

    Args:
        layout: the engine layout of the tensors.
        tensors: one tensor or lists of tensors, as the engine layout says; a dict of one tensor for
            each layer counts as a list.
        block_size: slots of a block, for engine layouts that only have slots; 1 if not given. For
            the others, the block size that the tensors must have.

    Raises:
        LayoutError: a tensor has another rank, device, dtype or size than the engine layout or the
            first layer requires, or strides that do not fit; the message names its layer.
        TypeError: one of ``tensors`` is not a tensor.
    """
    layout, labelled = _flatten(layout, tensors)
    dims = [_Dims.of(layout, tensor, label) for label, tensor in labelled]
    first_tensor = labelled[0][1]
    for (label, tensor), found in zip(labelled[1:], dims[1:], strict=True):
        _require_alike(layout, label, tensor, first_tensor, found, dims[0])
    if layout.order:
        for (label, _), found in zip(labelled, dims, strict=True):
            found.require_order(layout, label)
    blocks = _Blocks.of(layout, dims[0], block_size)
    num_slots = blocks.count * blocks.size
    if num_slots >= INT32_END:
        raise LayoutError(f"{layout.name} has {num_slots} slots; fewer than 2**31 are needed")
    planes, num_heads, head_dim = _planes(layout, dims[0], blocks, first_tensor.element_size())
    flat = tuple(tensor for _, tensor in labelled)
    base_addresses = _base_addresses(layout, flat, dims[0], planes[0], blocks.size)
    return CacheGeometry(
        layout, flat, planes, base_addresses, blocks.count, blocks.size, num_heads, head_dim
    )


def _flatten(layout: KVLayout, tensors: Any) -> tuple[KVLayout, list[tuple[str, torch.Tensor]]]:
    """The tensors in one list, layers outermost, each with a label for error messages.

    Returns the engine layout too, adapted if the layers of a one-tensor layout came as a list.
    """
    if isinstance(tensors, Mapping):
        tensors = list(tensors.values())
    nesting = layout.nesting
    if nesting == "" and layout.order and not isinstance(tensors, torch.Tensor):
        # One tensor for each layer, of an engine layout that may also be one tensor.
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
    """Sizes of one tensor's dimensions by letter, and their strides in bytes."""

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
        """The elements of a head must be adjacent, and no two elements may share a byte."""
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
class _Blocks:
    """The blocks of a layer; strides in bytes."""

    count: int
    size: int
    stride: int
    slot_stride: int

    @classmethod
    def of(cls, layout: KVLayout, dims: _Dims, block_size: int | None) -> _Blocks:
        sizes, strides = dims.sizes, dims.strides
        if "S" in sizes:
            slots = 1 if block_size is None else block_size
            if slots <= 0 or sizes["S"] % slots:
                raise LayoutError(
                    f"{layout.name}: {sizes['S']} slots are not whole blocks of {slots}"
                )
            return cls(sizes["S"] // slots, slots, slots * strides["S"], strides["S"])
        slots = sizes.get("N", 1)
        if block_size is not None and "N" in sizes and block_size != slots:
            raise LayoutError(f"{layout.name}: blocks have {slots} slots, not {block_size}")
        stride = strides["B"]
        return cls(sizes["B"], slots, stride, strides["N"] if slots > 1 else stride)


def _planes(
    layout: KVLayout, dims: _Dims, blocks: _Blocks, item_bytes: int
) -> tuple[tuple[Plane, ...], int, int]:
    """The planes, the number of heads of each, and the number of elements of a head."""
    sizes = dims.sizes
    if "I" in sizes:
        planes = tuple(
            Plane(row_bytes, blocks.stride, row_bytes, row_bytes)
            for row_bytes in (sizes["I"] - SCALE_BYTES, SCALE_BYTES)
        )
        return planes, 1, sizes["I"]
    head_dim = sizes["F"] // 2 if "F" in sizes else sizes.get("C", sizes.get("X", 0))
    row_bytes = head_dim * item_bytes
    num_heads = sizes.get("H", 1)
    head_stride = dims.strides["H"] if num_heads > 1 else row_bytes
    plane = Plane(row_bytes, blocks.stride, blocks.slot_stride, head_stride)
    return (plane,) * layout.num_planes, num_heads, head_dim


def _base_addresses(
    layout: KVLayout,
    tensors: Sequence[torch.Tensor],
    dims: _Dims,
    first_plane: Plane,
    block_size: int,
) -> Int64Array:
    """Address of block 0 of each layer and plane, int64 ``[L, planes]``."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    if "P" in layout.nesting:
        return starts.reshape(-1, 2)
    if "L" in dims.sizes:
        starts = starts + np.arange(dims.sizes["L"], dtype=np.int64) * dims.strides["L"]
    plane_offsets = np.array(list(_plane_offsets(dims, first_plane, block_size)), np.int64)
    return starts[:, None] + plane_offsets[None, :]


def _plane_offsets(dims: _Dims, first_plane: Plane, block_size: int) -> Iterator[int]:
    """Bytes from the first plane of a layer to each plane, if one tensor holds them all."""
    yield 0
    if "P" in dims.sizes:
        yield dims.strides["P"]
    elif "F" in dims.sizes:
        yield first_plane.row_bytes
    elif "I" in dims.sizes:
        yield block_size * first_plane.row_bytes
