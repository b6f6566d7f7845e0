"""Leases on many blocks: against a naive model, and what may happen to their blocks meanwhile."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked_child import in_a_child
from small_heaps import (
    PAGE,
    BrokenStream,
    FakeStream,
    allocated_pages,
    heap_of,
    in_threads,
    no_debug,
    take,
)

from kvheap import (
    AdHocMemoryAllocator,
    BatchLease,
    BlockInUseError,
    BufferAllocator,
    ClosedError,
    ForeignObjectError,
    Lease,
    LifetimeError,
    MemoryBatch,
    MemoryFormat,
    MixedMemoryAllocator,
    PinMemoryAllocator,
    ReentrantCallError,
    TensorMemoryAllocator,
    foreign_transfer,
    offload,
)
from kvheap.blocks import lease as lease_module
from kvheap.blocks import leases as leases_module

__all__ = ["no_debug"]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (lease_module, leases_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


class TestBatchLease:
    def test_pins_all_blocks_until_it_is_released(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        with heap.lease(batch, ttl=10) as lease:
            assert batch.pin_counts.tolist() == [1, 1, 1, 1]
            assert batch[2].pin_count == 1
            assert (lease.state, lease.deadline) == ("held", clock.now + 10)
            with pytest.raises(BlockInUseError, match="reference count 1, pin count 1"):
                heap.batched_free(batch)
            with pytest.raises(BlockInUseError):
                heap.free(batch[3])
            with pytest.raises(LifetimeError, match="1 of them by leases"):
                batch[0].unpin()
        assert (lease.state, lease.release(), lease.extend(5)) == ("released", False, False)
        assert batch.pin_counts.tolist() == [0, 0, 0, 0]
        heap.batched_free(batch)
        assert allocated_pages(heap) == 0

    def test_expires_and_is_counted_once(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        lease = heap.lease(batch, ttl=10)
        clock.now += 9.99
        assert batch.pin_counts.sum() == 4
        clock.now += 0.01
        assert batch.pin_counts.sum() == 0
        assert (lease.state, lease.release(), lease.extend(1)) == ("expired", False, False)
        assert heap.stats().expired_leases == 1
        heap.batched_free(batch)

    def test_is_extended(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        grants: list[Callable[[], BatchLease | Lease]] = [
            lambda: heap.lease(batch, ttl=10),
            lambda: batch[1].pin(ttl=10),
        ]
        for grant in grants:
            lease = grant()
            clock.now += 9
            assert lease.extend(ttl=10)
            assert not heap.batched_allocate([PAGE], torch.uint8, 5)
            clock.now += 9
            assert lease.extend(ttl=0.5)  # no sooner than it would have
            clock.now += 0.9
            heap.stats()
            assert (lease.state, batch[1].pin_count) == ("held", 1)
            clock.now += 0.1
            assert not lease.extend(ttl=10)  # too late, though nobody has looked
            heap.stats()
            assert lease.state == "expired"
            with pytest.raises(ValueError, match="ttl must be a positive number of seconds"):
                lease.extend(ttl=0)
        assert heap.stats().expired_leases == 2

    def test_many_extensions_leave_one_entry(self, clock: Clock) -> None:
        heap = heap_of(4)
        lease = heap.lease(take(heap, 2), ttl=1)
        for _ in range(500):
            clock.now += 0.5
            assert lease.extend(1)
            heap.stats()
        assert len(heap.lifetime.leases.queue) == 1

    def test_frees_what_nothing_else_holds(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 6)
        lease, other = heap.lease(batch, ttl=10), heap.lease(batch, 99, rows=[5])
        batch[0].ref_count_up()
        batch[1].pin()
        batch[2].pin(ttl=20)
        for obj in batch:
            obj.ref_count_down()
        assert batch.live.all()
        assert lease.release()
        assert batch.live.tolist() == [True, True, True, False, False, True]
        assert batch.pin_counts.tolist() == [0, 1, 1, 0, 0, 1]
        clock.now += 21
        assert batch[1].unpin()
        batch[0].ref_count_down()
        other.release()
        assert allocated_pages(heap) == 0
        assert heap.leaks() == ()

    def test_frees_a_whole_batch_in_one_go(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 6)
        heap.lease(batch, ttl=10)
        for obj in batch:
            obj.ref_count_down()
        clock.now += 10
        assert heap.batched_allocate([PAGE], torch.uint8, 8) is not None
        assert not batch.live.any()

    @pytest.mark.parametrize("rows", [None, [1, 3], [3, 1, 1], []])
    def test_of_some_rows(self, clock: Clock, rows: list[int] | None) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        chosen = range(4) if rows is None else set(rows)
        expected = [int(row in chosen) for row in range(4)]
        lease = heap.lease(batch, 5, rows=None if rows is None else np.array(rows, np.int64))
        assert batch.pin_counts.tolist() == expected
        lease.release()
        if rows is not None:
            with heap.lease([batch[row] for row in rows], 5):
                assert batch.pin_counts.tolist() == expected
        assert batch.pin_counts.tolist() == [0] * 4

    def test_of_objects_of_several_batches_all_or_none(self, clock: Clock) -> None:
        heap = heap_of(8)
        one, other = take(heap, 3), take(heap, 3)
        heap.free(other[1])
        with pytest.raises(LifetimeError, match=r"block 1 of 3 .* is freed: its pin count cannot"):
            heap.lease([one[0], other[1]], 5)
        assert one.pin_counts.tolist() == [0, 0, 0]
        assert len(heap.lifetime.leases.queue) == 0
        lease = heap.lease([other[2], one[0], other[0]], 5)
        assert (one.pin_counts.tolist(), other.pin_counts.tolist()) == ([1, 0, 0], [1, 0, 1])
        for obj in (*one, other[0], other[2]):
            obj.ref_count_down()
        assert allocated_pages(heap) == 3
        assert lease.release()
        assert allocated_pages(heap) == 0

    def test_leaves_a_batch_as_quick_to_free_as_before(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        heap.lease(batch, 5).release()
        assert batch.counts.is_untouched()

    def test_wrong_arguments_pin_nothing(self) -> None:
        heap, other = heap_of(8), heap_of(8)
        batch = take(heap, 4)
        for ttl in (0, -1, float("nan")):
            with pytest.raises(ValueError, match="ttl must be"):
                heap.lease(batch, ttl)
        with pytest.raises(TypeError, match="ttl must be a number of seconds, got 'long'"):
            heap.lease(batch, "long")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"rows must be from 0 to 3: rows\[1\] is 4"):
            heap.lease(batch, 5, rows=[0, 4])
        with pytest.raises(TypeError, match="rows must be integers"):
            heap.lease(batch, 5, rows=["a"])
        with pytest.raises(TypeError, match="rows are those of a batch"):
            heap.lease([batch[0]], 5, rows=[0])
        with pytest.raises(TypeError, match="expected a batch or a list of objects"):
            heap.lease(batch[0], 5)  # type: ignore[arg-type]
        for foreign in (take(other, 1), [batch[0], take(other, 1)[0]]):
            with pytest.raises(ForeignObjectError):
                heap.lease(foreign, 5)
        assert batch.pin_counts.sum() == 0
        heap.batched_free(batch)
        with pytest.raises(LifetimeError, match="block 0 of 4"):
            heap.lease(batch, 5)
        heap.close()
        with pytest.raises(ClosedError):
            heap.lease(batch, 5)

    def test_nothing_is_leased_of_nothing(self) -> None:
        heap = heap_of(8)
        for blocks in (take(heap, 0), []):
            assert heap.lease(blocks, 5).release()

    def test_of_memory_without_a_heap(self) -> None:
        allocator = AdHocMemoryAllocator()
        batch = allocator.batched_allocate([8], torch.float32, 3)
        with allocator.lease(batch, 5), pytest.raises(BlockInUseError):
            allocator.batched_free(batch)
        mixed = MixedMemoryAllocator(
            PinMemoryAllocator(1 << 16, allow_unpinned=True), BufferAllocator()
        )
        data = mixed.batched_allocate([100], torch.uint8, 2, MemoryFormat.BINARY_BUFFER)
        kv = mixed.batched_allocate([100], torch.uint8, 2)
        assert data is not None
        assert kv is not None
        for blocks in (data, kv, kv[1:]):
            with mixed.lease(blocks, 5), pytest.raises(BlockInUseError):
                mixed.batched_free(blocks)
        with pytest.raises(ForeignObjectError, match="cannot be leased in the same call"):
            mixed.lease([data[0], kv[0]], 5)
        mixed.close()


class TestBlocksOf:
    def test_a_dropped_batch_lives_until_its_lease_ends(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        batch[1].ref_count_up()
        batch[2].pin()
        heap.lease(batch, 10, rows=[0, 1, 2])
        del batch
        gc.collect()
        assert allocated_pages(heap) == 3
        assert heap.stats().dropped_blocks == 4
        clock.now += 10
        assert allocated_pages(heap) == 0
        assert heap.leaks() == ()

    def test_a_lease_that_is_dropped_goes_on(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        heap.lease(batch, 10)
        gc.collect()
        assert batch.pin_counts.sum() == 4

    def test_an_ended_lease_keeps_nothing(self) -> None:
        heap = heap_of(4)
        leases = []
        for _ in range(300):
            batch = take(heap, 4)
            leases.append(heap.lease(batch, 3600))
            assert leases[-1].release()
            alive = weakref.ref(batch)
            del batch
            gc.collect(0)
            assert alive() is None
        assert allocated_pages(heap) == 0
        assert len(heap.lifetime.leases.queue) < 200
        assert all(not each.parts for each in leases)

    def test_a_lease_does_not_keep_its_heap(self) -> None:
        heap = heap_of(4)
        lease = heap.lease(take(heap, 2), 3600)
        alive = weakref.ref(heap)
        del heap
        gc.collect()
        assert alive() is None
        assert not lease.extend(5)
        assert lease.release()
        assert not lease.release()

    def test_a_stream_is_waited_for_when_it_expires(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch, stream = take(heap, 4), FakeStream()
        stream.submit()
        batch.record_stream(stream, [1, 2])
        heap.lease(batch, 10)
        for obj in batch:
            obj.ref_count_down()
        clock.now += 10
        assert heap.stats().pending_bytes == 4 * PAGE
        stream.finish()
        assert heap.stats().allocated_bytes == 0

    def test_an_expired_lease_on_a_stream_that_is_gone_disturbs_nobody(
        self, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        batch.record_stream(BrokenStream(), [1])
        lease = heap.lease(batch, 10)
        for obj in batch:
            obj.ref_count_down()
        for _ in range(3):
            clock.now += 10
            heap.batched_free(take(heap, 1))
            assert heap.stats().expired_leases == 1
        assert caplog.text.count("stays allocated") == 1
        assert not lease.extend(10)
        assert heap.leaks()[0].num_blocks == 4
        with pytest.raises(LifetimeError, match="the stream is gone"):
            lease.release()

    def test_a_transfer_goes_on_while_leased_and_after(self, clock: Clock) -> None:
        heap, other = heap_of(8), heap_of(8)
        batch = take(heap, 4)
        ended = False
        event = SimpleNamespace(query=lambda: ended)
        with heap.lease(batch, 10):
            foreign_transfer(event, source=batch)
            with pytest.raises(BlockInUseError):
                offload(batch, into=other, free=True)
            assert offload(batch, into=other) is not None
            for obj in batch:
                obj.ref_count_down()
        assert heap.stats().pending_bytes == 4 * PAGE
        ended = True
        assert heap.stats().allocated_bytes == 0

    def test_a_lease_on_a_view_pins_in_this_process_only(self, clock: Clock) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        view = heap.view(batch.metadata)
        lease = heap.lease(view, 10)
        assert (view.pin_counts.sum(), batch.pin_counts.sum()) == (4, 0)
        for obj in view[:2]:
            obj.ref_count_down()
        assert lease.release()
        assert view.live.tolist() == [False, False, True, True]
        assert batch.live.all()
        assert allocated_pages(heap) == 4

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_has_leases_of_its_own(self) -> None:
        heap = heap_of(8)
        batch = take(heap, 4)
        lease = heap.lease(batch, 3600)

        def end() -> tuple[bool, int]:
            found = lease.release()
            heap.batched_free(batch)
            return found, heap.stats().allocated_bytes

        assert in_a_child(end) == (True, 0)
        assert batch.pin_counts.sum() == 4
        assert lease.extend(5)

    def test_inside_an_operation_a_lease_is_refused_and_a_release_put_off(self) -> None:
        heap = heap_of(8)
        batch, more = take(heap, 4), take(heap, 2)
        lease = heap.lease(batch, 3600)
        found: list[Any] = []

        class Evil(dict):  # type: ignore[type-arg]
            def copy(self) -> Any:
                for call in (lambda: heap.lease(more, 5), lambda: lease.extend(9)):
                    with pytest.raises(ReentrantCallError):
                        call()
                found.append(lease.release())
                return super().copy()

        ledger = heap.lifetime.ledger
        ledger.live = Evil(ledger.live)
        heap.check()
        ledger.live = dict(ledger.live)
        assert found
        assert found[0]
        heap.stats()
        assert (lease.state, batch.pin_counts.sum(), more.pin_counts.sum()) == ("released", 0, 0)

    def test_threads_end_it_once(self) -> None:
        heap = heap_of(8)
        for _ in range(50):
            batch = take(heap, 4)
            lease = heap.lease(batch, 3600)
            ended: list[bool] = []
            raised = in_threads(
                [lambda ended=ended, lease=lease: ended.append(lease.release())] * 4  # type: ignore[misc]
            )
            assert raised == [None] * 4
            assert sorted(ended) == [False, False, False, True]
            heap.batched_free(batch)


class Model:
    """What each block of one batch must look like, one by one."""

    def __init__(self, count: int) -> None:
        self.references = [1] * count
        self.pins = [0] * count
        self.leases: list[tuple[Any, set[int], list[float]]] = []

    def leases_on(self, row: int, now: float) -> int:
        return sum(row in rows and now < deadline[0] for _, rows, deadline in self.leases)

    def settle(self, now: float) -> None:
        self.leases = [each for each in self.leases if now < each[2][0]]
        for row, count in enumerate(self.references):
            if count == 0 and not self.pins[row] and not self.leases_on(row, now):
                self.references[row] = -1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [5, 400])
def test_against_a_naive_model(clock: Clock, seed: int, count: int) -> None:
    rng = random.Random(seed)
    heap = TensorMemoryAllocator(torch.zeros(count * 64, dtype=torch.uint8), 64)
    batch = heap.batched_allocate([64], torch.uint8, count)
    assert isinstance(batch, MemoryBatch)
    model = Model(count)
    for _ in range(120):
        clock.now += rng.choice([0, 0, 1, 4])
        now = clock.now
        model.settle(now)
        live = [row for row in range(count) if model.references[row] >= 0]
        if not live:
            break
        some = rng.sample(live, min(len(live), rng.choice([1, 2, count])))
        row = some[0]
        ttl = rng.choice([1, 3, 10])
        what = rng.choice(["all", "rows", "objects", "one", "end", "extend", "down", "up", "pin"])
        if what == "all" and len(live) == count:
            model.leases.append((heap.lease(batch, ttl), set(range(count)), [now + ttl]))
        elif what == "rows":
            model.leases.append((heap.lease(batch, ttl, rows=some), set(some), [now + ttl]))
        elif what == "objects":
            objs = [batch[each] for each in some]
            model.leases.append((heap.lease(objs, ttl), set(some), [now + ttl]))
        elif what == "one":
            model.leases.append((batch[row].pin(ttl=ttl), {row}, [now + ttl]))
        elif what == "end" and model.leases:
            entry = rng.choice(model.leases)
            assert entry[0].release()
            model.leases.remove(entry)
        elif what == "extend" and model.leases:
            lease, _, deadline = rng.choice(model.leases)
            assert lease.extend(ttl)
            deadline[0] = max(deadline[0], now + ttl)
        elif what == "down":
            for each in some:
                if model.references[each] > 0:
                    batch[each].ref_count_down()
                    model.references[each] -= 1
        elif what == "up":
            batch[row].ref_count_up()
            model.references[row] += 1
        elif what == "pin":
            if model.pins[row]:
                batch[row].unpin()
                model.pins[row] -= 1
            else:
                batch[row].pin()
                model.pins[row] += 1
        model.settle(now)
        heap.stats()
        references = [max(each, 0) for each in model.references]
        pins = [
            model.pins[each] + model.leases_on(each, now) if model.references[each] >= 0 else 0
            for each in range(count)
        ]
        assert batch.live.tolist() == [each >= 0 for each in model.references]
        assert batch.ref_counts.tolist() == references
        assert batch.pin_counts.tolist() == pins
        assert batch[row].pin_count == pins[row]
        assert heap.stats().allocated_bytes == 64 * sum(each >= 0 for each in model.references)
    heap.check()
