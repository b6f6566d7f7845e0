"""Deadlines on a clock of this machine that goes on while the machine is suspended."""

from __future__ import annotations

import time
from functools import partial

__all__ = ["Deadline", "now_s"]

CLOCK_ERROR = 1e-3
"""By this share of a lease, the clocks of two machines may differ in speed; NTP allows 5e-4."""

MAX_S = 7 * 86_400.0
"""What a longer wait is taken for: ``poll`` and ``select`` count milliseconds in 32 bits."""

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


now_s = partial(time.clock_gettime, _CLOCK)
"""Seconds on that clock."""


class Deadline:
    """A moment some seconds after another.

    For a lease that another machine gives: counted from before it was asked for, on the clock of
    the machine that asked, so that it is over here before it is over there.

    Args:
        seconds: the length; one of more than a week ends after a week.
        since: the beginning, by :func:`now_s`; None: now.
    """

    __slots__ = ("at", "seconds")

    def __init__(self, seconds: float, since: float | None = None) -> None:
        self.seconds = seconds
        if since is None:
            since = now_s()
        self.at = since + (seconds if seconds < MAX_S else MAX_S) * (1 - CLOCK_ERROR)

    @property
    def has_passed(self) -> bool:
        """Whether it is now or in the past."""
        return now_s() >= self.at

    @property
    def left_s(self) -> float:
        """Seconds until then, at least 0."""
        return max(self.at - now_s(), 0.0)
