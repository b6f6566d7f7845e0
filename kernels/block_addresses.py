"""Addresses of equal blocks in one buffer: the types that callers may pass, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from kvheap.kernels.arguments import require_memory
from kvheap.kernels.arrays import INT64_END, Int64Array, int64_array

__all__ = ["Addresses", "host_addresses", "require_apart", "require_disjoint"]

Addresses: TypeAlias = "Int64Array | torch.Tensor | Sequence[int]"
"""Byte offsets in a buffer, one for each block: a host array, or an int64 tensor on its device."""


def host_addresses(
    name: str, addresses: Addresses, buffer_bytes: int, block_bytes: int
) -> Int64Array:
    """Addresses in host memory as int64 ``[N]``, after checking that each block is in the buffer.

    Raises:
        TypeError: the addresses are not integers, or are on a device.
        ValueError: they are not one-dimensional, or a block is not within the buffer.
    """
    if isinstance(addresses, torch.Tensor):
        if addresses.device.type != "cpu":
            raise TypeError(f"{name} must be on the host, got a tensor on {addresses.device}")
        require_memory(name, addresses)
        addresses = addresses.detach().numpy()
    array = int64_array(name, addresses)
    if not len(array):
        return array
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest + block_bytes > buffer_bytes:
        at = int(array.argmin() if lowest < 0 else array.argmax())
        raise ValueError(
            f"{name}[{at}] is {int(array[at])}: a block of {block_bytes} bytes there is not "
            f"within the buffer of {buffer_bytes} bytes"
        )
    return array


def require_disjoint(name: str, addresses: Int64Array, block_bytes: int) -> None:
    """Refuse blocks that overlap each other. O(N) for ascending addresses, else a sort.

    Raises:
        ValueError: two blocks overlap; the message names their positions in the list.
    """
    if len(addresses) < 2:
        return
    gaps = np.diff(addresses)
    if (gaps >= block_bytes).all():
        return
    if (np.diff(np.sort(addresses)) >= block_bytes).all():
        return
    order = np.argsort(addresses, kind="stable")
    at = int(np.argmax(np.diff(addresses[order]) < block_bytes))
    first, second = int(order[at]), int(order[at + 1])
    raise ValueError(
        f"{name} overlap: {name}[{first}] is {addresses[first]}, {name}[{second}] is "
        f"{addresses[second]}, and blocks have {block_bytes} bytes"
    )


def require_apart(sources: Int64Array, targets: Int64Array, block_bytes: int) -> None:
    """Refuse target blocks that overlap a source block. O(N log N).

    Raises:
        ValueError: a target block overlaps a source block; the message names both addresses.
    """
    if not len(sources) or not len(targets):
        return
    ordered = np.sort(sources)
    after = np.searchsorted(ordered, targets)
    next_source = np.append(ordered, INT64_END - 1)[after]
    previous_source = np.append(-(INT64_END // 2), ordered)[after]
    overlap = (next_source - targets < block_bytes) | (targets - previous_source < block_bytes)
    if overlap.any():
        at = int(np.argmax(overlap))
        near = next_source if next_source[at] - targets[at] < block_bytes else previous_source
        raise ValueError(
            f"the target block at {targets[at]} overlaps the source block at {near[at]} "
            f"({block_bytes} bytes each)"
        )
