"""``Offers``: what other nodes have asked this one to read."""

from __future__ import annotations

import queue
from dataclasses import dataclass

__all__ = ["MAX_OFFERS", "Offer", "Offers"]

MAX_OFFERS = 1024
"""Offers that wait; further ones are refused."""

MAX_OFFERED_BYTES = 64 << 20
"""The same for the keys of all that wait; one offer has 34 MB at most."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Another node has chunks, and asks this one to read them.

    Attributes:
        name: the other node's name.
        address: where it listens; pass it to ``Node.connect``.
        keys: the keys of the chunks.
    """

    name: str
    address: str
    keys: tuple[bytes, ...]


class Offers:
    """A bounded queue of offers, for one thread that puts and others that get."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Offer] = queue.SimpleQueue()
        self._sizes: dict[int, int] = {}
        """Bytes of the keys of each offer that waits, by its ``id``."""

    def put(self, offer: Offer) -> bool:
        """Add an offer; returns whether there was room. O(offers that wait)."""
        size = sum(map(len, offer.keys))
        sizes = [*self._sizes.values()]
        if len(sizes) >= MAX_OFFERS or sum(sizes) + size > MAX_OFFERED_BYTES:
            return False
        self._sizes[id(offer)] = size  # first: it may be taken at once
        self._queue.put(offer)
        return True

    def next(self, timeout_s: float) -> Offer | None:
        """The offer that has waited longest; None if none comes in time."""
        try:
            offer = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self._sizes.pop(id(offer), None)
        return offer
