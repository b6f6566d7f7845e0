"""``PathChoice``: the path that a copy takes, forced by the caller or chosen by the planner.

==============  ===========================================================  ==================
path            how                                                          directions
==============  ===========================================================  ==================
``kernel``      one SM kernel over a list of pointers, on few SMs            h2d, d2h, d2d
``copy_engine`` ``cuMemcpyBatchAsync``, or an asynchronous copy for each run  all with a device
``staged``      gather into an extent on the device, then one large copy     h2d, d2h; chosen if
                while the next extent is filled (h2d: the reverse)           the host has few runs
``host``        memory copies on the host, in the background                 h2h
==============  ===========================================================  ==================
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Sized
from typing import Any, Protocol

from kvheap.device.copy_device import CopyDevice
from kvheap.device.directions import Direction, Path
from kvheap.planning import planner
from kvheap.planning.link_sms import LINK_DIRECTIONS

__all__ = ["PathChoice", "default_sms"]

LOGGER = logging.getLogger("kvheap")

MAX_SINGLE_COPIES = 8
"""Maximum runs copied one by one, in a graph or on the legacy stream. Not measured."""

MIN_STAGED_RATIO = 8
"""Minimum runs per host run for staging. Not measured; see benchmarks/NOTES.md."""


def default_sms(device: CopyDevice, direction: Direction) -> int | None:
    """SMs of a copy by the kernel whose caller names no number; None for no limit.

    Over the link to the host, what ``kvheap calibrate`` measured on the device, or else 2 to the
    host and 3 to the device.
    """
    if direction not in LINK_DIRECTIONS:
        return None
    return planner.table_for(device.name, device.driver_version).default_sms(direction)


class Choosable(Protocol):
    """What the choice of a path depends on, such as a ``CopyPlan``."""

    @property
    def direction(self) -> Direction:
        """The direction of the copy."""
        ...

    @property
    def parts(self) -> Sequence[Sized]:
        """The runs of each part."""
        ...

    @property
    def num_runs(self) -> int:
        """Number of runs."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes to copy."""
        ...

    @property
    def num_host_runs(self) -> int:
        """Number of runs on the host side alone."""
        ...

    @property
    def prepared(self) -> object | None:
        """None if the kernel needs an upload."""
        ...


class PathChoice:
    """Which paths a copy on a device's stream can take.

    Args:
        plan: what to copy.
        device: the device that executes it.
        stream: the stream that it is queued on.
        is_captured: whether a CUDA graph is being captured on the stream.
    """

    def __init__(self, plan: Choosable, device: CopyDevice, stream: Any, is_captured: bool) -> None:
        self._plan = plan
        self._device = device
        self._stream = stream
        self._is_captured = is_captured

    @property
    def is_single(self) -> bool:
        """Whether the copy engine must copy run by run, without its batch call."""
        device = self._device
        return self._is_captured or not device.has_batch or device.is_legacy(self._stream)

    def forced(self, path: Path) -> Path:
        """Check and return the path that the caller asks for.

        Raises:
            ValueError: it cannot be taken.
            RuntimeError: it cannot be captured in a graph.
        """
        reason = self._obstacle(path)
        if reason is None and path == "copy_engine" and self._misses_batch_call(1):
            reason = "cuMemcpyBatchAsync refuses the legacy default stream: pass another stream"
        if reason is not None:
            kind = RuntimeError if self._is_captured else ValueError
            raise kind(f"path {path!r} cannot be taken: {reason}")
        return path

    def chosen(self) -> Path:
        """The path that the planner chooses among those that can be taken.

        Raises:
            RuntimeError: no path can be captured in a graph.
        """
        plan, device = self._plan, self._device
        if self._is_captured:
            return self._chosen_in_capture()
        direction = plan.direction
        if direction == "p2p" or direction == "h2h" or not plan.num_runs or not device.has_kernel:
            if self._misses_batch_call(MAX_SINGLE_COPIES):
                _tell_of_legacy_stream(device.name)
            return "copy_engine"
        # Choose by the average part: each part is submitted separately.
        num_parts = sum(1 for part in plan.parts if len(part))
        size = max(plan.num_runs // num_parts, 1), max(plan.num_bytes // num_parts, 1)
        table = planner.table_for(device.name, device.driver_version)
        allowed: list[Path] = ["kernel", "copy_engine"]
        if direction != "d2d":
            allowed.append("staged")
        while True:
            chosen: Path = table.choose(direction, *size, tuple(allowed))
            if chosen == "copy_engine" and self._misses_batch_call(MAX_SINGLE_COPIES):
                _tell_of_legacy_stream(device.name)
            # Checked last: counting the host's runs takes longer than the choice itself.
            elif chosen != "staged" or plan.num_host_runs * MIN_STAGED_RATIO <= plan.num_runs:
                return chosen
            allowed.remove(chosen)

    def _chosen_in_capture(self) -> Path:
        if self._obstacle("kernel") is None:
            return "kernel"
        if self._plan.num_runs > MAX_SINGLE_COPIES:
            raise RuntimeError(
                f"a CUDA graph cannot capture the kernel for these {self._plan.num_runs} runs: "
                f"call prepare() on the plan before the capture, or pass path='copy_engine', which "
                f"adds one node per run"
            )
        return "copy_engine"

    def _obstacle(self, path: Path) -> str | None:
        """Why a path cannot be taken; None if it can."""
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
            if self._is_captured and plan.prepared is None:
                return "a graph capture needs a plan that was prepared before the capture"
            return None
        if direction == "d2d":
            return "staging only copies between a device and the host"
        if self._is_captured:
            return "staging cannot be captured"
        return None

    def _misses_batch_call(self, max_runs: int) -> bool:
        """Whether a part has more than ``max_runs`` runs but its stream forbids the batch call."""
        if self._is_captured or not self._device.has_batch:
            return False
        is_many = any(len(part) > max_runs for part in self._plan.parts)
        return is_many and self._device.is_legacy(self._stream)


_told_of: set[str] = set()


def _tell_of_legacy_stream(device_name: str) -> None:
    """Warn, once per device name."""
    if device_name not in _told_of:
        _told_of.add(device_name)
        LOGGER.warning(
            "copies on the legacy default stream of %s cannot use the copy engine's batch call: "
            "pass another stream",
            device_name,
        )
