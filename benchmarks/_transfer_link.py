"""What ``bench_transfer.py`` measures of the host link: bandwidth, submission, growth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from _report import Row
from _timing import Call, submission, time_in_rounds
from _transfer_cases import Buffers, Case
from _transfer_gpu import (
    KIB,
    LINK_DIRECTIONS,
    SM_BUDGETS,
    Gpu,
    GpuScale,
    by_set,
    can_take,
    clocked,
    figures,
    kind_of,
)
from _transfer_peers import (
    LOOP_COPIES,
    batch_of_holes,
    batch_unmerged,
    bindings_lists,
    contiguous,
    loop,
    pointer_list,
)

from kvheap.device.directions import Direction
from kvheap.kernels.bulk_copy import BulkCopy
from kvheap.kernels.copy_engine import driver
from kvheap.kernels.pointer_copy import PointerCopy
from kvheap.planning.copy_table import CopyTable
from kvheap.transfer import copy
from kvheap.transfer.plan import CopyPlan

SUBMITTED_BYTES = 4 * KIB
GROWTH_BYTES = 256
"""Bytes of a piece."""


def link_calls(
    gpu: Gpu, case: Case, direction: Direction, pattern: str, seed: int
) -> dict[str, Call | None]:
    """The call of each method that moves the pieces once; None if it cannot run here."""
    plan, prepared = case.plan(), case.plan().prepare()
    bulk = BulkCopy.prepare_if_suited(case.pieces, gpu.device)
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
            calls[f"{budget} SM, bulk"] = partial(bulk.run, budget) if bulk else None
    return calls


def measure_link(
    gpu: Gpu, scale: GpuScale, left_out: list[str], elapsed: Callable[[], float]
) -> list[Row]:
    """Small pieces between host and device, by every method.

    Args:
        gpu: the device.
        scale: how much is measured.
        left_out: gets the names of the cases for which there was no time.
        elapsed: seconds since the benchmark began.
    """
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
    """Raise if any method that moves all pieces moves wrong bytes."""
    ends = gpu.buffers(direction)
    size = 4 * count * piece
    small = Buffers(ends.source[:size], ends.target[:size])
    case = Case.make(small, piece, count, kind_of(pattern, direction), 99)
    for method, call in link_calls(gpu, case, direction, pattern, 0).items():
        if call is not None and method not in ("copy_", "loop"):
            case.check(method, call, torch.cuda.synchronize)


def measure_submission(gpu: Gpu, table: CopyTable, scale: GpuScale) -> list[Row]:
    """Host time of what a caller does for one copy to the device: all of it, and its parts."""
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
    """Time from arrays, or from a plan, to the end of the copy, over the number of pieces."""
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
