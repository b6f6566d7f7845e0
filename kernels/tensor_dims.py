"""Sizes and strides of one tensor of an engine's cache, by the letters of its engine layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvheap.kernels.engine_layouts import KVLayout, LayoutError, OtherTensorsError

__all__ = ["TensorDims", "kind_of"]


@dataclass(frozen=True, slots=True)
class TensorDims:
    """Sizes of one tensor's dimensions by letter, their strides and the item size in bytes."""

    sizes: dict[str, int]
    strides: dict[str, int]
    item_bytes: int

    @classmethod
    def of(cls, layout: KVLayout, tensor: torch.Tensor, label: str) -> TensorDims:
        """Read a tensor that has the dimensions of the engine layout.

        Raises:
            OtherTensorsError: it has another number of dimensions.
            LayoutError: its strides do not keep heads contiguous and elements apart.
        """
        if tensor.dim() != len(layout.dims):
            raise OtherTensorsError(
                f"{label} of {layout.name} must be {layout.tensors}, got shape "
                f"{tuple(tensor.shape)}"
            )
        item_bytes = tensor.element_size()
        sizes = dict(zip(layout.dims, tensor.shape, strict=True))
        strides = {d: s * item_bytes for d, s in zip(layout.dims, tensor.stride(), strict=True)}
        found = cls(sizes, strides, item_bytes)
        found._require_sizes(layout, label, tensor)
        found._require_strides(layout, label, tensor)
        return found

    def _require_sizes(self, layout: KVLayout, label: str, tensor: torch.Tensor) -> None:
        shape = tuple(tensor.shape)
        if self.sizes.get("P", 2) != 2:
            raise OtherTensorsError(
                f"{label} of {layout.name} must be {layout.tensors}: a dimension of 2 for K and V, "
                f"got shape {shape}"
            )
        if layout.name == "sglang-mla" and self.sizes["H"] != 1:
            raise LayoutError(f"{label} of {layout.name} must have one head, got shape {shape}")

    def _require_strides(self, layout: KVLayout, label: str, tensor: torch.Tensor) -> None:
        """The elements of a head must be adjacent, and no two elements may share a byte."""
        last = layout.dims[-1]
        if self.sizes[last] > 1 and self.strides[last] != self.item_bytes:
            raise LayoutError(
                f"{label} of {layout.name}: the last dimension must be contiguous, got strides "
                f"{tensor.stride()}"
            )
        end = self.item_bytes
        for stride, dim in sorted((self.strides[d], d) for d in self.sizes if self.sizes[d] > 1):
            if stride < end:
                raise LayoutError(
                    f"{label} of {layout.name}: elements overlap, or a stride is not positive: "
                    f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
                )
            end += stride * (self.sizes[dim] - 1)

    def require_order(self, layout: KVLayout, label: str) -> None:
        """Refuse dimensions that are not in memory in the order that the engine layout says.

        Raises:
            LayoutError: they are in another order.
        """
        order = [dim for dim in layout.order if self.sizes[dim] > 1]
        strides = [self.strides[dim] for dim in order]
        if strides != sorted(strides, reverse=True):
            raise LayoutError(
                f"{label} of {layout.name} must be laid out in the order {' '.join(order)}, "
                f"outermost first, but those strides are {strides} bytes"
            )

    def is_dense(self, dims: str) -> bool:
        """Whether the bytes of ``dims``, outermost first, are one range in that order."""
        expected = self.item_bytes
        for dim in reversed(dims):
            if self.sizes[dim] > 1 and self.strides[dim] != expected:
                return False
            expected *= self.sizes[dim]
        return True


def kind_of(value: object) -> str:
    """What a caller gave in place of a tensor or a list of tensors, without its numbers."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        first: Any = value[0] if len(value) else None
        return f"{len(value)} of {type(first).__name__ if len(value) else 'nothing'}"
    return repr(value)
