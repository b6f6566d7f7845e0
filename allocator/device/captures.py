"""Captures of CUDA graphs: which streams are being captured, and events that wait for their end.

An event that is recorded on a stream while it is captured becomes a part of the graph: it cannot be
queried, ever. So a stream that is being captured is asked for an event later (:class:`LateEvent`).
"""

from __future__ import annotations

from typing import Any

import torch

from kvheap.device.copy_device import CopyDevice
from kvheap.device.events import DeviceEvent, Event, Stream
from kvheap.interrupts import is_interrupt
from kvheap.kernels.capture_mode import uses_cuda
from kvheap.kernels.copy_engine import CopyEngineError, driver

__all__ = ["DeferredEvent", "LateEvent", "end_of_work", "is_captured", "is_capturing"]

CAPTURE_IMPLICIT = 906
"""``CUDA_ERROR_STREAM_CAPTURE_IMPLICIT``: asked of the legacy default stream while a stream that
waits for it is being captured."""


def is_capturing() -> bool:
    """Whether this thread's current stream is being captured in a CUDA graph."""
    if not uses_cuda():
        return False
    try:
        return torch.cuda.is_current_stream_capturing()
    except Exception as error:  # of the legacy default stream, as for ``CAPTURE_IMPLICIT``
        if is_interrupt(error):
            raise
        return True


def is_captured(stream: Stream) -> bool:
    """Whether a CUDA stream is being captured, or would end a capture if it recorded an event."""
    handle = getattr(stream, "cuda_stream", None)
    if handle is None or not uses_cuda():
        return False
    try:
        return driver().is_capturing(handle)
    except CopyEngineError as error:
        return error.code == CAPTURE_IMPLICIT


def end_of_work(stream: Stream) -> Event:
    """An event that marks the end of a stream's work so far, or of some more of it.

    Raises:
        Exception: the stream cannot record an event.
    """
    if getattr(stream, "cuda_stream", None) is None:
        return stream.record_event()
    if is_captured(stream):
        return LateEvent(stream)
    event = stream.record_event()
    # Another thread may have begun to capture the stream meanwhile.
    return LateEvent(stream) if is_captured(stream) else event


class LateEvent:
    """An event of a stream that is being captured: recorded when the capture is found to be over.

    Until then it has not come. The graph itself may be replayed at any time later: what it uses
    must be kept by whoever replays it.

    Args:
        stream: the stream.
    """

    __slots__ = ("_event", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._event: Event | None = None

    def query(self) -> bool:
        """Whether the work of the stream has ended that it had when its capture was over."""
        if self._event is None:
            event = end_of_work(self._stream)
            if isinstance(event, LateEvent):
                return False
            self._event = event
        return self._event.query()


class DeferredEvent:
    """The end of a stream's work, recorded when it is first asked for.

    For work whose end few callers ask for: recording an event takes microseconds. Work that is
    queued before somebody asks counts too.

    Args:
        device: the device.
        stream: one of its streams.
    """

    __slots__ = ("_device", "_event", "_stream")

    def __init__(self, device: CopyDevice, stream: Any) -> None:
        self._device = device
        self._stream = stream
        self._event: DeviceEvent | None = None

    def query(self) -> bool:
        """Whether the work has ended; False while the stream is being captured."""
        if self._event is None and self._device.is_capturing(self._stream):
            return False
        return self.recorded().query()

    def synchronize(self) -> None:
        """Wait on the host until the work has ended.

        Raises:
            RuntimeError: the stream is being captured.
        """
        self.recorded().synchronize()

    def recorded(self) -> DeviceEvent:
        """The event itself.

        Raises:
            RuntimeError: the stream is being captured.
        """
        if self._event is None:
            if self._device.is_capturing(self._stream):
                raise RuntimeError(
                    f"{self._stream} is being captured, and records no event of earlier work: ask "
                    f"before or after the capture"
                )
            self._event = self._device.record_event(self._stream)
        return self._event
