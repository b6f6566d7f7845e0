"""``EvictionPolicy``: what a prefix index asks of the rule that chooses what to evict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

__all__ = ["CachedChunk", "EvictionPolicy", "total_bytes"]


class CachedChunk:
    """One chunk, as a policy sees it. Two chunks are equal only if they are the same object.

    Attributes:
        size_bytes: bytes that its eviction frees.
        fingerprint: the hash of its key. It tells whether a chunk that is stored now was evicted
            before; two keys with one fingerprint cost hit rate, nothing else.
        uses, rank, queue: the policy's own notes. Nothing else reads or writes them, so they are
            not set before the policy sets them. They stay while the chunk is in use.
    """

    __slots__ = ("fingerprint", "queue", "rank", "size_bytes", "uses")

    size_bytes: int
    fingerprint: int
    uses: int
    rank: Any
    queue: Any

    def __init__(self, size_bytes: int, fingerprint: int) -> None:
        self.size_bytes = size_bytes
        self.fingerprint = fingerprint


class EvictionPolicy(ABC):
    """An order over the chunks that may be evicted, kept for one ``PrefixIndex``.

    A chunk that a hold protects is taken out of the order, and put back when the last hold on it
    ends. So an eviction never steps over chunks in use.

    Sequences of chunks are in the order of a request, the head of the prefix first. Within one
    sequence the tail must be evicted before the head, because a tail without its head is of no
    use.

    An exception, for example a ``KeyboardInterrupt``, may end any method half-way. The index then
    calls the same method again with the same chunks; but :meth:`put_back` after an interrupted
    :meth:`take_out`, and nothing after an interrupted :meth:`evict`, which has not happened. Then
    it calls :meth:`repair`. So every method must accept chunks whose change was made already.

    ==================  ===================================================
    purpose             methods
    ==================  ===================================================
    chunks come and go  ``insert``, ``remove``, ``evict``, ``clear``
    chunks are used     ``touch``, ``take_out``, ``put_back``
    upkeep              ``repair``, ``check``, ``len``, ``in``
    ==================  ===================================================
    """

    name: ClassVar[str]
    """What the command line calls the policy."""

    has_index = False
    """Whether the policy was given to an index."""

    @abstractmethod
    def insert(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks into the order that have just become ready. It counts as their first use."""

    @abstractmethod
    def touch(self, chunks: Sequence[CachedChunk]) -> None:
        """Note that one request used chunks; each may be in the order or taken out."""

    @abstractmethod
    def take_out(self, chunks: Sequence[CachedChunk]) -> None:
        """Take chunks that are in use from now on out of the order."""

    @abstractmethod
    def put_back(self, chunks: Sequence[CachedChunk]) -> None:
        """Put chunks that are no longer in use back into the order. It does not count as a use."""

    @abstractmethod
    def remove(self, chunks: Sequence[CachedChunk]) -> None:
        """Forget chunks that end without being evicted; each may be in the order or taken out."""

    @abstractmethod
    def evict(self, num_bytes: int) -> Sequence[CachedChunk]:
        """Choose chunks to evict, forget them, and return them in the order of their eviction.

        Args:
            num_bytes: how many bytes to free at least, positive. The order holds as many.

        Returns:
            As few chunks as reach ``num_bytes`` when they are taken in the policy's order.
        """

    @abstractmethod
    def clear(self) -> None:
        """Forget all chunks, also those in use and those remembered after their eviction."""

    @abstractmethod
    def repair(self, evictable: Sequence[CachedChunk], in_use: Sequence[CachedChunk]) -> None:
        """Make the order hold exactly ``evictable``, and compute every counter anew.

        Args:
            evictable: every chunk that belongs into the order; it may be missing there.
            in_use: every chunk that is taken out; it may still be in the order.
        """

    @abstractmethod
    def check(
        self,
        evictable: Sequence[CachedChunk],
        in_use: Sequence[CachedChunk],
        require: Callable[[bool, str], None],
    ) -> None:
        """Call ``require(holds, message)`` for every invariant. O(n)."""

    def __repr__(self) -> str:
        """How many chunks may be evicted."""
        return f"{type(self).__name__}({len(self)} chunks)"

    @abstractmethod
    def __len__(self) -> int:
        """How many chunks are in the order, and may be evicted."""

    @abstractmethod
    def __contains__(self, chunk: object) -> bool:
        """Whether the chunk is in the order."""


def total_bytes(chunks: Iterable[CachedChunk]) -> int:
    """The bytes of chunks."""
    return sum([chunk.size_bytes for chunk in chunks])
