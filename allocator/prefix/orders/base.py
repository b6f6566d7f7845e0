"""``EvictionOrder``: which chunks of a heap leave next, by their keys and sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from kvheap.addresses.arguments import require_count

__all__ = ["EvictionOrder", "require_heap_bytes", "require_new", "require_num_bytes", "suffices"]

K = TypeVar("K", bound=Hashable)


class EvictionOrder(Protocol[K]):
    """An order over stored chunks of unlike sizes. It has keys and sizes, and frees nothing.

    A ``PrefixIndex`` takes chunks in use out of its policy's order; here they stay in, and
    :meth:`evict_until` steps over those that its caller says are pinned. That fits a scheduler
    that pins a few chunks for a short time, such as vLLM's.
    """

    def insert(self, key: K, size_bytes: int, group: int) -> None:
        """Enter a chunk, as the one used last; of a request the tail first. Its first use.

        Raises:
            ValueError: the key is in the order, or the size is not positive; nothing changes.
        """

    def touch(self, keys: Sequence[K]) -> None:
        """Note that one request used chunks, the head of its prefix first.

        Keys that are not in the order are skipped.
        """

    def settle(self, keys: Sequence[K]) -> None:
        """Put the chunks of one request, the head first, in the order of their need: tail first.

        It is for chunks that were inserted in several steps, and not a use of them. Keys that are
        not in the order are skipped.
        """

    def remove(self, key: K) -> None:
        """Forget a chunk that leaves for another reason than an eviction.

        Raises:
            KeyError: the key is not in the order.
        """

    def evict(self, keys: Iterable[K]) -> None:
        """Remove chunks that the caller evicts by a choice of its own.

        The order takes them for evicted: it may remember them, as those of :meth:`evict_until`.

        Raises:
            KeyError: a key is not in the order; those before it have been removed.
        """

    def evict_until(self, num_bytes: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Remove chunks with ``num_bytes`` together, and return them in the order of their leaving.

        Args:
            num_bytes: to free at least, positive.
            is_pinned: whether a chunk must stay. It must not change the order.

        Returns:
            No more chunks than reach ``num_bytes``; ``[]`` if those that are not pinned have fewer
            bytes: then nothing has changed.

        Raises:
            ValueError: ``num_bytes`` is not positive; nothing changes.
        """

    def reset(self) -> None:
        """Forget all chunks, and what was learnt from them."""

    def __len__(self) -> int:
        """How many chunks are in the order."""

    def __iter__(self) -> Iterator[K]:
        """The chunks, those that would leave first before those that would leave last.

        Exactly so for LRU. Where what leaves next depends on more than the order of use, it is the
        order in which they are to be inserted again into a new order.
        """

    def __contains__(self, key: object) -> bool:
        """Whether a chunk is in the order."""


def require_heap_bytes(heap_bytes: object) -> int:
    """A heap's bytes, as an ``int``; raise ``ValueError`` or ``TypeError`` for what is none."""
    as_int = require_count("heap_bytes", heap_bytes)
    if not as_int:
        raise ValueError("heap_bytes must be positive, got 0")
    return as_int


def require_new(key: object, size_bytes: int, is_in: bool) -> None:
    """Raise the errors of :meth:`EvictionOrder.insert`."""
    if is_in:
        raise ValueError(f"the key {key!r} is in the order already: remove it first")
    if size_bytes <= 0:
        raise ValueError(f"size_bytes of {key!r} must be positive, got {size_bytes}")


def require_num_bytes(num_bytes: int) -> None:
    """Raise the error of :meth:`EvictionOrder.evict_until`."""
    if num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, got {num_bytes}")


def suffices(
    chunks: Iterable[tuple[K, int]], num_bytes: int, is_pinned: Callable[[K], bool]
) -> bool:
    """Whether chunks, given with their sizes, have ``num_bytes`` that are not pinned.

    Looks at no more of them than it needs to know.
    """
    for key, size_bytes in chunks:
        if not is_pinned(key):
            num_bytes -= size_bytes
            if num_bytes <= 0:
                return True
    return False
