"""What makes no block: formats that are none, and shapes whose sizes would wrap."""

from __future__ import annotations

import pytest
import torch

from kvheap import BlockLayout, MemoryFormat, TensorMemoryAllocator

HUGE = [
    [7, 7905747460161236407],  # 64 bits of it are 1
    [1 << 32, 1 << 31],
    [1 << 63],
]


@pytest.mark.parametrize("shape", HUGE)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_a_shape_of_too_many_elements_is_refused(shape: list[int], dtype: torch.dtype) -> None:
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    with pytest.raises((ValueError, TypeError)):
        heap.allocate(shape, dtype)
    with pytest.raises((ValueError, TypeError)):
        heap.allocate([[4], shape], [dtype, dtype])
    assert heap.stats().allocated_bytes == 0


@pytest.mark.parametrize("fmt", [None, "KV_2LTD", 1])
def test_a_format_that_is_none_is_refused(fmt: object) -> None:
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    for allocate in (
        lambda: heap.allocate([4], torch.uint8, fmt),  # type: ignore[arg-type]
        lambda: heap.batched_allocate([[4], [5]], [torch.uint8] * 2, 3, fmt),  # type: ignore[arg-type]
        lambda: BlockLayout.of([4], torch.uint8, fmt),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=f"fmt must be a MemoryFormat, got {fmt!r}"):
            allocate()
    assert heap.stats().allocated_bytes == 0


def test_the_largest_block_that_is_one() -> None:
    layout = BlockLayout.of([(1 << 62) - 1], torch.uint8, MemoryFormat.UNDEFINED)
    assert layout.size_bytes == (1 << 62) - 1
