"""``Lease``: a pin that expires; ``LeaseQueue``: an allocator's leases, by deadline."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from typing import Protocol

from kvheap.addresses.arguments import as_seconds

__all__ = ["Lease", "LeaseHolder", "LeaseQueue"]


class LeaseHolder(Protocol):
    """The part of a batch that leases use."""

    def begin_lease(self, row: int) -> None:
        """Pin a row for a lease."""
        ...

    def end_lease(self, lease: Lease, row: int, state: str) -> bool:
        """Unpin it and set ``lease.state``; False if the lease had already ended."""
        ...


class Lease:
    """A pin that expires; see ``MemoryObj.pin``. Usable as a context manager."""

    __slots__ = ("_holder", "_row", "deadline", "state")

    def __init__(self, holder: LeaseHolder, row: int, deadline: float) -> None:
        self._holder: LeaseHolder | None = holder
        self._row = row
        self.deadline = deadline
        """When it expires, as a ``time.monotonic`` value in seconds."""
        self.state = "held"
        """``held``, ``released`` or ``expired``."""

    def release(self) -> bool:
        """End it now; False if it had already ended."""
        return self._end("released")

    def expire(self) -> bool:
        """End it because its deadline has passed; False if it had already ended."""
        return self._end("expired")

    def _end(self, state: str) -> bool:
        holder = self._holder
        if holder is None or not holder.end_lease(self, self._row, state):
            return False
        self._holder = None  # an ended lease keeps no block alive
        return True

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class LeaseQueue:
    """Leases in the order of their deadlines. Thread-safe.

    Released leases stay in the queue until their deadline, or until they outnumber the leases that
    are still held.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, Lease]] = []
        """A ``heapq`` of (deadline, number, lease)."""
        self._prune_at = 64
        self._number = itertools.count()
        self._lock = threading.Lock()
        self.num_expired = 0
        """Number of leases that have expired."""

    def __len__(self) -> int:
        """Number of queued leases."""
        return len(self.entries)

    def grant(self, holder: LeaseHolder, row: int, ttl: float) -> Lease:
        """Pin a row for ``ttl`` seconds.

        Raises:
            ValueError: ``ttl`` is not positive.
        """
        if not as_seconds("ttl", ttl) > 0:
            raise ValueError(f"ttl must be a positive number of seconds, got {ttl}")
        lease = Lease(holder, row, time.monotonic() + ttl)
        holder.begin_lease(row)
        with self._lock:
            if len(self.entries) >= self._prune_at:
                self.entries = [entry for entry in self.entries if entry[2].state == "held"]
                heapq.heapify(self.entries)
                self._prune_at = 2 * len(self.entries) + 64
            heapq.heappush(self.entries, (lease.deadline, next(self._number), lease))
        return lease

    def start_over_after_fork(self) -> None:
        """Replace the lock in a forked child."""
        self._lock = threading.Lock()

    def expire_due(self) -> bool:
        """End all leases whose deadline has passed; return whether there were any."""
        found = False
        while True:
            with self._lock:
                if not self.entries or self.entries[0][0] > time.monotonic():
                    return found
                lease = heapq.heappop(self.entries)[2]
            try:
                ended = lease.expire()
            except Exception:  # must not fail the unrelated operation that runs this
                ended = True
                logging.getLogger("kvheap").exception(
                    "a block whose lease expired stays allocated: its stream cannot be queried"
                )
            self.num_expired += ended
            found |= ended
