"""``HeapMap``: extents that cover a heap, with their states, ages and owners."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array

__all__ = ["STATES", "HeapMap", "Owner", "OwnerUse"]

STATES = ("free", "live", "pinned", "pending", "quarantined", "other")
"""States of bytes. pending: freed, while a stream or a transfer still uses them. quarantined:
freed, but a failed transfer may use them for ever. other: allocated by users of the address space
that are no blocks."""

FREE = 0


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose blocks are: their block layout, and the site that allocated them.

    Attributes:
        layout: the block layout, as text.
        site: the allocation site, as ``file:line in function``, innermost caller first; empty if
            sites were not recorded (``trace_frames``).
    """

    layout: str
    site: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Site and layout."""
        return f"{self.site[0]}, {self.layout}" if self.site else self.layout


@dataclass(frozen=True, slots=True)
class OwnerUse:
    """What one owner has.

    Attributes:
        owner: who.
        num_blocks: of all states.
        num_bytes: of all states.
        pinned_bytes: of pinned blocks.
        oldest_s: seconds since the oldest block was allocated; NaN if that is not known.
    """

    owner: Owner
    num_blocks: int
    num_bytes: int
    pinned_bytes: int
    oldest_s: float


@dataclass(frozen=True, eq=False)
class HeapMap:
    """Extents that cover a heap, in address order, at one moment.

    Neighbouring blocks of one batch and state are one extent.

    Attributes:
        heap: the heap's class.
        device: the device of its bytes.
        heap_bytes: bytes of the heap.
        align_bytes: every address is a multiple of it.
        segments: where each buffer begins.
        is_view_only: whether another process kept the books: then the map is that at the fork, or
            an empty one if the heap was attached.
        time: when, in UTC, as ISO 8601.
        pid: in which process.
        version: of kvheap.
        sizes: bytes of each extent, int64 ``[E]``.
        states: index in ``STATES`` of each, uint8 ``[E]``.
        batches: the batch that each is of, int32 ``[E]``; -1: none.
        ages_s: seconds since each batch was allocated, float64 ``[B]``; NaN if that is not known.
        owner_of: index in ``owners`` of each batch, int32 ``[B]``.
        block_bytes: bytes of each batch's blocks, int64 ``[B]``.
        owners: whose they are.
    """

    heap: str
    device: str
    heap_bytes: int
    align_bytes: int
    segments: tuple[int, ...]
    is_view_only: bool
    time: str
    pid: int
    version: str
    sizes: Int64Array
    states: npt.NDArray[np.uint8]
    batches: npt.NDArray[np.int32]
    ages_s: npt.NDArray[np.float64]
    owner_of: npt.NDArray[np.int32]
    block_bytes: Int64Array
    owners: tuple[Owner, ...]

    @cached_property
    def starts(self) -> Int64Array:
        """The address of each extent, int64 ``[E]``."""
        return np.cumsum(self.sizes) - self.sizes

    @property
    def num_extents(self) -> int:
        """Number of extents E."""
        return len(self.sizes)

    @cached_property
    def blocks(self) -> Int64Array:
        """Number of blocks of each extent, int64 ``[E]``; 0 where there are none."""
        found = np.zeros(len(self.sizes), np.int64)
        owned = self.batches >= 0
        found[owned] = self.sizes[owned] // self.block_bytes[self.batches[owned]]
        return found

    @cached_property
    def ages(self) -> npt.NDArray[np.float64]:
        """Seconds since each extent's batch was allocated, float64 ``[E]``; NaN: not known."""
        found = np.full(len(self.sizes), np.nan)
        owned = self.batches >= 0
        found[owned] = self.ages_s[self.batches[owned]]
        return found

    @cached_property
    def extent_owners(self) -> npt.NDArray[np.int32]:
        """Index in ``owners`` of each extent, int32 ``[E]``; -1: none."""
        found = np.full(len(self.sizes), -1, np.int32)
        owned = self.batches >= 0
        found[owned] = self.owner_of[self.batches[owned]]
        return found

    @property
    def free_extents(self) -> Int64Array:
        """Start and size of the free extents, int64 ``[F, 2]``."""
        is_free = self.states == FREE
        return np.stack([self.starts[is_free], self.sizes[is_free]], axis=1)

    @property
    def largest_free_bytes(self) -> int:
        """Bytes of the largest free extent."""
        return int(self.sizes[self.states == FREE].max(initial=0))

    def bytes_by_state(self) -> dict[str, int]:
        """Bytes of each state; they add up to the heap."""
        totals = [int(self.sizes[self.states == state].sum()) for state in range(len(STATES))]
        return dict(zip(STATES, totals, strict=True))

    def uses(self) -> list[OwnerUse]:
        """What each owner has, most bytes first."""
        found = []
        order = np.argsort(self.extent_owners, kind="stable")
        owners = self.extent_owners[order]
        for index, owner in enumerate(self.owners):
            first, last = np.searchsorted(owners, [index, index + 1])
            rows = order[first:last]
            ages = self.ages[rows]
            found.append(
                OwnerUse(
                    owner=owner,
                    num_blocks=int(self.blocks[rows].sum()),
                    num_bytes=int(self.sizes[rows].sum()),
                    pinned_bytes=int(self.sizes[rows][self.states[rows] == 2].sum()),
                    oldest_s=float(np.nanmax(ages)) if not np.isnan(ages).all() else math.nan,
                )
            )
        return sorted(found, key=lambda use: -use.num_bytes)

    def __repr__(self) -> str:
        """Heap, bytes by state, and number of extents."""
        used = ", ".join(f"{each} {state}" for state, each in self.bytes_by_state().items() if each)
        return (
            f"{type(self).__name__}({self.heap} of {self.heap_bytes} bytes: {used}; "
            f"{self.num_extents} extents)"
        )
