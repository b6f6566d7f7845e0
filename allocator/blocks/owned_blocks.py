"""``OwnedBlocks``: the record that a batch owns bytes of a heap."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.counts import RowCounts
from kvheap.blocks.release import Release
from kvheap.blocks.sites import Site
from kvheap.device.events import Event

__all__ = ["OwnedBlocks"]

if TYPE_CHECKING:
    Reference = weakref.ref[Any]
else:
    Reference = weakref.ref


class OwnedBlocks(Reference):
    """A weak reference to a batch, and all that is needed to free its blocks without it.

    Its callback, a method of a deque, queues the record when the batch is gone. No Python code runs
    at that moment, so no signal can interrupt it, and it takes no lock.

    Attributes:
        addresses: where the blocks are.
        counts: which of them are live.
        layout: what each block holds.
        site: the allocation site, if sites are recorded.
        born: when they were allocated, as a ``time.monotonic`` value in seconds.
        done: if they are freed as a whole, whether their bytes are in the free list; the record is
            the receipt of that.
        was_reported: whether the log says that they cannot be reclaimed.
    """

    __slots__ = ("addresses", "born", "counts", "done", "layout", "site", "was_reported")

    addresses: AddressBatch
    counts: RowCounts
    layout: BlockLayout
    site: Site
    born: float
    done: bool
    was_reported: bool

    def release_of(self, rows: Int64Array | None, events: tuple[Event, ...]) -> Release:
        """The release of ``rows`` (None: all), whose bytes may be reused once ``events`` are over.

        Nothing is freed yet.
        """
        addresses = self.addresses
        blocks: AddressBatch | Int64Array
        if rows is None:
            blocks = addresses
        elif len(rows) == 1:
            blocks = AddressBatch(addresses.block_bytes, addresses.address(int(rows[0])), 1)
        elif addresses.num_runs == 1 and _are_consecutive(rows):
            blocks = addresses.part(int(rows[0]), len(rows))
        else:
            blocks = addresses.addresses_of(rows)
        if rows is not None and 2 * len(rows) >= len(addresses):
            addresses.forget_addresses()  # few blocks may be left, which need not know those of all
        owner, parts = (self.layout, self.site), ((self.counts, rows),)
        return Release(blocks, addresses.block_bytes, owner, events, parts)


def _are_consecutive(rows: Int64Array) -> bool:
    if not len(rows):
        return False
    first, last = int(rows[0]), int(rows[-1])
    return last - first == len(rows) - 1 and rows.tolist() == list(range(first, last + 1))
