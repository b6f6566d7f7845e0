"""Memory that is much larger than the machine's."""

from __future__ import annotations

import mmap

import torch

MAP_NORESERVE = 0x4000
"""Linux; Python names it from 3.13 on."""


def sparse_memory(size_bytes: int) -> torch.Tensor:
    """Zeros of which only the pages that are written become real."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size_bytes, flags=flags), dtype=torch.uint8)
