"""What a ``Lifetime`` knows of batches: :class:`TrackedBatch` and :class:`BlockRows`."""

from __future__ import annotations

from typing import Protocol

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.counts import RowCounts
from kvheap.blocks.owned_blocks import OwnedBlocks
from kvheap.blocks.sites import Site

__all__ = ["BlockRows", "TrackedBatch"]


class TrackedBatch(Protocol):
    """The part of a batch that :class:`Lifetime` uses."""

    born: float
    is_owner: bool
    site: Site
    layout: BlockLayout
    counts: RowCounts
    record: OwnedBlocks | None

    @property
    def runs(self) -> AddressBatch:
        """The runs that the blocks form."""
        ...

    def describe(self, row: int) -> str:
        """Describe a block for an error message."""
        ...

    def claimable(self, rows: Int64Array | None, skip_freed: bool) -> Int64Array | None:
        """Check that rows can be freed; see ``MemoryBatch.claimable``."""
        ...

    def require_owner(self) -> None:
        """Raise if another process owns the blocks; see ``MemoryBatch.require_owner``."""
        ...


class BlockRows(Protocol):
    """Some blocks of one batch; see ``blocks/rows.py``."""

    @property
    def batch(self) -> TrackedBatch:
        """The batch."""
        ...

    @property
    def rows(self) -> Int64Array | None:
        """Row numbers; None for all."""
        ...
