"""LMCache's names on kvheap's classes; and a kvheap heap inside LMCache, where that is installed.

The second half needs LMCache 0.5.6, without the packages that only its servers and GPUs need::

    pip install --no-deps lmcache==0.5.6
    pip install numba prometheus_client py-cpuinfo psutil aiohttp requests cachetools pyyaml

The tests with LMCache's backends and copies, which are skipped otherwise, also need::

    pip install aiofile aiofiles blake3 cryptography msgspec pyzmq transformers
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvheap
from kvheap.integrations import lmcache as shim

MIB = 1 << 20
PAGE = 4096
HEAP_BYTES = 16 * MIB
PAGE_SHAPE = torch.Size([2, 4, 16, 256])  # 64 KiB of bfloat16
PAGED = {"shapes": [PAGE_SHAPE], "dtypes": [torch.bfloat16], "fmt": shim.MemoryFormat.KV_2LTD}
NUM_PAGES = HEAP_BYTES // (64 << 10)

INSTALL = "needs LMCache: see the docstring of this file for how to install it"

SIZED = [
    shim.HostMemoryAllocator,
    shim.PinMemoryAllocator,
    shim.GPUMemoryAllocator,
    shim.MixedMemoryAllocator,
]


def tensor_heap(size: int = HEAP_BYTES) -> shim.TensorMemoryAllocator:
    return shim.TensorMemoryAllocator(torch.zeros(size, dtype=torch.uint8))


def lazy_heap(size: int = HEAP_BYTES) -> shim.LazyMemoryAllocator:
    heap = shim.LazyMemoryAllocator(size // 4, size)
    assert heap.allocator.wait_until_grown(60)
    return heap


def paged_tensor_heap() -> shim.PagedTensorMemoryAllocator:
    return shim.PagedTensorMemoryAllocator(torch.zeros(HEAP_BYTES, dtype=torch.uint8), **PAGED)


HEAPS = [tensor_heap, lazy_heap, *SIZED]


@pytest.fixture(params=HEAPS, ids=lambda make: make.__name__)
def heap(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param(HEAP_BYTES) if request.param in SIZED else request.param()
    yield made
    made.close()


@pytest.fixture(params=[paged_tensor_heap, *SIZED], ids=lambda make: f"{make.__name__}-paged")
def pages(request: pytest.FixtureRequest) -> Iterator[Any]:
    make = request.param
    made = make(HEAP_BYTES, use_paging=True, **PAGED) if make in SIZED else make()
    yield made
    made.close()


def under(made: Any) -> kvheap.TensorMemoryAllocator:
    """The kvheap heap of any of them."""
    return getattr(made, "pin_allocator", made.allocator)


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
        with pytest.raises(TypeError, match="one shape"):
            heap.allocate(dtype=torch.half)
        with pytest.raises(TypeError, match="one shape"):
            heap.allocate([1], torch.half, shape=[1])
        with pytest.raises(TypeError, match="one dtype"):
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
        extents = under(heap).snapshot().tolist()
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


class TestBytes:
    @pytest.mark.parametrize("dtype", [None, [], torch.uint8])
    @pytest.mark.parametrize("shape", [[512, 0], torch.Size([512]), [torch.Size([512, 0, 0, 0])]])
    @pytest.mark.parametrize("make", [shim.BufferAllocator, shim.MixedMemoryAllocator])
    def test_plain_bytes(self, make: Any, shape: Any, dtype: Any) -> None:
        made = make() if make is shim.BufferAllocator else make(MIB)
        obj = made.allocate(shape, dtype, shim.MemoryFormat.BINARY_BUFFER)
        assert isinstance(obj, shim.BytesBufferMemoryObj)
        assert (len(obj.byte_array), obj.tensor, obj.get_size()) == (512, None, 512)
        obj.byte_array[:3] = b"abc"
        made.free(obj)  # does nothing
        assert bytes(obj.byte_array[:3]) == b"abc"
        batch = made.batched_allocate(shape, dtype, 3, shim.MemoryFormat.BINARY_BUFFER)
        made.batched_free(batch)
        assert [len(obj.byte_array) for obj in batch] == [512] * 3
        assert made.memcheck()
        made.close()

    def test_tensors_beside_bytes(self) -> None:
        mixed = shim.MixedMemoryAllocator(MIB)
        data = mixed.allocate([512], None, shim.MemoryFormat.BINARY_BUFFER)
        tensor = mixed.allocate([512, 10], torch.float)
        assert mixed.pin_allocator.stats().allocated_bytes == 5 * PAGE
        mixed.batched_free([data, tensor])
        assert mixed.pin_allocator.stats().allocated_bytes == 0
        assert len(data.byte_array) == 512
        with pytest.raises(ValueError, match="UNDEFINED"):
            mixed.allocate([1], torch.float, shim.MemoryFormat.UNDEFINED)
        mixed.close()

    def test_tensors_of_their_own(self) -> None:
        made = shim.AdHocMemoryAllocator("cuda")
        obj = made.allocate([2, 3], dtype=torch.half)
        assert obj.tensor.shape == (2, 3)
        made.free(obj)
        made.free(obj)
        assert obj.tensor is None
        assert len(made.batched_allocate([2], torch.half, 3)) == 3
        assert made.memcheck()


class TestMetadata:
    def test_there_and_back(self) -> None:
        heap = tensor_heap(MIB)
        _first = heap.allocate([1], torch.int8)
        shapes, dtypes = [torch.Size([2, 1, 8, 4]), torch.Size([5])], [torch.float, torch.int8]
        obj = heap.allocate(shapes, dtypes, shim.MemoryFormat.KV_2LTD)
        values = json.loads(json.dumps(obj.metadata.to_dict()))
        assert values["__type__"] == "MemoryObjMetadata"
        metadata = shim.MemoryObjMetadata.from_dict(values)
        assert metadata == obj.metadata == obj.meta
        assert (metadata.address, metadata.phy_size, metadata.get_size()) == (PAGE, PAGE, 261)
        assert (metadata.shapes, metadata.dtypes) == (shapes, dtypes)


class TestAddressManager:
    def test_life_of_addresses(self) -> None:
        manager = shim.AddressManager(16 * PAGE)
        assert shim.AddressManager.ALIGN_BYTES == PAGE
        assert manager.compute_aligned_size(1) == PAGE
        assert manager.allocate(100) == (0, PAGE)
        batch = manager.batched_allocate(PAGE + 1, 2)
        assert list(batch) == [(PAGE, 2 * PAGE), (3 * PAGE, 2 * PAGE)]
        assert manager.total_allocated_size == 5 * PAGE
        assert (manager.get_heap_size(), manager.get_free_size()) == (16 * PAGE, 11 * PAGE)
        for address, size in batch:
            manager.free(address, size)
        manager.free(0, PAGE)
        assert manager.check_consistency()
        assert manager.allocate(16 * PAGE) == (0, 16 * PAGE)
        manager.sbrk(PAGE)
        assert manager.allocate(1) == (16 * PAGE, PAGE)

    def test_errors(self) -> None:
        manager = shim.AddressManager(4 * PAGE, align_bytes=512)
        for size in (0, -1):
            with pytest.raises(ValueError, match="size"):
                manager.allocate(size)
            with pytest.raises(ValueError, match="size"):
                manager.batched_allocate(size, 1)
        with pytest.raises(RuntimeError, match="no memory is available"):
            manager.allocate(4 * PAGE + 1)
        with pytest.raises(RuntimeError, match="no memory is available"):
            manager.batched_allocate(PAGE, 5)
        with pytest.raises(RuntimeError, match="non-negative"):
            manager.batched_allocate(PAGE, -1)
        assert manager.batched_allocate(PAGE, 0) == []
        assert manager.get_free_size() == 4 * PAGE


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


class TestImports:
    def test_the_names_do_not_import_lmcache(self) -> None:
        run_python(
            "import sys, kvheap.integrations.lmcache, kvheap.integrations.lmcache_adapter\n"
            "assert 'lmcache' not in sys.modules"
        )

    def test_they_can_stand_in_for_lmcache(self) -> None:
        run_python(
            "import sys, kvheap.integrations.lmcache as shim\n"
            "for name in ('lmcache', 'lmcache.v1', 'lmcache.v1.memory_management'):\n"
            "    sys.modules[name] = shim\n"
            "from lmcache.v1.memory_management import HostMemoryAllocator, TensorMemoryObj\n"
            "obj = HostMemoryAllocator(1 << 20).allocate([4], shim.torch.half)\n"
            "assert isinstance(obj, TensorMemoryObj)"
        )

    def test_without_lmcache_its_allocator_cannot_be_had(self) -> None:
        run_python(
            "import sys; sys.modules['lmcache'] = None\n"
            "from kvheap.integrations import lmcache\n"
            "try:\n"
            "    from kvheap.integrations.lmcache import KVHeapMemoryAllocator\n"
            "except ImportError as error:\n"
            "    assert 'lmcache' in str(error)\n"
            "else:\n"
            "    raise SystemExit('no error')"
        )

    def test_other_names_there_are_not(self) -> None:
        with pytest.raises(AttributeError, match="FreeBlock"):
            _ = shim.FreeBlock


# -- a kvheap heap inside LMCache ------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm() -> Any:
    """LMCache's memory management."""
    pytest.importorskip("lmcache", reason=INSTALL, exc_type=ImportError)
    import lmcache.v1.memory_management as module
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.pin_monitor import PinMonitor

    PinMonitor.GetOrCreate(LMCacheEngineConfig.from_defaults())
    return module


def part_of_lmcache(name: str) -> Any:
    return pytest.importorskip(f"lmcache.v1.{name}", reason=INSTALL, exc_type=ImportError)


@pytest.fixture
def make(lm: Any) -> Callable[..., Any]:
    """Makes a KVHeapMemoryAllocator over a heap of so many pages."""

    def make(pages: int = 64, **options: Any) -> Any:
        buffer = torch.zeros(pages * PAGE, dtype=torch.uint8)
        return shim.KVHeapMemoryAllocator(kvheap.TensorMemoryAllocator(buffer, **options))

    return make


SHAPE = torch.Size([2, 1, 16, 4])  # 256 bytes of bfloat16


def allocated(allocator: Any) -> int:
    """Pages that are taken, after everything that was dropped came back."""
    allocator.batched_free([])
    return allocator.heap.stats().allocated_bytes // PAGE


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


class TestDropped:
    def test_each_object_comes_back_at_its_own_end(self, make: Any) -> None:
        allocator = make()
        objs = allocator.batched_allocate(SHAPE, torch.half, 8)
        for left in range(7, -1, -1):
            objs.pop(random.randrange(len(objs)))
            assert allocated(allocator) == left
        assert (allocator.dropped_objects, allocator.num_active_allocations) == (8, 0)
        assert allocator.heap.stats().dropped_blocks == 0

    def test_an_allocation_takes_what_was_dropped(self, make: Any) -> None:
        allocator = make(1)
        for _ in range(3):
            assert allocator.allocate(SHAPE, torch.half) is not None

    def test_the_garbage_collector_ends_objects_in_any_order(self, make: Any) -> None:
        """In a cycle an object and its batch are finalized together, the batch first."""
        allocator = make()
        gc.collect()
        gc.freeze()  # so that collecting looks at little but the cycles made here
        gc.disable()
        try:
            for index in range(100):
                cycle: list[Any] = [allocator.batched_allocate(SHAPE, torch.half, 2)]
                cycle.append(cycle)
                if index % 3 == 0:
                    allocator.free(cycle[0][0])
                del cycle
                gc.collect()
                objs = [allocator.allocate(SHAPE, torch.half) for _ in range(3)]
                assert len({obj.meta.address for obj in objs}) == 3
                assert allocated(allocator) == 3
                allocator.batched_free(objs)
                assert allocated(allocator) == 0
        finally:
            gc.enable()
            gc.unfreeze()
        assert allocator.memcheck()

    def test_an_allocator_that_ends_with_its_objects(self, make: Any) -> None:
        allocator = make()
        heap, cycle = allocator.heap, [allocator, allocator.batched_allocate(SHAPE, torch.half, 4)]
        cycle.append(cycle)
        del allocator, cycle
        gc.collect()
        assert heap.stats().allocated_bytes == 0
        assert heap.memcheck()

    def test_dropping_waits_for_no_lock(self, lm: Any, make: Any) -> None:
        from lmcache import utils

        allocator = make()
        objs = allocator.batched_allocate(SHAPE, torch.half, 2)
        locks = [
            allocator.heap.address_manager._lock,
            allocator._count_lock,
            objs[0].lock,
            utils._shared_observability_lock,
            *(block._batch._lock for block in allocator._held.values()),
        ]

        def drop() -> None:
            with contextlib.ExitStack() as stack:
                for lock in dict.fromkeys(locks):
                    stack.enter_context(lock)
                objs.clear()

        worker = threading.Thread(target=drop, daemon=True)
        worker.start()
        worker.join(60)
        assert not worker.is_alive()
        assert allocated(allocator) == 0

    def test_a_finalizer_waits_for_no_lock(self, lm: Any, make: Any) -> None:
        """Dropped, and even freed by a finalizer of somebody else's, inside all of the locks."""
        allocator = make()
        manager, monitor = allocator.heap.address_manager, allocator._monitor
        dropped = allocator.batched_allocate(SHAPE, torch.half, 2)
        freed = allocator.batched_allocate(SHAPE, torch.half, 2)

        def inside(*_: object) -> None:
            with manager._lock:  # not reentrant: whoever takes it here waits for ever
                if dropped:
                    dropped.pop()
                if freed:
                    freed.pop().ref_count_down()

        class Hooked(type(allocator.heap)):  # type: ignore[misc]
            def _layout(self, *arguments: Any) -> Any:
                inside()
                return super()._layout(*arguments)

        allocator.heap.__class__ = Hooked
        worker = threading.Thread(target=allocator.allocate, args=(SHAPE, torch.half), daemon=True)
        worker.start()
        worker.join(60)
        assert not worker.is_alive()
        allocator._monitor = types.SimpleNamespace(
            update_local_cache_usage=inside, update_active_memory_objs_count=inside
        )
        worker = threading.Thread(target=allocator.batched_free, args=([],), daemon=True)
        worker.start()
        worker.join(60)
        assert not worker.is_alive()
        allocator._monitor = monitor
        assert not dropped
        assert not freed
        assert allocated(allocator) == 0


class TestTogether:
    def test_metadata_there(self, lm: Any, make: Any) -> None:
        shapes, dtypes = [SHAPE, torch.Size([5])], [torch.bfloat16, torch.int8]
        obj = make().allocate(shapes, dtypes, lm.MemoryFormat.KV_2LTD)
        mine = shim.MemoryObjMetadata.from_dict(obj.meta.to_dict())
        assert (mine.shapes, mine.dtypes, mine.address) == (shapes, dtypes, obj.meta.address)
        assert (mine.fmt, mine.get_size()) == (shim.MemoryFormat.KV_2LTD, obj.get_size())
        assert lm.MemoryObjMetadata.from_dict(mine.to_dict()) == obj.meta

    def test_metadata_back(self, lm: Any) -> None:
        heap = tensor_heap(MIB)
        _first = heap.allocate([1], torch.int8)
        obj = heap.allocate(SHAPE, torch.half, shim.MemoryFormat.KV_MLA_FMT)
        theirs = lm.MemoryObjMetadata.from_dict(obj.metadata.to_dict())
        assert (theirs.shape, theirs.dtype) == (SHAPE, torch.half)
        assert (theirs.address, theirs.phy_size, theirs.get_size()) == (PAGE, PAGE, 256)
        assert theirs.fmt is lm.MemoryFormat.KV_MLA_FMT
        assert shim.MemoryObjMetadata.from_dict(theirs.to_dict()) == obj.metadata

    def test_formats_are_the_same(self, lm: Any) -> None:
        theirs = {fmt.name: fmt.value for fmt in lm.MemoryFormat}
        assert theirs == {fmt.name: fmt.value for fmt in shim.MemoryFormat}

    def test_copies_of_lmcache(self, lm: Any, make: Any) -> None:
        gpu_ops = part_of_lmcache("gpu_connector.gpu_ops")
        source, out = torch.randn(SHAPE).half(), torch.zeros(SHAPE).half()
        (obj,) = make().batched_allocate(SHAPE, torch.half, 1)
        gpu_ops.lmcache_memcpy_async_d2h(source.view(-1), obj)
        gpu_ops.lmcache_memcpy_async_h2d(obj, out.view(-1))
        assert torch.equal(source, out)

    def test_sizes_that_lmcache_narrows(self, lm: Any, make: Any) -> None:
        connectors = part_of_lmcache("storage_backend.connector.base_connector")
        obj = make().allocate(SHAPE, torch.half)
        sizes = types.SimpleNamespace(full_chunk_size_bytes=256, single_token_size=16)
        connectors.RemoteConnector.reshape_partial_chunk(sizes, obj, 80)
        assert (obj.tensor.shape, obj.get_size(), len(obj.byte_array)) == ((2, 1, 5, 4), 80, 80)
        obj.set_used_size(7)
        assert (obj.get_size(), len(obj.byte_array)) == (7, 7)

    def test_in_a_mixed_allocator_of_lmcaches(self, lm: Any, make: Any) -> None:
        from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator

        mixed, allocator = MixedMemoryAllocator(0), make()
        mixed.pin_allocator = allocator
        objs = mixed.batched_allocate([SHAPE], [torch.half], 3)
        assert all(obj.parent() is mixed for obj in objs)
        objs.pop()
        objs.pop().ref_count_down()
        assert allocated(allocator) == 1
        mixed.batched_free(objs)
        assert allocated(allocator) == 0
        assert mixed.memcheck()
        mixed.close()

    @pytest.mark.parametrize("is_mixed", [False, True])
    def test_under_lmcaches_cpu_backend(self, lm: Any, make: Any, is_mixed: bool) -> None:
        """Storing more than fits: LMCache evicts, and what it still has is what was stored."""
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_allocators.mixed_memory_allocator import MixedMemoryAllocator

        backends = part_of_lmcache("storage_backend.local_cpu_backend")
        allocator = given = make(8)
        if is_mixed:
            given = MixedMemoryAllocator(0)
            given.pin_allocator = allocator
        config = LMCacheEngineConfig.from_defaults(local_cpu=True)
        backend = backends.LocalCPUBackend(config, dst_device="cpu", memory_allocator=given)
        keys = [CacheEngineKey("model", 1, 0, number, torch.half) for number in range(30)]
        for number, key in enumerate(keys):
            obj = backend.allocate([SHAPE], [torch.half], lm.MemoryFormat.KV_2LTD, busy_loop=False)
            obj.tensor.fill_(number)
            backend.submit_put_task(key, obj)
            obj.ref_count_down()
            assert allocator.num_active_allocations == min(number + 1, 8)
        assert [backend.contains(key) for key in keys] == [False] * 22 + [True] * 8
        for number in range(22, 30):
            found = backend.get_blocking(keys[number])
            assert found.tensor.eq(number).all()
            found.ref_count_down()
        backend.pin(keys[29])
        backend.unpin(keys[29])
        del obj, found
        assert backend.clear() == 8 * 16
        assert allocated(allocator) == 0
        backend.allocate([SHAPE], [torch.half])
        backend.close()
        assert allocator.heap.closed is not is_mixed

    def test_threads(self, make: Any) -> None:
        """Every way to end, by several threads at once: nothing is lost, nothing freed twice."""
        allocator = make(48)
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            dice = random.Random(seed)
            held: list[Any] = []
            try:
                for _ in range(400):
                    objs = allocator.batched_allocate(SHAPE, torch.half, dice.randrange(1, 6))
                    for obj in objs or []:
                        obj.raw_data.fill_(seed)
                    held += objs or []
                    dice.shuffle(held)
                    assert all(obj.raw_data.eq(seed).all() for obj in held)
                    while len(held) > 8:
                        end = dice.randrange(3)
                        if end == 0:
                            held.pop().ref_count_down()
                        elif end == 1:
                            held.pop()
                        else:
                            allocator.batched_free([held.pop(), held.pop()])
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures
        gc.collect()
        assert allocated(allocator) == allocator.num_active_allocations == 0
        assert allocator.memcheck()

    def test_two_threads_end_one_object(self, make: Any) -> None:
        allocator = make(2)
        for _ in range(300):
            obj = allocator.allocate(SHAPE, torch.half)
            start = threading.Barrier(2)

            def end(obj: Any = obj, start: threading.Barrier = start) -> None:
                start.wait()
                allocator.free(obj)

            workers = [threading.Thread(target=end) for _ in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert allocated(allocator) == 0
