"""What makes no block: formats that are none, and shapes whose sizes would wrap."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from kvheap import BlockLayout, MemoryFormat, PagedKVCache, TensorMemoryAllocator

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


@pytest.mark.parametrize(
    "shape",
    [
        [True, 3],
        (2, True),
        [[True]],
        [torch.tensor(True), 3],
        [np.True_, 3],
        [2.0, 3],
        [1, 2.0],
        [float("nan")],
        ["2"],
        [None],
        "23",
        b"23",
        bytearray(b"23"),
        memoryview(b"23"),
        {2, 3},
        {2: 3},
        2,
        None,
        torch.Size,
    ],
)
def test_what_is_no_shape_is_refused_and_shown(shape: Any) -> None:
    BlockLayout.of([1, 3], torch.int16, MemoryFormat.KV_2LTD)  # equal to True, 3 for a cache
    for dtypes in (torch.int16, [torch.int16]):
        with pytest.raises(TypeError, match="shape must be a sequence of integers, got ") as caught:
            BlockLayout.of(shape, dtypes, MemoryFormat.KV_2LTD)
        is_nested = type(shape) is list and isinstance(shape[0], (list, str))
        shown = shape[0] if is_nested else shape
        assert str(caught.value).endswith(f"got {shown!r}")


@pytest.mark.parametrize("huge", [1 << 63, 1 << 70, -(1 << 70)])
def test_an_extent_beyond_int64_is_shown(huge: int) -> None:
    for shape in ([huge], [2, 1, huge, 16], torch.Size([2, huge])):
        for dtypes in (torch.int16, [torch.int16]):
            with pytest.raises(ValueError, match=rf"2\*\*63.*{huge}|at least one .*{huge}"):
                BlockLayout.of(shape, dtypes, MemoryFormat.KV_2LTD)
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    cache = PagedKVCache.of("vllm-flash-nhd", [torch.zeros(2, 4, 16, 2, 8)])
    if huge > 0:
        with pytest.raises(ValueError, match=str(huge)):
            heap.batched_store(cache, range(4), huge)


@pytest.mark.parametrize(
    "shape",
    [
        [np.int64(6), np.uint8(1), 5],
        np.array([6, 1, 5]),
        torch.tensor([6, 1, 5]),
        [torch.tensor(6), 1, 5],
        torch.Size((np.int64(6), 1, 5)),
        range(6, 8),
    ],
)
def test_extents_are_plain_integers_whatever_they_came_as(shape: Any) -> None:
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    obj = heap.allocate(shape, torch.int16)
    assert obj is not None
    assert [type(extent) for extent in obj.shape] == [int] * len(obj.shape)
    assert list(obj.shape) == [int(extent) for extent in shape]
    json.dumps(obj.metadata.to_dict())
    heap.free(obj)


@pytest.mark.parametrize(
    ("block", "group", "error", "message"),
    [
        (None, 0, TypeError, "block must be a torch.Tensor, got None"),
        (torch.zeros(8), 0, ValueError, r"block must be uint8 \[14\], got torch.float32 \(8,\)"),
        (torch.zeros(4, dtype=torch.uint8), 0, ValueError, r"uint8 \[14\], got .* \(4,\)"),
        (torch.zeros(14, dtype=torch.uint8), 2, ValueError, "group must be between 0 and 1, got 2"),
        (torch.zeros(14, dtype=torch.uint8), -1, ValueError, "group must be .* got -1"),
        (torch.zeros(14, dtype=torch.uint8), "0", TypeError, "group must be an integer, got '0'"),
    ],
)
def test_a_view_of_what_is_no_block(
    block: Any, group: Any, error: type[Exception], message: str
) -> None:
    layout = BlockLayout.of([(2, 2), (3,)], ["float16", "int16"], "UNDEFINED")
    with pytest.raises(error, match=message):
        layout.view(block, group)
    assert layout.view(torch.zeros(14, dtype=torch.uint8), 1).shape == (3,)


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
