"""When a copy has ended, and how: the states of a completion."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from functools import partial

import numpy as np
import pytest
from foreign_code import Foreign, interrupts

from kvheap.device.completion import Completion, InFlight, Success
from kvheap.device.events import ReleaseVoidError
from kvheap.device.host_queue import HostEvent
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
            with pytest.raises(TransferError, match=r"cannot be queried.*the device is gone"):
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

    def test_an_exception_while_it_is_queued_leaves_nothing_to_wait_for(self) -> None:
        number, struck = 0, True
        while struck:
            completion, event = Completion(), Event()
            queue = partial(completion.queued, event)
            struck = interrupts(number, queue, everywhere=True)
            assert completion.is_using == (not struck) or completion.is_queued
            completion.nothing_queued()
            event.passed = True  # what was queued ends by itself
            assert completion.query(), f"place {number}"
            assert completion.wait(0)
            assert not completion.is_using
            number += 1
        assert number > 8

    def test_nobody_waits_for_what_is_not_quite_queued(self) -> None:
        """Another thread looks, at any place: what it takes for queued has an event."""
        number, struck, seen = 0, True, set()
        while struck:
            completion, event = Completion(), Event()

            def look(completion: Completion = completion, event: Event = event) -> None:
                seen.add(completion.is_using)
                assert not completion.is_using or event.asked

            queue = partial(completion.queued, event)
            struck = Foreign(number, look, everywhere=True).strikes(queue)
            assert completion.is_using
            number += 1
        assert seen == {False, True}

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
        event = HostEvent()
        completion = Completion()
        completion.queued(event)
        success = Success(completion)
        assert not success.query()
        event.end(MemoryError("no room"))
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
