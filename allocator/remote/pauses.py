"""How long to wait before the next look at a read."""

from __future__ import annotations

from collections.abc import Iterable

from kvheap.remote.deadlines import now_s
from kvheap.remote.link import Link
from kvheap.remote.reads import Read

__all__ = ["MAX_PAUSE_S", "WATCHED_S", "between_looks_s", "next_look_s"]

SPIN_S = 300e-6
"""So long after a read was posted, its state is asked without a pause."""

POLLS_PER_DURATION = 16
MAX_PAUSE_S = 1e-3
"""Longest pause between two looks at a read."""

WATCHED_S = 2e-3
"""So long after a thread that waits for a read has looked at it, the reader leaves it to it."""

QUARANTINE_PAUSE_S = 20e-3
"""The pause for reads that nobody waits for any more."""

IDLE_S = 0.1
"""Longest sleep: a read that its caller has begun tells nobody, but has a time limit."""


def between_looks_s(now: float, read: Read) -> float:
    """Seconds between two looks at a read that somebody waits for; 0 at first."""
    elapsed = now - read.posted_at
    return 0.0 if elapsed < SPIN_S else min(elapsed / POLLS_PER_DURATION, MAX_PAUSE_S)


def next_look_s(links: Iterable[Link]) -> float:
    """Seconds for which the reader has nothing to do, unless it is told something."""
    now, pause = now_s(), IDLE_S
    for link in links:
        for read in [*link.running]:
            if read.event.is_over:
                wait = QUARANTINE_PAUSE_S
            elif read.watched_until > now:
                wait = MAX_PAUSE_S
            elif read.parts and not read.running:
                return 0.0  # the next part is to be posted
            else:
                wait = between_looks_s(now, read)
            pause = min(pause, wait)
        ends = [read.limit.at for read in (*link.queued, *link.asked.values())]
        if link.probe_after is not None and link.has_to_tell:
            ends.append(link.probe_after.at)
        if ends:
            pause = min(pause, max(min(ends) - now, 0.0))
    return pause
