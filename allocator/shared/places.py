"""``Places``: the mapped memory of a segment, as chunks' bytes and as blocks of a heap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.heaps.host_allocators import HostMemoryAllocator
from kvheap.shared.segment import Segment

__all__ = ["Places"]


class Places:
    """The places of a segment, by their numbers.

    Args:
        segment: the segment.
        layout: what a chunk holds.

    Attributes:
        layout: what a chunk holds.
        heap: the memory as a view-only heap.
    """

    def __init__(self, segment: Segment, layout: BlockLayout) -> None:
        geometry = segment.geometry
        self.layout = layout
        self._geometry = geometry
        self.heap = HostMemoryAllocator(
            geometry.data_bytes, host_buffer=segment.buffer, view_only=True
        )
        data = segment.array(0, geometry.data_bytes)
        self._data = memoryview(data)  # type: ignore[arg-type]  # an array is a Buffer

    def content(self, place: int) -> memoryview:
        """The bytes of a place's chunk."""
        at = place * self._geometry.place_bytes
        return self._data[at : at + self._geometry.chunk_bytes]

    def rows(self) -> torch.Tensor:
        """The bytes of all places' chunks, uint8 ``[places, chunk_bytes]``."""
        memory = torch.frombuffer(self._data, dtype=torch.uint8)
        return memory.view(self._geometry.num_places, -1)[:, : self._geometry.chunk_bytes]

    def blocks(self, places: Sequence[int], *, writable: bool) -> MemoryBatch:
        """Places as a batch of blocks, block ``i`` for ``places[i]``."""
        layout = self.layout
        addresses: Int64Array = np.array(places, np.int64) * self._geometry.place_bytes
        return self.heap.view(
            addresses, list(layout.shapes), list(layout.dtypes), layout.fmt, writable=writable
        )

    def close(self) -> None:
        """No longer give blocks."""
        self.heap.close()
