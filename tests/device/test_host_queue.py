"""The queue of copies within host memory: order, failures, forks."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest

from kvheap.device.host_queue import HostEvent, HostJob, HostQueue, host_queue
from kvheap.errors import TransferError


class TestHostEvent:
    def test_its_error(self) -> None:
        event = HostEvent()
        assert not event.query()
        assert event.error() is None
        event.end(MemoryError("no room"))
        event.synchronize()
        assert event.query()
        error = event.error()
        assert isinstance(error, TransferError)
        assert "a copy in host memory failed: no room" in str(error)
        assert isinstance(error.__cause__, MemoryError)

    def test_an_error_of_a_transfer_is_that_error(self) -> None:
        event, failure = HostEvent(), TransferError("the one before")
        event.end(failure)
        assert event.error().args == failure.args
        assert event.error() is not failure  # a raised error keeps the frames that it passed
        with pytest.raises(TransferError, match="the one before"):
            event.require_success()

    def test_one_that_went_well(self) -> None:
        event = HostEvent()
        event.end(None)
        assert event.query()
        assert event.error() is None


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

    def test_the_caller_copies_when_no_thread_can_be_started(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue, done = HostQueue(), []

        def fails(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", fails)
        events = queue.run([lambda: done.append(threading.current_thread())] * 2, False)
        assert [event.query() for event in events] == [True, True]
        assert done == [threading.current_thread()] * 2
        monkeypatch.undo()
        queue.run([lambda: done.append(None)], False)[0].synchronize()
        assert done[2:] == [None]

    def test_a_job_is_withdrawn_before_it_begins_or_not_at_all(self) -> None:
        queue, done = HostQueue(), []
        gate, at_work = threading.Event(), threading.Event()

        def work() -> None:
            at_work.set()
            assert gate.wait(20)
            done.append(1)

        first, second = HostJob([work]), HostJob([lambda: done.append(2)])
        queue.submit(first, False)
        queue.submit(second, False)
        assert at_work.wait(20)
        assert queue.withdraw(second)
        assert not queue.withdraw(first)
        assert second.events[0].query()
        assert "withdrawn" in str(second.events[0].error())
        gate.set()
        first.events[0].synchronize()
        queue.run([lambda: done.append(3)], False)[0].synchronize()
        assert done == [1, 3]

    def test_what_a_job_used_is_dropped_when_it_has_ended(self) -> None:
        class Used:
            pass

        queue, used = HostQueue(), Used()
        alive = weakref.ref(used)
        gc.disable()
        try:
            for is_small in (True, False):
                used = Used()
                alive = weakref.ref(used)
                job = HostJob([partial(id, used)])
                del used
                queue.submit(job, is_small)
                job.events[0].synchronize()
                queue.run([lambda: None], False)[0].synchronize()
                assert alive() is None
        finally:
            gc.enable()

    def test_no_work(self) -> None:
        assert HostQueue().run([], True) == []
        assert HostQueue().run([], False) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_somebody_queues_has_a_queue() -> None:
    gate, at_work = threading.Event(), threading.Event()
    host_queue.run([lambda: at_work.set() or (gate.wait(20) and None)], False)
    assert at_work.wait(20)  # another thread runs a job, and has the claim
    child = os.fork()
    if not child:
        signal.alarm(20)
        done: list[int] = []
        host_queue.run([lambda: done.append(1)], False)[0].synchronize()
        os._exit(0 if done == [1] else 1)
    gate.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
