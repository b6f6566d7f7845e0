"""Transfers that others make: their blocks are protected until the others are done."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, filled, heap_on
from foreign_code import Foreign, Interrupted, TimeOutError, interrupts, no_deadlock
from forked_child import in_a_child
from small_heaps import PAGE, heap_of, take
from transfer_fixtures import device

from kvheap import (
    ClosedError,
    ForeignObjectError,
    LifetimeError,
    MemoryBatch,
    TensorMemoryAllocator,
    Transfer,
    TransferError,
    foreign_transfer,
    offload,
)
from kvheap.blocks.rows import Rows
from kvheap.device import completion
from kvheap.transfer import copy, runs

__all__ = ["device"]


class Work:
    """Work of others that ends, or fails, when a test says so."""

    begun: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self.has_ended = False
        self.failure: BaseException | None = None
        self.begun.append(self)

    def query(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.has_ended


class Waited(Work):
    """Such work that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def synchronize(self) -> None:
        assert self.over.wait(20)
        if self.failure is not None:
            raise self.failure


def end(work: Any) -> None:
    if isinstance(work, Future):
        work.set_result(None)
        return
    work.has_ended = True
    if isinstance(work, Waited):
        work.over.set()


def fail(work: Any, failure: BaseException) -> None:
    if isinstance(work, Future):
        work.set_exception(failure)
        return
    work.failure = failure
    if isinstance(work, Waited):
        work.over.set()


@pytest.fixture(autouse=True)
def leave_nothing_in_flight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests count what is in flight."""
    # A log record that is kept keeps a traceback, whose frames keep batches.
    monkeypatch.setattr(logging.getLogger("kvheap"), "propagate", False)
    yield
    batch = take(heap_of(1), 1)
    for work in Work.begun:
        work.has_ended, work.failure = True, None
    while Work.begun and len(completion.in_flight) > 32:
        foreign_transfer(Work.begun[0], source=batch)
        Work.begun.pop()


KINDS: dict[str, Callable[[], Any]] = {"event": Work, "awaited": Waited, "future": Future}


@pytest.fixture(params=KINDS)
def work(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def rest(heap: TensorMemoryAllocator) -> set[int]:
    """The addresses that can be allocated now."""
    got = heap.batched_allocate([PAGE], torch.uint8, 99, allow_partial=True)
    assert got is not None
    found = set(got.addresses.tolist())
    heap.batched_free(got)
    return found


def small_heap(**options: Any) -> TensorMemoryAllocator:
    return heap_of(8, on_full=None, stream_wait_s=0.0, **options)


class TestProtection:
    @pytest.mark.parametrize("how", ["free", "drop", "free some", "count down", "rows", "objects"])
    @pytest.mark.parametrize("side", ["source", "target"])
    @pytest.mark.parametrize("begun", [True, False])
    def test_no_byte_is_handed_out_before_the_end(
        self, work: Any, how: str, side: str, begun: bool
    ) -> None:
        heap = small_heap()
        batch: MemoryBatch | None = take(heap, 4)
        assert batch is not None
        blocks: Any = batch
        if how == "rows":
            blocks = Rows(batch, np.array([1, 2], np.int64))
        elif how == "objects":
            blocks = batch[1:3]
        used = set(batch.addresses.tolist()[1:3] if blocks is not batch else batch.addresses)
        transfer = foreign_transfer(work if begun else lambda: work, **{side: blocks})
        if how == "drop":
            del batch, blocks
            gc.collect()
        elif how in ("free some", "rows", "objects"):
            heap.batched_free(batch[1:3])
            used = set(batch.addresses.tolist()[1:3])
        elif how == "count down":
            for obj in batch:
                obj.ref_count_down()
        else:
            heap.batched_free(batch)
        assert not rest(heap) & used
        assert heap.stats().pending_bytes == len(used) * PAGE
        assert not transfer.done()
        end(work)
        assert used <= rest(heap)
        assert heap.stats().pending_bytes == 0
        assert transfer.done()
        transfer.result()
        assert heap.memcheck()

    def test_2000_ended_transfers_leave_no_records(self) -> None:
        heap = small_heap()
        batch = take(heap, 4)
        for number in range(2000):
            work = Work()
            blocks = batch if number % 2 else batch[1:3]
            foreign_transfer(work, source=blocks)
            end(work)
        assert len(batch.counts.streams_of(None)) <= 16
        assert len(completion.in_flight) <= 64
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 0

    def test_memory_is_kept_until_the_end(self) -> None:
        memory = np.zeros(8 * PAGE, np.uint8)
        view = memory[:]
        alive = weakref.ref(view)
        heap = TensorMemoryAllocator(torch.from_numpy(view))
        work = Work()
        transfer = foreign_transfer(work, target=take(heap, 2))
        del view, heap
        gc.collect()
        assert alive() is not None
        end(work)
        assert transfer.done()
        gc.collect()
        assert alive() is None

    def test_an_ended_transfer_keeps_neither_work_nor_memory(self, work: Any) -> None:
        heap = small_heap()
        transfer = foreign_transfer(work, target=take(heap, 2))
        end(work)
        transfer.result()
        alive = weakref.ref(work), weakref.ref(heap)
        del work, heap
        gc.collect()
        assert [each() for each in alive][1] is None

    def test_what_is_offloaded_and_freed_waits_too(self) -> None:
        heap, other = small_heap(), small_heap()
        batch, work = take(heap, 2), Work()
        foreign_transfer(work, source=batch)
        away = offload(batch, into=other, free=True)
        assert away is not None
        away.transfer.result()  # type: ignore[union-attr]
        assert heap.stats().pending_bytes == 2 * PAGE
        end(work)
        assert heap.stats().allocated_bytes == 0

    def test_on_a_device(self, device: FakeDevice) -> None:
        heap = heap_on(device, "device", 1 << 16)
        batch, work = filled(heap, 4), Work()
        transfer = foreign_transfer(work, target=batch)
        heap.batched_free(batch)
        assert heap.stats().pending_bytes > 0
        end(work)
        transfer.wait_stream(device.stream())
        assert heap.stats().allocated_bytes == 0


class TestOrder:
    @pytest.mark.parametrize("read", ["tensor", "free into out", "copy", "offload", "wait_stream"])
    def test_whoever_reads_a_target_waits(self, work: Any, read: str) -> None:
        heap, other = small_heap(), small_heap()
        batch = take(heap, 2)
        transfer = foreign_transfer(work, target=batch)
        assert batch.transfer is transfer

        def write_and_end() -> None:
            time.sleep(0.02)
            heap.buffer[: 2 * PAGE] = 9
            end(work)

        writer = threading.Thread(target=write_and_end)
        writer.start()
        out = torch.zeros(2, PAGE, dtype=torch.uint8)
        if read == "tensor":
            out = torch.stack([obj.tensor for obj in batch])  # type: ignore[misc]
        elif read == "free into out":
            heap.batched_free(batch, out=out)
        elif read == "copy":
            copy((batch, out)).result()
        elif read == "offload":
            moved = offload(batch, into=other)
            assert moved is not None
            out = torch.stack([obj.tensor for obj in moved])  # type: ignore[misc]
        else:
            transfer.wait_stream(None)
            out = heap.buffer[: 2 * PAGE].clone()
        writer.join()
        assert out.eq(9).all()

    def test_objects_that_are_a_whole_batch_are_one(self) -> None:
        batch = take(small_heap(), 3)
        transfer = foreign_transfer(Work(), target=[batch[2], batch[0], batch[1]])
        assert batch.transfer is transfer
        other = take(small_heap(), 3)
        foreign_transfer(Work(), target=other[:2])
        assert other.transfer is None

    def test_a_copy_into_what_is_being_filled_waits(self) -> None:
        heap = small_heap()
        batch, work = take(heap, 2), Work()
        foreign_transfer(work, target=batch)
        timer = threading.Timer(0.02, lambda: end(work))
        timer.start()
        copy((torch.full((2, PAGE), 5, dtype=torch.uint8), batch)).result()
        assert work.has_ended
        assert batch[1].tensor.eq(5).all()  # type: ignore[union-attr]

    @pytest.mark.parametrize("side", [0, 1])
    def test_one_that_never_ends_holds_up_no_other_copy(
        self, monkeypatch: pytest.MonkeyPatch, side: int
    ) -> None:
        """A copy of its blocks waits on its caller's thread, not on the one that copies."""
        monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)
        heap, other, work = small_heap(), small_heap(), Work()
        batch = take(heap, 2)
        foreign_transfer(work, target=batch)
        tensors = [torch.zeros(2, PAGE, dtype=torch.uint8) for _ in range(2)]
        pair = (batch, tensors[0]) if side == 0 else (tensors[0], batch)
        waiting = threading.Thread(target=lambda: copy(pair).result())
        waiting.start()
        more = filled(other, 2)
        for _ in range(3):
            time.sleep(0.01)
            copy((more, tensors[1])).result(timeout_s=20)
        assert waiting.is_alive()
        end(work)
        waiting.join(20)
        assert not waiting.is_alive()

    def test_waits_with_and_without_a_limit(self, work: Any) -> None:
        transfer = foreign_transfer(work, target=take(small_heap(), 1))
        assert not transfer.wait(0.01)
        assert not transfer.parts[0].done()
        with pytest.raises(TimeoutError, match=r"foreign by others.* has not ended in 0.01 s"):
            transfer.result(0.01)
        threading.Timer(0.02, lambda: end(work)).start()
        with transfer:
            pass
        assert transfer.wait()
        assert transfer.parts[0].done()

    def test_awaited_by_a_loop(self) -> None:
        heap = small_heap()

        async def work() -> str:
            await asyncio.sleep(0.01)
            return "read"

        async def main() -> None:
            task = asyncio.ensure_future(work())
            transfer = foreign_transfer(task, target=take(heap, 1))
            with pytest.raises(RuntimeError, match="await the transfer"):
                transfer.wait()
            with pytest.raises(TimeoutError):
                transfer.result(0.001)
            await transfer
            assert task.result() == "read"

        asyncio.run(main())
        assert heap.stats().pending_bytes == 0

    def test_a_side_that_is_being_filled_is_refused(self) -> None:
        heap = small_heap()
        batch, first, second = take(heap, 2), Work(), Work()
        transfer = foreign_transfer(first, target=batch)
        calls: list[int] = []
        for side in ("source", "target"):
            with pytest.raises(RuntimeError, match=r"is still being filled by Transfer\(foreign"):
                foreign_transfer(lambda: calls.append(1), **{side: batch})  # type: ignore[arg-type]
        assert calls == []
        with pytest.raises(RuntimeError, match="is still being filled"):
            foreign_transfer(second, target=batch)
        assert batch.transfer is transfer
        heap.batched_free(batch)
        end(first)
        assert heap.stats().pending_bytes == 2 * PAGE  # the second had begun
        end(second)
        assert heap.stats().pending_bytes == 0


FAILURES: dict[str, Callable[[], BaseException]] = {
    "an error": lambda: RuntimeError("the peer is lost"),
    "an operating system's error": lambda: OSError(5, "no disk"),
    "a time-out": lambda: TimeoutError("gave up"),
}


class TestFailure:
    @pytest.mark.parametrize("failure", FAILURES)
    def test_blocks_of_a_failure_are_quarantined(self, work: Any, failure: str) -> None:
        heap = small_heap()
        batch = take(heap, 3)
        transfer = foreign_transfer(work, target=batch, name="nixl")
        cause = FAILURES[failure]()
        fail(work, cause)
        with pytest.raises(TransferError, match="a transfer by nixl failed") as raised:
            transfer.result()
        assert raised.value.__cause__ is cause
        assert transfer.done()
        assert transfer.is_quarantined
        assert repr(transfer).endswith("failed)")
        for read in (lambda: batch[0].tensor, lambda: copy((batch, torch.zeros(3, PAGE).byte()))):
            with pytest.raises(TransferError, match="nixl failed"):
                read()
        with pytest.raises(TransferError, match="nixl failed"):
            copy((torch.zeros(3, PAGE).byte(), batch))  # nixl may still write there
        heap.batched_free(batch)
        used = set(batch.addresses.tolist())
        for _ in range(5):
            assert not rest(heap) & used
            assert heap.stats().pending_bytes == 3 * PAGE
        for _ in range(3):
            with pytest.raises(TimeoutError, match=f"{3 * PAGE} freed bytes are still in use"):
                heap.close(timeout_s=0.01)

    def test_what_has_ended_after_all_comes_back(self) -> None:
        heap = small_heap()
        batch, work = take(heap, 3), Work()
        transfer = foreign_transfer(work, target=batch)
        work.failure = RuntimeError("the peer does not answer")
        assert transfer.wait(1)
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 3 * PAGE
        for _ in range(20):  # looks at copies in flight
            foreign_transfer(Work(), source=take(small_heap(), 1))
        with pytest.raises(TimeoutError):
            heap.close(timeout_s=0.0)
        work.failure, work.has_ended = None, True  # the peer is known to be gone
        heap.close(timeout_s=1.0)
        assert not transfer.is_quarantined
        with pytest.raises(TransferError, match="does not answer"):
            transfer.result()

    def test_memory_is_given_back_though_nobody_asks_any_more(self) -> None:
        memory = np.zeros(8 * PAGE, np.uint8)
        view = memory[:]
        alive, work = weakref.ref(view), Work()
        heap = TensorMemoryAllocator(torch.from_numpy(view))
        work.failure = RuntimeError("the peer does not answer")
        foreign_transfer(work, target=take(heap, 2))
        del view, heap
        for has_ended in (False, True):
            for _ in range(40):  # looks at copies in flight
                end(begun := Work())
                foreign_transfer(begun, source=take(small_heap(), 1))
            gc.collect()
            assert (alive() is None) == has_ended
            work.failure, work.has_ended = None, True

    def test_a_failure_that_says_so_has_ended(self, work: Any) -> None:
        heap = small_heap()
        batch = take(heap, 3)
        transfer = foreign_transfer(work, target=batch)
        failure = TransferError("17 of 4,096 blocks were evicted there")
        failure.__cause__ = cause = KeyError("a")
        fail(work, failure)
        with pytest.raises(TransferError, match="17 of 4,096") as raised:
            transfer.result()
        assert raised.value.__cause__ is cause
        assert raised.value is not failure
        assert not transfer.is_quarantined
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 0
        heap.close(timeout_s=0.0)

    def test_a_future_that_is_locked_for_ever_blocks_nobody(self) -> None:
        """As a signal handler leaves it that raises while the main thread asks it."""
        future: Future[None] = Future()
        transfer = foreign_transfer(future, target=take(small_heap(), 1))
        asked: list[bool] = []
        with future._condition:
            asking = threading.Thread(target=lambda: asked.append(transfer.done()))
            asking.start()
            asking.join(20)
        assert asked == [False]
        future.set_result(None)
        transfer.result()

    def test_a_cancelled_future_has_ended_if_it_never_ran(self) -> None:
        heap = small_heap()
        started, over = threading.Event(), threading.Event()

        def hold() -> None:
            started.set()
            over.wait()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(hold)
            started.wait()
            job = pool.submit(lambda: None)
            transfer = foreign_transfer(job, target=take(heap, 2))
            assert job.cancel()
            over.set()
            with pytest.raises(TransferError, match="cancelled"):
                transfer.result()
        assert not transfer.is_quarantined

    def test_a_cancelled_task_may_go_on(self) -> None:
        heap = small_heap()
        over = threading.Event()

        async def main() -> Transfer:
            loop = asyncio.get_running_loop()
            job = loop.run_in_executor(None, over.wait)  # a thread, which cancel() does not stop
            transfer = foreign_transfer(job, target=take(heap, 2))
            job.cancel()
            await asyncio.sleep(0)
            with pytest.raises(TransferError, match="cancelled"):
                await transfer
            over.set()
            return transfer

        transfer = asyncio.run(main())
        assert transfer.is_quarantined
        assert heap.stats().pending_bytes == 2 * PAGE

    def test_one_that_never_ends_lets_the_heap_be_closed_later(self, work: Any) -> None:
        heap = small_heap()
        batch = take(heap, 2)
        foreign_transfer(work, target=batch)
        for _ in range(3):
            with pytest.raises(TimeoutError, match="the buffers are not released"):
                heap.close(timeout_s=0.01)
            assert heap.closed
        end(work)
        heap.close(timeout_s=1.0)
        heap.close(timeout_s=0.0)

    def test_a_failed_wait_counts_as_a_failure(self) -> None:
        class Strange(Work):
            def synchronize(self) -> None:
                raise ConnectionResetError("peer")

        transfer = foreign_transfer(Strange(), target=take(small_heap(), 1))
        with pytest.raises(TransferError, match="ConnectionResetError"):
            transfer.result()
        assert transfer.is_quarantined

    def test_an_error_keeps_no_frame_of_ours_alive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            logging.getLogger("kvheap"), "disabled", True
        )  # pytest keeps the records

        class Peer:
            pass

        class Failing:
            def query(self) -> bool:
                peer = Peer()
                alive.append(weakref.ref(peer))
                raise RuntimeError("no peer")

        alive: list[weakref.ref[Peer]] = []
        gc.disable()
        try:
            transfer = foreign_transfer(Failing(), target=take(small_heap(), 1))
            assert transfer.done()
            assert [each() for each in alive] == [None] * len(alive)
        finally:
            gc.enable()


class TestBeginning:
    def test_blocks_are_protected_before_anything_begins(self) -> None:
        heap = small_heap()
        batch, work = take(heap, 3), Work()

        def begin() -> Work:
            heap.batched_free(batch)
            assert heap.stats().pending_bytes == 3 * PAGE
            return work

        foreign_transfer(begin, target=batch)
        assert heap.stats().pending_bytes == 3 * PAGE
        end(work)
        assert heap.stats().pending_bytes == 0

    def test_a_class_begins_work(self) -> None:
        heap = small_heap()
        transfer = foreign_transfer(Work, target=take(heap, 1))
        assert not transfer.is_quarantined
        assert not transfer.done()
        end(Work.begun[-1])
        transfer.result()

    def test_what_could_not_begin_protects_nothing(self) -> None:
        heap = small_heap()
        batch = take(heap, 3)

        def begin() -> Work:
            raise ConnectionRefusedError("nobody there")

        with pytest.raises(ConnectionRefusedError):
            foreign_transfer(begin, target=batch)
        assert batch.transfer is None
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 0

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
    def test_what_was_interrupted_while_it_began_is_quarantined(
        self, stop: type[BaseException]
    ) -> None:
        heap = small_heap()
        batch = take(heap, 3)

        def begin() -> Work:
            raise stop

        with pytest.raises(stop):
            foreign_transfer(begin, target=batch)
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 3 * PAGE

    @pytest.mark.parametrize("result", [None, 7, "done", object()])
    def test_what_returns_no_event_is_quarantined(self, result: object) -> None:
        heap = small_heap()
        batch = take(heap, 3)
        with pytest.raises(TypeError, match=r"an event must have query\(\), and a future done\(\)"):
            foreign_transfer(lambda: result, target=batch)  # type: ignore[arg-type,return-value]
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 3 * PAGE

    def test_arguments_that_are_none_are_refused_before_anything_begins(self) -> None:
        heap = small_heap()
        batch, calls = take(heap, 3), []
        begin: Any = lambda: calls.append(1)  # noqa: E731
        with pytest.raises(TypeError, match=r"work must be an event with query\(\)"):
            foreign_transfer(7, target=batch)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="needs blocks: pass its source, its target"):
            foreign_transfer(begin)
        with pytest.raises(TypeError, match="name must be a text, got 7"):
            foreign_transfer(begin, target=batch, name=7)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="MemoryBatch or a list"):
            foreign_transfer(begin, target=torch.zeros(4))  # type: ignore[arg-type]
        view = heap.view(batch.metadata, writable=False)
        with pytest.raises(ForeignObjectError, match="writable=True"):
            foreign_transfer(begin, target=view)
        heap.free(batch[1])
        for blocks in (batch, [batch[0], batch[1]]):
            with pytest.raises(LifetimeError, match="is freed"):
                foreign_transfer(begin, source=blocks)
        heap.close()
        with pytest.raises(ClosedError):
            foreign_transfer(begin, source=batch[2:])
        assert calls == []
        assert len(batch.counts.streams_of(None)) == 0

    def test_a_failed_source_is_not_sent_on(self) -> None:
        heap = small_heap()
        batch, work = take(heap, 3), Work()
        foreign_transfer(work, target=batch)
        work.failure = RuntimeError("no peer")
        with pytest.raises(TransferError, match="no peer"):
            foreign_transfer(lambda: pytest.fail("it began"), source=batch)


OURS: dict[str, Any] = {"modules": ("kvheap.",), "everywhere": False}


@pytest.mark.parametrize("error", [Interrupted, TimeOutError])
@pytest.mark.parametrize("ask", [False, True])
def test_an_interrupt_at_any_place(error: type[BaseException], ask: bool) -> None:
    """Whatever has begun is protected until its end; and what has not begun is not."""
    number = 0
    while True:
        heap = small_heap()
        batch, work, begun = take(heap, 2), Work(), []

        def begin(begun: list[Work] = begun, work: Work = work) -> Work:
            begun.append(work)
            return work

        def task(batch: MemoryBatch = batch, work: Work = work, begin: Any = begin) -> None:
            transfer = foreign_transfer(begin, target=batch)
            if ask:
                work.has_ended = True
                transfer.result()

        with no_deadlock():
            struck = interrupts(number, task, error, **OURS)
        work.has_ended = ask and bool(begun)
        heap.batched_free(batch)
        pending = heap.stats().pending_bytes
        assert pending == (2 * PAGE if begun and not ask else 0), number
        work.has_ended = True
        assert heap.stats().allocated_bytes == 0, number
        assert heap.memcheck()
        if not struck:
            break
        number += 1
    assert number > 20


def test_foreign_code_at_any_place() -> None:
    """A finalizer or a handler that frees the blocks, or asks for the transfer."""
    number = 0
    while True:
        heap = small_heap()
        batch, other, work = take(heap, 2), take(heap, 2), Work()
        known = foreign_transfer(work, source=other)

        def visit(heap: Any = heap, other: Any = other, known: Transfer = known) -> None:
            if other[0].is_valid():
                heap.batched_free(other)
            known.done()
            assert not known.wait(0.0)

        foreign = Foreign(number, visit, **OURS)
        with no_deadlock():
            struck = foreign.strikes(lambda batch=batch: foreign_transfer(Work(), target=batch))
        heap.stats()
        assert heap.stats().pending_bytes == (2 * PAGE if struck else 0)
        work.has_ended = True
        assert heap.stats().pending_bytes == 0
        if not struck:
            break
        number += 1
    assert number > 20


def test_many_threads_ask_one_transfer(work: Any) -> None:
    heap = small_heap()
    transfer = foreign_transfer(work, target=take(heap, 2))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            transfer.result(20)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    end(work)
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_it_does_not_go_on_in_a_forked_child() -> None:
    heap = small_heap()
    batch, work = take(heap, 2), Work()
    transfer = foreign_transfer(work, target=batch)

    def ask() -> tuple[bool, bool, int]:
        with pytest.raises(TransferError, match="does not continue in a forked child"):
            transfer.result()
        heap.batched_free(batch)
        return transfer.done(), transfer.is_quarantined, heap.stats().pending_bytes

    assert in_a_child(ask) == (True, True, 2 * PAGE)
    assert not transfer.done()
    end(work)
    transfer.result()
