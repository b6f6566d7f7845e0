"""``MemoryObj``: one allocation, a handle on one row of a ``MemoryBatch``."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import numpy as np
import torch

from kvheap.blocks.lmcache_names import LMCacheNames
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryObjMetadata
from kvheap.errors import LifetimeError

if TYPE_CHECKING:
    from kvheap.blocks.lifetime import Lease, Stream
    from kvheap.blocks.memory_batch import MemoryBatch

__all__ = ["BytesBufferMemoryObj", "MemoryObj"]


class MemoryObj(LMCacheNames):
    """One block of KV: where it is, what it holds, and who still needs it.

    It is born with one reference. It is freed when both its reference count and its pin count
    have come down to zero, or by the allocator's ``free`` / ``batched_free``. After that
    ``tensor`` is None and every change of a count raises.

    Two handles on the same block are equal and share its counts. Dropping a handle frees nothing
    as long as its batch, or another handle on any of the batch's blocks, is alive.
    """

    __slots__ = ("_batch", "_row")

    def __init__(self, batch: MemoryBatch, row: int) -> None:
        self._batch = batch
        self._row = row

    # -- what it is ----------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Logical shape; of the first group, where there are several."""
        return self._batch.layout.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        """Logical dtype; of the first group, where there are several."""
        return self._batch.layout.dtypes[0]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Logical shape of each group."""
        return self._batch.layout.shapes

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Logical dtype of each group."""
        return self._batch.layout.dtypes

    @property
    def fmt(self) -> MemoryFormat:
        """What the dimensions of ``shape`` mean."""
        return self._batch.layout.fmt

    @property
    def address(self) -> int:
        """Offset in the heap, bytes."""
        return self._batch.runs.address(self._row)

    @property
    def size_bytes(self) -> int:
        """Logical bytes of all groups: shapes times item sizes."""
        return self._batch.layout.size_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes taken from the heap: ``size_bytes`` rounded up to the alignment."""
        return self._batch.allocated_bytes

    @property
    def used_bytes(self) -> int:
        """``size_bytes``, or what :meth:`set_used_size` narrowed it to."""
        return self._batch._used_sizes.get(self._row, self.size_bytes)

    def set_used_size(self, size_bytes: int) -> None:
        """Narrow the logical size, when fewer bytes were written than were allocated for.

        ``used_bytes``, ``byte_view`` and ``raw_tensor`` follow; ``tensor`` is then the used
        bytes, uint8 ``[size_bytes]``.

        Raises:
            ValueError: ``size_bytes`` is negative or more than was allocated.
            LifetimeError: the block is freed.
        """
        if not 0 <= size_bytes <= self.allocated_bytes:
            raise ValueError(
                f"size_bytes must be between 0 and the {self.allocated_bytes} allocated, "
                f"got {size_bytes}"
            )
        self._require_valid()
        self._batch._set_used_size(self._row, size_bytes)

    # -- its bytes -----------------------------------------------------------------------------

    @property
    def tensor(self) -> torch.Tensor | None:
        """The block as a tensor of ``shape`` and ``dtype``, without a copy; None once freed.

        A tensor taken before the free goes on pointing at the bytes, which the next owner may
        overwrite: do not keep it longer than the object.
        """
        if self._row in self._batch._used_sizes:
            return self.raw_tensor
        return self.get_tensor(0)

    def get_tensor(self, index: int) -> torch.Tensor | None:
        """Group ``index`` of the block, without a copy; None once freed.

        Raises:
            IndexError: there is no such group.
        """
        layout = self._batch.layout
        if not 0 <= index < len(layout.shapes):
            raise IndexError(f"group {index} of a block with {len(layout.shapes)}")
        if not self.is_valid():
            return None
        return layout.view(self._batch._bytes(self._row, layout.size_bytes), index)

    @property
    def raw_tensor(self) -> torch.Tensor | None:
        """The used bytes, uint8 ``[used_bytes]``, without a copy; None once freed."""
        return self._batch._bytes(self._row, self.used_bytes) if self.is_valid() else None

    @property
    def raw_data(self) -> torch.Tensor | None:
        """``raw_tensor``."""
        return self.raw_tensor

    @property
    def byte_view(self) -> memoryview:
        """The used bytes of a block in host memory, without a copy.

        Raises:
            LifetimeError: the block is freed.
            TypeError: the block is not in host memory.
        """
        self._require_valid()
        block = self._batch._bytes(self._row, self.used_bytes)
        if block.device.type != "cpu":
            raise TypeError(f"only host memory has a byte_view, the block is on {block.device}")
        return memoryview(block.numpy())  # type: ignore[arg-type]  # an array is a Buffer

    @property
    def data_ptr(self) -> int:
        """Address of the first byte in memory.

        Raises:
            LifetimeError: the block is freed.
        """
        self._require_valid()
        return self._batch._bytes(self._row, self.size_bytes).data_ptr()

    def is_valid(self) -> bool:
        """Whether the block is not freed."""
        return self._batch._is_live(self._row)

    def record_stream(self, stream: Stream) -> None:
        """Keep the bytes from reuse until work on ``stream`` that a free finds there has ended.

        Call it when an asynchronous copy on another stream reads or writes the block. Allocators
        do not need it for work on the stream that is current when they allocate next.

        Args:
            stream: a ``torch.cuda.Stream``, or anything whose ``record_event()`` gives an object
                with ``query()``.

        Raises:
            LifetimeError: the block is freed.
        """
        self._batch._record_stream(stream, np.array([self._row], np.int64))

    # -- what travels --------------------------------------------------------------------------

    @property
    def metadata(self) -> MemoryObjMetadata:
        """All that another process needs to know of the block, at this moment."""
        layout = self._batch.layout
        return MemoryObjMetadata(
            shape=self.shape,
            dtype=self.dtype,
            address=self.address,
            phy_size=self.allocated_bytes,
            ref_count=self.ref_count,
            pin_count=self.pin_count,
            fmt=layout.fmt,
            shapes=list(layout.shapes),
            dtypes=list(layout.dtypes),
        )

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a MemoryObj stays in its process: send its metadata")

    # -- who needs it --------------------------------------------------------------------------

    @property
    def ref_count(self) -> int:
        """Reference count; 0 once freed."""
        return self._batch._ref_count(self._row)

    @property
    def pin_count(self) -> int:
        """Pin count, leases that have not expired included."""
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
        self._batch._change_ref_count(self._row, -1)

    @overload
    def pin(self, ttl: None = None) -> bool: ...
    @overload
    def pin(self, ttl: float) -> Lease: ...
    def pin(self, ttl: float | None = None) -> bool | Lease:
        """Raise the pin count: the block is not to be evicted.

        Args:
            ttl: seconds after which the pin expires by itself, counted in
                ``stats().expired_leases``. None: not before :meth:`unpin`.

        Returns:
            True; with ``ttl`` the lease, whose ``release()`` ends it early.

        Raises:
            LifetimeError: the block is freed.
            ValueError: ``ttl`` is not positive.
        """
        if ttl is None:
            self._batch._change_pin_count(self._row, +1)
            return True
        return self._batch.allocator._grant_lease(self._batch, self._row, ttl)

    def unpin(self) -> bool:
        """Lower the pin count; frees the block when no reference and no pin count is left.

        Raises:
            LifetimeError: the block is freed, or nothing but leases pins it.
        """
        self._batch._change_pin_count(self._row, -1)
        return True

    def _require_valid(self) -> None:
        if not self.is_valid():
            raise LifetimeError(f"{self._batch._name(self._row)} is freed")

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
        return f"{type(self).__name__}(address={self.address}, {self._batch.layout}, {state})"


class BytesBufferMemoryObj(MemoryObj):
    """A block of plain bytes outside any heap, of format ``BINARY_BUFFER``: no tensor."""

    __slots__ = ()

    @property
    def tensor(self) -> None:
        """None: it is bytes, see ``byte_view``."""
        return None

    def get_tensor(self, index: int) -> None:
        """None: it is bytes, see ``byte_view``."""
