"""What is done to freed bytes: nothing, zeroes (:class:`Scrub`), or a pattern (:class:`Poison`).

Poison is debug mode: freed bytes are filled with a pattern, and checked before they are used
again. Writing to a block after it was freed, through a tensor that was kept too long or by a copy
that was still running, changes the pattern. The next allocation of those bytes finds the change
and reports the block's last owner. Reading and comparing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Protocol

import torch
from sortedcontainers import SortedDict

from kvheap.addresses.address_batch import AddressBatch
from kvheap.blocks.release import Release
from kvheap.errors import WriteAfterFreeError
from kvheap.forks import starts_over_after_fork
from kvheap.heaps.segments import Segments

__all__ = ["POISON_BYTE", "Poison", "Scrub", "Wiping"]

POISON_BYTE = 0xDB
"""Not a plausible length, pointer or token; as bf16, fp16 and fp32 a large negative number."""

Owner = Callable[[], str]


class Wiping(Protocol):
    """What a heap does to bytes before they are free, and before they are handed out again."""

    tells_owners_apart: bool
    """Whether blocks of several owners must be released one owner at a time."""

    def freed(self, release: Release, segments: Segments) -> None:
        """Treat the bytes of blocks that are about to be free."""
        ...

    def allocated(self, blocks: AddressBatch, segments: Segments) -> None:
        """Check bytes that are about to be handed out."""
        ...


class Scrub:
    """Zeroes freed bytes, in one launch for each block size and call."""

    tells_owners_apart = False

    def freed(self, release: Release, segments: Segments) -> None:
        """Write zeroes."""
        for addresses, size in release.by_size():
            segments.fill(addresses, size, 0)

    def allocated(self, blocks: AddressBatch, segments: Segments) -> None:
        """Nothing to check."""


class Poison:
    """Fills freed bytes with a pattern, and knows who held them last."""

    tells_owners_apart = True

    def __init__(self) -> None:
        self._extents: SortedDict[int, tuple[int, Owner]] = SortedDict()  # start -> end, owner
        self._lock = Lock()
        starts_over_after_fork(self)

    def freed(self, release: Release, segments: Segments) -> None:
        """Write the pattern, in one launch for each block size, and remember the owner."""
        for addresses, size in release.by_size():
            segments.fill(addresses, size, POISON_BYTE)
            with self._lock:
                for address in addresses.tolist():
                    self._extents[address] = (address + size, release.owner)

    def allocated(self, blocks: AddressBatch, segments: Segments) -> None:
        """Check blocks that are about to be handed out, and forget them.

        Raises:
            WriteAfterFreeError: a poisoned byte has another value; names its address and the
                block's last owner. The block is poisoned again, and nothing is forgotten.
        """
        with self._lock:
            pieces = [
                piece
                for start, size in blocks.run_pairs()
                for piece in self._cut(start, start + size)
            ]
            for begin, end, owner in pieces:
                block = segments.bytes_at(begin, end - begin)
                changed = torch.nonzero(block != POISON_BYTE)
                if len(changed):
                    block.fill_(POISON_BYTE)
                    self._extents.update({start: (stop, held) for start, stop, held in pieces})
                    raise WriteAfterFreeError(
                        f"{len(changed)} bytes between {begin + int(changed[0])} and "
                        f"{begin + int(changed[-1])} were written after the block at {begin} was "
                        f"freed; it was last {owner()}"
                    )

    def start_over_after_fork(self) -> None:
        """Release the lock in a forked child."""
        self._lock = Lock()

    def _cut(self, start: int, end: int) -> list[tuple[int, int, Owner]]:
        """Take what is poisoned in ``[start, end)`` out of the list."""
        extents = self._extents
        position = max(extents.bisect_right(start) - 1, 0)
        found: list[tuple[int, int, Owner]] = []
        while position < len(extents):
            begin, (stop, owner) = extents.peekitem(position)
            if begin >= end:
                break
            if stop <= start:
                position += 1
                continue
            del extents[begin]
            if begin < start:
                extents[begin] = (start, owner)
                position += 1
            if stop > end:
                extents[end] = (stop, owner)
            found.append((max(begin, start), min(stop, end), owner))
        return found
