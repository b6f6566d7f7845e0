"""``Release``: freed blocks whose bytes are on their way back to the free list."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.free_list import Receipt
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.counts import FREED, RowCounts
from kvheap.blocks.sites import Site, allocated_at
from kvheap.device.events import Event

__all__ = [
    "LastOwner",
    "Parts",
    "Release",
    "WipedLaterError",
    "WipingError",
    "describe_owner",
    "merged",
]

LastOwner = tuple[BlockLayout, Site]
"""What a block held, and where it was allocated."""

Parts = tuple[tuple[RowCounts, "Int64Array | None"], ...]
"""The counts of batches, each with the rows to free (None: all)."""


class Release(Receipt):
    """Freed blocks whose bytes are on their way back to the free list.

    It is its own receipt: ``done`` tells whether the bytes are in the free list. So carrying it out
    once more, after an exception, does nothing twice.

    Attributes:
        freed: the blocks: a whole batch, or the addresses of some, int64 ``[N]``.
        sizes: allocated bytes of each block, or one number for all, as for a whole batch.
        owner: the last owner; None: an allocation that was interrupted.
        events: the bytes may be reused once all of these have completed.
        parts: the rows to mark as freed.
        batch: for a release on condition, a weak reference to its batch, whose blocks become live
            again if an event raises ``ReleaseVoidError``; else None.
        condition: the event that may raise it.
        count: what the rows' reference counts become, ``FREED`` or ``DROPPED``.
        is_void: whether the blocks become live again.
        pending_bytes: while it is pending, :attr:`num_bytes`.
        error: why the bytes could not be given back.
        was_reported: whether the log says so.
    """

    __slots__ = (
        "batch",
        "condition",
        "count",
        "error",
        "events",
        "freed",
        "is_void",
        "owner",
        "parts",
        "pending_bytes",
        "sizes",
        "was_reported",
    )

    def __init__(
        self,
        freed: AddressBatch | Int64Array,
        sizes: int | Int64Array,
        owner: LastOwner | None,
        events: tuple[Event, ...] = (),
        parts: Parts = (),
    ) -> None:
        self.done = False
        self.freed = freed
        self.sizes = sizes
        self.owner = owner
        self.events = events
        self.parts = parts
        self.batch: Callable[[], object | None] | None = None
        self.condition: Event | None = None
        self.count = FREED
        self.is_void = False
        self.pending_bytes = 0
        self.error: BaseException | None = None
        self.was_reported = False

    @property
    def is_orphaned(self) -> bool:
        """Whether its blocks cannot become live again, as their batch is gone."""
        return self.batch is not None and self.batch() is None

    def waive_condition(self) -> None:
        """Let the bytes wait for whoever else uses them, and for the condition no more."""
        condition = self.condition
        self.events = tuple(event for event in self.events if event is not condition)
        self.is_void = False

    @property
    def num_bytes(self) -> int:
        """Allocated bytes of all blocks."""
        freed, sizes = self.freed, self.sizes
        if not isinstance(sizes, int):
            return int(sizes.sum())
        return sizes * (freed.num_blocks if isinstance(freed, AddressBatch) else len(freed))

    @property
    def ended(self) -> bool:
        """Whether the bytes may be reused."""
        return all(event.query() for event in self.events)

    def by_size(self) -> Iterator[tuple[Int64Array, int]]:
        """For each block size in bytes: its blocks' addresses, int64 ``[N]``, and the size."""
        if isinstance(self.freed, AddressBatch):
            yield self.freed.addresses, self.freed.block_bytes
        elif isinstance(self.sizes, int):
            yield self.freed, self.sizes
        else:
            for size in np.unique(self.sizes):
                yield self.freed[self.sizes == size], int(size)


class WipingError(Exception):
    """The bytes of a release could not be wiped, for the reason in ``__cause__``."""


class WipedLaterError(Exception):
    """The bytes of a release cannot be wiped now: a later operation does it."""


def describe_owner(owner: LastOwner | None) -> str:
    """The block layout and the allocation site of freed bytes, for a message."""
    if owner is None:
        return "an allocation that was interrupted"
    layout, site = owner
    return f"{layout}{allocated_at(site)}"


def merged(releases: list[Release]) -> list[Release]:
    """The releases, with all that wait for no event combined into one."""
    at_once = [release for release in releases if not release.events]
    if len(at_once) < 2:
        return releases
    starts: list[int] = []
    sizes: list[int] = []
    for release in at_once:
        blocks, size = release.freed, release.sizes
        if isinstance(blocks, AddressBatch):
            for start, num_bytes in blocks.run_pairs():
                starts.append(start)
                sizes.append(num_bytes)
        else:
            starts += blocks.tolist()
            sizes += np.broadcast_to(size, len(blocks)).tolist()
    owner = at_once[0].owner
    parts = tuple(part for release in at_once for part in release.parts)
    together = Release(np.array(starts, np.int64), np.array(sizes, np.int64), owner, (), parts)
    return [together, *(release for release in releases if release.events)]
