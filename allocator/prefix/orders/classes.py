"""``ChunkClasses``: chunks by what is known of them, and the one that is worth least."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from kvheap.prefix.orders.reuse import Table, age_of

__all__ = ["ChunkClasses", "ClassedChunk"]

K = TypeVar("K", bound=Hashable)

NEWEST_FACTOR = 1.05
"""A chunk used lately goes before older ones of its class only if it is worth less by so much."""


class ClassedChunk(Generic[K]):
    """What an order knows of a chunk.

    Attributes:
        key, size_bytes, group: of the chunk.
        uses: how often it was used.
        number: of its class, which follows from its uses.
        used_at: the number of references when it was used last.
    """

    __slots__ = ("group", "key", "number", "size_bytes", "used_at", "uses")

    def __init__(self, key: K, size_bytes: int, group: int) -> None:
        self.key = key
        self.size_bytes = size_bytes
        self.group = group
        self.uses = 1
        self.number = 0
        self.used_at = 0


class ChunkClasses(Generic[K]):
    """Lists of chunks, one for each class, each in the order of the last use.

    Only the ends of the lists are compared: where the worth of a class rises or falls with age, the
    least is at an end.

    Args:
        num_classes: how many there are.

    Attributes:
        lists: the chunks by key, of each class.
    """

    __slots__ = ("lists",)

    def __init__(self, num_classes: int) -> None:
        self.lists: list[OrderedDict[K, ClassedChunk[K]]] = [
            OrderedDict() for _ in range(num_classes)
        ]

    def cheapest(
        self, worths: Table, now: int, newest_too: bool, is_pinned: Callable[[K], bool]
    ) -> Iterator[ClassedChunk[K]]:
        """Chunks that are not pinned, the one that is worth least first; of equals the oldest.

        Args:
            worths: by class and age.
            now: the number of references so far.
            newest_too: whether the chunks used last may be worth less than older ones.
            is_pinned: tells which keys to leave out.
        """
        ends: list[_End[K]] = []
        for chunks in self.lists:
            if chunks:
                _push(ends, iter(chunks.values()), 1.0, worths, now, is_pinned)
                if newest_too and len(chunks) > 1:
                    newest = reversed(chunks.values())
                    _push(ends, newest, NEWEST_FACTOR, worths, now, is_pinned)
        heapq.heapify(ends)
        taken: set[ClassedChunk[K]] = set()
        while ends:
            _, _, number, factor, chunk, end = ends[0]
            if chunk not in taken:
                taken.add(chunk)
                yield chunk
            for chunk in end:
                if chunk not in taken and not is_pinned(chunk.key):
                    worth = factor * worths[chunk.number][age_of(now - chunk.used_at)]
                    heapq.heapreplace(ends, (worth, chunk.used_at, number, factor, chunk, end))
                    break
            else:
                heapq.heappop(ends)


_End = tuple[float, int, int, float, ClassedChunk[K], Iterator[ClassedChunk[K]]]
"""The next chunk of an end of a list, by its worth, its last use and the number of the end."""


def _push(
    ends: list[_End[K]],
    end: Iterator[ClassedChunk[K]],
    factor: float,
    worths: Table,
    now: int,
    is_pinned: Callable[[K], bool],
) -> None:
    """Append an end, if it has a chunk that is not pinned."""
    for chunk in end:
        if not is_pinned(chunk.key):
            worth = factor * worths[chunk.number][age_of(now - chunk.used_at)]
            ends.append((worth, chunk.used_at, len(ends), factor, chunk, end))
            return
