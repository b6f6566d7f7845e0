"""``MemoryBatch``: N equal allocations made by one call, kept as arrays.

Making a batch costs no work per block: it holds its runs, and one count for all blocks until one
of them differs. A :class:`~kvheap.memory_object.MemoryObj` is a handle on one row
(batch, index), made when asked for; handles on the same row share its counts, so it makes no
difference through which of them a block is freed.

The life of a block is one number, its reference count: >= 0 while it lives, ``FREED`` after. All
changes to the counts happen under one lock of the batch, never while another lock is held; the
lock is never taken by a finalizer. Who moves a row to ``FREED`` owns the release of its bytes, so
of two threads that free a block exactly one succeeds.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
import torch

from kvheap.address_batch import AddressBatch
from kvheap.errors import BlockInUseError, DoubleFreeError, LifetimeError
from kvheap.memory_format import MemoryFormat
from kvheap.memory_object import FREED, MemoryObj

if TYPE_CHECKING:
    from kvheap.tensor_allocator import TensorMemoryAllocator

__all__ = ["MemoryBatch"]

Int64Array = npt.NDArray[np.int64]


class MemoryBatch(Sequence[MemoryObj]):
    """N blocks of one shape, dtype and format, made by ``batched_allocate``.

    A sequence of :class:`MemoryObj`; a slice is a list of them. Not made by users.

    Attributes:
        allocator: the allocator that made it.
        shape: logical shape of each block.
        dtype: logical dtype of each block.
        fmt: what the dimensions mean.
        size_bytes: logical bytes of each block, ``shape`` times the item size.
    """

    __slots__ = (
        "_address_batch",
        "_length",
        "_lock",
        "_pin_counts",
        "_ref_counts",
        "_uniform_ref_count",
        "allocator",
        "dtype",
        "fmt",
        "shape",
        "size_bytes",
    )

    def __init__(
        self,
        allocator: TensorMemoryAllocator,
        address_batch: AddressBatch,
        shape: torch.Size,
        dtype: torch.dtype,
        fmt: MemoryFormat,
        size_bytes: int,
    ) -> None:
        self.allocator = allocator
        self.shape = shape
        self.dtype = dtype
        self.fmt = fmt
        self.size_bytes = size_bytes
        self._address_batch = address_batch
        self._length = len(address_batch)
        self._lock = threading.Lock()
        self._uniform_ref_count = 1
        self._ref_counts: array[int] | None = None
        self._pin_counts: array[int] | None = None

    # -- where the blocks are ------------------------------------------------------------------

    @property
    def addresses(self) -> Int64Array:
        """Address of each block in the heap, int64 ``[N]``, bytes, ascending, read-only."""
        return self._address_batch.addresses

    @property
    def runs(self) -> AddressBatch:
        """The runs that the blocks form: ``run_starts``, ``run_counts``, ``block_bytes``."""
        return self._address_batch

    @property
    def num_runs(self) -> int:
        """How many runs the blocks form."""
        return self._address_batch.num_runs

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes of each block: ``size_bytes`` rounded up to the alignment."""
        return self._address_batch.block_bytes

    # -- counts --------------------------------------------------------------------------------

    @property
    def ref_counts(self) -> npt.NDArray[np.int32]:
        """A snapshot of the reference counts, int32 ``[N]``; 0 for freed blocks too."""
        with self._lock:
            return np.maximum(self._ref_count_array(), 0)

    @property
    def pin_counts(self) -> npt.NDArray[np.int32]:
        """A snapshot of the pin counts, int32 ``[N]``."""
        with self._lock:
            return self._pin_count_array().copy()

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """Which blocks are not freed, bool ``[N]``; a snapshot."""
        with self._lock:
            return np.not_equal(self._ref_count_array(), FREED)

    # -- a sequence ----------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of blocks, freed ones included."""
        return self._length

    @overload
    def __getitem__(self, index: SupportsIndex) -> MemoryObj: ...
    @overload
    def __getitem__(self, index: slice) -> list[MemoryObj]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> MemoryObj | list[MemoryObj]:
        """A handle on one block, or a list of handles for a slice."""
        length = self._length
        if type(index) is int and 0 <= index < length:
            return MemoryObj(self, index)
        if isinstance(index, slice):
            return [MemoryObj(self, row) for row in range(*index.indices(length))]
        row = index.__index__()
        if not -length <= row < length:
            raise IndexError(f"block {row} of a batch of {length}")
        return MemoryObj(self, row % length)

    def __iter__(self) -> Iterator[MemoryObj]:
        """Handles on all blocks."""
        return iter(self[:])

    def __repr__(self) -> str:
        """Shape, dtype, format and runs."""
        return (
            f"MemoryBatch({len(self)} x {tuple(self.shape)} {self.dtype} {self.fmt.name}, "
            f"{self.num_runs} runs of {self.allocated_bytes}-byte blocks)"
        )

    # -- the life of a block, used by MemoryObj and the allocator ------------------------------

    # Most batches are filled, read and freed whole, with every count as it was born. Counts are
    # therefore kept as one number until one of them is changed: None stands for all equal.

    def _ref_count(self, row: int) -> int:
        counts = self._ref_counts
        return self._uniform_ref_count if counts is None else counts[row]

    def _pin_count(self, row: int) -> int:
        counts = self._pin_counts
        return 0 if counts is None else counts[row]

    def _own_ref_counts(self) -> array[int]:
        if self._ref_counts is None:
            self._ref_counts = array("i", (self._uniform_ref_count,)) * len(self)
        return self._ref_counts

    def _own_pin_counts(self) -> array[int]:
        if self._pin_counts is None:
            self._pin_counts = array("i", (0,)) * len(self)
        return self._pin_counts

    def _set_all_ref_counts(self, count: int) -> None:
        self._uniform_ref_count = count  # first: readers without the lock may look in between
        self._ref_counts = None

    def _is_untouched(self) -> bool:
        is_uniform = self._ref_counts is None and self._pin_counts is None
        return is_uniform and self._uniform_ref_count == 1

    def _ref_count_array(self) -> npt.NDArray[np.int32]:
        if self._ref_counts is None:
            return np.full(len(self), self._uniform_ref_count, np.int32)
        return _as_array(self._ref_counts)

    def _pin_count_array(self) -> npt.NDArray[np.int32]:
        if self._pin_counts is None:
            return np.zeros(len(self), np.int32)
        return _as_array(self._pin_counts)

    def _change_ref_count(self, row: int, change: int) -> bool:
        """Add ``change``; True when the block is now nobody's and the caller must release it."""
        with self._lock:
            count = self._ref_count(row)
            if count == FREED or count + change < 0:
                raise self._count_error("reference", row, count, change)
            is_nobodys = count + change == 0 and self._pin_count(row) == 0
            self._own_ref_counts()[row] = FREED if is_nobodys else count + change
            return is_nobodys

    def _change_pin_count(self, row: int, change: int) -> bool:
        """Add ``change``; True when the block is now nobody's and the caller must release it."""
        with self._lock:
            count = self._pin_count(row)
            references = self._ref_count(row)
            if references == FREED or count + change < 0:
                raise self._count_error("pin", row, count, change)
            self._own_pin_counts()[row] = count + change
            if count + change == 0 and references == 0:
                self._own_ref_counts()[row] = FREED
                return True
            return False

    def _claim(self, rows: Sequence[int] | None) -> None:
        """Move ``rows`` (None: all) to FREED, all or none; the caller releases their bytes.

        Raises:
            DoubleFreeError: one of them is freed already, or named twice.
            BlockInUseError: one of them is pinned or has more than one reference.
        """
        with self._lock:
            if rows is None:
                if not self._is_untouched():
                    self._require_sole_owner(None)
                self._set_all_ref_counts(FREED)
                return
            row_array = np.asarray(rows, np.int64)
            self._require_sole_owner(row_array)
            ordered = np.sort(row_array)
            repeated = ordered[1:] == ordered[:-1]
            if repeated.any():
                row = int(ordered[int(np.argmax(repeated))])
                raise DoubleFreeError(f"{self._name(row)} is named twice in one call")
            _as_array(self._own_ref_counts())[row_array] = FREED

    def _unclaim(self, rows: Sequence[int] | None) -> None:
        """Undo :meth:`_claim` before the bytes were released."""
        with self._lock:
            if rows is None:
                self._set_all_ref_counts(1)
            else:
                _as_array(self._own_ref_counts())[np.asarray(rows, np.int64)] = 1

    def _require_sole_owner(self, rows: Int64Array | None) -> None:
        """Refuse rows (None: all) that are freed or that somebody else holds."""
        references = self._ref_count_array()[slice(None) if rows is None else rows]
        pins = self._pin_count_array()[slice(None) if rows is None else rows]
        wrong = (references != 1) | (pins != 0)
        if not wrong.any():
            return
        at = int(np.argmax(wrong))
        name = self._name(at if rows is None else int(rows[at]))
        if references[at] == FREED:
            raise DoubleFreeError(f"{name} is freed already")
        raise BlockInUseError(
            f"{name} is in use: reference count {references[at]}, pin count {pins[at]}"
        )

    def _count_error(self, kind: str, row: int, count: int, change: int) -> LifetimeError:
        if self._ref_count(row) == FREED:
            return LifetimeError(f"{self._name(row)} is freed: its {kind} count cannot change")
        return LifetimeError(
            f"the {kind} count of {self._name(row)} is {count}: it cannot change by {change}"
        )

    def _name(self, row: int) -> str:
        return (
            f"block {row} of {len(self)} at address {self._address_batch.address(row)} "
            f"({tuple(self.shape)} {self.dtype})"
        )


def _as_array(counts: array[int]) -> npt.NDArray[np.int32]:
    """The counts as an int32 array on the same memory."""
    return np.frombuffer(counts, np.int32)
