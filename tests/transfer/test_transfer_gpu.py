"""Transfers on a real device: every path and direction, streams, captures and early frees."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

from kvheap import (
    GPUMemoryAllocator,
    MemoryFormat,
    PinMemoryAllocator,
    TensorMemoryAllocator,
    offload,
    restore,
)
from kvheap.transfer import CopyPlan, copy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATHS = ("kernel", "copy_engine", "staged")


def random_bytes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def pieces(seed: int, num_bytes: int, count: int, sizes: np.ndarray) -> np.ndarray:
    """Disjoint random places of ``sizes`` in a buffer of ``num_bytes``."""
    rng = np.random.default_rng(seed)
    slot = num_bytes // count
    assert sizes.max() <= slot
    places = rng.permutation(count) * slot + rng.integers(0, slot - sizes + 1)
    return places.astype(np.int64)


@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
@pytest.mark.parametrize("path", [None, "kernel", "copy_engine"])
@pytest.mark.parametrize("largest", [16, 1000, 4096, 40_000])
def test_pieces_of_any_size_arrive(direction, path, largest):
    count, num_bytes = 500, 32 << 20
    sizes = np.random.default_rng(largest).integers(1, largest + 1, count)
    source, target = random_bytes(num_bytes, 1), torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    source_places, target_places = (pieces(seed, num_bytes, count, sizes) for seed in (2, 3))
    expected = target.clone()
    for start, place, size in zip(source_places, target_places, sizes, strict=True):
        expected[place : place + size] = source[start : start + size]
    source = source.cuda() if direction[0] == "d" else source.pin_memory()
    target = target.cuda() if direction[2] == "d" else target.pin_memory()
    plan = CopyPlan.of_addresses(source, target, source_places, target_places, sizes)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    transfer = copy(plan, stream, path=path)
    transfer.result()
    assert transfer.direction == direction
    assert path is None or transfer.path == path
    assert torch.equal(target.cpu(), expected)


def heaps(num_bytes: int = 64 << 20) -> tuple[TensorMemoryAllocator, TensorMemoryAllocator]:
    near = GPUMemoryAllocator(num_bytes)
    far = PinMemoryAllocator(num_bytes, piece_bytes=16 << 20)
    return near, far


@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize("by_layer", [False, True])
def test_blocks_go_away_and_come_back(path, by_layer):
    near, far = heaps()
    shape = (2, 4, 16, 256)
    kv = torch.randn(512, *shape, device="cuda").bfloat16()
    batch = near.batched_allocate(shape, kv.dtype, 512, MemoryFormat.KV_2LTD, source=kv)
    scattered = batch[::2]  # no two of them are neighbours
    stream = torch.cuda.Stream()
    away = offload(scattered, far, stream, free=True, path=path, by_layer=by_layer)
    away.transfer.result()
    for row in (0, 100, 255):
        assert torch.equal(away[row].tensor, kv[2 * row].cpu())
    back = restore(away, near, stream, free=True, path=path, by_layer=by_layer)
    asyncio.run(back.transfer._ended())
    assert torch.equal(torch.stack([obj.tensor for obj in back]), kv[::2])
    assert far.stats().allocated_bytes == 0
    near.batched_free(back)
    near.batched_free(batch[1::2])
    torch.cuda.synchronize()
    assert near.stats().allocated_bytes == 0
    assert near.memcheck()
    assert far.memcheck()


def test_many_transfers_in_flight_with_frees_at_random():
    near, far = heaps(16 << 20)
    rng = random.Random(7)
    streams = [torch.cuda.Stream() for _ in range(4)]
    live: list[tuple[object, int]] = []
    for step in range(300):
        value = step % 251
        batch = near.batched_allocate([4096], torch.uint8, rng.randint(1, 32))
        if batch is None:
            batch, _ = live.pop(rng.randrange(len(live)))
            batch.allocator.batched_free(batch)
            continue
        source = torch.full((len(batch), 4096), value, dtype=torch.uint8, device="cuda")
        stream = rng.choice(streams)
        stream.wait_stream(torch.cuda.current_stream())
        copy((source, batch), stream, path=rng.choice(["kernel", "copy_engine"]))
        source.record_stream(stream)
        away = offload(batch, far, stream, free=True)
        if away is None:
            near.batched_free(batch)
        else:
            live.append((away, value))
        while len(live) > 60:
            old, old_value = live.pop(rng.randrange(len(live)))
            old.transfer.result()
            assert all((obj.tensor == old_value).all() for obj in old)
            far.batched_free(old)
    for batch, value in live:
        batch.transfer.result()
        assert all((obj.tensor == value).all() for obj in batch)
        far.batched_free(batch)
    torch.cuda.synchronize()
    assert near.stats().allocated_bytes == 0
    assert far.stats().allocated_bytes == 0
    assert near.memcheck()
    assert far.memcheck()


def test_a_prepared_plan_runs_in_a_graph():
    source, target = torch.zeros(1 << 20).cuda(), torch.zeros(1 << 20).pin_memory()
    places = np.arange(0, 4 << 20, 8192)
    plan = CopyPlan.of_addresses(source, target, places, places[::-1].copy(), 4096).prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        transfer = copy(plan)
    assert transfer.path == "kernel"
    with pytest.raises(RuntimeError, match="captured"):
        transfer.done()
    for value in (1.0, 2.0):
        source.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert target.reshape(-1, 1024)[0::2].eq(value).all()
        assert not target.reshape(-1, 1024)[1::2].any()


def test_what_cannot_be_captured_is_refused_and_the_capture_goes_on():
    source, target = torch.ones(1 << 20).cuda(), torch.zeros(1 << 20).pin_memory()
    places = np.arange(0, 4 << 20, 8192)
    plan = CopyPlan.of_addresses(source, target, places, places[::-1].copy(), 4096)
    other = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.add_(1)
        with pytest.raises(RuntimeError, match="prepare"):
            copy(plan)
    graph.replay()
    torch.cuda.synchronize()
    assert other.eq(1).all()
    assert not target.any()


def test_the_legacy_default_stream_is_refused_where_it_would_fall_back():
    source, target = torch.ones(1 << 20).cuda(), torch.zeros(1 << 20).pin_memory()
    places = np.arange(0, 4 << 20, 8192)
    plan = CopyPlan.of_addresses(source, target, places, places[::-1].copy(), 4096)
    if not plan.device.has_batch:
        pytest.skip("the driver has no cuMemcpyBatchAsync")
    with pytest.raises(ValueError, match="legacy default stream"):
        copy(plan, torch.cuda.default_stream(), path="copy_engine")
    transfer = copy(plan, torch.cuda.default_stream())
    transfer.result()
    assert transfer.path != "copy_engine"


def test_pageable_memory_is_refused_before_the_device_can_fault():
    source, target = torch.ones(1 << 20).cuda(), torch.zeros(1 << 20)
    with pytest.raises(ValueError, match="not pinned"):
        CopyPlan.of_addresses(source, target, [0], [0], 4096)
    torch.cuda.synchronize()


def test_a_bad_pointer_is_refused_before_the_device_can_fault():
    source, target = torch.ones(1 << 20).cuda(), torch.zeros(1 << 20).pin_memory()
    beyond = source.data_ptr() + (1 << 40)
    for sources in ([beyond], [source.data_ptr(), beyond]):
        targets = target.data_ptr() + np.arange(len(sources)) * 4096
        with pytest.raises(ValueError, match="not in memory"):
            CopyPlan.of_pointers(sources, targets, 4096, "cuda", "cpu")
    torch.cuda.synchronize()


def test_a_copy_to_the_host_reads_after_the_work_before_it():
    source = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    target = torch.zeros(64 << 20, dtype=torch.uint8).pin_memory()
    places = np.random.default_rng(0).permutation(4096) * 16384
    for path in ("kernel", "copy_engine", "staged"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        target.zero_()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            source.fill_(7)
        plan = CopyPlan.of_addresses(source, target, places, np.arange(4096) * 8192, 8192)
        copy(plan, stream, path=path).result()
        assert target[: 32 << 20].eq(7).all(), path
        source.zero_()
        torch.cuda.synchronize()


def test_a_captured_copy_of_few_runs_is_a_node_for_each():
    source, target = torch.ones(1 << 20).cuda(), torch.zeros(1 << 20).pin_memory()
    plan = CopyPlan.of_addresses(source, target, [0, 65536], [65536, 0], 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        transfer = copy(plan)
    assert transfer.path == "copy_engine"
    assert not target.any()
    graph.replay()
    torch.cuda.synchronize()
    assert target.sum() == 2048
