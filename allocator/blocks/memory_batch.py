"""``MemoryBatch``: N equal allocations made by one call; ``MemoryObj``: a handle on one of them.

Creating a batch does no work per block: its runs are arrays, and one count stands for all blocks
until one of them changes. A :class:`MemoryObj` is a handle on one row (batch, index), created on
demand. Handles on the same row share its counts, so a block can be freed through any of them.

When a batch and all its handles are garbage-collected while some of its blocks are live, the
allocator's next operation reclaims those blocks and counts them as dropped (``OwnedBlocks``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.arguments import require_flags
from kvheap.addresses.block_runs import BlockRuns, MemorySegment, runs_of
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.block_handle import BlockHandle
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.counts import RowCounts
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryBatchMetadata
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.sites import Site, allocated_at
from kvheap.blocks.stored_tokens import StoredTokens, require_token_count
from kvheap.device.events import Stream
from kvheap.device.transfer import Transfer
from kvheap.errors import ForeignObjectError
from kvheap.kernels.arrays import int64_array, require_all
from kvheap.kernels.untraced import untraced_class

__all__ = ["BlockOwner", "BytesBufferMemoryObj", "MemoryBatch", "MemoryObj"]


class BlockOwner(Protocol):
    """The part of an allocator that its batches use."""

    lifetime: Lifetime

    @property
    def object_type(self) -> type[MemoryObj]:
        """The class of the batch's handles."""
        ...

    @property
    def is_view_only(self) -> bool:
        """Whether another process keeps the allocator's books."""
        ...

    def require_owner(self, action: str) -> None:
        """Raise if another process keeps the allocator's books."""
        ...

    def block_bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block, uint8 ``[size_bytes]``, without a copy."""
        ...

    def memory_segments(self, batch: MemoryBatch) -> Sequence[MemorySegment]:
        """The buffers that the blocks of a batch are in."""
        ...


@untraced_class
class MemoryBatch(Sequence["MemoryObj"]):
    """N blocks of one block layout, returned by ``batched_allocate``. Do not construct it.

    It is a sequence of :class:`MemoryObj`; a slice is a :class:`BatchSlice`, which shares the
    blocks. It equals any sequence of the same objects.

    - what the blocks are: ``layout``, ``shape``, ``dtype``, ``fmt``, ``size_bytes``, ``tensors``;
    - where they are: ``addresses``, ``runs``, ``num_runs``, ``allocated_bytes``, ``metadata``;
      in memory: ``extents``, ``block_runs``;
    - which tokens they hold: ``num_tokens``, ``set_num_tokens``, ``forget_origin``,
      ``stored_tokens``;
    - counts and streams: ``ref_counts``, ``pin_counts``, ``live``, ``record_stream``, ``detach``;
    - for allocators and transfers: ``counts``, ``is_owner``, ``is_writable``,
      ``await_filling``, ``checked_rows``, ``claimable``, ``objects``, ``require_owner``,
      ``require_writable``, ``describe``;
    - for handles: ``bytes_of``, ``used_sizes``, ``set_used_size``.

    Attributes:
        allocator: the allocator that made it.
        layout: what each block holds.
        runs: the runs that the blocks form: ``run_starts``, ``run_counts``, ``block_bytes``.
        counts: reference counts, pin counts, leases and streams of the blocks.
        is_owner: whether the batch owns, or owned, its blocks' bytes; a view does not.
        born: when it was made, as a ``time.monotonic`` value in seconds.
        site: its allocation site, if sites are recorded.
        record: what its allocator's ledger knows of it; None for a view, and once all is freed.
        used_sizes: by row, how many bytes of a block are used; of other blocks, all. None: of all.
        storage: the batch's own memory, if its allocator has no heap; else None.
        transfer: the transfer that fills it, for a batch made by ``offload`` or ``restore``; else
            None. Code that reads the blocks waits for it or is ordered behind it.
    """

    __slots__ = (
        "__weakref__",
        "_length",
        "_seldom",
        "_writable",
        "allocator",
        "born",
        "counts",
        "is_owner",
        "layout",
        "record",
        "runs",
        "site",
        "storage",
        "transfer",
        "used_sizes",
    )

    def __init__(
        self,
        allocator: BlockOwner,
        address_batch: AddressBatch,
        layout: BlockLayout,
        *,
        storage: torch.Tensor | None = None,
        writable: bool | None = None,
    ) -> None:
        self.is_owner = False
        self._writable = writable
        self.record: OwnedBlocks | None = None
        self.allocator = allocator
        self.layout = layout
        self.born = time.monotonic()
        self.site: Site = ()
        self.transfer: Transfer | None = None
        self.runs = address_batch
        self._length = length = address_batch.num_blocks
        self.counts = RowCounts(length)
        # What is made when it is first asked for. Threads may ask at once: single operations on a
        # dict are atomic.
        self._seldom: dict[str, Any] = {}
        self.used_sizes: dict[int, int] | None = None
        self.storage = storage

    @property
    def is_writable(self) -> bool:
        """Whether stores and transfers may fill the blocks; see ``heap.view``."""
        return not self.allocator.is_view_only if self._writable is None else self._writable

    # -- what the blocks are -------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Logical shape of each block; of its first group if there are several."""
        return self.layout.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        """Logical dtype of each block; of its first group if there are several."""
        return self.layout.dtypes[0]

    @property
    def fmt(self) -> MemoryFormat:
        """What the dimensions mean."""
        return self.layout.fmt

    @property
    def size_bytes(self) -> int:
        """Logical bytes of each block, all groups."""
        return self.layout.size_bytes

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """The ``tensor`` of each block, without a copy; None where it is freed. O(N).

        ``heap.batched_read`` copies all of them into one tensor, by one kernel.

        Raises:
            TransferError: the transfer that was to fill the blocks has failed.
        """
        return [block.tensor for block in self]

    # -- where they are ------------------------------------------------------------------------

    @property
    def addresses(self) -> Int64Array:
        """Address of each block in the heap, int64 ``[N]``, bytes, read-only.

        Ascending, unless the batch is a view of blocks in another order.
        """
        return self.runs.addresses

    @property
    def num_runs(self) -> int:
        """Number of runs that the blocks form."""
        return self.runs.num_runs

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes of each block: ``size_bytes`` rounded up to the alignment."""
        return self.runs.block_bytes

    def extents(self, rows: npt.ArrayLike | None = None, *, padding: bool = True) -> Extents:
        """The bytes of the blocks as absolute extents, for a transfer library or a system call.

        They are those of this process, in the order of the blocks; adjacent blocks are one extent,
        except across the end of a buffer. Nothing is waited for or protected: use them behind
        :attr:`transfer`, and as part of a ``foreign_transfer``. O(runs); O(blocks) with ``rows`` or
        without padding that there is.

        Args:
            rows: which blocks, integers ``[R]``, in any order; None: all.
            padding: include what the alignment adds to each block; see ``BlockRuns.extents``.

        Returns:
            Absolute addresses and bytes, int64 ``[E]`` each.

        Raises:
            LifetimeError: a block is freed.
            TypeError, ValueError: ``rows`` are not rows of the batch.
            ClosedError: the allocator is closed.
        """
        if padding is not True:
            require_flags(padding=padding)
        return self.block_runs(rows).extents(padding=padding)

    def block_runs(self, rows: npt.ArrayLike | None = None) -> BlockRuns:
        """Where the blocks are in memory, as runs of adjacent blocks; see ``BlockRuns``.

        Args:
            rows: as for :meth:`extents`.

        Raises:
            LifetimeError, TypeError, ValueError, ClosedError: as for :meth:`extents`.
        """
        blocks, size = self.runs, self.runs.block_bytes
        chosen = None if rows is None else self.checked_rows(rows)
        self.counts.require_live(chosen, self)
        starts, counts = blocks.run_starts, blocks.run_counts
        if chosen is not None:
            starts, counts = runs_of(blocks.addresses_of(chosen), size)
        segments = self.allocator.memory_segments(self)
        return BlockRuns.of_addresses(starts, counts, self.layout.size_bytes, size, segments)

    @property
    def metadata(self) -> MemoryBatchMetadata:
        """What another process passes to ``heap.view`` to wrap the blocks."""
        sets = self.stored_tokens.sets(self._length, self.layout)
        count = self.num_tokens if sets is None else None
        form, origins = self.stored_tokens.form, self.stored_tokens.origins(range(self._length))
        return MemoryBatchMetadata(self.runs, self.layout, count, sets, form, origins)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a MemoryBatch cannot be pickled: send its metadata")

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "a MemoryBatch cannot be copied, as it owns its blocks: pass it on, or copy their "
            "bytes by batched_read()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__copy__()

    # -- which tokens they hold ----------------------------------------------------------------

    @property
    def stored_tokens(self) -> StoredTokens:
        """Which tokens stores from an engine's cache have put into the blocks."""
        found: StoredTokens | None = self._seldom.get("tokens")
        if found is None:
            found = self._seldom.setdefault("tokens", StoredTokens())
        return found

    def forget_tokens(self) -> None:
        """Note that it is not known any more which tokens the blocks hold: others fill them."""
        found: StoredTokens | None = self._seldom.get("tokens")
        if found is not None:
            found.forget(None)

    @property
    def num_tokens(self) -> int | None:
        """How many tokens were stored in the blocks from an engine's cache.

        ``kvheap.load`` refuses to load more. None if that is not known: nothing was stored, the
        blocks were filled by ``source=``, a copy or through their tensors, or single blocks were
        stored by themselves.
        """
        return self.stored_tokens.first

    def set_num_tokens(self, num_tokens: int | None) -> None:
        """Say how many tokens the blocks hold, after filling them by other means than a store.

        Raises:
            ValueError: so many tokens take another number of blocks, or the format holds no tokens.
            TypeError: it is not an integer.
        """
        if num_tokens is not None:
            num_tokens = as_integer("num_tokens", num_tokens)
            require_token_count(self.layout, self._length, num_tokens)
        self.stored_tokens.set_first(num_tokens)

    def forget_origin(self) -> None:
        """Let a load take the blocks for any layers and heads, as many as they hold.

        A store that names some of a cache's layers or heads says which ones the blocks hold, and a
        load that names others raises. Between caches that number them differently, such as those
        of pipeline stages of another size, that is meant: call this before the load.
        """
        self.stored_tokens.set_origins(None)

    # -- counts and streams --------------------------------------------------------------------

    @property
    def ref_counts(self) -> npt.NDArray[np.int32]:
        """A copy of the reference counts, int32 ``[N]``; 0 for freed blocks too."""
        return self.counts.references()

    @property
    def pin_counts(self) -> npt.NDArray[np.int32]:
        """A copy of the pin counts, int32 ``[N]``."""
        if self.counts.has_leases:
            self.allocator.lifetime.leases.expire()
        return self.counts.pins()

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """A snapshot of which blocks are live, bool ``[N]``."""
        return self.counts.live()

    def record_stream(self, stream: Stream, rows: Int64Array | None = None) -> None:
        """Keep the bytes of blocks from reuse, as ``MemoryObj.record_stream`` does for one.

        Args:
            stream: the stream that uses the blocks.
            rows: which blocks, integers ``[R]``; None: all.

        Raises:
            LifetimeError: a block is freed.
            TypeError: ``stream`` is not a stream, or ``rows`` are not integers.
            ValueError: the batch has no such row; nothing is recorded.
        """
        if not callable(getattr(stream, "record_event", None)):
            raise TypeError(f"a stream must have record_event(), got {stream!r}")
        if rows is not None:
            rows = self.checked_rows(rows)
        self.allocator.lifetime.record_stream(self, stream, rows)

    def detach(self) -> AddressBatch:
        """Give up the blocks but keep their addresses, to free them by address later.

        Every block of the batch then counts as freed. The bytes stay allocated until you pass the
        addresses to ``allocator.address_manager.batched_free``, which waits for no stream and wipes
        nothing. If an exception strikes as this returns, ``runs`` still has the addresses.

        Raises:
            DoubleFreeError: a block is already freed.
            BlockInUseError: a block is pinned or has more than one reference.
            ForeignObjectError: the batch is a view of another process's blocks.
            ReentrantCallError: the calling thread is inside an operation; nothing is changed.
        """
        return self.allocator.lifetime.detach(self)

    # -- sequence methods ----------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of blocks, including freed ones."""
        return self._length

    @overload
    def __getitem__(self, index: SupportsIndex) -> MemoryObj: ...
    @overload
    def __getitem__(self, index: slice) -> BatchSlice[MemoryBatch, MemoryObj]: ...
    def __getitem__(
        self, index: SupportsIndex | slice
    ) -> MemoryObj | BatchSlice[MemoryBatch, MemoryObj]:
        """A handle on one block, or a view of some blocks for a slice."""
        make, length = self.allocator.object_type, self._length
        if type(index) is int and 0 <= index < length:
            return make(self, index)
        if isinstance(index, slice):
            return BatchSlice(self, range(length)[index])
        row = as_integer("a block's number", index)
        if not -length <= row < length:
            raise IndexError(f"block {row} is out of range for a batch of {length}")
        return make(self, row % length)

    def __iter__(self) -> Iterator[MemoryObj]:
        """Handles on all blocks."""
        return iter(self.objects(range(self._length)))

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence holds the same objects in the same order."""
        if other is self:
            return True
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        """Layout and runs."""
        return (
            f"MemoryBatch({len(self)} x {self.layout}, {self.num_runs} runs of "
            f"{self.allocated_bytes}-byte blocks)"
        )

    # -- for allocators and transfers ----------------------------------------------------------

    def objects(self, rows: range) -> list[MemoryObj]:
        """Handles on some blocks, whose numbers the batch has."""
        make = self.allocator.object_type
        return [make(self, row) for row in rows]

    def checked_rows(self, rows: npt.ArrayLike) -> Int64Array:
        """A caller's row numbers, int64 ``[R]``.

        Raises:
            TypeError: they are not integers.
            ValueError: the batch has no such row; the message names it.
        """
        rows = int64_array("rows", rows)
        is_row = (rows >= 0) & (rows < self._length)
        require_all("rows", rows, is_row, f"must be from 0 to {self._length - 1}")
        return rows

    def await_filling(self, on_host: bool = True) -> None:
        """Order the caller behind the transfer that fills the blocks, if there is one.

        Everything that reads or writes a block's bytes calls this first, except transfers, which
        order themselves.

        Args:
            on_host: wait on the host until the bytes have arrived. False: make further work on the
                current stream of the transfer's device wait instead.

        Raises:
            TransferError: the transfer has failed; the bytes are undefined.
        """
        transfer = self.transfer
        if transfer is None:
            return
        if on_host:
            transfer.wait()
        elif not transfer.done():
            transfer.wait_stream(None)
        transfer.require_success()

    def await_transfers(self, rows: Int64Array | None = None) -> None:
        """Wait on the host for transfers in flight that use ``rows`` (None: all), but do not fill.

        Code that writes to blocks calls this; the transfer that fills the batch is waited for by
        :meth:`await_filling`.
        """
        filling = self.transfer
        for completion in self.counts.users(rows):
            if filling is None or not filling.is_of(completion):
                completion.wait()

    def claimable(self, rows: Int64Array | None, skip_freed: bool = False) -> Int64Array | None:
        """Check that ``rows`` (None: all) can be freed; changes nothing.

        Args:
            rows: row numbers.
            skip_freed: skip rows that are already freed instead of raising.

        Returns:
            The rows to free; None for all.

        Raises:
            DoubleFreeError: a row is already freed, or named twice.
            BlockInUseError: a row is pinned or has more than one reference.
            ForeignObjectError: the batch is a view of another process's blocks.
            ForeignProcessError: another process keeps the books of the heap.
        """
        if not self.is_owner or self.allocator.is_view_only:
            self.require_owner()
        return self.counts.claimable(rows, self, skip_freed)

    def require_owner(self) -> None:
        """Raise if this process cannot free the blocks.

        Raises:
            ForeignObjectError: the batch is a view of another process's blocks.
            ForeignProcessError: another process keeps the books of the heap.
        """
        if not self.is_owner:
            raise ForeignObjectError(
                f"{self!r} is a view: only the process that allocated it can free it"
            )
        self.allocator.require_owner("free blocks")

    def require_writable(self) -> None:
        """Raise if stores and transfers may not fill the blocks.

        Raises:
            ForeignObjectError: they are another process's, which has not given them to this one to
                fill; ForeignProcessError in a heap whose books another process keeps.
        """
        writable = self._writable
        if writable or (writable is None and not self.allocator.is_view_only):
            return
        if writable is None:
            self.allocator.require_owner(
                "fill blocks that it did not get for that by heap.view(metadata, writable=True)"
            )
        raise ForeignObjectError(
            f"{self!r} is a view for reading: make it with writable=True to fill its blocks"
        )

    def describe(self, row: int) -> str:
        """Describe a block for an error message."""
        address = self.runs.address(row)
        site = allocated_at(self.site)
        return f"block {row} of {self._length} at address {address} ({self.layout}{site})"

    # -- for handles ---------------------------------------------------------------------------

    def bytes_of(self, row: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block, uint8 ``[size_bytes]``, once they have arrived.

        Raises:
            TransferError: the transfer that was to fill the block has failed.
            ClosedError: the allocator is closed.
        """
        self.await_filling()
        return self.allocator.block_bytes(self, self.runs.address(row), size_bytes)

    def set_used_size(self, row: int, size_bytes: int) -> None:
        """Note that fewer bytes of a block are used than it has; see ``MemoryObj``."""
        sizes: dict[int, int] = self._seldom.setdefault("used sizes", {})
        sizes[row] = size_bytes
        self.used_sizes = sizes


@untraced_class
class MemoryObj(BlockHandle[MemoryBatch]):
    """One block of KV: where it is, what it holds, and who still needs it.

    It starts with one reference. It is freed when its reference count and its pin count have both
    dropped to zero, or by the allocator's ``free`` / ``batched_free``. After that, ``tensor`` is
    None, and changing a count raises.

    Two handles on the same block are equal and share its counts. Dropping a handle frees nothing
    as long as its batch, or another handle on any block of the batch, is alive.

    - what it is: ``shape``, ``dtype``, ``fmt``, ``size_bytes``, ``allocated_bytes``, ``metadata``;
    - its bytes: ``address``, ``tensor``, ``get_tensor``, ``raw_tensor``, ``byte_view``,
      ``data_ptr``, ``is_valid``;
    - counts and streams: ``ref_count``, ``ref_count_up``, ``ref_count_down``, ``pin_count``,
      ``pin``, ``unpin``, ``record_stream``.
    """

    __slots__ = ()


@untraced_class
class BytesBufferMemoryObj(MemoryObj):
    """A block of plain bytes outside any heap; its format is ``BINARY_BUFFER``."""

    __slots__ = ()

    @property
    def tensor(self) -> None:
        """None: the block is bytes, see ``byte_view``."""
        return None

    def get_tensor(self, index: int) -> None:
        """None: the block is bytes, see ``byte_view``."""
