"""What the tests of ``kvheap.integrations.lmcache`` share: sizes, heaps, and LMCache itself."""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Iterator
from threading import Lock, RLock
from typing import Any

import pytest
import torch

import kvheap
from kvheap.integrations import lmcache as shim

REQUIRE = "KVHEAP_REQUIRE_LMCACHE"
"""With this environment variable set, a module of LMCache that is missing is a failure."""

INSTALL = (
    "needs LMCache: pip install -c constraints-lmcache.txt '.[lmcache-deps]' && "
    "pip install --no-deps lmcache==0.5.6"
)

MIB = 1 << 20
PAGE = 4096
HEAP_BYTES = 16 * MIB
PAGE_SHAPE = torch.Size([2, 4, 16, 256])  # 64 KiB of bfloat16
PAGED = {"shapes": [PAGE_SHAPE], "dtypes": [torch.bfloat16], "fmt": shim.MemoryFormat.KV_2LTD}
NUM_PAGES = HEAP_BYTES // (64 << 10)
SHAPE = torch.Size([2, 1, 16, 4])  # 256 bytes of bfloat16

SIZED = [
    shim.HostMemoryAllocator,
    shim.PinMemoryAllocator,
    shim.GPUMemoryAllocator,
    shim.MixedMemoryAllocator,
]
"""The allocators whose first argument is a size."""

LOCKS = (type(Lock()), type(RLock()))
SEARCHED_PACKAGES = ("kvheap", "lmcache", "threading", "queue")


def tensor_heap(size: int = HEAP_BYTES) -> shim.TensorMemoryAllocator:
    return shim.TensorMemoryAllocator(torch.zeros(size, dtype=torch.uint8))


def lazy_heap(size: int = HEAP_BYTES) -> shim.LazyMemoryAllocator:
    heap = shim.LazyMemoryAllocator(size // 4, size)
    assert heap.allocator.wait_until_grown(60)
    return heap


def paged_tensor_heap() -> shim.PagedTensorMemoryAllocator:
    return shim.PagedTensorMemoryAllocator(torch.zeros(HEAP_BYTES, dtype=torch.uint8), **PAGED)


def under(made: Any) -> kvheap.TensorMemoryAllocator:
    """The kvheap heap of any allocator of the shim."""
    return getattr(made, "pin_allocator", made.allocator)


def part_of_lmcache(name: str) -> Any:
    """Import a module of LMCache.

    Without it the test is skipped, or fails where the environment says that LMCache is there.
    """
    if os.environ.get(REQUIRE):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=INSTALL, exc_type=ImportError)


def allocated(allocator: Any) -> int:
    """Pages that are taken, after everything that was dropped came back."""
    allocator.batched_free([])
    return allocator.heap.stats().allocated_bytes // PAGE


def locks_of(name: str, root: Any) -> dict[str, Any]:
    """Every lock that ``root`` can reach through attributes and containers, by its path.

    Only objects of kvheap, of LMCache, and of the standard library's thread tools are searched.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    unseen = [(name, root)]
    while unseen:
        path, thing = unseen.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, LOCKS):
            found[path] = thing
        else:
            unseen += [(f"{path}{step}", part) for step, part in _parts(thing)]
    return found


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield f"[{key!r}]", value
    elif isinstance(thing, list | tuple | deque):
        for index, value in enumerate(thing):
            yield f"[{index}]", value
    elif type(thing).__module__.partition(".")[0] in SEARCHED_PACKAGES:
        slots = [slot for base in type(thing).__mro__ for slot in getattr(base, "__slots__", ())]
        for attribute in (*getattr(thing, "__dict__", ()), *slots):
            if hasattr(thing, attribute):
                yield f".{attribute}", getattr(thing, attribute)
