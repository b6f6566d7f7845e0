"""``Rows``: some blocks of one batch, or all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.counts import first_repeated
from kvheap.blocks.memory_batch import BlockOwner, MemoryBatch, MemoryObj
from kvheap.device.completion import Completion

__all__ = ["Rows", "listed", "require_distinct", "rows_of", "whole_batches"]


class Rows:
    """Some blocks of one batch, or all of them."""

    __slots__ = ("batch", "rows")

    def __init__(self, batch: MemoryBatch, rows: Int64Array | None) -> None:
        self.batch = batch
        self.rows = rows
        """Their row numbers, int64 ``[R]``; None for all."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.batch) if self.rows is None else len(self.rows)

    @property
    def addresses(self) -> Int64Array:
        """The address of each, int64 ``[R]``."""
        runs = self.batch.runs
        return runs.addresses if self.rows is None else runs.addresses_of(self.rows)

    # -- transfers -----------------------------------------------------------------------------

    def record_reading(self, completion: Completion) -> None:
        """Record that a transfer reads the blocks; see ``MemoryBatch.record_stream``."""
        self.batch.record_stream(completion, self.rows)

    def record_filling(self, completion: Completion) -> None:
        """Record that a transfer fills the blocks; see ``MemoryBatch.record_stream``."""
        # First what it does: it is found as soon as it is recorded.
        completion.filled += ((id(self.batch.counts), self.rows),)
        self.batch.record_stream(completion, self.rows)
        recorded = self.batch.counts.streams
        if recorded is not None:
            recorded.has_fillers = True

    def users(self) -> Sequence[Completion]:
        """The transfers that have been queued to read or fill the blocks; see ``RowCounts``."""
        return self.batch.counts.users(self.rows)

    def fillers(self) -> Sequence[Completion]:
        """The transfers that have been queued to fill any of the blocks; see ``RowCounts``."""
        return self.batch.counts.fillers(self.rows)

    def are_filled_by(self, completion: Completion) -> bool:
        """Whether a transfer fills any of the blocks, as recorded."""
        return completion.fills(id(self.batch.counts), self.rows)


def listed(objs: Iterable[MemoryObj]) -> Sequence[MemoryObj]:
    """Objects to free as a list; a slice of a batch stays one.

    Raises:
        TypeError: they cannot be listed; a single object, for example.
    """
    if isinstance(objs, BatchSlice):
        return objs
    if isinstance(objs, MemoryObj):
        raise TypeError(f"expected a batch or a list of objects, got {objs!r}: free one by free()")
    try:
        if isinstance(objs, (str, bytes)):
            raise TypeError
        return list(objs)
    except TypeError:
        raise TypeError(f"expected a batch or a list of objects, got {objs!r}") from None


def require_distinct(part: Rows) -> None:
    """Raise if a block is named twice.

    Raises:
        ValueError: names it.
    """
    row = None if part.rows is None else first_repeated(part.rows)
    if row is not None:
        raise ValueError(f"{part.batch.describe(row)} is named twice: blocks to fill must differ")


def whole_batches(objs: Sequence[MemoryObj], owner: BlockOwner) -> list[MemoryBatch] | None:
    """The batches of which objects are all blocks, if a look shows that; cheaper than ``rows_of``.

    Args:
        objs: a slice of a batch, or objects that were allocated one by one.
        owner: their allocator.

    Returns:
        Each batch once; None if an object is of a larger batch or of another allocator, is none, or
        is named twice.
    """
    if isinstance(objs, BatchSlice):
        batch = objs.batch
        is_whole = batch.allocator is owner and objs.row_range == range(len(batch))
        return [batch] if is_whole else None
    found: dict[int, MemoryBatch] = {}
    for obj in objs:
        if not isinstance(obj, MemoryObj):
            return None
        batch = obj.batch
        if batch.counts.num_rows != 1 or batch.allocator is not owner:
            return None
        found[id(batch)] = batch
    return list(found.values()) if len(found) == len(objs) else None


def rows_of(objs: Iterable[MemoryObj]) -> list[Rows]:
    """Group objects by batch, in the order in which the batches first appear.

    No Python work per block for a slice of a batch.

    Raises:
        TypeError: an element is not a ``MemoryObj``.
    """
    if isinstance(objs, BatchSlice):
        is_whole = objs.row_range == range(len(objs.batch))
        return [Rows(objs.batch, None if is_whole else objs.rows)]
    found: dict[int, tuple[MemoryBatch, list[int]]] = {}
    for obj in objs:
        if not isinstance(obj, MemoryObj):
            raise TypeError(f"only a MemoryObj can be freed, got {obj!r}")
        batch = obj.batch
        found.setdefault(id(batch), (batch, []))[1].append(obj.row)
    return [
        Rows(batch, None if len(rows) == len(batch) == 1 else np.array(rows, np.int64))
        for batch, rows in found.values()
    ]
