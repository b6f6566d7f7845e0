"""``Spares``: lone free blocks in front of a free list, the last one freed on top.

In a heap of pages any free page fits any block. One that is allocated and freed by itself need not
be joined with its neighbours and carved again each time: it waits here, and the next lone block
takes it. Whatever looks at the free list, a batch for example, or a statistic, moves all of them
into it first.
"""

from __future__ import annotations

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.free_list import FreeList, Receipt

__all__ = ["MAX_SPARES", "Spares"]

MAX_SPARES = 64
"""As many are moved at once: neighbours among them are joined by one change of the free list."""


class Spares:
    """Free blocks of one unit each that are in no free list, as a stack. Not thread-safe.

    A block changes hands by one store, so that an exception strikes before or after it: by
    ``blocks.append`` it becomes free, by ``receipt.done`` it is taken. All of them are moved at
    once, and this object is the receipt of that; another one then takes its place.

    Attributes:
        blocks: the blocks; if the top one is taken, it is about to be removed.
        receipt: that of the last caller of :meth:`take`.
        done: whether the blocks are in the free list.
    """

    __slots__ = ("blocks", "done", "receipt")

    def __init__(self) -> None:
        self.blocks: list[AddressBatch] = []
        self.receipt: Receipt | None = None
        self.done = False

    def take(self, receipt: Receipt) -> AddressBatch | None:
        """Take the top block; None if there is none."""
        blocks = self.blocks
        if not blocks:
            return None
        self.receipt = receipt
        receipt.blocks = top = blocks[-1]
        receipt.done = True  # from here on it is the caller's
        del blocks[-1]
        return top

    @property
    def free(self) -> list[AddressBatch]:
        """The blocks that are free: all but one that is taken already."""
        blocks, receipt = self.blocks, self.receipt
        is_taken = receipt is not None and receipt.done and blocks and blocks[-1] is receipt.blocks
        return blocks[:-1] if is_taken else blocks[:]

    def move_to(self, free_list: FreeList, unit_bytes: int) -> None:
        """Put the blocks into a free list without pending changes; all or none. O(N log F)."""
        runs: list[list[int]] = []
        for start in sorted(blocks.address(0) // unit_bytes for blocks in self.free):
            if runs and runs[-1][1] == start and start not in free_list.walls:
                runs[-1][1] += 1
            else:
                runs.append([start, start + 1])
        try:
            free_list.write(self)
            for start, end in runs:
                free_list.insert(start, end - start)
            free_list.commit()
        except BaseException:
            free_list.rollback()
            raise
