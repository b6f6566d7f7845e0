"""Checks of the tensors that blocks are filled from and gathered into."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvheap.addresses.extents import Extents, Int64Array, overlap_of
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.rows import Rows
from kvheap.kernels.arguments import require_memory, require_tensor, require_values
from kvheap.kernels.capture_mode import Relaxed

__all__ = [
    "new_tensor",
    "require_apart",
    "require_gatherable",
    "require_matching",
    "require_writable_from",
]


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
        ValueError: its shape, dtype, device or strides are wrong, or its bytes are not its values,
            or not there.
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
    require_values(name, tensor)
    require_memory(name, tensor)
    if num_blocks and not tensor.is_contiguous() and not tensor[0].is_contiguous():
        raise ValueError(f"each block of {name} must be contiguous, got strides {tensor.stride()}")


def require_gatherable(parts: Sequence[Rows], out: torch.Tensor, device: torch.device) -> None:
    """Raise if the contents of blocks cannot be gathered into ``out``.

    Raises:
        TypeError: it is not a tensor.
        ValueError: the blocks have several block layouts, or ``out`` does not match them.
    """
    layout = _only_layout("out", out, parts)
    if layout is None:
        return
    total = len(parts[0]) if len(parts) == 1 else sum(len(part) for part in parts)
    require_matching("out", out, total, layout, device, cpu_is_fine=False)
    are_rows_apart = total < 2 or out.is_contiguous()
    if not are_rows_apart and out.stride(0) * out.element_size() < layout.size_bytes:
        raise ValueError(f"the rows of out overlap: strides {out.stride()}")


def require_writable_from(
    parts: Sequence[Rows], source: torch.Tensor, device: torch.device
) -> None:
    """Raise if blocks cannot be filled from ``source``.

    Raises:
        TypeError: it is not a tensor.
        ValueError: the blocks have several block layouts, or ``source`` does not match them.
    """
    layout = _only_layout("source", source, parts)
    if layout is not None:
        total = sum(len(part) for part in parts)
        require_matching("source", source, total, layout, device, cpu_is_fine=True)


def require_apart(
    name: str,
    tensor: torch.Tensor,
    parts: Sequence[Rows],
    starts_of: Callable[[Rows], Int64Array],
) -> None:
    """Raise if a tensor that matches blocks shares memory with any of them. O(N log N).

    Args:
        name: name of the argument, for messages.
        tensor: a row for each block.
        parts: the blocks.
        starts_of: tells the absolute address of each block of a part, int64 ``[R]``.

    Raises:
        ValueError: names the first such row and its block.
    """
    if not len(tensor):
        return
    size = parts[0].batch.layout.size_bytes
    rows = np.arange(len(tensor), dtype=np.int64) * (tensor.stride(0) * tensor.element_size())
    rows += tensor.data_ptr()
    for part in parts:
        starts, firsts = np.unique(starts_of(part), return_index=True)
        found = overlap_of(
            Extents(starts, np.full_like(starts, size)), Extents(rows, rows * 0 + size)
        )
        if found is not None:
            at, row = int(firsts[found[0]]), found[1]
            block = part.batch.describe(at if part.rows is None else int(part.rows[at]))
            raise ValueError(
                f"{name} shares memory with {block}, in its row {row}: pass memory apart from the "
                f"blocks, such as {name}.clone()"
            )


def new_tensor(layout: BlockLayout, num_blocks: int, device: torch.device) -> torch.Tensor:
    """A new tensor for the contents of blocks: ``[N, *shape]``; of several groups, their bytes."""
    shape, dtype = layout.packed
    with Relaxed():
        return torch.empty((num_blocks, *shape), dtype=dtype, device=device)


def _only_layout(name: str, tensor: torch.Tensor, parts: Sequence[Rows]) -> BlockLayout | None:
    """The layout of blocks; None if there are none, and the tensor has no rows either.

    Raises:
        TypeError: the tensor is none.
        ValueError: there are several layouts, or rows for no blocks.
    """
    if not parts:
        require_tensor(name, tensor)
        if len(tensor):
            raise ValueError(f"{name} has {len(tensor)} rows, but there are no blocks")
        return None
    layout = parts[0].batch.layout
    for part in parts[1:]:
        if part.batch.layout != layout:
            raise ValueError(
                f"{name} needs blocks of one layout, got {layout} and {part.batch.layout}"
            )
    return layout
