"""``GhostList``: what was evicted lately, without its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvheap.prefix.policies.base import CachedChunk

__all__ = ["GhostList"]


class GhostList:
    """The fingerprints of evicted chunks with a number each, the oldest first. O(1) each.

    Attributes:
        num_bytes: bytes that the remembered chunks had.
    """

    __slots__ = ("_ghosts", "num_bytes")

    def __init__(self) -> None:
        self._ghosts: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self.num_bytes = 0

    def remember(self, chunk: CachedChunk, note: int = 0) -> None:
        """Remember a chunk, as the newest, with a note."""
        ghosts, fingerprint, size_bytes = self._ghosts, chunk.fingerprint, chunk.size_bytes
        before = ghosts.pop(fingerprint, None)
        ghosts[fingerprint] = (size_bytes, note)
        self.num_bytes += size_bytes if before is None else size_bytes - before[0]

    def recall(self, chunk: CachedChunk) -> int | None:
        """Forget a chunk, and return its note; None if it is not remembered."""
        ghost = self._ghosts.pop(chunk.fingerprint, None)
        if ghost is None:
            return None
        self.num_bytes -= ghost[0]
        return ghost[1]

    def trim(self, max_bytes: float) -> None:
        """Forget the oldest, until those that remain had at most ``max_bytes``."""
        while self.num_bytes > max_bytes and self._ghosts:
            _, (size_bytes, _) = self._ghosts.popitem(last=False)
            self.num_bytes -= size_bytes

    def clear(self) -> None:
        """Forget all."""
        self._ghosts.clear()
        self.num_bytes = 0

    def repair(self) -> None:
        """Count the bytes anew after an interruption. O(n)."""
        self.num_bytes = sum(size_bytes for size_bytes, _ in self._ghosts.values())

    def check(self, require: Callable[[bool, str], None]) -> None:
        """Call ``require(holds, message)`` for every invariant. O(n)."""
        counted = sum(size_bytes for size_bytes, _ in self._ghosts.values())
        require(counted == self.num_bytes, "the bytes of a ghost list are miscounted")

    def __len__(self) -> int:
        """How many chunks are remembered."""
        return len(self._ghosts)
