"""What ``bench_transfer.py`` measures without a GPU: host memory, and the host's part of a copy.

The host's part is submitted to a :class:`~_host_only_device.HostOnlyDevice`: nothing is launched or
copied.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _buffers import random_bytes
from _host_only_device import HostOnlyDevice
from _report import Row
from _timing import Call, Measure, on_the_host, time_in_rounds
from _transfer_cases import Buffers, Case, Pattern
from _transfer_peers import batch_of_holes, contiguous, loop
from rich.console import Console
from rich.progress import track

from kvheap.kernels.pointer_copy import PointerCopy
from kvheap.planning.planner import table_for
from kvheap.transfer import copy
from kvheap.transfer.plan import CopyPlan

HOST_ONLY = "host only, no GPU"

PATTERNS: dict[Pattern, str] = {
    "scattered": "scattered on both sides",
    "from a run": "from one run to anywhere",
    "into a run": "from anywhere into one run",
    "ragged": "scattered, sizes 0.5 to 1.5 of it",
}

SUBMITTED = 12_288
"""Pieces of the submission that targets are for."""

HOST_BLOCK_BYTES = 256
LOOP_COPIES_ON_CPU = 4096
PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured on a CPU."""

    piece_bytes: tuple[int, ...]
    side_bytes: int
    rounds: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """The scale for a run of a minute; quick: of some seconds."""
        if quick:
            sizes = tuple(1 << shift for shift in (8, 12, 16, 20))
            return cls(sizes, 16 << 20, 3, (1, 64, 1024, SUBMITTED, 65_536, 262_144))
        sizes = tuple(1 << shift for shift in range(8, 21, 2))
        return cls(sizes, 64 << 20, 11, (1, 64, 1024, SUBMITTED, 65_536, 1_000_000))


# -- copies within host memory ---------------------------------------------------------------------


def host_calls(case: Case, seed: int) -> dict[str, Call]:
    """The call of each method that copies all pieces once."""
    plan = case.plan()
    return {
        "copy_": contiguous(case, seed),
        "kvheap": lambda: copy(case.plan()).result(),
        "plan made": lambda: copy(plan).result(),
        "loop": loop(case, LOOP_COPIES_ON_CPU),
    }


def after_a_pause(calls: list[Call]) -> Measure:
    """Wall-clock time of the mean call, after a pause in which torch's threads go to sleep.

    After a ``copy_`` they spin for milliseconds, and would take a core from the next method.
    """
    measure = on_the_host(calls)

    def measure_later() -> float:
        time.sleep(PAUSE_S)
        return measure()

    return measure_later


def measure_copies(scale: Scale, console: Console) -> list[Row]:
    """Copies within host memory, of every pattern and size."""
    source, target = (random_bytes(2 * scale.side_bytes, "cpu") for _ in range(2))
    buffers = Buffers(source, target)
    small = Buffers(source[: 4 << 20], target[: 4 << 20])
    rows = []
    cells = list(itertools.product(PATTERNS, scale.piece_bytes))
    for pattern, piece in track(cells, "measuring copies", console=console, transient=True):
        checked = Case.make(small, piece, (2 << 20) // piece, pattern, 99)
        checked.check("kvheap", host_calls(checked, 0)["kvheap"], lambda: None)
        count = scale.side_bytes // piece
        cases = [Case.make(buffers, piece, count, pattern, seed) for seed in range(2)]
        per_set = [host_calls(case, seed) for seed, case in enumerate(cases)]
        measures = {name: after_a_pause([calls[name] for calls in per_set]) for name in per_set[0]}
        samples = time_in_rounds(measures, scale.rounds)
        views = [case.views(LOOP_COPIES_ON_CPU) for case in cases]
        looped = sum(len(view) for of_set in views for view, _ in of_set) / len(cases)
        loop_share = looped / cases[0].num_bytes
        for method, timing in samples.items():
            share = loop_share if method == "loop" else 1.0
            moved = round(share * cases[0].num_bytes)
            rows.append(
                {
                    "pattern": pattern,
                    "piece_bytes": piece,
                    "num_pieces": count,
                    "method": method,
                    "bytes": moved,
                    **timing.percentiles(),
                    "gb_per_s": round(moved / timing.percentile(50) / 1e3, 3),
                    "share_of_copy": round(timing.speed_against(samples["copy_"], share), 4),
                    "times_loop": round(
                        timing.speed_against(samples["loop"], share / loop_share), 2
                    ),
                }
            )
    return rows


# -- what the host does for a GPU ------------------------------------------------------------------


def host_parts(device: HostOnlyDevice, count: int) -> dict[str, Call]:
    """A whole submission, and its parts."""
    sides = [torch.empty(2 * count * HOST_BLOCK_BYTES, dtype=torch.uint8) for _ in range(2)]
    buffers = Buffers(*sides)
    case = Case.make(buffers, HOST_BLOCK_BYTES, count, "scattered", 0)
    in_runs = Case.make(buffers, HOST_BLOCK_BYTES, count, "runs", 0).pieces
    batches = tuple(batch_of_holes(side, HOST_BLOCK_BYTES, count) for side in sides)
    pieces, table = case.pieces, table_for(device.name, device.driver_version)
    plan = device.plan_of([pieces])
    size = (plan.num_runs, plan.num_bytes)
    between = partial(CopyPlan.between, *batches)

    def submit(make: Any, path: Any) -> Call:
        return lambda: copy(device.plan_of(make().parts), path=path)

    parts = {
        "arrays to copy engine": submit(case.plan, "copy_engine"),
        "batches to copy engine": submit(between, "copy_engine"),
        "arrays to kernel": submit(case.plan, "kernel"),
        "batches to kernel": submit(between, "kernel"),
        "plan of arrays": case.plan,
        "plan of batches": between,
        "merge": pieces.merged,
        "merge, runs of 8": in_runs.merged,
        "choose": partial(table.choose, "h2d", *size, ("kernel", "copy_engine")),
        "descriptors": partial(PointerCopy.prepare, pieces, torch.device("cpu")),
        "copy engine call": partial(device.copy_batch, pieces, device.stream, over_link=True),
        "plan by planner": partial(copy, plan),
        "plan by kernel": partial(copy, plan, path="kernel"),
        "plan by copy engine": partial(copy, plan, path="copy_engine"),
    }
    if count <= SUBMITTED:
        parts["a call each"] = partial(device.copy_each, pieces, device.stream)
    return parts


def measure_host(scale: Scale, console: Console) -> list[Row]:
    """Host time of planning and submitting, over the number of pieces."""
    rows = []
    device = HostOnlyDevice()
    for count in track(scale.counts, "measuring the host", console=console, transient=True):
        parts = host_parts(device, count)
        # Few pieces take only microseconds, so a sample is the mean of several calls.
        repeats = max(1, min(100, 100_000 // count))
        measures = {name: on_the_host([call] * repeats) for name, call in parts.items()}
        for part, timing in time_in_rounds(measures, scale.rounds).items():
            rows.append(
                {
                    "part": part,
                    "where": HOST_ONLY,
                    "num_pieces": count,
                    **timing.percentiles(),
                    "ns_per_piece": round(1e3 * timing.percentile(50) / count, 2),
                }
            )
    return rows
