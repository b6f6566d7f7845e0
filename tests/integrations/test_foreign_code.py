"""Finalizers, handlers and interrupts inside the allocator for LMCache, without LMCache itself."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch
from foreign_code import Foreign, interrupts, no_deadlock

from kvheap import MemoryFormat, TensorMemoryAllocator
from kvheap.integrations.lmcache_adapter import BlockEnd, HeapCalls, LMCacheClasses

PAGE = 4096
OURS: dict[str, Any] = {"modules": ("kvheap.integrations",)}


class Obj(BlockEnd):
    """What the adapter needs of LMCache's ``TensorMemoryObj``."""

    def __init__(self, raw: torch.Tensor, metadata: object, parent: object) -> None:
        self.raw = raw

    def invalidate(self) -> None:
        pass


class Format(enum.Enum):
    """What it needs of LMCache's formats."""

    KV_2LTD = MemoryFormat.KV_2LTD.value
    BINARY_BUFFER = "bytes"


class Monitor:
    """Calls back in the middle of a report."""

    def update_local_cache_usage(self, size: int) -> None:
        pass

    def update_active_memory_objs_count(self, count: int) -> None:
        pass


class Allocator(HeapCalls):
    _classes = LMCacheClasses(HeapCalls, Obj)
    _metadata_type = lambda *arguments, **options: None  # type: ignore[assignment]  # noqa: E731
    _format_type = Format
    _monitor = Monitor()
    _bytes_type = bytes


def allocator_of(pages: int) -> Allocator:
    return Allocator(TensorMemoryAllocator(torch.zeros(pages * PAGE, dtype=torch.uint8)))


def take(allocator: Allocator, count: int = 1) -> list[Any]:
    found = allocator.batched_allocate([PAGE], torch.uint8, count)
    assert found is not None
    return found


CALLS = {
    "allocate": lambda allocator, objs: objs.extend(take(allocator, 2)),
    "free": lambda allocator, objs: allocator.free(objs.pop()),
    "free many": lambda allocator, objs: (allocator.batched_free(objs), objs.clear()),
    "drop": lambda allocator, objs: objs.clear(),
    "look": lambda allocator, objs: (allocator.total_allocated_size, allocator.get_memory_usage()),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("other", CALLS)
def test_a_call_in_the_middle_of_another(name: str, other: str) -> None:
    number = 0
    while True:
        allocator, objs = allocator_of(16), []
        objs += take(allocator, 2)
        others = take(allocator, 2)
        foreign = Foreign(number, lambda a=allocator, o=others: CALLS[other](a, o), **OURS)
        with no_deadlock():
            struck = foreign.strikes(lambda a=allocator, o=objs: CALLS[name](a, o))
            number_left = len(objs) + len(others)
            del objs, others, foreign
            if not struck:
                break
            assert number_left >= 0
            allocator.batched_free([])
            allocator.batched_free([])
        assert allocator.total_allocated_size == 0, number
        assert allocator.num_active_allocations == 0
        number += 1


@pytest.mark.parametrize("name", ["allocate", "free", "free many", "look"])
def test_an_exception_at_any_place_keeps_the_allocator_at_work(name: str) -> None:
    number = 0
    while True:
        allocator, objs = allocator_of(4), []
        objs += take(allocator, 2)
        kept = list(objs)  # no finalizer runs in the call
        struck = interrupts(number, lambda a=allocator, o=objs: CALLS[name](a, o), **OURS)
        if not struck:
            break
        allocator.batched_free(kept)
        del objs, kept
        allocator.batched_free([])
        allocator.batched_free(take(allocator, 4))
        assert allocator.total_allocated_size == 0
        number += 1
