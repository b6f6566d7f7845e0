"""Paged copies on a real GPU: large caches, streams, and slots that only the device sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_paths import needs_gpu
from paged_reference import Engine
from paged_worlds import (
    FLASH,
    SMALL,
    World,
    cache_of,
    transfer,
)

import kvheap
from kvheap import MemoryFormat, TensorMemoryAllocator
from kvheap.kernels.paged_copy import BlockIds
from kvheap.kernels.paged_layout import PagedKVCache

F = MemoryFormat

pytestmark = needs_gpu


class TestOnAGpu:
    def test_a_cache_of_more_than_eight_gib(self) -> None:
        num_blocks = 140_000  # 2 x 140,000 x 16,384 elements: more than 2**32
        tensor = torch.zeros(2, num_blocks, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
        tokens = tensor.view(torch.int16).view(2, -1, 1024)
        slots = torch.randperm(16 * num_blocks, device="cuda")[:4096]
        slots[0], slots[1] = 16 * num_blocks - 1, 0
        slots = slots.unique()
        whole = torch.randint(1, 1 << 14, (2, len(slots), 1024), dtype=torch.int16, device="cuda")
        tokens[:, slots] = whole
        cache = PagedKVCache.of(FLASH, [tensor])
        heap = TensorMemoryAllocator(torch.zeros(64 << 20, dtype=torch.uint8, device="cuda"))
        num_chunks = -(-len(slots) // 256)
        batch = heap.batched_allocate((2, 1, 256, 1024), torch.bfloat16, num_chunks)
        assert batch is not None
        for given in (slots.tolist(), slots, slots.int()):
            kvheap.store(cache, given, batch)
            found = torch.cat([obj.tensor.view(torch.int16)[:, 0] for obj in batch], 1)
            assert torch.equal(found[:, : len(slots)], whole)
            tokens[:, slots] = 0
            kvheap.load(batch, cache, given)
            assert torch.equal(tokens[:, slots], whole)
            assert int(tokens.count_nonzero()) == whole.numel()

    @pytest.mark.parametrize("is_pinned", [False, True])
    @pytest.mark.parametrize("as_blocks", [False, True])
    def test_a_layer_stack_of_a_real_model(self, as_blocks: bool, is_pinned: bool) -> None:
        shape = (2, 1024, 16, 8, 128)
        tensors = [torch.randn(shape, device="cuda").bfloat16() for _ in range(32)]
        cache = PagedKVCache.of(FLASH, tensors)
        memory = torch.zeros(300 << 20, dtype=torch.uint8)
        memory = memory.pin_memory() if is_pinned else memory.cuda()
        heap = TensorMemoryAllocator(memory)
        ids = torch.randperm(1024)[:120]
        slots = (ids[:, None] * 16 + torch.arange(16)).view(-1)
        batch = heap.batched_allocate((2, 32, 256, 1024), torch.bfloat16, 8)
        assert batch is not None
        kvheap.store(cache, BlockIds(ids) if as_blocks else slots, batch)
        torch.cuda.synchronize()
        wanted = torch.stack([t.view(2, -1, 1024)[:, slots.cuda()] for t in tensors], 1)
        chunks = torch.cat([obj.tensor for obj in batch], 2)
        assert torch.equal(chunks[:, :, : len(slots)].cuda(), wanted)
        saved = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.view(2, -1, 1024)[:, slots.cuda()] = 0
        kvheap.load(batch, cache, BlockIds(ids) if as_blocks else slots)
        assert all(torch.equal(a, b) for a, b in zip(tensors, saved, strict=True))

    def test_bad_slots_on_the_device_are_skipped_and_reported(self) -> None:
        engine = Engine(FLASH, SMALL, device="cuda")
        world, cache = World(engine, F.KV_2LTD, 7, 4), cache_of(engine)
        expected = world.expected([0, 1, -1, 3, -1, 5, 6], is_store=True)
        slots = torch.tensor([0, 1, 20, 3, -2, 5, 6], device="cuda")
        kvheap.store(cache, slots, world.batch)
        assert world.differences(expected) == []
        with pytest.raises(ValueError, match=r"token 2 .* 20"):
            cache.synchronize()
        cache.synchronize()

    def test_a_launch_does_not_wait_for_the_device(self) -> None:
        world = World(Engine(FLASH, SMALL, device="cuda"), F.KV_2LTD, 7, 4)
        slots = np.arange(7)
        transfer(world, slots, is_store=True)  # compiled now
        expected = world.expected(range(7), is_store=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # about a second of cycles
        transfer(world, slots, is_store=True)
        assert not torch.cuda.current_stream().query()
        slots[:] = 0  # already copied: the caller's array is its own again
        torch.cuda.synchronize()
        assert world.differences(expected) == []
