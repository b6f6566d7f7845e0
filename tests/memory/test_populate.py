"""HostBuffer.populate: which pages are committed, and how it fails."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
import types
from collections.abc import Callable

import pytest
import torch
from foreign_code import interrupts, no_deadlock
from host_memory_probes import PAGE, FakeRegistrar, anonymous_bytes, resident_pages

from kvheap.memory import pages, populate
from kvheap.memory.host_memory import HostBuffer


@pytest.fixture(params=["kernel", "by hand"])
def populate_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by hand":

        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            raise OSError(errno.EINVAL, "as before Linux 5.14")

        monkeypatch.setattr(populate, "madvise", refuse)


@pytest.mark.usefixtures("populate_way")
class TestPopulate:
    @pytest.mark.parametrize("threads", [None, 1, 3])
    def test_pages_become_resident_and_no_others(
        self, threads: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(populate, "POPULATE_SLICE_BYTES", 16 * PAGE)
        buffer = HostBuffer(200 * PAGE, align_bytes=1 << 16)
        buffer.populate(3 * PAGE + 7, 150 * PAGE + 1, threads=threads)
        resident = resident_pages(buffer)
        assert all(resident[3:151])
        assert not any(resident[:3] + resident[151:])

    def test_pages_are_memory_not_the_page_of_zeros(self) -> None:
        buffer = HostBuffer(64 << 20)
        before = anonymous_bytes()
        buffer.populate(0, 64 << 20)
        assert anonymous_bytes() - before > 60 << 20

    def test_the_last_part_of_a_page(self) -> None:
        buffer = HostBuffer(3 * PAGE + 5)
        buffer.populate(3 * PAGE + 1, 3 * PAGE + 5)
        assert resident_pages(buffer) == [False, False, False, True]
        buffer.populate(2, 2)
        assert resident_pages(buffer) == [False, False, False, True]
        buffer.populate(0, buffer.size_bytes)
        assert all(resident_pages(buffer))

    @pytest.mark.parametrize("make", [HostBuffer, HostBuffer.shared])
    def test_contents_stay(self, make: Callable[[int], HostBuffer]) -> None:
        buffer = make(64 * PAGE + 9)
        expected = torch.randint(0, 256, (buffer.size_bytes,), dtype=torch.uint8)
        buffer.tensor.copy_(expected)
        buffer.populate(0, buffer.size_bytes)
        assert torch.equal(buffer.tensor, expected)

    def test_shared_pages_become_resident(self) -> None:
        buffer = HostBuffer.shared(20 * PAGE + 1)
        assert buffer.fd is not None
        buffer.populate(4 * PAGE, 12 * PAGE)
        assert os.fstat(buffer.fd).st_blocks * 512 == 8 * PAGE


class TestPopulateErrors:
    @pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, PAGE + 1)])
    def test_a_wrong_range(self, start: int, end: int) -> None:
        buffer = HostBuffer(PAGE)
        with pytest.raises(ValueError, match="is not within the buffer's 4096 bytes"):
            buffer.populate(start, end)

    def test_no_threads(self) -> None:
        with pytest.raises(ValueError, match="threads must be positive, got 0"):
            HostBuffer(PAGE).populate(0, PAGE, threads=0)

    def test_no_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            raise OSError(errno.ENOMEM, "no memory")

        monkeypatch.setattr(populate, "madvise", refuse)
        with pytest.raises(MemoryError, match=r"no memory for bytes \[0, 4096\)"):
            HostBuffer(PAGE).populate(0, 1)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_file_cut_short(self, threads: int) -> None:
        buffer = HostBuffer.shared(64 << 20)
        assert buffer.fd is not None
        os.ftruncate(buffer.fd, 0)
        with pytest.raises(OSError, match=r"cannot commit bytes \[\d+, \d+\) of .*Bad addr"):
            buffer.populate(0, 64 << 20, threads=threads)

    @pytest.mark.parametrize("threads", [1, 4])
    def test_the_first_error_ends_it(self, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also an error that nobody foresaw, whichever thread meets it."""
        calls: list[int] = []

        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            calls.append(pointer)
            if len(calls) == 6:
                raise IndexError("a bug")
            time.sleep(0.001)

        monkeypatch.setattr(populate, "madvise", refuse)
        with pytest.raises(IndexError, match="a bug"):
            HostBuffer(1 << 36).populate(0, 1 << 36, threads=threads)
        assert 6 <= len(calls) < 1000  # of 4,096 slices

    def test_without_another_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when the interpreter is exiting."""

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        buffer, registrar = HostBuffer(64 << 20), FakeRegistrar()
        buffer.populate(0, 64 << 20, threads=8)
        assert all(resident_pages(buffer))
        assert buffer.pin(0, 64 << 20, registrar=registrar) == 64 << 20

    def test_interrupted_calls_are_made_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = [errno.EINTR, errno.EAGAIN, 0]

        def madvise(pointer: int, num_bytes: int, advice: int) -> int:
            code = answers.pop(0)
            ctypes.set_errno(code)
            return -1 if code else 0

        monkeypatch.setattr(pages, "_libc", types.SimpleNamespace(madvise=madvise))
        HostBuffer(PAGE).populate(0, PAGE)
        assert answers == []


class LookingRegistrar(FakeRegistrar):
    """Notes which pages were resident when they were registered."""

    buffer: HostBuffer

    def __init__(self) -> None:
        super().__init__()
        self.resident: list[bool] = []

    def register(self, pointer: int, num_bytes: int) -> None:
        if not self.buffer.closed:
            first = (pointer - self.buffer.data_ptr) // PAGE
            self.resident += resident_pages(self.buffer)[first : first + num_bytes // PAGE]
        super().register(pointer, num_bytes)


class TestBeforePinning:
    @pytest.fixture
    def registrar(self) -> LookingRegistrar:
        return LookingRegistrar()

    def test_pages_are_there_before_they_are_registered(
        self, registrar: LookingRegistrar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(populate, "POPULATE_SLICE_BYTES", 16 * PAGE)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
        monkeypatch.setattr(populate, "cpus_nearby", lambda cpus: cpus)
        threads: set[int] = set()
        at_once = threading.Barrier(4)
        madvise = populate.madvise

        def note(pointer: int, num_bytes: int, advice: int) -> None:
            threads.add(threading.get_ident())
            with contextlib.suppress(threading.BrokenBarrierError):
                at_once.wait(10)
            madvise(pointer, num_bytes, advice)

        monkeypatch.setattr(populate, "madvise", note)
        registrar.buffer = buffer = HostBuffer(200 * PAGE)
        assert buffer.pin(4 * PAGE, 196 * PAGE, registrar=registrar) == 192 * PAGE
        assert registrar.resident == [True] * 192
        assert len(threads) == 4
        assert resident_pages(buffer)[:4] == [False] * 4
        buffer.close()

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM, errno.EIO])
    def test_a_kernel_that_does_not_commit_leaves_it_to_the_driver(
        self, registrar: LookingRegistrar, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(pointer: int, num_bytes: int, advice: int) -> None:
            raise OSError(code, "refused")

        monkeypatch.setattr(populate, "madvise", refuse)
        registrar.buffer = buffer = HostBuffer(8 * PAGE)
        assert buffer.pin(0, 8 * PAGE, registrar=registrar) == 8 * PAGE
        assert registrar.resident == [False] * 8
        buffer.close()

    def test_a_closed_buffer_is_committed_no_further(
        self, registrar: LookingRegistrar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(populate, "POPULATE_SLICE_BYTES", PAGE)
        monkeypatch.setattr(populate, "MAX_POPULATE_THREADS", 1)
        registrar.buffer = buffer = HostBuffer(8 * PAGE)
        tensor = buffer.tensor
        commits: list[int] = []
        closers: list[threading.Thread] = []
        madvise = populate.madvise

        def note(pointer: int, num_bytes: int, advice: int) -> None:
            commits.append(pointer)
            madvise(pointer, num_bytes, advice)
            if len(commits) == 3:
                closers.append(threading.Thread(target=buffer.close))
                closers[0].start()
                while not buffer.closed:
                    time.sleep(0.001)

        monkeypatch.setattr(populate, "madvise", note)
        buffer.pin(0, 8 * PAGE, registrar=registrar)
        assert len(commits) == 3
        closers[0].join(20)
        assert registrar.registered == {}
        assert len(tensor) == 8 * PAGE

    def test_threads_stay_on_the_callers_node(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept: list[tuple[str, set[int]]] = []
        monkeypatch.setattr(populate, "POPULATE_SLICE_BYTES", PAGE)
        monkeypatch.setattr(populate, "cpus_nearby", lambda cpus: cpus & {0, 1})
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
        monkeypatch.setattr(
            os,
            "sched_setaffinity",
            lambda pid, cpus: kept.append((threading.current_thread().name, cpus)),
        )
        HostBuffer(8 * PAGE).populate(0, 8 * PAGE)
        assert kept == [("kvheap-populate", {0, 1})]  # two threads, one of them the caller's
        kept.clear()
        HostBuffer(8 * PAGE).populate(0, 8 * PAGE, threads=3)
        assert kept == [("kvheap-populate", {0, 1})] * 2


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_makes_and_populates_one_gets_a_handlers_exception(is_file: bool) -> None:
    """A time-out is an ``OSError``: not one that says that memory cannot be committed."""
    fd = os.memfd_create("a file") if is_file else None
    if fd is not None:
        os.ftruncate(fd, 8 * PAGE)

    def make() -> None:
        with HostBuffer(8 * PAGE, fd=fd) as buffer:
            buffer.populate(0, 8 * PAGE, threads=1)

    places = tuple(f"kvheap.memory.{name}" for name in ("host_mapping", "populate", "pages"))
    number = 0
    while True:
        with no_deadlock():  # any other error fails
            if not interrupts(number, make, TimeoutError, modules=places):
                break
        number += 1
    assert number > 5
    if fd is not None:
        os.close(fd)
