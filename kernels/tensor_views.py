"""Brings the tensors of a cache into the dimensions of their engine layout, without a copy.

Engines register the same bytes in several shapes: with and without a dimension of one head, blocks
of tokens or blocks of bytes. Each becomes a view with one letter for each dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from kvheap.kernels.arguments import as_whole
from kvheap.kernels.engine_layouts import (
    INDEXER_BYTES,
    SCALE_BYTES,
    SPLIT_RECORDS,
    KVLayout,
    LayoutError,
    OtherTensorsError,
)

__all__ = ["TensorFacts", "checked_facts", "tensor_view"]

ALWAYS_SPLIT = (INDEXER_BYTES, 584)
"""Rows of bytes of these sizes are taken to have their scales apart; see ``SPLIT_RECORDS``."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What the shapes of tensors do not say, if the caller knows it.

    Attributes:
        block_size: slots of a block.
        v_head_dim: elements of a head of V; None if rows of K and V have equal halves.
        widths: bytes of a token's values and of its scales, where a block keeps them apart.
    """

    block_size: int | None = None
    v_head_dim: int | None = None
    widths: tuple[int, int] | None = None


def checked_facts(layout: KVLayout, facts: TensorFacts, first: torch.Tensor) -> TensorFacts:
    """The facts about tensors of an engine layout, with those that its name says.

    Args:
        layout: the engine layout.
        facts: what the caller knows.
        first: the first tensor.

    Raises:
        LayoutError: the engine layout needs another fact, or has no use for one.
        TypeError: a fact is not an integer.
    """
    facts = _whole_numbers(facts)
    is_split = layout.content == "values-scales"
    if facts.widths is not None and layout.name != "values-scales":
        raise LayoutError(f"widths are for values-scales, not for {layout.name}")
    has_sizes = layout.is_key_value and layout.content != "nvfp4"
    if facts.v_head_dim is not None and not has_sizes:
        raise LayoutError(f"v_head_dim is for layouts with heads of V, not for {layout.name}")
    if not is_split:
        return facts
    if layout.name == "values-scales":
        if facts.widths is None or min(facts.widths) <= 0:
            raise LayoutError(f"{_NEEDS_WIDTHS}; got {facts.widths}")
        _require_widths(facts.widths)
        return facts
    row = INDEXER_BYTES
    if first.dim() > 2:
        row = first.shape[-1]
    elif first.dim() == 2 and facts.block_size is not None:
        row = _indexer_row(layout, first.shape[-1], facts.block_size)
    if not SCALE_BYTES < row <= INDEXER_BYTES:
        raise LayoutError(
            f"layer 0 of {layout.name} must be bytes [B, N, values + {SCALE_BYTES}], up to 128 "
            f"values and one scale for a token, got shape {tuple(first.shape)}: for other rows, "
            f"use values-scales and its widths"
        )
    return replace(facts, widths=(row - SCALE_BYTES, SCALE_BYTES))


_NEEDS_WIDTHS = (
    "values-scales needs widths=(values, scales), the bytes that each has for a token, such as "
    "(576, 8) for DeepSeek-V4"
)


def _require_widths(widths: tuple[int, int]) -> None:
    """Refuse widths that no engine's records have, as far as that is known.

    The widths of the records of :data:`SPLIT_RECORDS` are known, and scales have fewer bytes than
    what they scale. For rows of any other sum, nothing tells one pair of such widths from another.

    Raises:
        LayoutError: says what is wrong with them.
    """
    values, scales = widths
    row = values + scales
    known = SPLIT_RECORDS.get(row, widths)
    if widths != known:
        raise LayoutError(
            f"widths={widths}: rows of {row} bytes have values of {known[0]} bytes, then scales of "
            f"{known[1]}; for rows of another kind, use opaque"
        )
    if values <= scales:
        raise LayoutError(
            f"widths={widths}: the values come first, and have more bytes than their scales"
        )


def _whole_numbers(facts: TensorFacts) -> TensorFacts:
    """The facts with their numbers as ``int``.

    Raises:
        LayoutError: the widths are not two.
        TypeError: a number is not an integer.
    """
    block_size, v_head_dim, widths = facts.block_size, facts.v_head_dim, facts.widths
    if widths is not None and (not isinstance(widths, (tuple, list)) or len(widths) != 2):
        raise LayoutError(f"{_NEEDS_WIDTHS}; got {widths!r}")
    return TensorFacts(
        None if block_size is None else as_whole("block_size", block_size),
        None if v_head_dim is None else as_whole("v_head_dim", v_head_dim),
        None
        if widths is None
        else (as_whole("widths[0]", widths[0]), as_whole("widths[1]", widths[1])),
    )


def _indexer_row(layout: KVLayout, page_bytes: int, block_size: int) -> int:
    """Bytes of a token in pages ``[B, bytes]`` of the indexer, which have no padding.

    Raises:
        LayoutError: so many slots would not have rows of a known size.
    """
    for row, (_, scales) in SPLIT_RECORDS.items():
        if scales == SCALE_BYTES and page_bytes == block_size * row:
            return row
    raise LayoutError(
        f"layer 0 of {layout.name} has pages of {page_bytes} bytes, which are not blocks of "
        f"block_size={block_size} rows of 132 or 68 bytes: for other rows, or pages with padding, "
        f"use values-scales and its widths"
    )


def tensor_view(
    layout: KVLayout, label: str, tensor: torch.Tensor, facts: TensorFacts
) -> torch.Tensor:
    """A tensor with the dimensions of its engine layout, or as it is if it cannot have them.

    Raises:
        LayoutError: its rows or blocks are not what the engine layout says.
    """
    if layout.content == "blocks":
        return _dense_blocks(layout, tensor, label)
    if layout.content == "parts":
        return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor
    if layout.dims == "BNC":
        tensor = _without_heads(tensor)
        if layout.content == "values-scales":
            return _page_rows(layout, label, tensor, facts)
        tensor = _rows_of_pages(layout, label, tensor, facts.block_size)
    if layout.name == "sglang-rows" and tensor.dim() == 2:
        return tensor.unsqueeze(1)
    if layout.name in ("mla", "sglang-mla"):
        _require_whole_rows(layout, label, tensor)
    return tensor


def _without_heads(tensor: torch.Tensor) -> torch.Tensor:
    """``[B, 1, N, C]``, as vLLM registers it, or ``[B, N, 1, C]``, as ``[B, N, C]``."""
    if tensor.dim() == 4:
        for dim in (1, 2):
            if tensor.shape[dim] == 1:
                return tensor.squeeze(dim)
    return tensor


def _rows_of_pages(
    layout: KVLayout, label: str, tensor: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    """Blocks of bytes ``[B, N * C]``, as SGLang keeps DeepSeek-V4's, as ``[B, N, C]``."""
    if tensor.dim() != 2:
        return tensor
    if not block_size or block_size < 0 or tensor.shape[1] % block_size:
        raise OtherTensorsError(
            f"{label} of {layout.name} has blocks of {tensor.shape[1]} elements, which are not "
            f"whole rows for block_size={block_size}"
        )
    row, (block_stride, stride) = tensor.shape[1] // block_size, tensor.stride()
    return tensor.as_strided(
        (tensor.shape[0], block_size, row),
        (block_stride, row * stride, stride),
        tensor.storage_offset(),
    )


def _require_whole_rows(layout: KVLayout, label: str, tensor: torch.Tensor) -> None:
    """Refuse rows of the sizes of records that engines keep in two parts.

    vLLM's latents with a scale for each token have 576 + 8 = 584 bytes too, all in one row
    (``*_per_token_head``, vLLM 0.33.0): ``vllm-packed`` takes these.
    """
    row = tensor.shape[-1] if tensor.dim() else 0
    if tensor.element_size() > 1 or row not in ALWAYS_SPLIT:
        return
    name = "indexer" if row == INDEXER_BYTES else f"values-scales, widths={SPLIT_RECORDS[row]}"
    raise LayoutError(
        f"{label} of {layout.name} has rows of {row} bytes: blocks of them keep all values, then "
        f"all scales, use {name}; if each row has its own scales, use vllm-packed"
    )


def _page_rows(
    layout: KVLayout, label: str, tensor: torch.Tensor, facts: TensorFacts
) -> torch.Tensor:
    """Blocks of values and scales as bytes ``[B, N, values + scales]``.

    SGLang keeps a block as one row, which may end in padding.
    """
    assert facts.widths is not None
    row = sum(facts.widths)
    shape = tuple(tensor.shape)
    if tensor.element_size() != 1:
        raise LayoutError(
            f"{label} of {layout.name} must be bytes [B, N, values + {facts.widths[1]}], got "
            f"{tensor.dtype} of shape {shape}"
        )
    if tensor.dim() == 2:
        page_bytes = shape[1]
        slots = page_bytes // row if facts.block_size is None else facts.block_size
        is_exact = slots > 0 and page_bytes == slots * row
        if not is_exact and (facts.block_size is None or slots <= 0 or page_bytes < slots * row):
            raise LayoutError(
                f"{label} of {layout.name} has blocks of {page_bytes} bytes: with rows of {row}, "
                f"block_size={facts.block_size} does not fit; padded blocks need a block_size"
            )
        if page_bytes - slots * row >= row:
            raise LayoutError(
                f"{label} of {layout.name} has blocks of {page_bytes} bytes, which have room for "
                f"{page_bytes // row} rows of {row}: block_size={facts.block_size} does not fit; "
                f"if the rest is padding, slice it off"
            )
        if tensor.stride(1) != 1 and page_bytes > 1:
            raise LayoutError(
                f"{label} of {layout.name}: each block must be contiguous, got strides "
                f"{tensor.stride()}"
            )
        return tensor.as_strided(
            (shape[0], slots, row), (tensor.stride(0), row, 1), tensor.storage_offset()
        )
    if tensor.dim() == 3:
        if shape[2] != row:
            raise LayoutError(
                f"{label} of {layout.name} has rows of {shape[2]} bytes, not {row} = "
                f"{facts.widths[0]} + {facts.widths[1]}"
            )
        if not tensor[0].is_contiguous():
            raise LayoutError(
                f"{label} of {layout.name}: each block must be contiguous, got strides "
                f"{tensor.stride()}"
            )
    return tensor


def _dense_blocks(layout: KVLayout, tensor: torch.Tensor, label: str) -> torch.Tensor:
    """Whole blocks as a view ``[B, elements]`` in the order of memory, whatever their dimensions.

    Raises:
        OtherTensorsError: the tensor has no dimension besides that of blocks.
        LayoutError: a block is not one range of memory.
    """
    if tensor.dim() < 2:
        raise OtherTensorsError(
            f"{label} of {layout.name} must be {layout.tensors}, got shape {tuple(tensor.shape)}"
        )
    shape, strides = tensor.shape[1:], tensor.stride()[1:]
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride != expected:
            raise LayoutError(
                f"{label}: each block must be contiguous, got shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}"
            )
        expected *= size
    num_elements = math.prod(shape)
    return tensor.as_strided(
        (tensor.shape[0], num_elements), (tensor.stride(0), 1), tensor.storage_offset()
    )
