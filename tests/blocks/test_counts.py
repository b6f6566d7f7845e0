"""Counts, and frees by many at once: each block is freed by exactly one."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_heaps import (
    PAGE,
    allocated_pages,
    heap_of,
    in_threads,
    no_debug,
    take,
)

from kvheap import (
    BlockInUseError,
    DoubleFreeError,
    LifetimeError,
    MemoryFormat,
    MemoryObj,
    PagedTensorMemoryAllocator,
    TensorMemoryAllocator,
)
from kvheap.blocks.counts import DROPPED, FREED, RowCounts

__all__ = ["no_debug"]


class TestDoubleFree:
    @pytest.mark.parametrize("paged", [False, True])
    def test_of_two_threads_exactly_one_succeeds(self, paged: bool) -> None:
        buffer = torch.zeros(64 * PAGE, dtype=torch.uint8)
        heap = (
            PagedTensorMemoryAllocator(buffer, [PAGE], torch.uint8)
            if paged
            else TensorMemoryAllocator(buffer)
        )
        for _ in range(100):
            batch = take(heap, 8)
            frees: list[Callable[[], object]] = [
                lambda batch=batch: heap.batched_free(batch),
                lambda batch=batch: heap.batched_free(batch[2:5]),
                lambda batch=batch: heap.free(batch[3]),
                lambda batch=batch: batch[3].ref_count_down(),
            ]
            in_threads(frees)
            assert not batch[3].is_valid()
            left = batch.live.sum()
            assert heap.stats().allocated_bytes == left * PAGE
            heap.batched_free([block for block in batch if block.is_valid()])
            assert heap.stats().allocated_bytes == 0
            assert heap.memcheck()

    def test_a_page_is_never_handed_out_twice(self) -> None:
        heap = PagedTensorMemoryAllocator(
            torch.zeros(4 * PAGE, dtype=torch.uint8), [PAGE], torch.uint8
        )
        first = heap.allocate([PAGE], torch.uint8)
        assert first is not None
        heap.free(first)
        with pytest.raises(DoubleFreeError, match="is already freed"):
            heap.free(first)
        batch = take(heap, 4)
        assert len(set(batch.addresses.tolist())) == 4

    def test_idempotent_free_frees_what_is_left(self) -> None:
        heap = heap_of(8, idempotent_free=True)
        batch = take(heap, 4)
        heap.free(batch[1])
        heap.free(batch[1])
        other = take(heap, 1)
        assert other.addresses[0] == batch.addresses[1]
        heap.batched_free([batch[1], batch[2], batch[2]])
        heap.batched_free(batch)
        heap.batched_free(batch)
        assert allocated_pages(heap) == 1
        other[0].pin()
        with pytest.raises(BlockInUseError):
            heap.free(other[0])


class TestCounts:
    def test_an_error_names_the_object_its_address_and_where_it_was_allocated(self) -> None:
        heap = heap_of(4, trace_frames=2)
        take(heap, 1).detach()
        obj = take(heap, 1)[0]
        obj.ref_count_down()
        for call in (obj.ref_count_down, obj.ref_count_up, obj.pin, obj.unpin):
            with pytest.raises(LifetimeError, match=rf"at address {PAGE} .*small_heaps.py:\d+"):
                call()

    def test_below_zero_raises_and_changes_nothing(self) -> None:
        heap = heap_of(4)
        obj = take(heap, 1)[0]
        with pytest.raises(
            LifetimeError, match=r"pin count of block 0 .* is 0: it cannot change by -1"
        ):
            obj.unpin()
        obj.pin()
        obj.ref_count_down()
        with pytest.raises(LifetimeError, match=r"reference count of block 0 .* is 0"):
            obj.ref_count_down()
        assert (obj.ref_count, obj.pin_count, obj.is_valid()) == (0, 1, True)
        obj.unpin()
        assert allocated_pages(heap) == 0

    def test_eight_threads_lose_no_update(self) -> None:
        heap = heap_of(4)
        obj = take(heap, 1)[0]

        def work() -> None:
            for _ in range(500):
                obj.ref_count_up()
                obj.pin()
            for _ in range(500):
                obj.ref_count_down()
            for _ in range(499):
                obj.unpin()

        assert in_threads([work] * 8) == [None] * 8
        assert (obj.ref_count, obj.pin_count) == (1, 8)


class TestObjects:
    def test_groups_lie_side_by_side(self) -> None:
        heap = heap_of(4)
        obj = heap.allocate([[2, 3], [5]], [torch.float32, torch.int16], MemoryFormat.UNDEFINED)
        assert obj is not None
        first, second = obj.get_tensor(0), obj.get_tensor(1)
        assert first is not None
        assert second is not None
        first.fill_(1.5)
        second.copy_(torch.arange(5))
        assert (obj.size_bytes, obj.used_bytes) == (34, 34)
        assert obj.shapes == (torch.Size([2, 3]), torch.Size([5]))
        assert bytes(obj.byte_view[24:34]) == np.arange(5, dtype=np.int16).tobytes()
        with pytest.raises(IndexError, match="group 2 is out of range: the block has 2"):
            obj.get_tensor(2)
        with pytest.raises(ValueError, match="group 1 would begin at byte 2"):
            heap.allocate([[1], [1]], [torch.int16, torch.float32])
        with pytest.raises(ValueError, match="needs one dtype for each shape"):
            heap.allocate([[1]], [torch.int16, torch.float32])

    def test_batches_of_groups_are_stored_and_gathered_as_bytes(self) -> None:
        heap = heap_of(8)
        source = torch.randint(0, 255, (4, 34), dtype=torch.uint8)
        batch = heap.batched_allocate(
            [[2, 3], [5]], [torch.int32, torch.int16], 4, MemoryFormat.UNDEFINED, source
        )
        assert batch is not None
        assert torch.equal(batch[2].get_tensor(1), source[2, 24:].view(torch.int16))  # type: ignore[arg-type]
        out = torch.empty_like(source)
        heap.batched_free(batch, out=out)
        assert torch.equal(out, source)

    def test_the_used_size_narrows(self) -> None:
        heap = heap_of(2)
        obj = heap.allocate([100], torch.float32)
        assert obj is not None
        obj.set_used_size(10)
        assert (obj.used_bytes, obj.size_bytes, len(obj.byte_view)) == (10, 400, 10)
        assert obj.tensor is not None
        assert (obj.tensor.dtype, obj.tensor.shape) == (torch.uint8, (10,))
        for wrong in (-1, PAGE + 1):
            with pytest.raises(ValueError, match=f"got {wrong}"):
                obj.set_used_size(wrong)
        heap.free(obj)
        with pytest.raises(LifetimeError, match="freed"):
            obj.set_used_size(1)

    def test_bytes_are_seen_without_a_copy(self) -> None:
        heap = heap_of(2)
        obj = heap.allocate([16], torch.uint8)
        assert obj is not None
        obj.byte_view[3] = 9
        assert heap.buffer[obj.address + 3] == 9
        assert obj.data_ptr == heap.buffer.data_ptr() + obj.address
        heap.free(obj)
        for look in (lambda: obj.byte_view, lambda: obj.data_ptr):
            with pytest.raises(LifetimeError, match="freed"):
                look()

    def test_looking_at_bytes_leaks_nothing(self) -> None:
        heap = heap_of(2)
        obj = heap.allocate([16], torch.uint8)
        assert obj is not None
        obj.byte_view  # noqa: B018
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(1000):
            obj.byte_view  # noqa: B018
        gc.collect()
        assert len(gc.get_objects()) < before + 50

    def test_objects_stay_and_metadata_travels(self) -> None:
        heap = heap_of(2)
        batch = take(heap, 2)
        for live in (batch, batch[0], batch[:1]):
            with pytest.raises(TypeError, match="send its metadata"):
                pickle.dumps(live)
            for make in (copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match=f"{type(live).__name__} cannot be copied"):
                    make(live)
        metadata = pickle.loads(pickle.dumps(batch[1].metadata))
        assert metadata == batch[1].metadata
        assert type(metadata).from_dict(metadata.to_dict()) == metadata
        whole = pickle.loads(pickle.dumps(batch.metadata))
        assert type(whole).from_dict(whole.to_dict()).blocks == batch.runs


def test_a_handle_is_on_its_block() -> None:
    heap = heap_of(2)
    batch = take(heap, 2)
    assert batch[0] == MemoryObj(batch, 0)
    assert batch == list(batch)
    assert batch != list(batch)[::-1]


@pytest.mark.parametrize("fragmented", [False, True])
def test_the_last_of_many_blocks_keeps_no_address_of_the_others(fragmented: bool) -> None:
    count = 4096
    heap = TensorMemoryAllocator(
        torch.empty((2 * count + 8) * 64, dtype=torch.uint8), align_bytes=64
    )
    holes = heap.batched_allocate([64], torch.uint8, 8)
    assert holes is not None
    if fragmented:
        heap.batched_free(holes[::2])
    batch = heap.batched_allocate([64], torch.uint8, count)
    assert batch is not None
    addresses = batch.addresses.tolist()
    last = batch[count - 1]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        heap.batched_free(batch[: count - 1])
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < count, "more than a byte for each block that is gone"
    assert batch.runs._addresses is None
    assert last.address == addresses[-1]
    heap.free(last)
    assert heap.stats().allocated_bytes == (4 if fragmented else 8) * 64


class NamesNothing:
    def describe(self, row: int) -> str:
        return f"row {row}"


class Model:
    """Counts in plain lists, whatever ``RowCounts`` keeps them in."""

    def __init__(self, num_rows: int) -> None:
        self.references = [1] * num_rows
        self.pins = [0] * num_rows

    def require_same(self, counts: RowCounts) -> None:
        live = [count >= 0 for count in self.references]
        pins = [pin if is_live else 0 for pin, is_live in zip(self.pins, live, strict=True)]
        assert counts.references().tolist() == [max(count, 0) for count in self.references]
        assert counts.pins().tolist() == pins
        assert counts.live().tolist() == live
        assert counts.all_live() == all(live)
        assert counts.count_live() == (sum(live), sum(pin > 0 for pin in pins))
        dropped = counts.rows_to_drop()
        rows = range(len(live)) if dropped is None else dropped.tolist()
        assert list(rows) == [row for row, is_live in enumerate(live) if is_live]


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_the_same_when_few_rows_are_left(seed: int) -> None:
    """Frees down to a few rows and below, with counts that change in between and frees undone."""
    source = random.Random(seed)
    num_rows = source.choice([64, 256, 1000, 5000])
    counts, model = RowCounts(num_rows), Model(num_rows)
    has_pins = seed % 2
    while any(count >= 0 for count in model.references):
        live = [row for row, count in enumerate(model.references) if count >= 0]
        idle = [row for row in live if (model.references[row], model.pins[row]) == (1, 0)]
        for row in source.sample(live, min(3, len(live))):
            held = counts.changed(row, 0, 0, NamesNothing())
            assert held == (model.references[row], model.pins[row])
            counts.references_to_change()[row] = model.references[row] = source.randint(0, 2)
            if has_pins:
                counts.pins_to_change()[row] = model.pins[row] = source.randint(0, 1)
        idle = [row for row in live if (model.references[row], model.pins[row]) == (1, 0)]
        rows = source.sample(idle, source.choice([0, min(1, len(idle)), len(idle) // 2, len(idle)]))
        found = counts.claimable(np.array(rows, np.int64), NamesNothing())
        assert found is not None
        assert found.tolist() == rows
        kind = source.choice(["free", "free", "undo", "drop"])
        status = DROPPED if kind == "drop" and len(live) < 8 else FREED
        counts.set_freed(found, status)
        for row in rows:
            model.references[row] = -1
            assert not counts.is_live(row)
            assert counts.was_dropped(row) == (status == DROPPED)
        model.require_same(counts)
        if kind == "undo":
            counts.set_live(found)
            for row in rows:
                model.references[row] = 1
            model.require_same(counts)
        if status == DROPPED:
            assert counts.forgive(found) == len(rows)
        freed = [row for row, count in enumerate(model.references) if count < 0]
        if freed:
            row = source.choice(freed)
            with pytest.raises(LifetimeError, match=f"row {row} is freed"):
                counts.changed(row, 1, 0, NamesNothing())
            with pytest.raises(DoubleFreeError, match=f"row {row} is already freed"):
                counts.claimable(np.array([row]), NamesNothing())
        model.require_same(counts)
        if not rows and not source.randrange(4):  # what is in use goes idle
            for row in live:
                counts.references_to_change()[row] = model.references[row] = 1
                if has_pins:
                    counts.pins_to_change()[row] = model.pins[row] = 0


def test_a_large_free_that_is_undone() -> None:
    counts = RowCounts(4096)
    rows = np.arange(4095)
    for _ in range(3):
        counts.set_freed(rows)
        assert counts.count_live() == (1, 0)
        counts.set_live(rows)
        assert counts.references().tolist() == [1] * 4096
