"""Execution of a plan: :class:`HostRun` within host memory, :class:`DeviceRun` on a stream.

A run is created before anything is protected or queued, and its constructor raises if the copy
cannot be done. ``start`` queues the parts in order, with an event after each. A failure while
queueing is stored in the transfer, not raised: what was queued may still run, and an event after it
marks its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.device.directions import Path
from kvheap.device.events import DeviceEvent
from kvheap.device.host_queue import HostJob, host_queue
from kvheap.kernels.host_copy import copy_on_host
from kvheap.kernels.pieces import Pieces
from kvheap.transfer.order import Earlier
from kvheap.transfer.paths import PathChoice, default_sms
from kvheap.transfer.plan import CopyPlan
from kvheap.transfer.queueing import StreamQueue, failure_of
from kvheap.transfer.staging import Staging

__all__ = ["DeviceRun", "HostRun"]

INLINE_COPY_BYTES = 256 << 10
"""Smaller copies within host memory run on the caller's thread; see benchmarks/NOTES.md."""


class HostRun:
    """A copy within host memory, on the queue's thread; small copies run on the caller's.

    Args:
        plan: what to copy.
        stream: must be None.
        path: None or ``host``.
        before: transfers that the copy comes behind.

    Raises:
        ValueError: a stream or another path is given.
    """

    path: Path = "host"
    is_captured = False

    def capture(self) -> None:
        """Raise: work of the host is in no graph."""
        raise RuntimeError("a copy within host memory cannot be captured in a CUDA graph")

    def __init__(
        self, plan: CopyPlan, stream: Any, path: Path | None, before: Sequence[Earlier]
    ) -> None:
        if stream is not None:
            raise ValueError(f"a copy within host memory runs on no stream, got {stream!r}")
        if path not in (None, "host"):
            raise ValueError(f"a copy within host memory cannot take the path {path!r}")
        self._plan = plan
        self._before = before

    def start(self, completion: Completion) -> Sequence[DeviceEvent]:
        """Queue the parts.

        Returns:
            The event at the end of each part.

        Raises:
            BaseException: what a signal handler raised. Parts that had not begun are not copied.
        """
        waits = [earlier.wait for earlier in self._before]
        tasks = [partial(copy_on_host, part) for part in self._plan.parts]
        is_small = not waits and self._plan.num_bytes < INLINE_COPY_BYTES
        # The end is known before the job is queued, so that it is known too if a signal handler
        # raises at the moment at which the job is queued.
        job = HostJob([*waits, *tasks], at_end=completion.query)
        try:
            if not job.events:
                completion.nothing_queued()
                return []
            completion.queued(job.events[-1])
            host_queue.submit(job, is_small)
        except BaseException:
            host_queue.withdraw(job)
            raise
        return job.events[len(waits) :]


class DeviceRun:
    """A copy executed by a device, on a stream.

    Args:
        plan: what to copy.
        device: the device that executes it.
        stream: a stream of the device; None: the current one.
        path: the path to take; None: the planner chooses.
        max_sms: maximum SMs for the kernel; None: as the device's table says over the link, no
            limit within a device.
        before: transfers that the copy comes behind.
        is_new_target: whether the target was just allocated. A heap allocates bytes for work on the
            current stream, and earlier work there may still use them, so the copy waits for it.

    Raises:
        ValueError, TypeError: the stream or the path cannot be used.
        RuntimeError: a graph is being captured, and it cannot include this copy.
    """

    def __init__(
        self,
        plan: CopyPlan,
        device: CopyDevice,
        stream: Any,
        path: Path | None,
        max_sms: int | None,
        before: Sequence[Earlier],
        is_new_target: bool,
    ) -> None:
        self._plan = plan
        self._device = device
        new_on: list[CopyDevice] = []
        if is_new_target:
            target = plan.target.device
            new_on = [device] if target is None or target is device else [device, target]
        self._queue = StreamQueue(device, stream, before, new_on)
        self._staging: Staging | None = None
        self.is_captured = self._queue.is_captured
        self._is_over_link = plan.direction in ("h2d", "d2h")
        choice = PathChoice(plan, device, self._queue.stream, self.is_captured)
        self.path: Path = choice.chosen() if path is None else choice.forced(path)
        self._is_single = self.path == "copy_engine" and choice.is_single
        if max_sms is None and self.path != "copy_engine":
            max_sms = default_sms(device, plan.direction)
        self._max_sms = max_sms

    def capture(self) -> None:
        """Queue the copy into the graph that is being captured."""
        with self._device.using(self._queue.stream):
            for index, part in enumerate(self._plan.parts):
                self._copy(index, part, Completion())

    def start(self, completion: Completion) -> Sequence[DeviceEvent]:
        """Queue the parts. A failure is stored in ``completion``, not raised.

        Returns:
            The event at the end of each part that was queued.
        """
        parts = enumerate(self._plan.parts)
        return self._queue.start(
            (partial(self._copy, index, part, completion) for index, part in parts),
            completion,
            partial(failure_of, self._plan, self.path),
        )

    def _copy(self, index: int, part: Pieces, completion: Completion) -> None:
        device, plan = self._device, self._plan
        if not len(part):
            return
        completion.keep(part)  # it is not documented when the driver has read the arrays
        if self.path == "kernel":
            prepared = (
                plan.prepared[index]
                if plan.prepared
                else device.prepare(part, over_link=self._is_over_link)
            )
            completion.keep(prepared)
            prepared.run(self._max_sms)
        elif self.path == "copy_engine":
            if self._is_single or len(part) == 1:
                device.copy_each(part, self._queue.stream)
            else:
                device.copy_batch(part, self._queue.stream, over_link=self._is_over_link)
        else:
            if self._staging is None:
                streams = (self._queue.stream, self._queue.current)
                self._staging = Staging(plan, device, *streams, self._max_sms, completion)
            self._staging.copy(part)
