"""A kvheap heap as one of LMCache's allocators: its objects, and every way they end."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from lmcache_scenes import MIB, PAGE, SHAPE, allocated

import kvheap
from kvheap.integrations import lmcache as shim


class TestInsideLMCache:
    def test_it_is_one_of_lmcaches_allocators(self, lm: Any, make: Any) -> None:
        allocator = make()
        assert isinstance(allocator, lm.MemoryAllocatorInterface)
        assert shim.KVHeapMemoryAllocator is type(allocator)
        assert str(allocator) == type(allocator).__name__ == "KVHeapMemoryAllocator"
        assert "heap_bytes=262144" in repr(allocator)
        assert (allocator.align_bytes, allocator.buffer.numel()) == (PAGE, 64 * PAGE)
        manager = allocator.address_manager
        assert (manager.get_heap_size(), manager.get_free_size()) == (64 * PAGE, 64 * PAGE)
        assert allocator.memcheck()

    def test_objects_are_lmcaches(self, lm: Any, make: Any) -> None:
        allocator = make()
        _first = allocator.heap.allocate([1], torch.int8)
        (obj,) = allocator.batched_allocate(SHAPE, torch.bfloat16, 1, lm.MemoryFormat.KV_2LTD)
        assert isinstance(obj, lm.TensorMemoryObj)
        assert obj.parent() is allocator
        assert obj.meta.fmt is obj.get_memory_format() is lm.MemoryFormat.KV_2LTD
        assert (obj.get_shape(), obj.get_dtype()) == (SHAPE, torch.bfloat16)
        assert (obj.get_shapes(), obj.get_dtypes()) == ([SHAPE], [torch.bfloat16])
        assert (obj.get_size(), obj.get_physical_size(), obj.get_num_tokens()) == (256, PAGE, 16)
        obj.tensor.fill_(1.5)
        assert allocator.buffer[obj.meta.address :][:256].view(torch.bfloat16).eq(1.5).all()
        assert obj.data_ptr == allocator.buffer.data_ptr() + obj.shm_offset
        assert bytes(obj.byte_array) == bytes(obj.raw_data.numpy())
        assert obj.raw_tensor.numel() == 256

    def test_groups(self, lm: Any, make: Any) -> None:
        shapes, dtypes = [SHAPE, torch.Size([5])], [torch.bfloat16, torch.int8]
        obj = make().allocate(shapes, dtypes, lm.MemoryFormat.KV_2LTD)
        obj.get_tensor(0).fill_(1)
        obj.get_tensor(1).fill_(7)
        assert obj.get_size() == 261
        assert obj.raw_tensor[256:].eq(7).all()
        assert (obj.get_shapes(), obj.get_dtypes()) == (shapes, dtypes)

    def test_full_and_wrong(self, lm: Any, make: Any) -> None:
        allocator = make(4)
        kept = allocator.batched_allocate(SHAPE, torch.half, 3)
        assert allocator.batched_allocate(SHAPE, torch.half, 2) is None
        assert allocator.batched_allocate(SHAPE, torch.half, 0) == []
        with pytest.raises(RuntimeError):
            allocator.batched_allocate(SHAPE, torch.half, -1)
        with pytest.raises(ValueError, match="at least one element"):
            allocator.allocate(torch.Size([0]), torch.half)
        assert allocated(allocator) == len(kept) == allocator.num_active_allocations == 3
        assert allocator.get_memory_usage() == (3 * PAGE, 4 * PAGE)
        assert allocator.memcheck()

    def test_freed_once_by_the_last_reference(self, make: Any) -> None:
        allocator = make()
        obj = allocator.allocate(SHAPE, torch.half)
        obj.ref_count_up()
        obj.ref_count_down()
        assert obj.is_valid()
        obj.ref_count_down()
        assert not obj.is_valid()
        assert obj.tensor is None
        assert allocated(allocator) == 0
        # Its bytes are another's now: ending again must not touch them.
        other = allocator.allocate(SHAPE, torch.half)
        assert other.meta.address == obj.meta.address
        obj.ref_count_down()
        allocator.free(obj)
        allocator.batched_free([obj, obj])
        del obj
        gc.collect()
        assert other.is_valid()
        assert (allocated(allocator), allocator.dropped_objects) == (1, 0)

    def test_pins_and_their_monitor(self, lm: Any, make: Any) -> None:
        from lmcache.v1.pin_monitor import PinMonitor

        allocator, monitor = make(), lm.TensorMemoryObj.monitor
        before, pinned = PinMonitor.GetOrCreate(), monitor.pinned_memory_objs_count
        monitored = before.get_monitored_count()
        obj = allocator.allocate(SHAPE, torch.half)
        obj.pin()
        obj.pin()
        assert monitor.pinned_memory_objs_count == pinned + 1
        assert before.get_monitored_count() == monitored + 1
        obj.ref_count_down()
        assert not obj.can_evict
        obj.unpin()
        assert (obj.is_valid(), allocated(allocator)) == (True, 1)
        obj.unpin()
        assert (obj.is_valid(), allocated(allocator)) == (False, 0)
        assert monitor.pinned_memory_objs_count == pinned
        assert before.get_monitored_count() == monitored

    def test_pins_that_time_out(self, make: Any) -> None:
        from lmcache.v1.pin_monitor import PinMonitor

        allocator = make()
        obj = allocator.allocate(SHAPE, torch.half)
        obj.pin()
        obj.pin()
        obj.ref_count_down()
        PinMonitor.GetOrCreate()._force_unpin_timeout_object(obj, 1e9)
        assert (obj.is_valid(), allocated(allocator)) == (False, 0)

    def test_usage_reaches_the_monitor(self, lm: Any, make: Any) -> None:
        allocator, monitor = make(), lm.TensorMemoryObj.monitor
        objs = allocator.batched_allocate(SHAPE, torch.half, 3)
        counts = (monitor.local_cache_usage_bytes, monitor.active_memory_objs_count)
        assert counts == (3 * PAGE, 3)
        allocator.batched_free(objs[:1], update_stats=False)
        assert monitor.active_memory_objs_count == 3
        objs[1].ref_count_down()
        counts = (monitor.local_cache_usage_bytes, monitor.active_memory_objs_count)
        assert counts == (PAGE, 1)

    def test_a_batch_is_freed_whatever_its_counts(self, make: Any) -> None:
        allocator = make()
        objs = allocator.batched_allocate(SHAPE, torch.half, 8)
        objs[2].ref_count_up()
        allocator.batched_free([*objs, objs[0]], "a name")
        assert not any(obj.is_valid() for obj in objs)
        assert allocated(allocator) == 0

    def test_foreign_objects(self, lm: Any, make: Any) -> None:
        from lmcache.v1.memory_allocators.ad_hoc_memory_allocator import AdHocMemoryAllocator

        allocator, other = make(), make()
        mine = allocator.allocate(SHAPE, torch.half)
        for foreign in (
            other.allocate(SHAPE, torch.half),
            AdHocMemoryAllocator().allocate(SHAPE, torch.half),
        ):
            with pytest.raises(kvheap.ForeignObjectError):
                allocator.batched_free([mine, foreign])
        assert mine.is_valid()
        assert allocated(allocator) == 1

    def test_bytes(self, lm: Any, make: Any) -> None:
        allocator = make()
        data = allocator.allocate(torch.Size([512, 0]), None, lm.MemoryFormat.BINARY_BUFFER)
        assert isinstance(data, lm.BytesBufferMemoryObj)
        allocator.batched_free([data, allocator.allocate(SHAPE, torch.half)])
        assert len(data.byte_array) == 512
        assert allocated(allocator) == 0

    @pytest.mark.parametrize("last_free", ["free", "drop"])
    def test_lmcache_closes_first_and_clears_then(self, make: Any, last_free: str) -> None:
        allocator = make()
        obj = allocator.allocate(SHAPE, torch.half)
        allocator.close()
        allocator.close()
        if last_free == "free":
            obj.ref_count_down()
            assert not obj.is_valid()
        del obj
        gc.collect()
        with pytest.raises(kvheap.ClosedError):
            allocator.allocate(SHAPE, torch.half)

    def test_host_heaps_that_lmcache_closes(self, lm: Any) -> None:
        heap = kvheap.HostMemoryAllocator(MIB)
        allocator = shim.KVHeapMemoryAllocator(heap)
        obj = allocator.allocate(SHAPE, torch.half)
        raw = obj.raw_data
        allocator.close()
        raw.fill_(1)  # still there
        assert heap.host_buffer.closed

    def test_pages(self, make: Any) -> None:
        heap = kvheap.PagedTensorMemoryAllocator(
            torch.zeros(10 * 256, dtype=torch.uint8), SHAPE, torch.half
        )
        allocator = shim.KVHeapMemoryAllocator(heap)
        objs = allocator.batched_allocate(SHAPE, torch.half, 10)
        assert [obj.meta.address for obj in objs] == list(range(0, 2560, 256))
        assert allocator.allocate(SHAPE, torch.half) is None
