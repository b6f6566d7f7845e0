"""``hit_rate``: what a policy finds again of a trace in a heap of some size, without any bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvheap.prefix.index import PrefixIndex
from kvheap.prefix.policies import EvictionPolicy

__all__ = ["hit_rate"]


def hit_rate(requests: Iterable[Sequence[int]], policy: EvictionPolicy, capacity: int) -> float:
    """Hits over block references, 0.0 to 1.0, in a heap that holds ``capacity`` chunks.

    It serves requests as ``Replay`` does, and finds the same hits; it takes about a fifth of the
    time, since it stores and compares nothing.

    Args:
        requests: the ids of each request's chunks.
        policy: a new one, which decides what is evicted.
        capacity: chunks that the heap holds.

    Raises:
        ValueError: a request has more chunks than that.

    >>> from kvheap.prefix.policies import LRU
    >>> hit_rate([[1, 2], [1, 2, 3], [1, 4]], LRU(), 3)
    0.42857142857142855
    """
    index: PrefixIndex[int, None] = PrefixIndex(policy)
    hits = references = 0
    for ids in requests:
        hits += index.prefix_length(ids)
        references += len(ids)
        distinct = list(dict.fromkeys(ids))
        missing = index.missing(distinct)
        with index.hold([key for key in distinct if key in index]) as hold:
            index.touch(hold.keys)
            excess = len(index) + len(missing) - capacity
            if excess > 0 and index.evict(excess) is None:
                raise ValueError(
                    f"capacity is {capacity} chunks, but a request has {len(distinct)}"
                )
            index.begin(missing, [None] * len(missing), 1).complete()
            request = index.hold(distinct)
        request.release()
    return hits / references if references else 0.0
