"""What is done to freed bytes: nothing, zeroes (:class:`Scrub`), or a pattern (:class:`Poison`).

Debug mode uses :class:`Poison`: it fills freed bytes with a pattern, and checks the pattern before
the bytes are allocated again. A write to a freed block, through a tensor that was kept too long or
by a copy that was still running, changes the pattern. The next allocation of those bytes finds the
change and reports the block's last owner. The check waits for the device.

All methods are called with the heap's guard held.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from sortedcontainers import SortedDict

from kvheap.addresses.address_batch import AddressBatch
from kvheap.blocks.release import LastOwner, Release, describe_owner
from kvheap.device.captures import is_capturing
from kvheap.errors import WriteAfterFreeError
from kvheap.heaps.segments import Segments
from kvheap.kernels.capture_mode import Relaxed

__all__ = ["POISON_BYTE", "Poison", "Scrub", "Wiping"]

POISON_BYTE = 0xDB
"""Not a plausible length, pointer or token; a large negative bf16, fp16 or fp32."""


class Wiping(Protocol):
    """What a heap does to bytes when they are freed and before they are allocated again."""

    tells_owners_apart: bool
    """Whether the releases of several owners must stay separate."""

    def freed(self, release: Release, segments: Segments) -> None:
        """Wipe the bytes of blocks that are about to become free."""
        ...

    def allocated(self, blocks: AddressBatch, segments: Segments) -> None:
        """Check bytes that are about to be allocated."""
        ...


class Scrub:
    """Zeroes freed bytes, with one launch for each block size and call."""

    tells_owners_apart = False

    def freed(self, release: Release, segments: Segments) -> None:
        """Write zeroes."""
        for addresses, size in release.by_size():
            segments.fill(addresses, size, 0)

    def allocated(self, blocks: AddressBatch, segments: Segments) -> None:
        """Checks nothing."""


class Poison:
    """Fills freed bytes with a pattern, and remembers their last owners."""

    tells_owners_apart = True

    def __init__(self) -> None:
        # By start: the end and the owner of each.
        self._extents: SortedDict[int, tuple[int, LastOwner | None]] = SortedDict()
        self._is_whole = True

    def freed(self, release: Release, segments: Segments) -> None:
        """Write the pattern, with one launch for each block size, and remember the owner."""
        for addresses, size in release.by_size():
            segments.fill(addresses, size, POISON_BYTE)
            self._begin_change()
            for address in addresses.tolist():
                self._extents[address] = (address + size, release.owner)
            self._is_whole = True

    def allocated(self, blocks: AddressBatch, segments: Segments) -> None:
        """Check blocks that are about to be allocated, and forget their last owners.

        Checks nothing on a device while this thread captures a CUDA graph: it would have to wait.

        Raises:
            WriteAfterFreeError: a poisoned byte has another value; names its address and the
                block's last owner. The block is poisoned again, and nothing is forgotten.
        """
        self._begin_change()
        pieces = [
            piece for start, size in blocks.run_pairs() for piece in self._cut(start, start + size)
        ]
        can_look = segments.device.type != "cuda" or not is_capturing()
        for begin, end, owner in pieces if can_look else ():
            block = segments.bytes_at(begin, end - begin)
            with Relaxed():
                changed = torch.nonzero(block != POISON_BYTE)
            if len(changed):
                block.fill_(POISON_BYTE)
                self._extents.update({start: (stop, held) for start, stop, held in pieces})
                self._is_whole = True
                raise WriteAfterFreeError(
                    f"{len(changed)} bytes between {begin + int(changed[0])} and "
                    f"{begin + int(changed[-1])} were written after the block at {begin} was "
                    f"freed; it last held {describe_owner(owner)}"
                )

        self._is_whole = True

    def _begin_change(self) -> None:
        """Repair the order of the extents if an exception has interrupted a change of it."""
        if not self._is_whole:  # a dict is always whole, the sorted list of its keys may be behind
            extents: Any = self._extents
            self._extents = SortedDict(dict(dict.items(extents)))
        self._is_whole = False

    def _cut(self, start: int, end: int) -> list[tuple[int, int, LastOwner | None]]:
        """Remove the poisoned extents in ``[start, end)``, and return them with their owners."""
        extents = self._extents
        position = max(extents.bisect_right(start) - 1, 0)
        found: list[tuple[int, int, LastOwner | None]] = []
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
