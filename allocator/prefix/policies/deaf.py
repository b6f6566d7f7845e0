"""``Deaf``: an eviction policy that takes no notice of anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvheap.prefix.policies.base import CachedChunk, EvictionPolicy

__all__ = ["Deaf"]


class Deaf(EvictionPolicy):
    """Stands in for a policy that has failed, while a change is made without it."""

    name = "deaf"

    def insert(self, chunks: Sequence[CachedChunk]) -> None:
        """Ignored."""

    def touch(self, chunks: Sequence[CachedChunk]) -> None:
        """Ignored."""

    def take_out(self, chunks: Sequence[CachedChunk]) -> None:
        """Ignored."""

    def put_back(self, chunks: Sequence[CachedChunk]) -> None:
        """Ignored."""

    def remove(self, chunks: Sequence[CachedChunk]) -> None:
        """Ignored."""

    def evict(self, num_bytes: int) -> Sequence[CachedChunk]:
        """Nothing: it has no chunks."""
        return []

    def clear(self) -> None:
        """Ignored."""

    def repair(self, evictable: Sequence[CachedChunk], in_use: Sequence[CachedChunk]) -> None:
        """Ignored."""

    def check(
        self,
        evictable: Sequence[CachedChunk],
        in_use: Sequence[CachedChunk],
        require: Callable[[bool, str], None],
    ) -> None:
        """Nothing to check."""

    def __len__(self) -> int:
        """Always 0."""
        return 0

    def __contains__(self, chunk: object) -> bool:
        """Always False."""
        return False
