"""``CopyDevice``: the GPU operations that transfers use, and the memory that a GPU can reach."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.device.events import DeviceEvent
from kvheap.kernels.copy_engine import Location
from kvheap.kernels.pieces import Pieces

__all__ = ["CopyDevice", "PreparedCopy", "known_ranges"]


class PreparedCopy(Protocol):
    """Pieces whose descriptors are on the device, ready for the SM kernel."""

    def run(self, max_sms: int | None = None) -> None:
        """Queue the copy on the current stream."""
        ...

    def warm_up(self) -> None:
        """Load everything that a run needs, without copying."""
        ...


class CopyDevice(Protocol):
    """The GPU operations that transfers use. Only ``synchronize`` waits for the device.

    Every ``stream`` argument, except that of ``require_stream``, is a stream that
    ``require_stream`` returned.

    - what it is: ``name``, ``driver_version``, ``has_kernel``, ``has_batch``;
    - streams and events: ``current_stream``, ``require_stream``, ``is_legacy``, ``is_capturing``,
      ``using``, ``side_stream``, ``record_event``, ``wait_event``, ``synchronize``;
    - copies: ``prepare``, ``copy_batch``, ``copy_each``;
    - memory: ``empty``, ``locate``, ``is_own``.
    """

    @property
    def name(self) -> str:
        """The device's name, as given by its vendor."""
        ...

    @property
    def driver_version(self) -> str:
        """The version of the device's driver."""
        ...

    @property
    def has_kernel(self) -> bool:
        """Whether the SM kernel can run."""
        ...

    @property
    def has_batch(self) -> bool:
        """Whether the driver copies many pieces in one call."""
        ...

    def current_stream(self) -> Any:
        """The current stream of this thread."""
        ...

    def require_stream(self, stream: Any) -> Any:
        """Check a stream and return it; for None, return the current one.

        Raises:
            TypeError: it is not a stream.
            ValueError: it belongs to another device.
        """
        ...

    def is_legacy(self, stream: Any) -> bool:
        """Whether ``stream`` is the legacy default stream."""
        ...

    def is_capturing(self, stream: Any) -> bool:
        """Whether a CUDA graph is being captured on ``stream``."""
        ...

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which ``stream`` is the current stream."""
        ...

    def record_event(self, stream: Any) -> DeviceEvent:
        """Mark the end of the stream's work so far."""
        ...

    def wait_event(self, stream: Any, event: DeviceEvent) -> None:
        """Make later work on ``stream`` wait for an event; either may belong to another device.

        Raises:
            RuntimeError: the stream is being captured.
        """
        ...

    def synchronize(self) -> None:
        """Wait on the host until all work on all streams of the device has ended."""
        ...

    def side_stream(self) -> Any:
        """A stream owned by this object, for work that runs beside the caller's stream."""
        ...

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised bytes on the device, uint8 ``[num_bytes]``."""
        ...

    def prepare(self, pieces: Pieces, *, over_link: bool) -> PreparedCopy:
        """Upload the descriptors of the SM kernel that suits the pieces, on the current stream.

        Args:
            pieces: what to copy.
            over_link: whether one side is host memory.
        """
        ...

    def copy_batch(self, pieces: Pieces, stream: Any, *, over_link: bool) -> None:
        """Queue all pieces with one call of the copy engine.

        Args:
            pieces: what to copy.
            stream: the stream to queue on.
            over_link: whether one side is host memory.
        """
        ...

    def copy_each(self, pieces: Pieces, stream: Any) -> None:
        """Queue one asynchronous copy for each piece."""
        ...

    def locate(self, address: int) -> Location | None:
        """The allocation or registration that contains an address; None if CUDA knows none."""
        ...

    def is_own(self, location: Location) -> bool:
        """Whether ``location`` is memory of this device."""
        ...


def known_ranges(
    device: CopyDevice, starts: Int64Array, ends: Int64Array, on_device: bool
) -> Int64Array:
    """The allocations or registrations that contain pieces of memory, with one query for each.

    Args:
        device: the device to query.
        starts: absolute address of each piece's first byte, int64 ``[N]``.
        ends: absolute address of each piece's end, int64 ``[N]``.
        on_device: accept memory of the device; else accept pinned host memory.

    Returns:
        ``[start, end)`` of each, int64 ``[R, 2]``, ascending. The search stops at the first address
        that none contains.
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
