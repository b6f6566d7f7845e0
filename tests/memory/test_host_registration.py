"""HostBuffer.pin: which pieces are registered, also when calls fail, overlap or are interrupted."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from host_memory_probes import PAGE, FakeRegistrar, is_mapped

from kvheap.memory.host_memory import HostBuffer


@pytest.fixture
def registrar() -> FakeRegistrar:
    return FakeRegistrar()


class TestPin:
    def test_pieces_are_registered_on_another_thread(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(10 * PAGE + 5, align_bytes=1 << 16)
        pinned = buffer.pin(PAGE, buffer.size_bytes, registrar=registrar, piece_bytes=4 * PAGE)
        assert pinned == buffer.pinned_bytes == 9 * PAGE + 5
        pieces = [(PAGE, 5 * PAGE), (5 * PAGE, 9 * PAGE), (9 * PAGE, 10 * PAGE + 5)]
        assert buffer.pinned_ranges == pieces
        assert registrar.calls == [
            (buffer.data_ptr + PAGE, 4 * PAGE),
            (buffer.data_ptr + 5 * PAGE, 4 * PAGE),
            (buffer.data_ptr + 9 * PAGE, 2 * PAGE),
        ]
        assert threading.current_thread() not in registrar.threads
        assert buffer.pin(0, PAGE, registrar=registrar) == PAGE
        assert buffer.pinned_ranges == [(0, PAGE), *pieces]
        assert buffer.pin(2 * PAGE, 2 * PAGE, registrar=registrar) == 0
        buffer.close()
        assert registrar.registered == {}
        assert (buffer.pinned_bytes, buffer.pinned_ranges) == (0, [])

    def test_pieces_are_64_gib_at_most(self, registrar: FakeRegistrar) -> None:
        with HostBuffer((130 << 30) + 1) as buffer:
            buffer.pin(0, buffer.size_bytes, registrar=registrar)
            assert [size for _, size in registrar.calls] == [64 << 30, 64 << 30, (2 << 30) + PAGE]

    @pytest.mark.parametrize("number", [0, 2, 4])
    def test_a_piece_that_fails_undoes_the_call(self, number: int) -> None:
        registrar = FakeRegistrar(fail_register=number + 1)
        buffer = HostBuffer(8 * PAGE)
        buffer.pin(0, PAGE, registrar=registrar)
        message = (
            rf"cannot pin bytes \[{PAGE * (number + 1)}, {PAGE * (number + 2)}\) of the buffer, "
            rf"piece {number + 1} of 5: cudaErrorFake \(77\): no pages left; {PAGE * number} bytes "
            rf"pinned before it in this call were unpinned, {PAGE} bytes of the buffer are pinned$"
        )
        with pytest.raises(RuntimeError, match=message) as caught:
            buffer.pin(PAGE, 6 * PAGE, registrar=registrar, piece_bytes=PAGE)
        assert "cudaErrorFake" in str(caught.value.__cause__)
        assert buffer.pinned_ranges == [(0, PAGE)]
        assert registrar.registered == {buffer.data_ptr: PAGE}
        assert buffer.pin(PAGE, 6 * PAGE, registrar=registrar) == 5 * PAGE

    def test_an_undo_that_fails_is_told_and_kept(self) -> None:
        registrar = FakeRegistrar(fail_register=2, fail_unregister=1)
        buffer = HostBuffer(8 * PAGE)
        with pytest.raises(
            RuntimeError, match=r"4096 bytes pinned before.*failed: cudaErrorFake \(78\)"
        ):
            buffer.pin(0, 4 * PAGE, registrar=registrar, piece_bytes=PAGE)
        assert buffer.pinned_ranges == [(0, PAGE)]
        assert list(registrar.registered) == [buffer.data_ptr]
        buffer.close()
        assert registrar.registered == {}

    def test_other_errors_undo_the_call_too(self) -> None:
        class Broken(FakeRegistrar):
            def register(self, pointer: int, num_bytes: int) -> None:
                if self.calls:
                    raise TypeError("a bug")
                super().register(pointer, num_bytes)

        registrar = Broken()
        buffer = HostBuffer(2 * PAGE)
        with pytest.raises(TypeError, match="a bug"):
            buffer.pin(0, 2 * PAGE, registrar=registrar, piece_bytes=PAGE, allow_unpinned=True)
        assert (buffer.pinned_bytes, registrar.registered) == (0, {})

    def test_allow_unpinned_leaves_a_piece_out(self) -> None:
        registrar = FakeRegistrar(fail_register=1)
        buffer = HostBuffer(3 * PAGE + 1)
        pinned = buffer.pin(
            0, 3 * PAGE + 1, registrar=registrar, piece_bytes=PAGE, allow_unpinned=True
        )
        assert pinned == buffer.pinned_bytes == 2 * PAGE + 1
        assert buffer.pinned_ranges == [(0, PAGE), (2 * PAGE, 3 * PAGE), (3 * PAGE, 3 * PAGE + 1)]

    def test_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        buffer = HostBuffer(PAGE)
        with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
            buffer.pin(0, PAGE)
        assert buffer.pin(0, PAGE, allow_unpinned=True) == buffer.pinned_bytes == 0

    @pytest.mark.parametrize(
        ("start", "end", "piece_bytes", "message"),
        [
            (0, 5 * PAGE, PAGE, "is not within the buffer"),
            (1, PAGE, PAGE, "start and end must be multiples of 4096"),
            (0, PAGE + 1, PAGE, "start and end must be multiples of 4096"),
            (0, PAGE, 0, "piece_bytes must be a positive multiple of 4096, got 0"),
            (0, PAGE, PAGE + 1, "piece_bytes must be a positive multiple"),
            (PAGE, 3 * PAGE, PAGE, r"bytes \[8192, 12288\) are pinned already"),
        ],
    )
    def test_wrong_arguments(
        self, start: int, end: int, piece_bytes: int, message: str, registrar: FakeRegistrar
    ) -> None:
        buffer = HostBuffer(4 * PAGE)
        buffer.pin(2 * PAGE, 4 * PAGE, registrar=registrar)
        with pytest.raises(ValueError, match=message):
            buffer.pin(start, end, registrar=registrar, piece_bytes=piece_bytes)
        assert buffer.pinned_ranges == [(2 * PAGE, 4 * PAGE)]
        assert len(registrar.calls) == 1

    def test_a_random_history(self) -> None:
        rng = random.Random(20)
        registrar = FakeRegistrar()
        buffer = HostBuffer(64 * PAGE - 100)
        pages: set[int] = set()
        for _ in range(150):
            first = rng.randrange(64)
            last = min(64, first + rng.randint(1, 6))
            end = min(last * PAGE, buffer.size_bytes)
            fails = rng.random() < 0.3
            registrar.fail_register = len(registrar.calls) + rng.randrange(3) if fails else None
            try:
                buffer.pin(first * PAGE, end, registrar=registrar, piece_bytes=2 * PAGE)
            except (ValueError, RuntimeError):
                pass
            else:
                assert not pages & set(range(first, last))
                pages |= set(range(first, last))
            held = {page for start, end in buffer.pinned_ranges for page in covered(start, end)}
            assert held == pages
            assert sum(registrar.registered.values()) == len(pages) * PAGE
            tail = 100 if 63 in pages else 0
            assert buffer.pinned_bytes == len(pages) * PAGE - tail
        assert len(pages) > 20


def covered(start: int, end: int) -> range:
    return range(start // PAGE, -(-end // PAGE))


class SlowRegistrar(FakeRegistrar):
    """Sends a signal once it has registered the first piece, and goes on when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def register(self, pointer: int, num_bytes: int) -> None:
        super().register(pointer, num_bytes)
        if len(self.calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert self.go_on.wait(60)


class TestInterruptedCaller:
    """The signal comes while the first of three pieces is being registered."""

    @pytest.fixture(autouse=True)
    def _signal_raises(self) -> Iterator[None]:
        def interrupt(number: int, frame: object) -> None:
            raise InterruptedError("by a signal")

        before = signal.signal(signal.SIGUSR1, interrupt)
        yield
        signal.signal(signal.SIGUSR1, before)

    def test_nothing_stays_pinned(self) -> None:
        buffer, registrar = HostBuffer(3 * PAGE), SlowRegistrar()
        with pytest.raises(InterruptedError, match="by a signal"):
            buffer.pin(0, 3 * PAGE, registrar=registrar, piece_bytes=PAGE)
        registrar.go_on.set()
        buffer.close()  # waits for the worker
        assert len(registrar.calls) == 1
        assert registrar.registered == {}

    def test_memory_stays_mapped_until_the_worker_is_done(self) -> None:
        buffer, registrar = HostBuffer(3 * PAGE), SlowRegistrar()
        pointer = buffer.data_ptr
        with pytest.raises(InterruptedError, match="by a signal"):
            buffer.pin(0, 3 * PAGE, registrar=registrar, piece_bytes=PAGE)
        del buffer
        gc.collect()
        assert is_mapped(pointer)
        registrar.go_on.set()
        deadline = time.monotonic() + 60
        while is_mapped(pointer) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not is_mapped(pointer)
        assert (registrar.registered, registrar.unregistered_unmapped) == ({}, 0)


class TestThreads:
    def test_pins_of_many_threads(self, registrar: FakeRegistrar) -> None:
        buffer = HostBuffer(40 * PAGE)

        def pin_some(number: int) -> None:
            for page in range(number, 40, 4):
                buffer.pin(page * PAGE, (page + 1) * PAGE, registrar=registrar)

        threads = [threading.Thread(target=pin_some, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert buffer.pinned_ranges == [(page * PAGE, (page + 1) * PAGE) for page in range(40)]
        buffer.close()
        assert registrar.registered == {}

    def test_close_waits_for_a_pin_and_looking_does_not(self) -> None:
        class Slow(FakeRegistrar):
            def register(self, pointer: int, num_bytes: int) -> None:
                begun.set()
                assert go_on.wait(60)
                super().register(pointer, num_bytes)

        begun, go_on, registrar = threading.Event(), threading.Event(), Slow()
        buffer = HostBuffer(PAGE)
        pinning = threading.Thread(
            target=buffer.pin, args=(0, PAGE), kwargs={"registrar": registrar}
        )
        pinning.start()
        assert begun.wait(60)
        assert (buffer.pinned_bytes, buffer.pinned_ranges) == (0, [])
        closing = threading.Thread(target=buffer.close)
        closing.start()
        while not buffer.closed:
            time.sleep(0.001)
        assert closing.is_alive()
        go_on.set()
        closing.join()
        pinning.join()
        assert (len(registrar.calls), registrar.registered) == (1, {})
