"""``MemoryBatch``: N equal allocations made by one call, kept as arrays.

Making a batch costs no work per block: it holds its runs, and one count for all blocks until one
of them differs. A ``MemoryObj`` is a handle on one row (batch, index),
made when asked for; handles on the same row share its counts, so it makes no difference through
which of them a block is freed.

The life of a block is one number, its reference count: >= 0 while it lives, ``FREED`` after. All
changes to the counts happen under one lock of the batch, by which no other is ever waited for; it
is never taken by a finalizer. Who moves a row to ``FREED`` owns the release of its bytes, so
of two threads that free a block exactly one succeeds.

A batch that is dropped while blocks of it live, with all handles on them, hands them to its
allocator, which takes them back with its next operation and counts them as dropped.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.lifetime import Event, Lease, Lifetime, Release, Site, Stream, site_lines
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryBatchMetadata
from kvheap.blocks.memory_object import MemoryObj
from kvheap.errors import BlockInUseError, DoubleFreeError, ForeignObjectError, LifetimeError

if TYPE_CHECKING:
    from kvheap.transfer import Transfer

__all__ = ["BlockOwner", "MemoryBatch"]

FREED = -1
"""The reference count of a block that was freed."""

_NO_SIZES: Mapping[int, int] = MappingProxyType({})


class BlockOwner(Protocol):
    """What a batch needs of the allocator that made it."""

    object_type: type[MemoryObj]
    lifetime: Lifetime

    def _bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor: ...
    def _grant_lease(self, batch: MemoryBatch, row: int, ttl: float) -> Lease: ...


class MemoryBatch(Sequence[MemoryObj]):
    """N blocks of one layout, made by ``batched_allocate``.

    A sequence of :class:`MemoryObj`; a slice is a list of them. Compares equal to a sequence of
    the same objects. Not made by users.

    Attributes:
        allocator: the allocator that made it.
        layout: what each block holds.
        born: when it was allocated, by the clock of ``time.monotonic``.
        site: where it was allocated, when tracing was on.
        transfer: the transfer that fills it, for a batch that ``offload`` or ``restore`` made;
            else None.
    """

    __slots__ = (
        "__weakref__",
        "_address_batch",
        "_lease_counts",
        "_length",
        "_lock",
        "_owned",
        "_pin_counts",
        "_ref_counts",
        "_storage",
        "_streams",
        "_uniform_ref_count",
        "_used_sizes",
        "allocator",
        "born",
        "layout",
        "site",
        "transfer",
    )

    def __init__(
        self,
        allocator: BlockOwner,
        address_batch: AddressBatch,
        layout: BlockLayout,
        *,
        owned: bool = True,
        storage: torch.Tensor | None = None,
    ) -> None:
        self._owned = False  # until all is in place: what is not owned needs no finalizer
        self.allocator = allocator
        self.layout = layout
        self.born = 0.0
        self.site: Site = ()
        self.transfer: Transfer | None = None
        self._address_batch = address_batch
        self._length = len(address_batch)
        self._lock = threading.Lock()
        self._uniform_ref_count = 1
        self._ref_counts: array[int] | None = None
        self._pin_counts: array[int] | None = None
        self._lease_counts: dict[int, int] | None = None
        self._used_sizes = _NO_SIZES
        self._streams: list[tuple[frozenset[int] | None, Stream]] | None = None
        self._storage = storage
        if owned:
            allocator.lifetime.begin(self)
            self._owned = True

    def __del__(self) -> None:
        # Runs anywhere, even inside the allocator's own locks on this thread: takes none.
        if getattr(self, "_owned", False):
            lifetime = self.allocator.lifetime
            lifetime.forget(self)
            if self._ref_counts is not None or self._uniform_ref_count != FREED:
                rows = np.flatnonzero(self._ref_count_array() != FREED)
                if len(rows):
                    whole = len(rows) == self._length
                    dropped = None if whole else rows
                    release = self._release_of(dropped, ())
                    # In a cycle, another finalizer may still hold a handle: it finds it freed.
                    self._set_all_ref_counts(FREED)
                    lifetime.drop(release, self._streams_of(dropped))

    # -- what the blocks are -------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Logical shape of each block; of its first group, where there are several."""
        return self.layout.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        """Logical dtype of each block; of its first group, where there are several."""
        return self.layout.dtypes[0]

    @property
    def fmt(self) -> MemoryFormat:
        """What the dimensions mean."""
        return self.layout.fmt

    @property
    def size_bytes(self) -> int:
        """Logical bytes of each block, all groups."""
        return self.layout.size_bytes

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

    @property
    def metadata(self) -> MemoryBatchMetadata:
        """What another process needs to wrap the blocks with ``allocator.view``."""
        return MemoryBatchMetadata(self._address_batch, self.layout)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a MemoryBatch stays in its process: send its metadata")

    # -- who needs them ------------------------------------------------------------------------

    def record_stream(self, stream: Stream) -> None:
        """Keep the bytes of all blocks from reuse as ``MemoryObj.record_stream`` does for one.

        Raises:
            LifetimeError: a block is freed.
        """
        self._record_stream(stream, None)

    def detach(self) -> AddressBatch:
        """Give the blocks up: only their addresses are left, for who frees them by address.

        Afterwards every block counts as freed here. The bytes stay allocated until
        ``allocator.address_manager.batched_free`` gets the result, which waits for no stream and
        wipes nothing.

        Raises:
            DoubleFreeError, BlockInUseError: a block is freed already, or somebody else's too.
        """
        self._claim(None)
        return self._address_batch

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
        make, length = self.allocator.object_type, self._length
        if type(index) is int and 0 <= index < length:
            return make(self, index)
        if isinstance(index, slice):
            return [make(self, row) for row in range(*index.indices(length))]
        row = index.__index__()
        if not -length <= row < length:
            raise IndexError(f"block {row} of a batch of {length}")
        return make(self, row % length)

    def __iter__(self) -> Iterator[MemoryObj]:
        """Handles on all blocks."""
        return iter(self[:])

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

    # -- counts --------------------------------------------------------------------------------

    # Most batches are filled, read and freed whole, with every count as it was born. Counts are
    # therefore kept as one number until one of them is changed: None stands for all equal.

    def _is_live(self, row: int) -> bool:
        counts = self._ref_counts
        return (self._uniform_ref_count if counts is None else counts[row]) != FREED

    def _ref_count(self, row: int) -> int:
        counts = self._ref_counts
        return max(self._uniform_ref_count if counts is None else counts[row], 0)

    def _pin_count(self, row: int) -> int:
        counts = self._pin_counts
        return 0 if counts is None else counts[row]

    def _own_ref_counts(self) -> array[int]:
        if self._ref_counts is None:
            self._ref_counts = array("i", (self._uniform_ref_count,)) * self._length
        return self._ref_counts

    def _own_pin_counts(self) -> array[int]:
        if self._pin_counts is None:
            self._pin_counts = array("i", (0,)) * self._length
        return self._pin_counts

    def _set_all_ref_counts(self, count: int) -> None:
        self._uniform_ref_count = count  # first: readers without the lock may look in between
        self._ref_counts = None

    def _ref_count_array(self) -> npt.NDArray[np.int32]:
        if self._ref_counts is None:
            return np.full(self._length, self._uniform_ref_count, np.int32)
        return np.frombuffer(self._ref_counts, np.int32)

    def _pin_count_array(self) -> npt.NDArray[np.int32]:
        if self._pin_counts is None:
            return np.zeros(self._length, np.int32)
        return np.frombuffer(self._pin_counts, np.int32)

    def _count_live(self) -> tuple[int, int]:
        """How many blocks are live, and how many of those are pinned."""
        with self._lock:
            if self._ref_counts is None and self._pin_counts is None:
                return (0 if self._uniform_ref_count == FREED else self._length), 0
            live = self._ref_count_array() != FREED
            return int(live.sum()), int((live & (self._pin_count_array() > 0)).sum())

    def _change_ref_count(self, row: int, change: int) -> None:
        """Add ``change``; free the block when it is then nobody's."""
        with self._lock:
            self._require_live("reference", row)
            count = self._ref_count(row)
            if count + change < 0:
                raise self._count_error("reference", row, count, change)
            is_nobodys = count + change == 0 and self._pin_count(row) == 0
            self._own_ref_counts()[row] = FREED if is_nobodys else count + change
        if is_nobodys:
            self._release_row(row, ref_count=count)

    def _change_pin_count(self, row: int, change: int) -> None:
        """Add ``change``, which is not a lease's; free the block when it is then nobody's."""
        with self._lock:
            self._require_live("pin", row)
            count = self._pin_count(row)
            leases = self._lease_counts.get(row, 0) if self._lease_counts else 0
            if count + change < leases:
                raise self._count_error("pin", row, count, change)
            self._own_pin_counts()[row] = count + change
            if count + change or self._ref_count(row):
                return
            self._own_ref_counts()[row] = FREED
        self._release_row(row, ref_count=0)

    def _begin_lease(self, row: int) -> None:
        with self._lock:
            self._require_live("pin", row)
            if self._lease_counts is None:
                self._lease_counts = {}
            self._own_pin_counts()[row] += 1
            self._lease_counts[row] = self._lease_counts.get(row, 0) + 1

    def _end_lease(self, lease: Lease, row: int, state: str) -> bool:
        """End a lease that is held, whatever became of the block; False when it had ended."""
        with self._lock:
            if lease.state != "held":
                return False
            lease.state = state
            assert self._lease_counts is not None
            self._lease_counts[row] -= 1
            self._own_pin_counts()[row] -= 1
            if not self._is_live(row) or self._pin_count(row) or self._ref_count(row):
                return True
            self._own_ref_counts()[row] = FREED
        self._release_row(row, ref_count=0)
        return True

    def _require_live(self, kind: str, row: int) -> None:
        if not self._is_live(row):
            raise LifetimeError(f"{self._name(row)} is freed: its {kind} count cannot change")

    def _count_error(self, kind: str, row: int, count: int, change: int) -> LifetimeError:
        leases = self._lease_counts.get(row, 0) if self._lease_counts else 0
        held = f", {leases} of them by leases" if kind == "pin" and leases else ""
        return LifetimeError(
            f"the {kind} count of {self._name(row)} is {count}{held}: it cannot change by {change}"
        )

    # -- freeing -------------------------------------------------------------------------------

    def _claim(self, rows: Int64Array | None, skip_freed: bool = False) -> Int64Array | None:
        """Move ``rows`` (None: all) to FREED, all or none; the caller releases their bytes.

        Args:
            rows: numbers of rows.
            skip_freed: leave out rows that are freed already, instead of raising.

        Returns:
            The rows that were moved; None for all.

        Raises:
            DoubleFreeError: one of them is freed already, or named twice.
            BlockInUseError: one of them is pinned or has more than one reference.
            ForeignObjectError: the batch is a view of what another process holds.
        """
        if not self._owned:
            raise ForeignObjectError(f"{self!r} is a view: only who allocated it can free it")
        with self._lock:
            if rows is None and self._is_untouched():
                self._set_all_ref_counts(FREED)
                return None
            if skip_freed:
                rows = self._live_among(rows)
            elif rows is not None:
                self._require_distinct(rows)
            self._require_sole_owner(rows)
            if rows is None:
                self._set_all_ref_counts(FREED)
            else:
                np.frombuffer(self._own_ref_counts(), np.int32)[rows] = FREED
            return rows

    def _unclaim(self, rows: Int64Array | None, ref_count: int = 1) -> None:
        """Undo :meth:`_claim` before the bytes were released."""
        with self._lock:
            if rows is None:
                self._set_all_ref_counts(ref_count)
            else:
                np.frombuffer(self._own_ref_counts(), np.int32)[rows] = ref_count

    def _is_untouched(self) -> bool:
        is_uniform = self._ref_counts is None and self._pin_counts is None
        return is_uniform and self._uniform_ref_count == 1

    def _live_among(self, rows: Int64Array | None) -> Int64Array:
        live = self._ref_count_array() != FREED
        return np.flatnonzero(live) if rows is None else np.unique(rows[live[rows]])

    def _require_distinct(self, rows: Int64Array) -> None:
        ordered = np.sort(rows)
        repeated = ordered[1:] == ordered[:-1]
        if repeated.any():
            row = int(ordered[int(np.argmax(repeated))])
            raise DoubleFreeError(f"{self._name(row)} is named twice in one call")

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

    def _release_row(self, row: int, ref_count: int) -> None:
        """Give back the bytes of a row that was just moved to FREED."""
        rows = np.array([row], np.int64)
        if not self._owned:
            return
        try:
            release = self._release_of(rows)
        except BaseException:  # a stream that is gone cannot say when its work has ended
            self._unclaim(rows, ref_count)
            raise
        self.allocator.lifetime.release(release)

    def _release_of(
        self, rows: Int64Array | None, events: tuple[Event, ...] | None = None
    ) -> Release:
        """The release of rows (None: all), with events on the streams that were recorded."""
        blocks: AddressBatch | Int64Array
        if rows is None:
            blocks = self._address_batch
        elif len(rows) == 1:
            address = self._address_batch.address(int(rows[0]))
            blocks = AddressBatch(self.allocated_bytes, [address], [1])
        else:
            blocks = self._address_batch.addresses[rows]
        if events is None:
            streams = self._streams_of(rows)
            # What a transfer that has ended used need not wait to be looked at once more.
            in_use = [stream for stream in streams if not getattr(stream, "has_let_go", False)]
            events = tuple(stream.record_event() for stream in in_use)
        return Release(blocks, self.allocated_bytes, _Owner(self.layout, self.site), events)

    def _record_stream(self, stream: Stream, rows: Int64Array | None) -> None:
        with self._lock:
            self._require_all_live(rows)
            entry = (None if rows is None else frozenset(rows.tolist()), stream)
            if self._streams is None:
                self._streams = []
            # Transfers are streams that end: looked for each time their number has doubled.
            count = len(self._streams)
            if count >= 8 and not count & (count - 1):
                self._streams = [
                    kept for kept in self._streams if not getattr(kept[1], "has_let_go", False)
                ]
            if entry not in self._streams:
                self._streams.append(entry)

    def _require_all_live(self, rows: Int64Array | None) -> None:
        if self._ref_counts is None and self._uniform_ref_count != FREED:
            return
        freed = self._ref_count_array() == FREED
        freed = freed if rows is None else freed[rows]
        if freed.any():
            at = int(np.argmax(freed))
            name = self._name(at if rows is None else int(rows[at]))
            raise LifetimeError(f"{name} is freed: it can be no part of a copy, on no stream")

    def _streams_of(self, rows: Int64Array | None) -> tuple[Stream, ...]:
        if not self._streams:
            return ()
        wanted = None if rows is None else set(rows.tolist())
        streams = {
            id(stream): stream
            for used, stream in self._streams
            if used is None or wanted is None or not used.isdisjoint(wanted)
        }
        return tuple(streams.values())

    # -- bytes and names -----------------------------------------------------------------------

    def _bytes(self, row: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block, uint8 ``[size_bytes]``, without a copy."""
        return self.allocator._bytes(self, self._address_batch.address(row), size_bytes)

    def _set_used_size(self, row: int, size_bytes: int) -> None:
        with self._lock:
            self._used_sizes = {**self._used_sizes, row: size_bytes}

    def _name(self, row: int) -> str:
        site = f", allocated at {' from '.join(site_lines(self.site))}" if self.site else ""
        return (
            f"block {row} of {self._length} at address {self._address_batch.address(row)} "
            f"({self.layout}{site})"
        )


class _Owner:
    """Who held released blocks, put into words only when a message needs it."""

    __slots__ = ("layout", "site")

    def __init__(self, layout: BlockLayout, site: Site) -> None:
        self.layout = layout
        self.site = site

    def __call__(self) -> str:
        site = f", allocated at {' from '.join(site_lines(self.site))}" if self.site else ""
        return f"{self.layout}{site}"
