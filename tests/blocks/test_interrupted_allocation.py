"""An exception anywhere in an operation of a heap loses no byte, and gives none two owners.

Every operation is interrupted at every place where CPython runs signal handlers, and before every
bytecode. Afterwards it was undone or done, and the heap accounts for every byte.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from foreign_code import TimeOutError, interrupts
from heap_scenes import OPERATIONS, Scene, require_that_every_byte_is_accounted_for
from small_heaps import PAGE, heap_of, no_debug, take

from kvheap import BlockLayout, MemoryFormat

__all__ = ["no_debug"]


def run(
    name: str, options: dict[str, Any], everywhere: bool, number: int, num_spares: int = 0
) -> bool:
    """Whether the operation was interrupted; accounts for every byte afterwards."""
    scene = Scene(options)
    for spare in [scene.take(1) for _ in range(num_spares)]:
        scene.heap.batched_free(spare)

    def task() -> None:
        OPERATIONS[name](scene)

    struck = interrupts(number, task, TimeOutError, function="task", everywhere=everywhere)
    if name == "detach" and not scene.kept and not scene.batch.live.any():
        # Done, but its result did not arrive: the batch still has the addresses.
        scene.kept.append(tuple(address // PAGE for address in scene.batch.addresses.tolist()))
    require_that_every_byte_is_accounted_for(scene)
    return struck


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_signal_handler_that_raises_loses_no_byte(name: str) -> None:
    number, step = 0, 23 if "filled" in name or "out" in name else 1  # a copy has many places
    while run(name, {}, False, number):
        number += step
    assert number >= 8


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_exception_before_any_bytecode_loses_no_byte(name: str) -> None:
    number, step = 0, 151 if "filled" in name or "out" in name else 7
    while run(name, {}, True, number):
        number += step
    assert number > 40


@pytest.mark.parametrize("options", [{"scrub": True}, {"debug": True}])
@pytest.mark.parametrize("name", ["allocate", "free a batch", "free of several", "reclaim dropped"])
def test_nor_while_bytes_are_wiped(name: str, options: dict[str, Any]) -> None:
    number = 0
    while run(name, options, False, number):
        number += 11  # wiping is a copy too
    assert number > 8


PAGED = ("allocate", "allocate one", "free a lone object", "free lone objects")


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("num_spares", [0, 3])
def test_nor_in_a_heap_whose_lone_pages_wait_for_the_next_block(
    name: str, num_spares: int, caplog: pytest.LogCaptureFixture
) -> None:
    page = BlockLayout.of([PAGE], torch.uint8, MemoryFormat.UNDEFINED)
    number = 0
    while run(name, {"page_layout": page}, True, number, num_spares):
        number += 3
    assert number > 40
    assert not caplog.records  # no page was given back twice


@pytest.mark.parametrize("options", [{}, {"scrub": True}, {"debug": True}])
def test_an_interrupted_free_leaves_no_cycle(options: dict[str, bool]) -> None:
    gc.collect()
    gc.disable()  # as engines do
    try:
        number, struck = 0, True
        while struck:
            heap = heap_of(4, **options)
            batch = take(heap, 2)
            free = partial(heap.batched_free, batch)
            struck = interrupts(number, free, TimeOutError, everywhere=True)
            found = weakref.ref(batch)
            del batch, free
            assert found() is None, f"place {number}"
            number += 5
        assert number > 100
    finally:
        gc.enable()
