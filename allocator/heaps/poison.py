"""Debug mode: freed bytes are filled with a pattern, and looked at before they are used again.

Who writes to a block after freeing it, through a tensor kept too long or by a copy that was still
running, changes the pattern. That is found when the bytes are next handed out, and reported with
the last owner of the block. Reading and comparing wait for the device: this is for debugging.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from sortedcontainers import SortedDict

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.errors import WriteAfterFreeError
from kvheap.kernels.block_copy import fill_blocks

__all__ = ["POISON_BYTE", "Poison"]

POISON_BYTE = 0xDB
"""Not a plausible length, pointer or token; as bf16, fp16 and fp32 a large negative number."""

Owner = Callable[[], str]


class Poison:
    """Which bytes of a heap are poisoned, and who held them last."""

    def __init__(self) -> None:
        self._extents: SortedDict[int, tuple[int, Owner]] = SortedDict()  # start -> end, owner
        self._lock = Lock()

    def fill(self, buffer: torch.Tensor, addresses: Int64Array, size_bytes: int) -> None:
        """Write the pattern, in one launch on the current stream."""
        fill_blocks(buffer, addresses, size_bytes, POISON_BYTE)

    def put(self, addresses: Int64Array, size_bytes: int, owner: Owner) -> None:
        """Remember blocks that were filled."""
        with self._lock:
            for address in addresses.tolist():
                self._extents[address] = (address + size_bytes, owner)

    def take(self, blocks: AddressBatch, read: Callable[[int, int], torch.Tensor]) -> None:
        """Look at blocks that are about to be handed out, and forget them.

        Args:
            blocks: where they are.
            read: the bytes at an address, uint8.

        Raises:
            WriteAfterFreeError: a poisoned byte has another value; names its address and who
                held the block last. It is poisoned anew, and nothing is forgotten.
        """
        with self._lock:
            pieces = [
                piece
                for start, size in blocks.run_pairs()
                for piece in self._cut(start, start + size)
            ]
            for begin, end, owner in pieces:
                block = read(begin, end - begin)
                changed = torch.nonzero(block != POISON_BYTE)
                if len(changed):
                    block.fill_(POISON_BYTE)
                    self._extents.update({start: (stop, held) for start, stop, held in pieces})
                    raise WriteAfterFreeError(
                        f"{len(changed)} bytes between {begin + int(changed[0])} and "
                        f"{begin + int(changed[-1])} were written after the block at {begin} was "
                        f"freed; it was last {owner()}"
                    )

    def _cut(self, start: int, end: int) -> list[tuple[int, int, Owner]]:
        """Take what is poisoned in ``[start, end)`` out of the list."""
        extents = self._extents
        position = extents.bisect_right(start) - 1
        position = max(position, 0)
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
