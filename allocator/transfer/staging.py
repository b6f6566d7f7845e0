"""Staged copies: many places on the device, and few large runs on the host.

The device gathers pieces into one extent, which one large copy takes to the host, while the next
pieces are gathered into a second extent; and the reverse. The first of both steps is on a stream
of the device's own, the second on the caller's, each behind an event of the other, so that on the
caller's stream all is done when its last work has ended.

Bytes moved: 2 x on the device and 1 x over the link. It pays where the link's engine is slow for
small pieces, and the SMs are better used at the device's bandwidth than at the link's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvheap.blocks.memory_format import MemoryFormat
from kvheap.kernels.pieces import Pieces

if TYPE_CHECKING:
    from kvheap.device.completion import Completion, DeviceEvent
    from kvheap.device.copy_device import CopyDevice
    from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
    from kvheap.transfer.plan import CopyPlan

__all__ = ["Staging", "end_or_lose"]

MIN_EXTENT_BYTES, MAX_EXTENT_BYTES = 1 << 20, 8 << 20
"""Bytes of one of the two extents: about 20 us of a link of 55 GB/s, beside the few us that each
step costs by itself, and 150 us. Reasoned; not yet measured on a GPU."""

STEPS = 4
"""A copy is cut into so many steps at least, as far as extents are not smaller than allowed: the
first gather and the last copy are not overlapped."""


class Staging:
    """Two extents on the device, through which all parts of one transfer go, and their order.

    The caller's stream must be current. Whatever is queued has ended when the caller's stream has,
    also after an error.

    Args:
        plan: from a device to the host, or back.
        device: who copies.
        stream: the caller's.
        current: the stream that bytes of the heap may be in use on.
        max_sms: for the kernel.
        completion: of the transfer; it keeps what is used here.
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
        self._extent_bytes = min(max(-(-largest // STEPS), MIN_EXTENT_BYTES), MAX_EXTENT_BYTES)
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
        """Queue one of the two steps on a stream that is current."""
        if by_kernel:
            prepared = self._device.prepare(pieces)
            self._completion.keep(prepared)
            prepared.run(self._max_sms)
        else:
            self._device.copy_each(pieces.merged().split(*self._plan.walls), stream)


def end_or_lose(device: CopyDevice, completion: Completion) -> None:
    """Wait for the device, where no event can tell when it has done with a copy that failed.

    A stream that is destroyed has no events; but what it was given ends, and bytes come back. Of a
    device that cannot be waited for either, they never do.
    """
    try:
        device.synchronize()
    except BaseException as lost:
        completion.lose(lost)
        if not isinstance(lost, Exception):
            raise
    else:
        completion.ended()


def _has_room(heap: TensorMemoryAllocator, extent_bytes: int) -> bool:
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
    """Absolute addresses of two extents that nobody else uses until the transfer has ended.

    Of the device's heap, where it has room; else of torch.
    """
    heap = (plan.target if plan.source.device is None else plan.source).heap
    is_ordered = stream == current or not device.is_capturing(current)
    if heap is not None and is_ordered and _has_room(heap, extent_bytes):
        batch = heap.batched_allocate([extent_bytes], torch.uint8, 2, MemoryFormat.BINARY)
        if batch is not None:
            batch.record_stream(completion)
            heap.batched_free(batch)  # comes back when the transfer has ended
            if stream != current:
                device.wait_event(stream, device.record_event(current))
            first, second = heap._absolute(batch.addresses)[0].tolist()
            return first, second
    both = device.empty(2 * extent_bytes)
    completion.keep(both)
    return both.data_ptr(), both.data_ptr() + extent_bytes
