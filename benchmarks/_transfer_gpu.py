"""What the measurements of ``bench_transfer.py`` on a GPU share: buffers, clocks, and figures.

Each call is timed alone on an idle stream by two clocks: the host's, from before the call until the
event behind it has ended, and the events' own. Both include the upload of descriptors and the
submission. Before each call the L2 is overwritten, and sets of pieces in different places take
turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from _buffers import random_bytes, random_pinned_bytes
from _report import Row
from _timing import Call, Samples, time_in_rounds
from _transfer_cases import Buffers, Case, Pattern

from kvheap.device.directions import Direction
from kvheap.transfer import copy
from kvheap.transfer.plan import CopyPlan

KIB, MIB = 1 << 10, 1 << 20

SM_BUDGETS = (1, 2, 4, 8, 16)
LINK_DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h")


@dataclass(frozen=True, slots=True)
class GpuScale:
    """How much is measured on a GPU.

    ``link_until_s`` and ``planner_until_s`` are seconds after which a part begins no more cases.
    """

    arena_bytes: int
    max_bytes: int
    rounds: int
    calibration_s: float
    link_pieces: tuple[int, ...]
    link_counts: tuple[int, ...]
    planner_pieces: tuple[int, ...]
    planner_counts: tuple[int, ...]
    submitted: tuple[int, ...]
    growth: tuple[int, ...]
    link_until_s: float
    planner_until_s: float

    @classmethod
    def of(cls, quick: bool) -> GpuScale:
        """The scale for a minute and a half; quick: for half a minute."""
        if quick:
            return cls(
                arena_bytes=256 * MIB,
                max_bytes=64 * MIB,
                rounds=5,
                calibration_s=6,
                link_pieces=(4 * KIB,),
                link_counts=(1024, 16_384),
                planner_pieces=(4 * KIB, 64 * KIB),
                planner_counts=(16, 1024),
                submitted=(64, 12_288),
                growth=(1, 1024, 65_536, 262_144),
                link_until_s=20,
                planner_until_s=30,
            )
        return cls(
            arena_bytes=1024 * MIB,
            max_bytes=256 * MIB,
            rounds=7,
            calibration_s=20,
            link_pieces=(1 * KIB, 4 * KIB, 16 * KIB),
            link_counts=(1024, 8192, 65_536),
            planner_pieces=tuple(kib * KIB for kib in (1, 4, 16, 64, 512, 4096)),
            planner_counts=(16, 128, 1024, 8192, 65_536),
            submitted=(64, 1024, 12_288, 65_536),
            growth=(1, 64, 1024, 12_288, 65_536, 1_000_000),
            link_until_s=58,
            planner_until_s=90,
        )


# -- the machine -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A device with two streams, and memory on both sides of its link.

    Attributes:
        device: the torch device.
        stream: the current stream, on which the measured calls run.
        other: a second stream.
        host: random bytes in pinned host memory.
        first: random bytes on the device.
        second: random bytes on the device.
        flush: a buffer twice as large as the L2.
        num_sms: multiprocessors of the device.
    """

    device: torch.device
    stream: Any
    other: Any
    host: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    flush: torch.Tensor
    num_sms: int

    @classmethod
    def make(cls, device: torch.device, arena_bytes: int) -> Gpu:
        """Allocate buffers of ``arena_bytes``, which is halved until they fit."""
        properties = torch.cuda.get_device_properties(device)
        stream, other = torch.cuda.Stream(device), torch.cuda.Stream(device)
        flush = random_bytes(2 * properties.L2_cache_size, device)
        while True:
            try:
                host = random_pinned_bytes(arena_bytes)
                first, second = (random_bytes(arena_bytes, device) for _ in range(2))
                break
            except RuntimeError:
                if arena_bytes <= 64 * MIB:
                    raise
                arena_bytes //= 2
        torch.cuda.synchronize()
        return cls(
            device, stream, other, host, first, second, flush, properties.multi_processor_count
        )

    def buffers(self, direction: Direction) -> Buffers:
        """Source and target of a direction."""
        return {
            "h2d": Buffers(self.host, self.first),
            "d2h": Buffers(self.first, self.host),
            "d2d": Buffers(self.first, self.second),
        }[direction]

    def cases(
        self, direction: Direction, piece_bytes: int, num_pieces: int, pattern: str
    ) -> list[Case]:
        """Sets of pieces that take turns, in random places that differ from set to set."""
        kind = kind_of(pattern, direction)
        ends = self.buffers(direction)
        num_sets = 4 if num_pieces * piece_bytes < 64 * MIB else 2
        return [Case.make(ends, piece_bytes, num_pieces, kind, seed) for seed in range(num_sets)]


def kind_of(pattern: str, direction: Direction) -> Pattern:
    """The pattern of a case; ``host run`` is a contiguous host side."""
    if pattern == "host run":
        return "from a run" if direction == "h2d" else "into a run"
    kind: Any = pattern
    return kind  # type: ignore[no-any-return]


# -- timing ----------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """The times of a method by both clocks."""

    wall: Samples
    events: Samples


class Clock:
    """Measures calls in turn, each alone on an idle stream, with a flushed L2."""

    def __init__(self, gpu: Gpu, calls: Sequence[Call]) -> None:
        self._gpu = gpu
        self._calls = cycle(calls)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.event_us: list[float] = []

    def __call__(self) -> float:
        """Microseconds by the host's clock, from the call to the end of the work."""
        call, stream = next(self._calls), self._gpu.stream
        self._gpu.flush.zero_()
        stream.synchronize()
        begun = time.perf_counter()
        self._start.record(stream)
        call()
        self._end.record(stream)
        self._end.synchronize()
        ended = time.perf_counter()
        self.event_us.append(float(self._start.elapsed_time(self._end)) * 1e3)
        return (ended - begun) * 1e6


def clocked(gpu: Gpu, calls: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Timing]:
    clocks = {name: Clock(gpu, of_method) for name, of_method in calls.items()}
    walls = time_in_rounds(clocks, rounds)
    return {
        name: Timing(walls[name], Samples(tuple(clock.event_us[-rounds:])))
        for name, clock in clocks.items()
    }


def figures(timing: Timing, peak: Timing, num_bytes: int, work_share: float = 1.0) -> Row:
    moved = round(num_bytes * work_share)
    return {
        "bytes": moved,
        **timing.wall.percentiles(),
        "by_events": timing.events.percentiles(),
        "gb_per_s": round(moved / timing.wall.percentile(50) / 1e3, 3),
        "share_of_copy": round(timing.wall.speed_against(peak.wall, work_share), 4),
        "share_of_copy_by_events": round(timing.events.speed_against(peak.events, work_share), 4),
    }


def by_set(per_set: Sequence[Mapping[str, Call | None]]) -> dict[str, list[Call]]:
    """The calls of each method, one per set; methods whose call is None are left out."""
    return {
        name: [calls[name] for calls in per_set]  # type: ignore[misc]  # none of them is None
        for name, call in per_set[0].items()
        if call is not None
    }


def can_take(plan: CopyPlan, path: Any) -> bool:
    """Whether a path can copy a plan; copies it."""
    try:
        copy(plan, path=path).result()
    except ValueError:
        return False
    return True


def cycle(calls: Sequence[Call]) -> Iterator[Call]:
    """The calls, again and again."""
    while True:
        yield from calls
