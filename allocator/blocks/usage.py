"""``usage_of``: how many blocks of an allocator are live, pinned or quarantined, and how old."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvheap.blocks.lifetime import Lifetime

__all__ = ["Usage", "usage_of"]

RECORDS_PER_TURN = 512
"""Batches that are looked at before other threads may run: less than a millisecond's worth."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The blocks of an allocator by state, at about one moment.

    Attributes:
        live_blocks, live_bytes: not freed, pinned ones included.
        pinned_blocks, pinned_bytes: live, with a pin count above zero.
        quarantined_bytes: freed, but a transfer that failed may still use them.
        oldest_s: seconds since the oldest live block was allocated; 0.0 if there is none.
    """

    live_blocks: int
    live_bytes: int
    pinned_blocks: int
    pinned_bytes: int
    quarantined_bytes: int
    oldest_s: float


def usage_of(lifetime: Lifetime) -> Usage:
    """Look at all batches and pending releases of an allocator; O(batches), takes no lock.

    Lets other threads run in between, so what changes meanwhile is counted as it was or as it is.
    """
    live_blocks = live_bytes = pinned_blocks = pinned_bytes = 0
    born = now = time.monotonic()
    for number, record in enumerate(lifetime.ledger.live.copy().values(), 1):
        live, pinned = record.counts.count_live()
        if live:
            size = record.addresses.block_bytes
            live_blocks += live
            live_bytes += live * size
            pinned_blocks += pinned
            pinned_bytes += pinned * size
            born = min(born, record.born)
        if not number % RECORDS_PER_TURN:
            time.sleep(0)
    return Usage(
        live_blocks=live_blocks,
        live_bytes=live_bytes,
        pinned_blocks=pinned_blocks,
        pinned_bytes=pinned_bytes,
        quarantined_bytes=lifetime.reclaimer.count_quarantined_bytes(),
        oldest_s=now - born,
    )
