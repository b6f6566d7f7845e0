"""One heap of each kind, of 1 MiB."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvheap import (
    AdHocMemoryAllocator,
    BufferAllocator,
    GPUMemoryAllocator,
    HostMemoryAllocator,
    LazyMemoryAllocator,
    MemoryAllocatorInterface,
    MixedMemoryAllocator,
    PagedTensorMemoryAllocator,
    PinMemoryAllocator,
    TensorMemoryAllocator,
)

__all__ = ["MIB", "makers"]

MIB = 1 << 20


def makers(page_shape: Sequence[int]) -> dict[str, Callable[[], MemoryAllocatorInterface]]:
    """What makes each kind, by name; pages are of float32."""
    return {
        "tensor": lambda: TensorMemoryAllocator(torch.zeros(MIB, dtype=torch.uint8)),
        "gpu": lambda: GPUMemoryAllocator(MIB, allow_cpu=True),
        "host": lambda: HostMemoryAllocator(MIB),
        "pin": lambda: PinMemoryAllocator(MIB, allow_unpinned=True),
        "mixed": lambda: MixedMemoryAllocator(HostMemoryAllocator(MIB)),
        "lazy": lambda: LazyMemoryAllocator(MIB, 2 * MIB, pin="no"),
        "paged": lambda: PagedTensorMemoryAllocator(
            torch.zeros(MIB, dtype=torch.uint8), list(page_shape), torch.float32
        ),
        "ad hoc": AdHocMemoryAllocator,
        "buffer": BufferAllocator,
    }
