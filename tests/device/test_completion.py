"""When a copy has ended, and how: the states of a completion, and the host's queue."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvheap.blocks.lifetime import ReleaseVoidError
from kvheap.device.completion import (
    Completion,
    FutureEvent,
    HostQueue,
    InFlight,
    NotAllQueuedError,
    Success,
    host_queue,
)
from kvheap.errors import TransferError


class Event:
    """A device's event that passes, or breaks, when a test says so."""

    def __init__(self) -> None:
        self.passed = False
        self.error: Exception | None = None
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.passed

    def synchronize(self) -> None:
        if self.error is not None:
            raise self.error
        self.passed = True


def kept() -> tuple[np.ndarray, weakref.ref[np.ndarray]]:
    found = np.zeros(8)
    return found, weakref.ref(found)


class TestCompletion:
    def test_begun_is_not_ended(self) -> None:
        completion = Completion()
        assert not completion.query()
        assert not completion.has_ended
        assert not completion.is_lost
        assert completion.error is None
        assert not completion.wait(0.001)

    def test_it_is_the_event_of_its_own_end(self) -> None:
        completion = Completion()
        assert completion.record_event() is completion

    def test_it_ends_with_its_event(self) -> None:
        completion, event = Completion(), Event()
        completion.queued(event)
        assert not completion.query()
        assert not completion.wait(0)
        event.passed = True
        assert completion.query()
        assert completion.has_ended
        asked = event.asked
        assert completion.query()
        assert event.asked == asked  # the end is final

    def test_what_it_keeps_goes_when_it_ends(self) -> None:
        first, first_alive = kept()
        second, second_alive = kept()
        completion, event = Completion([first]), Event()
        completion.keep(second)
        completion.queued(event)
        del first, second
        assert not completion.query()
        gc.collect()
        assert first_alive() is not None
        assert second_alive() is not None
        event.passed = True
        assert completion.query()
        assert first_alive() is None
        assert second_alive() is None

    def test_nothing_queued_ends_it_unless_something_is(self) -> None:
        completion = Completion()
        completion.nothing_queued()
        assert completion.query()
        completion, event = Completion(), Event()
        completion.queued(event)
        completion.nothing_queued()
        assert not completion.query()
        completion = Completion()
        completion.lose(RuntimeError("gone"))
        completion.nothing_queued()
        assert completion.is_lost

    def test_a_failed_one_ends_too(self) -> None:
        completion, event = Completion(), Event()
        completion.failed(TransferError("half of it"))
        completion.queued(event)
        assert not completion.query()
        assert str(completion.error) == "half of it"
        event.passed = True
        assert completion.query()
        assert str(completion.error) == "half of it"
        assert completion.wait()

    def test_a_failure_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        error = TransferError("half of it")
        error.__cause__ = RuntimeError("no room")
        Completion().failed(error)
        assert [(r.levelno, r.message) for r in caplog.records] == [(logging.ERROR, "half of it")]
        assert "no room" in caplog.text

    def test_a_failure_keeps_no_frames(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL + 1, "kvheap")  # whose records keep them
        completion = Completion()
        alive = []

        def fails() -> None:
            held, reference = kept()
            alive.append(reference)
            raise RuntimeError(f"no room for {len(held)}")

        try:
            fails()
        except RuntimeError as cause:
            error = TransferError("half of it")
            error.__cause__ = cause
            completion.failed(error)
        del error
        for _ in range(3):
            with pytest.raises(TransferError):
                self.ask_in_a_frame(completion, alive)
        gc.collect()
        assert [reference() for reference in alive] == [None] * 4

    @staticmethod
    def ask_in_a_frame(completion: Completion, alive: list[weakref.ref[np.ndarray]]) -> None:
        held, reference = kept()
        alive.append(reference)
        assert len(held)
        error = completion.error
        assert error is not None
        raise error

    @pytest.mark.parametrize("ask", ["query", "wait", "has_ended"])
    def test_an_event_that_breaks_loses_it(self, ask: str) -> None:
        held, alive = kept()
        completion, event = Completion([held]), Event()
        completion.queued(event)
        event.error = RuntimeError("the device is gone")
        if ask == "query":
            with pytest.raises(TransferError, match=r"cannot be asked.*the device is gone"):
                completion.query()
        elif ask == "wait":
            assert completion.wait()
        else:
            assert completion.has_ended
        assert completion.is_lost
        del held
        gc.collect()
        assert alive() is not None  # a device that is gone may still write
        event.error, event.passed = None, True
        with pytest.raises(TransferError):
            completion.query()
        assert completion.has_ended
        assert completion.is_lost  # for good
        assert isinstance(completion.error, TransferError)
        assert "the device is gone" in str(completion.error)

    def test_what_was_known_before_it_was_lost_is_told(self) -> None:
        completion = Completion()
        completion.failed(TransferError("half of it"))
        completion.lose(RuntimeError("gone"))
        assert str(completion.error) == "half of it"

    def test_a_question_that_fails_after_the_end_changes_nothing(self) -> None:
        completion, event = Completion(), Event()
        completion.queued(event)
        event.passed = True
        assert completion.query()
        event.error = RuntimeError("gone")
        with pytest.raises(TransferError):
            completion.ask(event.query)
        assert completion.query()
        assert not completion.is_lost
        assert completion.error is None

    def test_an_interrupt_is_not_an_answer(self) -> None:
        completion = Completion()

        def interrupted() -> bool:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            completion.ask(interrupted)
        assert not completion.is_lost

    def test_waiting_asks_the_device_to_wait(self) -> None:
        completion, event = Completion(), Event()
        completion.queued(event)
        assert completion.wait()
        assert event.passed

    def test_waiting_for_a_while_does_not(self) -> None:
        completion, event = Completion(), Event()
        completion.queued(event)
        begun = time.monotonic()
        assert not completion.wait(0.01)
        assert time.monotonic() - begun >= 0.01
        threading.Timer(0.01, event.synchronize).start()
        assert completion.wait(20)


class TestWhoLooksInBetween:
    def test_a_copy_that_ends_while_it_is_told_of(self) -> None:
        """Another thread may find the event passed before it is told that there is one."""

        class Looked(Completion):
            def __setattr__(self, name: str, value: object) -> None:
                super().__setattr__(name, value)
                if name in ("_event", "_state") and value is not None:
                    assert self.has_ended in (True, False)  # as another thread may ask here

        event = Event()
        event.passed = True
        completion = Looked()
        completion.queued(event)
        assert completion.query()
        assert completion.wait(0)


class TestSuccess:
    def test_it_passes_when_the_copy_was_done(self) -> None:
        completion, event = Completion(), Event()
        success = Success(completion)
        assert not success.query()
        completion.queued(event)
        assert not success.query()
        event.passed = True
        assert success.query()

    def test_it_fails_with_the_copy_but_not_before_its_end(self) -> None:
        completion, event = Completion(), Event()
        completion.failed(TransferError("half of it"))
        completion.queued(event)
        success = Success(completion)
        assert not success.query()
        event.passed = True
        with pytest.raises(ReleaseVoidError):
            success.query()

    def test_it_fails_when_the_copy_is_lost(self) -> None:
        completion = Completion()
        completion.lose(RuntimeError("gone"))
        with pytest.raises(ReleaseVoidError):
            Success(completion).query()

    def test_it_fails_with_a_copy_on_a_thread(self) -> None:
        future: Future[None] = Future()
        completion = Completion()
        completion.queued(FutureEvent(future))
        success = Success(completion)
        assert not success.query()
        future.set_exception(MemoryError("no room"))
        with pytest.raises(ReleaseVoidError):
            success.query()


class TestInFlight:
    def test_it_keeps_what_has_not_ended(self) -> None:
        in_flight = InFlight()
        held, alive = kept()
        event = Event()
        completion = Completion([held])
        completion.queued(event)
        in_flight.add(completion)
        del completion, held
        for _ in range(20):
            other = Completion()
            in_flight.add(other)
            other.nothing_queued()
            gc.collect()
            assert alive() is not None
        event.passed = True
        for _ in range(4):
            in_flight.add(Completion())
        gc.collect()
        assert alive() is None

    def test_it_looks_at_a_few_only(self) -> None:
        in_flight, events = InFlight(), []
        for _ in range(100):
            completion = Completion()
            events.append(Event())
            completion.queued(events[-1])
            in_flight.add(completion)
        assert len(in_flight) == 100
        assert sum(event.asked for event in events) <= 8 * 100
        for event in events:
            event.passed = True
        for _ in range(20):
            last = Completion()
            in_flight.add(last)
            last.nothing_queued()
        assert len(in_flight) <= 16

    def test_what_is_lost_is_kept_for_good(self) -> None:
        in_flight = InFlight()
        held, alive = kept()
        completion = Completion([held])
        in_flight.add(completion)
        completion.lose(RuntimeError("gone"))
        del completion, held
        for _ in range(50):
            other = Completion()
            in_flight.add(other)
            other.nothing_queued()
        gc.collect()
        assert alive() is not None

    def test_from_many_threads(self) -> None:
        in_flight = InFlight()

        def work() -> None:
            for _ in range(300):
                completion = Completion()
                in_flight.add(completion)
                completion.nothing_queued()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        in_flight.add(Completion())
        assert len(in_flight) <= 64


class TestFutureEvent:
    def test_its_error(self) -> None:
        future: Future[None] = Future()
        event = FutureEvent(future)
        assert not event.query()
        assert event.error() is None
        future.set_exception(MemoryError("no room"))
        event.synchronize()
        assert event.query()
        error = event.error()
        assert isinstance(error, TransferError)
        assert "a copy in host memory failed: no room" in str(error)
        assert isinstance(error.__cause__, MemoryError)

    def test_an_error_of_a_transfer_is_that_error(self) -> None:
        future: Future[None] = Future()
        failure = TransferError("the one before")
        future.set_exception(failure)
        assert FutureEvent(future).error() is failure

    def test_one_that_went_well(self) -> None:
        future: Future[None] = Future()
        future.set_result(None)
        assert FutureEvent(future).query()
        assert FutureEvent(future).error() is None


class TestHostQueue:
    def test_in_order_on_one_thread(self) -> None:
        queue, done = HostQueue(), []
        gate = threading.Event()

        def work(number: int) -> Callable[[], None]:
            def run() -> None:
                assert gate.wait(20)
                done.append((number, threading.current_thread().name))

            return run

        events = queue.run([work(0), work(1)], False) + queue.run([work(2)], False)
        assert [event.query() for event in events] == [False] * 3
        assert done == []
        gate.set()
        for event in events:
            event.synchronize()
        assert [number for number, _ in done] == [0, 1, 2]
        names = {name for _, name in done}
        assert len(names) == 1
        assert threading.current_thread().name not in names

    def test_small_work_is_done_here_if_nothing_is_queued(self) -> None:
        queue, threads = HostQueue(), []

        def note() -> None:
            threads.append(threading.current_thread())

        assert all(event.query() for event in queue.run([note, note], True))
        assert threads == [threading.current_thread()] * 2
        gate = threading.Event()
        queue.run([lambda: bool(gate.wait(20)) and None], False)
        later = queue.run([note], True)  # not before what is queued
        assert not later[0].query()
        gate.set()
        later[0].synchronize()
        assert threads[2] is not threading.current_thread()

    @pytest.mark.parametrize("is_small", [True, False])
    def test_what_fails_fails_what_is_behind_it_in_the_call(self, is_small: bool) -> None:
        queue, done = HostQueue(), []

        def fails() -> None:
            raise MemoryError("no room")

        events = queue.run([lambda: done.append(1), fails, lambda: done.append(3)], is_small)
        for event in events:
            event.synchronize()
        assert [event.error() is None for event in events] == [True, False, False]
        assert "no room" in str(events[2].error())
        after = queue.run([lambda: done.append(4)], is_small)
        after[0].synchronize()
        assert after[0].error() is None
        assert done == [1, 4]

    def test_what_cannot_be_queued(self, monkeypatch: pytest.MonkeyPatch) -> None:
        queue, done = HostQueue(), []
        gate, at_work = threading.Event(), threading.Event()

        def work() -> None:
            at_work.set()
            assert gate.wait(20)
            done.append(1)

        submit, calls = ThreadPoolExecutor.submit, []

        def fails(self: ThreadPoolExecutor, *arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 3:
                assert at_work.wait(20)
                raise RuntimeError("no more threads")
            return submit(self, *arguments)

        monkeypatch.setattr(ThreadPoolExecutor, "submit", fails)
        with pytest.raises(NotAllQueuedError) as caught:
            queue.run([work, work, work], False)
        assert len(caught.value.events) == 1  # the second was not begun, and never is
        assert isinstance(caught.value.__cause__, RuntimeError)
        gate.set()
        caught.value.events[0].synchronize()
        assert done == [1]
        queue.run([lambda: done.append(2)], False)[0].synchronize()
        assert done == [1, 2]

    def test_no_work(self) -> None:
        assert HostQueue().run([], True) == []
        assert HostQueue().run([], False) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_somebody_queues_has_a_queue() -> None:
    with host_queue._lock:  # as another thread may hold it
        child = os.fork()
        if not child:
            signal.alarm(20)
            done: list[int] = []
            host_queue.run([lambda: done.append(1)], False)[0].synchronize()
            os._exit(0 if done == [1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
