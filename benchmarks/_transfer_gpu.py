"""What ``bench_transfer.py`` measures on a GPU.

Each call is timed alone on an idle stream, by two clocks: that of the host, from before the call to
the end of the event behind it, and the events' own. Descriptor upload and submission are inside
both. Before a call the L2 is overwritten, and calls rotate over sets of pieces in other places.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from _report import Measure, Samples, submission, time_in_rounds
from _transfer_peers import (
    LOOP_COPIES,
    Buffers,
    Call,
    Case,
    batch_of_holes,
    batch_unmerged,
    bindings_lists,
    contiguous,
    cycle,
    loop,
    pointer_list,
)

from kvheap.calibration.calibrate import CudaMeasure, calibrate
from kvheap.device.copy_device import CopyDevice
from kvheap.device.cuda import find_device
from kvheap.kernels.copy_engine import driver
from kvheap.kernels.pointer_copy import PointerCopy
from kvheap.planning import planner
from kvheap.transfer import copy
from kvheap.transfer.plan import CopyPlan

Direction = Literal["h2d", "d2h", "d2d"]
Row = dict[str, Any]

KIB, MIB = 1 << 10, 1 << 20

SM_BUDGETS = (1, 2, 4, 8, 16)
SUBMITTED_BYTES = 4 * KIB
GROWTH_BYTES = 256
GEMM_SIZE = 4096
GEMM_PIECE_BYTES = 16 * KIB
LINK_DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h")
DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h", "d2d")


@dataclass(frozen=True, slots=True)
class GpuScale:
    """How much is measured on a GPU; seconds are when a part must have begun its last case."""

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
        """What takes a minute and a half, or half a minute."""
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
    """A device, two streams of it, and memory on both sides.

    Attributes:
        device: of torch.
        stream: what is measured runs on it; it is the current one.
        other: a second stream.
        host: random bytes, pinned.
        first: random bytes on the device.
        second: the same.
        flush: twice as large as the L2.
        num_sms: of the device.
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
        """Buffers of so many bytes, or half as many where there is no room, and so on."""
        properties = torch.cuda.get_device_properties(device)
        stream, other = torch.cuda.Stream(device), torch.cuda.Stream(device)
        flush = device_bytes(2 * properties.L2_cache_size, device)
        while True:
            try:
                host = pinned_bytes(arena_bytes)
                first, second = (device_bytes(arena_bytes, device) for _ in range(2))
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
        """Source and target."""
        return {
            "h2d": Buffers(self.host, self.first),
            "d2h": Buffers(self.first, self.host),
            "d2d": Buffers(self.first, self.second),
        }[direction]

    def cases(
        self, direction: Direction, piece_bytes: int, num_pieces: int, pattern: str
    ) -> list[Case]:
        """Sets of pieces that calls rotate over; ``host run`` has the host's side in one run."""
        kind: Any = pattern
        if pattern == "host run":
            kind = "from a run" if direction == "h2d" else "into a run"
        ends = self.buffers(direction)
        num_sets = 4 if num_pieces * piece_bytes < 64 * MIB else 2
        return [Case.make(ends, piece_bytes, num_pieces, kind, seed) for seed in range(num_sets)]


def device_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_bytes // 8, dtype=torch.int64, device=device).random_().view(torch.uint8)


def pinned_bytes(num_bytes: int) -> torch.Tensor:
    words = torch.empty(num_bytes // 8, dtype=torch.int64, pin_memory=True)
    return words.random_().view(torch.uint8)


def bf16_matrices(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (GEMM_SIZE, GEMM_SIZE)
    first, second = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    return first, second, torch.empty_like(first)


# -- timing ----------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """One method's times by both clocks."""

    wall: Samples
    events: Samples


class Clock:
    """Measures the next of some calls on an idle stream, behind a flushed L2."""

    def __init__(self, gpu: Gpu, calls: Sequence[Call]) -> None:
        self._gpu = gpu
        self._calls = cycle(calls)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.event_us: list[float] = []

    def __call__(self) -> float:
        """Microseconds of the host, from the call to the end of the work."""
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
    """Calls of each method over all sets; methods that cannot be called are left out."""
    return {
        name: [calls[name] for calls in per_set]  # type: ignore[misc]  # none of them is None
        for name, call in per_set[0].items()
        if call is not None
    }


def can_take(plan: CopyPlan, path: Any) -> bool:
    """Whether a plan can be copied by a path; copies it."""
    try:
        copy(plan, path=path).result()
    except ValueError:
        return False
    return True


# -- pieces over the link --------------------------------------------------------------------------


def link_calls(gpu: Gpu, case: Case, direction: Direction, pattern: str, seed: int) -> Any:
    """What each method calls to move the pieces once."""
    plan, prepared = case.plan(), case.plan().prepare()
    handle = gpu.stream.cuda_stream
    calls: dict[str, Call | None] = {
        "copy_": contiguous(case, seed),
        "kvheap": lambda: copy(case.plan()),
        "plan made": partial(copy, plan),
        "prepared": partial(copy, prepared, path="kernel"),
        "copy engine": partial(copy, plan, path="copy_engine"),
        "unmerged": batch_unmerged(case, direction, handle) if driver().has_batch else None,
        "bindings": bindings_lists(case, handle) if driver().has_batch else None,
        "staged": partial(copy, plan, path="staged") if can_take(plan, "staged") else None,
        "list": pointer_list(case, gpu.device),
        "loop": loop(case, LOOP_COPIES),
    }
    if pattern == "scattered":
        for budget in SM_BUDGETS:
            calls[f"{budget} SM"] = partial(copy, prepared, path="kernel", max_sms=budget)
    return calls


def measure_link(gpu: Gpu, scale: GpuScale, left_out: list[str], elapsed: Measure) -> list[Row]:
    """Small pieces between host and device, by every method."""
    rows = []
    patterns = ("scattered", "host run", "runs")
    for count, piece, pattern, direction in product(
        scale.link_counts, scale.link_pieces, patterns, LINK_DIRECTIONS
    ):
        name = f"{direction}, {pattern}, {count:,} pieces of {piece >> 10} KiB"
        if count * piece > scale.max_bytes or 2 * count * piece > gpu.host.nbytes:
            continue
        if elapsed() > scale.link_until_s:
            left_out.append(name)
            continue
        cases = gpu.cases(direction, piece, count, pattern)
        if count == scale.link_counts[0]:
            check_link(gpu, direction, piece, count, pattern)
        per_set = [
            link_calls(gpu, case, direction, pattern, seed) for seed, case in enumerate(cases)
        ]
        timings = clocked(gpu, by_set(per_set), scale.rounds)
        of_cell = {
            "direction": direction,
            "pattern": pattern,
            "piece_bytes": piece,
            "num_pieces": count,
            "num_runs": cases[0].plan().num_runs,
        }
        for method, timing in timings.items():
            share = min(1.0, LOOP_COPIES / count) if method == "loop" else 1.0
            own = figures(timing, timings["copy_"], cases[0].num_bytes, share)
            rows.append(of_cell | {"method": method} | own)
    return rows


def check_link(gpu: Gpu, direction: Direction, piece: int, count: int, pattern: str) -> None:
    """A benchmark of wrong results is worth nothing."""
    ends = gpu.buffers(direction)
    size = 4 * count * piece
    small = Buffers(ends.source[:size], ends.target[:size])
    kind: Any = pattern
    if pattern == "host run":
        kind = "from a run" if direction == "h2d" else "into a run"
    case = Case.make(small, piece, count, kind, 99)
    for method, call in link_calls(gpu, case, direction, pattern, 0).items():
        if call is not None and method not in ("copy_", "loop"):
            case.check(method, call, torch.cuda.synchronize)


# -- the planner -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """Folders with a table measured by this process, and with none."""

    device: CopyDevice
    folders: Mapping[str, Path]
    current: list[planner.CopyTable] = field(default_factory=list)

    def use(self, name: str) -> planner.CopyTable:
        """Let further copies be planned by this one, which is loaded already when they are."""
        os.environ["KVHEAP_CACHE_DIR"] = str(self.folders[name])
        planner.forget_tables()
        return planner.table_for(self.device.name, self.device.driver_version)


@contextmanager
def calibrated(device: torch.device, scale: GpuScale) -> Iterator[Tables]:
    """Calibrate with a small budget, into a folder of its own."""
    found = find_device(device)
    assert found is not None
    kept = os.environ.get("KVHEAP_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder, name.replace(" ", "-")) for name in ("measured", "built in")}
        tables = Tables(found, folders)
        try:
            tables.use("measured")
            measure = CudaMeasure(device, scale.max_bytes)
            table = calibrate(
                measure,
                found.name,
                found.driver_version,
                budget_s=scale.calibration_s,
                max_bytes=measure.max_bytes,
            )
            table.save(planner.cache_path(found.name, found.driver_version))
            del measure
            torch.cuda.empty_cache()
            tables.use("measured")
            yield tables
        finally:
            if kept is None:
                del os.environ["KVHEAP_CACHE_DIR"]
            else:
                os.environ["KVHEAP_CACHE_DIR"] = kept
            planner.forget_tables()


def measure_planner(
    gpu: Gpu, tables: Tables, scale: GpuScale, left_out: list[str], elapsed: Measure
) -> list[Row]:
    """What the planner takes against each path by itself."""
    rows = []
    cells = [
        (count, piece, direction, pattern)
        for count, piece in product(scale.planner_counts, scale.planner_pieces)
        for direction in DIRECTIONS
        for pattern in (("scattered",) if direction == "d2d" else ("host run", "scattered"))
        if count * piece <= scale.max_bytes and 2 * count * piece <= gpu.host.nbytes
    ]
    cells.sort(key=lambda cell: cell[0] * cell[1])
    for count, piece, direction, pattern in cells:
        if elapsed() > scale.planner_until_s:
            left_out.append(f"planner: {direction}, {pattern}, {count:,} pieces of {piece >> 10} K")
            continue
        plans = [case.plan() for case in gpu.cases(direction, piece, count, pattern)]
        of_cell = {
            "direction": direction,
            "pattern": pattern,
            "piece_bytes": piece,
            "num_pieces": count,
            "bytes": count * piece,
        }
        rows += planner_rows(gpu, tables, plans, of_cell, scale.rounds)
    return rows


def planner_rows(
    gpu: Gpu, tables: Tables, plans: Sequence[CopyPlan], of_cell: Row, rounds: int
) -> list[Row]:
    """One cell: all paths and the planner in the same rounds; then its built-in table's choice."""
    paths = [path for path in planner.PATHS if can_take(plans[0], path)]
    by_path = {path: [partial(copy, plan, path=path) for plan in plans] for path in paths}
    chosen_freely = [partial(copy, plan) for plan in plans]
    table = tables.use("measured")
    chosen = copy(plans[0]).path
    timings = clocked(gpu, {**by_path, "planner": chosen_freely}, rounds)
    best = min(paths, key=lambda path: timings[path].wall.percentile(50))
    rows = [
        of_cell | {"method": path} | figures(timings[path], timings[best], of_cell["bytes"])
        for path in paths
    ]
    rows.append(
        of_cell
        | {"method": "planner", "table": table.source, "chosen": chosen, "best": best}
        | figures(timings["planner"], timings[best], of_cell["bytes"])
    )
    table = tables.use("built in")
    chosen = copy(plans[0]).path
    timings = clocked(gpu, {best: by_path[best], "planner": chosen_freely}, rounds)
    rows.append(
        of_cell
        | {"method": "planner", "table": table.source, "chosen": chosen, "best": best}
        | figures(timings["planner"], timings[best], of_cell["bytes"])
    )
    tables.use("measured")
    for row in rows:
        row["share_of_best"] = row.pop("share_of_copy")
        row["share_of_best_by_events"] = row.pop("share_of_copy_by_events")
    return rows


# -- beside a GEMM ---------------------------------------------------------------------------------


@dataclass
class Gemms:
    """A loop of GEMMs on the second stream, timed by events, while copies run on the first."""

    gpu: Gpu
    repeats: int
    count: int = 8
    covered: bool = True
    link_us: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first, self._second, self._out = bf16_matrices(self.gpu.device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]

    def measure(self, copy_once: Call | None) -> Measure:
        """Microseconds of the loop."""

        def sample() -> float:
            start, end, link_start, link_end = self._events
            torch.cuda.synchronize()
            link_start.record(self.gpu.stream)
            if copy_once is not None:
                for _ in range(self.repeats):
                    copy_once()
            link_end.record(self.gpu.stream)
            with torch.cuda.stream(self.gpu.other):
                start.record(self.gpu.other)
                for _ in range(self.count):
                    torch.mm(self._first, self._second, out=self._out)
                end.record(self.gpu.other)
            end.synchronize()
            self.covered = copy_once is None or not link_end.query()
            torch.cuda.synchronize()
            self.link_us.append(float(link_start.elapsed_time(link_end)) * 1e3)
            return float(start.elapsed_time(end)) * 1e3

        return sample


def measure_gemms(gpu: Gpu, scale: GpuScale) -> list[Row]:
    """A loop of GEMMs alone, beside one contiguous copy after another, and beside pieces."""
    count = min(scale.max_bytes, gpu.host.nbytes // 4) // GEMM_PIECE_BYTES
    rows = []
    for direction in LINK_DIRECTIONS:
        case = gpu.cases(direction, GEMM_PIECE_BYTES, count, "scattered")[0]
        prepared, plan = case.plan().prepare(), case.plan()
        calls: dict[str, Call | None] = {
            "alone": None,
            "copy_": contiguous(case, 0),
            "kvheap": partial(copy, plan),
            "prepared": partial(copy, prepared, path="kernel"),
            "copy engine": partial(copy, plan, path="copy_engine"),
            "list": pointer_list(case, gpu.device),
        }
        for budget in (*SM_BUDGETS, gpu.num_sms):
            calls[f"{budget} SM"] = partial(copy, prepared, path="kernel", max_sms=budget)
        gemms = Gemms(gpu, repeats=4)
        # The loop takes half of the time of the copies: they begin before it and end behind it.
        alone_us = min(gemms.measure(None)() for _ in range(3)) / gemms.count
        gemms.measure(calls["copy_"])()
        gemms.measure(calls["copy_"])()
        gemms.count = max(4, round(0.5 * gemms.link_us[-1] / alone_us))
        seen: dict[str, list[tuple[bool, float]]] = {name: [] for name in calls}

        def watched(
            name: str, call: Call | None, gemms: Gemms = gemms, seen: Any = seen
        ) -> Measure:
            measure = gemms.measure(call)

            def sample() -> float:
                taken = measure()
                seen[name].append((gemms.covered, gemms.link_us[-1]))
                return taken

            return sample

        samples = time_in_rounds({n: watched(n, call) for n, call in calls.items()}, scale.rounds)
        for method, timing in samples.items():
            covered, link_us = zip(*seen[method][1:], strict=True)  # the first round compiles
            beside = gemms.repeats * case.num_bytes / statistics.median(link_us) / 1e3
            rows.append(
                {
                    "direction": direction,
                    "method": method,
                    "gemms": gemms.count,
                    "piece_bytes": GEMM_PIECE_BYTES,
                    "num_pieces": count,
                    **timing.percentiles(),
                    "link_gb_per_s": round(beside, 3) if method != "alone" else None,
                    "copies_outlast_gemms": all(covered),
                    "slower_than_alone": slower(timing, samples["alone"]),
                    "slower_than_copy": slower(timing, samples["copy_"]),
                }
            )
    return rows


def slower(timing: Samples, peer: Samples) -> float:
    """By which share of the peer's time it takes longer, median of the rounds."""
    return round(peer.speed_against(timing) - 1, 4)


# -- both ways -------------------------------------------------------------------------------------


def measure_both_ways(gpu: Gpu, scale: GpuScale) -> list[Row]:
    """Host to device and device to host at once, on two streams."""
    half = gpu.host.nbytes // 2
    down = Buffers(gpu.host[:half], gpu.first)
    up = Buffers(gpu.second, gpu.host[half:])
    rows = []
    for piece in scale.link_pieces:
        count = min(scale.max_bytes // 2, half // 4) // piece
        per_set = []
        for seed in range(2):
            cases = [Case.make(ends, piece, count, "scattered", seed) for ends in (down, up)]
            plans = [case.plan() for case in cases]
            prepared = [case.plan().prepare() for case in cases]
            per_set.append(
                {
                    "copy_": on_two_streams(gpu, [contiguous(case, seed) for case in cases]),
                    "kvheap": on_two_streams(gpu, [partial(copy, plan) for plan in plans]),
                    "prepared": on_two_streams(
                        gpu, [partial(copy, plan, path="kernel") for plan in prepared]
                    ),
                    "copy engine": on_two_streams(
                        gpu, [partial(copy, plan, path="copy_engine") for plan in plans]
                    ),
                }
            )
        timings = clocked(gpu, by_set(per_set), scale.rounds)
        for method, timing in timings.items():
            own = figures(timing, timings["copy_"], 2 * count * piece)
            rows.append({"method": method, "piece_bytes": piece, "num_pieces": count} | own)
    return rows


def on_two_streams(gpu: Gpu, calls: Sequence[Call]) -> Call:
    """The first on the current stream, the second on the other; the current one ends last."""
    first, second = calls

    def call() -> None:
        gpu.other.wait_stream(gpu.stream)
        first()
        with torch.cuda.stream(gpu.other):
            second()
        gpu.stream.wait_stream(gpu.other)

    return call


# -- the host's share ------------------------------------------------------------------------------


def measure_submission(gpu: Gpu, tables: Tables, scale: GpuScale) -> list[Row]:
    """Host time of what a caller does for one copy to the device, whole and in parts."""
    table = tables.use("measured")
    rows = []
    for count in scale.submitted:
        if 2 * count * SUBMITTED_BYTES > gpu.host.nbytes:
            continue
        case = gpu.cases("h2d", SUBMITTED_BYTES, count, "scattered")[0]
        batches = tuple(
            batch_of_holes(side, SUBMITTED_BYTES, count) for side in (gpu.host, gpu.first)
        )
        plan, prepared = case.plan(), PointerCopy.prepare(case.pieces, gpu.device)
        handle = gpu.stream.cuda_stream
        calls: dict[str, Call | None] = {
            "arrays to copy": lambda case=case: copy(case.plan()),
            "batches to copy": partial(copy, batches),
            "plan of arrays": case.plan,
            "plan of batches": partial(CopyPlan.between, *batches),
            "choose": partial(
                table.choose, "h2d", plan.num_runs, plan.num_bytes, ("kernel", "copy_engine")
            ),
            "descriptors, upload": partial(PointerCopy.prepare, case.pieces, gpu.device),
            "launch": partial(prepared.run, 8),
            "plan by planner": partial(copy, plan),
            "plan by kernel": partial(copy, plan, path="kernel"),
            "plan by copy engine": partial(copy, plan, path="copy_engine"),
            "bindings": bindings_lists(case, handle) if driver().has_batch else None,
            "loop": loop(case, None) if count <= 12_288 else None,
        }
        measures = {name: submission(call) for name, call in calls.items() if call is not None}
        for method, timing in time_in_rounds(measures, scale.rounds).items():
            rows.append({"method": method, "num_pieces": count, **timing.percentiles()})
        torch.cuda.synchronize()
    return rows


def measure_growth(gpu: Gpu, scale: GpuScale) -> list[Row]:
    """From arrays to the end of the copy, over the number of pieces."""
    rows = []
    for count in scale.growth:
        if 2 * count * GROWTH_BYTES > gpu.host.nbytes:
            continue
        per_set = []
        for seed, case in enumerate(gpu.cases("h2d", GROWTH_BYTES, count, "scattered")):
            plan = case.plan()
            per_set.append(
                {
                    "copy_": contiguous(case, seed),
                    "arrays to end": lambda case=case: copy(case.plan()),
                    "plan to end": partial(copy, plan),
                }
            )
        timings = clocked(gpu, by_set(per_set), scale.rounds)
        for method, timing in timings.items():
            own = figures(timing, timings["copy_"], count * GROWTH_BYTES)
            rows.append({"method": method, "num_pieces": count} | own)
    return rows


def measure_gpu(
    device: torch.device, quick: bool, tell: Callable[[str], None]
) -> tuple[dict[str, Any], Row]:
    """All tables of a GPU, and the configuration."""
    scale = GpuScale.of(quick)
    begun = time.monotonic()
    elapsed = lambda: time.monotonic() - begun  # noqa: E731
    left_out: list[str] = []
    with calibrated(device, scale) as tables:
        gpu = Gpu.make(device, scale.arena_bytes)
        found: dict[str, Any] = {}
        with torch.cuda.stream(gpu.stream):
            for name, measure in (
                ("submission", partial(measure_submission, gpu, tables, scale)),
                ("both_ways", partial(measure_both_ways, gpu, scale)),
                ("gemms", partial(measure_gemms, gpu, scale)),
                ("growth", partial(measure_growth, gpu, scale)),
                ("link", partial(measure_link, gpu, scale, left_out, elapsed)),
                ("planner", partial(measure_planner, gpu, tables, scale, left_out, elapsed)),
            ):
                tell(f"measuring {name.replace('_', ' ')} ({elapsed():.0f} s)")
                found[name] = measure()
        found["left_out"] = left_out
    configuration = {
        "rounds": scale.rounds,
        "arena_bytes": gpu.host.nbytes,
        "calibration_s": scale.calibration_s,
        "loop_copies": LOOP_COPIES,
        "bytes": "of the pieces, each counted once",
        "times": "p20, p50, p80 of the host's clock from the call to the end; by_events: of events",
        "shares": "median over rounds of the speed over the peer's in the same round",
    }
    return found, configuration
