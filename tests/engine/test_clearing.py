"""The slots behind the last token of a load, which an option zeroes, in every engine layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_paths import ON_ALL_PATHS, running
from paged_reference import SPECS, Engine
from paged_worlds import SMALL, cache_of

import kvheap
from kvheap import BlockIds, PagedKVCache, TensorMemoryAllocator


def all_rows(engine: Engine) -> dict[tuple[int, int, int, int], torch.Tensor]:
    """A copy of the bytes of each head of each slot, by layer, plane, slot and head."""
    sizes = engine.sizes
    return {
        (layer, plane, slot, head): engine.row(layer, plane, slot, head).clone()
        for layer in range(sizes.num_layers)
        for plane in range(engine.num_planes)
        for slot in range(engine.num_slots)
        for head in range(sizes.num_heads)
    }


def heap_on(device: Any) -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8, device=device))


@ON_ALL_PATHS
@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("as_blocks", [True, False], ids=["blocks", "slots"])
def test_exactly_the_rest_of_the_last_block_is_zeroed(
    layout: str, as_blocks: bool, path: str
) -> None:
    with running(path) as device:
        engine = Engine(layout, SMALL, device=device)
        cache = cache_of(engine)
        size = cache.block_size
        heap = heap_on(device)
        blocks = [2, 0]
        num_tokens = size + 1
        slots: Any = [*range(2 * size, 3 * size), 0]
        if as_blocks:
            slots = BlockIds(blocks, num_tokens)
        batch = heap.batched_store(cache, slots, 2 * size)
        assert batch is not None
        before = all_rows(engine)
        kvheap.load(batch, cache, slots)
        assert all(torch.equal(row, before[key]) for key, row in all_rows(engine).items())
        kvheap.load(batch, cache, slots, clear_rest=True)
        for key, row in all_rows(engine).items():
            is_behind = 0 < key[2] < size
            assert torch.equal(row, torch.zeros_like(row) if is_behind else before[key]), key


@ON_ALL_PATHS
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_as_they_come(path: str, on_device: bool, dtype: torch.dtype) -> None:
    with running(path) as device:
        tensors = [torch.full((2, 8, 4, 2, 8), 5.0, device=device) for _ in range(3)]
        cache = PagedKVCache.of("vllm-flash-nhd", tensors)
        heap = heap_on(device)
        batch = heap.batched_store(cache, range(6), 8)
        assert batch is not None
        for tensor in tensors:
            tensor.fill_(float("nan"))
        place: Any = device if on_device else "cpu"
        for given, behind in (
            (torch.tensor([7, 6, 5, 9, 8, 12]), [13, 14, 15]),
            (torch.tensor([7, 6, 5, 21, 22, 20]), []),  # 21 and 22 are loaded, 23 is cleared
            (torch.tensor([0, 1, 2, 28, 29, -1]), [30, 31]),
            (torch.tensor([-1] * 6), []),
        ):
            kvheap.load(batch, cache, given.to(dtype).to(place), clear_rest=True)
            flat = torch.stack([tensor.view(2, 32, 16) for tensor in tensors])
            assert (flat[:, :, behind] == 0).all()
            assert (flat[:, :, [slot for slot in given.tolist() if slot >= 0]] == 5).all()
        assert (flat[:, :, 23] == 0).all()
        untouched = [3, 4, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27]
        assert flat[:, :, untouched].isnan().all()


@ON_ALL_PATHS
@pytest.mark.parametrize("on_device", [False, True])
def test_block_ids_as_they_come(path: str, on_device: bool) -> None:
    with running(path) as device:
        tensors = [torch.ones((2, 8, 4, 2, 8), device=device) for _ in range(3)]
        cache = PagedKVCache.of("vllm-flash-nhd", tensors)
        heap = heap_on(device)
        batch = heap.batched_store(cache, BlockIds([0, 1], 6), 8)
        assert batch is not None
        for ids, num_tokens, behind in (
            ([3, 5], 6, [22, 23]),
            ([3, 5], 5, [21, 22, 23]),
            ([3, -1], 6, []),
            ([-1, 2], 6, [10, 11]),
        ):
            for tensor in tensors:
                tensor.fill_(float("nan"))
            given = torch.tensor(ids, device=device if on_device else "cpu")
            kvheap.load(batch, cache, BlockIds(given, num_tokens), clear_rest=True)
            flat = torch.stack([tensor.view(2, 32, 16) for tensor in tensors])
            assert (flat == 0).all(dim=3).sum() == 3 * 2 * len(behind)
            assert (flat[:, :, behind] == 0).all()


@ON_ALL_PATHS
def test_only_the_layers_and_heads_that_are_loaded(path: str) -> None:
    with running(path) as device:
        tensors = [torch.ones((2, 4, 4, 4, 8), device=device) for _ in range(3)]
        cache = PagedKVCache.of("vllm-flash-nhd", tensors)
        heap = heap_on(device)
        batch = heap.batched_store(cache, range(5), 8)
        assert batch is not None
        kvheap.load(
            batch, cache, range(8, 13), layers=range(1, 3), heads=slice(1, 3), clear_rest=True
        )
        cleared = torch.stack([tensor.view(2, 16, 4, 8) == 0 for tensor in tensors])
        assert cleared[1:, :, 13:, 1:3].all()
        assert cleared.sum() == 2 * 2 * 3 * 2 * 8


def test_a_rank_clears_its_own_heads() -> None:
    wide = PagedKVCache.of("vllm-flash-nhd", [torch.ones(2, 4, 4, 4, 8)])
    tensor = torch.ones(2, 4, 4, 2, 8)
    narrow = PagedKVCache.of("vllm-flash-nhd", [tensor])
    heap = heap_on("cpu")
    batch = heap.batched_store(wide, range(5), 8)
    assert batch is not None
    kvheap.load(batch, narrow, range(8, 13), heads=slice(2, 4), clear_rest=True)
    cleared = tensor.view(2, 16, 2, 8) == 0
    assert cleared[:, 13:].all()
    assert cleared.sum() == 2 * 3 * 2 * 8


@pytest.mark.parametrize("convert", [False, True])
def test_no_nan_of_a_former_owner_is_left(convert: bool) -> None:
    """In the last block of the engine, with a converted load too."""
    tensors = [torch.rand(2, 8, 16, 2, 32).bfloat16()]
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    heap = heap_on("cpu")
    batch = heap.batched_store(cache, BlockIds([0, 1, 2], 40), 16, convert=convert)
    assert batch is not None
    tensors[0][:, 5] = float("nan")
    heap.batched_load(batch, cache, BlockIds([3, 4, 5], 40), convert=convert, clear_rest=True)
    assert not tensors[0].isnan().any()
    assert (tensors[0][:, 5, 8:] == 0).all()


def test_nothing_is_cleared_for_a_load_that_is_refused() -> None:
    tensors = [torch.ones(2, 8, 4, 2, 8)]
    cache = PagedKVCache.of("vllm-flash-nhd", tensors)
    heap = heap_on("cpu")
    batch = heap.batched_store(cache, range(5), 8)
    assert batch is not None
    for slots in (range(6), [0, 1, 2, 3, 3], range(28, 33)):
        with pytest.raises(ValueError, match=r"token 5|appears twice|slots"):
            kvheap.load(batch, cache, slots, clear_rest=True)
    assert (tensors[0] == 1).all()
