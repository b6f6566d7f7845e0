"""Finalizers and signal handlers that use transfers, at every place of a transfer's own code."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from foreign_code import Foreign, interrupts, no_deadlock

from kvheap import TensorMemoryAllocator, offload
from kvheap.device.host_queue import HostJob, NestedWaitError, host_queue
from kvheap.kernels import host_copy
from kvheap.kernels.host_copy import copy_on_host
from kvheap.kernels.pieces import Pieces
from kvheap.transfer import CopyPlan, Transfer, copy, runs

PAGE = 4096
OURS: dict[str, Any] = {
    "modules": (
        "kvheap.claims",
        "kvheap.device",
        "kvheap.kernels.host_copy",
        "kvheap.kernels.latch",
        "kvheap.kernels.shared_work",
        "kvheap.transfer",
    ),
}


class Copies:
    """Copies between tensors, and what each must have written."""

    def __init__(self) -> None:
        self.begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.earlier = self.start()

    def start(self, num_bytes: int = 1 << 14) -> Transfer:
        number = len(self.begun) + 1
        source = torch.full((num_bytes,), 1 + number % 255, dtype=torch.uint8)
        target = torch.zeros(num_bytes, dtype=torch.uint8)
        self.begun.append((source, target))
        ends = [num_bytes // 2, num_bytes]
        starts = [0, num_bytes // 2]
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        return copy(CopyPlan.of_addresses(source, target, starts, starts, sizes, parts=[1, 1]))

    def require_all_done(self) -> None:
        host_queue.run([lambda: None], False)[0].synchronize()
        for source, target in self.begun:
            assert torch.equal(source, target)


CALLS: dict[str, Callable[[Copies], object]] = {
    "copy": lambda copies: copies.start(),
    "copy and wait": lambda copies: copies.start().wait(),
    "copy and wait for a part": lambda copies: copies.start().parts[0].wait(),
    "copy and end": lambda copies: copies.start().result(),
    "wait": lambda copies: copies.earlier.wait(),
    "end": lambda copies: copies.earlier.result(20),
    "ask": lambda copies: (copies.earlier.done(), copies.earlier.error, repr(copies.earlier)),
    "share work": lambda copies: share_work(),
}


def share_work() -> None:
    source, target = np.arange(1 << 14, dtype=np.uint8), np.zeros(1 << 14, np.uint8)
    copy_on_host(Pieces.of([source.ctypes.data], [target.ctypes.data], 1 << 14), threads=2)
    assert np.array_equal(source, target)


@pytest.fixture(params=["here", "by the queue"])
def many_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies are made on the caller's thread or by the queue, and are shared by threads."""
    monkeypatch.setattr(host_copy, "THREAD_BYTES", 1 << 12)
    monkeypatch.setattr(host_copy, "SHARE_BYTES", 1 << 12)
    if request.param == "by the queue":
        monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("many_threads")
def test_a_call_in_the_middle_of_another(name: str) -> None:
    inner = list(CALLS.values())
    number = 0
    while True:
        copies = Copies()
        call = inner[(number * 7) % len(inner)]
        foreign = Foreign(number, lambda call=call, copies=copies: call(copies), **OURS)
        with no_deadlock():
            struck = foreign.strikes(lambda copies=copies: CALLS[name](copies))
            copies.require_all_done()
        if not struck:
            break
        number += 1
    assert number > 0


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("many_threads")
def test_a_call_that_is_interrupted_harms_no_other(name: str) -> None:
    number = 0
    while True:
        copies = Copies()
        with no_deadlock():
            struck = interrupts(number, lambda copies=copies: CALLS[name](copies), **OURS)
            begun, copies.begun = copies.begun[1:], copies.begun[:1]
            copies.start().result()
            copies.require_all_done()
            for source, target in begun:  # whole parts, or nothing of them
                halves = zip(source.chunk(2), target.chunk(2), strict=True)
                assert all(torch.equal(a, b) or not struck or not b[-1] for a, b in halves)
        if not struck:
            break
        number += 1
    assert number > 0


class Cycle:
    """Garbage that only the collector finds, and that makes a call when it is found."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.me = self
        weakref.finalize(self, call).atexit = False


@pytest.fixture
def collects_often() -> Iterator[None]:
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("many_threads", "collects_often")
def test_finalizers_of_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector runs at nearly every allocation, on whichever thread makes it."""
    copies, refused = Copies(), []
    calls = list(CALLS.values())

    def call(number: int) -> None:
        try:
            calls[number % len(calls)](copies)
        except NestedWaitError:  # on the thread that copies
            refused.append(threading.current_thread())

    with no_deadlock(60):
        for number in range(60):
            Cycle(lambda number=number: call(number))
            copies.start().result()
        gc.collect()
        copies.require_all_done()
    assert threading.main_thread() not in refused


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
@pytest.mark.usefixtures("many_threads")
def test_a_signal_handler_that_copies() -> None:
    copies, calls = Copies(), list(CALLS.values())
    handled: list[int] = []

    def handle(number: int, frame: object) -> None:
        calls[len(handled) % len(calls)](copies)
        handled.append(number)

    before = signal.signal(signal.SIGVTALRM, handle)
    try:
        with no_deadlock(60):
            armed = -1
            while len(handled) < 16:
                if armed < len(handled):  # the time that the process computes, not that it waits
                    armed = len(handled)
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005 * (1 + armed % 5))
                copies.start().result()
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            copies.require_all_done()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_time_out_is_a_number() -> None:
    with pytest.raises(ValueError, match="timeout_s must be a number of seconds, got nan"):
        Copies().earlier.wait(float("nan"))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, True, "1", None])
def test_seconds_of_a_heap_are_finite(seconds: object) -> None:
    with pytest.raises(
        (ValueError, TypeError), match="stream_wait_s must be a non-negative finite"
    ):
        TensorMemoryAllocator(
            torch.zeros(4096, dtype=torch.uint8),
            stream_wait_s=seconds,  # type: ignore[arg-type]
        )


class Timeout(Exception):  # noqa: N818
    """As time-outs often are: an exception that code may take for its own."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
@pytest.mark.usefixtures("many_threads")
def test_a_handler_that_raises_never_looks_like_a_failure() -> None:
    copies, raised = Copies(), 0
    generator = np.random.default_rng(1)

    def handle(number: int, frame: object) -> None:
        raise Timeout

    near, far = (
        TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8), on_full=None)
        for _ in range(2)
    )
    batch = near.batched_allocate([PAGE], torch.uint8, 4, source=torch.ones(4, PAGE).byte())
    assert batch is not None
    before = signal.signal(signal.SIGALRM, handle)
    try:
        for number in range(600):
            try:
                signal.setitimer(signal.ITIMER_REAL, float(generator.uniform(1e-6, 400e-6)))
                if number % 2:
                    copies.start().result()
                else:
                    away = offload(batch, far)
                    if away is not None:  # interrupted calls may have filled the heap
                        away.transfer.result()  # type: ignore[union-attr]
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Timeout:
                raised += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            away = None
            copies.begun = copies.begun[-1:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert raised > 20
    copies = Copies()
    copies.start().result()
    copies.require_all_done()
    assert batch.live.all()
    assert torch.equal(torch.stack([block.tensor for block in batch]), torch.ones(4, PAGE).byte())


class TestTheThreadThatCopies:
    def test_it_cannot_wait_for_what_it_copies(self) -> None:
        jobs: list[HostJob] = []
        raised: list[BaseException] = []

        def finalizer() -> None:
            try:
                jobs[0].events[1].synchronize()
            except BaseException as error:
                raised.append(error)

        jobs.append(HostJob([finalizer, lambda: None]))
        with no_deadlock():
            host_queue.submit(jobs[0], False)
            jobs[0].events[1].synchronize()
        assert isinstance(raised[0], NestedWaitError)
        assert jobs[0].events[1].error() is None

    def test_a_refused_wait_loses_no_transfer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)
        copies = Copies()
        answers: list[object] = []
        behind: list[Transfer] = []
        gate = threading.Event()

        def finalizer() -> None:
            gate.wait(20)
            answers.extend((behind[0].done(), behind[0].wait(0.001)))
            for question in (behind[0].wait, behind[0].result, behind[0].parts[0].wait):
                with pytest.raises(NestedWaitError) as caught:
                    question()
                answers.append(caught.value)

        with no_deadlock():
            host_queue.run([finalizer], False)
            behind.append(copies.start())
            gate.set()
            behind[0].result()
            copies.require_all_done()
        assert answers[:2] == [False, False]
        assert len(answers) == 5

    def test_it_may_begin_copies_and_wait_for_others(self) -> None:
        copies = Copies()
        with no_deadlock():
            host_queue.run([lambda: copies.start() and None, copies.earlier.wait], False)  # type: ignore[list-item]
            copies.require_all_done()

    def test_a_helper_of_it_cannot_wait_either(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)
        monkeypatch.setattr(host_copy, "THREAD_BYTES", 1 << 12)
        monkeypatch.setattr(host_copy, "SHARE_BYTES", 1 << 12)
        move_each, seen = host_copy._move_each, []
        barrier = threading.Barrier(2, timeout=20)
        jobs: list[HostJob] = []

        def moves(pieces: Pieces) -> None:
            move_each(pieces)
            if len(seen) < 2:
                seen.append(threading.current_thread())
                barrier.wait()
                try:
                    jobs[0].events[0].synchronize()
                except NestedWaitError as error:
                    seen.append(error)

        monkeypatch.setattr(host_copy, "_move_each", moves)
        jobs.append(HostJob([share_work]))
        with no_deadlock():
            host_queue.submit(jobs[0], False)
            jobs[0].events[0].synchronize()
        assert [type(error) for error in seen[2:]] == [NestedWaitError] * 2


ABORTED_IN_TORCH = -6, "terminate called without an active exception"
"""How a program may end whose daemon thread is inside torch when the interpreter stops it."""


def run_program(text: str, may_abort: bool = False) -> str:
    """The output of a program of its own, which must end within a minute."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    status, message = ABORTED_IN_TORCH
    if not (may_abort and done.returncode == status and message in done.stderr):
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


PREPARED = """
    import atexit, faulthandler, sys, threading, time, weakref
    import torch
    from kvheap import BlockLayout, MemoryFormat, PrefixStore, TensorMemoryAllocator, offload
    from kvheap.kernels import host_copy
    from kvheap.transfer import runs
    faulthandler.dump_traceback_later(30, exit=True)
    SIZE, main = 1 << 20, threading.main_thread()
    near, far = (TensorMemoryAllocator(torch.zeros(64 << 20, dtype=torch.uint8)) for _ in range(2))
    batch = near.batched_allocate([SIZE], torch.uint8, 8, MemoryFormat.BINARY,
                                   source=torch.ones(8, SIZE).byte())
    def moved(**options):
        return offload(batch, far, **options)
    def is_whole(target):
        return bool((torch.stack([block.tensor for block in target]) == 1).all())
"""
"""The beginning of each program; 8 MiB are more than is copied on the caller's thread."""


class TestTheEndOfTheProgram:
    @pytest.mark.parametrize(
        ("kind", "copied_before"),
        [("atexit", False), ("atexit", True), ("finalize", True), ("thread", False)],
    )
    def test_a_copy_begins_and_ends_there(self, kind: str, copied_before: bool) -> None:
        """In ``atexit`` functions, threads cannot be started any more from Python 3.12 on."""
        register = {
            "atexit": "atexit.register(at_exit)",
            "finalize": "weakref.finalize(near, at_exit)",
            "thread": "threading.Thread(target=lambda: (main.join(), at_exit())).start()",
        }[kind]
        text = f"""{PREPARED}
    def at_exit():
        target = moved(free=True)
        target.transfer.result()
        print(is_whole(target), near.stats().allocated_bytes, flush=True)
        store = PrefixStore(far, BlockLayout.of([SIZE], torch.uint8, MemoryFormat.BINARY))
        flight = store.offload(["a"], target[:1])
        flight.complete()
        print(flight.state, is_whole(store.chunks(["a"])), flush=True)
    if {copied_before}:
        moved().transfer.wait()
    {register}
"""
        assert run_program(text) == "True 0\nready True\n"

    @pytest.mark.parametrize("is_daemon", [True])
    def test_copies_that_were_begun_before_end_before_the_program(self, is_daemon: bool) -> None:
        """Also those that other threads began, and that wait for a copy before them."""
        text = f"""{PREPARED}
    copy_on_host = runs.copy_on_host
    def slow(pieces):
        time.sleep(0.1)
        copy_on_host(pieces)
        print("copied", flush=True)
    runs.copy_on_host = slow
    begun = threading.Event()
    def work():
        moved()
        begun.set()
    threading.Thread(target=work, daemon={is_daemon}).start()
    begun.wait()
    targets = [moved(), moved()]
    def at_exit():
        for target in targets:
            assert target.transfer.wait(20)
            target.transfer.result()
        print(all(map(is_whole, targets)), flush=True)
    atexit.register(at_exit)
"""
        assert run_program(text) == "copied\n" * 3 + "True\n"

    def test_a_daemon_thread_that_copies_all_the_time(self) -> None:
        text = f"""{PREPARED}
    def work():
        while True:
            target = moved()
            target.transfer.wait()
            far.batched_free(target)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)
    print("end", flush=True)
"""
        assert run_program(text, may_abort=True) == "end\n"

    def test_a_child_of_multiprocessing_ends_its_copies(self) -> None:
        text = """
    import multiprocessing
    def child(shared):
        import numpy as np, torch, time
        from kvheap.transfer import CopyPlan, copy, runs
        copy_on_host = runs.copy_on_host
        def slow(pieces):
            time.sleep(0.2)
            copy_on_host(pieces)
        runs.copy_on_host = slow
        runs.INLINE_COPY_BYTES = 0
        target = torch.frombuffer(shared, dtype=torch.uint8)
        copy((torch.ones(1, len(target)).byte(), target.view(1, -1)))
    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        shared = context.RawArray("b", 1 << 16)
        process = context.Process(target=child, args=(shared,))
        process.start()
        process.join()
        print(set(shared), process.exitcode)
"""
        assert run_program(text) == "{1} 0\n"


def test_memory_goes_with_the_last_reference_and_the_copy() -> None:
    """Without the cycle collector: a heap, its batches and transfers, dropped in every order."""
    gc.collect()
    gc.disable()
    gate = threading.Event()
    try:
        for order in range(6):
            for ends_first in (False, True):
                near, far = (
                    TensorMemoryAllocator(torch.zeros(4 << 20, dtype=torch.uint8), on_full=None)
                    for _ in range(2)
                )
                buffers = [weakref.ref(heap.buffer.untyped_storage()) for heap in (near, far)]
                gate.clear()
                host_queue.run([lambda: gate.wait(20) and None], False)
                batch = near.batched_allocate([1 << 20], torch.uint8, 4)
                away = offload(batch, far, free=bool(order % 2))  # type: ignore[arg-type]
                held: list[object] = [[near, far], [batch, away], [away.transfer]]  # type: ignore[union-attr]
                del near, far, batch, away
                if ends_first:
                    gate.set()
                    host_queue.run([lambda: None], False)[0].synchronize()
                for _ in range(3):
                    held.pop(order % len(held))
                if not ends_first:
                    assert gc.isenabled() is False
                    gate.set()
                    host_queue.run([lambda: None], False)[0].synchronize()
                assert [buffer() for buffer in buffers] == [None, None], (order, ends_first)
    finally:
        gate.set()
        gc.enable()
