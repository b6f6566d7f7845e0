"""``MixedMemoryAllocator``: tensors in a heap, plain bytes outside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy.typing as npt
import torch

from kvheap.blocks.batch_lease import BatchLease
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.block_allocator import BlockAllocator
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_allocator import MemoryAllocatorInterface
from kvheap.blocks.memory_batch import BytesBufferMemoryObj, MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.names import as_format
from kvheap.blocks.report import LiveBlocks
from kvheap.blocks.rows import listed
from kvheap.errors import ForeignObjectError
from kvheap.heaps.allocator_stats import AllocatorStats
from kvheap.heaps.plain_allocators import BufferAllocator
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.snapshots.heap_snapshot import HeapSnapshot

__all__ = ["MixedMemoryAllocator"]


class MixedMemoryAllocator(MemoryAllocatorInterface):
    """Tensors in a heap, typically pinned; plain bytes, of format ``BINARY_BUFFER``, outside it.

    Args:
        pin_allocator: the heap for tensors. Closed with this allocator.
        buffer_allocator: the allocator for bytes; None: a new one.

    >>> from kvheap import PinMemoryAllocator
    >>> mixed = MixedMemoryAllocator(PinMemoryAllocator(1 << 20, allow_unpinned=True))
    >>> len(mixed.allocate([100], None, MemoryFormat.BINARY_BUFFER).byte_view)
    100
    >>> mixed.close()
    """

    def __init__(
        self,
        pin_allocator: TensorMemoryAllocator,
        buffer_allocator: BufferAllocator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pin_allocator, TensorMemoryAllocator):
            raise TypeError(f"pin_allocator must be a TensorMemoryAllocator, got {pin_allocator!r}")
        if buffer_allocator is None:
            buffer_allocator = BufferAllocator()
        elif not isinstance(buffer_allocator, BufferAllocator):
            raise TypeError(f"buffer_allocator must be a BufferAllocator, got {buffer_allocator!r}")
        self.pin_allocator = pin_allocator
        self.buffer_allocator = buffer_allocator

    def _allocator_of(self, fmt: MemoryFormat | str) -> MemoryAllocatorInterface:
        fmt = as_format(fmt)
        if fmt is MemoryFormat.BINARY_BUFFER:
            return self.buffer_allocator
        if fmt is MemoryFormat.UNDEFINED:
            raise ValueError(f"a mixed allocator needs a format other than {fmt}")
        return self.pin_allocator

    def layout_of(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat | str) -> BlockLayout:
        """The block layout that the allocator for ``fmt`` makes.

        Raises:
            ValueError: ``fmt`` is ``UNDEFINED``, or another argument is wrong.
        """
        return self._allocator_of(fmt).layout_of(shape, dtype, fmt)

    def allocate_blocks(
        self,
        layout: BlockLayout,
        batch_size: int,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """Allocate from the allocator for the layout's format."""
        chosen = self._allocator_of(layout.fmt)
        return chosen.allocate_blocks(layout, batch_size, source, allow_partial)

    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free blocks, which must all belong to the same one of the two allocators.

        Raises:
            ForeignObjectError: the blocks belong to both, or to neither; nothing is freed.
        """
        self.require_open()
        objs = objs if isinstance(objs, MemoryBatch) else listed(objs)
        self._owner_of(objs, "freed").batched_free(objs, out)

    def batched_read(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read blocks, which must all belong to the same one of the two allocators.

        Raises:
            ForeignObjectError: the blocks belong to both, or to neither; nothing is read.
        """
        self.require_open()
        objs = objs if isinstance(objs, MemoryBatch) else listed(objs)
        return self._owner_of(objs, "read").batched_read(objs, out)

    def batched_write(self, objs: MemoryBatch | Iterable[MemoryObj], source: torch.Tensor) -> None:
        """Fill blocks, which must all belong to the same one of the two allocators.

        Raises:
            ForeignObjectError: the blocks belong to both, or to neither; nothing is written.
        """
        self.require_open()
        objs = objs if isinstance(objs, MemoryBatch) else listed(objs)
        self._owner_of(objs, "written").batched_write(objs, source)

    def lease(
        self,
        objs: MemoryBatch | Iterable[MemoryObj],
        ttl: float,
        rows: npt.ArrayLike | None = None,
    ) -> BatchLease:
        """Pin blocks, which must all belong to the same one of the two allocators, for a time.

        See ``BlockAllocator.lease``.

        Raises:
            ForeignObjectError: the blocks belong to both, or to neither; nothing is pinned.
        """
        self.require_open()
        objs = objs if isinstance(objs, MemoryBatch) else listed(objs)
        return self._owner_of(objs, "leased").lease(objs, ttl, rows)

    def _owner_of(self, objs: MemoryBatch | Sequence[MemoryObj], done: str) -> BlockAllocator:
        if isinstance(objs, (MemoryBatch, BatchSlice)):
            batch = objs.batch if isinstance(objs, BatchSlice) else objs
            is_buffer = isinstance(batch.allocator, BufferAllocator)
        else:
            blocks = [obj for obj in objs if isinstance(obj, MemoryObj)]  # others are refused later
            kinds = {isinstance(obj, BytesBufferMemoryObj) for obj in blocks}
            if len(kinds) > 1:
                raise ForeignObjectError(
                    f"tensors and plain bytes cannot be {done} in the same call"
                )
            is_buffer = True in kinds
        return self.buffer_allocator if is_buffer else self.pin_allocator

    def stats(self) -> AllocatorStats:
        """The statistics of the heap."""
        self.require_open()
        return self.pin_allocator.stats()

    def snapshot(self) -> HeapSnapshot:
        """The map of the heap; see ``TensorMemoryAllocator.snapshot``.

        Plain bytes are outside it, each block in memory of its own: :meth:`leaks` lists them.
        """
        self.require_open()
        return self.pin_allocator.snapshot()

    def leaks(self) -> tuple[LiveBlocks, ...]:
        """All live blocks of both allocators, oldest first."""
        both = self.pin_allocator.leaks() + self.buffer_allocator.leaks()
        return tuple(sorted(both, key=lambda group: -group.age_s))

    def memcheck(self) -> bool:
        """Whether every invariant of the heap holds."""
        self.require_open()
        return self.pin_allocator.memcheck()

    def close_memory(self, timeout_s: float) -> None:
        """Close both allocators."""
        try:
            self.pin_allocator.close(timeout_s)
        finally:
            self.buffer_allocator.close(timeout_s)

    def __repr__(self) -> str:
        """Both allocators."""
        return f"MixedMemoryAllocator({self.pin_allocator!r}, {self.buffer_allocator!r})"
