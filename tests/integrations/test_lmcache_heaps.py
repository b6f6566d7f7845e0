"""LMCache's allocators of tensors, answered by kvheap's: blocks, pages and arguments."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from lmcache_scenes import (
    HEAP_BYTES,
    MIB,
    NUM_PAGES,
    PAGE,
    PAGE_SHAPE,
    PAGED,
    SIZED,
    tensor_heap,
    under,
)

import kvheap
from kvheap.integrations import lmcache as shim


class TestHeaps:
    def test_life_of_objects_of_three_dtypes(self, heap: Any) -> None:
        wanted = [((256, 128), torch.float), ((64, 5, 7), torch.bfloat16), ([1000], torch.int8)]
        objs = [heap.allocate(list(shape), dtype=dtype) for shape, dtype in wanted]
        for obj, (shape, dtype) in zip(objs, wanted, strict=True):
            assert isinstance(obj, shim.TensorMemoryObj)
            assert (obj.tensor.shape, obj.tensor.dtype) == (tuple(shape), dtype)
        for obj in (objs[1], objs[0]):
            heap.free(obj)
            assert obj.tensor is None
            assert not obj.is_valid()
            assert heap.memcheck()
        heap.free(objs[1])  # again
        heap.batched_free([objs[0], objs[1], objs[0]])
        assert heap.allocate([HEAP_BYTES], torch.float) is None
        assert heap.memcheck()
        heap.batched_free(objs)
        assert under(heap).stats().allocated_bytes == 0
        assert heap.memcheck()

    @pytest.mark.parametrize("name", ["shape", "shapes"])
    def test_every_name_of_shape_and_dtype(self, heap: Any, name: str) -> None:
        dtype = {"shape": "dtype", "shapes": "dtypes"}[name]
        wanted = {name: torch.Size([4]), dtype: torch.half}
        obj = heap.allocate(**wanted)
        assert (obj.get_shape(), obj.get_dtype()) == ((4,), torch.half)
        batch = heap.batched_allocate(**wanted, batch_size=2)
        assert [obj.get_size() for obj in batch] == [8, 8]
        groups = heap.allocate([torch.Size([4]), torch.Size([3])], [torch.half, torch.int8])
        assert groups.get_shapes() == [(4,), (3,)]
        assert groups.get_tensor(1).dtype == torch.int8

    def test_arguments_that_only_lmcache_needs(self, heap: Any) -> None:
        fmt = shim.MemoryFormat.KV_T2D
        obj = heap.allocate(torch.Size([4]), torch.half, fmt, "a name")
        batch = heap.batched_allocate(torch.Size([4]), torch.half, 3, fmt, "a name")
        assert obj.get_memory_format() is fmt
        heap.free(obj, "a name")
        heap.batched_free(batch, "a name", update_stats=False)
        assert under(heap).stats().allocated_bytes == 0

    def test_a_shape_or_dtype_named_twice_or_never(self, heap: Any) -> None:
        with pytest.raises(TypeError, match="give the shape once"):
            heap.allocate(dtype=torch.half)
        with pytest.raises(TypeError, match="give the shape once"):
            heap.allocate([1], torch.half, shape=[1])
        with pytest.raises(TypeError, match="give the dtype once"):
            heap.allocate([1], torch.half, dtype=torch.half)
        with pytest.raises(TypeError, match="dtype must be"):
            heap.allocate([1])

    def test_contents_can_be_changed_in_place(self, heap: Any) -> None:
        obj = heap.allocate([10], torch.float)
        obj.tensor.fill_(1)
        obj.tensor[3] = 2
        assert obj.tensor.tolist() == [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]

    def test_a_hole_is_filled_first_and_leaves_nothing(self, heap: Any) -> None:
        first, _second = (heap.allocate([512, 10], torch.float) for _ in range(2))
        address = first.metadata.address
        heap.free(first)
        third = heap.allocate([512, 10], torch.float)
        assert third.metadata.address == address
        extents = under(heap).free_extents().tolist()
        assert all(size > 0 for _, size in extents)
        assert len(extents) == 1 or isinstance(heap, shim.LazyMemoryAllocator)  # pinned pieces

    def test_a_batch_takes_the_heap_to_its_last_byte(self, heap: Any) -> None:
        # A unit that divides what a lazy heap starts with and each piece it grows by.
        shape, fmt = [32, 2, 1024], shim.MemoryFormat.KV_T2D
        count = HEAP_BYTES // (32 * 2 * 1024 * 2)
        batch = heap.batched_allocate(shape, torch.bfloat16, count, fmt)
        assert len(batch) == count
        assert all(obj.tensor.shape == (32, 2, 1024) for obj in batch)
        assert heap.batched_allocate(shape, torch.bfloat16, 1, fmt) is None
        heap.batched_free(batch)
        assert all(obj.tensor is None for obj in batch)
        assert under(heap).stats().free_bytes == HEAP_BYTES
        assert heap.memcheck()

    def test_odd_batch_sizes(self, heap: Any) -> None:
        assert heap.batched_allocate([4], torch.half, 0) == []
        with pytest.raises(RuntimeError, match="non-negative, got -1"):
            heap.batched_allocate([4], torch.half, -1)
        with pytest.raises(ValueError, match="at least one element"):
            heap.allocate([4, 0], torch.half)
        heap.batched_free([])

    def test_what_others_hold_is_not_freed(self, heap: Any) -> None:
        obj = heap.allocate([4], torch.half)
        obj.ref_count_up()
        with pytest.raises(kvheap.BlockInUseError):
            heap.free(obj)
        obj.ref_count_down()
        obj.pin()
        with pytest.raises(kvheap.BlockInUseError):
            heap.batched_free([obj])
        obj.ref_count_down()
        assert obj.is_valid()
        obj.unpin()
        assert not obj.is_valid()
        with pytest.raises(kvheap.ForeignObjectError):
            heap.free(tensor_heap(MIB).allocate([4], torch.half))

    def test_what_is_dropped_comes_back(self, heap: Any) -> None:
        heap.allocate([4], torch.half)
        batch = heap.batched_allocate([4], torch.half, 8)
        kept = batch[3]
        del batch
        assert under(heap).stats().allocated_bytes == 8 * PAGE
        del kept
        assert under(heap).stats().allocated_bytes == 0
        assert under(heap).stats().dropped_blocks == 9

    def test_freeing_after_the_end(self, heap: Any) -> None:
        batch = heap.batched_allocate([4], torch.half, 8)
        heap.close()
        heap.close()
        heap.free(batch[0])
        heap.batched_free(batch)
        batch[1].ref_count_down()
        with pytest.raises(kvheap.ClosedError):
            heap.allocate([4], torch.half)

    def test_names(self, heap: Any) -> None:
        assert str(heap) == type(heap).__name__
        assert isinstance(heap, shim.MemoryAllocatorInterface)
        assert heap.buffer.numel() == HEAP_BYTES
        manager = under(heap).address_manager
        assert (manager.get_heap_size(), manager.get_free_size()) == (HEAP_BYTES, HEAP_BYTES)


class TestPages:
    def test_life_of_pages(self, pages: Any) -> None:
        fmt = shim.MemoryFormat.KV_2LTD
        one = pages.allocate(PAGE_SHAPE, torch.bfloat16, fmt)
        two = pages.batched_allocate(PAGE_SHAPE, torch.bfloat16, 2, fmt)
        for obj in (one, *two):
            assert (obj.tensor.shape, obj.tensor.dtype) == (PAGE_SHAPE, torch.bfloat16)
        smaller = pages.allocate(torch.Size([2, 4, 3, 256]), torch.bfloat16, fmt)
        assert smaller.tensor.shape == (2, 4, 3, 256)
        assert smaller.get_size() == 2 * 4 * 3 * 256 * 2
        assert smaller.get_physical_size() == 64 << 10
        assert smaller.get_num_tokens() == 3
        for obj in (smaller, one):
            pages.free(obj)
            assert pages.memcheck()
        pages.batched_free(two)
        assert pages.memcheck()
        assert under(pages).stats().allocated_bytes == 0

    def test_too_many_pages(self, pages: Any) -> None:
        assert pages.batched_allocate(PAGE_SHAPE, torch.bfloat16, NUM_PAGES + 1) is None
        batch = pages.batched_allocate(PAGE_SHAPE, torch.bfloat16, NUM_PAGES)
        assert len(batch) == NUM_PAGES
        assert pages.allocate([1], torch.int8) is None
        assert pages.memcheck()

    def test_more_than_a_page(self, pages: Any) -> None:
        with pytest.raises(ValueError, match="more than a page"):
            pages.allocate([2, 4, 17, 256], torch.bfloat16)

    @pytest.mark.parametrize("make", SIZED)
    def test_a_page_may_have_older_names_and_any_size(self, make: Any) -> None:
        fmt = shim.MemoryFormat.KV_MLA_FMT
        made = make(
            10 * 1152, use_paging=True, shape=torch.Size([1, 1, 1, 576]), dtype=torch.half, fmt=fmt
        )
        assert under(made).address_manager.align_bytes == 1152
        assert len(made.batched_allocate([1, 1, 1, 576], torch.half, 10, fmt)) == 10
        made.close()

    @pytest.mark.parametrize("make", SIZED)
    @pytest.mark.parametrize("missing", list(PAGED))
    def test_a_page_without_a_layout(self, make: Any, missing: str) -> None:
        arguments = {name: value for name, value in PAGED.items() if name != missing}
        with pytest.raises(ValueError, match="paging needs shapes, dtypes and fmt"):
            make(HEAP_BYTES, use_paging=True, **arguments)


class TestArguments:
    @pytest.mark.parametrize("make", SIZED)
    def test_paging_arguments_without_paging(self, make: Any) -> None:
        made = make(1000, device="cuda", use_paging=False, **PAGED)
        assert made.buffer.numel() == PAGE  # rounded up
        kept = made.allocate([10], torch.float)
        assert kept.tensor.shape == (10,)
        assert made.allocate([10], torch.float) is None
        made.close()

    @pytest.mark.parametrize("make", SIZED)
    def test_alignment(self, make: Any) -> None:
        made = make(HEAP_BYTES, align_bytes=1 << 16)
        first, second = made.batched_allocate([1], torch.int8, 2)
        assert second.data_ptr - first.data_ptr == 1 << 16
        assert first.data_ptr % (1 << 16) == 0
        made.close()
        for wrong in (0, -1, 3000):
            with pytest.raises(ValueError, match="align_bytes"):
                make(HEAP_BYTES, align_bytes=wrong)

    @pytest.mark.parametrize("make", SIZED)
    def test_what_nobody_knows(self, make: Any) -> None:
        with pytest.raises(TypeError, match="align_byte"):
            make(HEAP_BYTES, align_byte=1 << 16)

    @pytest.mark.parametrize("make", SIZED)
    def test_wrong_sizes(self, make: Any) -> None:
        with pytest.raises(ValueError, match="size"):
            make(-1)

    def test_named_memory_is_refused(self) -> None:
        with pytest.raises(ValueError, match="shm_name 'a'"):
            shim.MixedMemoryAllocator(MIB, shm_name="a")
        config = types.SimpleNamespace(get_extra_config_value=lambda name, default: f"the {name}")
        with pytest.raises(ValueError, match="shm_name 'the shm_name'"):
            shim.MixedMemoryAllocator(MIB, config=config)
        config.get_extra_config_value = lambda name, default: default
        shim.MixedMemoryAllocator(MIB, config=config, shm_name=None).close()

    def test_numa_node_of_the_gpu(self) -> None:
        numa = types.SimpleNamespace(gpu_to_numa_mapping={0: 0})
        shim.MixedMemoryAllocator(MIB, numa_mapping=numa).close()
        shim.LazyMemoryAllocator(MIB, MIB, numa_mapping=numa).close()
        numa.gpu_to_numa_mapping = {99: 0}
        with pytest.raises(KeyError, match="not in the NUMA mapping"):
            shim.PinMemoryAllocator(MIB, numa_mapping=numa)

    @pytest.mark.parametrize(("first", "last"), [(0, 5000), (5000, 5000), (1, 3 * MIB)])
    def test_lazy_sizes_are_rounded_up(self, first: int, last: int) -> None:
        heap = shim.LazyMemoryAllocator(first, last)
        assert heap.allocator.wait_until_grown(60)
        assert heap.get_address_manager().get_heap_size() == -(-last // PAGE) * PAGE
        assert heap.get_underlying_buffer().numel() == -(-last // PAGE) * PAGE
        heap.close()

    def test_an_address_space_that_grows_later(self) -> None:
        buffer = torch.zeros(4 * PAGE, dtype=torch.uint8)
        heap = shim.TensorMemoryAllocator(buffer, init_address_space=PAGE)
        assert heap.batched_allocate([1], torch.int8, 2) is None
        heap.address_manager.sbrk(3 * PAGE)
        assert len(heap.batched_allocate([1], torch.int8, 4)) == 4
        assert heap.total_allocated_size == 4 * PAGE
