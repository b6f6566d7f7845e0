"""``MemoryAllocatorInterface``: what every allocator can do, and the options all share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.lifetime import FullReport, Lease, Lifetime, LiveBlocks
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_object import MemoryObj
from kvheap.errors import ClosedError, ForeignObjectError

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = ["HeapOptions", "MemoryAllocatorInterface", "Rows", "debug_by_environment"]

DEBUG_TRACE_FRAMES = 4


class HeapOptions(TypedDict, total=False):
    """What every allocator over a heap takes by keyword; see ``TensorMemoryAllocator``."""

    page_layout: BlockLayout | None
    idempotent_free: bool
    scrub: bool
    debug: bool | None
    trace_frames: int | None
    stream_wait_s: float
    on_full: Callable[[FullReport], None] | None
    on_full_interval_s: float


def debug_by_environment() -> bool:
    """Whether ``KVHEAP_DEBUG`` asks for debug mode: set, and neither empty nor 0."""
    return os.environ.get("KVHEAP_DEBUG", "") not in ("", "0")


class Rows:
    """Blocks of one batch that one call frees."""

    __slots__ = ("batch", "rows")

    def __init__(self, batch: MemoryBatch, rows: Int64Array | None) -> None:
        self.batch = batch
        self.rows = rows
        """Their numbers; None for all."""

    def __len__(self) -> int:
        """How many blocks."""
        return len(self.batch) if self.rows is None else len(self.rows)


class MemoryAllocatorInterface(ABC):
    """Allocates blocks, one by one or in batches, and takes them back.

    A context manager: leaving it closes the allocator. A full allocator answers None, a mistake
    raises, and after either nothing has changed.
    """

    object_type: type[MemoryObj] = MemoryObj
    """The class of the objects that batches of this allocator hand out."""

    lifetime: Lifetime
    """Who holds what; see ``blocks/lifetime.py``."""

    _closed = False

    # -- what each allocator does its own way --------------------------------------------------

    @abstractmethod
    def batched_allocate(
        self,
        shape: Shapes,
        dtype: Dtypes,
        batch_size: int,
        fmt: MemoryFormat = MemoryFormat.KV_2LTD,
        source: torch.Tensor | None = None,
        allow_partial: bool = False,
    ) -> MemoryBatch | None:
        """Allocate ``batch_size`` equal blocks, and fill them from ``source``."""

    @abstractmethod
    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free many blocks, all or none, and collect their contents first."""

    @abstractmethod
    def _bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        """Bytes of a block of ``batch``, uint8 ``[size_bytes]``, without a copy."""

    @abstractmethod
    def _close(self) -> None:
        """Release what the allocator holds; called once."""

    # -- what follows from it ------------------------------------------------------------------

    def allocate(
        self, shape: Shapes, dtype: Dtypes, fmt: MemoryFormat = MemoryFormat.KV_2LTD
    ) -> MemoryObj | None:
        """Allocate one block; its contents are undefined.

        Args:
            shape: logical shape, at least one element; or a list of them, one for each group.
            dtype: logical dtype; or a list of them.
            fmt: what the dimensions mean.

        Returns:
            The object, with one reference; None when it does not fit.

        Raises:
            ValueError: the shape is empty or negative, or the heap's alignment is too small for
                the dtype.
            ClosedError: the allocator is closed.
        """
        batch = self.batched_allocate(shape, dtype, 1, fmt)
        return None if batch is None else batch[0]

    def free(self, obj: MemoryObj) -> None:
        """Free one block that nobody else holds.

        Raises:
            DoubleFreeError: it is freed already.
            BlockInUseError: it is pinned or has more than one reference.
            ForeignObjectError: it belongs to another allocator.
            TypeError: it is not a MemoryObj.
            ClosedError: the allocator is closed.
        """
        self.batched_free([obj])

    def leaks(self) -> tuple[LiveBlocks, ...]:
        """All live blocks, by place of allocation (when tracing is on) and layout, oldest first.

        What should not live any more is a leak. O(batches); meant for people and their tools.
        """
        if self.lifetime.has_work:
            self.lifetime.settle()
        return self.lifetime.live()

    def memcheck(self) -> bool:
        """Whether every invariant of the allocator holds."""
        return True

    def close(self) -> None:
        """Release everything. Later calls but ``close`` raise ``ClosedError``."""
        if not self._closed:
            self._closed = True
            self._close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- helpers -------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this {type(self).__name__} is closed")

    def _grant_lease(self, batch: MemoryBatch, row: int, ttl: float) -> Lease:
        return self.lifetime.grant_lease(batch, row, ttl)

    def _rows_by_batch(self, objs: MemoryBatch | Iterable[MemoryObj]) -> list[Rows]:
        """What to free, by batch; refuses what is not this allocator's."""
        if isinstance(objs, MemoryBatch):
            parts = [Rows(objs, None)]
        else:
            rows_of: dict[int, tuple[MemoryBatch, list[int]]] = {}
            for obj in objs:
                if not isinstance(obj, MemoryObj):
                    raise TypeError(f"only a MemoryObj can be freed, got {obj!r}")
                batch = obj._batch
                rows_of.setdefault(id(batch), (batch, []))[1].append(obj._row)
            parts = [
                Rows(batch, None if len(rows) == len(batch) == 1 else np.array(rows, np.int64))
                for batch, rows in rows_of.values()
            ]
        for part in parts:
            if part.batch.allocator is not self:
                raise ForeignObjectError(f"{part.batch!r} belongs to another allocator")
        return parts
