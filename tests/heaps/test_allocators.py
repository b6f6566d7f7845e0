"""Every allocator of the family: where its bytes are, how it grows, ends, and travels."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from heap_makers import MIB, makers

from kvheap import (
    AdHocMemoryAllocator,
    BlockLayout,
    BytesBufferMemoryObj,
    ClosedError,
    DoubleFreeError,
    ForeignObjectError,
    GPUMemoryAllocator,
    HostBuffer,
    HostMemoryAllocator,
    LazyMemoryAllocator,
    LifetimeError,
    MemoryAllocatorInterface,
    MemoryBatchMetadata,
    MemoryFormat,
    MixedMemoryAllocator,
    NegativeBatchSizeError,
    PagedKVCache,
    PagedTensorMemoryAllocator,
    PinMemoryAllocator,
    TensorMemoryAllocator,
    offload,
)

PAGE = 4096
MAKERS = makers([64, 16])


class FakeRegistrar:
    """Pins nothing, remembers everything, and fails where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.ranges: dict[int, int] = {}
        self.calls = 0
        self.fail_at = fail_at

    def register(self, pointer: int, num_bytes: int) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("cudaErrorMemoryAllocation")
        self.ranges[pointer] = num_bytes

    def unregister(self, pointer: int) -> None:
        del self.ranges[pointer]


@pytest.mark.parametrize("name", MAKERS)
class TestEveryAllocator:
    @pytest.fixture
    def heap(self, name: str) -> MemoryAllocatorInterface:
        return MAKERS[name]()

    def test_blocks_come_and_go(self, heap: MemoryAllocatorInterface) -> None:
        with heap:
            obj = heap.allocate([64, 16], torch.float32)
            batch = heap.batched_allocate([64, 16], torch.float32, 5)
            assert obj is not None
            assert batch is not None
            assert len(batch) == 5
            obj.byte_view[0] = 1
            batch[4].byte_view[0] = 2
            assert [obj.byte_view[0], batch[4].byte_view[0]] == [1, 2]
            assert sum(group.num_blocks for group in heap.leaks()) == 6
            heap.free(obj)
            heap.batched_free([batch[3], batch[0]])
            batch[1].ref_count_down()
            with pytest.raises(DoubleFreeError):
                heap.free(obj)
            with pytest.raises(LifetimeError):
                batch[1].ref_count_down()
            heap.batched_free(batch[i] for i in (2, 4))
            assert heap.leaks() == ()
            assert heap.memcheck()

    def test_a_closed_allocator_is_closed(self, heap: MemoryAllocatorInterface) -> None:
        obj = heap.allocate([64, 16], torch.float32)
        assert obj is not None
        with heap:
            pass
        assert heap.closed
        heap.close()
        for use in (
            lambda: heap.allocate([4], torch.float32),
            lambda: heap.batched_allocate([4], torch.float32, 2),
            lambda: heap.free(obj),
            lambda: heap.batched_free([]),
            lambda: obj.byte_view,
            heap.__enter__,
        ):
            with pytest.raises(ClosedError, match="is closed"):
                use()
        assert "Allocator(" in repr(heap)

    def test_strangers_and_negative_batches_are_refused(
        self, heap: MemoryAllocatorInterface
    ) -> None:
        stranger = TensorMemoryAllocator(torch.zeros(PAGE, dtype=torch.uint8))
        obj = stranger.allocate([4], torch.float32)
        assert obj is not None
        with pytest.raises(ForeignObjectError):
            heap.free(obj)
        with pytest.raises(TypeError, match="only a MemoryObj can be freed"):
            heap.free("nothing")  # type: ignore[arg-type]
        with pytest.raises(NegativeBatchSizeError):
            heap.batched_allocate([4], torch.float32, -1)
        with pytest.raises(RuntimeError):
            heap.batched_allocate([4], torch.float32, -1)
        empty = heap.batched_allocate([4], torch.float32, 0)
        assert empty == []
        heap.close()


FILLED = [name for name in MAKERS if name != "buffer"]


class TestOneContract:
    """Every allocator fills and collects by the same rules."""

    @pytest.mark.parametrize("name", FILLED)
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (torch.zeros(2, dtype=torch.uint8), "source must have shape"),
            (torch.zeros(3, 4), "source must have shape"),
            (torch.zeros(2, 4, dtype=torch.int16), "source must be torch.float32"),
            (torch.zeros(2, 16, dtype=torch.uint8), "source must have shape"),
            (torch.zeros(4, 2).t(), "each block of source must be contiguous"),
            (torch.zeros(2, 4, device="meta"), "source must be on cpu"),
            (torch._neg_view(torch.zeros(2, 4)), "source is a lazy conj or neg view"),
        ],
    )
    def test_a_source_that_does_not_match(
        self, name: str, source: torch.Tensor, message: str
    ) -> None:
        with MAKERS[name]() as allocator:
            with pytest.raises(ValueError, match=message):
                allocator.batched_allocate([4], torch.float32, 2, source=source)
            assert allocator.leaks() == ()

    @pytest.mark.parametrize("name", FILLED)
    @pytest.mark.parametrize(
        ("out", "message"),
        [
            (torch.zeros(2, 4, dtype=torch.int8), "out must be torch.float32"),
            (torch.zeros(1, 4), "out must have shape"),
            (torch.zeros(2, 5), "out must have shape"),
            (torch.zeros(1, 4).expand(2, 4), "the rows of out overlap"),
            (torch._neg_view(torch.zeros(2, 4)), "out is a lazy conj or neg view"),
        ],
    )
    def test_an_out_that_does_not_match(self, name: str, out: torch.Tensor, message: str) -> None:
        with MAKERS[name]() as allocator:
            batch = allocator.batched_allocate([4], torch.float32, 2)
            assert batch is not None
            with pytest.raises(ValueError, match=message):
                allocator.batched_free(batch, out=out)
            assert batch.live.all()
            allocator.batched_free(batch)

    @pytest.mark.parametrize("name", FILLED)
    def test_groups_go_in_and_come_out_as_bytes(self, name: str) -> None:
        source = torch.arange(3 * 22, dtype=torch.uint8).reshape(3, 22)
        shapes, dtypes = [[2, 2], [3]], [torch.float32, torch.int16]
        with MAKERS[name]() as allocator:
            batch = allocator.batched_allocate(shapes, dtypes, 3, source=source)
            assert batch is not None
            out = torch.zeros_like(source)
            allocator.batched_free(batch, out=out)
            assert torch.equal(out, source)


class TestOptions:
    @pytest.mark.parametrize("name", ["gpu", "host", "pin", "lazy", "paged"])
    def test_all_heaps_take_them(self, name: str) -> None:
        options = {"scrub": True, "idempotent_free": True}
        made = {
            "gpu": lambda: GPUMemoryAllocator(MIB, allow_cpu=True, **options),
            "host": lambda: HostMemoryAllocator(MIB, **options),
            "pin": lambda: PinMemoryAllocator(MIB, allow_unpinned=True, **options),
            "lazy": lambda: LazyMemoryAllocator(MIB, MIB, pin="no", **options),
            "paged": lambda: PagedTensorMemoryAllocator(
                torch.zeros(MIB, dtype=torch.uint8), [PAGE], torch.uint8, **options
            ),
        }
        with made[name]() as heap:
            obj = heap.allocate([PAGE], torch.uint8)
            assert obj is not None
            tensor = obj.tensor
            assert tensor is not None
            tensor.fill_(5)
            heap.free(obj)
            heap.free(obj)
            assert tensor.eq(0).all()


class TestDevice:
    @pytest.mark.parametrize("align_bytes", [16, 4096, 1 << 21])
    def test_the_base_address_is_aligned(self, align_bytes: int) -> None:
        heap = GPUMemoryAllocator(4 << 20, "cpu", align_bytes)
        batch = heap.batched_allocate([100], torch.uint8, 2)
        assert batch is not None
        assert [obj.data_ptr % align_bytes for obj in batch] == [0, 0]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
    def test_without_cuda_it_must_be_asked_for(self) -> None:
        with pytest.raises(RuntimeError, match="allow_cpu=True"):
            GPUMemoryAllocator(MIB)

    @pytest.mark.parametrize(("size", "align_bytes"), [(-1, 16), (16, 0), (16, 3)])
    def test_wrong_sizes_are_refused(self, size: int, align_bytes: int) -> None:
        with pytest.raises(ValueError, match=rf"got .*{size if size < 0 else align_bytes}"):
            GPUMemoryAllocator(size, "cpu", align_bytes)

    @pytest.mark.gpu
    def test_on_a_gpu(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        source = torch.randn(100, 1000).cuda()
        with GPUMemoryAllocator(4 << 20, align_bytes=1 << 16) as heap:
            batch = heap.batched_allocate([1000], torch.float32, 60, source=source[:60])
            assert batch is not None
            assert all(obj.data_ptr % (1 << 16) == 0 for obj in batch)
            out = torch.empty_like(source[:60])
            heap.batched_free(batch, out=out)
            assert torch.equal(out, source[:60])
        with PinMemoryAllocator(4 << 20) as pinned:
            assert pinned.stats().pinned_bytes == 4 << 20
            obj = pinned.allocate([1000], torch.float32)
            assert obj is not None
            obj.tensor.copy_(source[0], non_blocking=True)  # type: ignore[union-attr]
            torch.cuda.synchronize()
            assert torch.equal(obj.tensor, source[0].cpu())  # type: ignore[arg-type]


class TestPinned:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
    def test_without_cuda_it_must_be_allowed(self) -> None:
        with pytest.raises(RuntimeError, match="CUDA"):
            PinMemoryAllocator(MIB)
        with PinMemoryAllocator(MIB, allow_unpinned=True) as heap:
            assert heap.stats().pinned_bytes == 0

    def test_no_block_straddles_two_registrations(self) -> None:
        registrar = FakeRegistrar()
        with PinMemoryAllocator(10 * PAGE, registrar=registrar, piece_bytes=4 * PAGE) as heap:
            assert sorted(registrar.ranges.values()) == [2 * PAGE, 4 * PAGE, 4 * PAGE]
            assert heap.stats().pinned_bytes == 10 * PAGE
            assert heap.max_batch([3 * PAGE], torch.uint8) == 2
            assert heap.free_extents()[:, 0].tolist() == [0, 4 * PAGE, 8 * PAGE]
        assert registrar.ranges == {}

    def test_pages_end_at_registrations_too(self) -> None:
        registrar = FakeRegistrar()
        heap = PinMemoryAllocator(
            5 * 3 * PAGE,
            registrar=registrar,
            piece_bytes=7 * PAGE,
            page_layout=BlockLayout.of([3 * PAGE], torch.uint8, MemoryFormat.KV_2LTD),
        )
        assert sorted(registrar.ranges.values()) == [3 * PAGE, 6 * PAGE, 6 * PAGE]
        assert len(heap.batched_allocate([3 * PAGE], torch.uint8, 5) or ()) == 5
        heap.close()

    def test_a_piece_that_fails_is_an_error_or_visible(self) -> None:
        registrar = FakeRegistrar(fail_at=2)
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            PinMemoryAllocator(10 * PAGE, registrar=registrar, piece_bytes=4 * PAGE)
        assert registrar.ranges == {}
        registrar = FakeRegistrar(fail_at=2)
        heap = PinMemoryAllocator(
            10 * PAGE, registrar=registrar, piece_bytes=4 * PAGE, allow_unpinned=True
        )
        assert heap.stats().pinned_bytes == 6 * PAGE
        heap.close()
        assert registrar.ranges == {}


class TestLazy:
    def test_it_starts_small_and_grows(self) -> None:
        registrar = FakeRegistrar()
        seen: list[int] = []
        pinned_when_seen: list[int] = []
        begin = threading.Event()

        def watch(progress: object) -> None:
            seen.append(progress.committed_bytes)  # type: ignore[attr-defined]
            pinned_when_seen.append(sum(registrar.ranges.values()))
            begin.wait(10)

        with LazyMemoryAllocator(
            PAGE, 64 * PAGE, piece_bytes=16 * PAGE, registrar=registrar, on_progress=watch
        ) as heap:
            assert heap.allocate([PAGE], torch.uint8) is not None
            assert heap.stats().heap_bytes < 64 * PAGE
            begin.set()
            assert heap.wait_until_grown(30)
            assert heap.progress.done
            stats = heap.stats()
            assert (stats.heap_bytes, stats.pinned_bytes) == (64 * PAGE, 64 * PAGE)
            assert seen == [17 * PAGE, 33 * PAGE, 49 * PAGE, 64 * PAGE]
            assert all(
                pinned >= known for pinned, known in zip(pinned_when_seen, seen, strict=True)
            )
            assert heap.max_batch([16 * PAGE], torch.uint8) == 3  # pieces stay apart
            assert heap.memcheck()
        assert registrar.ranges == {}

    def test_plain_memory_grows_into_one_extent(self) -> None:
        with LazyMemoryAllocator(PAGE, 64 * PAGE, pin="no", piece_bytes=16 * PAGE) as heap:
            heap.wait_until_grown()
            obj = heap.allocate([64 * PAGE], torch.uint8)
            assert obj is not None
            obj.tensor.fill_(3)  # type: ignore[union-attr]

    def test_closing_stops_growth_at_once(self) -> None:
        registrar = FakeRegistrar()
        first = threading.Event()
        heap = LazyMemoryAllocator(
            PAGE,
            1 << 40,
            piece_bytes=16 * PAGE,
            registrar=registrar,
            on_progress=lambda progress: first.set(),
        )
        assert first.wait(30)
        heap.close()
        calls = registrar.calls
        assert registrar.ranges == {}
        assert not any(thread.name == "kvheap-growth" for thread in threading.enumerate())
        assert registrar.calls == calls < 100_000

    def test_a_failure_ends_growth_and_is_kept(self) -> None:
        registrar = FakeRegistrar(fail_at=3)
        heap = LazyMemoryAllocator(PAGE, 64 * PAGE, piece_bytes=16 * PAGE, registrar=registrar)
        with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
            heap.wait_until_grown()
        assert heap.stats().heap_bytes == heap.progress.committed_bytes == 17 * PAGE
        assert heap.progress.error is not None
        assert heap.allocate([16 * PAGE], torch.uint8) is not None
        heap.close()
        assert registrar.ranges == {}

    def test_a_large_range_costs_nothing_to_reserve(self) -> None:
        with LazyMemoryAllocator(64 << 20, 16 << 30, pin="no") as heap:
            assert heap.stats().heap_bytes >= 64 << 20
            assert heap.host_buffer.size_bytes == 16 << 30

    @pytest.mark.parametrize(
        ("sizes", "options", "message"),
        [
            ((2 * PAGE, PAGE), {}, "between 0 and final_size"),
            ((0, 0), {}, "between 0 and final_size"),
            ((0, PAGE), {"pin": "maybe"}, "pin must be"),
            ((0, PAGE), {"piece_bytes": 0}, "piece_bytes must be positive, got 0"),
        ],
    )
    def test_wrong_arguments_are_refused(
        self, sizes: tuple[int, int], options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            LazyMemoryAllocator(*sizes, **{"pin": "no", **options})  # type: ignore[arg-type]


class TestSegments:
    @pytest.fixture
    def heap(self) -> TensorMemoryAllocator:
        heap = TensorMemoryAllocator(torch.zeros(4 * PAGE + 100, dtype=torch.uint8))
        heap.add_buffer(torch.zeros(2 * PAGE, dtype=torch.uint8))
        heap.add_buffer(torch.zeros(3 * PAGE + 1, dtype=torch.uint8))
        return heap

    def test_a_batch_goes_through_all_buffers(self, heap: TensorMemoryAllocator) -> None:
        assert (heap.stats().heap_bytes, heap.stats().segments) == (9 * PAGE, 3)
        source = torch.randint(0, 255, (9, PAGE), dtype=torch.uint8)
        batch = heap.batched_allocate([PAGE], torch.uint8, 9, source=source)
        assert batch is not None
        for obj, expected in zip(batch, source, strict=True):
            assert torch.equal(obj.tensor, expected)  # type: ignore[arg-type]
        starts = [start for start, _ in heap.segments]
        assert starts == [0, 4 * PAGE, 6 * PAGE]
        order = torch.randperm(9)
        out = torch.empty_like(source)
        heap.batched_free([batch[int(i)] for i in order], out=out)
        assert torch.equal(out, source[order])
        assert heap.memcheck()

    def test_a_buffer_is_added_once(self, heap: TensorMemoryAllocator) -> None:
        for buffer in [heap.segments[1][1], heap.segments[0][1][PAGE : 3 * PAGE]]:
            with pytest.raises(ValueError, match="shares memory with the heap's buffer at "):
                heap.add_buffer(buffer)
        assert (heap.stats().heap_bytes, heap.stats().segments) == (9 * PAGE, 3)

    def test_readers_see_whole_states_while_buffers_are_added(self) -> None:
        """Addresses, starts and buffers are published together."""
        heap = TensorMemoryAllocator(torch.zeros(PAGE, dtype=torch.uint8), on_full=None)
        errors: list[BaseException] = []
        ended = threading.Event()

        def read() -> None:
            try:
                while not ended.is_set():
                    batch = heap.batched_allocate([PAGE], torch.uint8, 40, allow_partial=True)
                    assert batch is not None
                    absolute, _ = heap.absolute(batch.addresses)
                    assert len(absolute) == len(batch)
                    out = torch.empty(len(batch), PAGE, dtype=torch.uint8)
                    heap.batched_free(batch, out=out)
                    assert heap.stats().segments <= len(heap.segments)
            except BaseException as caught:
                errors.append(caught)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(60):
            heap.add_buffer(torch.zeros(PAGE, dtype=torch.uint8))
        ended.set()
        for thread in threads:
            thread.join()
        assert errors == []
        assert heap.stats().heap_bytes == 61 * PAGE

    @pytest.mark.parametrize("round_number", range(30))
    def test_whoever_uses_a_heap_while_it_is_closed_is_told(self, round_number: int) -> None:
        """ClosedError, whatever the moment: between any two looks at the heap it may be closed."""
        heap = TensorMemoryAllocator(torch.zeros(16 * PAGE, dtype=torch.uint8), scrub=True)
        heap.add_buffer(torch.zeros(2 * PAGE, dtype=torch.uint8))
        errors: list[BaseException] = []

        def use() -> None:
            source = torch.zeros(18, PAGE, dtype=torch.uint8)
            try:
                while True:
                    batch = heap.batched_allocate([PAGE], torch.uint8, 18, source=source)
                    if batch is not None:
                        heap.batched_free(batch, out=source)
            except BaseException as caught:
                errors.append(caught)

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.0005 * (round_number % 7))
        heap.close()
        for thread in threads:
            thread.join()
        assert [type(error) for error in errors] == [ClosedError] * 2

    def test_no_block_straddles_two(self, heap: TensorMemoryAllocator) -> None:
        batch = heap.batched_allocate([2 * PAGE], torch.uint8, 9, allow_partial=True)
        assert batch is not None
        assert batch.addresses.tolist() == [0, 2 * PAGE, 4 * PAGE, 6 * PAGE]
        for number, obj in enumerate(batch):
            obj.tensor.fill_(number + 1)  # type: ignore[union-attr]
        sums = [int(buffer.sum()) for _, buffer in heap.segments]
        assert sums == [2 * PAGE * 3, 2 * PAGE * 3, 2 * PAGE * 4]
        with pytest.raises(ValueError, match="3 buffers: use segments"):
            heap.buffer  # noqa: B018

    def test_scrub_and_poison_find_their_buffer(self) -> None:
        for option in ({"scrub": True}, {"debug": True}):
            heap = TensorMemoryAllocator(torch.ones(PAGE, dtype=torch.uint8), **option)
            heap.add_buffer(torch.ones(2 * PAGE, dtype=torch.uint8))
            batch = heap.batched_allocate([PAGE], torch.uint8, 3)
            assert batch is not None
            heap.batched_free(batch)
            assert all(int(buffer.eq(1).sum()) == 0 for _, buffer in heap.segments)
            again = heap.batched_allocate([PAGE], torch.uint8, 3)
            assert again is not None

    def test_wrong_buffers_are_refused(self, heap: TensorMemoryAllocator) -> None:
        with pytest.raises(ValueError, match="contiguous"):
            heap.add_buffer(torch.zeros(4, 4)[:, ::2])
        with pytest.raises(ValueError, match="at least 4096 bytes, got 100"):
            heap.add_buffer(torch.zeros(100, dtype=torch.uint8))
        with pytest.raises(ValueError, match="must be on cpu, got meta"):
            heap.add_buffer(torch.zeros(PAGE, device="meta"))
        lazy = LazyMemoryAllocator(PAGE, 1 << 40, pin="no", piece_bytes=PAGE)
        with lazy, pytest.raises(ValueError, match="does not cover its last buffer"):
            lazy.add_buffer(torch.zeros(PAGE, dtype=torch.uint8))


class TestPaged:
    def heap(self, pages: int) -> PagedTensorMemoryAllocator:
        buffer = torch.zeros(pages * 576 + 100, dtype=torch.uint8)
        return PagedTensorMemoryAllocator(buffer, [[32, 9]], [torch.float16], MemoryFormat.KV_T2D)

    def test_pages_have_the_size_of_their_layout(self) -> None:
        heap = self.heap(7)
        assert (heap.num_pages, heap.page_bytes) == (7, 576)
        source = torch.randn(6, 32, 9).half()
        batch = heap.batched_allocate([32, 9], torch.float16, 6, source=source)
        assert batch is not None
        assert batch.num_runs == 1
        assert batch.addresses.tolist() == [576 * i for i in range(6)]
        out = torch.empty_like(source)
        heap.batched_free(batch, out=out)
        assert torch.equal(out, source)

    def test_a_smaller_block_takes_a_page_and_tells_its_own_size(self) -> None:
        heap = self.heap(2)
        small = heap.allocate([19, 9], torch.float16)
        assert small is not None
        assert (small.size_bytes, small.allocated_bytes, small.get_size()) == (342, 576, 342)
        assert small.tensor is not None
        assert small.tensor.shape == (19, 9)
        heap.free(small)
        again = heap.allocate([32, 9], torch.float16)
        assert again is not None
        assert again.get_size() == 576

    def test_a_larger_block_is_refused(self) -> None:
        heap = self.heap(4)
        with pytest.raises(ValueError, match="594 bytes, more than a page of 576"):
            heap.allocate([33, 9], torch.float16)
        with pytest.raises(ValueError, match="more than a page"):
            heap.max_batch([33, 9], torch.float16)
        assert heap.batched_allocate([32, 9], torch.float16, 5) is None
        assert heap.stats().allocated_bytes == 0

    def test_batches_prefer_neighbours(self) -> None:
        heap = self.heap(100)
        batch = heap.batched_allocate([32, 9], torch.float16, 100)
        assert batch is not None
        heap.batched_free([batch[i] for i in (*range(0, 40, 2), *range(50, 80))])
        second = heap.batched_allocate([32, 9], torch.float16, 30)
        assert second is not None
        assert second.num_runs == 1


class TestBytes:
    def test_a_mixed_allocator_sends_bytes_elsewhere(self) -> None:
        with MixedMemoryAllocator(HostMemoryAllocator(MIB)) as mixed:
            payload = mixed.allocate([512, 10], None, MemoryFormat.BINARY_BUFFER)  # type: ignore[arg-type]
            tensor = mixed.allocate([512, 10], torch.float32)
            assert isinstance(payload, BytesBufferMemoryObj)
            assert (len(payload.byte_array), payload.tensor, payload.get_tensor(0)) == (
                512,
                None,
                None,
            )
            assert mixed.stats().allocated_bytes == 5 * PAGE
            assert mixed.snapshot().bytes_by_state()["live"] == 5 * PAGE
            with pytest.raises(ForeignObjectError, match="cannot be freed in the same call"):
                mixed.batched_free([payload, tensor])  # type: ignore[list-item]
            mixed.free(payload)
            mixed.free(tensor)  # type: ignore[arg-type]
            assert mixed.leaks() == ()
            with pytest.raises(ValueError, match=r"other than MemoryFormat\.UNDEFINED"):
                mixed.allocate([4], torch.float32, MemoryFormat.UNDEFINED)

    def test_ad_hoc_blocks_are_filled_and_collected(self) -> None:
        heap = AdHocMemoryAllocator()
        source = torch.randn(4, 3, 5)
        batch = heap.batched_allocate([3, 5], torch.float32, 4, source=source)
        assert batch[2].tensor is not None
        assert torch.equal(batch[2].tensor, source[2])
        out = torch.empty_like(source)
        heap.batched_free(batch, out=out)
        assert torch.equal(out, source)


class TestView:
    def test_a_view_reads_what_another_heap_of_the_same_bytes_allocated(self) -> None:
        buffer = torch.zeros(8 * PAGE, dtype=torch.uint8)
        scheduler, worker = TensorMemoryAllocator(buffer), TensorMemoryAllocator(buffer)
        source = torch.randn(3, 2, 8)
        batch = scheduler.batched_allocate([2, 8], torch.float32, 3, source=source)
        assert batch is not None
        wrapped = worker.view(MemoryBatchMetadata.from_dict(batch.metadata.to_dict()))
        by_address = worker.view(batch.addresses, [2, 8], torch.float32)
        for view in (wrapped, by_address):
            assert torch.equal(torch.stack([obj.tensor for obj in view]), source)  # type: ignore[misc]
            with pytest.raises(ForeignObjectError, match="only the process that allocated it"):
                worker.batched_free(view)
            view[0].ref_count_up()
            view[0].ref_count_down()
        del wrapped, by_address, view
        assert worker.stats().allocated_bytes == worker.stats().dropped_blocks == 0
        assert batch.live.all()

    @pytest.mark.parametrize(
        ("addresses", "message"),
        [
            ([0, 7 * PAGE, 8 * PAGE], "leave the buffer"),
            ([-PAGE], "leave the buffer"),
            ([PAGE, PAGE], "overlap"),
            ([0, 100], "overlap"),
            ([100], "not aligned"),
            ([0.5], "must be integers"),
        ],
    )
    def test_wrong_addresses_are_refused(self, addresses: list[int], message: str) -> None:
        heap = TensorMemoryAllocator(torch.zeros(8 * PAGE, dtype=torch.uint8))
        with pytest.raises(ValueError, match=message):
            heap.view(addresses, [4], torch.float32)
        with pytest.raises(ValueError, match="need a shape and a dtype: pass both"):
            heap.view([0])

    def test_two_processes_over_shared_memory(self) -> None:
        """The scheduler allocates, a worker process fills, the scheduler reads and frees."""
        worker_code = """
import json, sys, numpy as np, torch
from kvheap import HostBuffer, HostMemoryAllocator, MemoryBatchMetadata
fd, size, metadata = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
with HostMemoryAllocator(size, host_buffer=HostBuffer(size, fd=fd)) as heap:
    batch = heap.view(MemoryBatchMetadata.from_dict(metadata))
    for number, obj in enumerate(batch):
        assert obj.tensor[0, 0] == -1
        obj.tensor.fill_(number)
    try:
        heap.batched_free(batch)
    except ValueError as error:
        print(type(error).__name__)
"""
        size = 32 * PAGE
        with HostMemoryAllocator(size, shared=True) as heap:
            taken = heap.batched_allocate([PAGE], torch.uint8, 20)
            assert taken is not None
            heap.batched_free([taken[i] for i in range(0, 20, 2)])
            batch = heap.batched_allocate([4, 64], torch.float32, 15)
            assert batch is not None
            assert batch.num_runs > 1
            for obj in batch:
                obj.tensor.fill_(-1)  # type: ignore[union-attr]
            fd = heap.host_buffer.fd
            assert fd is not None
            environment = {**os.environ, "TORCH_SHOW_CPP_STACKTRACES": "0"}
            done = subprocess.run(
                [sys.executable, "-c", worker_code, str(fd), str(size)]
                + [json.dumps(batch.metadata.to_dict())],
                pass_fds=[fd],
                capture_output=True,
                text=True,
                check=False,
                env=environment,
            )
            assert (done.returncode, done.stdout.strip()) == (0, "ForeignObjectError"), done.stderr
            out = torch.empty(15, 4, 64)
            heap.batched_free(batch, out=out)
            expected = np.broadcast_to(np.arange(15.0)[:, None, None], (15, 4, 64))
            assert np.array_equal(out.numpy(), expected)


def test_the_family_needs_no_cuda_to_be_imported() -> None:
    code = "import kvheap; [getattr(kvheap, name) for name in kvheap.__all__]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_host_buffer_of_ones_own(tmp_path: object) -> None:
    buffer = HostBuffer(8 * PAGE)
    with HostMemoryAllocator(4 * PAGE, host_buffer=buffer, populate=True) as heap:
        assert heap.stats().heap_bytes == 4 * PAGE
    assert buffer.closed


@pytest.mark.parametrize("options", [{}, {"scrub": True}, {"debug": True, "trace_frames": 2}])
@pytest.mark.parametrize(
    "use",
    [
        "nothing",
        "freed",
        "dropped",
        "lease ended",
        "grown",
        "full",
        "stored",
        "offloaded",
        "viewed",
    ],
)
def test_a_dropped_heap_frees_its_memory_at_once(options: dict[str, object], use: str) -> None:
    """Engines freeze the cycle collector: no cycle may hold a buffer."""
    memory = np.zeros(16 * PAGE, np.uint8)
    buffer = torch.from_numpy(memory)
    heap = TensorMemoryAllocator(buffer, on_full=None, **options)  # type: ignore[arg-type]
    gc.collect()
    gc.disable()
    try:
        batch = heap.batched_allocate([PAGE], torch.uint8, 4, source=buffer.new_ones(4, PAGE))
        assert batch is not None
        if use == "freed":
            heap.batched_free(batch, out=torch.empty(4, PAGE, dtype=torch.uint8))
        elif use == "dropped":
            del batch
            heap.stats()
        elif use == "lease ended":  # one that is held keeps its block, and the heap
            batch[0].pin(ttl=3600).release()
        elif use == "grown":
            heap.add_buffer(torch.zeros(PAGE, dtype=torch.uint8))
        elif use == "full":
            assert heap.allocate([99 * PAGE], torch.uint8) is None
        elif use == "stored":
            cache = PagedKVCache.of("mla", [torch.zeros(4, 16, 8, dtype=torch.uint8)])
            heap.batched_load(heap.batched_store(cache, range(64), 16), cache, range(64))
        elif use == "offloaded":
            with HostMemoryAllocator(1 << 16) as far:
                offload(batch, far).transfer.result()  # type: ignore[union-attr]
        elif use == "viewed":
            assert heap.view(batch.metadata)[1].tensor is not None
        its_heap, its_memory = weakref.ref(heap), weakref.ref(memory)
        heap = batch = buffer = memory = cache = None  # type: ignore[assignment]
        assert its_heap() is None
        assert its_memory() is None
    finally:
        gc.enable()


def test_memory_of_its_own_takes_one_element_of_any_stride() -> None:
    source = torch.rand(3, 1).half()
    batch = AdHocMemoryAllocator().batched_allocate(
        [1], torch.float16, 3, source=source.as_strided((3, 1), (1, 5))
    )
    assert batch is not None
    assert torch.equal(batch.allocator.batched_read(batch), source)
