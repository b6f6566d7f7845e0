"""``BlockAllocator``: the common base of all allocators that create their own blocks.

A free checks the blocks, gathers their contents if asked to, and frees them in one step
(``Lifetime.free``). Reading and writing many blocks are checked here too. Subclasses decide where
the bytes are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.block_runs import MemorySegment
from kvheap.blocks.batch_lease import BatchLease
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.memory_allocator import MemoryAllocatorInterface
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.release import Release
from kvheap.blocks.report import LiveBlocks
from kvheap.blocks.rows import Rows, listed, require_distinct, rows_of, whole_batches
from kvheap.errors import ForeignObjectError

__all__ = ["BlockAllocator", "segment_of"]


def segment_of(start: int, buffer: torch.Tensor) -> MemorySegment:
    """Where a buffer is in memory, whose first byte has the heap address ``start``."""
    return MemorySegment(start, buffer.nbytes, buffer.data_ptr())


class BlockAllocator(MemoryAllocatorInterface):
    """An allocator that creates its own blocks, and frees no others.

    Subclasses provide ``layout_of``, ``allocate_blocks``, ``require_gatherable``, ``gather``,
    ``require_writable_from``, ``scatter``, ``new_tensor``, ``block_bytes`` and ``close_memory``.
    """

    object_type: type[MemoryObj] = MemoryObj
    """The class of the handles that this allocator's batches return."""

    lifetime: Lifetime
    """Tracks which batches are live and when freed bytes may be reused."""

    idempotent_free = False
    """Whether freeing a freed block does nothing instead of raising."""

    watched_calls: Any = None
    """What :mod:`kvheap.metrics` measures of this allocator's calls; None: nothing."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the blocks are on."""

    @property
    def is_view_only(self) -> bool:
        """Whether another process keeps the books: this one allocates, frees and fills nothing."""
        return False

    def require_owner(self, action: str) -> None:
        """Raise if another process keeps the books.

        Args:
            action: what the caller wants to do, such as "free blocks".

        Raises:
            ForeignProcessError: names both processes.
        """

    # -- free ----------------------------------------------------------------------------------

    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free many blocks; see ``MemoryAllocatorInterface.batched_free``."""
        if self.closed:
            self.require_open()
        lifetime = self.lifetime
        if any(lifetime.reclaimer.waiting_but_for_streams) and not self.is_view_only:
            lifetime.reclaimer.settle()
        whole: MemoryBatch | None = None
        if isinstance(objs, MemoryBatch) and objs.allocator is self:
            if out is None and objs.counts.streams is None and lifetime.free_only(objs):
                return
            whole = objs
            parts = [Rows(objs, None)]
        else:
            if not isinstance(objs, MemoryBatch):
                objs = listed(objs)
                batches = whole_batches(objs, self) if out is None else None
                if batches is not None and lifetime.free_whole(batches):
                    return
            parts = self.rows_by_batch(objs)
        skip_freed = self.idempotent_free and out is None
        if out is not None:
            self.require_gatherable(parts, out)
            for part in parts:
                part.batch.claimable(part.rows)
            if out.shape[0]:
                self.gather(objs, out)
            if whole is not None and whole.counts.streams is None and lifetime.free_only(whole):
                return
        lifetime.free(parts, skip_freed, self.merged_releases)

    def free(self, obj: MemoryObj) -> None:
        """Free one block; see ``MemoryAllocatorInterface.free``."""
        if self.closed:
            self.require_open()
        lifetime = self.lifetime
        if any(lifetime.reclaimer.waiting_but_for_streams):
            lifetime.reclaimer.settle()
        if not isinstance(obj, MemoryObj):
            more = ": free a batch by batched_free()" if isinstance(obj, MemoryBatch) else ""
            raise TypeError(f"only a MemoryObj can be freed, got {obj!r}{more}")
        batch = obj.batch
        if batch.allocator is not self:
            raise ForeignObjectError(f"{batch!r} belongs to another allocator")
        rows = None
        if batch.counts.num_rows != 1:
            rows = np.array([obj.row], np.int64)
        elif batch.counts.streams is None and lifetime.free_only(batch):
            return
        lifetime.free((Rows(batch, rows),), self.idempotent_free)

    # -- contents ------------------------------------------------------------------------------

    def batched_read(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gather the contents of many blocks; see ``MemoryAllocatorInterface.batched_read``."""
        objs, parts = self._live_parts(objs)
        if out is None:
            if not parts:
                raise ValueError(
                    "an empty list of blocks has no layout: pass out, or a batch or a slice of one"
                )
            out = self.new_tensor(parts[0].batch.layout, len(objs))
        self.require_gatherable(parts, out)
        if len(out):
            self.gather(objs, out)
        return out

    def batched_write(self, objs: MemoryBatch | Iterable[MemoryObj], source: torch.Tensor) -> None:
        """Fill many blocks from a tensor; see ``MemoryAllocatorInterface.batched_write``."""
        objs, parts = self._live_parts(objs)
        for part in parts:
            part.batch.require_writable()
            require_distinct(part)
        self.require_writable_from(parts, source)
        on_host = self.device.type == "cpu"
        for part in parts:
            part.batch.await_filling(on_host)
            part.batch.await_transfers(part.rows)
        if not len(source):
            return
        for part in parts:
            part.batch.stored_tokens.forget(part.rows)
        self.scatter(source, objs)

    def _live_parts(
        self, objs: MemoryBatch | Iterable[MemoryObj]
    ) -> tuple[MemoryBatch | Sequence[MemoryObj], Sequence[Rows]]:
        """Blocks of this allocator that are all live, and the same by batch."""
        self.require_open()
        parts: Sequence[Rows]
        if isinstance(objs, MemoryBatch) and objs.allocator is self:
            parts = (Rows(objs, None),)
        else:
            objs = objs if isinstance(objs, MemoryBatch) else listed(objs)
            parts = self.rows_by_batch(objs)
        for part in parts:
            part.batch.counts.require_live(part.rows, part.batch)
        return objs, parts

    # -- hold ----------------------------------------------------------------------------------

    def rows_by_batch(self, objs: MemoryBatch | Iterable[MemoryObj]) -> list[Rows]:
        """Group blocks by batch.

        Raises:
            TypeError: an element is not a ``MemoryObj``.
            ForeignObjectError: a block belongs to another allocator.
        """
        parts = [Rows(objs, None)] if isinstance(objs, MemoryBatch) else rows_of(objs)
        for part in parts:
            if part.batch.allocator is not self:
                raise ForeignObjectError(f"{part.batch!r} belongs to another allocator")
        return parts

    def lease(
        self,
        objs: MemoryBatch | Iterable[MemoryObj],
        ttl: float,
        rows: npt.ArrayLike | None = None,
    ) -> BatchLease:
        """Pin many blocks, all or none, until the lease is released or ``ttl`` seconds have passed.

        As long as it is held, the blocks cannot be freed; blocks whose last reference is dropped
        meanwhile are freed when it ends. For a reader elsewhere that may vanish, such as another
        machine: it has the blocks for so long, and asks for more time with ``extend``. O(1) for a
        batch, no Python work per row for ``rows``, else O(blocks).

        Args:
            objs: a batch, or objects of any batches of this allocator.
            ttl: seconds, more than 0.
            rows: which blocks of a batch, integers ``[R]``; None: all. A block that is named twice
                is pinned once.

        Returns:
            The lease: ``release()``, ``extend(ttl)``, ``deadline``, ``state``; a context manager.
            Each block's pin count includes it. ``stats().expired_leases`` counts it once if it
            expires.

        Raises:
            LifetimeError: a block is freed; nothing is pinned.
            ForeignObjectError: a block belongs to another allocator; nothing is pinned.
            ValueError: ``ttl`` is not positive, or the batch has no such row.
            TypeError: an element is not a MemoryObj, ``ttl`` is not a number, ``rows`` are not
                integers, or rows of no batch.
            ReentrantCallError: the calling thread is inside an operation; nothing is pinned.
            ClosedError: the allocator is closed.
        """
        self.require_open()
        if isinstance(objs, MemoryBatch):
            chosen = None if rows is None else objs.checked_rows(rows)
            parts = [Rows(part.batch, chosen) for part in self.rows_by_batch(objs)]
        elif rows is not None:
            raise TypeError(f"rows are those of a batch, got {objs!r}: pass the batch")
        else:
            parts = self.rows_by_batch(listed(objs))
        return self.lifetime.leases.grant_many(parts, ttl)

    def leaks(self) -> tuple[LiveBlocks, ...]:
        """All live blocks; see ``MemoryAllocatorInterface.leaks``."""
        if self.lifetime.reclaimer.has_work and not self.is_view_only:
            self.lifetime.reclaimer.settle()
        return self.lifetime.live()

    # -- for subclasses ------------------------------------------------------------------------

    @abstractmethod
    def require_gatherable(self, parts: Sequence[Rows], out: torch.Tensor) -> None:
        """Raise if the ``out`` of :meth:`batched_free` does not match the blocks."""

    @abstractmethod
    def gather(self, objs: MemoryBatch | Sequence[MemoryObj], out: torch.Tensor) -> None:
        """Copy the contents of blocks into ``out``, already checked by ``require_gatherable``."""

    @abstractmethod
    def require_writable_from(self, parts: Sequence[Rows], source: torch.Tensor) -> None:
        """Raise if the ``source`` of :meth:`batched_write` does not match the blocks."""

    @abstractmethod
    def scatter(self, source: torch.Tensor, objs: MemoryBatch | Sequence[MemoryObj]) -> None:
        """Copy ``source`` into blocks, checked, which no transfer uses any more."""

    @abstractmethod
    def new_tensor(self, layout: BlockLayout, num_blocks: int) -> torch.Tensor:
        """A new tensor for the contents of so many blocks of a layout."""

    def merged_releases(self, releases: list[Release]) -> list[Release]:
        """Combine releases that can be given back together; by default none can."""
        return releases

    def memory_segments(self, batch: MemoryBatch) -> Sequence[MemorySegment]:
        """The buffers that the blocks of a batch are in: by default, its own storage.

        Raises:
            ClosedError: the allocator is closed.
        """
        self.require_open()
        storage = batch.storage
        return () if storage is None else (segment_of(0, storage),)

    @abstractmethod
    def block_bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block of ``batch``, uint8 ``[size_bytes]``, without a copy."""
