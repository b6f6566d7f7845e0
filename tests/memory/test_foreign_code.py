"""Finalizers and signal handlers that close a heap in the middle of its growth or registration."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from foreign_code import Foreign, interrupts, no_deadlock

from kvheap.kernels.latch import Latch
from kvheap.memory.growth import BackgroundGrowth
from kvheap.memory.host_registration import HostRegistrations

OURS: dict[str, Any] = {"modules": ("kvheap.memory", "kvheap.claims", "kvheap.kernels.latch")}
PAGE = 4096


def new_growth() -> tuple[BackgroundGrowth, list[int]]:
    published: list[int] = []
    growth = BackgroundGrowth(
        lambda start, end: None, published.append, start_bytes=0, final_bytes=100, piece_bytes=10
    )
    return growth, published


GROWTH: dict[str, Callable[[BackgroundGrowth], object]] = {
    "start": lambda growth: growth.start(),
    "stop": lambda growth: growth.stop(),
    "start and wait": lambda growth: growth.start().wait(),
    "start and stop": lambda growth: growth.start().stop(),
    "look": lambda growth: (growth.progress, growth.callback_error),
}


@pytest.mark.parametrize("name", GROWTH)
def test_growth_is_stopped_in_the_middle_of_a_call(name: str) -> None:
    number = 0
    while True:
        growth, published = new_growth()

        def stop(growth: BackgroundGrowth = growth) -> None:
            growth.stop()
            growth.stop()

        with no_deadlock():
            struck = Foreign(number, stop, **OURS).strikes(
                lambda growth=growth: GROWTH[name](growth)
            )
            growth.stop()
            count = len(published)
        assert growth.progress.committed_bytes == 10 * count
        if not struck:
            break
        number += 1
    assert number > 0 or name in ("look", "stop")


@pytest.mark.parametrize("name", ["start", "stop", "start and wait", "start and stop"])
def test_an_interrupted_call_of_growth_can_be_made_again(name: str) -> None:
    number = 0
    while True:
        growth, published = new_growth()
        with no_deadlock():
            struck = interrupts(number, lambda growth=growth: GROWTH[name](growth), **OURS)
            growth.stop()
        assert growth.progress.committed_bytes == 10 * len(published)
        if not struck:
            break
        number += 1
    assert number > 0 or name == "stop"


class Registrar:
    """Registers nothing, but knows what it was told, and refuses what CUDA refuses."""

    def __init__(self) -> None:
        self.registered: set[int] = set()

    def register(self, pointer: int, num_bytes: int) -> None:
        assert pointer not in self.registered
        self.registered.add(pointer)

    def unregister(self, pointer: int) -> None:
        if pointer not in self.registered:
            raise RuntimeError("this memory is not registered")
        self.registered.discard(pointer)


PIECES = [(start * PAGE, (start + 1) * PAGE) for start in range(4)]

REGISTRATION: dict[str, Callable[[HostRegistrations, Registrar], object]] = {
    "register": lambda found, registrar: found.register(
        PIECES, registrar, False, threading.Event()
    ),
    "close": lambda found, registrar: found.close(),
    "look": lambda found, registrar: (found.ranges, found.num_bytes, found.absolute_ranges),
}


@pytest.mark.parametrize("name", REGISTRATION)
@pytest.mark.parametrize("other", ["close", "look"])
def test_a_range_is_closed_in_the_middle_of_a_call(name: str, other: str) -> None:
    number = 0
    while True:
        found, registrar = HostRegistrations(PAGE), Registrar()
        if name != "register":
            found.register(PIECES, registrar, False, threading.Event())

        def foreign(found: Any = found, registrar: Any = registrar) -> None:
            REGISTRATION[other](found, registrar)

        def call(found: Any = found, registrar: Any = registrar) -> None:
            with suppress(RuntimeError):  # it is closed
                REGISTRATION[name](found, registrar)

        modules = {"modules": ("kvheap.memory", __name__)}
        with no_deadlock():
            struck = Foreign(number, foreign, **modules).strikes(call)
        kept = {PAGE + start for start, _ in found.ranges}
        assert kept == registrar.registered, "the record is exact"
        if struck and other == "close":
            assert registrar.registered == set()
        if not struck:
            break
        number += 1
    assert number > 2


def test_a_latch_opens_for_all_who_wait() -> None:
    latch, passed = Latch(), []
    threads = [threading.Thread(target=lambda: passed.append(latch.wait(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert not latch.wait(0.01)
    latch.open()
    latch.open()
    for thread in threads:
        thread.join(20)
    assert passed == [True] * 4
    assert latch.wait(0)


@pytest.mark.parametrize("other", ["open", "wait"])
def test_a_latch_in_the_middle_of_its_own_calls(other: str) -> None:
    for name in ("open", "wait"):
        number = 0
        while True:
            latch = Latch()

            def foreign(latch: Latch = latch) -> None:
                assert latch.wait(0.001) or other == "wait" or latch.open() is None

            def call(latch: Latch = latch, name: str = name) -> None:
                assert name == "open" or latch.wait(0.001) in (True, False)
                if name == "open":
                    latch.open()

            with no_deadlock():
                struck = Foreign(number, foreign, **OURS).strikes(call)
                latch.open()
                assert latch.wait()
            if not struck:
                break
            number += 1
        assert number >= 0
