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


@pytest.mark.parametrize("fmt", [None, b"KV_2LTD", 1])
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


@pytest.mark.parametrize("fmt", ["KV_2LTD", "MemoryFormat.KV_2LTD"])
@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16"])
def test_names_stand_for_dtypes_and_formats(dtype: str, fmt: str) -> None:
    expected = BlockLayout.of([2, 3], torch.bfloat16, MemoryFormat.KV_2LTD)
    assert BlockLayout.of([2, 3], dtype, fmt) == expected
    two = BlockLayout.of([[4], [5]], ["float32", dtype], fmt)
    assert two.dtypes == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "fmt", "message"),
    [
        ("bfloat", "KV_2LTD", "unknown dtype 'bfloat'"),
        ("", "KV_2LTD", "unknown dtype ''"),
        ("Tensor", "KV_2LTD", "unknown dtype 'Tensor'"),
        ("half", "KV_2LT", "unknown format 'KV_2LT'; known are .*KV_2LTD"),
        ("quint8", "KV_2LTD", "keeps its scales outside its bytes"),
    ],
)
def test_unknown_names_are_refused(dtype: str, fmt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLayout.of([2, 3], dtype, fmt)


def test_the_largest_block_that_is_one() -> None:
    layout = BlockLayout.of([(1 << 62) - 1], torch.uint8, MemoryFormat.UNDEFINED)
    assert layout.size_bytes == (1 << 62) - 1
