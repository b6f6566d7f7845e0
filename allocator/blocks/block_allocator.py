"""``BlockAllocator``: the common base of all allocators that create their own blocks.

A free happens in steps that can be undone: it claims the blocks, then gathers their contents, and
only then releases their bytes. Subclasses decide where the bytes are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch

from kvheap.blocks.lease import Lease
from kvheap.blocks.lifetime import Lifetime
from kvheap.blocks.memory_allocator import MemoryAllocatorInterface
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.release import Release
from kvheap.blocks.report import LiveBlocks
from kvheap.blocks.rows import Rows, listed, rows_of
from kvheap.errors import ForeignObjectError

__all__ = ["BlockAllocator"]


class BlockAllocator(MemoryAllocatorInterface):
    """An allocator that creates its own blocks, and frees no others.

    Subclasses provide ``layout_of``, ``allocate_blocks``, ``require_gatherable``, ``gather``,
    ``block_bytes`` and ``close_memory``.
    """

    object_type: type[MemoryObj] = MemoryObj
    """The class of the handles that this allocator's batches return."""

    lifetime: Lifetime
    """Tracks which batches are live and when freed bytes may be reused."""

    idempotent_free = False
    """Whether freeing a freed block does nothing instead of raising."""

    # -- free ----------------------------------------------------------------------------------

    def batched_free(
        self, objs: MemoryBatch | Iterable[MemoryObj], out: torch.Tensor | None = None
    ) -> None:
        """Free many blocks; see ``MemoryAllocatorInterface.batched_free``."""
        self.require_open()
        if self.lifetime.has_work:
            self.lifetime.settle()
        if not isinstance(objs, MemoryBatch):
            objs = listed(objs)
        parts = self.rows_by_batch(objs)
        if out is not None:
            self.require_gatherable(parts, out)
        claimed: list[Rows] = []
        try:
            for part in parts:
                rows = part.batch.claim(part.rows, self.idempotent_free and out is None)
                claimed.append(Rows(part.batch, rows))
            if out is not None and len(out):
                self.gather(objs, out)
            releases = self.releases_of(claimed)
        except BaseException:
            for part in claimed:
                part.batch.unclaim(part.rows)
            raise
        # The blocks are freed from here on. If an interrupt strikes before the loop, their bytes
        # stay allocated; they are never handed out twice.
        for release in releases:
            self.lifetime.release(release)

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

    def leaks(self) -> tuple[LiveBlocks, ...]:
        """All live blocks; see ``MemoryAllocatorInterface.leaks``."""
        if self.lifetime.has_work:
            self.lifetime.settle()
        return self.lifetime.live()

    def grant_lease(self, batch: MemoryBatch, row: int, ttl: float) -> Lease:
        """Pin a block for ``ttl`` seconds; see ``MemoryObj.pin``."""
        return self.lifetime.grant_lease(batch, row, ttl)

    # -- for subclasses ------------------------------------------------------------------------

    @abstractmethod
    def require_gatherable(self, parts: Sequence[Rows], out: torch.Tensor) -> None:
        """Raise if the ``out`` of :meth:`batched_free` does not match the blocks."""

    @abstractmethod
    def gather(self, objs: MemoryBatch | Sequence[MemoryObj], out: torch.Tensor) -> None:
        """Copy the contents of blocks into ``out``, already checked by ``require_gatherable``."""

    def releases_of(self, parts: Sequence[Rows]) -> list[Release]:
        """The releases of claimed blocks, combined by :meth:`merged_releases`."""
        releases = [part.batch.release_of(part.rows) for part in parts if len(part)]
        return releases if len(releases) < 2 else self.merged_releases(releases)

    def merged_releases(self, releases: list[Release]) -> list[Release]:
        """Combine releases that can be given back together; by default none can."""
        return releases

    @abstractmethod
    def block_bytes(self, batch: MemoryBatch, address: int, size_bytes: int) -> torch.Tensor:
        """The first bytes of a block of ``batch``, uint8 ``[size_bytes]``, without a copy."""
