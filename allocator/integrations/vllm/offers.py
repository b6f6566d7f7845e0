"""``OfferCounts``: how often chunks were offered, so that only those seen again are stored.

Needs no vLLM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

from kvheap.addresses.arguments import require_count

__all__ = ["OfferCounts"]

K = TypeVar("K", bound=Hashable)


class OfferCounts(Generic[K]):
    """Counts of the keys that were offered last.

    As in vLLM, an offer does not push the counts of its own keys out: if they alone fill the table,
    its new keys are not counted.

    Args:
        threshold: how often a key must be offered until it is admitted.
        max_keys: how many keys are counted; the one that was offered longest ago goes first.

    Raises:
        ValueError: ``max_keys`` is not positive.

    >>> counts = OfferCounts(2, max_keys=100)
    >>> counts.admitted(["a", "b"]), counts.admitted(["b", "c"])
    ([], ['b'])
    """

    def __init__(self, threshold: int, max_keys: int) -> None:
        self._threshold = require_count("threshold", threshold)
        self._max_keys = require_count("max_keys", max_keys, at_least=1)
        self._counts: OrderedDict[K, int] = OrderedDict()

    def admitted(self, keys: Collection[K]) -> list[K]:
        """Count an offer of distinct keys, and return those that have been offered often enough."""
        counts, threshold = self._counts, self._threshold
        known = [key for key in keys if key in counts]
        for key in known:
            counts.move_to_end(key)
            counts[key] += 1
        if len(known) < len(keys):
            num_others = len(counts) - len(known)
            for key in keys:
                if key in counts:
                    continue
                if len(counts) >= self._max_keys:
                    if not num_others:
                        continue
                    counts.popitem(last=False)
                    num_others -= 1
                counts[key] = 1
        return [key for key in keys if counts.get(key, 0) >= threshold]

    def __len__(self) -> int:
        """How many keys are counted."""
        return len(self._counts)
