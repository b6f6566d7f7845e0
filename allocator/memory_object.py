"""``MemoryObj``: one allocation, a handle on one row of a ``MemoryBatch``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvheap.memory_format import MemoryFormat

if TYPE_CHECKING:
    from kvheap.memory_batch import MemoryBatch

__all__ = ["FREED", "MemoryObj"]

FREED = -1
"""The reference count of a block that was freed."""


class MemoryObj:
    """One block of KV: where it is, what it holds, and who still needs it.

    It is born with one reference. It is freed when both its reference count and its pin count
    have come down to zero, or by the allocator's ``free`` / ``batched_free``. After that
    ``tensor`` is None and every change of a count raises.

    Two handles on the same block are equal and share its counts. Dropping a handle frees nothing.
    """

    __slots__ = ("_batch", "_row")

    def __init__(self, batch: MemoryBatch, row: int) -> None:
        self._batch = batch
        self._row = row

    # -- what it is ----------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Logical shape."""
        return self._batch.shape

    @property
    def dtype(self) -> torch.dtype:
        """Logical dtype."""
        return self._batch.dtype

    @property
    def fmt(self) -> MemoryFormat:
        """What the dimensions of ``shape`` mean."""
        return self._batch.fmt

    @property
    def address(self) -> int:
        """Offset in the heap, bytes."""
        return self._batch.runs.address(self._row)

    @property
    def size_bytes(self) -> int:
        """Logical bytes: shape times item size."""
        return self._batch.size_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes taken from the heap: ``size_bytes`` rounded up to the alignment."""
        return self._batch.allocated_bytes

    @property
    def tensor(self) -> torch.Tensor | None:
        """The block as a tensor of ``shape`` and ``dtype``, without a copy; None once freed.

        A tensor taken before the free goes on pointing at the bytes, which the next owner may
        overwrite: do not keep it longer than the object.
        """
        if not self.is_valid():
            return None
        return self._batch.allocator._view(self._batch, self.address)

    def is_valid(self) -> bool:
        """Whether the block is not freed."""
        return self._batch._ref_count(self._row) != FREED

    # -- who needs it --------------------------------------------------------------------------

    @property
    def ref_count(self) -> int:
        """Reference count; 0 once freed."""
        return max(self._batch._ref_count(self._row), 0)

    @property
    def pin_count(self) -> int:
        """Pin count."""
        return self._batch._pin_count(self._row)

    def ref_count_up(self) -> None:
        """Add a reference.

        Raises:
            LifetimeError: the block is freed.
        """
        self._batch._change_ref_count(self._row, +1)

    def ref_count_down(self) -> None:
        """Drop a reference; frees the block when no reference and no pin count is left.

        Raises:
            LifetimeError: the block is freed, or has no reference.
        """
        if self._batch._change_ref_count(self._row, -1):
            self._release()

    def pin(self) -> None:
        """Raise the pin count: the block is not to be evicted.

        Raises:
            LifetimeError: the block is freed.
        """
        self._batch._change_pin_count(self._row, +1)

    def unpin(self) -> None:
        """Lower the pin count; frees the block when no reference and no pin count is left.

        Raises:
            LifetimeError: the block is freed, or is not pinned.
        """
        if self._batch._change_pin_count(self._row, -1):
            self._release()

    def _release(self) -> None:
        self._batch.allocator.address_manager.free(self.address, self.allocated_bytes)

    # -- identity ------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        """Whether the other handle is on the same block of the same batch."""
        if not isinstance(other, MemoryObj):
            return NotImplemented
        return self._batch is other._batch and self._row == other._row

    def __hash__(self) -> int:
        """Hash of the block's identity."""
        return hash((id(self._batch), self._row))

    def __repr__(self) -> str:
        """Address, shape and counts."""
        state = (
            f"ref_count={self.ref_count}, pin_count={self.pin_count}"
            if self.is_valid()
            else "freed"
        )
        return (
            f"MemoryObj(address={self.address}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"fmt={self.fmt.name}, {state})"
        )
