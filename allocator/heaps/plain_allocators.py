"""Allocators without a heap: every batch brings its own memory.

For tests, and for payloads that are bytes rather than tensors. They never fill up, and their
blocks live by the same rules as those of a heap.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.lifetime import Lifetime, Release
from kvheap.blocks.memory_allocator import MemoryAllocatorInterface, Rows
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_object import BytesBufferMemoryObj, MemoryObj
from kvheap.errors import NegativeBatchSizeError

__all__ = ["AdHocMemoryAllocator", "BufferAllocator"]


class AdHocMemoryAllocator(MemoryAllocatorInterface):
    """Allocates each batch as a tensor of its own.

    Args:
        device: where.
        idempotent_free: to free a block again is no error, and does nothing.
        trace_frames: how many callers of each allocation to remember.

    >>> AdHocMemoryAllocator().allocate([2, 3], torch.float32).tensor.shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        idempotent_free: bool = False,
        trace_frames: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.lifetime = Lifetime(self._give_back, trace_frames)
        self._idempotent_free = idempotent_free

    def batched_allocate(
        self,
        shape: Shapes,
        dtype: Dtypes,
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch:
        """Allocate ``batch_size`` equal blocks, and fill them.

        Args:
            shape: logical shape of each block, or a list of them, one for each group.
            dtype: logical dtype of each block, or a list of them.
            batch_size: number of blocks N.
            fmt: what the dimensions mean.
            source: N times the bytes of a block, copied into them; None leaves them undefined.
            allow_partial: nothing is ever partial here.

        Raises:
            ValueError: an argument is wrong; nothing is allocated.
            NegativeBatchSizeError: ``batch_size`` is negative.
            ClosedError: the allocator is closed.
        """
        self._require_open()
        if self.lifetime.has_work:
            self.lifetime.settle()
        layout = self._layout(shape, dtype, fmt)
        if batch_size < 0:
            raise NegativeBatchSizeError(batch_size)
        # Blocks keep apart by the alignment of their widest item.
        block_bytes = -(-layout.size_bytes // layout.alignment) * layout.alignment
        storage = torch.empty((batch_size, block_bytes), dtype=torch.uint8, device=self.device)
        if source is not None:
            content = source.reshape(batch_size, -1).view(torch.uint8)
            storage[:, : layout.size_bytes].copy_(content)
        runs = [[0], [batch_size]] if batch_size else [[], []]
        return MemoryBatch(self, AddressBatch(block_bytes, *runs), layout, storage=storage.view(-1))

    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free many blocks, all or none, and collect their contents first.

        Args:
            objs: a batch, or objects of any batches of this allocator.
            out: ``[N, *shape]`` of the blocks' dtype, filled with their contents.

        Raises:
            DoubleFreeError, BlockInUseError, ForeignObjectError, TypeError, ClosedError: as
                ``TensorMemoryAllocator.batched_free``; nothing is freed.
        """
        self._require_open()
        if self.lifetime.has_work:
            self.lifetime.settle()
        if not isinstance(objs, MemoryBatch):
            objs = list(objs)
        claimed: list[Rows] = []
        try:
            for part in self._rows_by_batch(objs):
                rows = part.batch._claim(part.rows, self._idempotent_free and out is None)
                claimed.append(Rows(part.batch, rows))
            if out is not None:
                for row, obj in zip(out, objs, strict=True):
                    row.copy_(obj._batch.layout.view(obj._batch._bytes(obj._row, obj.size_bytes)))
        except BaseException:
            for part in claimed:
                part.batch._unclaim(part.rows)
            raise

    def _layout(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat) -> BlockLayout:
        return BlockLayout.of(shape, dtype, fmt)

    def _bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        self._require_open()
        assert batch._storage is not None
        return batch._storage[address : address + size_bytes]

    def _give_back(self, release: Release) -> None:
        """Nothing: the memory goes with the batch."""

    def _close(self) -> None:
        """Nothing: the memory goes with the batches."""

    def __repr__(self) -> str:
        """The device."""
        return f"{type(self).__name__}({str(self.device)!r})"


class BufferAllocator(AdHocMemoryAllocator):
    """Allocates plain bytes, for payloads of format ``BINARY_BUFFER``.

    The first extent of the shape is the number of bytes; the dtype does not matter. The objects
    have a ``byte_view`` and no ``tensor``.

    >>> len(BufferAllocator().allocate([512], None).byte_view)
    512
    """

    object_type = BytesBufferMemoryObj

    def _layout(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat) -> BlockLayout:
        first = shape[0]
        num_bytes = first if isinstance(first, (int, np.integer)) else first[0]
        return BlockLayout.of((int(num_bytes),), torch.uint8, MemoryFormat.BINARY_BUFFER)
