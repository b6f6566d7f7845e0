"""Allocators without a heap: every batch has its own memory.

They serve tests, and payloads that are bytes rather than tensors. They are never full, and their
blocks follow the same lifetime rules as blocks of a heap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.arguments import require_count, require_flags
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_allocator import BlockAllocator
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.ledger import NoSpace
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.memory_batch import BytesBufferMemoryObj, MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.rows import Rows
from kvheap.errors import NegativeBatchSizeError
from kvheap.guards import Guard
from kvheap.heaps.block_tensors import (
    new_tensor,
    require_apart,
    require_gatherable,
    require_matching,
    require_writable_from,
)
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.words import as_bytes

__all__ = ["AdHocMemoryAllocator", "BufferAllocator"]


class AdHocMemoryAllocator(BlockAllocator):
    """Allocates each batch as a tensor of its own.

    Args:
        device: the device to allocate on.
        idempotent_free: freeing a freed block does nothing instead of raising.
        trace_frames: number of callers to record for each allocation.

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
        super().__init__()
        require_flags(idempotent_free=idempotent_free)
        self._device = torch.device(device)
        trace_frames = require_count("trace_frames", trace_frames)
        self.lifetime = Lifetime(Guard(), NoSpace(), trace_frames)
        self.idempotent_free = idempotent_free

    @property
    def device(self) -> torch.device:
        """The device that the blocks are on."""
        return self._device

    def layout_of(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat | str) -> BlockLayout:
        """The layout of a block."""
        return BlockLayout.of(shape, dtype, fmt)

    def allocate_blocks(
        self,
        layout: BlockLayout,
        batch_size: int,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch:
        """``batched_allocate`` for a layout; never None, and never partial."""
        if self.lifetime.reclaimer.has_work:
            self.lifetime.reclaimer.settle()
        if batch_size < 0:
            raise NegativeBatchSizeError(batch_size)
        if source is not None:
            require_matching("source", source, batch_size, layout, self.device, cpu_is_fine=True)
        # Each block begins at a multiple of its largest item size.
        block_bytes = -(-layout.size_bytes // layout.alignment) * layout.alignment
        if batch_size * block_bytes >= 1 << 63:
            raise ValueError(
                f"batch_size is {batch_size}: so many blocks of {block_bytes} bytes do not fit any "
                f"address space"
            )
        with Relaxed():
            storage = torch.empty((batch_size, block_bytes), dtype=torch.uint8, device=self.device)
        if source is not None:
            content = source.detach().reshape(batch_size, layout.packed_elements)
            storage[:, : layout.size_bytes].copy_(as_bytes(content))
        runs = [[0], [batch_size]] if batch_size else [[], []]
        addresses = AddressBatch(block_bytes, *runs)
        batch = MemoryBatch(self, addresses, layout, storage=storage.view(-1))
        self.lifetime.own(batch)
        return batch

    def require_gatherable(self, parts: Sequence[Rows], out: torch.Tensor) -> None:
        """Check that ``out`` of ``batched_free`` matches the blocks."""
        require_gatherable(parts, out, self.device)
        require_apart("out", out, parts, _starts_of)

    def gather(self, objs: MemoryBatch | Sequence[MemoryObj], out: torch.Tensor) -> None:
        """Copy the contents of block ``i`` into ``out[i]``."""
        for row, obj in zip(out, objs, strict=True):
            row.copy_(self._contents(obj))

    def require_writable_from(self, parts: Sequence[Rows], source: torch.Tensor) -> None:
        """Check that ``source`` of ``batched_write`` matches the blocks."""
        require_writable_from(parts, source, self.device)
        require_apart("source", source, parts, _starts_of)

    def scatter(self, source: torch.Tensor, objs: MemoryBatch | Sequence[MemoryObj]) -> None:
        """Copy ``source[i]`` into block ``i``."""
        for row, obj in zip(source.detach(), objs, strict=True):
            self._contents(obj).copy_(row)

    def new_tensor(self, layout: BlockLayout, num_blocks: int) -> torch.Tensor:
        """A new tensor for the contents of blocks."""
        return new_tensor(layout, num_blocks, self.device)

    def _contents(self, obj: MemoryObj) -> torch.Tensor:
        """A block as a tensor of its shape and dtype; of several groups, its bytes."""
        block = self.block_bytes(obj.batch, obj.address, obj.size_bytes)
        layout = obj.batch.layout
        return block if len(layout.shapes) > 1 else layout.view(block)

    def block_bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block, uint8 ``[size_bytes]``, without a copy."""
        self.require_open()
        assert batch.storage is not None
        return batch.storage[address : address + size_bytes]

    def close_memory(self, timeout_s: float) -> None:
        """Does nothing: each batch owns its memory."""

    def __repr__(self) -> str:
        """The device."""
        return f"{type(self).__name__}({str(self.device)!r})"


def _starts_of(part: Rows) -> Int64Array:
    """The absolute address of each block."""
    storage = part.batch.storage
    assert storage is not None
    return part.addresses + storage.data_ptr()


class BufferAllocator(AdHocMemoryAllocator):
    """Allocates plain bytes, for payloads of format ``BINARY_BUFFER``.

    The first dimension of the shape is the number of bytes; the dtype is ignored. The objects have
    a ``byte_view`` and no ``tensor``.

    >>> len(BufferAllocator().allocate([512], None).byte_view)
    512
    """

    object_type = BytesBufferMemoryObj

    def layout_of(self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat | str) -> BlockLayout:
        """The block layout of ``shape[0]`` bytes."""
        if not isinstance(shape, Sequence) or isinstance(shape, (str, bytes)) or not len(shape):
            raise TypeError(f"shape must be a sequence that begins with the bytes, got {shape!r}")
        first = shape[0]
        if isinstance(first, Sequence) and len(first):
            first = first[0]
        num_bytes = as_integer("shape", first)
        return BlockLayout.of((num_bytes,), torch.uint8, MemoryFormat.BINARY_BUFFER)
