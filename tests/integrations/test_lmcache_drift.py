"""Whether the installed LMCache still has the interface that kvheap answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from lmcache_scenes import part_of_lmcache

from kvheap.integrations import lmcache as shim
from kvheap.integrations.lmcache_adapter import HeapCalls

ABSTRACT_METHODS = {"allocate", "batched_allocate", "batched_free", "free"}
"""What an allocator of LMCache 0.5.6 must define."""

MODULES = {
    "AdHocMemoryAllocator": "lmcache.v1.memory_allocators.ad_hoc_memory_allocator",
    "AddressManager": "lmcache.v1.memory_management",
    "BufferAllocator": "lmcache.v1.memory_allocators.buffer_allocator",
    "GPUMemoryAllocator": "lmcache.v1.memory_allocators.gpu_memory_allocator",
    "HostMemoryAllocator": "lmcache.v1.memory_allocators.host_memory_allocator",
    "LazyMemoryAllocator": "lmcache.v1.memory_allocators.lazy_memory_allocator",
    "MemoryAllocatorInterface": "lmcache.v1.memory_management",
    "MixedMemoryAllocator": "lmcache.v1.memory_allocators.mixed_memory_allocator",
    "PagedTensorMemoryAllocator": "lmcache.v1.memory_allocators.paged_tensor_memory_allocator",
    "PinMemoryAllocator": "lmcache.v1.memory_allocators.pin_memory_allocator",
    "TensorMemoryAllocator": "lmcache.v1.memory_allocators.tensor_memory_allocator",
}
"""Where LMCache 0.5.6 has the classes that the shim has under the same names."""

ALLOCATORS = sorted(MODULES.keys() - {"AddressManager", "MemoryAllocatorInterface"})

NOT_IN_SHIM = {
    "AdHocMemoryAllocator": {"get_ref_count", "ref_count_down", "ref_count_up"},
    "LazyMemoryAllocator": {"COMMIT_SIZE", "LOG_INTERVAL", "PIN_CHUNK_SIZE"},
    "MixedMemoryAllocator": {"get_paged_buffers"},
    "PagedTensorMemoryAllocator": {"get_paged_buffers"},
}
"""Public names of LMCache's classes that the shim leaves out: counts that objects have
themselves, constants of LMCache's own growth, and one tensor for each page."""


RENAMED = {"raw_size": "size"}
"""Arguments of LMCache's that have another name here: of ``AddressManager``."""


def public_names(of: type[Any]) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def assert_takes_the_same(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Every call that ``theirs`` takes means the same to ``ours``, which may take more."""
    wanted, got = parameters(theirs), parameters(ours)
    for theirs_one, our_one in zip(wanted, got, strict=False):
        assert our_one.kind is theirs_one.kind
        if theirs_one.kind is not inspect.Parameter.VAR_KEYWORD:
            assert our_one.name == RENAMED.get(theirs_one.name, theirs_one.name)
        if theirs_one.default is not inspect.Parameter.empty:
            assert our_one.default is not inspect.Parameter.empty
    assert len(got) >= len(wanted)
    for more in got[len(wanted) :]:
        assert more.default is not inspect.Parameter.empty


class TestAdapter:
    def test_every_abstract_method_is_answered(self, lm: Any) -> None:
        interface = lm.MemoryAllocatorInterface
        assert interface.__abstractmethods__ == ABSTRACT_METHODS
        assert shim.KVHeapMemoryAllocator.__abstractmethods__ == frozenset()

    def test_no_public_name_is_inherited_from_lmcache(self, lm: Any) -> None:
        """What the interface answers by itself, such as ``close``, does nothing there."""
        for name in public_names(lm.MemoryAllocatorInterface):
            own = inspect.getattr_static(shim.KVHeapMemoryAllocator, name)
            assert own is inspect.getattr_static(HeapCalls, name)
            assert_takes_the_same(own, inspect.getattr_static(lm.MemoryAllocatorInterface, name))

    def test_no_part_of_an_object_is_abstract(self, lm: Any, make: Callable[..., Any]) -> None:
        obj = make().allocate([1], shim.torch.int8)
        assert type(obj).__abstractmethods__ == frozenset()
        assert not public_names(lm.MemoryObj) - public_names(type(obj))


class TestShim:
    def test_formats_of_lmcache_are_formats_here(self, lm: Any) -> None:
        """With the same names and values; those from 101 on are kvheap's alone."""
        theirs = {fmt.name: fmt.value for fmt in lm.MemoryFormat}
        ours = {fmt.name: fmt.value for fmt in shim.MemoryFormat}
        assert theirs.items() <= ours.items()
        assert max(theirs.values()) < 101
        assert all(value >= 101 for name, value in ours.items() if name not in theirs)

    @pytest.mark.parametrize("name", MODULES)
    def test_public_names_are_those_of_lmcache(self, lm: Any, name: str) -> None:
        theirs = getattr(part_of_lmcache(MODULES[name]), name)
        missing = public_names(theirs) - public_names(getattr(shim, name))
        assert missing == NOT_IN_SHIM.get(name, set())

    @pytest.mark.parametrize("name", ["AddressManager", *ALLOCATORS])
    def test_signatures_are_those_of_lmcache(self, lm: Any, name: str) -> None:
        theirs, ours = getattr(part_of_lmcache(MODULES[name]), name), getattr(shim, name)
        for method in ("__init__", *(public_names(theirs) - NOT_IN_SHIM.get(name, set()))):
            if inspect.isfunction(getattr(theirs, method)):
                assert_takes_the_same(getattr(ours, method), getattr(theirs, method))

    @pytest.mark.parametrize("name", ALLOCATORS)
    def test_default_formats_are_those_of_lmcache(self, lm: Any, name: str) -> None:
        theirs = getattr(part_of_lmcache(MODULES[name]), name)
        for method in ("allocate", "batched_allocate"):
            default = inspect.signature(getattr(theirs, method)).parameters["fmt"].default
            assert default.name == getattr(shim, name).default_fmt.name
