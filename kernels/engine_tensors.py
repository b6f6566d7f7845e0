"""Reads the geometry of an engine's KV cache from its tensors: addresses, strides and sizes.

It uses the tensors' physical strides, in bytes. Shapes alone are not enough, because engines pad
blocks and use permuted views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from kvheap.kernels.arguments import require_memory
from kvheap.kernels.arrays import INT32_END, Int64Array
from kvheap.kernels.engine_layouts import KVLayout, LayoutError, OtherTensorsError
from kvheap.kernels.engine_planes import Blocks, Plane, TensorPlanes, planes_of
from kvheap.kernels.tensor_dims import TensorDims, kind_of
from kvheap.kernels.tensor_overlap import Extent, require_disjoint_tensors, steps_of
from kvheap.kernels.tensor_views import TensorFacts, checked_facts, tensor_view
from kvheap.kernels.words import as_bytes

__all__ = ["CacheGeometry", "EngineTensors", "read_tensors"]

EngineTensors: TypeAlias = (
    "torch.Tensor | Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]] "
    "| Mapping[str, torch.Tensor]"
)
"""The tensors that an engine registers: one tensor, one for each layer, or lists of K and V."""


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
    dtype: torch.dtype


def read_tensors(layout: KVLayout, tensors: EngineTensors, facts: TensorFacts) -> CacheGeometry:
    """The geometry of the cache that an engine keeps in ``tensors``.

    Args:
        layout: the engine layout of the tensors.
        tensors: one tensor or lists of tensors, as the engine layout says; a dict of one tensor for
            each layer counts as a list.
        facts: what their shapes do not say. ``block_size`` is 1 if not given, for engine layouts
            that only have slots; for the others, it is the block size that the tensors must have.

    Raises:
        LayoutError: a tensor has another rank, device, dtype or size than the engine layout or the
            first layer requires, or strides that do not fit; the message names its layer; or two
            share bytes, and are not one tensor of two layers.
        TypeError: one of ``tensors`` is not a tensor.
    """
    layout, layers = _flatten(layout, tensors)
    labelled = [part for parts in layers for part in parts]
    numbers = [(layer, part) for layer, parts in enumerate(layers) for part in range(len(parts))]
    for label, tensor in labelled:
        _require_tensor(layout, label, tensor)
    facts = checked_facts(layout, facts, labelled[0][1])
    views = [[tensor_view(layout, *part, facts) for part in parts] for parts in layers]
    if layout.content == "blocks":
        layers, views = _group_blocks(layers, views)
    dims = [
        [TensorDims.of(layout, view, label) for view, (label, _) in zip(*pair, strict=True)]
        for pair in zip(views, layers, strict=True)
    ]
    _require_alike(layout, layers, views, dims)
    if len(labelled) > 1:
        alike = [steps_of(of_part) for of_part in dims[0]] * len(dims)  # the same in all layers
        extents = [
            Extent(label, *number, tensor.data_ptr(), *steps)
            for (label, tensor), number, steps in zip(labelled, numbers, alike, strict=True)
        ]
        require_disjoint_tensors(layout, extents)
    if layout.order:
        for (label, _), found in zip(labelled, (d for parts in dims for d in parts), strict=True):
            found.require_order(layout, label)
    blocks = [Blocks.of(layout, part, facts.block_size) for part in dims[0]]
    num_slots = blocks[0].count * blocks[0].size
    if num_slots >= INT32_END:
        raise LayoutError(f"{layout.name} has {num_slots} slots; fewer than 2**31 are needed")
    parts = [
        planes_of(layout, part, of_part, label, facts.v_head_dim, facts.widths)
        for part, of_part, (label, _) in zip(dims[0], blocks, layers[0], strict=True)
    ]
    value_dim = parts[-1].head_dim
    if layout.content == "key-value" and facts.v_head_dim not in (None, value_dim):
        raise LayoutError(
            f"V of {layout.name} has heads of {value_dim} elements, not v_head_dim="
            f"{facts.v_head_dim}"
        )
    dtypes = {tensor.dtype for _, tensor in labelled}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
    return CacheGeometry(
        layout,
        tuple(tensor for _, tensor in labelled),
        tuple(plane for part in parts for plane in part.planes),
        _base_addresses(layers, dims[0], parts),
        blocks[0].count,
        blocks[0].size,
        parts[0].num_heads,
        _head_dim(layout, parts, dtype),
        dtype,
    )


def _head_dim(layout: KVLayout, parts: list[TensorPlanes], dtype: torch.dtype) -> int:
    """Elements of a head: of K if there is K and V, else of all planes together."""
    if layout.is_key_value or len(parts) == 1:
        return parts[0].head_dim
    return sum(plane.row_bytes for part in parts for plane in part.planes) // dtype.itemsize


# -- lists of tensors ------------------------------------------------------------------------------

Labelled: TypeAlias = "tuple[str, torch.Tensor]"


def _flatten(layout: KVLayout, tensors: Any) -> tuple[KVLayout, list[list[Labelled]]]:
    """The tensors of each layer, each with a label for error messages.

    Returns the engine layout too, adapted if the layers of a one-tensor layout came as a list.
    """
    if isinstance(tensors, Mapping):
        tensors = list(tensors.values())
    nesting, name = layout.nesting, layout.name
    if layout.content == "blocks" and isinstance(tensors, torch.Tensor) and tensors.dim() == 5:
        tensors = list(tensors)  # [L, B, H, N, C]
    if nesting == "" and layout.dims[0] == "L" and not isinstance(tensors, torch.Tensor):
        # One tensor for each layer, of an engine layout that may also be one tensor.
        nesting = "L"
        layout = replace(
            layout, nesting="L", dims=layout.dims[1:], order=layout.order.replace("L", "")
        )
    if nesting == "":
        if not isinstance(tensors, torch.Tensor):
            raise OtherTensorsError(
                f"{name} is one tensor {layout.tensors}, got {kind_of(tensors)}"
            )
        return layout, [[("the tensor", tensors)]]
    if isinstance(tensors, torch.Tensor | str) or not isinstance(tensors, Sequence):
        raise OtherTensorsError(f"{name} is {layout.tensors}, got {kind_of(tensors)}")
    if nesting == "PL":
        are_lists = all(
            isinstance(part, Sequence) and not isinstance(part, str) for part in tensors
        )
        if len(tensors) != 2 or not are_lists:
            raise OtherTensorsError(
                f"{name} is a list of K and a list of V, got {kind_of(tensors)}"
            )
        keys, values = tensors
        if len(keys) != len(values):
            raise OtherTensorsError(f"{name}: {len(keys)} layers of K, {len(values)} of V")
        tensors = list(zip(keys, values, strict=True))
    if not len(tensors):
        raise OtherTensorsError(f"{name} needs at least one layer")
    return layout, [_parts(layout, layer, entry) for layer, entry in enumerate(tensors)]


def _parts(layout: KVLayout, layer: int, entry: Any) -> list[Labelled]:
    """The tensors of one layer."""
    is_several = isinstance(entry, Sequence) and not isinstance(entry, str)
    if "P" not in layout.nesting:
        if layout.content != "blocks" or not is_several:
            return [(f"layer {layer}", entry)]
    elif layout.content != "parts" and (not is_several or len(entry) != 2):
        raise OtherTensorsError(
            f"layer {layer} of {layout.name} must be a pair (K, V), got {kind_of(entry)}"
        )
    elif layout.content != "parts":
        return [(f"layer {layer}, {name}", entry[i]) for i, name in enumerate("KV")]
    if not is_several or not len(entry):
        raise OtherTensorsError(
            f"layer {layer} of {layout.name} must be one or more tensors, got {kind_of(entry)}"
        )
    return [(f"layer {layer}, part {i}", part) for i, part in enumerate(entry)]


def _require_tensor(layout: KVLayout, label: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        message = f"{label} of {layout.name} must be a tensor, got {kind_of(tensor)}"
        raise OtherTensorsError(message) if isinstance(tensor, Sequence) else TypeError(message)
    if tensor.device.type not in ("cpu", "cuda"):
        raise LayoutError(f"{label} is on {tensor.device}: a CPU or CUDA device is needed")
    if 0 in tensor.shape:
        raise LayoutError(
            f"{label} of {layout.name} is empty: shape {tuple(tensor.shape)}; leave out layers "
            f"that keep nothing"
        )
    require_memory(f"{label} of {layout.name}", tensor)
    if layout.name == "vllm-cpu" and tensor.device.type != "cpu":
        raise LayoutError(
            f"{label} of vllm-cpu is on {tensor.device}: only vLLM on a CPU keeps K rows then V "
            f"rows, use vllm-lbhnc"
        )


# -- all tensors together --------------------------------------------------------------------------


def _group_blocks(
    layers: list[list[Labelled]], views: list[list[torch.Tensor]]
) -> tuple[list[list[Labelled]], list[list[torch.Tensor]]]:
    """Whole blocks by layer; as parts of a single layer, if the layers' blocks are not alike."""
    dtypes = {view.dtype for parts in views for view in parts}
    if len(dtypes) > 1:
        views = [[as_bytes(view) for view in parts] for parts in views]
    kinds = {tuple((v.shape[1], v.stride(0), v.dtype) for v in parts) for parts in views}
    if len(kinds) == 1:
        return layers, views
    return [[part for parts in layers for part in parts]], [[v for parts in views for v in parts]]


def _require_alike(
    layout: KVLayout,
    layers: list[list[Labelled]],
    views: list[list[torch.Tensor]],
    dims: list[list[TensorDims]],
) -> None:
    """Check each layer against the first one, and the parts of the first one against each other."""
    first_label, first_tensor = layers[0][0]
    free = {"C", "X"} if len(layers[0]) > 1 else set()
    for part, (label, tensor) in enumerate(layers[0]):
        if tensor.device != first_tensor.device:
            raise LayoutError(
                f"{label} of {layout.name} has device {tensor.device}, the first tensor "
                f"{first_tensor.device}"
            )
        if layout.is_key_value and tensor.dtype != first_tensor.dtype:
            raise LayoutError(
                f"{label} of {layout.name} has dtype {tensor.dtype}, the first tensor "
                f"{first_tensor.dtype}"
            )
        here, there = dims[0][part].sizes, dims[0][0].sizes
        differing = [dim for dim in here if dim not in free and here[dim] != there[dim]]
        if differing:
            raise LayoutError(
                f"{label} of {layout.name} has shape {tuple(tensor.shape)}, {first_label} "
                f"{tuple(first_tensor.shape)}: they must have the same {', '.join(differing)}"
            )
    for layer, parts in enumerate(layers):
        if len(parts) != len(layers[0]):
            raise OtherTensorsError(
                f"layer {layer} of {layout.name} has {len(parts)} tensors, layer 0 {len(layers[0])}"
            )
        for part, (label, tensor) in enumerate(parts):
            _require_same(layout, label, tensor, layers[0][part][1])
            _require_same_strides(
                layout,
                label,
                (views[layer][part], dims[layer][part]),
                views[0][part],
                dims[0][part],
            )


def _require_same(layout: KVLayout, label: str, tensor: torch.Tensor, first: torch.Tensor) -> None:
    whats = ("device",) if layout.content == "blocks" else ("device", "dtype", "shape")
    for what in whats:
        here, there = getattr(tensor, what), getattr(first, what)
        if here != there:
            raise LayoutError(
                f"{label} of {layout.name} has {what} {_plain(here)}, the first tensor "
                f"{_plain(there)}"
            )


def _require_same_strides(
    layout: KVLayout,
    label: str,
    found: tuple[torch.Tensor, TensorDims],
    first: torch.Tensor,
    first_dims: TensorDims,
) -> None:
    tensor, dims = found
    for dim, size in dims.sizes.items():
        if size != first_dims.sizes[dim]:
            raise LayoutError(
                f"{label} of {layout.name} has shape {tuple(tensor.shape)}, the first tensor "
                f"{tuple(first.shape)}"
            )
        if size > 1 and dims.strides[dim] != first_dims.strides[dim]:
            raise LayoutError(
                f"{label} of {layout.name} has strides {tensor.stride()}, the first tensor "
                f"{first.stride()}"
            )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _base_addresses(
    layers: list[list[Labelled]], dims: list[TensorDims], parts: list[TensorPlanes]
) -> Int64Array:
    """Address of block 0 of each layer and plane, int64 ``[L, planes]``."""
    by_part = []
    for number, (part_dims, part) in enumerate(zip(dims, parts, strict=True)):
        starts = np.array([layer[number][1].data_ptr() for layer in layers], np.int64)
        if "L" in part_dims.sizes:
            layer_stride = part_dims.strides["L"]
            starts = starts + np.arange(part_dims.sizes["L"], dtype=np.int64) * layer_stride
        by_part.append(starts[:, None] + np.array(part.offsets, np.int64)[None, :])
    return np.concatenate(by_part, axis=1)
