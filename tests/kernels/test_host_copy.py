"""Host copies against a memmove a piece, on buffers whose every byte is compared."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvheap.kernels import host_copy, shared_work
from kvheap.kernels.host_copy import (
    LARGE_BYTES,
    MAX_SINGLE_MOVES,
    ROW_BYTES,
    THREAD_BYTES,
    copy_on_host,
)
from kvheap.kernels.pieces import Pieces

POISON = 0xA5


@dataclass
class Case:
    """Pieces from a random buffer to a poisoned one; ``offset`` is where both are at, modulo 64."""

    source: np.ndarray
    target: np.ndarray
    pieces: Pieces

    @classmethod
    def of(cls, sources, targets, sizes, offset: int = 0, seed: int = 0) -> Case:
        """Pieces at byte offsets of the two buffers, which end some bytes behind the last."""
        sources, targets, sizes = (
            np.asarray(array, np.int64) for array in (sources, targets, sizes)
        )
        source = aligned(int((sources + sizes).max(initial=0)) + 16, offset)
        source[:] = np.random.default_rng(seed).integers(0, 256, len(source), np.uint8)
        target = aligned(int((targets + sizes).max(initial=0)) + 16, offset)
        target[:] = POISON
        pieces = Pieces.of(sources + address(source), targets + address(target), sizes)
        return cls(source, target, pieces)

    @classmethod
    def scattered(cls, sizes, seed: int = 0, gap: int = 20, align: int = 1) -> Case:
        """Pieces of such sizes in random order on both sides, with random gaps."""
        generator = np.random.default_rng(seed)
        sizes = np.asarray(sizes, np.int64)

        def places():
            order = generator.permutation(len(sizes))
            lengths = sizes[order] + generator.integers(0, gap, len(sizes))
            lengths = -(-lengths // align) * align
            starts = np.empty_like(sizes)
            starts[order] = np.cumsum(lengths) - lengths + align
            return starts

        return cls.of(places(), places(), sizes, 0, seed)

    def check(self, threads: int | None = None) -> None:
        """Copy, and compare every byte of both buffers with those of a copy piece by piece."""
        expected = self.target.copy()
        shift = address(expected) - address(self.target)
        for source, target, size in zip(
            self.pieces.sources.tolist(),
            self.pieces.targets.tolist(),
            self.pieces.size_array().tolist(),
            strict=True,
        ):
            ctypes.memmove(target + shift, source, size)
        before = self.source.copy()
        copy_on_host(self.pieces, threads)
        np.testing.assert_array_equal(self.target, expected)
        np.testing.assert_array_equal(self.source, before)


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def aligned(num_bytes: int, offset: int = 0) -> np.ndarray:
    """Bytes from an address that is ``offset`` behind a multiple of 64."""
    storage = np.empty(num_bytes + 64 + offset, np.uint8)
    begin = -address(storage) % 64 + offset
    return storage[begin : begin + num_bytes]


@pytest.fixture
def many_threads(monkeypatch):
    """Threads are used for few bytes as well."""
    monkeypatch.setattr(host_copy, "THREAD_BYTES", 1)
    monkeypatch.setattr(host_copy, "SHARE_BYTES", 1)


@pytest.fixture
def thread_bytes(monkeypatch):
    """Bytes for each thread: a quarter of what they are."""
    monkeypatch.setattr(host_copy, "THREAD_BYTES", THREAD_BYTES // 4)
    return THREAD_BYTES // 4


@pytest.fixture
def rows_only(monkeypatch):
    """No pieces are too few to be rows."""
    monkeypatch.setattr(host_copy, "MAX_SINGLE_MOVES", 0)


def test_no_pieces():
    copy_on_host(Pieces.of([], [], []))
    copy_on_host(Pieces.of([], [], 64), threads=4)


@pytest.mark.parametrize("threads", [None, 1, 2, 4])
def test_one_piece(threads, thread_bytes):
    for size in (1, 7, 4096, LARGE_BYTES, 5 * thread_bytes + 3):
        Case.of([3], [8], [size]).check(threads)


def test_every_alignment(rows_only):
    sizes = np.arange(1, 100)
    starts = np.cumsum(sizes + 3) - sizes
    for source_offset, target_offset in np.ndindex(18, 18):
        Case.of(starts + source_offset, starts[::-1].copy() * 2 + target_offset, sizes).check()
        Case.of(
            np.arange(40) * 96 + source_offset, np.arange(40)[::-1] * 96 + target_offset, 48
        ).check()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_random_sizes(threads, many_threads):
    for seed in range(3):
        sizes = np.random.default_rng(seed).integers(1, 301, 3000)
        Case.scattered(sizes, seed).check(threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_small_size(threads, rows_only, many_threads):
    """Every class has its least and its largest size, and one piece is a class."""
    around = [2**bit + more for bit in range(2, 16) for more in (-2, -1, 0, 1, 2**bit // 4)]
    for sizes in (np.arange(1, 1200), np.array(around), np.array([5, 5, 7, ROW_BYTES + 1])):
        Case.scattered(np.random.default_rng(1).permutation(sizes)).check(threads)


SMALL_SIZES = (1, 2, 3, 8, 16, 48, 64, 100, 1000, 4096, 4097, 5000, 8192, 3 * 4096, 20_000, 32_767)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dense", ["neither", "source", "target"])
def test_one_size(dense, threads, many_threads):
    for size in SMALL_SIZES:
        check_one_size(size, dense, threads)


def check_one_size(size: int, dense: str, threads: int) -> None:
    count = 2 * MAX_SINGLE_MOVES if size > 1000 else 600
    generator = np.random.default_rng(size)
    for offset, gap in ((0, 1), (5, 3)):
        stride = size * 2 if gap == 1 else size + gap
        sources, targets = (generator.permutation(count) * stride + 16 for _ in range(2))
        if dense == "source":
            sources = np.arange(count) * size + 16
        if dense == "target":
            targets = np.arange(count) * size + 16
        Case.of(sources, targets, size, offset).check(threads)


@pytest.mark.parametrize("threads", [None, 2, 4])
def test_large_and_small_pieces(threads, thread_bytes):
    generator = np.random.default_rng(0)
    sizes = np.concatenate(
        (
            generator.integers(1, 2000, 500),
            generator.integers(LARGE_BYTES - 100, 5 * LARGE_BYTES, 40),
            [7 * thread_bytes + 1],
        )
    )
    Case.scattered(generator.permutation(sizes)).check(threads)


def test_neighbours_are_one_piece(monkeypatch):
    moved = []
    move_each = host_copy._move_each
    monkeypatch.setattr(host_copy, "_move_each", lambda p: (moved.append(len(p)), move_each(p)))
    Case.of(np.arange(1000) * 64, np.arange(1000) * 64 + 7, 64).check(threads=1)
    assert moved == [1]


@pytest.mark.parametrize("size", [64, None])
def test_a_hundred_thousand_pieces(size):
    sizes = np.full(100_000, size) if size else np.random.default_rng(0).integers(1, 200, 100_000)
    Case.scattered(sizes).check()


@given(
    data=st.data(),
    sizes=st.lists(
        st.one_of(st.integers(1, 40), st.integers(1, 3 * ROW_BYTES), st.just(16)), max_size=60
    ),
    align=st.sampled_from([1, 2, 8, 16]),
    threads=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_any_pieces(data, sizes, align, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copy, "THREAD_BYTES", data.draw(st.sampled_from([1, THREAD_BYTES])))
        patch.setattr(host_copy, "SHARE_BYTES", 1)
        patch.setattr(host_copy, "MAX_SINGLE_MOVES", data.draw(st.integers(0, 3)))
        patch.setattr(host_copy, "LARGE_BYTES", data.draw(st.sampled_from([4096, LARGE_BYTES])))
        patch.setattr(host_copy, "MIN_CALL_ROWS", data.draw(st.integers(1, 100)))
        patch.setattr(host_copy, "CALL_BYTES", data.draw(st.integers(1, 1000)))
        patch.setattr(host_copy, "SELECT_WORDS", data.draw(st.integers(1024, 2000)))
        seed, gap = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 30))
        Case.scattered(sizes, seed, gap, align).check(threads)


def test_sources_and_targets_in_one_buffer():
    """Sources and targets take turns, so that the rows of one side run across the other's."""
    size, count = 48, 2000
    buffer = np.random.default_rng(0).integers(0, 256, 2 * size * count, np.uint8)
    generator = np.random.default_rng(1)
    sources = generator.permutation(count) * 2 * size
    targets = generator.permutation(count) * 2 * size + size
    expected = buffer.copy()
    for source, target in zip(sources, targets, strict=True):
        expected[target : target + size] = buffer[source : source + size]
    copy_on_host(Pieces.of(sources + address(buffer), targets + address(buffer), size))
    np.testing.assert_array_equal(buffer, expected)


def test_sources_may_repeat_and_overlap():
    starts = np.random.default_rng(0).integers(0, 500, 4000)
    Case.of(starts, np.arange(4000)[::-1] * 40, 32).check()
    Case.of(starts, np.arange(4000) * 32, 32).check()
    Case.of(starts, np.arange(4000) * 40, np.arange(4000) % 33 + 1).check()


@pytest.fixture
def map_at():
    """Maps fresh memory at or near an address."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    mapped = []

    def map_near(wanted: int, num_bytes: int) -> np.ndarray:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        got = libc.mmap(wanted, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        mapped.append((got, num_bytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(got))

    yield map_near
    for start, num_bytes in mapped:
        libc.munmap(start, num_bytes)


@pytest.mark.skipif(sys.maxsize < 2**47 or sys.platform != "linux", reason="maps at addresses")
@pytest.mark.parametrize("size", [16, 33, 4096, 20_000])
@pytest.mark.parametrize("dense", ["neither", "source", "target"])
def test_far_apart_mappings(size, dense, map_at):
    """Each side has memory at both ends of the address space: its rows span all that is between."""
    count, half = 80, 40
    room = 2 * count * size
    low, high = map_at(1 << 32, 2 * room), map_at((1 << 46) + (1 << 45), 2 * room)
    if address(high) - address(low) < 1 << 44:
        pytest.skip("the system maps elsewhere")
    for memory in (low, high):
        memory[:] = np.random.default_rng(2).integers(0, 256, len(memory), np.uint8)
    ends = np.repeat([address(low), address(high)], half)
    sources = np.random.default_rng(0).permutation(ends + np.arange(count) * 2 * size)
    targets = np.random.default_rng(1).permutation(ends + np.arange(count) * 2 * size + room)
    if dense == "source":
        sources = address(low) + np.arange(count) * size
    if dense == "target":
        targets = address(high) + room + np.arange(count) * size
    before = [ctypes.string_at(source, size) for source in sources.tolist()]
    for sizes in (size, np.arange(count) % size + 1 if dense == "neither" else size):
        pieces = Pieces.of(sources, targets, sizes)
        copy_on_host(pieces)
        each = pieces.size_array().tolist()
        assert [ctypes.string_at(t, n) for t, n in zip(targets.tolist(), each, strict=True)] == [
            data[:n] for data, n in zip(before, each, strict=True)
        ]


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(threads):
    with pytest.raises(ValueError, match=f"threads must be positive, got {threads}"):
        copy_on_host(Pieces.of([4096], [8192], [1]), threads)


def meeting_threads(patch: pytest.MonkeyPatch, count: int) -> set[int]:
    """The threads that will copy, none of which goes on before ``count`` have begun."""
    barrier = threading.Barrier(count, timeout=10)
    seen: set[int] = set()
    move_each = host_copy._move_each

    def meet(pieces):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            barrier.wait()
        move_each(pieces)

    patch.setattr(host_copy, "_move_each", meet)
    return seen


def test_threads_share_one_large_piece(monkeypatch, many_threads):
    seen = meeting_threads(monkeypatch, 2)
    Case.of([0], [5], [1_000_003]).check(threads=2)
    assert len(seen) == 2


class StopCopyError(Exception):
    pass


@pytest.mark.parametrize("who", ["caller", "helper"])
def test_error_leaves_nothing_in_flight(who, monkeypatch, many_threads):
    """One thread raises while the other copies: the error comes when the other is done."""
    caller = threading.get_ident()
    barrier = threading.Barrier(2, timeout=10)
    log = []

    def work(pieces):
        is_caller = threading.get_ident() == caller
        barrier.wait()
        if is_caller == (who == "caller"):
            raise StopCopyError
        time.sleep(0.2)
        log.append("ended")

    monkeypatch.setattr(host_copy, "_move_each", work)
    case = Case.of([0], [0], [1_000_000])
    with pytest.raises(StopCopyError):
        copy_on_host(case.pieces, threads=2)
    log.append("raised")
    time.sleep(0.05)
    assert log == ["ended", "raised"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
def test_interrupts_wait_for_running_copies(monkeypatch, many_threads):
    """Two signals come while the caller waits for a helper's copy."""
    caller = threading.get_ident()
    barrier = threading.Barrier(2, timeout=10)
    log = []

    def work(pieces):
        barrier.wait()
        if threading.get_ident() != caller:
            time.sleep(0.4)
            log.append("ended")

    def interrupt(number, frame):
        log.append("signal")
        raise KeyboardInterrupt

    monkeypatch.setattr(host_copy, "_move_each", work)
    monkeypatch.setattr(host_copy, "SHARES", 1)
    case = Case.of([0], [0], [1_000_000])
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            copy_on_host(case.pieces, threads=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert log.count("signal") >= 2
    assert log.index("ended") > 1


def test_two_callers_at_once(many_threads):
    cases = [
        Case.scattered(np.random.default_rng(seed).integers(1, 40_000, 200), seed)
        for seed in range(6)
    ]
    with ThreadPoolExecutor(3) as callers:
        for done in [callers.submit(case.check, 3) for case in cases]:
            done.result()


def test_helpers_that_cannot_be_had_are_done_without(monkeypatch, many_threads):
    def refuse(pid):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(shared_work, "_helpers", refuse)
    Case.scattered(np.random.default_rng(0).integers(1, 40_000, 400)).check(4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_copies_with_threads_of_its_own(monkeypatch, many_threads):
    case = Case.of([0], [5], [1_000_003])
    case.check(threads=2)  # the parent has a helper now
    meeting_threads(monkeypatch, 2)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            case.check(threads=2)
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
    assert status == 0


@pytest.mark.parametrize("is_mixed", [False, True])
def test_no_python_for_each_piece(is_mixed):
    def calls(count: int) -> tuple[int, int]:
        generator = np.random.default_rng(0)
        sizes = np.resize([64, 80, 100, 300], count) if is_mixed else 64
        case = Case.of(
            generator.permutation(count) * 320, generator.permutation(count) * 320, sizes
        )
        seen = {"call": 0, "c_call": 0}

        def count_event(frame, event, argument):
            if event in seen:
                seen[event] += 1

        sys.setprofile(count_event)
        try:
            copy_on_host(case.pieces, threads=1)
        finally:
            sys.setprofile(None)
        return seen["call"], seen["c_call"]

    (few_python, few_c), (many_python, many_c) = calls(1_000), calls(100_000)
    assert many_python == few_python
    assert many_c - few_c < 100_000 // host_copy.MIN_CALL_ROWS


def test_torch_memory():
    """Between tensors, as callers have them."""
    source = torch.arange(1 << 16, dtype=torch.int32)
    target = torch.zeros_like(source)
    order = np.random.default_rng(0).permutation(1 << 8)
    copy_on_host(
        Pieces.of(source.data_ptr() + order * 1024, target.data_ptr() + np.arange(256) * 1024, 1024)
    )
    assert torch.equal(target.view(256, -1), source.view(256, -1)[torch.from_numpy(order)])
