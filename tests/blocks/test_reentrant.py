"""Code of the user's that runs inside an operation, on its thread, may call the heap.

The garbage collector calls finalizers and weak-reference callbacks, the interpreter calls signal
handlers, and kvheap calls ``on_full``. None of them waits for its own thread; what it frees is
free afterwards, and what it is told is true.
"""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from types import FrameType

import pytest
import torch
from foreign_code import Foreign, TimeOutError, interrupts
from heap_scenes import OPERATIONS, PAGES, Scene, require_that_every_byte_is_accounted_for
from small_heaps import PAGE, FakeStream, heap_of, no_debug, take

from kvheap import (
    AddressManager,
    ClosedError,
    FullReport,
    MemoryBatch,
    MemoryObj,
    ReentrantCallError,
    TensorMemoryAllocator,
)
from kvheap.addresses.free_list import FreeList
from kvheap.blocks.rows import Rows
from kvheap.device.events import ReleaseVoidError

__all__ = ["no_debug"]

LIMIT_S = 60.0
"""Seconds after which a test that waits for itself is given up."""


@contextmanager
def collector_at_every_allocation() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()  # so that each collection is quick
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def in_time(*tasks: Callable[[], object]) -> None:
    """Run tasks on threads of their own; fails if one does not end."""
    failures: list[BaseException] = []

    def run(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a thread waits for itself"
    if failures:
        raise failures[0]


# -- at every place --------------------------------------------------------------------------------


class Visitors:
    """What foreign code may do to a scene; each knows what must be true afterwards."""

    @staticmethod
    def counts_down(scene: Scene) -> None:
        scene.foreign[0].ref_count_down()

    @staticmethod
    def frees_a_batch(scene: Scene) -> None:
        scene.heap.batched_free(scene.foreign)

    @staticmethod
    def frees_into_out(scene: Scene) -> None:
        out = torch.zeros(2, PAGE, dtype=torch.uint8)
        scene.heap.batched_free(scene.foreign, out=out)
        assert out.eq(7).all()

    @staticmethod
    def pins(scene: Scene) -> None:
        scene.foreign[1].pin()
        scene.foreign[1].ref_count_up()
        scene.foreign[1].ref_count_down()
        scene.foreign[1].unpin()

    @staticmethod
    def asks(scene: Scene) -> None:
        heap = scene.heap
        stats = heap.stats()
        assert stats.heap_bytes == PAGES * PAGE == stats.free_bytes + stats.allocated_bytes
        assert 0 <= stats.largest_free_bytes <= stats.free_bytes
        extents = heap.free_extents()
        assert extents[:, 1].sum() == stats.free_bytes
        assert (extents[1:, 0] >= extents[:-1].sum(1)).all()
        assert heap.memcheck()
        assert heap.max_batch([PAGE], torch.uint8) <= stats.free_bytes // PAGE
        assert heap.full_report().heap_bytes == PAGES * PAGE
        assert sum(group.num_blocks for group in heap.leaks()) <= PAGES
        assert heap.address_manager.get_heap_size() == PAGES * PAGE

    @staticmethod
    def allocates(scene: Scene) -> None:
        batch = scene.heap.batched_allocate([PAGE], torch.uint8, 1)
        if batch is not None:
            assert scene.heap.stats().allocated_bytes >= PAGE
            scene.kept.append(batch)

    @staticmethod
    def allocates_some(scene: Scene) -> None:
        batch = scene.heap.batched_allocate([PAGE], torch.uint8, 2, allow_partial=True)
        assert batch is not None
        scene.kept.append(batch)


VISITORS: dict[str, Callable[[Scene], None]] = {
    "counts down": Visitors.counts_down,
    "frees a batch": Visitors.frees_a_batch,
    "frees into out": Visitors.frees_into_out,
    "pins": Visitors.pins,
    "asks": Visitors.asks,
    "allocates": Visitors.allocates,
    "allocates some": Visitors.allocates_some,
}


def visits(number: int, visitor: Callable[[], object], task: Callable[[], object]) -> bool:
    """Whether the visitor was called before one of the bytecodes of ``task``."""
    return Foreign(number, visitor, function="task", everywhere=True).strikes(task)


def visit(name: str, visitor: str, number: int) -> bool:
    """Whether the visitor was called before the operation ended."""
    scene = Scene({})
    source = torch.full((2, PAGE), 7, dtype=torch.uint8)
    foreign = scene.heap.batched_allocate([PAGE], torch.uint8, 2, source=source)
    assert foreign is not None
    scene.foreign = foreign
    scene.kept.append(foreign)

    def task() -> None:
        OPERATIONS[name](scene)

    was_called = visits(number, lambda: VISITORS[visitor](scene), task)
    if was_called:
        scene.heap.stats()  # what was put off is done by the next operation
        live, references = foreign.live.tolist(), foreign.ref_counts.tolist()
        freed = visitor.startswith("frees"), visitor.startswith(("frees", "counts"))
        assert live == [not freed[1], not freed[0]]
        assert references == [int(each) for each in live]
    require_that_every_byte_is_accounted_for(scene)
    return was_called


@pytest.mark.parametrize("visitor", VISITORS)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "detach"])
def test_foreign_code_at_any_place_of_an_operation(name: str, visitor: str) -> None:
    def work() -> None:
        number, step = len(visitor), 331 if "filled" in name or "out" in name else 41
        while visit(name, visitor, number):
            number += step

    in_time(work)


# -- finalizers ------------------------------------------------------------------------------------


def free_by_finalize(heap: TensorMemoryAllocator) -> None:
    class Request:
        def __init__(self) -> None:
            self.itself = self
            self.kv = heap.allocate([PAGE], torch.uint8)
            if self.kv is not None:
                weakref.finalize(self, self.kv.ref_count_down)

    Request()


def free_by_del(heap: TensorMemoryAllocator) -> None:
    class Request:
        def __init__(self) -> None:
            self.itself = self
            self.kv = heap.allocate([PAGE], torch.uint8)

        def __del__(self) -> None:
            if self.kv is not None:
                heap.free(self.kv)

    Request()


def free_by_callback(heap: TensorMemoryAllocator) -> None:
    class Request:
        def __init__(self) -> None:
            self.itself = self

    batch = heap.batched_allocate([PAGE], torch.uint8, 2)

    def free_and_ask(reference: weakref.ref[Request]) -> None:
        kept.discard(reference)
        assert batch is not None
        heap.batched_free(batch)
        heap.stats()
        other = heap.batched_allocate([PAGE], torch.uint8, 1)
        if other is not None:
            heap.batched_free(other)

    if batch is not None:
        kept.add(weakref.ref(Request(), free_and_ask))


kept: set[object] = set()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("request_of", [free_by_finalize, free_by_del, free_by_callback])
def test_finalizers_that_free(request_of: Callable[[TensorMemoryAllocator], None]) -> None:
    heap = heap_of(64, on_full=None, stream_wait_s=0.0)

    def work() -> None:
        for _ in range(1500):
            request_of(heap)
            batch = heap.batched_allocate([PAGE], torch.uint8, 3)
            if batch is not None:
                batch[0].pin()
                batch[0].unpin()
                heap.free(batch[1])
                heap.batched_free([batch[0], batch[2]])

    with collector_at_every_allocation():
        in_time(work)
    gc.collect()
    heap.stats()
    assert heap.stats().allocated_bytes == 0
    assert heap.stats().dropped_blocks == 0
    assert heap.memcheck()


def test_finalizers_of_two_heaps_do_not_wait_for_each_other() -> None:
    """Each thread holds the lock of one heap while a finalizer frees in the other one."""
    heaps = [heap_of(64, on_full=None, stream_wait_s=0.0) for _ in range(2)]

    def work(mine: TensorMemoryAllocator, other: TensorMemoryAllocator) -> None:
        for _ in range(1500):
            free_by_finalize(other)
            batch = mine.batched_allocate([PAGE], torch.uint8, 2)
            if batch is not None:
                mine.batched_free(batch)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with collector_at_every_allocation():
            in_time(lambda: work(heaps[0], heaps[1]), lambda: work(heaps[1], heaps[0]))
    finally:
        sys.setswitchinterval(interval)
    gc.collect()
    for heap in heaps:
        assert heap.stats().allocated_bytes == 0
        assert heap.memcheck()


# -- signal handlers -------------------------------------------------------------------------------


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="needs the main thread"
)
def test_signal_handlers_that_call_the_heap() -> None:
    heap = heap_of(64, on_full=None, stream_wait_s=0.0)
    mailbox = heap.batched_allocate([PAGE], torch.uint8, 8)
    assert mailbox is not None
    calls, waiting = 0, list(mailbox)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal calls
        calls += 1
        stats = heap.stats()
        assert stats.heap_bytes == stats.free_bytes + stats.allocated_bytes
        other = heap.allocate([PAGE], torch.uint8)
        if other is not None:
            waiting.append(other)
        if waiting:
            waiting.pop().ref_count_down()
        signal.setitimer(signal.ITIMER_REAL, 5e-5)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 5e-5)
        deadline = time.monotonic() + LIMIT_S
        while calls < 3000 and time.monotonic() < deadline:
            batch = heap.batched_allocate([PAGE], torch.uint8, 5)
            if batch is not None:
                heap.free(batch[2])
                del batch
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls >= 3000
    heap.stats()
    assert heap.stats().allocated_bytes == len(waiting) * PAGE
    assert heap.memcheck()


# -- callbacks and the end of the process ----------------------------------------------------------


def test_on_full_may_free_allocate_and_close() -> None:
    reports: list[FullReport] = []

    def on_full(report: FullReport) -> None:
        reports.append(report)
        heap.free(blocks.pop())
        other = heap.allocate([PAGE], torch.uint8)
        assert other is not None
        heap.free(other)
        assert heap.stats().free_bytes == PAGE
        assert heap.allocate([2 * PAGE], torch.uint8) is None  # which reports nothing: too soon

    heap = heap_of(4, on_full=on_full, stream_wait_s=0.0)
    batch = heap.batched_allocate([PAGE], torch.uint8, 4)
    assert batch is not None
    blocks = list(batch)
    assert heap.allocate([PAGE], torch.uint8) is None
    assert len(reports) == 1
    assert heap.allocate([PAGE], torch.uint8) is not None


def test_a_stream_that_calls_the_heap_while_it_is_asked() -> None:
    heap = heap_of(8, on_full=None, stream_wait_s=0.0)

    class Curious:
        def record_event(self) -> Curious:
            self.query()
            return self

        def query(self) -> bool:
            if heap.closed:
                return True
            other = heap.allocate([PAGE], torch.uint8)
            assert other is not None
            heap.free(other)
            return heap.stats().heap_bytes == 8 * PAGE

    def work() -> None:
        batch = heap.batched_allocate([PAGE], torch.uint8, 3)
        assert batch is not None
        batch.record_stream(Curious())
        batch[0].ref_count_down()
        heap.batched_free([batch[1], batch[2]])
        heap.stats()
        heap.close(1.0)

    in_time(work)


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_void_free_is_looked_at_again_while_it_is_looked_at(in_a_thread: bool) -> None:
    heap, stream = heap_of(8), FakeStream()
    first: list[MemoryBatch] = [take(heap, 2)]
    first[0].record_stream(stream)
    stream.submit()

    class Void:
        has_come = False

        def query(self) -> bool:
            if self.has_come:
                raise ReleaseVoidError("the blocks are live again")
            return False

    class Curious:
        def record_event(self) -> Curious:
            return self

        def query(self) -> bool:
            if void.has_come and first:  # the first release was found void a moment ago
                first.clear()
                if in_a_thread:
                    in_time(heap.stats)
                else:
                    heap.stats()
            return True

    void = Void()
    heap.lifetime.free_on([Rows(first[0], None)], void)
    second = take(heap, 1)
    second.record_stream(Curious())
    heap.batched_free(second)
    void.has_come = True
    assert (heap.stats().pending_bytes, heap.stats().free_bytes) == (2 * PAGE, 6 * PAGE)
    assert not first
    stream.finish()
    assert (heap.stats().pending_bytes, heap.stats().free_bytes) == (0, 8 * PAGE)


def test_close_from_a_finalizer() -> None:
    heap = heap_of(64, on_full=None, stream_wait_s=0.0)

    def work() -> None:
        class Owner:
            def __init__(self) -> None:
                self.itself = self

            def __del__(self) -> None:
                heap.close(1.0)

        Owner()
        while not heap.closed:
            batch = heap.batched_allocate([PAGE], torch.uint8, 2)
            if batch is not None:
                del batch

    with collector_at_every_allocation(), suppress(ClosedError):
        in_time(work)
    assert heap.closed


def test_close_inside_an_operation_does_not_wait_for_another_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That one may need what this operation holds."""
    heap, other = heap_of(4, on_full=None), heap_of(4, on_full=None)
    batch = other.batched_allocate([PAGE], torch.uint8, 1)
    assert batch is not None
    stream = FakeStream()
    stream.submit()
    batch.record_stream(stream)
    closer = threading.Thread(target=other.close, args=(LIMIT_S,))
    closer.start()
    while not other.closed:
        time.sleep(1e-3)
    time.sleep(0.05)
    take, is_closing = FreeList.take, []

    def close_and_take(free_list: FreeList, size: int) -> int | None:
        with pytest.raises(TimeoutError, match="still closing"):
            other.close(LIMIT_S)
        is_closing.append(closer.is_alive())
        return take(free_list, size)

    with monkeypatch.context() as patched:
        patched.setattr(FreeList, "take", close_and_take)
        assert heap.allocate([PAGE], torch.uint8) is not None
    assert is_closing == [True]
    stream.finish()
    closer.join(LIMIT_S)
    assert not closer.is_alive()


def test_frees_at_the_end_of_the_process() -> None:
    """``atexit``, and finalizers of objects that live until the interpreter is torn down."""
    code = """
    import atexit, faulthandler, threading, weakref
    import torch
    from kvheap import TensorMemoryAllocator

    faulthandler.dump_traceback_later(50, exit=True)
    heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8), on_full=None)
    obj, late = heap.allocate([16], torch.uint8), heap.allocate([16], torch.uint8)

    class Request:
        def __del__(self):
            late.ref_count_down()
            heap.stats()

    request = Request()
    weakref.finalize(request, print, "finalized").atexit = True

    def at_exit():
        obj.ref_count_down()
        print(heap.stats().allocated_bytes)
        heap.free(heap.allocate([16], torch.uint8))

    atexit.register(at_exit)

    def work():
        while True:
            batch = heap.batched_allocate([16], torch.uint8, 3)
            if batch is not None:
                heap.batched_free(batch)

    threading.Thread(target=work, daemon=True).start()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "Error" not in run.stderr


# -- the address manager ---------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [8, 400])
def test_the_address_manager_alone(fragments: int) -> None:
    def scene() -> tuple[AddressManager, tuple[int, int]]:
        manager = AddressManager(1024 * PAGE)
        batch = manager.batched_allocate(PAGE, 1024)
        manager.batched_free([(2 * i * PAGE, PAGE) for i in range(fragments)])
        return manager, batch[1001]

    def task_of(manager: AddressManager, which: int) -> None:
        if which == 0:
            manager.free(*manager.allocate(PAGE))
        elif which == 1:
            manager.batched_free(manager.batched_allocate(PAGE, fragments // 2))
        else:
            manager.batched_free([(3 * PAGE, PAGE), (5 * PAGE, PAGE), (901 * PAGE, PAGE)])

    def work() -> None:
        for which in range(3):
            number = 0
            while True:
                manager, foreign = scene()
                before = manager.stats().free_bytes

                def visitor(
                    manager: AddressManager = manager,
                    foreign: tuple[int, int] = foreign,
                    before: int = before,
                ) -> None:
                    stats = manager.stats()
                    assert abs(stats.free_bytes - before) <= 512 * PAGE
                    assert manager.snapshot()[:, 1].sum() == stats.free_bytes
                    assert manager.check_consistency()
                    with suppress(ReentrantCallError):
                        manager.free(*manager.allocate(PAGE))
                    manager.free(*foreign)
                    assert manager.max_batch(PAGE) >= 0

                def task(manager: AddressManager = manager, which: int = which) -> None:
                    task_of(manager, which)

                was_called = visits(number, visitor, task)
                manager.check()
                freed = 3 if which == 2 else 0
                if not was_called:
                    break
                assert manager.stats().free_bytes == before + (freed + 1) * PAGE
                number += 3 if fragments < 64 else 37
            assert number > 30

    in_time(work)


def test_a_wrong_free_that_was_put_off_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    logged = 0
    for number in range(60):
        caplog.clear()
        manager = AddressManager(8 * PAGE)
        manager.allocate(PAGE)

        def task(manager: AddressManager = manager) -> None:
            manager.free(0, PAGE)

        try:
            visits(number, partial(manager.free, 4 * PAGE, PAGE), task)
        except ValueError:
            continue  # not inside the operation: its caller is told
        assert manager.stats().free_bytes == 8 * PAGE
        logged += "has failed" in caplog.text
    assert logged > 5


def test_a_free_that_was_put_off_and_then_interrupted_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def put_off(place: int) -> tuple[TensorMemoryAllocator, MemoryObj]:
        heap = heap_of(4)
        obj = heap.allocate([PAGE], torch.uint8)
        assert obj is not None
        assert visits(place, obj.ref_count_down, lambda: heap.allocate([PAGE], torch.uint8))
        return heap, obj

    inside = next(place for place in count() if put_off(place)[1].is_valid())
    number = 0
    while True:
        heap, obj = put_off(inside)
        if not interrupts(number, heap.stats, TimeOutError, everywhere=True):
            break
        assert heap.stats().allocated_bytes == 0  # the other page was dropped
        assert not obj.is_valid()
        assert heap.memcheck()
        number += 1
    assert number > 100
    assert "has failed" not in caplog.text
