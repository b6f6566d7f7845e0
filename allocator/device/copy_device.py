"""``CopyDevice``: what a transfer needs of a GPU, and which memory a device can reach."""

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
        """Load whatever a run may need; copy nothing."""
        ...


class CopyDevice(Protocol):
    """What a transfer needs of a GPU. No call but ``synchronize`` waits for the device.

    ``stream`` is always a stream that ``require_stream`` returned.

    - what it is: ``name``, ``driver_version``, ``has_kernel``, ``has_batch``;
    - streams and events: ``current_stream``, ``require_stream``, ``is_legacy``, ``is_capturing``,
      ``using``, ``side_stream``, ``record_event``, ``wait_event``, ``synchronize``;
    - copies: ``prepare``, ``copy_batch``, ``copy_each``;
    - memory: ``empty``, ``locate``, ``is_own``.
    """

    @property
    def name(self) -> str:
        """The device's name, as its vendor gives it."""
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
        """The stream to use; None stands for the current one.

        Raises:
            TypeError: it is not a stream.
            ValueError: it is another device's.
        """
        ...

    def is_legacy(self, stream: Any) -> bool:
        """Whether it is the legacy default stream."""
        ...

    def is_capturing(self, stream: Any) -> bool:
        """Whether a CUDA graph is being captured on it."""
        ...

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream the current one."""
        ...

    def record_event(self, stream: Any) -> DeviceEvent:
        """Mark the end of the stream's work so far."""
        ...

    def wait_event(self, stream: Any, event: DeviceEvent) -> None:
        """Make further work of a stream wait for an event; each may be another device's."""
        ...

    def synchronize(self) -> None:
        """Wait on the host until all work of all streams has ended."""
        ...

    def side_stream(self) -> Any:
        """The device's own stream, for work beside the caller's stream."""
        ...

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised bytes on the device, which live as long as the tensor."""
        ...

    def prepare(self, pieces: Pieces) -> PreparedCopy:
        """Upload the SM kernel's descriptors, on the current stream."""
        ...

    def copy_batch(self, pieces: Pieces, stream: Any, *, over_link: bool) -> None:
        """Queue all pieces with one call of the copy engine.

        Args:
            pieces: what to copy.
            stream: where.
            over_link: whether one side is host memory.
        """
        ...

    def copy_each(self, pieces: Pieces, stream: Any) -> None:
        """Queue one asynchronous copy for each piece."""
        ...

    def locate(self, address: int) -> Location | None:
        """The allocation or registration that holds an address; None if CUDA knows none."""
        ...

    def is_own(self, location: Location) -> bool:
        """Whether it is memory of this device."""
        ...


def known_ranges(
    device: CopyDevice, starts: Int64Array, ends: Int64Array, on_device: bool
) -> Int64Array:
    """The allocations or registrations that hold pieces of memory. One query for each of them.

    Args:
        device: the device to query.
        starts: absolute address of each piece's first byte, int64 ``[N]``.
        ends: where each piece ends.
        on_device: look for memory of the device, else for pinned host memory.

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
