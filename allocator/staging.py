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

from kvheap.kernels.pieces import Pieces
from kvheap.memory_format import MemoryFormat

if TYPE_CHECKING:
    from kvheap.completion import Completion, DeviceEvent
    from kvheap.copy_device import CopyDevice
    from kvheap.copy_plan import CopyPlan
    from kvheap.tensor_allocator import TensorMemoryAllocator

__all__ = ["copy_staged", "end_or_lose"]

MIN_EXTENT_BYTES, MAX_EXTENT_BYTES = 1 << 20, 8 << 20
"""Bytes of one of the two extents: about 20 us of a link of 55 GB/s, beside the few us that each
step costs by itself, and 150 us. Reasoned; not yet measured on a GPU."""

STEPS = 4
"""A copy is cut into so many steps at least, as far as extents are not smaller than allowed: the
first gather and the last copy are not overlapped."""


def copy_staged(
    plan: CopyPlan,
    part: Pieces,
    device: CopyDevice,
    stream: Any,
    current: Any,
    max_sms: int | None,
    completion: Completion,
) -> None:
    """Queue one part of a plan; the caller's stream is current.

    Args:
        plan: from a device to the host, or back.
        part: pieces of it.
        device: who copies.
        stream: the caller's.
        current: the stream that bytes of the heap may be in use on.
        max_sms: for the kernel.
        completion: of the transfer; it keeps what is used here.
    """
    to_host = plan.target.device is None
    extent_bytes = min(max(-(-part.num_bytes // STEPS), MIN_EXTENT_BYTES), MAX_EXTENT_BYTES)
    extents = _extents(plan, device, extent_bytes, completion, stream, current)
    side = device.side_stream()
    device.wait_event(side, device.record_event(stream))
    free_again: list[DeviceEvent | None] = [None, None]
    try:
        for step, group in enumerate(part.by_bytes(extent_bytes)):
            sizes = group.size_array()
            staged = extents[step % 2] + np.cumsum(sizes) - sizes
            into = Pieces(group.sources, staged, group.sizes)
            out_of = Pieces(staged, group.targets, group.sizes)
            event = free_again[step % 2]
            if event is not None:
                device.wait_event(side, event)
            with device.using(side):
                if to_host:
                    _copy_by_kernel(device, into, max_sms, completion)
                else:
                    device.copy_each(into.merged().split(*plan.walls), side)
            device.wait_event(stream, device.record_event(side))
            if to_host:
                device.copy_each(out_of.merged().split(*plan.walls), stream)
            else:
                _copy_by_kernel(device, out_of, max_sms, completion)
            free_again[step % 2] = device.record_event(stream)
    except BaseException:
        # What was queued on the side must have ended when the caller's stream has.
        try:
            device.wait_event(stream, device.record_event(side))
        except Exception:
            end_or_lose(device, completion)
        raise


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


def _copy_by_kernel(
    device: CopyDevice, pieces: Pieces, max_sms: int | None, completion: Completion
) -> None:
    prepared = device.prepare(pieces)
    completion.keep(prepared)
    prepared.run(max_sms)


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
