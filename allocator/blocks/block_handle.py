"""``BlockHandle``: one block of a batch: what it is, its bytes, and who still needs it.

A handle is a pair (batch, row), and has nothing of its own: it reads and changes what its batch
knows of the row. So it is made on demand, and handles on the same row are equal. Users know it as
``MemoryObj``.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, Protocol, TypeVar, overload

import numpy as np
import torch

from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.lease import Lease
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.lmcache_names import LMCacheNames
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryObjMetadata
from kvheap.blocks.stored_tokens import StoredTokens
from kvheap.blocks.tracked import TrackedBatch
from kvheap.device.events import Stream
from kvheap.errors import LifetimeError
from kvheap.kernels.untraced import untraced_class

__all__ = ["BlockHandle", "HandledBatch"]

Batch = TypeVar("Batch", bound="HandledBatch")


class HandledOwner(Protocol):
    """The part of an allocator that handles use."""

    lifetime: Lifetime


class HandledBatch(TrackedBatch, Protocol):
    """The part of a batch that its handles use; see ``MemoryBatch``."""

    used_sizes: dict[int, int] | None

    @property
    def allocator(self) -> HandledOwner:
        """The allocator that made it."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes of each block."""
        ...

    @property
    def stored_tokens(self) -> StoredTokens:
        """Which tokens the blocks hold."""
        ...

    def bytes_of(self, row: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block."""
        ...

    def set_used_size(self, row: int, size_bytes: int) -> None:
        """Note that fewer bytes of a block are used than it has."""
        ...

    def record_stream(self, stream: Stream, rows: Int64Array | None = None) -> None:
        """Keep the bytes of some blocks from reuse."""
        ...


@untraced_class
class BlockHandle(LMCacheNames, Generic[Batch]):
    """A handle on one row of a batch; see ``MemoryObj``, its public class."""

    __slots__ = ("batch", "row")

    def __init__(self, batch: Batch, row: int) -> None:
        self.batch = batch
        """The batch that the block belongs to."""
        self.row = row
        """The block's number in its batch."""

    # -- what it is ----------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Logical shape; of the first group if there are several."""
        return self.batch.layout.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        """Logical dtype; of the first group if there are several."""
        return self.batch.layout.dtypes[0]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Logical shape of each group."""
        return self.batch.layout.shapes

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Logical dtype of each group."""
        return self.batch.layout.dtypes

    @property
    def fmt(self) -> MemoryFormat:
        """What the dimensions of ``shape`` mean."""
        return self.batch.layout.fmt

    @property
    def size_bytes(self) -> int:
        """Logical bytes of all groups: shapes times item sizes."""
        return self.batch.layout.size_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes taken from the heap: ``size_bytes`` rounded up to the alignment."""
        return self.batch.allocated_bytes

    @property
    def used_bytes(self) -> int:
        """``size_bytes``, or the smaller size given to :meth:`set_used_size`."""
        sizes = self.batch.used_sizes
        return self.size_bytes if sizes is None else sizes.get(self.row, self.size_bytes)

    def set_used_size(self, size_bytes: int) -> None:
        """Reduce the logical size, if fewer bytes were written than allocated.

        ``used_bytes``, ``byte_view`` and ``raw_tensor`` follow; ``tensor`` is then the used
        bytes, uint8 ``[size_bytes]``.

        Raises:
            ValueError: ``size_bytes`` is negative or larger than ``allocated_bytes``.
            LifetimeError: the block is freed.
        """
        size_bytes = as_integer("size_bytes", size_bytes)
        if not 0 <= size_bytes <= self.allocated_bytes:
            raise ValueError(
                f"size_bytes must be between 0 and the {self.allocated_bytes} allocated, "
                f"got {size_bytes}"
            )
        self._require_valid()
        self.batch.set_used_size(self.row, size_bytes)

    @property
    def metadata(self) -> MemoryObjMetadata:
        """A snapshot of the block, for another process."""
        layout = self.batch.layout
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
            stored=self.batch.stored_tokens.of_block(self.row, layout),
            form=self.batch.stored_tokens.form,
            origin=self.batch.stored_tokens.origin_of(self.row),
        )

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a MemoryObj cannot be pickled: send its metadata")

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "a MemoryObj cannot be copied: pass it on and add a reference by ref_count_up(), or "
            "copy its bytes by tensor.clone()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__copy__()

    # -- its bytes -----------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """Offset in the heap, bytes."""
        return self.batch.runs.address(self.row)

    @property
    def tensor(self) -> torch.Tensor | None:
        """The block as a tensor of ``shape`` and ``dtype``, without a copy; None once freed.

        Waits for the transfer that fills the block, if there is one. A tensor taken before the
        free still points at the bytes, which the next owner may overwrite: do not use it after the
        free.

        Raises:
            TransferError: the transfer that was to fill the block has failed.
        """
        batch, row = self.batch, self.row
        if batch.used_sizes is not None and row in batch.used_sizes:
            return self.raw_tensor
        if not batch.counts.is_live(row):
            return None
        return batch.layout.view(batch.bytes_of(row, batch.layout.size_bytes))

    def get_tensor(self, index: int) -> torch.Tensor | None:
        """Group ``index`` of the block, without a copy; None once freed.

        Raises:
            IndexError: there is no such group.
        """
        layout = self.batch.layout
        if type(index) is not int:
            index = as_integer("index", index)
        if not 0 <= index < len(layout.shapes):
            raise IndexError(f"group {index} is out of range: the block has {len(layout.shapes)}")
        if not self.is_valid():
            return None
        return layout.view(self.batch.bytes_of(self.row, layout.size_bytes), index)

    @property
    def raw_tensor(self) -> torch.Tensor | None:
        """The used bytes, uint8 ``[used_bytes]``, without a copy; None once freed."""
        return self.batch.bytes_of(self.row, self.used_bytes) if self.is_valid() else None

    @property
    def raw_data(self) -> torch.Tensor | None:
        """Same as ``raw_tensor``."""
        return self.raw_tensor

    @property
    def byte_view(self) -> memoryview:
        """The used bytes of a block in host memory, without a copy.

        Raises:
            LifetimeError: the block is freed.
            TypeError: the block is not in host memory.
        """
        self._require_valid()
        block = self.batch.bytes_of(self.row, self.used_bytes)
        if block.device.type != "cpu":
            raise TypeError(f"byte_view needs host memory, but the block is on {block.device}")
        return memoryview(block.numpy())  # type: ignore[arg-type]  # an array is a Buffer

    @property
    def data_ptr(self) -> int:
        """Absolute address of the first byte in memory.

        Raises:
            LifetimeError: the block is freed.
        """
        self._require_valid()
        return self.batch.bytes_of(self.row, self.size_bytes).data_ptr()

    def is_valid(self) -> bool:
        """Whether the block is live, as far as this process knows.

        Its books tell, so the answer is exact in the process that allocated the block. A view, or a
        handle that a forked child has inherited, knows nothing of what the owner has done since:
        the block may be freed, and its bytes another block's. Let the owner keep a block (its
        reference or pin) until all processes that have its metadata say that they are done.
        """
        return self.batch.counts.is_live(self.row)

    # -- counts and streams --------------------------------------------------------------------

    @property
    def ref_count(self) -> int:
        """Reference count; 0 once freed."""
        return self.batch.counts.references_of(self.row)

    @property
    def pin_count(self) -> int:
        """Pin count, including leases that have not expired."""
        batch = self.batch
        if batch.counts.has_leases:
            batch.allocator.lifetime.leases.expire()
        return batch.counts.pins_of(self.row)

    def ref_count_up(self) -> None:
        """Add a reference.

        Raises:
            LifetimeError: the block is freed.
        """
        batch = self.batch
        batch.allocator.lifetime.hold(batch, self.row, 1)

    def ref_count_down(self) -> None:
        """Drop a reference; frees the block if no reference and no pin is left.

        Raises:
            LifetimeError: the block is freed, or has no reference.
        """
        batch = self.batch
        batch.allocator.lifetime.change(batch, self.row, -1)

    @overload
    def pin(self, ttl: None = None) -> bool: ...
    @overload
    def pin(self, ttl: float) -> Lease: ...
    def pin(self, ttl: float | None = None) -> bool | Lease:
        """Raise the pin count: the block must not be evicted.

        Args:
            ttl: seconds after which the pin expires; ``stats().expired_leases`` counts such pins.
                None: it lasts until :meth:`unpin`.

        Returns:
            True; with ``ttl``, a lease, whose ``release()`` ends the pin early.

        Raises:
            LifetimeError: the block is freed.
            ValueError: ``ttl`` is not positive.
        """
        batch = self.batch
        if ttl is not None:
            return batch.allocator.lifetime.leases.grant(batch, self.row, ttl)
        batch.allocator.lifetime.hold(batch, self.row, 0, 1)
        return True

    def unpin(self) -> bool:
        """Lower the pin count; frees the block if no reference and no pin is left.

        Raises:
            LifetimeError: the block is freed, or all its pins are leases.
        """
        batch = self.batch
        batch.allocator.lifetime.change(batch, self.row, 0, -1)
        return True

    def record_stream(self, stream: Stream) -> None:
        """Keep the bytes from reuse until the work queued on ``stream`` at the free has ended.

        Call it when an asynchronous copy on another stream reads or writes the block. It is not
        needed for work on the stream that is current at the next allocation.

        Args:
            stream: a ``torch.cuda.Stream``, or any object whose ``record_event()`` returns an
                object with ``query()``.

        Raises:
            LifetimeError: the block is freed.
        """
        self.batch.record_stream(stream, np.array([self.row], np.int64))

    def _require_valid(self) -> None:
        if not self.is_valid():
            raise LifetimeError(f"{self.batch.describe(self.row)} is freed")

    # -- identity ------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        """Whether the other handle is on the same block of the same batch."""
        if not isinstance(other, BlockHandle):
            return NotImplemented
        return self.batch is other.batch and self.row == other.row

    def __hash__(self) -> int:
        """Hash of the block's identity."""
        return hash((id(self.batch), self.row))

    def __repr__(self) -> str:
        """Address, shape and counts."""
        state = (
            f"ref_count={self.ref_count}, pin_count={self.pin_count}"
            if self.is_valid()
            else "freed"
        )
        return f"{type(self).__name__}(address={self.address}, {self.batch.layout}, {state})"
