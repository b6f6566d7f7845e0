"""Reports of who holds which blocks: :class:`LiveBlocks`, and :class:`FullReport` for a full heap.

A heap's :class:`FullReporter` passes reports of failed allocations to the user's callback, at most
once per interval. A heap that serves as a cache is full most of the time, so nobody is told by
default, and a report costs the thread whose allocation failed a few counters. Who holds the blocks
is found when somebody reads it; :func:`log_full_report` does that on a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from kvheap.interrupts import is_interrupt

__all__ = ["FullReport", "FullReporter", "LiveBlocks", "log_full_report", "weakly"]

LOGGER = logging.getLogger("kvheap")


HEAD_START_S = 0.02
"""Seconds for which a logging thread lets others go first: it keeps the GIL for 5 ms at a time."""


@dataclass(frozen=True, slots=True)
class LiveBlocks:
    """Live blocks that were allocated at one site with one block layout.

    Attributes:
        layout: their block layout, as text.
        site: their allocation site, as ``file:line in function``, innermost caller first; empty
            if sites are not recorded.
        num_blocks: number of live blocks.
        num_bytes: their allocated bytes.
        num_pinned: number of pinned blocks among them.
        pinned_bytes: allocated bytes of the pinned blocks.
        age_s: seconds since the oldest block was allocated.
    """

    layout: str
    site: tuple[str, ...]
    num_blocks: int
    num_bytes: int
    num_pinned: int
    pinned_bytes: int
    age_s: float

    def __str__(self) -> str:
        """One line, plus one line per recorded caller."""
        pinned = f", {self.num_pinned:,} pinned" if self.num_pinned else ""
        head = (
            f"{self.num_blocks:,} blocks ({self.num_bytes:,} bytes) of {self.layout}{pinned}, "
            f"oldest {self.age_s:.1f} s"
        )
        return "\n    ".join((head, *self.site))


@dataclass(frozen=True)
class FullReport:
    """Why an allocation failed: what was requested, what is free, and who holds the rest.

    The counters are those of the failure. ``live``, and what is computed from it, is found when it
    is first read, in O(batches): hand the report to another thread if that must not wait.

    Attributes:
        requested_bytes: bytes that the requested blocks would take in the heap.
        num_blocks: number of requested blocks.
        heap_bytes: bytes of the heap.
        free_bytes: free bytes.
        largest_free_bytes: bytes of the largest free extent.
        free_extents: number of free extents.
        pending_bytes: freed bytes that streams still use.
        failures: failed allocations since the previous report, including this one.
        find_live: finds ``live``.
    """

    requested_bytes: int
    num_blocks: int
    heap_bytes: int
    free_bytes: int
    largest_free_bytes: int
    free_extents: int
    pending_bytes: int
    failures: int
    find_live: Callable[[], tuple[LiveBlocks, ...]] = field(repr=False, compare=False)

    SHOWN = 8

    @cached_property
    def live(self) -> tuple[LiveBlocks, ...]:
        """The live blocks, by allocation site and block layout, oldest first. O(batches) once."""
        return self.find_live()

    @property
    def live_blocks(self) -> int:
        """Number of live blocks."""
        return sum(group.num_blocks for group in self.live)

    @property
    def live_bytes(self) -> int:
        """Allocated bytes of the live blocks."""
        return sum(group.num_bytes for group in self.live)

    @property
    def pinned_blocks(self) -> int:
        """Number of live blocks with a pin count above zero."""
        return sum(group.num_pinned for group in self.live)

    @property
    def pinned_bytes(self) -> int:
        """Allocated bytes of the pinned blocks."""
        return sum(group.pinned_bytes for group in self.live)

    def __reduce__(self) -> tuple[Any, ...]:
        counters = (
            self.requested_bytes,
            self.num_blocks,
            self.heap_bytes,
            self.free_bytes,
            self.largest_free_bytes,
            self.free_extents,
            self.pending_bytes,
            self.failures,
        )
        return type(self), (*counters, partial(tuple, self.live))

    def __str__(self) -> str:
        """A multi-line text for a log. O(batches) if ``live`` was not read before."""
        lines = [
            f"cannot allocate {self.num_blocks:,} blocks, {self.requested_bytes:,} bytes: "
            f"{self.free_bytes:,} of {self.heap_bytes:,} bytes are free in "
            f"{self.free_extents:,} extents, the largest of {self.largest_free_bytes:,}; "
            f"{self.pending_bytes:,} wait for streams ({self.failures:,} failures since the last "
            f"report)",
            f"live: {self.live_blocks:,} blocks, {self.live_bytes:,} bytes; pinned: "
            f"{self.pinned_blocks:,} blocks, {self.pinned_bytes:,} bytes",
        ]
        lines += [f"  {group}" for group in self.live[: self.SHOWN]]
        if len(self.live) > self.SHOWN:
            lines.append(f"  and {len(self.live) - self.SHOWN} other groups")
        return "\n".join(lines)


def log_full_report(report: FullReport) -> None:
    """Write a report to the ``kvheap`` logger, as a warning, on a thread of its own.

    Pass it as ``on_full`` to find out who fills a heap that should not be full.
    """
    threading.Thread(target=_log, args=(report,), name="kvheap-report", daemon=True).start()


def _log(report: FullReport) -> None:
    time.sleep(HEAD_START_S)
    LOGGER.warning("%s", report)


class FullReporter:
    """Counts failed allocations, and reports at most one per interval.

    Args:
        on_full: called with each report, on the thread whose allocation failed; None: nothing is
            reported.
        interval_s: minimum seconds between two reports.

    Raises:
        TypeError: ``on_full`` cannot be called.
    """

    def __init__(self, on_full: Callable[[FullReport], None] | None, interval_s: float) -> None:
        if on_full is not None and not callable(on_full):
            raise TypeError(f"on_full must be a function of a report or None, got {on_full!r}")
        self._on_full = on_full
        self._interval_s = interval_s
        self._next_report = 0.0
        self.failures = 0
        """Number of failed allocations since the last report."""
        self.total_failures = 0
        """Number of failed allocations so far."""

    def failed(self, make_report: Callable[[], FullReport]) -> None:
        """Count a failure, and report it if a report is due. Errors of ``on_full`` are logged."""
        self.failures += 1
        self.total_failures += 1
        if self._on_full is None:
            return
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + self._interval_s
        report = make_report()
        self.failures = 0
        try:
            self._on_full(report)
        except Exception as error:  # a failing callback must not make the allocation raise
            if is_interrupt(error):
                raise
            LOGGER.exception("on_full failed")


def weakly(
    find_live: Callable[[], tuple[LiveBlocks, ...]],
) -> Callable[[], tuple[LiveBlocks, ...]]:
    """The same bound method, without keeping its object alive; finds nothing once that is gone.

    A report that somebody keeps must not keep a heap's memory.
    """
    reference = weakref.WeakMethod(find_live)

    def found() -> tuple[LiveBlocks, ...]:
        method = reference()
        return () if method is None else method()

    return found
