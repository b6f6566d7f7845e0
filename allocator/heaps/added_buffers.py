"""``AddedBuffers``: grows a heap by whole buffers, each of them added or not at all.

The buffer is published before its addresses exist, as a block in it may be allocated at once. What
an exception interrupts in between, the next growth takes back first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvheap.addresses.address_manager import AddressManager
from kvheap.errors import ReentrantCallError
from kvheap.guards import is_inside_section, section
from kvheap.heaps.freed_bytes import FreedBytes
from kvheap.heaps.segments import Segments

__all__ = ["AddedBuffers"]


class AddedBuffers:
    """Adds buffers behind the last one of a heap.

    Args:
        address_manager: the heap's address space.
        freed_bytes: has the heap's buffers.
    """

    def __init__(self, address_manager: AddressManager, freed_bytes: FreedBytes) -> None:
        self._address_manager = address_manager
        self._freed_bytes = freed_bytes
        self._begun: tuple[Segments, Segments] | None = None  # before, and with the buffer

    @section
    def add(
        self, buffer: torch.Tensor, usable_bytes: int, on_published: Callable[[], object]
    ) -> None:
        """Add a buffer, and its addresses as a segment of their own.

        Args:
            buffer: uint8 ``[bytes]``, on the device of the others.
            usable_bytes: how many of its bytes the heap uses, a multiple of the alignment.
            on_published: called when the buffers are known, before the addresses exist.

        Raises:
            ValueError: the heap does not cover its last buffer, or shares memory with this one.
            ReentrantCallError: the calling thread is inside an operation; nothing changes.
        """
        guard, space = self._address_manager.guard, self._address_manager.space
        if guard.busy and is_inside_section():
            raise ReentrantCallError("add_buffer", 0, 0, 0)
        with guard.lock:
            guard.busy = True
            space.finish()
            self._take_back()
            before, start = self._freed_bytes.segments, space.heap_bytes
            last_end = before.end(space.unit_bytes)
            if start < last_end:
                raise ValueError(
                    f"the heap ends at address {start} and does not cover its last buffer, which "
                    f"ends at {last_end}: grow the heap over it, or cut it, before adding another"
                )
            after = before.with_buffer(buffer, start)
            self._begun = before, after
            self._freed_bytes.segments = after
            on_published()
            try:
                space.extend(usable_bytes, new_segment=True)
            except BaseException:
                self._take_back()
                raise
            self._begun = None
            guard.busy = False

    def _take_back(self) -> None:
        """Take back a buffer that an exception kept from joining the address space."""
        if self._begun is None:
            return
        space, freed_bytes = self._address_manager.space, self._freed_bytes
        space.finish()
        before, after = self._begun
        if freed_bytes.segments is after and space.heap_bytes == after.starts[-1]:
            freed_bytes.segments = before
        self._begun = None
