"""Buffers of random bytes on a device and in pinned host memory."""

from __future__ import annotations

import torch


def random_bytes(num_bytes: int, device: torch.device | str) -> torch.Tensor:
    """A flat uint8 tensor; ``num_bytes`` is rounded down to a multiple of 8."""
    words = torch.empty(num_bytes // 8, dtype=torch.int64, device=device)
    return words.random_().view(torch.uint8)


def random_pinned_bytes(num_bytes: int) -> torch.Tensor:
    """The same in pinned host memory."""
    words = torch.empty(num_bytes // 8, dtype=torch.int64, pin_memory=True)
    return words.random_().view(torch.uint8)
