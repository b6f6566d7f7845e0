"""The bugs that users of such allocators report most: each is impossible, or is reported."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest
import torch
from small_heaps import (
    PAGE,
    BrokenStream,
    FakeEvent,
    FakeStream,
    allocated_pages,
    heap_of,
    no_debug,
    take,
)

from kvheap import (
    BlockInUseError,
    ClosedError,
    DoubleFreeError,
    LifetimeError,
    MemoryObj,
    TensorMemoryAllocator,
)

__all__ = ["no_debug"]


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
        monkeypatch.setattr("kvheap.heaps.segments.copy_run", fail)
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
        take_extent = type(heap.address_manager.space._free_list).take

        def collect_and_take(free_list: object, size: int) -> object:
            gc.collect()
            return take_extent(free_list, size)  # type: ignore[arg-type]

        monkeypatch.setattr("kvheap.addresses.free_list.FreeList.take", collect_and_take)
        cycle: list[object] = [take(heap, 4)]
        cycle.append(cycle)
        del cycle
        second = take(heap, 4)  # finalizes the first batch while the lock is held
        assert heap.lifetime.reclaimer.has_work
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

    def test_a_pin_that_has_expired_does_not_count(self) -> None:
        heap = heap_of(4)
        batch = take(heap, 4)
        batch[2].pin(ttl=0.01)
        assert batch[2].pin_count == 1
        time.sleep(0.02)
        assert batch[2].pin_count == 0
        batch[1].pin(ttl=0.01)
        time.sleep(0.02)
        assert batch.pin_counts.tolist() == [0, 0, 0, 0]
        assert heap.stats().expired_leases == 2

    def test_a_lease_that_has_ended_keeps_nothing(self) -> None:
        heap = heap_of(4)
        for _ in range(300):
            batch = take(heap, 4)
            lease = batch[0].pin(ttl=3600)
            assert lease.release()
            del batch
            gc.collect(0)
        assert allocated_pages(heap) == 0
        assert len(heap.lifetime.leases.queue) < 200


class TestStreams:
    @pytest.mark.parametrize("stream", [None, 0, object()])
    def test_what_is_no_stream_is_refused(self, stream: object) -> None:
        heap = heap_of(2)
        batch = take(heap, 2)
        for record in (batch.record_stream, batch[1].record_stream):
            with pytest.raises(TypeError, match=r"a stream must have record_event\(\), got "):
                record(stream)  # type: ignore[arg-type]
        heap.batched_free(batch)
        assert allocated_pages(heap) == 0

    def test_a_closed_heap_takes_references_back(self) -> None:
        heap = heap_of(2, scrub=True)
        obj = take(heap, 1)[0]
        heap.close()
        obj.ref_count_down()
        assert not obj.is_valid()

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
        assert heap.lifetime.reclaimer.pending_bytes == PAGE
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

    def test_a_double_free_is_one_also_if_the_stream_is_gone(self) -> None:
        heap = heap_of(2)
        batch = take(heap, 2)
        heap.free(batch[0])
        batch.record_stream(BrokenStream(), [1])
        with pytest.raises(DoubleFreeError, match="block 0 of 2"):
            heap.batched_free(batch)
        assert batch.ref_counts.tolist() == [0, 1]

    def test_a_heap_with_such_a_stream_can_be_closed_once_its_block_is_detached(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap = heap_of(2)
        batch = take(heap, 2)
        batch.record_stream(BrokenStream())
        for _ in range(2):
            with pytest.raises(TimeoutError, match="a stream has not finished"):
                heap.close(timeout_s=60)  # and does not wait for it
        assert "the stream is gone" in caplog.text
        batch.detach()
        heap.close()

    def test_hundreds_of_pending_frees_end_at_once_and_in_turn(self) -> None:
        heap = heap_of(512, stream_wait_s=0.0)
        streams = [FakeStream() for _ in range(300)]
        for stream in streams:
            stream.submit()
            batch = take(heap, 1)
            batch.record_stream(stream)
            heap.batched_free(batch)
        for number, stream in enumerate(streams):
            if number % 2:
                stream.finish()
        for _ in range(300):  # each looks at a few others
            heap.batched_free(take(heap, 1))
        assert heap.stats().pending_bytes == 150 * PAGE
        for stream in streams:
            stream.finish()
        assert len(take(heap, 512)) == 512

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

    @pytest.mark.parametrize(
        ("rows", "error"),
        [
            ([-1], "rows must be from 0 to 3: rows.0. is -1"),
            ([0, 4], "rows must be from 0 to 3: rows.1. is 4"),
            ([False, False, False, True], "rows must be integers, got bool"),
            ([0.5], "rows must be integers, got float64"),
        ],
    )
    def test_rows_that_the_batch_has_not_are_refused(self, rows: list[int], error: str) -> None:
        heap = heap_of(4)
        batch, stream = take(heap, 4), FakeStream()
        with pytest.raises((TypeError, ValueError), match=error):
            batch.record_stream(stream, rows)  # type: ignore[arg-type]
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 0

    def test_rows_may_be_a_list(self) -> None:
        heap = heap_of(4)
        batch, stream = take(heap, 4), FakeStream()
        stream.submit()
        batch.record_stream(stream, [3])  # type: ignore[arg-type]
        heap.free(batch[3])
        assert heap.stats().pending_bytes == PAGE

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

    def test_closing_waits_for_streams_on_live_blocks_too(self) -> None:
        stream = FakeStream()
        stream.submit()
        heaps = [heap_of(2), heap_of(2)]
        batches = [take(heap, 2) for heap in heaps]
        for batch in batches:
            batch[1].record_stream(stream)
        for _ in range(2):  # a close that gave up is not forgotten
            with pytest.raises(TimeoutError, match="the buffers are not released"):
                heaps[0].close(timeout_s=0.05)
            assert len(heaps[0]._bytes.segments)
            with pytest.raises(ClosedError):
                heaps[0].allocate([1], torch.uint8)
        threading.Timer(0.02, stream.finish).start()
        heaps[1].close()
        assert stream.done == 1
        heaps[0].close()
        assert not len(heaps[0]._bytes.segments)
        heaps[0].close()

    def test_a_signal_handler_closes_what_is_being_closed(self) -> None:
        heap, stream = heap_of(2), FakeStream()
        stream.submit()
        take(heap, 2).record_stream(stream)
        ended = []

        def close_now(number: int, frame: object) -> None:
            with pytest.raises(TimeoutError, match="not released"):
                heap.close(timeout_s=0.0)
            ended.append("handler")

        before = signal.signal(signal.SIGUSR1, close_now)
        try:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(TimeoutError, match="not released"):
                heap.close(timeout_s=0.3)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert ended == ["handler"]
        stream.finish()
        heap.close()

    def test_a_close_waits_for_another_no_longer_than_it_was_told(self) -> None:
        heap, stream = heap_of(2), FakeStream()
        stream.submit()
        batch = take(heap, 2)
        batch.record_stream(stream)
        thread = threading.Thread(target=heap.close)
        thread.start()
        while not heap.closed:
            time.sleep(0.001)
        time.sleep(0.01)
        with pytest.raises(TimeoutError, match=r"another thread is still closing .* 0\.02 s"):
            heap.close(timeout_s=0.02)
        stream.finish()
        thread.join()
        heap.close(timeout_s=0.0)

    @pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
    def test_a_timeout_that_is_none_changes_nothing(self, timeout_s: float) -> None:
        heap = heap_of(2)
        with pytest.raises(ValueError, match=f"timeout_s must be .* got {timeout_s}"):
            heap.close(timeout_s=timeout_s)
        assert not heap.closed

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
