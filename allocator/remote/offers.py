"""``Offers``: what other nodes have asked this one to read."""

from __future__ import annotations

import queue
from dataclasses import dataclass

__all__ = ["MAX_OFFERS", "Offer", "Offers"]

MAX_OFFERS = 1024
"""Offers that wait; further ones are refused."""


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
    """A bounded queue of offers."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Offer] = queue.SimpleQueue()

    def put(self, offer: Offer) -> bool:
        """Add an offer; returns whether there was room."""
        if self._queue.qsize() >= MAX_OFFERS:
            return False
        self._queue.put(offer)
        return True

    def next(self, timeout_s: float) -> Offer | None:
        """The offer that has waited longest; None if none comes in time."""
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
