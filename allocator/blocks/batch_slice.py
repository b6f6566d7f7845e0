"""``BatchSlice``: some blocks of a batch, as ``batch[2:5]`` returns them.

A slice is a view: it owns nothing, copies nothing and has no counts of its own. Its blocks are the
batch's, so a block that is freed, pinned or stored through either is so in both. It keeps its batch
alive, as a handle on a block does; dropping it frees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, NoReturn, Protocol, SupportsIndex, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.block_runs import BlockRuns, runs_of
from kvheap.addresses.extents import Extents, Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryBatchMetadata
from kvheap.blocks.stored_tokens import StoredTokens
from kvheap.device.events import Stream
from kvheap.device.transfer import Transfer
from kvheap.kernels.untraced import untraced_class

__all__ = ["BatchSlice", "SlicedBatch"]

Obj = TypeVar("Obj", bound="Block")
Obj_co = TypeVar("Obj_co", bound="Block", covariant=True)
Batch = TypeVar("Batch", bound="SlicedBatch[Block]")


class Block(Protocol):
    """A handle on one block; see ``MemoryObj``."""

    @property
    def tensor(self) -> torch.Tensor | None:
        """The block as a tensor; None once freed."""
        ...


class SlicedBatch(Protocol[Obj_co]):
    """The part of a batch that its slices use; see ``MemoryBatch``."""

    layout: BlockLayout
    transfer: Transfer | None

    @property
    def stored_tokens(self) -> StoredTokens:
        """Which tokens the blocks hold."""
        ...

    @property
    def runs(self) -> AddressBatch:
        """The runs that the blocks form."""
        ...

    @property
    def ref_counts(self) -> npt.NDArray[np.int32]:
        """A copy of the reference counts."""
        ...

    @property
    def pin_counts(self) -> npt.NDArray[np.int32]:
        """A copy of the pin counts."""
        ...

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """Which blocks are live."""
        ...

    def __len__(self) -> int:
        """The number of blocks."""
        ...

    def objects(self, rows: range) -> Sequence[Obj_co]:
        """Handles on some blocks."""
        ...

    def block_runs(self, rows: npt.ArrayLike | None = None) -> BlockRuns:
        """Where some blocks are in memory."""
        ...

    def record_stream(self, stream: Stream, rows: Int64Array | None = None) -> None:
        """Keep the bytes of some blocks from reuse."""
        ...


@untraced_class
class BatchSlice(Sequence[Obj], Generic[Batch, Obj]):
    """Some blocks of a batch, in order; made by slicing a batch or a slice. Do not construct it.

    It is a sequence of :class:`MemoryObj`, equal to any sequence of the same objects, and may be
    passed wherever blocks are expected: to ``batched_free`` and ``batched_read``, ``lease``,
    ``store`` and ``load``, ``copy`` and ``offload``, a ``PrefixStore``, a ``FileTier``. Its blocks
    stay the batch's, which it keeps alive; so it owns none, and several slices may overlap.

    - which blocks: ``batch``, ``rows``;
    - what they are: ``layout``, ``shape``, ``dtype``, ``fmt``, ``size_bytes``, ``tensors``;
    - where they are: ``addresses``, ``runs``, ``num_runs``, ``allocated_bytes``, ``metadata``; in
      memory: ``extents``, ``block_runs``;
    - which tokens they hold: ``num_tokens``;
    - counts and streams: ``ref_counts``, ``pin_counts``, ``live``, ``record_stream``, ``transfer``.

    >>> from kvheap import TensorMemoryAllocator
    >>> heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    >>> batch = heap.batched_allocate([8], torch.float32, 6)
    >>> some = batch[1::2]
    >>> some.addresses, some[-1] == batch[5], some[:2].rows
    (array([ 4096, 12288, 20480]), True, array([1, 3]))
    >>> heap.batched_free(some)
    >>> batch.live
    array([ True, False,  True, False,  True, False])
    """

    __slots__ = ("_range", "_runs", "batch")

    def __init__(self, batch: Batch, rows: range) -> None:
        self.batch = batch
        """The batch that the blocks belong to."""
        self._range = rows
        self._runs: AddressBatch | None = None

    # -- which blocks --------------------------------------------------------------------------

    @property
    def rows(self) -> Int64Array:
        """The blocks' numbers in the batch, int64 ``[N]``, in the order of the slice."""
        chosen = self._range
        return np.arange(chosen.start, chosen.stop, chosen.step, dtype=np.int64)

    @property
    def row_range(self) -> range:
        """The same as a ``range``."""
        return self._range

    # -- what they are -------------------------------------------------------------------------

    @property
    def layout(self) -> BlockLayout:
        """What each block holds."""
        return self.batch.layout

    @property
    def shape(self) -> torch.Size:
        """Logical shape of each block; of its first group if there are several."""
        return self.batch.layout.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        """Logical dtype of each block; of its first group if there are several."""
        return self.batch.layout.dtypes[0]

    @property
    def fmt(self) -> MemoryFormat:
        """What the dimensions mean."""
        return self.batch.layout.fmt

    @property
    def size_bytes(self) -> int:
        """Logical bytes of each block, all groups."""
        return self.batch.layout.size_bytes

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """The ``tensor`` of each block, without a copy; None where it is freed.

        Raises:
            TransferError: the transfer that was to fill the blocks has failed.
        """
        return [block.tensor for block in self]

    # -- where they are ------------------------------------------------------------------------

    @property
    def addresses(self) -> Int64Array:
        """Address of each block in the heap, int64 ``[N]``, bytes, read-only; also once freed."""
        return self.runs.addresses

    @property
    def runs(self) -> AddressBatch:
        """The runs that the blocks form: ``run_starts``, ``run_counts``, ``block_bytes``."""
        found = self._runs
        if found is None:
            blocks, chosen = self.batch.runs, self._range
            if blocks.num_runs == 1 and chosen.step == 1 and len(chosen):
                found = blocks.part(chosen.start, len(chosen))
            else:
                size = blocks.block_bytes
                found = AddressBatch(size, *runs_of(blocks.addresses_of(self.rows), size))
            self._runs = found
        return found

    @property
    def num_runs(self) -> int:
        """Number of runs that the blocks form."""
        return self.runs.num_runs

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes of each block: ``size_bytes`` rounded up to the alignment."""
        return self.batch.runs.block_bytes

    def extents(self, *, padding: bool = True) -> Extents:
        """The bytes of the blocks as absolute extents; see ``MemoryBatch.extents``.

        Raises:
            LifetimeError: a block is freed.
            TypeError: ``padding`` is not a bool.
            ClosedError: the allocator is closed.
        """
        return self.block_runs().extents(padding=padding)

    def block_runs(self) -> BlockRuns:
        """Where the blocks are in memory, as runs of adjacent blocks; see ``BlockRuns``.

        Raises:
            LifetimeError, ClosedError: as for :meth:`extents`.
        """
        return self.batch.block_runs(self.rows)

    @property
    def metadata(self) -> MemoryBatchMetadata:
        """What another process passes to ``heap.view`` to wrap the blocks."""
        stored, layout = self.batch.stored_tokens, self.batch.layout
        num_tokens, sets = stored.of_rows(self._range, layout)
        origins = stored.origins(self._range)
        return MemoryBatchMetadata(self.runs, layout, num_tokens, sets, stored.form, origins)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a BatchSlice cannot be pickled: send its metadata")

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "a BatchSlice cannot be copied: pass it on, slice it again by [:], or copy the bytes "
            "of its blocks by batched_read()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__copy__()

    # -- which tokens they hold ----------------------------------------------------------------

    @property
    def num_tokens(self) -> int | None:
        """N, if the blocks hold N tokens, one block after the other; else None.

        None also where that is not known, and for blocks of one layer each.
        """
        return self.batch.stored_tokens.num_tokens_of(self._range, self.batch.layout)

    # -- counts and streams --------------------------------------------------------------------

    @property
    def transfer(self) -> Transfer | None:
        """The transfer that fills the batch, if there is one."""
        return self.batch.transfer

    @property
    def ref_counts(self) -> npt.NDArray[np.int32]:
        """A copy of the reference counts, int32 ``[N]``; 0 for freed blocks too."""
        return self.batch.ref_counts[self.rows]

    @property
    def pin_counts(self) -> npt.NDArray[np.int32]:
        """A copy of the pin counts, int32 ``[N]``."""
        return self.batch.pin_counts[self.rows]

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """A snapshot of which blocks are live, bool ``[N]``."""
        return self.batch.live[self.rows]

    def record_stream(self, stream: Stream) -> None:
        """Keep the bytes of the blocks from reuse, as ``MemoryObj.record_stream`` does for one.

        Raises:
            LifetimeError: a block is freed.
            TypeError: ``stream`` is not a stream.
        """
        self.batch.record_stream(stream, self.rows)

    # -- sequence methods ----------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of blocks, including freed ones."""
        return len(self._range)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Obj: ...
    @overload
    def __getitem__(self, index: slice) -> BatchSlice[Batch, Obj]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Obj | BatchSlice[Batch, Obj]:
        """A handle on one block, or a slice of these blocks."""
        if isinstance(index, slice):
            return BatchSlice(self.batch, self._range[index])
        number, length = as_integer("a block's number", index), len(self._range)
        if not -length <= number < length:
            raise IndexError(f"block {number} is out of range for a slice of {length}")
        row = self._range[number]
        found: Obj = self.batch.objects(range(row, row + 1))[0]  # type: ignore[assignment]
        return found

    def __iter__(self) -> Iterator[Obj]:
        """Handles on the blocks."""
        return iter(self.batch.objects(self._range))  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence holds the same objects in the same order."""
        if isinstance(other, BatchSlice) and other.batch is self.batch:
            return self._range == other.row_range
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[Obj]) -> list[Obj]:
        """A list of these objects and the other sequence's."""
        return [*self, *other] if isinstance(other, Sequence) else NotImplemented

    def __radd__(self, other: Sequence[Obj]) -> list[Obj]:
        """A list of the other sequence's objects and these."""
        return [*other, *self] if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        """The rows, layout and runs."""
        chosen = self._range
        step = "" if chosen.step == 1 else f" by {chosen.step}"
        where = f"blocks {chosen[0]} to {chosen[-1]}{step}" if len(chosen) else "no blocks"
        return f"BatchSlice({len(self)} x {self.layout}, {where} of {len(self.batch)})"
