"""``out`` and ``source`` that are views of the heap: right, or refused before a byte is moved."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_heaps import PAGE, heap_of, no_debug, take

from kvheap import (
    AdHocMemoryAllocator,
    MixedMemoryAllocator,
    PagedTensorMemoryAllocator,
    TensorMemoryAllocator,
)

__all__ = ["no_debug"]

ODD = 577


def whole_of(buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in buffers]


def heap_named(name: str) -> tuple[TensorMemoryAllocator, int]:
    if name == "odd pages":
        buffer = torch.zeros(64 * ODD, dtype=torch.uint8)
        return PagedTensorMemoryAllocator(buffer, [ODD], torch.uint8), ODD
    heap = heap_of(32)
    if name == "two buffers":
        heap.add_buffer(torch.zeros(32 * PAGE, dtype=torch.uint8))
    return heap, PAGE


@pytest.mark.parametrize("name", ["plain", "two buffers", "odd pages"])
def test_views_of_the_heap_are_right_or_refused(name: str) -> None:
    refused = 0
    for seed in range(400):
        source = random.Random(seed)
        heap, unit = heap_named(name)
        size = unit - source.choice([0, 0, source.randrange(1, 400)])
        count = source.randint(1, 30)
        batch = heap.batched_allocate([size], torch.uint8, count)
        assert batch is not None
        heap.batched_write(batch, torch.randint(256, (count, size), dtype=torch.uint8))
        chosen = source.sample(range(count), source.randint(1, count))
        objs: Any = [batch[row] for row in chosen]
        if source.random() < 0.4:
            chosen = list(range(source.randrange(count), count))
            objs = batch[chosen[0] :]
        stride = source.choice([unit, size])
        first = source.randint(0, count) * unit // source.choice([1, 2, 3])
        buffer = heap.segments[0][1]
        length = (len(chosen) - 1) * stride + size
        if first + length > len(buffer):
            continue
        view = buffer.as_strided((len(chosen), size), (stride, 1), buffer.storage_offset() + first)
        blocks = [batch[row].tensor for row in chosen]
        at = [block.data_ptr() for block in blocks if block is not None]
        rows = [row.data_ptr() for row in view]
        overlap = any(a < b + size and b < a + size for a in at for b in rows)
        expected_read = torch.stack([block.clone() for block in blocks if block is not None])
        expected_write, before = view.clone(), whole_of([each for _, each in heap.segments])
        calls: dict[str, Callable[[], object]] = {
            "read": partial(heap.batched_read, objs, view),
            "write": partial(heap.batched_write, objs, view),
            "free": partial(heap.batched_free, objs, out=view),
        }
        call = source.choice(list(calls))
        if overlap:
            refused += 1
            with pytest.raises(ValueError, match="shares memory with block"):
                calls[call]()
            assert all(map(torch.equal, whole_of([each for _, each in heap.segments]), before))
            assert batch.live.all()
            continue
        calls[call]()
        if call == "write":
            assert torch.equal(heap.batched_read(objs), expected_write)
        else:
            assert torch.equal(view, expected_read)
    assert refused > 50


def test_blocks_that_become_one_block() -> None:
    heap = heap_of(8)
    parts, joined = take(heap, 3), heap.batched_allocate([3, PAGE], torch.uint8, 1)
    assert joined is not None
    heap.batched_write(parts, torch.randint(256, (3, PAGE), dtype=torch.uint8))
    whole = joined[0].tensor
    assert whole is not None
    heap.batched_read(parts[::-1], whole)
    assert torch.equal(whole, heap.batched_read(parts).flip(0))
    heap.batched_write(parts, whole)
    assert torch.equal(heap.batched_read(parts), whole)


@pytest.mark.parametrize("kind", [AdHocMemoryAllocator, lambda: MixedMemoryAllocator(heap_of(8))])
def test_rows_of_a_batch_that_change_places(kind: Any) -> None:
    heap = kind()
    batch = heap.batched_allocate([PAGE], torch.uint8, 3)
    rows = torch.randint(256, (3, PAGE), dtype=torch.uint8)
    heap.batched_write(batch, rows)
    first = batch[0].tensor
    view = first.as_strided((3, PAGE), (PAGE, 1), first.storage_offset())
    for objs in (batch[::-1], [batch[1], batch[2], batch[0]], batch):
        with pytest.raises(ValueError, match=r"source shares memory with block .* source\.clone"):
            heap.batched_write(objs, view)
        with pytest.raises(ValueError, match="out shares memory with block"):
            heap.batched_read(objs, view)
        with pytest.raises(ValueError, match="out shares memory with block"):
            heap.batched_free(objs, out=view)
    assert torch.equal(heap.batched_read(batch), rows)
    heap.batched_write(batch[::-1], view.clone())
    assert torch.equal(heap.batched_read(batch), rows.flip(0))
    same = batch[0].tensor[None].expand(2, PAGE)
    heap.batched_write(batch[1:], same)
    assert torch.equal(heap.batched_read(batch), rows[2].expand(3, PAGE))
