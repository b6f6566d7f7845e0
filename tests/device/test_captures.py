"""The capture mode of a thread, and what each call into CUDA does to somebody else's capture."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_captures import GLOBAL, RELAXED, THREAD_LOCAL, Captures, install, on_thread
from fake_device import FakeDevice, filled, heap_on
from foreign_code import Foreign

from kvheap.device import captures as captures_module
from kvheap.device import cuda
from kvheap.device.captures import LateEvent, end_of_work, is_captured, is_capturing
from kvheap.device.cuda import CudaDevice
from kvheap.kernels import capture_mode, direct_launch, launch, paged_plan, uploads
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.memory.registrar import CudaHostRegistrar


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    found = FakeDevice()
    monkeypatch.setattr(cuda, "device_of", found.device_of)
    return found


@pytest.fixture
def captures(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Captures:
    return install(monkeypatch, device)


class TestRelaxed:
    @pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
    def test_the_threads_own_mode_comes_back(self, captures: Captures, mode: int) -> None:
        modes = captures.driver.modes

        def body() -> None:
            me = threading.get_ident()
            modes[me] = mode
            with Relaxed():
                assert modes[me] == RELAXED
                with Relaxed():
                    assert modes[me] == RELAXED
                assert modes[me] == RELAXED
            assert modes.pop(me) == mode

        assert on_thread(body) is None

    def test_one_inside_another_costs_no_call(
        self, captures: Captures, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = counted(monkeypatch)
        with Relaxed(), Relaxed():
            pass
        assert len(calls) == 2

    def test_an_exception_passes(self, captures: Captures) -> None:
        with pytest.raises(KeyError), Relaxed():
            raise KeyError
        captures.require_whole()

    def test_without_cuda_it_asks_nobody(self) -> None:
        assert not torch.cuda.is_initialized()
        with Relaxed():
            pass
        assert not is_capturing()

    def test_what_a_signal_handler_raises_anywhere_leaves_the_mode(
        self, captures: Captures
    ) -> None:
        class StruckError(Exception):
            pass

        def strike() -> None:
            raise StruckError

        def body() -> None:
            with Relaxed():
                pass

        struck = 0
        for number in itertools.count():
            sys.settrace(Foreign(number, strike, ("kvheap.kernels.capture_mode",)))
            try:
                body()
                ended = True
            except StruckError:
                ended = False
                struck += 1
            finally:
                sys.settrace(None)
            captures.require_whole()
            with Relaxed():  # no flag was left behind either
                assert set(captures.driver.modes.values()) == {RELAXED}
            if ended:
                break
        assert struck > 5


class TestStreams:
    def test_a_captured_stream_is_asked_later(self, device: FakeDevice, captures: Captures) -> None:
        stream = captures.stream()
        with captures.of(stream):
            assert is_captured(stream)
            assert is_capturing()
            event = end_of_work(stream)
            assert not event.query()
            assert not stream.graph
        assert not is_capturing()
        assert not event.query()  # recorded now
        device.drain()
        assert event.query()
        assert device.violations == []

    def test_a_capture_that_begins_meanwhile(self, device: FakeDevice, captures: Captures) -> None:
        stream = captures.stream()
        record = stream.record_event

        def begin() -> Any:
            captures.driver.capturing[stream.cuda_stream] = 1
            stream.capturing = True
            return record()

        stream.record_event = begin  # type: ignore[method-assign]
        assert isinstance(end_of_work(stream), LateEvent)

    def test_one_stream_after_another_is_captured(
        self, device: FakeDevice, captures: Captures
    ) -> None:
        stream = captures.stream()
        with captures.of(stream):
            event = end_of_work(stream)
        with captures.of(stream):
            assert not event.query()
        event.query()
        device.drain()
        assert event.query()

    def test_the_legacy_stream_beside_a_capture(
        self, captures: Captures, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = captures.stream()
        captures.driver.fail("cuStreamIsCapturing", 0, captures_module.CAPTURE_IMPLICIT)
        assert is_captured(stream)
        captures.driver.fail("cuStreamIsCapturing", 0, 201)
        assert not is_captured(stream)

        def refused() -> bool:
            raise RuntimeError("cudaErrorStreamCaptureImplicit")

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refused)
        assert is_capturing()

    def test_other_streams_are_not_asked_about(self, captures: Captures) -> None:
        class Other:
            def record_event(self) -> str:
                return "event"

        assert end_of_work(Other()) == "event"  # type: ignore[arg-type, comparison-overlap]
        assert captures.driver.calls == []


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Notes each exchange of a mode from now on."""
    exchange = capture_mode.driver().exchange_capture_mode
    calls: list[object] = []

    def note(mode: object) -> int:
        calls.append(mode)
        return exchange(mode)

    monkeypatch.setattr(capture_mode, "exchange_of_driver", lambda: note)
    return calls


def test_one_exchange_for_many_events(
    device: FakeDevice, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap = heap_on(device, "device", 64 * 4096)
    stream = captures.stream()
    for _ in range(20):
        batch = filled(heap, 1)
        batch.record_stream(stream)
        heap.batched_free(batch)
    calls = counted(monkeypatch)
    before = device.counts["event.query"]
    assert heap.batched_allocate([4096], torch.uint8, 1) is not None
    assert device.counts["event.query"] - before == 8
    assert len(calls) == 2
    captures.require_whole()


class Calls:
    """``torch.cuda`` as far as a ``CudaDevice`` calls it; each call of ``unsafe`` is watched."""

    def __init__(self, captures: Captures) -> None:
        self.captures = captures

    def watched(self, name: str, result: object = None) -> Callable[..., Any]:
        def call(*arguments: object, **options: object) -> object:
            self.captures.called("synchronize")
            return result

        return call


@pytest.fixture
def torch_cuda(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(captures)
    cudart = type("Cudart", (), {})()
    cudart.cudaHostRegister = calls.watched("cudaHostRegister", 0)
    cudart.cudaHostUnregister = calls.watched("cudaHostUnregister", 0)
    for name, result in {
        "synchronize": None,
        "mem_get_info": (1, 1),
        "Stream": "stream",
    }.items():
        monkeypatch.setattr(torch.cuda, name, calls.watched(name, result))
    monkeypatch.setattr(torch, "empty", calls.watched("empty", "tensor"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "name")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(cuda, "driver", lambda: type("Driver", (), {"has_batch": True})())
    return calls


DEVICE_CALLS: dict[str, Callable[[], object]] = {
    "bind": lambda: CudaDevice(0).has_batch,
    "synchronize": lambda: CudaDevice(0).synchronize(),
    "side_stream": lambda: CudaDevice(0).side_stream(),
    "empty": lambda: CudaDevice(0).empty(16),
    "register": lambda: CudaHostRegistrar().register(4096, 4096),
    "unregister": lambda: CudaHostRegistrar().unregister(4096),
}


@pytest.mark.parametrize("name", DEVICE_CALLS)
def test_what_a_device_is_asked_is_asked_in_the_relaxed_mode(
    captures: Captures, torch_cuda: Calls, name: str
) -> None:
    stream = captures.stream()
    with captures.of(stream):
        assert on_thread(DEVICE_CALLS[name]) is None
        torch.cuda.synchronize()  # the watch works
        assert captures.broken == ["synchronize"]
        captures.broken.clear()
    captures.require_whole()


def ring_that_goes_round(event: Any) -> None:
    """Take words of a ring of two segments until a segment that was read must be written again."""
    words = torch.zeros(8, dtype=torch.int64)
    ring = uploads.WordRing(words, words[:4], lambda *copy: None, lambda: event)
    for _ in range(3):
        ring.take(4)


def compiled(watched: Callable[..., Any]) -> None:
    kernel = SimpleNamespace(arg_names=[], warmup=watched, fn=None)
    variant = SimpleNamespace(constants={}, num_warps=4)
    with suppress(AttributeError):  # nothing was compiled
        direct_launch.compile_ahead(kernel, variant)  # type: ignore[arg-type]


DEVICE = torch.device("cuda", 0)

LAUNCH_CALLS: dict[str, Callable[[Callable[..., Any]], object]] = {
    "staging": lambda watched: launch.staging(4, DEVICE),
    "send": lambda watched: launch.send(SimpleNamespace(to=watched), DEVICE),  # type: ignore[arg-type]
    "reading": lambda watched: ring_that_goes_round(SimpleNamespace(query=watched)),
    "compiling": compiled,
}


@pytest.mark.parametrize("name", LAUNCH_CALLS)
def test_what_a_launch_needs_is_asked_in_the_relaxed_mode(
    captures: Captures, torch_cuda: Calls, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen: list[str] = []
    watch = torch_cuda.watched(name)

    def watched(*arguments: object, **options: object) -> object:
        seen.append(name)
        return watch(*arguments, **options)

    monkeypatch.setattr(torch, "empty", watched)
    stream = captures.stream()
    with captures.of(stream):
        assert on_thread(lambda: LAUNCH_CALLS[name](watched)) is None
    assert seen
    captures.require_whole()


def test_the_current_device_is_not_made_current_again(
    torch_cuda: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []

    def make(device: object) -> nullcontext[None]:
        made.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", make)
    for device in (torch.device("cpu"), torch.device("cuda"), DEVICE):
        with launch.current(device):
            assert made == []
    with launch.current(torch.device("cuda", 1)):
        assert made == [torch.device("cuda", 1)]


def test_old_tables_of_a_cache_wait_for_its_streams(
    device: FakeDevice, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for the whole device would end any capture on it."""
    monkeypatch.setattr(paged_plan, "driver", capture_mode.driver)
    monkeypatch.setattr(paged_plan, "MAX_PAIRINGS", 4)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda *arguments: captures.broken.append("synchronize")
    )
    cache = PagedKVCache.of("mla", [torch.zeros(8, 4, 2)])
    stream, other = captures.stream(), captures.stream()
    paged_plan.Streams.of(cache).note(stream)  # type: ignore[arg-type]
    ran: list[int] = []
    stream.queue.append(("work", lambda: ran.append(1)))

    def pairings(first: int, last: int) -> int:
        for tokens in range(first, last):
            chunk = ChunkLayout.of("PLTD", (1, 1, tokens, 2), 4)
            paged_plan.pairing_of(cache, chunk, None, None)
        return sum(isinstance(each, paged_plan.Pairing) for each in cache.kept.values())

    with captures.of(stream):
        assert pairings(1, 8) == 7  # none is dropped that the graph's stream may read
    assert ran == []
    with captures.of(other):
        assert on_thread(lambda: pairings(8, 9)) is None
    assert ran == [1]
    assert pairings(8, 9) == 6
    captures.require_whole()
