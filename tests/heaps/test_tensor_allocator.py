"""TensorMemoryAllocator, MemoryBatch and MemoryObj: contents, counts, and every wrong use."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_heaps import FakeStream

from kvheap import (
    BlockInUseError,
    DoubleFreeError,
    ForeignObjectError,
    LifetimeError,
    MemoryFormat,
    MemoryObj,
    NegativeBatchSizeError,
    TensorMemoryAllocator,
)
from kvheap.heaps import segments

PAGE = 4096
SHAPE = (2, 1, 16, 4)  # 512 bytes of float32: an eighth of a page


def heap_of(pages: int) -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.full((pages * PAGE,), 0xA5, dtype=torch.uint8))


def random_blocks(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, *SHAPE).to(dtype)


class TestBuffer:
    @pytest.mark.parametrize(
        "buffer",
        [
            torch.zeros(4, 2048, dtype=torch.float16),
            torch.zeros(PAGE, dtype=torch.bool),
            torch.zeros(PAGE // 8, dtype=torch.complex64),
            torch.zeros(0),
            torch.zeros(5000, dtype=torch.uint8)[8:],
        ],
    )
    def test_any_contiguous_tensor_will_do(self, buffer: torch.Tensor) -> None:
        heap = TensorMemoryAllocator(buffer)
        total = buffer.numel() * buffer.element_size()
        assert heap.stats().heap_bytes == total // PAGE * PAGE
        assert heap.buffer.data_ptr() == buffer.data_ptr()

    def test_a_buffer_of_one_element(self) -> None:
        element = torch.zeros(1, dtype=torch.complex128).as_strided((1, 1), (5, 7))
        assert TensorMemoryAllocator(element, align_bytes=16).stats().heap_bytes == 16

    @pytest.mark.parametrize("size_bytes", [0, PAGE])
    def test_a_buffer_without_memory_is_refused(self, size_bytes: int) -> None:
        lost = torch.zeros(2 * PAGE, dtype=torch.uint8)
        lost.untyped_storage().resize_(size_bytes)
        with pytest.raises(ValueError, match=rf"buffer ends at byte 8192 .* to {size_bytes} bytes"):
            TensorMemoryAllocator(lost)
        assert lost.untyped_storage().nbytes() == size_bytes

    def test_holes_in_the_buffer_are_refused(self) -> None:
        with pytest.raises(ValueError, match="contiguous"):
            TensorMemoryAllocator(torch.zeros(4, 4)[:, ::2])

    def test_a_dtype_needs_its_alignment(self) -> None:
        heap = TensorMemoryAllocator(torch.zeros(64, dtype=torch.uint8), align_bytes=2)
        with pytest.raises(ValueError, match=r"float32 .* needs addresses that are multiples of 4"):
            heap.allocate([1], torch.float32)
        odd = TensorMemoryAllocator(torch.zeros(65, dtype=torch.uint8)[1:], align_bytes=16)
        with pytest.raises(ValueError, match="starts at byte 1"):
            odd.allocate([1], torch.float16)
        assert heap.stats().allocated_bytes == odd.stats().allocated_bytes == 0


class TestAllocate:
    def test_an_object_says_what_it_is(self) -> None:
        heap = heap_of(4)
        first = heap.allocate([1], torch.uint8)
        assert first is not None
        obj = heap.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD)
        assert obj is not None
        assert (obj.shape, obj.dtype, obj.fmt) == (SHAPE, torch.float32, MemoryFormat.KV_2LTD)
        assert (obj.address, obj.size_bytes, obj.allocated_bytes) == (PAGE, 512, PAGE)
        assert (obj.ref_count, obj.pin_count, obj.is_valid()) == (1, 0, True)
        assert obj.tensor is not None
        obj.tensor.fill_(1.5)
        assert heap.buffer[PAGE : PAGE + 512].view(torch.float32).eq(1.5).all()
        assert heap.buffer[PAGE + 512 :].eq(0xA5).all()

    def test_a_full_heap_gives_none(self) -> None:
        heap = heap_of(2)
        assert heap.allocate([3 * PAGE], torch.uint8) is None
        assert heap.batched_allocate([PAGE], torch.uint8, 3) is None
        assert heap.batched_allocate([1], torch.uint8, 3, source=torch.zeros(3, 1).byte()) is None
        assert heap.stats().allocated_bytes == 0

    @pytest.mark.parametrize("shape", [[0], [2, -1], [2, 0, 3]])
    def test_a_shape_without_elements_is_refused(self, shape: list[int]) -> None:
        with pytest.raises(ValueError, match="at least one element"):
            heap_of(1).allocate(shape, torch.uint8)

    def test_a_negative_batch_is_refused(self) -> None:
        with pytest.raises(NegativeBatchSizeError):
            heap_of(1).batched_allocate([1], torch.uint8, -1, source=torch.zeros(0, 1).byte())

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (torch.zeros(2, *SHAPE), "must have shape"),
            (torch.zeros(3, 128), "must have shape"),
            (torch.zeros(3, *SHAPE, dtype=torch.float16), "must be torch.float32, got"),
            (torch.zeros(3, *SHAPE, device="meta"), "must be on cpu, got meta"),
            (torch.zeros(3, *SHAPE[::-1]).permute(0, 4, 3, 2, 1), "must be contiguous"),
        ],
    )
    def test_a_wrong_source_allocates_nothing(self, source: torch.Tensor, message: str) -> None:
        heap = heap_of(4)
        with pytest.raises(ValueError, match=message):
            heap.batched_allocate(SHAPE, torch.float32, 3, source=source)
        assert heap.stats().allocated_bytes == 0

    def test_a_failed_scatter_allocates_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object) -> None:
            raise KeyboardInterrupt

        heap = heap_of(4)
        monkeypatch.setattr("kvheap.heaps.segments.copy_run", fail)
        with pytest.raises(KeyboardInterrupt):
            heap.batched_allocate(SHAPE, torch.float32, 3, source=random_blocks(3))
        assert heap.stats().allocated_bytes == 0


class TestPartialBatches:
    def test_the_first_blocks_of_the_source_are_stored(self) -> None:
        heap = heap_of(5)
        keep = heap.batched_allocate([PAGE], torch.uint8, 5)
        assert keep is not None
        heap.batched_free([keep[0], keep[2], keep[4]])
        source = random_blocks(9)
        assert heap.batched_allocate(SHAPE, torch.float32, 9, source=source) is None
        batch = heap.batched_allocate(SHAPE, torch.float32, 9, source=source, allow_partial=True)
        assert batch is not None
        assert (len(batch), batch.num_runs) == (3, 3)
        out = torch.empty(3, *SHAPE)
        heap.batched_free(batch, out=out)
        assert torch.equal(out, source[:3])

    def test_none_at_all_is_an_empty_batch(self) -> None:
        heap = heap_of(1)
        keep = heap.allocate([1], torch.uint8)
        assert keep is not None
        batch = heap.batched_allocate([1], torch.uint8, 4, allow_partial=True)
        assert batch is not None
        assert (len(batch), list(batch)) == (0, [])
        heap.batched_free(batch)

    def test_max_batch_counts_blocks_of_a_shape(self) -> None:
        heap = heap_of(5)
        assert heap.max_batch(SHAPE, torch.float32) == 5
        assert heap.max_batch([PAGE + 1], torch.uint8) == 2
        assert heap.max_batch([6 * PAGE], torch.uint8) == 0
        with pytest.raises(ValueError, match="at least one element"):
            heap.max_batch([0], torch.uint8)


class TestContents:
    @given(
        holes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
        count=st.integers(0, 12),
        padding=st.integers(0, 2),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.uint8]),
    )
    @settings(max_examples=60, deadline=None)
    def test_a_batch_goes_in_and_comes_out(
        self, holes: list[int], count: int, padding: int, dtype: torch.dtype
    ) -> None:
        heap = heap_of(sum(holes) + len(holes))
        pages = heap.batched_allocate([PAGE], torch.uint8, sum(holes) + len(holes))
        assert pages is not None
        start = 0
        for hole in holes:
            heap.batched_free(pages[start : start + hole])
            start += hole + 1
        count = min(count, sum(holes))
        source = torch.randint(0, 100, (count, *SHAPE[:-1], SHAPE[-1])).to(dtype)
        batch = heap.batched_allocate(SHAPE, dtype, count, source=source)
        assert batch is not None
        for block, expected in zip(batch, source, strict=True):
            assert block.tensor is not None
            assert torch.equal(block.tensor, expected)
        out = torch.zeros(count, SHAPE[0] + padding, *SHAPE[1:], dtype=dtype)[:, : SHAPE[0]]
        heap.batched_free(batch, out=out)
        assert torch.equal(out, source)
        assert heap.stats().allocated_bytes == len(holes) * PAGE
        heap.address_manager.check()

    def test_objects_come_out_in_the_order_they_are_named(self) -> None:
        heap = heap_of(16)
        source = random_blocks(8)
        first = heap.batched_allocate(SHAPE, torch.float32, 4, source=source[:4])
        second = heap.batched_allocate(SHAPE, torch.float32, 4, source=source[4:])
        assert first is not None
        assert second is not None
        order = [5, 1, 7, 0]
        both = [*first, *second]
        out = torch.empty(4, *SHAPE)
        heap.batched_free([both[i] for i in order], out=out)
        assert torch.equal(out, source[order])
        assert heap.stats().allocated_bytes == 4 * PAGE

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            (torch.zeros(2, *SHAPE), "must have shape"),
            (torch.zeros(3, *SHAPE, dtype=torch.float16), "must be torch.float32"),
            (torch.zeros(3, *SHAPE, device="meta"), "must be on cpu"),
            (torch.zeros(1, *SHAPE).expand(3, *SHAPE), "overlap"),
        ],
    )
    def test_a_wrong_out_frees_nothing(self, out: torch.Tensor, message: str) -> None:
        heap = heap_of(4)
        batch = heap.batched_allocate(SHAPE, torch.float32, 3)
        assert batch is not None
        with pytest.raises(ValueError, match=message):
            heap.batched_free(batch, out=out)
        with pytest.raises(ValueError, match=message):
            heap.batched_free(list(batch), out=out)
        assert batch.live.all()
        assert heap.stats().allocated_bytes == 3 * PAGE

    @pytest.mark.parametrize("num_blocks", [1, 3, 300])
    def test_a_tensor_without_memory_is_refused(self, num_blocks: int) -> None:
        heap, lost = heap_of(300), random_blocks(num_blocks)
        batch = heap.batched_allocate(SHAPE, torch.float32, num_blocks)
        assert batch is not None
        lost.untyped_storage().resize_(0)  # as FSDP does
        with pytest.raises(ValueError, match=r"out ends at byte .* resized to 0 bytes"):
            heap.batched_free(batch, out=lost)
        with pytest.raises(ValueError, match="out ends at byte"):
            heap.batched_read(batch, out=lost)
        with pytest.raises(ValueError, match="source ends at byte"):
            heap.batched_write(batch, lost)
        assert batch.live.all()
        heap.batched_free(batch)
        with pytest.raises(ValueError, match="source ends at byte"):
            heap.batched_allocate(SHAPE, torch.float32, num_blocks, source=lost)
        assert heap.stats().allocated_bytes == 0

    @pytest.mark.parametrize("num_blocks", [1, 3, 8, 70])
    @pytest.mark.parametrize("shape", [(3, 1), (1,)])
    def test_the_stride_of_one_element_does_not_matter(
        self, num_blocks: int, shape: tuple[int, ...]
    ) -> None:
        heap, values = heap_of(150), torch.rand(num_blocks, *shape).half()
        strides = (*values.stride()[:-1], 5)  # as after transpose()
        source = values.clone().as_strided(values.shape, strides)
        batch = heap.batched_allocate(shape, torch.float16, num_blocks, source=source)
        other = heap.batched_allocate(shape, torch.float16, num_blocks)
        assert batch is not None
        assert other is not None
        assert torch.equal(heap.batched_read(batch), values)
        heap.batched_write(other, source)
        out = torch.zeros_like(values).as_strided(values.shape, strides)
        assert torch.equal(heap.batched_read(other, out=out), values)
        out.zero_()
        heap.batched_free(batch, out=out)
        assert torch.equal(out, values)

    def test_sparse_blocks_are_refused(self) -> None:
        heap, sparse = heap_of(3), random_blocks(3).to_sparse()
        batch = heap.batched_allocate(SHAPE, torch.float32, 3)
        assert batch is not None
        with pytest.raises(ValueError, match="each block of source must be contiguous"):
            heap.batched_write(batch, sparse)
        with pytest.raises(ValueError, match="each block of out must be contiguous"):
            heap.batched_free(batch, out=sparse)
        assert batch.live.all()

    @pytest.mark.parametrize("size_bytes", [24, PAGE - 8, PAGE, 3 * PAGE - 4])
    @pytest.mark.parametrize("num_blocks", range(1, 8))
    def test_few_blocks_of_any_size(self, size_bytes: int, num_blocks: int) -> None:
        heap = heap_of(40)
        heap.buffer.fill_(0xA5)
        first = heap.allocate([PAGE], torch.uint8)
        source = torch.randint(0, 256, (num_blocks, size_bytes), dtype=torch.uint8)
        batch = heap.batched_allocate([size_bytes], torch.uint8, num_blocks, source=source)
        assert first is not None
        assert batch is not None
        expected = torch.full_like(heap.buffer, 0xA5)
        step = -(-size_bytes // PAGE) * PAGE
        for row, block in enumerate(source):
            expected[PAGE + row * step :][:size_bytes] = block
        assert torch.equal(heap.buffer, expected)
        guarded = torch.full((num_blocks + 2, size_bytes), 0x5A, dtype=torch.uint8)
        heap.batched_free(batch, out=guarded[1:-1])
        assert torch.equal(guarded[1:-1], source)
        assert guarded[0].eq(0x5A).all()
        assert guarded[-1].eq(0x5A).all()
        assert torch.equal(heap.buffer, expected)

    def test_what_happens_to_the_blocks_during_a_gather_counts(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heap, out = heap_of(4), torch.empty(3, *SHAPE)
        copy = segments.copy_run
        meanwhile: list[Callable[[], object]] = []

        def copy_and_more(*arguments: object) -> bool:
            meanwhile.pop()()
            return copy(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(segments, "copy_run", copy_and_more)
        batch = heap.batched_allocate(SHAPE, torch.float32, 3)
        assert batch is not None
        meanwhile.append(batch[1].pin)
        with pytest.raises(BlockInUseError, match="pin count 1"):
            heap.batched_free(batch, out=out)
        assert batch.live.all()
        batch[1].unpin()
        meanwhile.append(partial(heap.free, batch[2]))
        with pytest.raises(DoubleFreeError, match="block 2 of 3"):
            heap.batched_free(batch, out=out)
        heap.batched_free(batch[:2])
        other = heap.batched_allocate(SHAPE, torch.float32, 3)
        assert other is not None
        stream = FakeStream()
        stream.submit()
        meanwhile.append(partial(other.record_stream, stream))
        heap.batched_free(other, out=out)
        assert heap.stats().pending_bytes == 3 * PAGE

    def test_a_failed_gather_frees_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object) -> None:
            raise KeyboardInterrupt

        heap = heap_of(4)
        batch = heap.batched_allocate(SHAPE, torch.float32, 3)
        assert batch is not None
        monkeypatch.setattr("kvheap.heaps.segments.copy_run", fail)
        with pytest.raises(KeyboardInterrupt):
            heap.batched_free(batch, out=torch.empty(3, *SHAPE))
        assert batch.live.all()
        heap.batched_free(batch)
        assert heap.stats().allocated_bytes == 0

    def test_out_needs_blocks_of_one_kind(self) -> None:
        heap = heap_of(4)
        objs = [heap.allocate([4], torch.float32), heap.allocate([4], torch.int32)]
        with pytest.raises(ValueError, match="one layout"):
            heap.batched_free([obj for obj in objs if obj], out=torch.zeros(2, 4))
        heap.batched_free([obj for obj in objs if obj])
        assert heap.stats().allocated_bytes == 0


class TestFree:
    @pytest.fixture
    def heap(self) -> TensorMemoryAllocator:
        return heap_of(16)

    def batch(self, heap: TensorMemoryAllocator) -> list[MemoryObj]:
        batch = heap.batched_allocate(SHAPE, torch.float32, 8)
        assert batch is not None
        return list(batch)

    def test_a_freed_object_is_gone(self, heap: TensorMemoryAllocator) -> None:
        obj = self.batch(heap)[3]
        heap.free(obj)
        assert obj.tensor is None
        assert not obj.is_valid()
        for use in (obj.ref_count_up, obj.ref_count_down, obj.pin, obj.unpin):
            with pytest.raises(LifetimeError, match=f"at address {obj.address} .* is freed"):
                use()

    def test_a_double_free_raises_however_it_is_spelled(self, heap: TensorMemoryAllocator) -> None:
        batch = heap.batched_allocate(SHAPE, torch.float32, 8)
        assert batch is not None
        heap.free(batch[0])
        heap.batched_free([batch[1], batch[2]])
        before = heap.stats()
        for again in (
            [batch[1]],
            [batch[3], batch[2]],
            [batch[3], batch[3]],
            [batch[3], batch[-5]],
            batch,
        ):
            with pytest.raises(DoubleFreeError):
                heap.batched_free(again)
        assert heap.stats() == before
        heap.batched_free(batch[3:])
        with pytest.raises(DoubleFreeError):
            heap.batched_free(batch)
        assert heap.stats().allocated_bytes == 0
        heap.address_manager.check()

    @pytest.mark.parametrize(
        "rows", [[2, 3, 4], [4, 3, 2], [0, 5, 2, 3], [1, 3, 2, 4], [7], [6, 7], [0, 2, 4], []]
    )
    @pytest.mark.parametrize("options", [{}, {"scrub": True}, {"debug": True}])
    @pytest.mark.parametrize("has_gap", [False, True])
    def test_rows_are_freed_and_no_others(
        self, rows: list[int], options: dict[str, bool], has_gap: bool
    ) -> None:
        heap = TensorMemoryAllocator(torch.zeros(16 * PAGE, dtype=torch.uint8), **options)
        held = [heap.allocate([PAGE], torch.uint8) for _ in range(12 if has_gap else 0)]
        for obj in held[3:5] + held[7:9] + held[11:]:
            heap.free(obj)
        batch = heap.batched_allocate([PAGE], torch.uint8, 8)
        assert (batch.num_runs > 1) == has_gap
        for row, obj in enumerate(batch):
            obj.tensor.fill_(row + 1)
        heap.batched_free([batch[row] for row in rows])
        assert heap.memcheck()
        live = [row not in rows for row in range(8)]
        assert batch.live.tolist() == live
        others = sum(obj.is_valid() for obj in held)
        assert heap.stats().allocated_bytes == (sum(live) + others) * PAGE
        for row in np.flatnonzero(live):
            assert (batch[int(row)].tensor == row + 1).all()
        again = heap.batched_allocate([PAGE], torch.uint8, 16 - others - sum(live))
        assert not set(again.addresses) & set(batch.addresses[live])

    def test_a_double_free_does_not_hit_the_next_owner(self, heap: TensorMemoryAllocator) -> None:
        first = heap.allocate([4], torch.float32)
        assert first is not None
        heap.free(first)
        second = heap.allocate([4], torch.float32)
        assert second is not None
        assert second.address == first.address
        with pytest.raises(DoubleFreeError):
            heap.free(first)
        assert second.is_valid()
        assert heap.stats().allocated_bytes == PAGE

    def test_objects_of_another_heap_are_refused(self, heap: TensorMemoryAllocator) -> None:
        mine, other = self.batch(heap), heap_of(16)
        theirs = other.batched_allocate(SHAPE, torch.float32, 2)
        assert theirs is not None
        for wrong in (theirs, [theirs[0]], [mine[0], theirs[1]]):
            with pytest.raises(ForeignObjectError):
                heap.batched_free(wrong)
        with pytest.raises(TypeError, match="only a MemoryObj can be freed, got 'x'"):
            heap.batched_free([mine[0], "x"])  # type: ignore[list-item]
        assert all(obj.is_valid() for obj in [*mine, *theirs])

    def test_held_blocks_are_not_freed(self, heap: TensorMemoryAllocator) -> None:
        mine = self.batch(heap)
        mine[0].ref_count_up()
        mine[1].pin()
        for held in (0, 1):
            with pytest.raises(BlockInUseError, match="is in use"):
                heap.batched_free([mine[2], mine[held]])
        assert mine[2].is_valid()
        mine[0].ref_count_down()
        mine[1].unpin()
        heap.batched_free(mine)

    def test_nothing_is_nothing(self, heap: TensorMemoryAllocator) -> None:
        heap.batched_free([])
        heap.batched_free([], out=torch.empty(0, *SHAPE))
        with pytest.raises(ValueError, match="out has 1 rows, but there are no blocks"):
            heap.batched_free([], out=torch.empty(1, *SHAPE))
        empty = heap.batched_allocate(SHAPE, torch.float32, 0, source=torch.empty(0, *SHAPE))
        assert empty is not None
        heap.batched_free(empty, out=torch.empty(0, *SHAPE))


class TestCounts:
    def test_it_lives_until_both_counts_are_zero(self) -> None:
        heap = heap_of(2)
        obj = heap.allocate([1], torch.uint8)
        assert obj is not None
        obj.pin()
        obj.ref_count_up()
        obj.ref_count_down()
        obj.ref_count_down()
        assert (obj.ref_count, obj.pin_count, obj.is_valid()) == (0, 1, True)
        with pytest.raises(LifetimeError, match=r"reference count .* is 0"):
            obj.ref_count_down()
        obj.unpin()
        assert not obj.is_valid()
        assert heap.stats().allocated_bytes == 0

    def test_counts_never_go_below_zero(self) -> None:
        obj = heap_of(1).allocate([1], torch.uint8)
        assert obj is not None
        with pytest.raises(LifetimeError, match=r"pin count of block 0 .* is 0"):
            obj.unpin()
        assert (obj.ref_count, obj.pin_count) == (1, 0)

    def test_handles_on_a_block_share_its_counts(self) -> None:
        batch = heap_of(4).batched_allocate([1], torch.uint8, 3)
        assert batch is not None
        batch[1].pin()
        assert batch[1] == batch[-2]
        assert hash(batch[1]) == hash(batch[-2])
        assert batch[1] != batch[0]
        assert batch.pin_counts.tolist() == [0, 1, 0]
        assert batch.ref_counts.tolist() == [1, 1, 1]
        assert batch[-2].pin_count == 1
        with pytest.raises(IndexError):
            batch[3]

    def test_of_eight_threads_exactly_one_frees(self) -> None:
        heap = heap_of(64)
        batch = heap.batched_allocate([1], torch.uint8, 64)
        assert batch is not None
        freed: list[int] = []
        barrier = threading.Barrier(8)

        def work(seed: int) -> None:
            rows = list(range(64))
            random.Random(seed).shuffle(rows)
            barrier.wait()
            for row in rows:
                try:
                    heap.free(batch[row])
                except DoubleFreeError:
                    continue
                freed.append(row)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(freed) == list(range(64))
        assert heap.stats().allocated_bytes == 0
        assert heap.memcheck()

    def test_counts_from_many_threads_lose_no_update(self) -> None:
        heap = heap_of(1)
        obj = heap.allocate([1], torch.uint8)
        assert obj is not None

        def work() -> None:
            for _ in range(2000):
                obj.ref_count_up()
                obj.pin()
                obj.unpin()
                obj.ref_count_down()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (obj.ref_count, obj.pin_count) == (1, 0)


class TestBatch:
    def test_it_is_arrays(self) -> None:
        heap = heap_of(8)
        batch = heap.batched_allocate(SHAPE, torch.float32, 5)
        assert batch is not None
        assert batch.addresses.dtype == np.int64
        assert batch.addresses.tolist() == [i * PAGE for i in range(5)]
        assert (batch.num_runs, len(batch), batch.allocated_bytes) == (1, 5, PAGE)
        assert [obj.address for obj in batch] == batch.addresses.tolist()
        heap.free(batch[2])
        assert batch.live.tolist() == [True, True, False, True, True]

    @pytest.mark.parametrize(
        ("fmt", "dim"), [("KV_2LTD", 2), ("KV_T2D", 0), ("KV_2TD", 1), ("KV_MLA_FMT", 2)]
    )
    def test_the_format_tells_the_token_dimension(self, fmt: str, dim: int) -> None:
        assert MemoryFormat[fmt].token_dim() == dim


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_sources_may_be_on_the_host() -> None:
    heap = TensorMemoryAllocator(torch.zeros(64 << 20, dtype=torch.uint8, device="cuda"))
    source = random_blocks(1000)
    for there in (source, source.cuda()):
        batch = heap.batched_allocate(SHAPE, torch.float32, 1000, source=there)
        assert batch is not None
        out = torch.empty(1000, *SHAPE, device="cuda")
        heap.batched_free(batch, out=out)
        assert torch.equal(out.cpu(), source)
    batch = heap.batched_allocate(SHAPE, torch.float32, 4)
    assert batch is not None
    with pytest.raises(ValueError, match="out must be on cuda"):
        heap.batched_free(batch, out=torch.empty(4, *SHAPE))


def test_an_allocation_that_cannot_fit_does_not_wait_for_the_frees_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread frees all the time: that is no sign that more will become free."""
    buffer = torch.zeros(4 * 4096, dtype=torch.uint8)
    heap = TensorMemoryAllocator(buffer, on_full=None, stream_wait_s=3600.0)
    waiting = [heap.allocate([1], torch.uint8) for _ in range(3)]
    calls = 0

    def settle_beside_another_thread(limit: int | None = 8) -> bool:
        nonlocal calls
        calls += 1
        obj = waiting.pop()
        assert obj is not None
        obj.ref_count_down()
        return settle(limit)

    settle = heap.lifetime.reclaimer.settle
    monkeypatch.setattr(heap.lifetime.reclaimer, "settle", settle_beside_another_thread)
    assert heap.allocate([5 * 4096], torch.uint8) is None
    assert calls == 1


class TestListsOfLoneObjects:
    def test_any_lists_of_any_neighbours(self) -> None:
        heap, source = heap_of(24), random.Random(3)
        heap.add_buffer(torch.zeros(8 * PAGE, dtype=torch.uint8))
        live: list[MemoryObj] = []
        for _ in range(300):
            while len(live) < source.randint(0, 30):
                obj = heap.allocate([source.choice([100, PAGE, 2 * PAGE])], torch.uint8)
                if obj is None:
                    break
                live.append(obj)
            source.shuffle(live)
            freed = live[: source.randint(0, len(live))]
            heap.batched_free(freed)
            live = live[len(freed) :]
            assert not any(obj.is_valid() for obj in freed)
            assert heap.stats().allocated_bytes == sum(obj.allocated_bytes for obj in live)
            heap.check()

    def test_one_that_somebody_else_has_freed_keeps_no_other(self) -> None:
        heap = heap_of(4)
        objs = [heap.allocate([PAGE], torch.uint8) for _ in range(4)]
        assert objs[1] is not None
        heap.address_manager.free(objs[1].address, PAGE)
        with pytest.raises(DoubleFreeError, match="free already"):
            heap.batched_free([obj for obj in objs if obj])
        assert heap.stats().allocated_bytes == 0
        heap.check()

    @pytest.mark.parametrize("wrong", ["twice", "freed", "pinned", "foreign", "no object"])
    def test_a_wrong_list_frees_nothing(self, wrong: str) -> None:
        heap, other = heap_of(4), heap_of(1)
        objs: list[Any] = [heap.allocate([PAGE], torch.uint8) for _ in range(3)]
        gone, error = heap.allocate([PAGE], torch.uint8), DoubleFreeError
        assert gone is not None
        heap.free(gone)
        if wrong == "pinned":
            objs[2].pin()
        added: dict[str, Any] = {
            "twice": [objs[1]],
            "freed": [gone],
            "foreign": [other.allocate([PAGE], torch.uint8)],
            "no object": [3],
        }
        errors = {"pinned": BlockInUseError, "foreign": ForeignObjectError, "no object": TypeError}
        with pytest.raises(errors.get(wrong, error)):
            heap.batched_free([*objs, *added.get(wrong, [])])
        assert all(obj.is_valid() for obj in objs)
        assert heap.stats().allocated_bytes == 3 * PAGE
