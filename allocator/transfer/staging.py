"""Staged copies between many places on the device and few large runs on the host.

To the host: the SM kernel gathers pieces into an extent on the device, and one large copy moves the
extent to the host while the kernel fills a second extent. From the host: the reverse. The first
step runs on a side stream, the second on the caller's stream, and events order them. The copy has
ended when its last work on the caller's stream has ended.

Bytes moved: twice on the device, once over the link. Staging pays off if the copy engine is slow
for small pieces, and if the SMs should work at the device's bandwidth, not at the link's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvheap.blocks.heap import Heap
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice
from kvheap.device.events import DeviceEvent
from kvheap.kernels.pieces import Pieces
from kvheap.transfer.plan import CopyPlan
from kvheap.transfer.queueing import end_or_lose

__all__ = ["Staging"]

MIN_EXTENT_BYTES, MAX_EXTENT_BYTES = 1 << 20, 8 << 20
"""Bytes of each of the two extents: 20 to 150 us of a 55 GB/s link. Reasoned, not measured."""

MIN_STEPS = 4
"""Minimum steps of a copy, if extent sizes allow; the first and last overlap with nothing."""


class Staging:
    """Two extents on the device that all parts of one transfer are copied through.

    The caller's stream must be current. It waits for everything that is queued here, also after an
    error.

    Args:
        plan: a copy from a device to the host, or back.
        device: the device.
        stream: the caller's stream.
        current: the stream that was current at the call; it may still use bytes of the heap.
        max_sms: maximum SMs for the kernel.
        completion: the transfer's completion, which keeps the extents and descriptors alive.
    """

    def __init__(
        self,
        plan: CopyPlan,
        device: CopyDevice,
        stream: Any,
        current: Any,
        max_sms: int | None,
        completion: Completion,
    ) -> None:
        self._plan = plan
        self._device = device
        self._stream = stream
        self._max_sms = max_sms
        self._completion = completion
        largest = max(part.num_bytes for part in plan.parts)
        self._extent_bytes = min(max(-(-largest // MIN_STEPS), MIN_EXTENT_BYTES), MAX_EXTENT_BYTES)
        self._extents = _extents(plan, device, self._extent_bytes, completion, stream, current)
        self._free_again: list[DeviceEvent | None] = [None, None]
        self._step = 0
        self._side = device.side_stream()
        device.wait_event(self._side, device.record_event(stream))

    def copy(self, part: Pieces) -> None:
        """Queue one part of the plan."""
        try:
            for group in part.by_bytes(self._extent_bytes):
                self._copy_group(group, self._step % 2)
                self._step += 1
        except BaseException:
            try:
                self._device.wait_event(self._stream, self._device.record_event(self._side))
            except Exception:
                end_or_lose(self._device, self._completion)
            raise

    def _copy_group(self, group: Pieces, which: int) -> None:
        device, stream, side = self._device, self._stream, self._side
        sizes = group.size_array()
        staged = self._extents[which] + np.cumsum(sizes) - sizes
        into = Pieces(group.sources, staged, group.sizes)
        out_of = Pieces(staged, group.targets, group.sizes)
        event = self._free_again[which]
        if event is not None:
            device.wait_event(side, event)
        to_host = self._plan.target.device is None
        with device.using(side):
            self._copy(into, side, by_kernel=to_host)
        device.wait_event(stream, device.record_event(side))
        self._copy(out_of, stream, by_kernel=not to_host)
        self._free_again[which] = device.record_event(stream)

    def _copy(self, pieces: Pieces, stream: Any, by_kernel: bool) -> None:
        """Queue one of the two steps on ``stream``, which must be current."""
        if by_kernel:
            prepared = self._device.prepare(pieces, over_link=False)
            self._completion.keep(prepared)
            prepared.run(self._max_sms)
        else:
            self._device.copy_each(pieces.merged().split(*self._plan.walls), stream)


def _has_room(heap: Heap, extent_bytes: int) -> bool:
    page = heap.page_layout
    if page is not None and page.size_bytes < extent_bytes:
        return False
    return heap.max_batch([extent_bytes], torch.uint8) >= 2


def _extents(
    plan: CopyPlan,
    device: CopyDevice,
    extent_bytes: int,
    completion: Completion,
    stream: Any,
    current: Any,
) -> tuple[int, int]:
    """Absolute addresses of two extents, reserved until the transfer has ended.

    They are allocated in the device's heap if it has room, and by torch otherwise.
    """
    heap = (plan.target if plan.source.device is None else plan.source).heap
    is_ordered = stream == current or not device.is_capturing(current)
    if heap is not None and is_ordered and _has_room(heap, extent_bytes):
        batch = heap.batched_allocate([extent_bytes], torch.uint8, 2, MemoryFormat.BINARY)
        if batch is not None:
            batch.record_stream(completion)
            heap.batched_free(batch)  # free again when the transfer has ended
            if stream != current:
                device.wait_event(stream, device.record_event(current))
            first, second = heap.absolute(batch.addresses)[0].tolist()
            return first, second
    both = device.empty(2 * extent_bytes)
    completion.keep(both)
    return both.data_ptr(), both.data_ptr() + extent_bytes
