"""Reports of who holds which blocks: :class:`LiveBlocks`, and :class:`FullReport` for a full heap.

:class:`FullReporter` is the part of a heap that reports failed allocations, at most once in a
while, to a callable of the user's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["FullReport", "FullReporter", "LiveBlocks", "log_full_report"]


@dataclass(frozen=True, slots=True)
class LiveBlocks:
    """Live blocks that were allocated at one site with one block layout.

    Attributes:
        layout: what each of them holds, in words.
        site: where they were allocated, as ``file:line in function``, the innermost caller
            first; empty if sites are not recorded.
        num_blocks: how many are live.
        num_bytes: their allocated bytes.
        num_pinned: how many of them are pinned.
        pinned_bytes: allocated bytes of the pinned ones.
        age_s: seconds since the oldest of them was allocated.
    """

    layout: str
    site: tuple[str, ...]
    num_blocks: int
    num_bytes: int
    num_pinned: int
    pinned_bytes: int
    age_s: float

    def __str__(self) -> str:
        """One line, and one more for each caller."""
        pinned = f", {self.num_pinned:,} pinned" if self.num_pinned else ""
        head = (
            f"{self.num_blocks:,} blocks ({self.num_bytes:,} bytes) of {self.layout}{pinned}, "
            f"the oldest for {self.age_s:.1f} s"
        )
        return "\n    ".join((head, *self.site))


@dataclass(frozen=True, slots=True)
class FullReport:
    """Why an allocation failed: what was asked for, what is free, and who holds the rest.

    Attributes:
        requested_bytes: allocated bytes of all blocks asked for.
        num_blocks: how many blocks were asked for.
        heap_bytes: bytes of the heap.
        free_bytes: free bytes.
        largest_free_bytes: the largest free extent.
        free_extents: how many free extents there are.
        pending_bytes: freed bytes that a stream still works on.
        live: who holds what, the oldest first.
        failures: how many allocations have failed since the report before, this one included.
    """

    requested_bytes: int
    num_blocks: int
    heap_bytes: int
    free_bytes: int
    largest_free_bytes: int
    free_extents: int
    pending_bytes: int
    live: tuple[LiveBlocks, ...]
    failures: int

    SHOWN = 8

    @property
    def live_blocks(self) -> int:
        """How many blocks are live."""
        return sum(group.num_blocks for group in self.live)

    @property
    def live_bytes(self) -> int:
        """Allocated bytes of the live blocks."""
        return sum(group.num_bytes for group in self.live)

    @property
    def pinned_blocks(self) -> int:
        """How many live blocks have a pin count above zero."""
        return sum(group.num_pinned for group in self.live)

    @property
    def pinned_bytes(self) -> int:
        """Allocated bytes of the pinned blocks."""
        return sum(group.pinned_bytes for group in self.live)

    def __str__(self) -> str:
        """Several lines for a log."""
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
    """Write a report to the ``kvheap`` logger, as a warning."""
    logging.getLogger("kvheap").warning("%s", report)


class FullReporter:
    """Counts failed allocations, and reports one of them in every interval.

    Args:
        on_full: gets each report; None: nobody is told.
        interval_s: seconds between two reports at least.
    """

    def __init__(self, on_full: Callable[[FullReport], None] | None, interval_s: float) -> None:
        self._on_full = on_full
        self._interval_s = interval_s
        self._next_report = 0.0
        self.failures = 0
        """How many allocations have failed since the last report."""

    def failed(self, make_report: Callable[[], FullReport]) -> None:
        """Count a failure, and report it if a report is due. What ``on_full`` raises is logged."""
        self.failures += 1
        now = time.monotonic()
        if self._on_full is None or now < self._next_report:
            return
        self._next_report = now + self._interval_s
        report = make_report()
        self.failures = 0
        try:
            self._on_full(report)
        except Exception:  # a full heap is an answer, whatever becomes of its report
            logging.getLogger("kvheap").exception("on_full failed")
