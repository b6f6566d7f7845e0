"""Which bytes go where between two sets of blocks, against a loop that copies block by block."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, heap_on
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fixtures import device

from kvheap import (
    AddressBatch,
    AdHocMemoryAllocator,
    BlockRuns,
    ClosedError,
    ForeignObjectError,
    LifetimeError,
    MemoryBatch,
    MemorySegment,
    TensorMemoryAllocator,
)
from kvheap.blocks.rows import Rows
from kvheap.kernels.pieces import Pieces
from kvheap.transfer import block_runs, extents, paired_runs

__all__ = ["device"]

SHAPE = [250]
SIZE = 1000
"""Bytes of a block's contents; a heap that aligns to 256 adds 24 bytes of padding."""


KEPT: list[MemoryBatch] = []


def heap_of(blocks: int, align_bytes: int = 256, buffers: int = 1) -> TensorMemoryAllocator:
    step = -(-SIZE // align_bytes) * align_bytes
    make = [torch.zeros(blocks * step, dtype=torch.uint8) for _ in range(buffers)]
    heap = TensorMemoryAllocator(make[0], align_bytes)
    for buffer in make[1:]:
        heap.add_buffer(buffer)
    return heap


def take(heap: TensorMemoryAllocator, count: int, free: Any = None) -> MemoryBatch:
    """Blocks with random contents; with ``free``, in the place of some of an earlier batch."""
    if free is not None:
        room = heap.batched_allocate(SHAPE, torch.float32, heap.max_batch(SHAPE, torch.float32))
        assert room is not None
        heap.batched_free([room[row] for row in free])
        KEPT[:] = [*KEPT[-1:], room]  # of the heaps of one test
    batch = heap.batched_allocate(SHAPE, torch.float32, count, source=torch.rand(count, *SHAPE))
    assert batch is not None
    return batch


def carry_out(pieces: Pieces) -> None:
    """Copy the pieces as a transfer library would: by address."""
    for source, target, size in zip(
        pieces.sources, pieces.targets, pieces.size_array(), strict=True
    ):
        ctypes.memmove(int(target), int(source), int(size))


def contents(blocks: Any) -> torch.Tensor:
    return torch.stack([obj.tensor.clone() for obj in blocks])


class TestExtents:
    def test_of_a_batch_are_where_its_tensors_are(self) -> None:
        batch = take(heap_of(8), 4)
        starts, sizes = batch.extents()
        assert starts.tolist() == [batch[0].data_ptr]
        assert sizes.tolist() == [4 * 1024]
        assert batch.allocator.buffer.data_ptr() == starts[0]  # type: ignore[attr-defined]

    def test_without_padding_are_the_contents(self) -> None:
        batch = take(heap_of(8), 4)
        starts, sizes = batch.extents(padding=False)
        assert starts.tolist() == [obj.data_ptr for obj in batch]
        assert sizes.tolist() == [SIZE] * 4

    @pytest.mark.parametrize("rows", [[2, 3, 4], [4, 3, 2], [0, 2, 3], [1, 1], []])
    @pytest.mark.parametrize("as_what", ["rows", "Rows", "objects"])
    def test_of_some_rows_in_their_order(self, rows: list[int], as_what: str) -> None:
        batch = take(heap_of(8), 6)
        if as_what == "rows":
            found = batch.extents(rows)
        elif as_what == "Rows":
            found = extents(Rows(batch, np.array(rows, np.int64)))
        elif rows:
            found = extents([batch[row] for row in rows])
        else:
            return
        places = [batch[row].data_ptr + byte for row in rows for byte in range(1024)]
        covered = [
            start + byte
            for start, size in zip(found.starts.tolist(), found.sizes.tolist(), strict=True)
            for byte in range(size)
        ]
        assert covered == places

    def test_no_extent_crosses_a_buffer_also_if_the_next_one_follows(self) -> None:
        memory = torch.zeros(8 << 10, dtype=torch.uint8)
        heap = TensorMemoryAllocator(memory[: 4 << 10], 1024)
        heap.add_buffer(memory[4 << 10 :])
        batch = heap.batched_allocate([256], torch.float32, 8)
        assert batch is not None
        view = heap.view(AddressBatch(1024, [0], [8]), [256], torch.float32)
        for found in (batch.extents(), view.extents(), extents(batch[:])):
            assert found.starts.tolist() == [memory.data_ptr(), memory.data_ptr() + 4096]
            assert found.sizes.tolist() == [4096, 4096]

    def test_of_objects_of_several_batches_in_their_order(self) -> None:
        heap = heap_of(8)
        one, other = take(heap, 2), take(heap, 2)
        objs = [other[1], one[0], one[1], other[0]]
        starts, sizes = extents(objs)
        assert starts.tolist() == [other[1].data_ptr, one[0].data_ptr]
        assert sizes.tolist() == [1024, 3072]

    def test_of_memory_without_a_heap(self) -> None:
        batch = AdHocMemoryAllocator().batched_allocate([8], torch.float32, 3)
        assert batch is not None
        starts, sizes = batch.extents()
        assert (starts.tolist(), sizes.tolist()) == ([batch[0].data_ptr], [96])

    def test_of_memory_on_a_device(self, device: FakeDevice) -> None:
        heap = heap_on(device, "device", 1 << 14)
        batch = heap.batched_allocate([1024], torch.uint8, 2)
        assert batch is not None
        assert batch.extents().starts.tolist() == [heap.segments[0][1].data_ptr()]

    def test_what_is_freed_or_closed_or_no_row_has_none(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        for rows in ([4], [-1]):
            with pytest.raises(ValueError, match=r"rows must be from 0 to 3: rows\[0\] is"):
                batch.extents(rows)
        with pytest.raises(TypeError, match="rows must be integers"):
            batch.extents([0.5])
        with pytest.raises(TypeError, match="padding must be True or False, got 'no'"):
            batch.extents(padding="no")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="MemoryBatch or a list of its objects"):
            extents(torch.zeros(4))  # type: ignore[arg-type]
        some = batch[:]
        heap.free(batch[1])
        for find in (batch.extents, lambda: batch.extents([1]), lambda: extents(some)):
            with pytest.raises(LifetimeError, match="is freed"):
                find()
        assert len(batch.extents([0, 2]).starts) == 2
        heap.close()
        with pytest.raises(ClosedError):
            batch.extents([0])


class TestPairedRuns:
    @settings(deadline=None)
    @given(data=st.data(), aligned=st.tuples(*[st.sampled_from([256, 512, 8, 1024, 4096])] * 2))
    def test_copied_by_address_is_copied_block_by_block(
        self, data: st.DataObject, aligned: tuple[int, int]
    ) -> None:
        count = data.draw(st.integers(1, 12))
        sides = []
        for align_bytes in aligned:
            heap = heap_of(24, align_bytes, data.draw(st.integers(1, 2)))
            free = data.draw(st.permutations(range(24)))[: count + data.draw(st.integers(0, 3))]
            sides.append(take(heap, count, free))
        rows = data.draw(st.permutations(range(count)))
        shuffled = [sides[0][row] for row in rows]
        source = data.draw(st.sampled_from([sides[0], shuffled, block_runs(sides[0])]))
        expected = contents(shuffled if source is shuffled else sides[0])
        around = [
            b.clone()
            for _, b in sides[1].allocator.segments  # type: ignore[attr-defined]
        ]
        pieces = paired_runs(source, sides[1])
        assert len(pieces) <= count
        carry_out(pieces)
        assert torch.equal(contents(sides[1]), expected)
        # Nothing else was written: neither other blocks, nor more padding than the blocks' own.
        inside = {
            (n, at)
            for n, (_, b) in enumerate(sides[1].allocator.segments)  # type: ignore[attr-defined]
            for obj in sides[1]
            for at in range(obj.data_ptr - b.data_ptr(), obj.data_ptr - b.data_ptr() + 1024)
            if 0 <= at < len(b)
        }
        for n, (_, b) in enumerate(sides[1].allocator.segments):  # type: ignore[attr-defined]
            for at in np.flatnonzero((b != around[n]).numpy()).tolist():
                assert (n, at) in inside

    def test_neighbours_on_both_sides_are_one_run(self) -> None:
        source, target = take(heap_of(8), 6), take(heap_of(16), 6, [1, 2, 3, 7, 8, 12])
        pieces = paired_runs(source, target)
        assert pieces.size_array().tolist() == [3 * 1024, 2 * 1024, 1024]

    def test_much_padding_is_not_copied(self) -> None:
        source, target = take(heap_of(8, 2048), 3), take(heap_of(8, 2048), 3)
        assert paired_runs(source, target).size_array().tolist() == [SIZE] * 3

    def test_another_machines_addresses_may_be_ours(self) -> None:
        """Both heaps begin at the same address, each in its own process."""
        batch = take(heap_of(8), 3)
        (base, *_), _ = batch.extents()
        there = MemorySegment(0, 8 << 10, int(base))
        metadata = batch.metadata
        runs = BlockRuns.placed(metadata.blocks, metadata.layout.size_bytes, [there])
        for pieces in (paired_runs(runs, batch), paired_runs(batch, runs)):
            assert pieces.sources.tolist() == pieces.targets.tolist() == [int(base)]
            assert pieces.num_bytes == 3 * 1024

    def test_a_copy_onto_itself_is_refused(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        with pytest.raises(ValueError, match="overlaps the source"):
            paired_runs(batch, batch)
        with pytest.raises(ValueError, match="targets overlap"):
            paired_runs(batch[:2], [take(heap, 1)[0]] * 2)
        runs = block_runs(batch)
        twice = BlockRuns(np.repeat(runs.starts, 2), np.array([2, 2]), SIZE, 1024)
        with pytest.raises(ValueError, match="targets overlap"):
            paired_runs(batch, twice)

    def test_addresses_of_a_device_are_not_compared_with_the_hosts(
        self, device: FakeDevice
    ) -> None:
        near, far = heap_on(device, "device", 1 << 14), heap_on(device, "host", 1 << 14)
        sides = [heap.batched_allocate([4096], torch.uint8, 2) for heap in (near, far)]
        assert len(paired_runs(sides[0], sides[1])) == 1  # type: ignore[arg-type]

    def test_blocks_that_do_not_match_are_refused(self) -> None:
        one, other = heap_of(8), heap_of(8)
        batch = take(one, 3)
        with pytest.raises(ValueError, match="the source has 3 blocks, the target 2"):
            paired_runs(batch, take(other, 2))
        small = other.batched_allocate([249], torch.float32, 3)
        with pytest.raises(ValueError, match=r"the source's blocks are \(250,\)"):
            paired_runs(batch, small)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="have 1000 bytes, the target's 996"):
            paired_runs(batch, block_runs(small))  # type: ignore[arg-type]
        with pytest.raises(ForeignObjectError):
            paired_runs([batch[0], take(other, 1)[0]], batch[:2])
        with pytest.raises(TypeError, match="MemoryBatch or a list"):
            paired_runs(torch.zeros(3), batch)  # type: ignore[arg-type]

    def test_nothing_is_paired_with_nothing(self) -> None:
        batch, other = take(heap_of(8), 0), take(heap_of(8), 0)
        assert len(paired_runs(batch, other)) == 0
