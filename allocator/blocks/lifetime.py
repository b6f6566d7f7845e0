"""``Lifetime``: which batches of an allocator are live, and when freed bytes may be reused.

An allocator has one :class:`Lifetime`. It keeps

- the live batches, with allocation time and, if recorded, allocation site, to list leaks;
- the blocks of batches that were dropped without being freed. A finalizer can run anywhere, even in
  the middle of an allocation on the same thread, so it takes no lock: it appends to a queue, which
  the allocator's next operation drains;
- the blocks that were freed while a stream still used them. Their bytes return to the free list
  once the events recorded at the free have completed;
- the leases: pins that expire.

The queues are deques and dicts. Each single operation on them is atomic, on free-threaded builds
too. Only draining them takes a lock. A thread that finds the lock taken leaves the work to the
thread that holds it; only an allocation that waits for bytes waits for the lock, with a time limit.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.counts import RowCounts
from kvheap.blocks.lease import Lease, LeaseHolder, LeaseQueue
from kvheap.blocks.release import Release
from kvheap.blocks.report import LiveBlocks
from kvheap.blocks.sites import Site, callers, site_lines
from kvheap.device.events import POLL_SECONDS, ReleaseVoidError, Stream
from kvheap.forks import starts_over_after_fork

__all__ = ["Lifetime", "TrackedBatch"]

CHECKED_RELEASES = 8
"""Pending releases that one operation checks; see benchmarks/NOTES.md."""


class TrackedBatch(Protocol):
    """The part of a batch that :class:`Lifetime` uses."""

    born: float
    site: Site
    layout: BlockLayout
    counts: RowCounts

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes of each block."""
        ...


class Lifetime:
    """Tracks the blocks of one allocator from allocation until their bytes may be reused.

    - batches: ``begin``, ``forget``, ``drop``, ``live``;
    - freed blocks: ``release``, ``pending_bytes``, ``dropped_blocks``;
    - leases: ``grant_lease``, ``expire_leases``, ``expired_leases``;
    - reclaiming: ``has_work``, ``settle``, ``wait_for_streams``, ``wait_for_live``.

    Args:
        give_back: returns the bytes of a release to the free list.
        site_frames: number of callers to record for each allocation; 0: none.
    """

    def __init__(self, give_back: Callable[[Release], None], site_frames: int) -> None:
        if site_frames < 0:
            raise ValueError(f"trace_frames must be non-negative, got {site_frames}")
        self._give_back = give_back
        self._site_frames = site_frames
        self._live: dict[int, weakref.ref[TrackedBatch]] = {}
        self._dropped: deque[tuple[Release, tuple[Stream, ...]]] = deque()
        self._pending: deque[Release] = deque()
        self._in_hand: Release | None = None
        self._told_of_lost_events = False
        self._leases = LeaseQueue()
        self._settling = threading.Lock()
        self.dropped_blocks = 0
        """Number of blocks that were dropped without being freed, and then reclaimed."""
        starts_over_after_fork(self)

    # -- batches -------------------------------------------------------------------------------

    def begin(self, batch: TrackedBatch) -> None:
        """Register a batch that was just allocated."""
        batch.born = time.monotonic()
        if self._site_frames:
            batch.site = callers(self._site_frames)
        self._live[id(batch)] = weakref.ref(batch)

    def forget(self, batch: TrackedBatch) -> None:
        """Remove a batch that is being finalized. Takes no lock."""
        self._live.pop(id(batch), None)

    def drop(self, release: Release, streams: tuple[Stream, ...]) -> None:
        """Queue the blocks of a finalized batch, and the streams that used them. Takes no lock."""
        self._dropped.append((release, streams))

    def live(self) -> tuple[LiveBlocks, ...]:
        """All live blocks, grouped by site and block layout, oldest first. O(batches)."""
        groups: dict[tuple[BlockLayout, Site], list[tuple[int, int, int, float]]] = {}
        now = time.monotonic()
        for reference in self._live.copy().values():
            batch = reference()
            if batch is None:
                continue
            live, pinned = batch.counts.count_live()
            if live:
                row = (live, pinned, batch.allocated_bytes, now - batch.born)
                groups.setdefault((batch.layout, batch.site), []).append(row)
        found = [
            LiveBlocks(
                layout=str(layout),
                site=site_lines(site),
                num_blocks=sum(live for live, _, _, _ in rows),
                num_bytes=sum(live * size for live, _, size, _ in rows),
                num_pinned=sum(pinned for _, pinned, _, _ in rows),
                pinned_bytes=sum(pinned * size for _, pinned, size, _ in rows),
                age_s=max(age for _, _, _, age in rows),
            )
            for (layout, site), rows in groups.items()
        ]
        return tuple(sorted(found, key=lambda group: -group.age_s))

    # -- freed blocks --------------------------------------------------------------------------

    def release(self, release: Release) -> None:
        """Give blocks back: now, or once the events of the streams that use them have completed."""
        if release.events:
            self._pending.append(release)
        else:
            self._give_back(release)

    @property
    def pending_bytes(self) -> int:
        """Freed bytes that streams still use."""
        in_hand, pending = self._in_hand, self._pending.copy()
        known = [*pending, in_hand] if in_hand and in_hand not in pending else pending
        return sum(release.num_bytes for release in known)

    # -- leases --------------------------------------------------------------------------------

    def grant_lease(self, batch: LeaseHolder, row: int, ttl: float) -> Lease:
        """Pin a block for ``ttl`` seconds."""
        return self._leases.grant(batch, row, ttl)

    def expire_leases(self) -> None:
        """End the leases whose deadline has passed, so that pin counts exclude them."""
        self._leases.expire_due()

    @property
    def expired_leases(self) -> int:
        """Number of leases that have expired."""
        return self._leases.num_expired

    # -- reclaiming ----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether anything waits for :meth:`settle`."""
        return bool(self._dropped or self._pending or self._leases.entries)

    def settle(self, wait_s: float = 0.0, limit: int | None = CHECKED_RELEASES) -> bool:
        """Reclaim dropped blocks, freed blocks that streams no longer use, and expired leases.

        Args:
            wait_s: maximum seconds to wait while another thread is reclaiming. If that thread
                takes longer, this call does nothing.
            limit: how many pending releases to check; None: all.

        Returns:
            Whether bytes may have become free.
        """
        waited = not self._settling.acquire(blocking=False)
        if waited and not (wait_s > 0 and self._settling.acquire(timeout=wait_s)):
            return False
        try:
            found = self._leases.expire_due()
            found |= self._reclaim_dropped()
            found |= self._reclaim_pending(limit)
            return found or waited
        finally:
            self._settling.release()

    def wait_for_streams(self, seconds: float) -> bool:
        """Wait until bytes may have become free, for at most ``seconds``.

        Returns:
            Whether bytes may have become free.
        """
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            if self.settle(wait_s=left, limit=None):
                return True
            if left <= 0 or not self._pending:
                return False
            time.sleep(POLL_SECONDS)

    def wait_for_live(self, seconds: float) -> bool:
        """Wait until no stream uses live blocks, for at most ``seconds``.

        Returns:
            Whether all streams have finished.
        """
        deadline = time.monotonic() + seconds
        batches = [batch for reference in self._live.copy().values() if (batch := reference())]
        streams = [stream for batch in batches for stream in batch.counts.streams_of(None)]
        events = [stream.record_event() for stream in streams]
        while not all(event.query() for event in events):
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def start_over_after_fork(self) -> None:
        """Replace the locks of this object, its leases and its batches in a forked child."""
        self._settling = threading.Lock()
        self._leases.start_over_after_fork()
        for reference in self._live.copy().values():
            batch = reference()
            if batch is not None:
                batch.counts.start_over_after_fork()

    def _reclaim_dropped(self) -> bool:
        found = False
        while self._dropped:
            release, streams = self._dropped.popleft()
            # If this raises, the bytes stay allocated for ever; they are never handed out twice.
            try:
                events = tuple(stream.record_event() for stream in streams)
            except Exception:
                logging.getLogger("kvheap").exception(
                    "%d dropped bytes stay allocated: a stream that used them cannot be queried",
                    release.num_bytes,
                )
                continue
            self.dropped_blocks += len(release.blocks)
            self.release(replace(release, events=events))
            found = True
        return found

    def _reclaim_pending(self, limit: int | None) -> bool:
        """Check the ``limit`` releases checked longest ago, and give back those that have ended."""
        found = False
        count = len(self._pending)
        for _ in range(count if limit is None else min(count, limit)):
            self._in_hand = release = self._pending.popleft()
            state = "pending"
            try:
                state = self._state_of(release)
            finally:
                if state == "pending":
                    self._pending.append(release)
                    self._in_hand = None
            if state == "ended":
                self._give_back(release)
                found = True
            elif state == "failed":
                assert release.take_back is not None
                release.take_back()
            self._in_hand = None
        return found

    def _state_of(self, release: Release) -> str:
        """``pending``; ``ended``; or ``failed`` if the blocks become live again."""
        try:
            return "ended" if release.ended else "pending"
        except Exception as error:
            if release.take_back is not None and isinstance(error, ReleaseVoidError):
                return "failed"
            # The bytes stay allocated. Log this once, not at every check.
            if not self._told_of_lost_events:
                self._told_of_lost_events = True
                logging.getLogger("kvheap").exception(
                    "cannot tell whether a stream still uses %d freed bytes", release.num_bytes
                )
            return "pending"
