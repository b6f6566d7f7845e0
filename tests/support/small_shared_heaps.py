"""Shared heaps of eight chunks: what their tests put into them, and ask of their owner."""

from __future__ import annotations

import time

from shared_heaps import contents, keeper_of, key_of

from kvheap import SharedHeap
from kvheap.shared.stats import KeeperStats

__all__ = ["KEYS", "MANY", "NUM_CHUNKS", "put", "settled"]

NUM_CHUNKS = 8

KEYS = [key_of(number) for number in range(4)]

MANY = [key_of(number) for number in range(100, 100 + NUM_CHUNKS)]
"""As many as fit."""


def put(heap: SharedHeap, keys: list[bytes]) -> list[bool]:
    """Store the chunks of keys; which of them are then there."""
    found: list[bool] = heap.store(keys, contents(keys)).tolist()
    return found


def settled(heap: SharedHeap) -> KeeperStats:
    """What the keeper says once nothing waits any more."""
    end_s = time.monotonic() + 30
    while (keeper := keeper_of(heap)).waiting_places or keeper.pending_chunks:
        assert time.monotonic() < end_s, keeper
        time.sleep(0.005)
    return keeper
