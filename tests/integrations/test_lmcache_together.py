"""LMCache's own code at work on blocks of a kvheap heap: metadata, copies, backends."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from lmcache_scenes import MIB, PAGE, SHAPE, allocated, part_of_lmcache, tensor_heap

from kvheap.integrations import lmcache as shim


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

    def test_copies_of_lmcache(self, lm: Any, make: Any) -> None:
        gpu_ops = part_of_lmcache("lmcache.v1.gpu_connector.gpu_ops")
        source, out = torch.randn(SHAPE).half(), torch.zeros(SHAPE).half()
        (obj,) = make().batched_allocate(SHAPE, torch.half, 1)
        gpu_ops.lmcache_memcpy_async_d2h(source.view(-1), obj)
        gpu_ops.lmcache_memcpy_async_h2d(obj, out.view(-1))
        assert torch.equal(source, out)

    def test_sizes_that_lmcache_narrows(self, lm: Any, make: Any) -> None:
        connectors = part_of_lmcache("lmcache.v1.storage_backend.connector.base_connector")
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

        backends = part_of_lmcache("lmcache.v1.storage_backend.local_cpu_backend")
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
