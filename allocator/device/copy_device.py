"""``CopyDevice``: what a transfer needs of a GPU, and ``CudaDevice``, which has it from CUDA.

Streams and events are torch's; the SM kernel is :mod:`kvheap.kernels.pointer_copy`, the copy
engine :mod:`kvheap.kernels.copy_engine`. No call here waits for the device.
"""

from __future__ import annotations

import re
import threading
from contextlib import AbstractContextManager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.device.completion import DeviceEvent
from kvheap.kernels import copy_engine, launch
from kvheap.kernels.copy_engine import LEGACY_STREAMS, Driver, Location, driver
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy

__all__ = [
    "CopyDevice",
    "CudaDevice",
    "Direction",
    "PreparedCopy",
    "device_of",
    "find_device",
    "known_ranges",
]

Direction = Literal["h2d", "d2h", "d2d", "p2p", "h2h"]
"""From where to where: h is host memory, d a device; p2p goes from one device to another."""

MODULE_VERSION_FILE = Path("/proc/driver/nvidia/version")

MAX_BATCH_PIECES = 32_768
"""Pieces of one call of the copy engine: with 51,828 it crashed on a driver of 2025 (vLLM #49276).
A call costs a few microseconds, such a batch 16 ms (0.5 us a piece, vLLM #48434)."""


class PreparedCopy(Protocol):
    """Pieces that the SM kernel can copy without further help of the host."""

    def run(self, max_sms: int | None = None) -> None:
        """Queue it on the current stream."""
        ...

    def warm_up(self) -> None:
        """Load all that a run may need; copies nothing."""
        ...


class CopyDevice(Protocol):
    """What a transfer needs of a GPU. ``stream`` is whatever ``require_stream`` returned."""

    @property
    def name(self) -> str:
        """What it is, as its maker calls it."""
        ...

    @property
    def driver_version(self) -> str:
        """Of its driver, as its maker counts."""
        ...

    @property
    def has_kernel(self) -> bool:
        """Whether the SM kernel can run."""
        ...

    @property
    def has_batch(self) -> bool:
        """Whether the driver copies many pieces by one call."""
        ...

    def current_stream(self) -> Any:
        """The current stream of this thread."""
        ...

    def require_stream(self, stream: Any) -> Any:
        """The stream to use; None is the current one. Raises ValueError, TypeError."""
        ...

    def is_legacy(self, stream: Any) -> bool:
        """Whether it is the legacy default stream."""
        ...

    def is_capturing(self, stream: Any) -> bool:
        """Whether a CUDA graph is being captured on it."""
        ...

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """Make it current."""
        ...

    def record_event(self, stream: Any) -> DeviceEvent:
        """Mark the end of its work so far."""
        ...

    def wait_event(self, stream: Any, event: DeviceEvent) -> None:
        """Let its further work wait for an event; either may be another device's."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until all work of all streams has ended."""
        ...

    def side_stream(self) -> Any:
        """A stream of the device's own, for what runs beside the caller's."""
        ...

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised bytes on the device; its lifetime is its references'."""
        ...

    def prepare(self, pieces: Pieces) -> PreparedCopy:
        """Upload what the SM kernel needs, on the current stream."""
        ...

    def copy_batch(self, pieces: Pieces, stream: Any, direction: copy_engine.Direction) -> None:
        """Queue all pieces by one call of the copy engine."""
        ...

    def copy_each(self, pieces: Pieces, stream: Any) -> None:
        """Queue one asynchronous copy for each piece."""
        ...

    def locate(self, address: int) -> Location | None:
        """The allocation or registration that an address is in; None for what CUDA knows not."""
        ...

    def is_own(self, location: Location) -> bool:
        """Whether it is memory of this device."""
        ...


class CudaDevice:
    """A CUDA device, through torch and the driver.

    Args:
        index: its number.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self._driver: Driver | None = None
        self._side: Any = None
        self._threads = threading.local()

    @cached_property
    def driver_version(self) -> str:
        """Of the driver, as ``580.95.05``; where that is not to be seen, the CUDA it knows."""
        with suppress(OSError):
            found = module_version(MODULE_VERSION_FILE.read_text(errors="replace"))
            if found is not None:
                return found
        version = self._bound_driver().version
        return f"CUDA {version // 1000}.{version % 1000 // 10}"

    @property
    def has_kernel(self) -> bool:
        """Whether there is Triton."""
        return launch.triton is not None

    @property
    def has_batch(self) -> bool:
        """Whether the driver has ``cuMemcpyBatchAsync``, which came with CUDA 12.8."""
        return self._bound_driver().has_batch

    def _bound_driver(self) -> Driver:
        """The driver, with this device's context current on this thread."""
        if self._driver is None:
            self._driver = driver()
        if not getattr(self._threads, "is_bound", False):
            # The driver's functions need a current context, which torch makes with a runtime call.
            torch.cuda.mem_get_info(self.torch_device)
            self._threads.is_bound = True
        return self._driver

    def current_stream(self) -> torch.cuda.Stream:
        """See :meth:`CopyDevice.current_stream`."""
        return torch.cuda.current_stream(self.torch_device)

    def require_stream(self, stream: Any) -> torch.cuda.Stream:
        """See :meth:`CopyDevice.require_stream`."""
        if stream is None:
            return self.current_stream()
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"stream must be a torch.cuda.Stream, got {stream!r}")
        if stream.device != self.torch_device:
            raise ValueError(f"the stream is on {stream.device}, the copy on {self.torch_device}")
        return stream

    def is_legacy(self, stream: torch.cuda.Stream) -> bool:
        """See :meth:`CopyDevice.is_legacy`."""
        return stream.cuda_stream in LEGACY_STREAMS

    def is_capturing(self, stream: torch.cuda.Stream) -> bool:
        """See :meth:`CopyDevice.is_capturing`."""
        return self._bound_driver().is_capturing(stream.cuda_stream)

    def using(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """See :meth:`CopyDevice.using`."""
        return torch.cuda.stream(stream)

    def record_event(self, stream: torch.cuda.Stream) -> DeviceEvent:
        """See :meth:`CopyDevice.record_event`."""
        event: DeviceEvent = stream.record_event()
        return event

    def wait_event(self, stream: torch.cuda.Stream, event: DeviceEvent) -> None:
        """See :meth:`CopyDevice.wait_event`."""
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"stream must be a torch.cuda.Stream, got {stream!r}")
        assert isinstance(event, torch.cuda.Event)
        stream.wait_event(event)

    def synchronize(self) -> None:
        """See :meth:`CopyDevice.synchronize`."""
        torch.cuda.synchronize(self.torch_device)

    def side_stream(self) -> torch.cuda.Stream:
        """See :meth:`CopyDevice.side_stream`."""
        if self._side is None:
            self._side = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        side: torch.cuda.Stream = self._side
        return side

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See :meth:`CopyDevice.empty`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def prepare(self, pieces: Pieces) -> PreparedCopy:
        """See :meth:`CopyDevice.prepare`."""
        return PointerCopy.prepare(pieces, self.torch_device)

    def copy_batch(
        self, pieces: Pieces, stream: torch.cuda.Stream, direction: copy_engine.Direction
    ) -> None:
        """See :meth:`CopyDevice.copy_batch`."""
        bound = self._bound_driver()
        for first in range(0, len(pieces), MAX_BATCH_PIECES):
            part = pieces[first : first + MAX_BATCH_PIECES]
            bound.copy_batch(part, stream.cuda_stream, direction)

    def copy_each(self, pieces: Pieces, stream: torch.cuda.Stream) -> None:
        """See :meth:`CopyDevice.copy_each`."""
        self._bound_driver().copy_each(pieces, stream.cuda_stream)

    def locate(self, address: int) -> Location | None:
        """See :meth:`CopyDevice.locate`."""
        return self._bound_driver().locate(address)

    def is_own(self, location: Location) -> bool:
        """See :meth:`CopyDevice.is_own`."""
        return location.kind == "device" and location.device == self.index


def module_version(text: str) -> str | None:
    """The driver's version in what its kernel module says of itself.

    >>> module_version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Jan 1")
    '580.95.05'
    """
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text + " ")
    return None if found is None else found[1]


def known_ranges(
    device: CopyDevice, starts: Int64Array, ends: Int64Array, on_device: bool
) -> Int64Array:
    """The allocations or registrations that hold some pieces of memory. One call for each.

    Args:
        device: who is asked.
        starts: first bytes of the pieces, absolute, int64 ``[N]``.
        ends: their ends.
        on_device: look for memory of the device; else for pinned host memory.

    Returns:
        ``[start, end)`` of each, int64 ``[R, 2]``, ascending, up to the first address that is in
        none.
    """
    order = np.argsort(starts)
    starts = starts[order]
    furthest = np.maximum.accumulate(ends[order])
    found: list[tuple[int, int]] = []
    at, address = 0, int(starts[0])
    while True:
        location = device.locate(address)
        if location is None or not location.start <= address < location.end:
            break
        if not (device.is_own(location) if on_device else location.kind == "pinned"):
            break
        found.append((location.start, location.end))
        at = int(np.searchsorted(starts, location.end))
        if furthest[at - 1] > location.end:
            address = location.end
        elif at < len(starts):
            address = int(starts[at])
        else:
            break
    return np.array(found, np.int64).reshape(-1, 2)


def device_of(tensor: torch.Tensor) -> CopyDevice | None:
    """The device that a tensor is on; None for host memory. Raises as :func:`find_device`."""
    return find_device(tensor.device)


def find_device(device: torch.device) -> CopyDevice | None:
    """The device that memory of a tensor on ``device`` is on; None for host memory.

    Raises:
        ValueError: it is neither host memory nor on a CUDA device.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"memory must be on a CPU or a CUDA device, got {device}")
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _cuda_device(index: int) -> CudaDevice:
    return CudaDevice(index)
