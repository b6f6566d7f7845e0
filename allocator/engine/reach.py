"""Host heaps that a device reads and writes across the link: every byte must be pinned.

A kernel that touches memory that is not registered with CUDA faults, and takes the context with it.
A heap that was pinned only in part has such bytes.
"""

from __future__ import annotations

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.heap import Heap
from kvheap.device import cuda
from kvheap.kernels.pieces import first_outside, is_covered

__all__ = ["reachable_buffer", "require_pinned"]


def reachable_buffer(
    heap: Heap, device: torch.device, addresses: Int64Array, size_bytes: int
) -> torch.Tensor:
    """A buffer of a host heap whose start a device can reach, after checking blocks of the heap.

    Args:
        heap: a heap in host memory.
        device: the device that copies.
        addresses: absolute address of each block, int64 ``[N]``.
        size_bytes: bytes of each block.

    Raises:
        ValueError: the device cannot reach all bytes of a block.
    """
    copy_device = cuda.find_device(device)
    assert copy_device is not None
    ranges, segments = heap.pinned_addresses(copy_device), heap.segments
    first = segments[0][1]
    start = first.data_ptr()
    if len(segments) == 1 and is_covered(start, start + len(first), ranges):
        return first
    require_pinned(ranges, addresses, size_bytes, device)
    if (
        not len(addresses)
        or first_outside(np.array([start]), np.array([start + 1]), ranges) is None
    ):
        return first
    # Triton asks CUDA for the pointer that it gets, so begin where the first block does.
    address = int(addresses[0])
    for _, buffer in segments:
        if buffer.data_ptr() <= address < buffer.data_ptr() + len(buffer):
            return buffer[address - buffer.data_ptr() :]
    return first


def require_pinned(
    ranges: Int64Array, addresses: Int64Array, size_bytes: int, device: torch.device
) -> None:
    """Raise if a block is not within pinned memory. One pass over the blocks.

    Args:
        ranges: the pinned ranges, ``[start, end)``, int64 ``[R, 2]``, ascending.
        addresses: absolute address of each block, int64 ``[N]``.
        size_bytes: bytes of each block.
        device: the device, for the message.

    Raises:
        ValueError: names the first such block.
    """
    at = first_outside(addresses, addresses + size_bytes, ranges)
    if at is not None:
        start = int(addresses[at])
        raise ValueError(
            f"block {at} at [{start:#x}, {start + size_bytes:#x}) is in host memory that is not "
            f"pinned: {device} cannot reach it"
        )
