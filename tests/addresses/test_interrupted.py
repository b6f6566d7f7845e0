"""AddressManager when an exception strikes inside an operation: undone, or done, never half."""

from __future__ import annotations

import contextlib
import linecache
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import pytest

from kvheap import AddressBatch, AddressManager, OutOfMemoryError
from kvheap.addresses.free_list import ExtentKeys

PAGE = 4096

Operation = Callable[[AddressManager], object]


def fragmented_heap() -> AddressManager:
    """16 pages, of which 1, 3, 4, 7 to 10 and 15 are free."""
    heap = AddressManager(16 * PAGE)
    heap.batched_allocate(PAGE, 15)
    heap.batched_free([(1 * PAGE, PAGE), (3 * PAGE, 2 * PAGE), (7 * PAGE, 4 * PAGE)])
    return heap


def state(heap: AddressManager) -> tuple[object, list[list[int]]]:
    return heap.stats(), heap.snapshot().tolist()


OPERATIONS: dict[str, Operation] = {
    "allocate a whole extent": lambda heap: heap.allocate(PAGE),
    "allocate part of one": lambda heap: heap.allocate(3 * PAGE),
    "a batch in one run": lambda heap: heap.batched_allocate(PAGE, 4),
    "a batch in three": lambda heap: heap.batched_allocate(PAGE, 7),
    "a partial batch": lambda heap: heap.batched_allocate(2 * PAGE, 9, allow_partial=True),
    "free joins both neighbours": lambda heap: heap.free(2 * PAGE, PAGE),
    "free joins the next": lambda heap: heap.free(0, PAGE),
    "free joins the last": lambda heap: heap.free(5 * PAGE, PAGE),
    "free joins nothing": lambda heap: heap.free(13 * PAGE, PAGE),
    "free many": lambda heap: heap.batched_free(
        [(2 * PAGE, PAGE), (5 * PAGE, PAGE), (14 * PAGE, PAGE)]
    ),
    "free a batch": lambda heap: heap.batched_free(AddressBatch(PAGE, [5 * PAGE], [2])),
    "sbrk": lambda heap: heap.sbrk(4 * PAGE),
    "sbrk to wide keys": lambda heap: heap.sbrk(PAGE << 31),
    "trim": lambda heap: heap.trim(),
}


@pytest.fixture(params=["walking", "rebuilding", "short lists"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "rebuilding":
        monkeypatch.setattr("kvheap.addresses.address_manager._max_steps", lambda free_list: 0)
    if request.param == "short lists":  # so short that every list splits or joins
        monkeypatch.setattr(ExtentKeys, "DEFAULT_LOAD_FACTOR", 1)
        monkeypatch.setattr(ExtentKeys, "_check", lambda self: None)


def is_safe_from_signals(frame: FrameType) -> bool:
    """A line before which a trace function runs but never a signal handler.

    CPython looks for signals after calls and jumps, so neither between the end of a ``with``
    block and the release of its lock, nor at a ``try``, which no exception table covers.
    """
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return line == "try:" or line.startswith("with self._lock")


class Interruption:
    """Raises ``error`` before chosen lines of kvheap or sortedcontainers, counted from one."""

    def __init__(self, error: type[BaseException], *at_lines: int) -> None:
        self.error = error
        self.at_lines = at_lines
        self.lines = 0

    def trace(self, frame: FrameType, event: str, argument: object) -> object:
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("kvheap", "sortedcontainers"):
            return None
        if event == "line" and not is_safe_from_signals(frame):
            self.lines += 1
            if self.lines in self.at_lines:
                raise self.error
        return self.trace

    def strikes(self, operation: Operation, heap: AddressManager) -> bool:
        """Whether ``operation`` was interrupted; else it ended before that line."""
        sys.settrace(self.trace)
        try:
            operation(heap)
        except self.error:
            return True
        finally:
            sys.settrace(None)
        return False


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_exception_at_any_line_undoes_the_operation(
    name: str, error: type[BaseException]
) -> None:
    done = fragmented_heap()
    OPERATIONS[name](done)
    before, after = state(fragmented_heap()), state(done)
    undone, line = 0, 1
    while True:
        heap = fragmented_heap()
        if not Interruption(error, line).strikes(OPERATIONS[name], heap):
            break
        heap.check()
        # Only when the last change is made does the operation stand.
        assert state(heap) in (before, after)
        undone += state(heap) == before
        line += 1
    assert undone > 5
    assert undone >= line - 8


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_exception_in_the_rollback_is_made_good_by_the_next_operation(name: str) -> None:
    done = fragmented_heap()
    OPERATIONS[name](done)
    possible = [state(fragmented_heap()), state(done)]
    total = Interruption(KeyboardInterrupt)
    total.strikes(OPERATIONS[name], fragmented_heap())
    source = random.Random(name)
    for _ in range(400):
        first = source.randint(1, total.lines)
        heap = fragmented_heap()
        twice = Interruption(KeyboardInterrupt, first, first + source.randint(1, 12))
        assert twice.strikes(OPERATIONS[name], heap)
        heap.check()
        assert state(heap) in possible


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="needs the main thread"
)
def test_real_signals_at_random_moments_lose_no_byte() -> None:
    """A timer that raises, as often as it can, into a heap at work; what is whose is known."""

    class AlarmError(Exception):
        pass

    def raise_alarm(number: int, frame: FrameType | None) -> None:
        raise AlarmError

    heap = AddressManager(512 * PAGE)
    source = random.Random(7)
    alarms = 0
    before = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            live = sorted(allocated_pages(heap))
            freed = source.sample(live, len(live) // 3) if source.random() < 0.6 else []
            wanted = source.randint(1, 40)
            owned = set(live)
            try:
                signal.setitimer(signal.ITIMER_REAL, source.uniform(1e-6, 400e-6))
                with contextlib.suppress(OutOfMemoryError):
                    if freed:
                        heap.batched_free([(page * PAGE, PAGE) for page in freed])
                    else:
                        heap.batched_allocate(PAGE, wanted, allow_partial=True)
                        heap.allocate(3 * PAGE)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except AlarmError:
                alarms += 1
            heap.check()
            now = allocated_pages(heap)
            if freed:
                assert now in (owned, owned - set(freed))
            else:
                assert now >= owned
                assert len(now - owned) in (0, 3, wanted, wanted + 3, 512 - len(owned))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert alarms > 20


def allocated_pages(heap: AddressManager) -> set[int]:
    pages = set(range(heap.get_heap_size() // PAGE))
    for start, size in heap.snapshot().tolist():
        pages -= set(range(start // PAGE, (start + size) // PAGE))
    return pages
