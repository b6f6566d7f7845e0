"""Calls of a shared heap that a signal handler's exception ends, at any place.

Afterwards nothing may be left behind: no place that is never filled, no lock that nobody gives up.
And the caller gets the handler's exception, whatever it is: a time-out is often an ``OSError``.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from foreign_code import Foreign, Interrupted, no_deadlock
from shared_heaps import attach, contents, key_of, own, wrong_rows

from kvheap import HostMemoryAllocator, SharedHeap

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NUM_CHUNKS = 6

KEYS = [key_of(number) for number in range(3)]

PLACES: dict[str, Any] = {"modules": ("kvheap.shared", "kvheap.memory.file_locks")}


def store(heap: SharedHeap, here: HostMemoryAllocator) -> None:
    heap.store(KEYS, contents(KEYS))


def begin(heap: SharedHeap, here: HostMemoryAllocator) -> None:
    with heap.begin(KEYS) as store:
        for row, key in enumerate(store.keys):
            store.batch[row].tensor.copy_(contents([key])[0])
        store.complete()


def hold(heap: SharedHeap, here: HostMemoryAllocator) -> None:
    with heap.hold(KEYS) as hold:
        assert wrong_rows(KEYS, hold.batch) == []


def load(heap: SharedHeap, here: HostMemoryAllocator) -> None:
    batch = heap.load(KEYS, into=here)
    assert batch is not None
    here.batched_free(batch)


def remove(heap: SharedHeap, here: HostMemoryAllocator) -> None:
    heap.remove(KEYS)


CALLS: dict[str, tuple[bool, Callable[[SharedHeap, HostMemoryAllocator], None]]] = {
    "store": (False, store),
    "begin": (False, begin),
    "hold": (True, hold),
    "load": (True, load),
    "remove": (True, remove),
}
"""Whether the chunks are there before, and the call."""


@pytest.fixture(params=["owner", "attached"])
def heaps(request: Any, path: Path) -> Iterator[tuple[SharedHeap, SharedHeap]]:
    """The owner, and who calls."""
    owner = own(path, NUM_CHUNKS)
    caller = owner if request.param == "owner" else attach(path)
    yield owner, caller
    caller.close()
    owner.close()


def struck(
    number: int,
    task: Callable[[], object],
    error: type[BaseException],
    places: dict[str, Any] = PLACES,
) -> bool:
    """Whether a task was interrupted at the N-th place; its caller must have got the exception."""

    def interrupt() -> None:
        raise error("of a signal handler")

    reported: list[BaseException | None] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda each: reported.append(each.exc_value)
    foreign = Foreign(number, interrupt, **places)
    try:
        foreign.strikes(task)
    except error:
        return True
    finally:
        sys.unraisablehook = hook
    was_struck = foreign.left < 0
    assert not was_struck or reported, f"nobody was told of the exception at place {number}"
    return was_struck


def num_free(owner: SharedHeap) -> int:
    """How many places are free once nothing waits any more, or after some seconds."""
    end_s = time.monotonic() + 10
    while True:
        keeper = owner.stats().keeper
        assert keeper is not None
        if not (keeper.waiting_places or keeper.pending_chunks) or time.monotonic() > end_s:
            return keeper.free_places
        time.sleep(0.001)


@pytest.mark.parametrize("error", [Interrupted, TimeoutError, ConnectionResetError])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_behind(
    heaps: tuple[SharedHeap, SharedHeap], call: str, error: type[BaseException]
) -> None:
    owner, caller = heaps
    is_there, make = CALLS[call]
    here = HostMemoryAllocator(1 << 20)
    number, num_struck = 0, 0
    while True:
        owner.remove(KEYS)
        if is_there:
            owner.store(KEYS, contents(KEYS))
        with no_deadlock():
            if not struck(number, lambda: make(caller, here), error):
                break
        num_struck += 1
        number += 1 if error is Interrupted else 3
        caller.keys()  # any call gives back what was left
        owner.remove(KEYS)
        assert num_free(owner) == NUM_CHUNKS, number
    owner.check()
    assert num_struck > 10
    assert caller.store(KEYS, contents(KEYS)).all()
    with caller.hold(KEYS) as held:
        assert wrong_rows(KEYS, held.batch) == []
    gc.collect()
    here.check()


OPENING: dict[str, Any] = {"modules": ("kvheap.shared.segment", "kvheap.memory.boots")}


def test_who_opens_one_gets_the_handlers_exception(path: Path) -> None:
    """Not one that says that the file system has no room."""
    number = 0
    opened: list[SharedHeap] = []
    while True:
        with no_deadlock():
            was_struck = struck(
                number, lambda: opened.append(own(path, NUM_CHUNKS)), TimeoutError, OPENING
            )
        while opened:
            opened.pop().close()
        path.unlink(missing_ok=True)  # the next one is made anew
        if not was_struck:
            break
        number += 1
    assert number > 50
