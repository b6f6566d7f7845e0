"""``GPUMemoryAllocator``: a heap in one tensor on a device, with an aligned base address."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvheap.addresses.address_manager import AddressManager
from kvheap.addresses.arguments import require_flags
from kvheap.addresses.integers import as_integer
from kvheap.heaps.options import require_size
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.kernels.capture_mode import Relaxed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvheap.blocks.memory_allocator import HeapOptions

__all__ = ["GPUMemoryAllocator", "aligned_tensor"]


class GPUMemoryAllocator(TensorMemoryAllocator):
    """A heap in one tensor on a device.

    Args:
        size: bytes of the heap; rounded down to the alignment.
        device: the device to allocate on.
        align_bytes: a power of two; the heap address and the absolute address of every block are
            multiples of it.
        allow_cpu: without CUDA, use host memory instead of raising.
        options: see ``TensorMemoryAllocator``.

    Raises:
        ValueError: ``size`` is less than ``align_bytes`` or a page, or ``align_bytes`` is not a
            power of two.
        RuntimeError: CUDA is not available and ``allow_cpu`` is false, or memory does not suffice.

    >>> with GPUMemoryAllocator(1 << 20, allow_cpu=True) as heap:
    ...     obj = heap.allocate([16], torch.float16)
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cuda",
        align_bytes: int = AddressManager.ALIGN_BYTES,
        *,
        allow_cpu: bool = False,
        **options: Unpack[HeapOptions],
    ) -> None:
        require_flags(allow_cpu=allow_cpu)
        size = require_size(size, align_bytes, options.get("page_layout"))
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            if not allow_cpu:
                raise RuntimeError(
                    f"torch sees no CUDA, so {device} cannot hold a heap; with allow_cpu=True the "
                    f"heap is in host memory"
                )
            device = torch.device("cpu")
        super().__init__(aligned_tensor(size, device, align_bytes), align_bytes, **options)


def aligned_tensor(size: int, device: torch.device, align_bytes: int) -> torch.Tensor:
    """Uninitialised bytes, uint8 ``[size]``, whose address is a multiple of ``align_bytes``.

    Torch aligns to 512 bytes on a GPU and 64 on a CPU, so this allocates ``align_bytes`` more than
    asked for and skips as many bytes as needed at the front.
    """
    size, align_bytes = as_integer("size", size), as_integer("align_bytes", align_bytes)
    if size < 0 or align_bytes <= 0:
        raise ValueError(
            f"size must be non-negative and align_bytes positive, got {size} and {align_bytes}"
        )
    if size + align_bytes >= 1 << 63:
        raise ValueError(f"size and align_bytes are too large: {size} and {align_bytes}")
    with Relaxed():
        whole = torch.empty(size + align_bytes, dtype=torch.uint8, device=device)
    skipped = -whole.data_ptr() % align_bytes
    return whole[skipped : skipped + size]
