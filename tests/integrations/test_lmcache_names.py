"""The shim's plain bytes, metadata and addresses; and that the shim needs no LMCache."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from lmcache_scenes import MIB, PAGE, tensor_heap

from kvheap.integrations import lmcache as shim
from kvheap.integrations import lmcache_adapter


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


class TestImports:
    def test_the_names_do_not_import_lmcache(self) -> None:
        code = (
            "import sys, kvheap.integrations.lmcache, kvheap.integrations.lmcache_adapter\n"
            "sys.exit('lmcache' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_they_can_stand_in_for_lmcache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("lmcache", "lmcache.v1", "lmcache.v1.memory_management"):
            monkeypatch.setitem(sys.modules, name, shim)
        from lmcache.v1.memory_management import HostMemoryAllocator, TensorMemoryObj

        obj = HostMemoryAllocator(1 << 20).allocate([4], torch.half)
        assert isinstance(obj, TensorMemoryObj)

    def test_without_lmcache_its_allocator_cannot_be_had(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("lmcache", *(name for name in sys.modules if name.startswith("lmcache."))):
            monkeypatch.setitem(sys.modules, name, None)
        uncached = lmcache_adapter.lmcache_classes.__wrapped__
        monkeypatch.setattr(lmcache_adapter, "lmcache_classes", uncached)
        with pytest.raises(ImportError, match="lmcache"):
            _ = shim.KVHeapMemoryAllocator

    def test_other_names_there_are_not(self) -> None:
        with pytest.raises(AttributeError, match="FreeBlock"):
            _ = shim.FreeBlock
