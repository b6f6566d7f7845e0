"""``Release``: freed blocks whose bytes are on their way back to the free list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.sites import Site, allocated_at
from kvheap.device.events import Event

__all__ = ["LastOwner", "Release", "merged"]


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """Freed blocks whose bytes are on their way back to the free list.

    Attributes:
        blocks: a whole batch, or the addresses of some blocks, int64 ``[N]``.
        sizes: allocated bytes of each block, or one number for all; unused for a whole batch.
        owner: returns a description of the last owner, for messages.
        events: the bytes may be reused once all of these have completed.
        take_back: called when an event raises ``ReleaseVoidError``; makes the blocks live again,
            and the release is dropped. None: the release is unconditional.
    """

    blocks: AddressBatch | Int64Array
    sizes: int | Int64Array
    owner: Callable[[], str]
    events: tuple[Event, ...] = ()
    take_back: Callable[[], None] | None = None

    @property
    def num_bytes(self) -> int:
        """Allocated bytes of all blocks."""
        if isinstance(self.blocks, AddressBatch):
            return len(self.blocks) * self.blocks.block_bytes
        if isinstance(self.sizes, int):
            return len(self.blocks) * self.sizes
        return int(self.sizes.sum())

    @property
    def ended(self) -> bool:
        """Whether the bytes may be reused."""
        return all(event.query() for event in self.events)

    def by_size(self) -> Iterator[tuple[Int64Array, int]]:
        """For each block size in bytes: its blocks' addresses, int64 ``[N]``, and the size."""
        if isinstance(self.blocks, AddressBatch):
            yield self.blocks.addresses, self.blocks.block_bytes
        elif isinstance(self.sizes, int):
            yield self.blocks, self.sizes
        else:
            for size in np.unique(self.sizes):
                yield self.blocks[self.sizes == size], int(size)


class LastOwner:
    """Describes the last owner of released blocks, only when a message needs the text."""

    __slots__ = ("layout", "site")

    def __init__(self, layout: BlockLayout, site: Site) -> None:
        self.layout = layout
        self.site = site

    def __call__(self) -> str:
        """The block layout and the allocation site."""
        return f"{self.layout}{allocated_at(self.site)}"


def merged(releases: list[Release]) -> list[Release]:
    """The releases, with all that wait for no event combined into one."""
    at_once = [release for release in releases if not release.events]
    if len(at_once) < 2:
        return releases
    starts: list[int] = []
    sizes: list[int] = []
    for release in at_once:
        blocks, size = release.blocks, release.sizes
        if isinstance(blocks, AddressBatch):
            for start, num_bytes in blocks.run_pairs():
                starts.append(start)
                sizes.append(num_bytes)
        else:
            starts += blocks.tolist()
            sizes += np.broadcast_to(size, len(blocks)).tolist()
    owner = at_once[0].owner
    together = Release(np.array(starts, np.int64), np.array(sizes, np.int64), owner)
    return [together, *(release for release in releases if release.events)]
