"""Paged copies to and from the chunks of a heap: where chunks lie, and what is allocated."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from kernel_paths import BULK_PATHS, running
from paged_reference import SPECS, Engine, Sizes, pairs
from paged_worlds import (
    BOTH_WAYS,
    FLASH,
    PADDED,
    SMALL,
    TWO_PLANE_FORMATS,
    World,
    cache_of,
    check_copy,
    check_refused,
    format_of,
    random_slots,
)

import kvheap
from kvheap import LifetimeError, MemoryFormat, TensorMemoryAllocator

ON_ALL_PATHS = pytest.mark.parametrize("path", BULK_PATHS)

F = MemoryFormat


class TestHeap:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
    def test_chunks_in_several_buffers(self, fmt: MemoryFormat, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            world = World(engine, fmt, 19, 4, num_buffers=3)
            starts = [start for start, _ in world.heap.segments]
            segments = np.searchsorted(starts, world.batch.addresses, "right")
            assert len(set(segments.tolist())) > 1
            check_copy(world, random_slots(engine, 19), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    def test_chunks_at_any_address(self, is_store: bool, path: str) -> None:
        sizes = Sizes(1, 4, 3, 1, 7)  # rows of 14 bytes, and no size a power of two
        with running(path) as device:
            for align_bytes in (2, 4, 8, 16):
                engine = Engine(FLASH, sizes, device=device)
                world = World(engine, F.KV_2LTD, 10, 3, align_bytes=align_bytes)
                check_copy(world, random_slots(engine, 10), is_store)

    @ON_ALL_PATHS
    def test_objects_in_any_order_are_chunks_in_that_order(self, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            world, cache = World(engine, F.KV_2LTD, 12, 4), cache_of(engine)
            slots = random_slots(engine, 12)
            expected = world.expected(slots, is_store=True)
            order = [2, 0, 1]
            turned = [slots[4 * at + i] for at in order for i in range(4)]
            kvheap.store(cache, turned, [world.batch[at] for at in order])
            assert world.differences(expected) == []
            for storage in engine.storages:
                storage.fill_(0xA5)
            expected = world.expected(slots, is_store=False)
            kvheap.load([world.batch[at] for at in order], cache, turned)
            assert world.differences(expected) == []

    @pytest.mark.parametrize("layout", [name for name in SPECS if name != "opaque"])
    def test_store_allocates_and_evict_collects(self, layout: str) -> None:
        engine = Engine(layout, SMALL, PADDED)
        cache, slots = cache_of(engine), random_slots(engine, 11)
        heap = TensorMemoryAllocator(torch.full((1 << 20,), 0xA5, dtype=torch.uint8))
        batch = heap.batched_store(cache, slots, chunk_tokens=4)
        assert batch is not None
        assert (len(batch), batch.fmt) == (3, format_of(layout))
        stored = list(pairs(engine, batch, slots))
        assert all(torch.equal(*pair) for pair in stored)
        saved = [engine_row.clone() for engine_row, _ in stored]
        for storage in engine.storages:
            storage.fill_(0x5A)
        heap.batched_load(batch, cache, slots)
        assert all(map(torch.equal, saved, [engine_row for engine_row, _ in stored]))
        contents = torch.stack([obj.tensor for obj in batch])
        out = heap.batched_evict(batch)
        assert torch.equal(out.view(torch.uint8), contents.view(torch.uint8))
        assert heap.stats().allocated_bytes == 0
        assert not batch.live.any()

    @pytest.mark.parametrize("fmt", TWO_PLANE_FORMATS, ids=lambda fmt: fmt.name)
    def test_store_takes_any_format(self, fmt: MemoryFormat) -> None:
        engine = Engine(FLASH, SMALL)
        heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
        slots = random_slots(engine, 11)
        batch = heap.batched_store(cache_of(engine), slots, 8, fmt)
        assert batch is not None
        assert batch.fmt is fmt
        assert all(torch.equal(*pair) for pair in pairs(engine, batch, slots))

    def test_a_full_heap_stores_nothing(self) -> None:
        heap = TensorMemoryAllocator(torch.full((4096,), 0xA5, dtype=torch.uint8))
        slots = list(range(20))
        assert heap.batched_store(cache_of(Engine(FLASH, SMALL)), slots, chunk_tokens=4) is None
        assert heap.stats().allocated_bytes == 0
        assert (heap.buffer == 0xA5).all()

    def test_a_wrong_slot_leaves_nothing_allocated(self) -> None:
        heap = TensorMemoryAllocator(torch.full((1 << 20,), 0xA5, dtype=torch.uint8))
        with pytest.raises(ValueError, match="20"):
            heap.batched_store(cache_of(Engine(FLASH, SMALL)), [0, 20], chunk_tokens=4)
        assert heap.stats().allocated_bytes == 0
        assert (heap.buffer == 0xA5).all()

    @BOTH_WAYS
    def test_a_freed_batch_is_refused(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        world.heap.batched_free(world.batch)
        check_refused(world, LifetimeError, "freed", list(range(7)), is_store)

    @BOTH_WAYS
    def test_one_freed_block_is_enough(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        world.heap.batched_free([world.batch[1]])
        check_refused(world, LifetimeError, "freed", list(range(7)), is_store)

    def test_the_cache_is_not_kept_alive(self) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        cache = cache_of(world.engine)
        kvheap.store(cache, list(range(7)), world.batch)
        seen = weakref.ref(cache)
        del cache
        gc.collect()
        assert seen() is None

    def test_what_cannot_be_written_out_is_not_evicted(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        heap, batch = world.heap, world.batch
        kvheap.store(cache_of(world.engine), range(7), batch)
        expected = torch.stack([obj.tensor.clone() for obj in batch])
        with pytest.raises(ValueError, match="or the host, got meta"):
            heap.batched_evict(batch, out=expected.to("meta"))
        # A heap that is elsewhere than ``out``, whose copy fails.
        monkeypatch.setattr(type(heap), "device", torch.device("cpu", 0))
        monkeypatch.setattr(heap, "require_gatherable", lambda parts, out: None)
        with pytest.raises(RuntimeError):
            heap.batched_evict(batch, out=expected[:1].expand(expected.shape))
        assert batch.live.all()
        out = torch.empty_like(expected)
        assert torch.equal(
            *(t.view(torch.uint8) for t in (heap.batched_evict(batch, out=out), expected))
        )
        assert not batch.live.any()
