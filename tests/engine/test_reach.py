"""Chunks of a host heap that a GPU reads: all their bytes must be pinned, not just the first."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from host_memory_probes import FakeRegistrar

import kvheap
from kvheap import PagedKVCache, PinMemoryAllocator, TensorMemoryAllocator
from kvheap.device import cuda
from kvheap.engine.reach import reachable_buffer

PIECE = 1 << 16
GPU = torch.device("cuda", 0)
CHUNK = [2, 1, 8, 256]  # 16 KiB of float32, four to a piece


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    found = FakeDevice()
    monkeypatch.setattr(cuda, "find_device", lambda named: found)
    return found


def partly_pinned(failing: int | None) -> PinMemoryAllocator:
    """A heap of four pieces, of which one could not be pinned."""
    return PinMemoryAllocator(
        4 * PIECE,
        allow_unpinned=True,
        registrar=FakeRegistrar(fail_register=failing),
        piece_bytes=PIECE,
    )


def absolute(heap: TensorMemoryAllocator, batch: Any) -> Any:
    return heap.absolute(batch.addresses)[0]


@pytest.mark.parametrize("failing", range(4))
def test_exactly_the_blocks_in_pinned_pieces_are_reached(device: FakeDevice, failing: int) -> None:
    heap = partly_pinned(failing)
    batch = heap.batched_allocate(CHUNK, torch.float32, 16)
    assert batch is not None
    for row, address in enumerate(absolute(heap, batch)):
        one = absolute(heap, batch)[row : row + 1]
        if row // 4 == failing:
            with pytest.raises(ValueError, match=f"block 0 at .{address:#x}, .* not pinned"):
                reachable_buffer(heap, GPU, one, batch.size_bytes)
            continue
        buffer = reachable_buffer(heap, GPU, one, batch.size_bytes)
        # What Triton asks CUDA about: the first byte of the buffer.
        ranges = heap.pinned_addresses(device)
        assert any(start <= buffer.data_ptr() < end for start, end in ranges.tolist())
    with pytest.raises(ValueError, match=f"block {4 * failing} at"):
        reachable_buffer(heap, GPU, absolute(heap, batch), batch.size_bytes)
    heap.batched_free(batch)


@pytest.mark.parametrize("is_store", [True, False])
def test_store_and_load_refuse_them_before_anything_moves(
    device: FakeDevice, is_store: bool
) -> None:
    heap = partly_pinned(2)
    tensor = torch.rand(2, 64, 8, 2, 128)
    cache = PagedKVCache.of("vllm-flash-nhd", [tensor])
    on_gpu = replace(cache, device=GPU)
    batch = heap.batched_allocate(CHUNK, torch.float32, 16)
    assert batch is not None
    kvheap.store(cache, range(128), batch)  # a cache on the host needs no pinning
    before = heap.buffer.clone()
    for objs in (batch, batch[7:10], [batch[8]]):
        move = partial(kvheap.store, on_gpu, range(8 * len(objs)), objs)
        if not is_store:
            move = partial(kvheap.load, objs, on_gpu, range(8 * len(objs)))
        with pytest.raises(ValueError, match="not pinned: cuda:0 cannot reach it"):
            move()
    assert torch.equal(heap.buffer, before)
    heap.batched_free(batch)
    with pytest.raises(ValueError, match="not pinned"):
        heap.batched_store(on_gpu, range(128), 8)
    assert heap.total_allocated_size == 0


@pytest.mark.parametrize("cut", [0, PIECE, PIECE + 4096])
def test_a_buffer_of_the_callers_own(device: FakeDevice, cut: int) -> None:
    """Pinned up to ``cut``, as by cudaHostRegister of a part of a tensor."""
    buffer = torch.zeros(2 * PIECE, dtype=torch.uint8)
    if cut:
        device.pin(buffer[:cut])
    heap = TensorMemoryAllocator(buffer)
    batch = heap.batched_allocate(CHUNK, torch.float32, 8)
    assert batch is not None
    reached = cut // batch.size_bytes
    where = absolute(heap, batch)
    if reached:
        reachable_buffer(heap, GPU, where[:reached], batch.size_bytes)
    with pytest.raises(ValueError, match=f"block {reached} at"):
        reachable_buffer(heap, GPU, where, batch.size_bytes)


def test_no_blocks_need_no_pinning(device: FakeDevice) -> None:
    heap = partly_pinned(0)
    batch = heap.batched_allocate(CHUNK, torch.float32, 0)
    assert batch is not None
    cache = PagedKVCache.of("vllm-flash-nhd", [torch.rand(2, 64, 8, 2, 128)])
    kvheap.load(batch, replace(cache, device=GPU), [])


def test_what_was_reached_once_is_not_asked_again(device: FakeDevice) -> None:
    first, second = (torch.zeros(PIECE, dtype=torch.uint8) for _ in range(2))
    heap = TensorMemoryAllocator(first)
    batch = heap.batched_allocate(CHUNK, torch.float32, 4)
    assert batch is not None
    with pytest.raises(ValueError, match="not pinned"):
        reachable_buffer(heap, GPU, absolute(heap, batch), batch.size_bytes)
    device.pin(first)  # later than the heap was made
    for _ in range(3):
        asked = device.counts["locate"]
        reachable_buffer(heap, GPU, absolute(heap, batch), batch.size_bytes)
    assert device.counts["locate"] == asked
    heap.add_buffer(second)
    more = heap.batched_allocate(CHUNK, torch.float32, 4)
    assert more is not None
    with pytest.raises(ValueError, match="block 0 at"):
        reachable_buffer(heap, GPU, absolute(heap, more), more.size_bytes)
    reachable_buffer(heap, GPU, absolute(heap, batch), batch.size_bytes)
