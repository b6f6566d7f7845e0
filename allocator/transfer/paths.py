"""Which path a transfer takes, and how it is queued.

A run is made before anything is protected or queued, and making it refuses what cannot be done.
Starting it queues the parts one after another, with an event behind each. A failure in the middle
is the transfer's, not the caller's: what was queued may still run, and an event behind it tells
when it has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from kvheap.device.completion import Completion, DeviceEvent, NotAllQueuedError, host_queue
from kvheap.errors import TransferError
from kvheap.kernels.host_copy import copy_on_host
from kvheap.planning import planner
from kvheap.transfer.staging import Staging, end_or_lose

if TYPE_CHECKING:
    from kvheap.device.copy_device import CopyDevice
    from kvheap.kernels.pieces import Pieces
    from kvheap.transfer import Transfer
    from kvheap.transfer.plan import CopyPlan

__all__ = ["PATHS", "DeviceRun", "HostRun", "Path"]

Path = Literal["kernel", "copy_engine", "staged", "host"]

PATHS: tuple[Path, ...] = ("kernel", "copy_engine", "staged", "host")

LINK_SMS = 8
"""SMs that the kernel may take between a device and the host, where the caller says nothing: the
link, not the SMs, is the limit. SGLang #40278 reaches 91 to 95 % of a GB300's link with 4."""

FEW_RUNS = 8
"""So many runs may be copied one by one where the batch call cannot be had: on the legacy default
stream, and as nodes of a graph. Reasoned; not yet measured on a GPU."""

SMALL_BYTES = 256 << 10
"""Copies within host memory of less are made by the caller itself, if nothing is queued. One piece
of 4 KiB, 256 KiB, 1 MiB and 4 MiB in the cache: handed over, the call takes 22 to 37 us and the
copy has ended after 114, 101, 129 and 244; made here, both are 27, 23, 43 and 115 (2-core AMD
EPYC)."""

MIN_RUNS_STAGED = 8
"""Staging is chosen only where the host side has at least so many times fewer runs: it is measured
with one, and each costs a copy. Reasoned; not yet measured on a GPU."""


class HostRun:
    """A copy within host memory: by the queue's thread, or here and now where it is small."""

    path: Path = "host"

    def __init__(
        self, plan: CopyPlan, stream: Any, path: Path | None, before: Sequence[Transfer]
    ) -> None:
        if stream is not None:
            raise ValueError(f"a copy within host memory is on no stream, got {stream!r}")
        if path not in (None, "host"):
            raise ValueError(f"a copy within host memory cannot take the path {path!r}")
        self._plan = plan
        self._before = before

    def start(self, completion: Completion) -> Sequence[DeviceEvent]:
        """Queue the parts; an event for each."""
        works = [partial(copy_on_host, part) for part in self._plan.parts]
        waits = [transfer.result for transfer in self._before]
        is_small = not waits and self._plan.num_bytes < SMALL_BYTES
        cause = None
        try:
            events = host_queue.run([*waits, *works], is_small)
        except NotAllQueuedError as error:
            events, cause = error.events, error.__cause__
            completion.failed(failure_of(self._plan, self.path, cause))
        if events:
            completion.queued(events[-1])
        else:
            completion.nothing_queued()
        if cause is not None and not isinstance(cause, Exception):
            raise cause
        return events[len(waits) :]


class DeviceRun:
    """A copy by a device, on a stream.

    Raises:
        ValueError, TypeError: the stream or the path cannot be taken.
        RuntimeError: a graph is being captured, and this cannot be.
    """

    def __init__(
        self,
        plan: CopyPlan,
        device: CopyDevice,
        stream: Any,
        path: Path | None,
        max_sms: int | None,
        before: Sequence[Transfer],
        is_new_target: bool,
    ) -> None:
        self._plan = plan
        self._device = device
        self._current = device.current_stream()
        self._stream = device.require_stream(stream)
        self._before = before
        self._staging: Staging | None = None
        # A heap hands out bytes to work on the current stream, which may still use them.
        self._fences: list[tuple[CopyDevice, Any]] = []
        if is_new_target:
            devices = {id(each): each for each in (device, plan.target.device) if each is not None}
            currents = [(each, each.current_stream()) for each in devices.values()]
            self._fences = [pair for pair in currents if pair[1] != self._stream]
        for other, current in self._fences:
            if other.is_capturing(current):
                raise RuntimeError(
                    "the current stream is being captured, and new blocks may be in use on it: "
                    "move blocks before the capture"
                )
        self.is_captured = device.is_capturing(self._stream)
        direction = plan.direction
        self._max_sms = LINK_SMS if max_sms is None and direction in ("h2d", "d2h") else max_sms
        self._is_single = self.is_captured or (
            not device.has_batch or device.is_legacy(self._stream)
        )
        if self.is_captured and before:
            raise RuntimeError("a transfer that fills one of the sides is in flight: wait for it")
        self.path: Path = self._choose() if path is None else self._forced(path)

    # -- which path ----------------------------------------------------------------------------

    def _obstacle(self, path: Path) -> str | None:
        """Why a path cannot be taken; None when it can."""
        plan, device = self._plan, self._device
        direction = plan.direction
        if path == "host":
            return f"the copy is {direction}"
        if path == "copy_engine":
            return None
        if direction == "p2p":
            return "the kernel runs on one device, and the sides are on two"
        if not device.has_kernel:
            return "the kernel needs the triton package"
        if path == "kernel":
            if self.is_captured and plan.prepared is None:
                return "a graph capture takes a plan that was prepared before it"
            return None
        if direction == "d2d":
            return "staging is for copies between a device and the host"
        if self.is_captured:
            return "staging cannot be captured"
        return None

    def _falls_back(self, max_runs: int) -> bool:
        """Whether the copy engine would copy more runs than that one by one for its stream."""
        if self.is_captured or not self._device.has_batch:
            return False
        is_many = any(len(part) > max_runs for part in self._plan.parts)
        return is_many and self._device.is_legacy(self._stream)

    def _forced(self, path: Path) -> Path:
        reason = self._obstacle(path)
        if reason is None and path == "copy_engine" and self._falls_back(1):
            reason = "cuMemcpyBatchAsync takes no legacy default stream: pass a stream of your own"
        if reason is not None:
            kind = RuntimeError if self.is_captured else ValueError
            raise kind(f"path {path!r} cannot be taken: {reason}")
        return path

    def _choose(self) -> Path:
        plan, device = self._plan, self._device
        if self.is_captured:
            return self._choose_captured()
        direction = plan.direction
        if direction == "p2p" or direction == "h2h" or not plan.num_runs or not device.has_kernel:
            if self._falls_back(FEW_RUNS):
                _tell_of_legacy_stream(device.name)
            return "copy_engine"
        # Each part is submitted by itself.
        num_parts = sum(1 for part in plan.parts if len(part))
        size = max(plan.num_runs // num_parts, 1), max(plan.num_bytes // num_parts, 1)
        table = planner.table_for(device.name, device.driver_version)
        allowed: list[planner.Path] = ["kernel", "copy_engine"]
        if direction != "d2d":
            allowed.append("staged")
        while True:
            chosen = table.choose(direction, *size, tuple(allowed))
            if chosen == "copy_engine" and self._falls_back(FEW_RUNS):
                _tell_of_legacy_stream(device.name)
            # That staging pays takes longer to see than that it is not chosen.
            elif chosen != "staged" or plan.num_host_runs * MIN_RUNS_STAGED <= plan.num_runs:
                return chosen
            allowed.remove(chosen)

    def _choose_captured(self) -> Path:
        if self._obstacle("kernel") is None:
            return "kernel"
        if self._plan.num_runs > FEW_RUNS:
            raise RuntimeError(
                f"{self._plan.num_runs} runs cannot be captured in a CUDA graph as they are: call "
                f"prepare() on the plan before the capture, or take path='copy_engine', a node for "
                f"each"
            )
        return "copy_engine"

    # -- carry it out --------------------------------------------------------------------------

    def capture(self) -> None:
        """Queue the copy into the graph that is being captured."""
        with self._device.using(self._stream):
            for index, part in enumerate(self._plan.parts):
                self._queue(index, part, Completion())

    def start(self, completion: Completion) -> Sequence[DeviceEvent]:
        """Queue the parts; an event for each that was. What fails is the completion's."""
        device, stream = self._device, self._stream
        events: list[DeviceEvent] = []
        try:
            for other, current in self._fences:
                device.wait_event(stream, other.record_event(current))
            for transfer in self._before:
                transfer.wait_stream(stream)
            with device.using(stream):
                for index, part in enumerate(self._plan.parts):
                    self._queue(index, part, completion)
                    events.append(device.record_event(stream))
            if events:
                completion.queued(events[-1])
            else:
                completion.nothing_queued()
        except BaseException as cause:
            self._abandon(completion, cause)
            if not isinstance(cause, Exception):
                raise
        return events

    def _queue(self, index: int, part: Pieces, completion: Completion) -> None:
        device, plan = self._device, self._plan
        if not len(part):
            return
        completion.keep(part)  # nowhere is it said how long the driver reads the arrays
        if self.path == "kernel":
            prepared = plan.prepared[index] if plan.prepared else device.prepare(part)
            completion.keep(prepared)
            prepared.run(self._max_sms)
        elif self.path == "copy_engine":
            if self._is_single or len(part) == 1:
                device.copy_each(part, self._stream)
            else:
                assert plan.direction != "h2h"
                device.copy_batch(part, self._stream, plan.direction)
        else:
            if self._staging is None:
                streams = (self._stream, self._current)
                self._staging = Staging(plan, device, *streams, self._max_sms, completion)
            self._staging.copy(part)

    def _abandon(self, completion: Completion, cause: BaseException) -> None:
        """Nothing more is queued; what was may still run."""
        completion.failed(failure_of(self._plan, self.path, cause))
        if completion.has_ended:  # staging has waited for it, or has lost it
            return
        try:
            completion.queued(self._device.record_event(self._stream))
        except BaseException as error:
            end_or_lose(self._device, completion)
            if not isinstance(error, Exception):
                raise


def failure_of(plan: CopyPlan, path: Path, cause: BaseException | None) -> TransferError:
    """What a transfer that failed while it was queued says."""
    error = TransferError(
        f"a transfer {plan.direction} of {plan.num_bytes} bytes in {plan.num_runs} runs by "
        f"{path} failed: {cause}"
    )
    error.__cause__ = cause
    return error


_told_of: set[str] = set()


def _tell_of_legacy_stream(device_name: str) -> None:
    if device_name not in _told_of:
        _told_of.add(device_name)
        logging.getLogger("kvheap").warning(
            "copies on the legacy default stream of %s do without the copy engine's batch call, "
            "which does not take it: pass a stream of your own",
            device_name,
        )
