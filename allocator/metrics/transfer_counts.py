"""``TransferCounts``: the transfers of this process by direction and path, and how they ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from kvheap.device.completion import Completion, in_flight
from kvheap.device.transfer import Transfer
from kvheap.kernels.untraced import untraced
from kvheap.probes import Probe

__all__ = ["PathCounts", "TransferCounts", "transfer_counts"]

Route = tuple[str, str]
"""Direction and path."""

MAX_WATCHED = 4096
"""From this many transfers on, the oldest are looked at before others begin."""

CHECKED = 8
"""How many of them by each."""


class PathCounts:
    """Counts of the transfers of one route: begun, bytes, runs, failed."""

    __slots__ = ("failed", "num_bytes", "num_runs", "num_transfers")

    def __init__(self) -> None:
        self.num_transfers = self.num_bytes = self.num_runs = self.failed = 0


class _Watched:
    """A transfer that has not been seen to end."""

    __slots__ = ("completion", "counts", "has_failed")

    def __init__(self, completion: Completion, counts: PathCounts) -> None:
        self.completion = completion
        self.counts = counts
        self.has_failed = False


class TransferCounts:
    """Counts transfers from the moment somebody watches; before that, they cost nothing.

    A failure is counted when it is found: by :meth:`look`, or when many transfers have begun.
    """

    def __init__(self) -> None:
        self._counts: dict[Route, PathCounts] = {}
        self._watched: deque[_Watched] = deque()
        self._probe = Probe([(Transfer, "__init__")], self._counting)

    def start(self) -> None:
        """Count the transfers that begin from now on, for as long as the process lives."""
        if not self._probe.is_attached:
            self._probe.attach()

    def look(self) -> Mapping[Route, PathCounts]:
        """The counts, after a look at the transfers that were in flight."""
        for _ in range(len(self._watched)):
            if not self._look_at_oldest():
                break
        return self._counts.copy()

    @property
    def num_in_flight(self) -> int:
        """Transfers that are not known to have ended."""
        return len(in_flight)

    @property
    def num_quarantined(self) -> int:
        """Transfers that have failed, and may still use their bytes."""
        stuck = sum(watched.completion.is_stuck for watched in self._watched.copy())
        return stuck + in_flight.num_lost

    def _counting(self, init: Callable[..., None], name: str) -> Callable[..., None]:
        @untraced
        @wraps(init)
        def __init__(  # noqa: N807
            transfer: Transfer, completion: Completion, *arguments: Any, **options: Any
        ) -> None:
            init(transfer, completion, *arguments, **options)
            is_foreign = transfer.direction == "foreign"  # then the path is any text
            route = transfer.direction, "foreign" if is_foreign else transfer.path
            counts = self._counts.get(route) or self._counts.setdefault(route, PathCounts())
            counts.num_transfers += 1
            counts.num_bytes += transfer.num_bytes
            counts.num_runs += transfer.num_runs
            if completion.is_queued or completion.is_done or transfer.is_captured:
                return  # a copy that is a launch, and part of the stream's work
            self._watched.append(_Watched(completion, counts))
            if len(self._watched) > MAX_WATCHED:
                for _ in range(CHECKED):
                    self._look_at_oldest()

        return __init__

    def _look_at_oldest(self) -> bool:
        """Take the oldest transfer off the queue, or put it back; False if there is none."""
        try:
            watched = self._watched.popleft()
        except IndexError:
            return False
        completion = watched.completion
        has_ended, is_stuck = completion.has_ended, completion.is_stuck
        if has_ended and completion.error is not None and not watched.has_failed:
            watched.has_failed = True
            watched.counts.failed += 1
        if not has_ended or is_stuck:
            self._watched.append(watched)
        return True


transfer_counts = TransferCounts()
"""The transfers of this process."""
