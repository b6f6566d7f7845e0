"""Fixtures for the integrations: heaps by LMCache's names, and kvheap's heap inside LMCache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lmcache_scenes import (
    HEAP_BYTES,
    PAGE,
    PAGED,
    SIZED,
    lazy_heap,
    paged_tensor_heap,
    part_of_lmcache,
    tensor_heap,
)

import kvheap
from kvheap.integrations import lmcache as shim


@pytest.fixture(params=[tensor_heap, lazy_heap, *SIZED], ids=lambda make: make.__name__)
def heap(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each of the shim's heaps, of 16 MiB."""
    made = request.param(HEAP_BYTES)
    yield made
    made.close()


@pytest.fixture(params=[paged_tensor_heap, *SIZED], ids=lambda make: f"{make.__name__}-paged")
def pages(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each of the shim's heaps that can be paged, of 256 pages."""
    make = request.param
    made = make(HEAP_BYTES, use_paging=True, **PAGED) if make in SIZED else make()
    yield made
    made.close()


@pytest.fixture(scope="session")
def lm() -> Any:
    """LMCache's memory management."""
    module = part_of_lmcache("lmcache.v1.memory_management")
    config = part_of_lmcache("lmcache.v1.config").LMCacheEngineConfig.from_defaults()
    part_of_lmcache("lmcache.v1.pin_monitor").PinMonitor.GetOrCreate(config)
    return module


@pytest.fixture
def make(lm: Any) -> Callable[..., Any]:
    """Makes a KVHeapMemoryAllocator over a heap of so many pages."""

    def make(pages: int = 64, **options: Any) -> Any:
        buffer = torch.zeros(pages * PAGE, dtype=torch.uint8)
        return shim.KVHeapMemoryAllocator(kvheap.TensorMemoryAllocator(buffer, **options))

    return make
