"""Where the planes of a cache are in one of its tensors: their first byte, rows and strides.

Each kind of content of :mod:`kvheap.kernels.engine_layouts` is a short function here. Copies see
only its result: a plane is a start, the bytes of a row, and the strides of blocks, slots and heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvheap.kernels.engine_layouts import NVFP4_ROWS, KVLayout, LayoutError
from kvheap.kernels.tensor_dims import TensorDims

__all__ = ["Blocks", "Plane", "TensorPlanes", "planes_of"]


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


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a layer; strides in bytes."""

    count: int
    size: int
    stride: int
    slot_stride: int

    @classmethod
    def of(cls, layout: KVLayout, dims: TensorDims, block_size: int | None) -> Blocks:
        """The blocks of a tensor; of ``block_size`` slots, if the tensor only has slots.

        Raises:
            LayoutError: the tensor's blocks have another size, or its slots are not whole blocks.
        """
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


@dataclass(frozen=True, slots=True)
class TensorPlanes:
    """The planes that one tensor holds of a layer.

    Attributes:
        planes: each plane.
        offsets: bytes from the tensor's address to block 0 of each plane.
        num_heads: heads of each plane.
        head_dim: elements of a head: of K, if the tensor holds K and V; else of all planes.
    """

    planes: tuple[Plane, ...]
    offsets: tuple[int, ...]
    num_heads: int
    head_dim: int


def planes_of(
    layout: KVLayout,
    dims: TensorDims,
    blocks: Blocks,
    label: str,
    v_head_dim: int | None = None,
    widths: tuple[int, int] | None = None,
) -> TensorPlanes:
    """The planes of a tensor.

    Args:
        layout: the engine layout of the tensor.
        dims: its sizes and strides.
        blocks: its blocks.
        label: what error messages call it.
        v_head_dim: elements of a head of V, where K and V share a row; None: half of the row.
        widths: bytes of a token's values and of its scales, where they are apart.

    Raises:
        LayoutError: the sizes do not fit the content.
    """
    if layout.content == "fused":
        return _fused(layout, dims, blocks, label, v_head_dim)
    if layout.content == "key-rows":
        return _key_rows(layout, dims, blocks, label, v_head_dim)
    if layout.content == "nvfp4":
        return _nvfp4(layout, dims, blocks, label)
    if layout.content == "values-scales":
        assert widths is not None
        return _values_scales(blocks, widths)
    return _rows(dims, blocks)


def _rows(dims: TensorDims, blocks: Blocks) -> TensorPlanes:
    """Rows of one plane, or of K and V in a dimension of their own."""
    head_dim = dims.sizes.get("C", dims.sizes.get("X", 0))
    row_bytes = head_dim * dims.item_bytes
    num_heads, head_stride = _heads(dims, row_bytes)
    plane = Plane(row_bytes, blocks.stride, blocks.slot_stride, head_stride)
    if "P" in dims.sizes:
        return TensorPlanes((plane, plane), (0, dims.strides["P"]), num_heads, head_dim)
    return TensorPlanes((plane,), (0,), num_heads, head_dim)


def _heads(dims: TensorDims, row_bytes: int) -> tuple[int, int]:
    num_heads = dims.sizes.get("H", 1)
    return num_heads, dims.strides["H"] if num_heads > 1 else row_bytes


def _fused(
    layout: KVLayout, dims: TensorDims, blocks: Blocks, label: str, v_head_dim: int | None
) -> TensorPlanes:
    """K then V in each row; of different sizes in vLLM's ``*_diffkv`` backends."""
    key_dim, value_dim = _halves(layout, dims, label, v_head_dim)
    row_bytes = dims.sizes["F"] * dims.item_bytes
    num_heads, head_stride = _heads(dims, row_bytes)
    key_bytes, value_bytes = key_dim * dims.item_bytes, value_dim * dims.item_bytes
    planes = tuple(
        Plane(width, blocks.stride, blocks.slot_stride, head_stride if num_heads > 1 else width)
        for width in (key_bytes, value_bytes)
    )
    return TensorPlanes(planes, (0, key_bytes), num_heads, key_dim)


def _halves(
    layout: KVLayout, dims: TensorDims, label: str, v_head_dim: int | None
) -> tuple[int, int]:
    """Elements of K and of V in a row that holds both."""
    row = dims.sizes["F"]
    if v_head_dim is None:
        if dims.item_bytes == 1 and row in NVFP4_ROWS and dims.sizes["H"] % 2 == 0:
            raise LayoutError(
                f"{label} of {layout.name} has rows of {row} bytes for {dims.sizes['H']} heads, "
                f"which is NVFP4 of head dim {NVFP4_ROWS[row]}: use vllm-nvfp4, or vllm-packed for "
                f"rows as they are; if they are K then V, say so by v_head_dim={row // 2}, or by "
                f"the kv_cache_dtype"
            )
        if row % 2:
            raise LayoutError(
                f"{label} of {layout.name} must hold K then V in its last dimension, got {row} "
                f"elements: if V differs from K in size, give v_head_dim; for rows of one plane, "
                f"use vllm-packed"
            )
        return row // 2, row // 2
    if not 0 < v_head_dim < row:
        raise LayoutError(
            f"{label} of {layout.name} has rows of {row} elements, which cannot end in V of "
            f"v_head_dim={v_head_dim}"
        )
    return row - v_head_dim, v_head_dim


def _key_rows(
    layout: KVLayout, dims: TensorDims, blocks: Blocks, label: str, v_head_dim: int | None
) -> TensorPlanes:
    """All K rows of a head and block, then all V rows (vLLM 0.33.0, ``cpu_attn.py``)."""
    if not dims.is_dense("NF"):
        raise LayoutError(
            f"{label} of {layout.name}: the slots of a head must be contiguous in each block, got "
            f"strides {dims.strides} bytes"
        )
    key_dim, value_dim = _halves(layout, dims, label, v_head_dim)
    if key_dim != value_dim:
        raise LayoutError(
            f"{label} of {layout.name}: K and V have the same size, got v_head_dim={v_head_dim} in "
            f"rows of {dims.sizes['F']}"
        )
    row_bytes = key_dim * dims.item_bytes
    side_bytes = blocks.size * row_bytes
    num_heads, head_stride = _heads(dims, 2 * side_bytes)
    plane = Plane(row_bytes, blocks.stride, row_bytes, head_stride)
    return TensorPlanes((plane, plane), (0, side_bytes), num_heads, key_dim)


def _nvfp4(layout: KVLayout, dims: TensorDims, blocks: Blocks, label: str) -> TensorPlanes:
    """K data, K scales, V data, V scales of each block.

    As vLLM 0.33.0 reads them: ``_nvfp4_kv_views`` (``flashinfer.py``), and
    ``nvfp4_split_data_scale`` (``utils/torch_utils.py``).
    """
    row, head_slots = dims.sizes["C"], dims.sizes["H"]
    if dims.item_bytes != 1 or row % 9 or head_slots % 2:
        raise LayoutError(
            f"{label} of {layout.name} must be {layout.tensors}, with rows of a multiple of 9 "
            f"bytes (8 of data, 1 of scales), got {head_slots} x {row} of {dims.item_bytes} bytes"
        )
    slots_first = not dims.is_dense("HNC")
    if slots_first and not dims.is_dense("NHC"):
        raise LayoutError(
            f"{label} of {layout.name}: blocks must be dense, got strides {dims.strides} bytes"
        )
    num_heads = head_slots // 2
    data_bytes, scale_bytes = row * 8 // 9, row // 9
    side_bytes = num_heads * blocks.size * row

    def plane(width: int) -> Plane:
        across = width * (num_heads if slots_first else blocks.size)
        slot, head = (across, width) if slots_first else (width, across)
        return Plane(width, blocks.stride, slot, head)

    data, scales = plane(data_bytes), plane(scale_bytes)
    scale_offset = num_heads * blocks.size * data_bytes
    offsets = (0, scale_offset, side_bytes, side_bytes + scale_offset)
    return TensorPlanes((data, scales, data, scales), offsets, num_heads, row)


def _values_scales(blocks: Blocks, widths: tuple[int, int]) -> TensorPlanes:
    """The values of all tokens of a block, then their scales; blocks may be padded."""
    values, scales = widths
    planes = tuple(Plane(width, blocks.stride, width, width) for width in widths)
    return TensorPlanes(planes, (0, blocks.size * values), 1, values + scales)
