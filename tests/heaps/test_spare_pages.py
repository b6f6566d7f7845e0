"""Pages that are freed by themselves wait on a stack, and no caller can tell but by their order."""

from __future__ import annotations

import random

import pytest
import torch
from foreign_code import Foreign
from small_heaps import no_debug

from kvheap import (
    DoubleFreeError,
    MemoryBatch,
    MemoryObj,
    PagedTensorMemoryAllocator,
)
from kvheap.addresses.spares import Spares
from kvheap.blocks.counts import RowCounts

__all__ = ["no_debug"]

PAGE = 576
SHAPE = [32, 9]


def pages_of(num_pages: int) -> PagedTensorMemoryAllocator:
    buffer = torch.zeros(num_pages * PAGE, dtype=torch.uint8)
    return PagedTensorMemoryAllocator(buffer, SHAPE, torch.float16, on_full=None)


def one(heap: PagedTensorMemoryAllocator) -> MemoryObj:
    obj = heap.allocate(SHAPE, torch.float16)
    assert obj is not None
    return obj


def batch_of(heap: PagedTensorMemoryAllocator, count: int) -> MemoryBatch:
    batch = heap.batched_allocate(SHAPE, torch.float16, count)
    assert batch is not None
    return batch


def free_pages(heap: PagedTensorMemoryAllocator) -> set[int]:
    found: set[int] = set()
    for start, size in heap.free_extents().tolist():
        pages = set(range(start // PAGE, (start + size) // PAGE))
        assert not found & pages
        found |= pages
    return found


@pytest.mark.parametrize("seed", range(2))
def test_every_page_is_free_or_one_owners_after_any_traffic(seed: int) -> None:
    source, heap = random.Random(seed), pages_of(160)
    second = torch.zeros(40 * PAGE, dtype=torch.uint8)
    heap.add_buffer(second)  # with a wall, across which no pages are joined
    free = set(range(200))
    live: list[list[MemoryObj]] = []

    def own(objs: list[MemoryObj]) -> None:
        pages = {obj.address // PAGE for obj in objs}
        assert len(pages) == len(objs)
        assert pages <= free
        free.difference_update(pages)
        live.append(objs)

    for _ in range(1500):
        kind = source.random()
        if kind < 0.35:
            obj = heap.allocate(SHAPE, torch.float16)
            assert (obj is None) == (not free)
            if obj is not None:
                own([obj])
        elif kind < 0.45:
            count = source.randint(2, 20)
            batch = heap.batched_allocate(SHAPE, torch.float16, count)
            assert (batch is None) == (count > len(free))
            if batch is not None:
                own(list(batch))
        elif kind < 0.90 and live:
            objs = live.pop(source.randrange(len(live)))
            free.update(obj.address // PAGE for obj in objs)
            way = source.random()
            if way < 0.5:
                for obj in objs:
                    heap.free(obj)
            elif way < 0.7:
                for obj in objs:
                    obj.ref_count_down()
            elif way < 0.9:
                heap.batched_free(objs)
            else:  # dropped
                objs, obj, batch = [], None, None
        elif kind < 0.92:
            while len(live) > 3:  # more than wait at most
                objs = live.pop()
                free.update(obj.address // PAGE for obj in objs)
                heap.batched_free(objs)
        else:
            assert heap.stats().free_bytes == len(free) * PAGE
            assert heap.max_batch(SHAPE, torch.float16) == len(free)
            assert free_pages(heap) == free
            heap.check()
    assert free_pages(heap) == free


def test_the_page_that_was_freed_last_is_taken_first() -> None:
    heap = pages_of(8)
    objs = [one(heap) for _ in range(6)]
    for number in (4, 1, 3):
        heap.free(objs[number])
    again = [one(heap) for _ in range(4)]
    assert [obj.address // PAGE for obj in again] == [3, 1, 4, 6]


def test_a_batch_takes_neighbouring_pages_among_all_that_are_free() -> None:
    heap = pages_of(8)
    objs = [one(heap) for _ in range(8)]
    for number in (4, 2, 7, 3):
        heap.free(objs[number])
    batch = batch_of(heap, 3)
    assert batch.num_runs == 1
    assert (batch.addresses // PAGE).tolist() == [2, 3, 4]
    assert heap.stats().free_extents == 1


def test_more_pages_than_wait_at_most_are_joined() -> None:
    heap = pages_of(200)
    for obj in [one(heap) for _ in range(200)]:
        heap.free(obj)
    assert batch_of(heap, 200).num_runs == 1


def test_a_waiting_page_that_is_freed_by_address_is_refused() -> None:
    heap = pages_of(4)
    obj = one(heap)
    heap.free(obj)
    with pytest.raises(DoubleFreeError, match="free already"):
        heap.address_manager.free(obj.address, PAGE)
    assert free_pages(heap) == {0, 1, 2, 3}
    heap.check()


@pytest.mark.parametrize("in_one_call", [False, True])
def test_an_owner_whose_page_was_freed_by_address_is_told(in_one_call: bool) -> None:
    heap = pages_of(4)
    heap.free(one(heap))  # waits
    first, second = one(heap), one(heap)
    if in_one_call:
        heap.address_manager.batched_free([(first.address, PAGE)])
    else:
        heap.address_manager.free(first.address, PAGE)
    with pytest.raises(DoubleFreeError, match="free already"):
        heap.free(first)
    heap.free(second)
    assert free_pages(heap) == {0, 1, 2, 3}


def test_pages_wait_nowhere_once_the_heap_is_cut() -> None:
    heap = pages_of(8)
    objs = [one(heap) for _ in range(8)]
    heap.free(objs[7])
    heap.free(objs[6])
    assert heap.address_manager.trim() == 2 * PAGE
    assert heap.allocate(SHAPE, torch.float16) is None


@pytest.mark.parametrize("frees", [False, True])
def test_whoever_asks_inside_an_operation_sees_the_pages_before_or_after_it(frees: bool) -> None:
    number = 0
    while True:
        heap = pages_of(8)
        objs = [one(heap) for _ in range(6)]
        for each in (4, 1, 3):
            heap.free(objs[each])
        seen: list[set[int]] = []

        def look(heap: PagedTensorMemoryAllocator = heap, seen: list[set[int]] = seen) -> None:
            seen.append(free_pages(heap))

        def task(heap: PagedTensorMemoryAllocator = heap, obj: MemoryObj = objs[5]) -> None:
            if frees:
                heap.free(obj)
            else:
                heap.batched_allocate(SHAPE, torch.float16, 1)

        if not Foreign(number, look).strikes(task):
            break
        before = {1, 3, 4, 6, 7}
        after = before | {5} if frees else before - {3}
        # A look from outside moves what waits: the lowest page is taken then.
        assert seen[0] in (before, after)
        assert free_pages(heap) in (after, before - {1})
        heap.check()
        number += 1
    assert number > 8


def test_a_page_whose_move_was_undone_is_not_taken_for_one_that_was_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two exceptions strike: while the stack is moved, and before the same page is freed again."""
    heap = pages_of(4)
    one(heap).ref_count_down()

    def strike(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Spares, "move_to", strike)
        with pytest.raises(KeyboardInterrupt):
            heap.stats()
    again = one(heap)  # the page from the stack
    with monkeypatch.context() as patched:
        patched.setattr(RowCounts, "set_all_freed", strike)  # right before
        with pytest.raises(KeyboardInterrupt):
            again.ref_count_down()
    assert heap.stats().free_bytes == 4 * PAGE
    assert free_pages(heap) == {0, 1, 2, 3}
