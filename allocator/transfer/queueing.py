"""``StreamQueue``: queues the parts of a copy on a stream, with an event after each.

A failure while queueing is stored in the completion, not raised: what was queued may still run, and
an event after it marks its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.device.events import DeviceEvent
from kvheap.errors import TransferError
from kvheap.interrupts import is_interrupt
from kvheap.transfer.order import Earlier
from kvheap.transfer.work import Work

__all__ = ["StreamQueue", "end_or_lose", "failure_of"]


class StreamQueue:
    """A stream, and the work that comes before a copy on it.

    Args:
        device: the device that executes the copy.
        stream: a stream of the device; None: the current one.
        before: transfers that the copy comes behind.
        new_on: the devices on which the target was just allocated. A heap allocates bytes for work
            on the current stream, and earlier work there may still use them, so the copy waits for
            it.

    Attributes:
        stream: the stream.
        current: the device's current stream.
        is_captured: whether a CUDA graph is being captured on the stream.

    Raises:
        ValueError, TypeError: the stream cannot be used.
        RuntimeError: a graph is being captured that cannot include what comes before.
    """

    def __init__(
        self,
        device: CopyDevice,
        stream: Any,
        before: Sequence[Earlier],
        new_on: Sequence[CopyDevice] = (),
    ) -> None:
        self._device = device
        self.current = device.current_stream()
        self.stream = self.current if stream is None else device.require_stream(stream)
        self._fences: list[tuple[CopyDevice, Any]] = []
        if new_on:
            currents = [(each, each.current_stream()) for each in new_on]
            self._fences = [pair for pair in currents if pair[1] != self.stream]
        for other, current in self._fences:
            if other.is_capturing(current):
                raise RuntimeError(
                    "the current stream is being captured, and earlier work on it may still use "
                    "the new blocks: move blocks before the capture"
                )
        self.is_captured = device.is_capturing(self.stream)
        # A stream that waited for itself would only take the host's time.
        self._before = [each for each in before if not each.is_on(self.stream)] if before else ()
        if self.is_captured and self._before:
            raise RuntimeError(
                "a transfer that fills one of the sides, or reads the target on another stream, is "
                "in flight: wait for it first, as a capture cannot"
            )

    def start(
        self,
        parts: Iterable[Callable[[], None]],
        completion: Completion,
        failure: Callable[[BaseException], TransferError],
    ) -> list[DeviceEvent]:
        """Queue the parts in order.

        Args:
            parts: each queues one part; the stream is current.
            completion: the state of the copy.
            failure: makes the error that is stored if something fails.

        Returns:
            The event at the end of each part that was queued.

        Raises:
            BaseException: what a signal handler raised.
        """
        device, stream = self._device, self.stream
        events: list[DeviceEvent] = []
        try:
            for other, current in self._fences:
                device.wait_event(stream, other.record_event(current))
            for earlier in self._before:
                earlier.wait_stream(device, stream)
            with device.using(stream):
                for part in parts:
                    part()
                    events.append(device.record_event(stream))
            if events:
                completion.queued(events[-1], stream)
            else:
                completion.nothing_queued()
        except BaseException as cause:
            self._abandon(completion, failure(cause))
            if is_interrupt(cause):
                raise
        return events

    def _abandon(self, completion: Completion, error: TransferError) -> None:
        """Give up after a failure; what was already queued may still run."""
        completion.failed(error)
        if completion.has_ended:  # staging has already waited for the device, or lost it
            return
        try:
            completion.queued(self._device.record_event(self.stream), self.stream)
        except BaseException as cause:
            end_or_lose(self._device, completion)
            if is_interrupt(cause):
                raise


def end_or_lose(device: CopyDevice, completion: Completion) -> None:
    """Wait for the device, after a copy has failed and no event can be recorded.

    A destroyed stream records no events, but its work still ends, after which the bytes can be
    reused. If waiting for the device fails too, the copy is lost and its bytes are never reused.
    """
    try:
        device.synchronize()
    except BaseException as lost:
        completion.lose(lost)
        if is_interrupt(lost):
            raise
    else:
        completion.ended()


def failure_of(work: Work, path: str, cause: BaseException | None) -> TransferError:
    """The error of a transfer that failed while it was being queued."""
    error = TransferError(
        f"a transfer {work.direction} of {work.num_bytes} bytes in {work.num_runs} runs by "
        f"{path} failed: {cause}"
    )
    if cause is not None and not is_interrupt(cause):  # that one collects frames as it goes on
        error.__cause__ = cause
    return error
