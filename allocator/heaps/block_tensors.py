"""Checks of the tensors that blocks are filled from and gathered into."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.rows import Rows

__all__ = ["require_gatherable", "require_matching"]


def require_matching(
    name: str,
    tensor: torch.Tensor,
    num_blocks: int,
    layout: BlockLayout,
    device: torch.device,
    cpu_is_fine: bool,
) -> None:
    """Raise if a tensor is not ``num_blocks`` contiguous blocks of a block layout.

    Args:
        name: name of the argument, for messages.
        tensor: the tensor to check.
        num_blocks: number of blocks N.
        layout: what each block holds.
        device: the device that the tensor must be on.
        cpu_is_fine: whether host memory is accepted as well.

    Raises:
        TypeError: it is not a tensor.
        ValueError: its shape, dtype, device or strides are wrong.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {tensor!r}")
    shape, dtype = layout.packed
    if tensor.shape != (num_blocks, *shape):
        raise ValueError(
            f"{name} must have shape {(num_blocks, *shape)}, got {tuple(tensor.shape)}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device and not (cpu_is_fine and tensor.device.type == "cpu"):
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if num_blocks and not tensor.is_contiguous() and not tensor[0].is_contiguous():
        raise ValueError(f"each block of {name} must be contiguous, got strides {tensor.stride()}")


def require_gatherable(parts: Sequence[Rows], out: torch.Tensor, device: torch.device) -> None:
    """Raise if the contents of blocks cannot be gathered into ``out``.

    Raises:
        TypeError: it is not a tensor.
        ValueError: the blocks have several block layouts, or ``out`` does not match them.
    """
    total = len(parts[0]) if len(parts) == 1 else sum(len(part) for part in parts)
    if not parts:
        if len(out):
            raise ValueError(f"out has {len(out)} rows, but there are no blocks")
        return
    layout = parts[0].batch.layout
    for part in parts[1:]:
        if part.batch.layout != layout:
            raise ValueError(
                f"out needs blocks of one layout, got {layout} and {part.batch.layout}"
            )
    require_matching("out", out, total, layout, device, cpu_is_fine=False)
    if total > 1 and out.stride(0) * out.element_size() < layout.size_bytes:
        raise ValueError(f"the rows of out overlap: strides {out.stride()}")
