"""The bugs that users of such allocators report most: each must be impossible, or be told."""

from __future__ import annotations

import gc
import logging
import pickle
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvheap import (
    BlockInUseError,
    DoubleFreeError,
    FullReport,
    LifetimeError,
    MemoryBatch,
    MemoryFormat,
    MemoryObj,
    PagedTensorMemoryAllocator,
    TensorMemoryAllocator,
    WriteAfterFreeError,
)

PAGE = 4096


def heap_of(pages: int, **options: object) -> TensorMemoryAllocator:
    buffer = torch.zeros(pages * PAGE, dtype=torch.uint8)
    return TensorMemoryAllocator(buffer, **options)  # type: ignore[arg-type]


def take(heap: TensorMemoryAllocator, count: int) -> MemoryBatch:
    batch = heap.batched_allocate([PAGE], torch.uint8, count)
    assert batch is not None
    return batch


def allocated_pages(heap: TensorMemoryAllocator) -> int:
    return heap.stats().allocated_bytes // PAGE


def in_threads(calls: list[Callable[[], object]]) -> list[BaseException | None]:
    """What each call raised, run all at once."""
    raised: list[BaseException | None] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            calls[index]()
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.position = stream.submitted

    def query(self) -> bool:
        return self.stream.done >= self.position


class FakeStream:
    """A stream whose work ends when a test says so."""

    def __init__(self) -> None:
        self.submitted = 0
        self.done = 0

    def submit(self) -> None:
        self.submitted += 1

    def finish(self) -> None:
        self.done = self.submitted

    def record_event(self) -> FakeEvent:
        return FakeEvent(self)


class BrokenStream(FakeStream):
    def record_event(self) -> FakeEvent:
        raise RuntimeError("the stream is gone")


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
        with pytest.raises(DoubleFreeError, match="freed already"):
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
            with pytest.raises(LifetimeError, match=rf"at address {PAGE} .*test_lifetime.py:\d+"):
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


class TestDropped:
    def test_the_next_operation_reclaims_what_was_dropped(self) -> None:
        heap = heap_of(4)
        batch = take(heap, 3)
        last = batch[1]
        heap.free(batch[0])
        del batch
        gc.collect()
        assert allocated_pages(heap) == 2  # a handle keeps its whole batch
        last.ref_count_up()
        del last
        gc.collect()
        assert heap.lifetime.dropped_blocks == 0  # queued, until somebody asks for something
        take(heap, 4).detach()
        assert heap.stats().dropped_blocks == 2

    def test_freed_and_detached_batches_leave_nothing_to_reclaim(self) -> None:
        heap = heap_of(4)
        heap.batched_free(take(heap, 2))
        blocks = take(heap, 2).detach()
        gc.collect()
        assert (allocated_pages(heap), heap.stats().dropped_blocks) == (2, 0)
        heap.address_manager.batched_free(blocks)
        assert allocated_pages(heap) == 0

    def test_a_failed_scatter_is_not_given_back_twice(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object) -> None:
            raise MemoryError

        heap = heap_of(4)
        monkeypatch.setattr("kvheap.heaps.segments.scatter_blocks", fail)
        with pytest.raises(MemoryError):
            heap.batched_allocate([PAGE], torch.uint8, 2, source=torch.zeros(2, PAGE).byte())
        gc.collect()
        assert (allocated_pages(heap), heap.stats().dropped_blocks) == (0, 0)
        assert heap.memcheck()

    def test_a_handle_that_outlives_its_batch_in_a_cycle_finds_its_block_freed(self) -> None:
        heap = heap_of(1)
        kept: list[MemoryObj] = []

        class Keeper:
            def __init__(self, obj: MemoryObj) -> None:
                self.obj = obj
                self.itself = self

            def __del__(self) -> None:
                kept.append(self.obj)

        for _ in range(20):  # in which order the two are finalized is the collector's choice
            keepers = [Keeper(take(heap, 1)[0])]
            del keepers
            gc.collect()
            (obj,) = kept
            if not obj.is_valid():
                assert obj.tensor is None
                with pytest.raises(LifetimeError):
                    obj.ref_count_up()
            else:
                heap.free(obj)
            kept.clear()
            new = take(heap, 1)
            heap.batched_free(new)
        assert heap.memcheck()

    def test_cycles_collected_inside_an_allocation_do_not_deadlock(self) -> None:
        """Every allocation runs the collector, on eight threads, over cycles that hold batches."""
        heap = heap_of(256)
        thresholds = gc.get_threshold()

        def work() -> None:
            for _ in range(150):
                batch = heap.batched_allocate([PAGE], torch.uint8, 4)
                if batch is not None:
                    cycle: list[object] = [batch, batch[0]]
                    cycle.append(cycle)

        gc.set_threshold(1, 1, 1)
        try:
            workers = [threading.Thread(target=work, daemon=True) for _ in range(8)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)
            assert not any(worker.is_alive() for worker in workers)
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        assert allocated_pages(heap) == 0
        assert heap.stats().dropped_blocks >= 256
        assert heap.memcheck()

    def test_the_collector_inside_the_locked_part_of_an_allocation(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heap = heap_of(8)
        take_extent = type(heap.address_manager._free_list).take

        def collect_and_take(free_list: object, size: int) -> object:
            gc.collect()
            return take_extent(free_list, size)  # type: ignore[arg-type]

        monkeypatch.setattr("kvheap.addresses.free_list.FreeList.take", collect_and_take)
        cycle: list[object] = [take(heap, 4)]
        cycle.append(cycle)
        del cycle
        second = take(heap, 4)  # finalizes the first batch while the lock is held
        assert heap.lifetime.has_work
        third = take(heap, 4)
        assert sorted([*second.addresses, *third.addresses]) == [i * PAGE for i in range(8)]


class TestLeaks:
    def test_live_blocks_by_place_and_age(self) -> None:
        heap = heap_of(16, trace_frames=3)
        old = take(heap, 2)
        for block in old:
            block.pin()
        time.sleep(0.01)
        young = [heap.allocate([10], torch.float16) for _ in range(3)]
        first, second = heap.leaks()
        assert (first.num_blocks, first.num_bytes, first.num_pinned) == (2, 2 * PAGE, 2)
        assert (second.num_blocks, second.num_pinned) == (3, 0)
        assert first.age_s >= second.age_s + 0.01
        assert "in take" in first.site[0]
        assert "test_live_blocks_by_place_and_age" in first.site[1]
        assert "(10,) torch.float16" in second.layout
        assert "test_lifetime.py" in str(second)
        for obj in young:
            heap.free(obj)  # type: ignore[arg-type]
        assert len(heap.leaks()) == 1

    def test_without_tracing_there_is_no_place(self) -> None:
        heap = heap_of(4)
        batch = take(heap, 4)
        heap.free(batch[0])
        (group,) = heap.leaks()
        assert (group.site, group.num_blocks) == ((), 3)

    def test_a_lease_ends_by_itself_and_is_counted(self) -> None:
        heap = heap_of(2)
        obj = take(heap, 2)[0]
        lease = obj.pin(ttl=0.01)
        assert (obj.pin_count, lease.state) == (1, "held")
        with pytest.raises(BlockInUseError):
            heap.free(obj)
        with pytest.raises(LifetimeError, match="1 of them by leases"):
            obj.unpin()
        time.sleep(0.02)
        assert heap.stats().expired_leases == 1
        assert (obj.pin_count, lease.state, lease.release()) == (0, "expired", False)
        heap.free(obj)

    def test_an_expired_lease_frees_what_nobody_else_holds(self) -> None:
        heap = heap_of(1)
        obj = take(heap, 1)[0]
        obj.pin(ttl=0.01)
        obj.ref_count_down()
        assert obj.is_valid()
        time.sleep(0.02)
        assert heap.allocate([PAGE], torch.uint8) is not None
        assert not obj.is_valid()

    def test_an_expired_lease_on_a_stream_that_is_gone_disturbs_nobody(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap = heap_of(2)
        batch = take(heap, 1)
        batch[0].record_stream(BrokenStream())
        batch[0].pin(ttl=0.001)
        batch[0].ref_count_down()
        time.sleep(0.01)
        heap.batched_free(take(heap, 1))
        assert heap.stats().expired_leases == 1
        assert "stays allocated" in caplog.text
        assert heap.leaks()[0].num_blocks == 1

    def test_a_lease_may_end_early(self) -> None:
        heap = heap_of(1)
        obj = take(heap, 1)[0]
        with obj.pin(ttl=60) as lease:
            obj.pin()
            assert obj.pin_count == 2
        assert (obj.pin_count, lease.state) == (1, "released")
        with pytest.raises(ValueError, match="ttl must be a positive number of seconds, got 0"):
            obj.pin(ttl=0)
        obj.unpin()
        heap.free(obj)

    def test_a_lease_that_has_ended_keeps_nothing(self) -> None:
        heap = heap_of(4)
        for _ in range(300):
            batch = take(heap, 4)
            lease = batch[0].pin(ttl=3600)
            assert lease.release()
            del batch
            gc.collect(0)
        assert allocated_pages(heap) == 0
        assert len(heap.lifetime._leases) < 200


class TestFull:
    def test_one_report_says_who_holds_what(self) -> None:
        reports: list[FullReport] = []
        heap = heap_of(8, on_full=reports.append, on_full_interval_s=3600.0, trace_frames=2)
        kept = [take(heap, 3), take(heap, 3)]
        kept[1][2].pin()
        heap.free(kept[0][1])
        for _ in range(1000):
            assert heap.batched_allocate([2 * PAGE], torch.uint8, 2) is None
        (report,) = reports
        assert (report.requested_bytes, report.num_blocks, report.failures) == (4 * PAGE, 2, 1)
        assert (report.free_bytes, report.largest_free_bytes) == (3 * PAGE, 2 * PAGE)
        assert (report.free_extents, report.live_blocks, report.live_bytes) == (2, 5, 5 * PAGE)
        assert (report.pinned_blocks, report.pinned_bytes) == (1, PAGE)
        assert "in take" in report.live[0].site[0]
        assert f"{4 * PAGE:,} bytes" in str(report)
        heap._full_reporter._next_report = 0.0
        assert heap.allocate([9 * PAGE], torch.uint8) is None
        assert reports[1].failures == 1000

    def test_a_full_answer_keeps_nothing_of_its_callers(self) -> None:
        class Local:
            pass

        def ask() -> weakref.ref[Local]:
            local = Local()
            assert heap.allocate([2 * PAGE], torch.uint8) is None
            return weakref.ref(local)

        heap = heap_of(1, on_full=None)
        gc.disable()
        try:
            assert ask()() is None
        finally:
            gc.enable()

    def test_it_is_logged_where_nobody_listens(self, caplog: pytest.LogCaptureFixture) -> None:
        heap = heap_of(1)
        with caplog.at_level(logging.WARNING, logger="kvheap"):
            for _ in range(3):
                assert heap.allocate([2 * PAGE], torch.uint8) is None
        assert len(caplog.records) == 1
        assert "cannot allocate 1 blocks, 8,192 bytes" in caplog.text


class TestDebug:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVHEAP_DEBUG", "1")

    def test_a_write_after_free_is_found_with_its_owner(self) -> None:
        heap = heap_of(4)
        batch = take(heap, 3)
        stale = batch[1].tensor
        assert stale is not None
        heap.batched_free(batch)
        stale[5] = 1
        with pytest.raises(
            WriteAfterFreeError, match=rf"between {PAGE + 5} and {PAGE + 5} "
        ) as found:
            heap.batched_allocate([PAGE], torch.uint8, 4)
        assert f"the block at {PAGE} " in str(found.value) or "block at 0" in str(found.value)
        assert "test_lifetime.py" in str(found.value)
        assert allocated_pages(heap) == 0
        assert heap.memcheck()
        again = take(heap, 4)  # found once; the bytes are good again
        heap.batched_free(again)

    def test_other_sizes_are_looked_at_too(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 8)
        tensors = [block.tensor for block in batch]
        heap.batched_free(batch)
        large = heap.allocate([3 * PAGE], torch.uint8)
        assert large is not None
        tensors[3].fill_(0)  # type: ignore[union-attr]
        with pytest.raises(WriteAfterFreeError, match=f"the block at {3 * PAGE} "):
            heap.allocate([5 * PAGE], torch.uint8)

    def test_what_was_never_freed_is_not_looked_at(self) -> None:
        heap = heap_of(4)
        heap.buffer.fill_(7)
        heap.batched_free(take(heap, 4))

    def test_it_can_be_switched_off(self) -> None:
        heap = heap_of(2, debug=False)
        batch = take(heap, 2)
        batch[0].tensor.fill_(3)  # type: ignore[union-attr]
        heap.batched_free(batch)
        assert heap.buffer[:PAGE].eq(3).all()


class TestScrub:
    @pytest.mark.parametrize("way", ["batch", "objects", "count", "dropped"])
    def test_freed_bytes_are_zero(self, way: str) -> None:
        heap = heap_of(8, scrub=True)
        batch = heap.batched_allocate([100], torch.uint8, 4)
        other = heap.allocate([2 * PAGE], torch.uint8)
        assert batch is not None
        assert other is not None
        heap.buffer.fill_(9)
        if way == "batch":
            heap.batched_free(batch)
        elif way == "objects":
            heap.batched_free([batch[1], other, batch[0], batch[2], batch[3]])
            assert heap.buffer[4 * PAGE : 6 * PAGE].eq(0).all()
        elif way == "count":
            for obj in batch:
                obj.ref_count_down()
        else:
            del batch
            gc.collect()
            heap.stats()
        assert heap.buffer[: 4 * PAGE].eq(0).all()
        assert heap.buffer[6 * PAGE :].eq(9).all()

    def test_what_a_failed_scatter_wrote_is_zeroed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def write_and_fail(blocks: object, buffer: torch.Tensor, addresses: object) -> None:
            buffer[: 2 * PAGE].fill_(5)
            raise KeyboardInterrupt

        monkeypatch.setattr("kvheap.heaps.segments.scatter_blocks", write_and_fail)
        heap = heap_of(4, scrub=True)
        with pytest.raises(KeyboardInterrupt):
            heap.batched_allocate([PAGE], torch.uint8, 2, source=torch.zeros(2, PAGE).byte())
        assert heap.buffer.eq(0).all()
        assert allocated_pages(heap) == 0

    def test_one_launch_a_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def count(buffer: object, addresses: np.ndarray, *rest: object) -> None:
            calls.append(len(addresses))

        monkeypatch.setattr("kvheap.heaps.segments.fill_blocks", count)
        heap = heap_of(64, scrub=True)
        heap.batched_free(take(heap, 64))
        assert calls == [64]


class TestStreams:
    def test_bytes_come_back_when_the_stream_has_passed(self) -> None:
        heap = heap_of(4, stream_wait_s=0.0)
        stream = FakeStream()
        batch = take(heap, 3)
        stream.submit()
        batch.record_stream(stream)
        heap.batched_free(batch)
        assert not batch[0].is_valid()
        assert (allocated_pages(heap), heap.stats().pending_bytes) == (3, 3 * PAGE)
        assert heap.batched_allocate([PAGE], torch.uint8, 2) is None
        stream.submit()  # later work is no concern of the free
        stream.done = 1
        assert len(take(heap, 4)) == 4
        assert heap.stats().pending_bytes == 0

    @pytest.mark.parametrize("way", ["free", "count", "dropped"])
    def test_one_object_in_flight_holds_back_no_other(self, way: str) -> None:
        heap = heap_of(4, stream_wait_s=0.0)
        stream = FakeStream()
        stream.submit()
        batch = take(heap, 4)
        batch[2].record_stream(stream)
        batch[2].record_stream(stream)
        heap.batched_free([batch[0], batch[1]])
        if way == "free":
            heap.batched_free([batch[2]])
        elif way == "count":
            batch[2].ref_count_down()
        else:
            heap.free(batch[3])
            del batch
            gc.collect()
        assert heap.max_batch([PAGE], torch.uint8) == (3 if way == "dropped" else 2)
        stream.finish()
        heap.stats()
        assert heap.stats().pending_bytes == 0

    def test_allocation_under_pressure_waits_but_not_for_ever(self) -> None:
        heap = heap_of(2, stream_wait_s=0.2)
        stream = FakeStream()
        stream.submit()
        batch = take(heap, 2)
        batch.record_stream(stream)
        heap.batched_free(batch)
        start = time.monotonic()
        assert heap.allocate([PAGE], torch.uint8) is None
        assert time.monotonic() - start >= 0.2
        threading.Timer(0.05, stream.finish).start()
        assert heap.allocate([PAGE], torch.uint8) is not None

    def test_who_finds_another_thread_reclaiming_waits_for_it(self) -> None:
        heap = heap_of(1, stream_wait_s=10.0)
        asked, answer = threading.Event(), threading.Event()

        class SlowEvent(FakeEvent):
            def query(self) -> bool:
                asked.set()
                return answer.wait(10)

        class SlowStream(FakeStream):
            def record_event(self) -> FakeEvent:
                return SlowEvent(self)

        batch = take(heap, 1)
        batch.record_stream(SlowStream())
        heap.batched_free(batch)
        settler = threading.Thread(target=heap.stats)
        settler.start()
        assert asked.wait(10)
        assert heap.lifetime.pending_bytes == PAGE
        threading.Timer(0.05, answer.set).start()
        assert heap.allocate([PAGE], torch.uint8) is not None
        settler.join()

    def test_operations_look_at_few_of_many_pending_frees(self) -> None:
        queries = 0

        class CountedEvent(FakeEvent):
            def query(self) -> bool:
                nonlocal queries
                queries += 1
                return super().query()

        class CountedStream(FakeStream):
            def record_event(self) -> FakeEvent:
                return CountedEvent(self)

        heap = heap_of(512, stream_wait_s=0.0)
        stream = CountedStream()
        stream.submit()
        for _ in range(200):
            batch = take(heap, 1)
            batch.record_stream(stream)
            heap.batched_free(batch)
        queries = 0
        heap.batched_free(take(heap, 1))
        assert queries <= 16
        stream.finish()
        assert len(take(heap, 512)) == 512  # needs them all, and asks them all

    def test_an_event_that_cannot_be_asked_keeps_its_bytes_in_sight(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class BrokenEvent(FakeEvent):
            def query(self) -> bool:
                raise RuntimeError("device lost")

        class LostStream(FakeStream):
            def record_event(self) -> FakeEvent:
                return BrokenEvent(self)

        heap = heap_of(2, stream_wait_s=0.0)
        batch = take(heap, 1)
        batch.record_stream(LostStream())
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == PAGE
        assert heap.allocate([2 * PAGE], torch.uint8) is None
        assert len([record for record in caplog.records if record.exc_info]) == 1
        assert "device lost" in caplog.text
        assert heap.allocate([PAGE], torch.uint8) is not None

    def test_a_stream_that_is_gone_frees_nothing(self) -> None:
        heap = heap_of(2)
        batch = take(heap, 2)
        batch[1].record_stream(BrokenStream())
        for free in (lambda: heap.batched_free(batch), batch[1].ref_count_down):
            with pytest.raises(RuntimeError, match="the stream is gone"):
                free()
            assert batch.ref_counts.tolist() == [1, 1]
            assert allocated_pages(heap) == 2

    def test_dropped_bytes_of_such_a_stream_stay_allocated(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap = heap_of(2)
        batch = take(heap, 2)
        batch.record_stream(BrokenStream())
        del batch
        gc.collect()
        assert allocated_pages(heap) == 2
        assert "8192 dropped bytes stay allocated" in caplog.text

    def test_a_freed_block_has_no_stream(self) -> None:
        heap = heap_of(2)
        batch = take(heap, 2)
        heap.free(batch[0])
        with pytest.raises(LifetimeError, match="freed"):
            batch[0].record_stream(FakeStream())
        with pytest.raises(LifetimeError, match="freed"):
            batch.record_stream(FakeStream())

    def test_closing_waits_for_streams(self) -> None:
        heap = heap_of(2)
        stream = FakeStream()
        stream.submit()
        batch = take(heap, 2)
        batch.record_stream(stream)
        heap.batched_free(batch)
        threading.Timer(0.05, stream.finish).start()
        heap.close()
        assert stream.done == 1

    def test_closing_waits_for_streams_on_live_blocks_too(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = FakeStream()
        stream.submit()
        heaps = [heap_of(2), heap_of(2)]
        batches = [take(heap, 2) for heap in heaps]
        for batch in batches:
            batch[1].record_stream(stream)
        monkeypatch.setattr("kvheap.heaps.tensor_allocator.CLOSE_WAIT_S", 0.05)
        with pytest.raises(RuntimeError, match="the buffers are not released"):
            heaps[0].close()
        assert len(heaps[0]._segments)
        threading.Timer(0.02, stream.finish).start()
        monkeypatch.setattr("kvheap.heaps.tensor_allocator.CLOSE_WAIT_S", 10.0)
        heaps[1].close()
        assert stream.done == 1

    @pytest.mark.gpu
    def test_on_a_gpu(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        heap = TensorMemoryAllocator(torch.zeros(4 * PAGE, dtype=torch.uint8, device="cuda"))
        side = torch.cuda.Stream()
        batch = take(heap, 4)
        source = torch.full((PAGE,), 7, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            for block in batch:
                block.tensor.copy_(source)  # type: ignore[union-attr]
        batch.record_stream(side)
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 4 * PAGE
        again = take(heap, 4)  # waits for the copies
        assert side.query()
        assert again[0].tensor.eq(7).all()  # type: ignore[union-attr]


class TestMemcheckAndGrowth:
    def test_statistics_are_snapshots_while_the_heap_grows(self) -> None:
        heap = heap_of(4)
        manager = heap.address_manager
        manager.allocate(4 * PAGE)
        stop = threading.Event()

        def grow() -> None:
            for _ in range(400):
                manager.sbrk(PAGE)
                manager.trim()
            stop.set()

        def look() -> None:
            while not stop.is_set():
                assert manager.check_consistency()
                stats = manager.stats()
                assert stats.free_bytes + stats.allocated_bytes == stats.heap_bytes
                assert manager.snapshot()[:, 1].sum() in (0, PAGE)

        assert in_threads([grow, look, look]) == [None] * 3


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
        with pytest.raises(IndexError, match="group 2 of a block with 2"):
            obj.get_tensor(2)
        with pytest.raises(ValueError, match="group 1 would begin at byte 2"):
            heap.allocate([[1], [1]], [torch.int16, torch.float32])
        with pytest.raises(ValueError, match="as many shapes as dtypes"):
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
        for live in (batch, batch[0]):
            with pytest.raises(TypeError, match="send its metadata"):
                pickle.dumps(live)
        metadata = pickle.loads(pickle.dumps(batch[1].metadata))
        assert metadata == batch[1].metadata
        assert type(metadata).from_dict(metadata.to_dict()) == metadata
        whole = pickle.loads(pickle.dumps(batch.metadata))
        assert type(whole).from_dict(whole.to_dict()).blocks == batch.runs


@pytest.fixture(autouse=True)
def _no_debug(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.cls is not TestDebug:
        monkeypatch.delenv("KVHEAP_DEBUG", raising=False)


def test_a_handle_is_on_its_block() -> None:
    heap = heap_of(2)
    batch = take(heap, 2)
    assert batch[0] == MemoryObj(batch, 0)
    assert batch == list(batch)
    assert batch != list(batch)[::-1]
