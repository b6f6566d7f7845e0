"""A stand-in for captures of CUDA graphs: they break where CUDA's would.

A call that CUDA counts as potentially unsafe breaks a capture in mode ``global``, whatever thread
makes it, unless that thread is in mode ``relaxed``. A capture in mode ``thread_local`` is broken by
its own thread only. What broke one is kept in ``broken``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_device import FakeDevice, FakeStream
from fake_driver import FakeDriver

from kvheap.device import captures
from kvheap.kernels import capture_mode
from kvheap.kernels.copy_engine import Driver

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2

UNSAFE = {"event.query", "event.synchronize", "synchronize", "warm_up", "register", "unregister"}
"""Calls of the stand-in for a device that are the runtime's potentially unsafe ones."""


class CudaStream(FakeStream):
    """A stream with a handle, as torch's have: code that asks the driver can ask about it."""

    def __init__(self, device: FakeDevice, handle: int) -> None:
        super().__init__(device, f"stream {handle:#x}")
        self.cuda_stream = handle
        device.streams.append(self)


class Captures:
    """Which thread captures what, and what broke a capture.

    Args:
        device: whose calls are watched.
    """

    def __init__(self, device: FakeDevice) -> None:
        self.driver = FakeDriver()
        self.broken: list[str] = []
        self.device = device
        self._running: tuple[int, int] | None = None  # thread and mode
        self._handles = iter(range(0x1000, 0x2000))
        device.on_call = self.called

    def stream(self) -> CudaStream:
        """A new stream."""
        return CudaStream(self.device, next(self._handles))

    @contextmanager
    def of(self, *streams: CudaStream, mode: int = GLOBAL) -> Iterator[None]:
        """Capture the first stream, current on this thread, and those that were forked from it."""
        for stream in streams:
            stream.capturing = True
            self.driver.capturing[stream.cuda_stream] = 1
        self._running = threading.get_ident(), mode
        try:
            with self.device.using(streams[0]):
                yield
        finally:
            self._running = None
            for stream in streams:
                stream.capturing = False
                del self.driver.capturing[stream.cuda_stream]

    def called(self, name: str) -> None:
        """A call of the device was made, on this thread."""
        if self._running is None or name not in UNSAFE:
            return
        thread, mode = self._running
        me = threading.get_ident()
        if mode == THREAD_LOCAL and thread != me:
            return
        if self.driver.modes.get(me, GLOBAL) != RELAXED:
            self.broken.append(name)

    def require_whole(self) -> None:
        """Nothing broke a capture, and every thread is in its own mode again."""
        assert self.broken == []
        assert set(self.driver.modes.values()) <= {GLOBAL}
        assert not self.driver.broken


def install(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> Captures:
    """Let the modules under test see these captures."""
    found = Captures(device)
    driver = Driver(found.driver)
    monkeypatch.setattr(capture_mode, "driver", lambda: driver)
    monkeypatch.setattr(captures, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.current.capturing)
    return found


def on_thread(call: Callable[[], object]) -> BaseException | None:
    """Make a call on another thread; returns what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0] if raised else None
