"""``TensorMemoryAllocator``: an :class:`~kvheap.address_manager.AddressManager` over one buffer.

Allocating is the address manager's answer wrapped as arrays; filling and emptying a batch is one
kernel (:mod:`kvheap.kernels.block_copy`). A full heap is an answer (None), not an error: the
caller evicts and tries again. A caller's mistake raises, and nothing is allocated or freed.

Copies run on the current stream of the buffer's device. A block that is freed may be handed out
at once: work that still reads or writes it on another stream must be waited for before the free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvheap.address_batch import AddressBatch
from kvheap.address_manager import AddressManager, HeapStats
from kvheap.errors import ForeignObjectError, OutOfMemoryError
from kvheap.kernels.block_copy import gather_blocks, scatter_blocks
from kvheap.memory_batch import MemoryBatch
from kvheap.memory_format import MemoryFormat
from kvheap.memory_object import MemoryObj

__all__ = ["AllocatorStats", "TensorMemoryAllocator"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AllocatorStats(HeapStats):
    """The heap at one moment, and where it lives."""

    device: str
    align_bytes: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """Blocks of one batch that one call frees; ``rows`` None means all of them."""

    batch: MemoryBatch
    rows: list[int] | None

    def addresses(self) -> Int64Array:
        addresses = self.batch.addresses
        return addresses if self.rows is None else addresses[self.rows]


class TensorMemoryAllocator:
    """Allocates tensors, one by one or in batches, from one flat buffer.

    Thread-safe. Dropping an object does not free its bytes; free it, or count it down to zero.

    Args:
        tensor: the buffer: contiguous, any dtype and shape, CPU or GPU. It is used as bytes, and
            kept alive. Bytes beyond the last whole ``align_bytes`` stay unused.
        align_bytes: a power of two; every block starts at a multiple of it.

    Raises:
        ValueError: the tensor is not contiguous, or ``align_bytes`` is not a power of two.

    >>> heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
    >>> source = torch.arange(8, dtype=torch.float32).reshape(4, 2)
    >>> batch = heap.batched_allocate([2], torch.float32, 4, source=source)
    >>> batch[3].tensor
    tensor([6., 7.])
    >>> out = torch.empty(4, 2)
    >>> heap.batched_free(batch, out=out)
    >>> torch.equal(out, source), heap.stats().allocated_bytes, batch[3].tensor
    (True, 0, None)
    """

    def __init__(self, tensor: torch.Tensor, align_bytes: int = AddressManager.ALIGN_BYTES) -> None:
        if not tensor.is_contiguous():
            raise ValueError(
                f"the buffer must be contiguous, got shape {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}"
            )
        self.buffer = tensor.detach().reshape(-1).view(torch.uint8)
        """The heap's bytes, uint8 ``[heap bytes or more]``; addresses are offsets in it."""
        self.address_manager = AddressManager(self.buffer.numel(), align_bytes)
        """What is free; use it to look, not to free what objects hold."""

    # -- allocate ------------------------------------------------------------------------------

    def allocate(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
    ) -> MemoryObj | None:
        """Allocate one block; its contents are undefined.

        Args:
            shape: logical shape, at least one element.
            dtype: logical dtype.
            fmt: what the dimensions mean.

        Returns:
            The object, with one reference; None when no free extent is large enough.

        Raises:
            ValueError: the shape is empty or negative, or the heap's alignment is too small for
                the dtype.
        """
        batch = self.batched_allocate(shape, dtype, 1, fmt)
        return None if batch is None else batch[0]

    def batched_allocate(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """Allocate ``batch_size`` equal blocks, and fill them.

        No Python work per block.

        Args:
            shape: logical shape of each block, at least one element.
            dtype: logical dtype of each block.
            batch_size: number of blocks N; 0 gives an empty batch.
            fmt: what the dimensions mean.
            source: ``[N, *shape]`` of ``dtype``, on the buffer's device or the CPU, each block
                contiguous: block ``i`` is filled from ``source[i]``, by one kernel on the current
                stream. None leaves the contents undefined.
            allow_partial: when they do not all fit, allocate as many as do, also none at all, and
                fill them from as many of the first blocks of ``source``.

        Returns:
            The batch, each block with one reference; None when the blocks do not all fit and
            ``allow_partial`` is false.

        Raises:
            ValueError: an argument is wrong; nothing is allocated.
            NegativeBatchSizeError: ``batch_size`` is negative.
        """
        shape = torch.Size(shape)
        size_bytes = self._size_bytes(shape, dtype)
        if source is not None and batch_size >= 0:
            self._require_matching("source", source, batch_size, shape, dtype, cpu_is_fine=True)
        try:
            address_batch = self.address_manager.batched_allocate(
                size_bytes, batch_size, allow_partial
            )
        except OutOfMemoryError:
            return None
        try:
            batch = MemoryBatch(self, address_batch, shape, dtype, fmt, size_bytes)
            if source is not None and len(batch):
                self._scatter(source[: len(batch)], address_batch)
        except BaseException:
            self.address_manager.batched_free(address_batch)
            raise
        return batch

    def _scatter(self, source: torch.Tensor, address_batch: AddressBatch) -> None:
        blocks = source.detach().to(self.buffer.device)
        scatter_blocks(blocks, self.buffer, address_batch.addresses)

    # -- free ----------------------------------------------------------------------------------

    def free(self, obj: MemoryObj) -> None:
        """Free one block that nobody else holds.

        Raises:
            DoubleFreeError: it is freed already.
            BlockInUseError: it is pinned or has more than one reference.
            ForeignObjectError: it belongs to another allocator.
            TypeError: it is not a MemoryObj.
        """
        self.batched_free([obj])

    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free many blocks, all or none, and collect their contents first.

        A whole :class:`MemoryBatch` costs no Python work per block.

        Args:
            objs: a batch, or objects of any batches of this allocator, of any sizes.
            out: ``[N, *shape]`` of the blocks' dtype on the buffer's device: block ``i`` is
                gathered into ``out[i]``, by one kernel on the current stream, before the bytes
                are released. The blocks must then have one shape and dtype.

        Raises:
            DoubleFreeError: a block is freed already, or named twice; nothing is freed.
            BlockInUseError: a block is pinned or has more than one reference; nothing is freed.
            ForeignObjectError: a block belongs to another allocator; nothing is freed.
            TypeError: something else than a MemoryObj is among them; nothing is freed.
            ValueError: ``out`` does not match the blocks; nothing is freed.
        """
        if isinstance(objs, MemoryBatch):
            parts = [_Rows(objs, None)]
            addresses = None
        else:
            listed = list(objs)
            parts = _rows_by_batch(listed)
            addresses = [obj.address for obj in listed] if out is not None else None
        for part in parts:
            if part.batch.allocator is not self:
                raise ForeignObjectError(f"{part.batch!r} belongs to another allocator")
        if out is not None:
            self._require_gatherable(parts, out)
        claimed: list[_Rows] = []
        try:
            for part in parts:
                part.batch._claim(part.rows)
                claimed.append(part)
            if out is not None and len(out):
                source = parts[0].addresses() if addresses is None else np.array(addresses)
                gather_blocks(self.buffer, source, out)
        except BaseException:
            for part in claimed:
                part.batch._unclaim(part.rows)
            raise
        # From here on the blocks are freed whatever happens: at worst, if this is interrupted
        # before it begins, their bytes are lost to the heap, never handed out twice.
        self._release(parts)

    def _release(self, parts: list[_Rows]) -> None:
        if len(parts) == 1 and parts[0].rows is None:
            self.address_manager.batched_free(parts[0].batch.runs)
        elif parts:
            addresses = np.concatenate([part.addresses() for part in parts])
            counts = [len(part.rows or ()) for part in parts]
            sizes = np.repeat([part.batch.allocated_bytes for part in parts], counts)
            self.address_manager.batched_free(addresses, sizes)

    # -- look ----------------------------------------------------------------------------------

    def stats(self) -> AllocatorStats:
        """A consistent snapshot of the counters. O(1)."""
        heap = self.address_manager.stats()
        return AllocatorStats(
            heap_bytes=heap.heap_bytes,
            allocated_bytes=heap.allocated_bytes,
            free_bytes=heap.free_bytes,
            largest_free_bytes=heap.largest_free_bytes,
            free_extents=heap.free_extents,
            device=str(self.buffer.device),
            align_bytes=self.address_manager.align_bytes,
        )

    def max_batch(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """How many blocks of this shape and dtype one ``batched_allocate`` could have now.

        Raises:
            ValueError: as for :meth:`allocate`.
        """
        return self.address_manager.max_batch(self._size_bytes(torch.Size(shape), dtype))

    def snapshot(self) -> Int64Array:
        """Start and size of all free extents, int64 ``[F, 2]``, in address order. O(F)."""
        return self.address_manager.snapshot()

    def memcheck(self) -> bool:
        """Whether every invariant of the heap holds; ``address_manager.check()`` says which not."""
        return self.address_manager.check_consistency()

    def __repr__(self) -> str:
        """The counters and the device."""
        return f"TensorMemoryAllocator({self.stats()})"

    # -- helpers -------------------------------------------------------------------------------

    def _view(self, batch: MemoryBatch, address: int) -> torch.Tensor:
        return self.buffer[address : address + batch.size_bytes].view(batch.dtype).view(batch.shape)

    def _size_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        if any(extent <= 0 for extent in shape):
            raise ValueError(f"shape must have at least one element, got {tuple(shape)}")
        item_bytes = dtype.itemsize
        offset_bytes = int(self.buffer.storage_offset())
        if self.address_manager.align_bytes % item_bytes or offset_bytes % item_bytes:
            raise ValueError(
                f"{dtype} needs addresses that are multiples of {item_bytes}: align_bytes is "
                f"{self.address_manager.align_bytes}, the buffer starts at byte "
                f"{offset_bytes} of its storage"
            )
        return math.prod(shape) * item_bytes

    def _require_matching(
        self,
        name: str,
        tensor: torch.Tensor,
        batch_size: int,
        shape: torch.Size,
        dtype: torch.dtype,
        cpu_is_fine: bool,
    ) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {tensor!r}")
        if tensor.shape != (batch_size, *shape):
            raise ValueError(
                f"{name} must have shape {(batch_size, *shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        device = self.buffer.device
        if tensor.device != device and not (cpu_is_fine and tensor.device.type == "cpu"):
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
        if batch_size and not tensor[0].is_contiguous():
            raise ValueError(
                f"each block of {name} must be contiguous, got strides {tensor.stride()}"
            )

    def _require_gatherable(self, parts: list[_Rows], out: torch.Tensor) -> None:
        total = sum(len(part.batch if part.rows is None else part.rows) for part in parts)
        if not parts:
            if len(out):
                raise ValueError(f"out has {len(out)} rows for no blocks")
            return
        first = parts[0].batch
        for part in parts:
            if (part.batch.shape, part.batch.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"out needs blocks of one shape and dtype, got {tuple(first.shape)} "
                    f"{first.dtype} and {tuple(part.batch.shape)} {part.batch.dtype}"
                )
        self._require_matching("out", out, total, first.shape, first.dtype, cpu_is_fine=False)
        if total > 1 and out.stride(0) * out.element_size() < first.size_bytes:
            raise ValueError(f"the rows of out overlap: strides {out.stride()}")


def _rows_by_batch(objs: list[MemoryObj]) -> list[_Rows]:
    rows_of: dict[int, _Rows] = {}
    for obj in objs:
        if not isinstance(obj, MemoryObj):
            raise TypeError(f"only a MemoryObj can be freed, got {obj!r}")
        batch = obj._batch
        part = rows_of.get(id(batch))
        if part is None:
            part = rows_of[id(batch)] = _Rows(batch, [])
        assert part.rows is not None
        part.rows.append(obj._row)
    return list(rows_of.values())
