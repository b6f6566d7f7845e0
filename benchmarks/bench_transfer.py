"""Transfers of scattered pieces, against one contiguous copy, each path by itself, and peers.

On a GPU (the link is the ceiling: one contiguous pinned copy of as many bytes):

=================  ===============================================================================
method             what runs
=================  ===============================================================================
copy_              one contiguous ``copy_``: the ceiling
kvheap             ``CopyPlan.of_addresses`` and ``copy``, the planner calibrated just before
plan made          ``copy`` of a plan that is there: descriptors are planned, uploaded, launched
prepared           ``copy`` of a plan whose descriptors are on the device
1 .. 16 SM         the same, on so many multiprocessors; ``prepared`` has 8 of them
copy engine        ``path="copy_engine"``: ``cuMemcpyBatchAsync`` of the merged runs
unmerged           the same call with all pieces as they are
bindings           the same call through cuda-bindings, whose arguments are lists
staged             ``path="staged"``: gathered on the device, and large copies
list               a Triton kernel of 12 programs over (source, target, bytes), in words of 8 bytes,
                   the list uploaded by each call, as vLLM's for its offloading
loop               one ``copy_(non_blocking=True)`` for each of the first 512 pieces
=================  ===============================================================================

Pieces lie scattered on both sides, in one run of the host's side (``host run``), or in scattered
``runs`` of 8. Each call is timed alone on an idle stream, L2 cold, by the host's clock from the
call to the end of the work and by events; upload and submission are inside, and are in a table of
their own. A planner's choice is compared with every path in the same rounds. A loop of bf16 GEMMs
tells what copies cost those who compute.

On a CPU: copies within host memory against one contiguous ``copy_`` and a loop of them, and what
the host does to submit copies by a GPU, **host only, no GPU**: the copy engine's library is a
C function that returns at once, descriptors are written to host memory, and nothing is launched.

Bytes are those of the pieces, each counted once; what is read and written is twice as much.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _report import (
    Measure,
    describe_machine,
    make_console,
    on_the_host,
    parse_common,
    pyplot,
    size_label,
    time_in_rounds,
    write_json,
)
from _transfer_gpu import SM_BUDGETS, measure_gpu
from _transfer_peers import (
    RUN_PIECES,
    Buffers,
    Call,
    Case,
    HostOnlyDevice,
    Pattern,
    batch_of_holes,
    contiguous,
    loop,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvheap.kernels.pointer_copy import PointerCopy
from kvheap.planning import planner
from kvheap.transfer import copy
from kvheap.transfer.plan import CopyPlan

TARGET_PLANNER = 0.95
TARGET_LINK = 0.90
TARGET_SMS = 8
TARGET_SLOWER = 0.03
TARGET_BOTH_WAYS = 0.90
TARGET_SUBMISSION_US = 150.0
SUBMITTED = 12_288
LINEAR_FROM = 65_536
TARGET_LINEAR = 1.5
"""Times the microseconds a piece, from 65,536 pieces, which leave the caches, to the most."""

MORE_SMS = 2 * SM_BUDGETS[-1]
"""Stands for more than were tried."""

HOST_ONLY = "host only, no GPU"
HOST_BLOCK_BYTES = 256
LOOP_COPIES_ON_CPU = 4096
PAUSE_S = 0.01

PATTERNS: dict[Pattern, str] = {
    "scattered": "scattered on both sides",
    "from a run": "from one run to anywhere",
    "into a run": "from anywhere into one run",
    "ragged": "scattered, sizes 0.5 to 1.5 of it",
}
METHOD_MARKERS = {
    "kvheap": "o",
    "plan made": "s",
    "loop": "^",
    "prepared": "D",
    "copy engine": "v",
    "unmerged": "P",
    "list": "X",
    "staged": "*",
    "bindings": "<",
}
TOTALS = ("arrays to copy engine", "batches to copy engine", "arrays to kernel")
GROWTH_SHOWN = (
    *TOTALS,
    "plan of arrays",
    "plan of batches",
    "merge",
    "merge, runs of 8",
    "choose",
    "descriptors",
    "copy engine call",
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured on a CPU."""

    piece_bytes: tuple[int, ...]
    side_bytes: int
    rounds: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """What takes a minute, or some seconds."""
        if quick:
            sizes = tuple(1 << shift for shift in (8, 12, 16, 20))
            return cls(sizes, 16 << 20, 3, (1, 64, 1024, SUBMITTED, 65_536, 262_144))
        sizes = tuple(1 << shift for shift in range(8, 21, 2))
        return cls(sizes, 64 << 20, 11, (1, 64, 1024, SUBMITTED, 65_536, 1_000_000))


# -- copies within host memory ---------------------------------------------------------------------


def host_buffer(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes // 8, dtype=torch.int64).random_().view(torch.uint8)


def host_calls(case: Case, seed: int) -> dict[str, Call]:
    """What each method calls to copy all pieces once."""
    plan = case.plan()
    return {
        "copy_": contiguous(case, seed),
        "kvheap": lambda: copy(case.plan()).result(),
        "plan made": lambda: copy(plan).result(),
        "loop": loop(case, LOOP_COPIES_ON_CPU),
    }


def after_a_pause(calls: list[Call]) -> Measure:
    """Wall-clock time of the mean call, once torch's threads sleep.

    Behind a ``copy_`` they spin for milliseconds, and whoever is next would have a core less.
    """
    measure = on_the_host(calls)

    def measure_later() -> float:
        time.sleep(PAUSE_S)
        return measure()

    return measure_later


def measure_copies(scale: Scale, console: Console) -> list[Row]:
    """Every pattern and size."""
    source, target = (host_buffer(2 * scale.side_bytes) for _ in range(2))
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
    """The parts of a submission, and all of them together."""
    sides = [torch.empty(2 * count * HOST_BLOCK_BYTES, dtype=torch.uint8) for _ in range(2)]
    buffers = Buffers(*sides)
    case = Case.make(buffers, HOST_BLOCK_BYTES, count, "scattered", 0)
    in_runs = Case.make(buffers, HOST_BLOCK_BYTES, count, "runs", 0).pieces
    batches = tuple(batch_of_holes(side, HOST_BLOCK_BYTES, count) for side in sides)
    pieces, table = case.pieces, planner.table_for(device.name, device.driver_version)
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
        # Few pieces take microseconds, of which one sample is the mean of several calls.
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


# -- targets ---------------------------------------------------------------------------------------


def judged(target: str, asked: float, rows: list[Row], figure: str, least: bool, where: Any) -> Row:
    """A target beside the worst row; ``least``: figures must be at least what is asked."""
    found = {"target": target, "asked": asked, "worst": None, "where": "", "reached": None}
    if not rows:
        return found
    worst = (min if least else max)(rows, key=lambda row: row[figure])
    reaching = [row for row in rows if (row[figure] >= asked if least else row[figure] <= asked)]
    return found | {
        "worst": worst[figure],
        "where": where(worst),
        "reached": len(reaching) == len(rows),
        "cells_that_reach": f"{len(reaching)} of {len(rows)}",
    }


def cell_words(row: Row) -> str:
    names = [row[name] for name in ("direction", "pattern") if name in row]
    size = f"{row['num_pieces']:,} x {size_label(row['piece_bytes'])}"
    return ", ".join([*names, size])


def linear_target(title: str, rows: list[Row], name: str) -> Row:
    """How much more a piece takes of the most pieces than of 65,536."""
    most = max(row["num_pieces"] for row in rows)
    parts = {row[name] for row in rows}
    found = []
    for part in sorted(parts):
        times = {row["num_pieces"]: row["p50_us"] for row in rows if row[name] == part}
        if most > LINEAR_FROM in times:
            growth = (times[most] / most) / (times[LINEAR_FROM] / LINEAR_FROM)
            found.append({name: part, "growth": round(growth, 2)})
    where = f"{LINEAR_FROM:,} to {most:,} pieces"
    return judged(title, TARGET_LINEAR, found, "growth", False, lambda row: f"{row[name]}, {where}")


def host_targets(rows: list[Row]) -> list[Row]:
    totals = [r for r in rows if r["num_pieces"] == SUBMITTED and " to " in r["part"]]
    found = [
        judged(
            f"us to submit {SUBMITTED:,} pieces {kind}; {HOST_ONLY}, no upload, no launch",
            TARGET_SUBMISSION_US,
            [row for row in totals if row["part"].startswith(kind)],
            "p50_us",
            False,
            lambda row: row["part"],
        )
        for kind in ("arrays", "batches")
    ]
    shown = [row for row in rows if row["part"] in GROWTH_SHOWN and row["part"] != "choose"]
    return [*found, linear_target(f"linear: time a piece, {HOST_ONLY}", shown, "part")]


def gpu_targets(found: dict[str, Any]) -> list[Row]:
    planned = [row for row in found["planner"] if row["method"] == "planner"]
    link = [row for row in found["link"] if row["pattern"] != "runs"]
    total = [row for row in found["submission"] if row["num_pieces"] == SUBMITTED]
    words = lambda row: f"{cell_words(row)}: {row['chosen']}, best {row['best']}"  # noqa: E731
    targets = [
        judged(
            f"planner against the best path, {source} table",
            TARGET_PLANNER,
            [row for row in planned if (row["table"] == "measured") == (source == "measured")],
            "share_of_best",
            True,
            words,
        )
        for source in ("measured", "built-in")
    ]
    targets += [
        judged(
            f"of one contiguous copy, {title}",
            TARGET_LINK,
            [row for row in link if row["method"] == method],
            figure,
            True,
            cell_words,
        )
        for method, figure, title in (
            ("kvheap", "share_of_copy", "all counted in"),
            ("plan made", "share_of_copy", "plan made"),
            ("prepared", "share_of_copy_by_events", "descriptors there, by events"),
        )
    ]
    targets.append(
        judged(
            f"SMs for 0.9 of the link ({MORE_SMS}: more than {SM_BUDGETS[-1]})",
            TARGET_SMS,
            sms_needed(link),
            "sms",
            False,
            cell_words,
        )
    )
    targets += [
        judged(
            f"slow-down of GEMMs beyond a contiguous copy's, {method}",
            TARGET_SLOWER,
            [row for row in found["gemms"] if row["method"] == method],
            "slower_than_copy",
            False,
            cell_words,
        )
        for method in ("kvheap", "prepared")
    ]
    targets += [
        judged(
            f"us to submit {SUBMITTED:,} pieces, {part}",
            TARGET_SUBMISSION_US,
            [row for row in total if row["method"] == part],
            "p50_us",
            False,
            lambda row: row["method"],
        )
        for part in ("arrays to copy", "batches to copy")
    ]
    both = [row for row in found["both_ways"] if row["method"] == "kvheap"]
    targets.append(
        judged(
            "both ways at once, of two contiguous copies",
            TARGET_BOTH_WAYS,
            both,
            "share_of_copy",
            True,
            cell_words,
        )
    )
    growth = [row for row in found["growth"] if row["method"] != "copy_"]
    return [*targets, linear_target("linear: time a piece, to the end", growth, "method")]


def sms_needed(link: list[Row]) -> list[Row]:
    """The fewest SMs that reach the target, for each cell of the most pieces measured of a size."""
    cells: dict[tuple[str, int], Row] = {}
    for row in link:
        if row["pattern"] != "scattered" or not row["method"].endswith(" SM"):
            continue
        key = (row["direction"], row["piece_bytes"])
        cell = cells.get(key)
        if cell is None or cell["num_pieces"] < row["num_pieces"]:
            cell = cells[key] = {k: row[k] for k in ("direction", "piece_bytes", "num_pieces")}
            cell["sms"] = MORE_SMS
        if row["share_of_copy_by_events"] >= TARGET_LINK:
            cell["sms"] = min(cell["sms"], int(row["method"].split()[0]))
    return list(cells.values())


# -- report ----------------------------------------------------------------------------------------


def print_targets(console: Console, targets: list[Row]) -> None:
    table = Table(title="Targets, and the worst figure beside each")
    for title in ("target", "asked", "worst", "", "of all", "where"):
        table.add_column(title, justify="right" if title in ("asked", "worst") else "left")
    for row in targets:
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[row["reached"]]
        worst = "" if row["worst"] is None else f"{row['worst']:g}"
        share = row.get("cells_that_reach", "")
        table.add_row(row["target"], f"{row['asked']:g}", worst, verdict, share, row["where"])
    console.print(table)


def print_copies(console: Console, rows: list[Row]) -> None:
    """Speed within host memory."""
    table = Table(
        title="Copies within host memory: GB/s, each byte counted once; share of one copy_; "
        "times a loop of copy_"
    )
    for title in ("pieces", "size", "number", "copy_", "kvheap", "plan made", "loop", "x loop"):
        table.add_column(title, justify="left" if title == "pieces" else "right")
    last = ""
    for (pattern, piece), group in grouped(rows, "pattern", "piece_bytes").items():
        if last not in ("", pattern):
            table.add_section()
        peak = group["copy_"]
        cells = [
            f"{group[m]['gb_per_s']:.2f} {group[m]['share_of_copy']:6.1%}"
            for m in ("kvheap", "plan made", "loop")
        ]
        table.add_row(
            pattern if last != pattern else "",
            size_label(piece),
            f"{peak['num_pieces']:,}",
            f"{peak['gb_per_s']:.2f}",
            *cells,
            f"{group['kvheap']['times_loop']:.1f}",
        )
        last = pattern
    console.print(table)


def print_over_counts(console: Console, title: str, rows: list[Row], name: str) -> None:
    """Median microseconds of each part, over the number of pieces; and of one piece at last."""
    counts = sorted({row["num_pieces"] for row in rows})
    table = Table(title=title)
    table.add_column("")
    for count in counts:
        table.add_column(f"{count:,}", justify="right")
    table.add_column("ns a piece", justify="right")
    for part in dict.fromkeys(row[name] for row in rows):
        times = {row["num_pieces"]: row["p50_us"] for row in rows if row[name] == part}
        last = max(times)
        cells = [f"{times[c]:,.1f}" if c in times else "" for c in counts]
        table.add_row(part, *cells, f"{1e3 * times[last] / last:,.1f}")
    console.print(table)


def print_link(console: Console, rows: list[Row]) -> None:
    budgets = [m for m in dict.fromkeys(row["method"] for row in rows) if m.endswith(" SM")]
    others = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "copy_"]
    others = [m for m in others if m not in budgets]
    for methods, clock, figure in (
        (others, "the host's clock", ""),
        (others, "events", "_by_events"),
        (["prepared", *budgets], "events", "_by_events"),
    ):
        table = Table(title=f"Share of one contiguous copy, by {clock}; copy_ in GB/s")
        for title in ("", "pieces", "number", "size", "copy_", *methods):
            table.add_column(title, justify="left" if title in ("", "pieces") else "right")
        keys = ("direction", "pattern", "num_pieces", "piece_bytes")
        for (direction, pattern, count, piece), group in grouped(rows, *keys).items():
            cells = [
                f"{group[m]['share_of_copy' + figure]:.2f}" if m in group else "" for m in methods
            ]
            label = (direction, pattern, f"{count:,}", size_label(piece))
            if methods[-1] in group:
                table.add_row(*label, f"{group['copy_']['gb_per_s']:.1f}", *cells)
        console.print(table)


def print_planner(console: Console, rows: list[Row]) -> None:
    table = Table(title="The planner against the best single path, in the same rounds")
    for title in ("", "pieces", "number", "size", "best", "us", "calibrated", "", "built-in", ""):
        table.add_column(title, justify="right" if title in ("number", "size", "us") else "left")
    keys = ("direction", "pattern", "num_pieces", "piece_bytes")
    cells: dict[Any, list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in keys), []).append(row)
    for (direction, pattern, count, piece), group in sorted(cells.items()):
        first, second = (row for row in group if row["method"] == "planner")
        best = next(row for row in group if row["method"] == first["best"])
        table.add_row(
            direction,
            pattern,
            f"{count:,}",
            size_label(piece),
            first["best"],
            f"{best['p50_us']:,.1f}",
            first["chosen"],
            f"{first['share_of_best']:.2f}",
            second["chosen"],
            f"{second['share_of_best']:.2f}",
        )
    console.print(table)


def print_gemms(console: Console, rows: list[Row]) -> None:
    table = Table(title="A loop of bf16 GEMMs beside copies: how much slower")
    for title in ("", "beside", "us", "than alone", "than beside copy_", "copies, GB/s", "outlast"):
        table.add_column(title, justify="left" if title in ("", "beside") else "right")
    for row in rows:
        rate = row["link_gb_per_s"]
        table.add_row(
            row["direction"],
            row["method"],
            f"{row['p50_us']:,.0f}",
            f"{row['slower_than_alone']:+.1%}",
            f"{row['slower_than_copy']:+.1%}",
            "" if rate is None else f"{rate:.1f}",
            "yes" if row["copies_outlast_gemms"] else "NO",
        )
    console.print(table)


def print_both_ways(console: Console, rows: list[Row]) -> None:
    table = Table(title="Both ways at once: GB/s of both together, and share of two contiguous")
    for title in ("method", "size", "number", "GB/s", "share", "by events"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            size_label(row["piece_bytes"]),
            f"{row['num_pieces']:,}",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.2f}",
            f"{row['share_of_copy_by_events']:.2f}",
        )
    console.print(table)


def grouped(rows: list[Row], *keys: str) -> dict[Any, dict[str, Row]]:
    """Rows of one cell, by method."""
    groups: dict[Any, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["method"]] = row
    return groups


# -- pictures --------------------------------------------------------------------------------------


def draw_cpu(plt: ModuleType, found: dict[str, Any], title: str, path: Path) -> None:
    """Above, speed over the size of pieces; below, the host's time over their number."""
    figure = plt.figure(figsize=(15, 9))
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.15))
    panels = [figure.add_subplot(grid[0, number]) for number in range(len(PATTERNS))]
    top = 1.05 * max(1.0, *(row["share_of_copy"] for row in found["copies"]))
    for panel, pattern in zip(panels, PATTERNS, strict=True):
        draw_shares(panel, [r for r in found["copies"] if r["pattern"] == pattern])
        panel.set_title(PATTERNS[pattern], fontsize=10)
        panel.set_ylim(0, top)
        panel.set_xlabel("piece")
    panels[0].set_ylabel("speed / speed of one copy_")
    panels[0].legend(fontsize=9)
    below = [figure.add_subplot(place) for place in (grid[1, :2], grid[1, 2:])]
    draw_growth(*below, found["host"])
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_shares(panel: Any, rows: list[Row]) -> None:
    """Shares of one contiguous copy over the size of pieces: a line for each method."""
    for number, (method, marker) in enumerate(METHOD_MARKERS.items()):
        line = [row for row in rows if row["method"] == method]
        if not line:
            continue
        is_own = method in ("kvheap", "plan made", "prepared")
        panel.plot(
            [row["piece_bytes"] for row in line],
            [row["share_of_copy"] for row in line],
            color=f"C{number}",
            marker=marker,
            markersize=5,
            linewidth=2 if is_own else 1,
            linestyle="-" if is_own else "--",
            label=method,
        )
    panel.axhline(1.0, color="black", linewidth=1)
    ticks = sorted({row["piece_bytes"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [size_label(tick) for tick in ticks], rotation=30, fontsize=8)
    panel.minorticks_off()
    panel.set_ylim(0, 1.05 * max(1.0, *(row["share_of_copy"] for row in rows)))
    panel.grid(alpha=0.3)


def draw_growth(times: Any, each: Any, rows: list[Row]) -> None:
    """Microseconds over the number of pieces, and nanoseconds of one piece."""
    for number, part in enumerate(GROWTH_SHOWN):
        line = [row for row in rows if row["part"] == part]
        counts = [row["num_pieces"] for row in line]
        is_whole = part in TOTALS
        look: dict[str, Any] = {
            "color": f"C{number}",
            "marker": "o" if is_whole else ".",
            "linewidth": 2 if is_whole else 1,
            "linestyle": "-" if is_whole else "--",
        }
        times.plot(counts, [row["p50_us"] for row in line], label=part, **look)
        each.plot(counts, [1e3 * row["p50_us"] / row["num_pieces"] for row in line], **look)
    star = {"color": "black", "marker": "*", "markersize": 14, "linestyle": ""}
    times.plot([SUBMITTED], [TARGET_SUBMISSION_US], **star, label="target on a GPU, all of it")
    times.set_ylabel("us of the host")
    each.set_ylabel("ns of the host for each piece")
    times.set_title(f"planning and submission: {HOST_ONLY}", fontsize=10)
    each.set_title("the same, for each piece: level is linear", fontsize=10)
    ticks = sorted({row["num_pieces"] for row in rows})
    for panel in (times, each):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        panel.minorticks_off()
        panel.set_xlabel("pieces")
        panel.grid(alpha=0.3)
    each.legend(*times.get_legend_handles_labels(), fontsize=8)


def draw_gpu(plt: ModuleType, found: dict[str, Any], title: str, path: Path) -> None:
    """Shares of the link, SMs, the planner, GEMMs, and the host's time."""
    figure, panels = plt.subplots(2, 4, figsize=(22, 10))
    link = found["link"]
    for panel, (direction, pattern) in zip(
        panels[0], itertools.product(("h2d", "d2h"), ("scattered", "host run")), strict=True
    ):
        some = [r for r in link if (r["direction"], r["pattern"]) == (direction, pattern)]
        # The number of pieces that was measured of most sizes; of these the largest.
        counts = [row["num_pieces"] for row in some]
        most = max(set(counts), key=lambda count: (counts.count(count), count), default=0)
        some = [r for r in some if r["num_pieces"] == most and not r["method"].endswith(" SM")]
        if not some:
            continue
        draw_shares(panel, some)
        panel.axhline(TARGET_LINK, color="grey", linestyle=":")
        panel.set_title(f"{direction}, {pattern}, {most:,} pieces: share of one copy", fontsize=10)
    panels[0, 1].legend(fontsize=8)  # which has staging too
    draw_sms(panels[1, 0], link)
    draw_planner(panels[1, 1], [r for r in found["planner"] if r["method"] == "planner"])
    draw_gemms(panels[1, 2], found["gemms"])
    for part in dict.fromkeys(row["method"] for row in found["submission"]):
        line = [row for row in found["submission"] if row["method"] == part]
        counts = [row["num_pieces"] for row in line]
        panels[1, 3].plot(counts, [r["p50_us"] for r in line], marker="o", markersize=4, label=part)
    panels[1, 3].plot([SUBMITTED], [TARGET_SUBMISSION_US], "k*", markersize=14, label="target")
    panels[1, 3].set_xscale("log")
    panels[1, 3].set_yscale("log")
    panels[1, 3].set_title("us of the host to submit, over pieces", fontsize=10)
    panels[1, 3].grid(alpha=0.3)
    panels[1, 3].legend(fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_sms(panel: Any, link: list[Row]) -> None:
    some = [r for r in link if r["pattern"] == "scattered" and r["method"].endswith(" SM")]
    most = {
        (cell["direction"], cell["piece_bytes"]): cell["num_pieces"] for cell in sms_needed(link)
    }
    for (direction, piece), count in most.items():
        key = (direction, piece, count)
        line = [r for r in some if (r["direction"], r["piece_bytes"], r["num_pieces"]) == key]
        sms = [int(row["method"].split()[0]) for row in line]
        shares = [row["share_of_copy_by_events"] for row in line]
        panel.plot(sms, shares, marker="o", label=f"{direction}, {size_label(piece)}")
    panel.axhline(TARGET_LINK, color="grey", linestyle=":")
    panel.axvline(TARGET_SMS, color="grey", linestyle=":")
    panel.set_xscale("log", base=2)
    panel.set_xticks(SM_BUDGETS, [str(budget) for budget in SM_BUDGETS])
    panel.set_ylim(bottom=0)
    panel.set_title("share of the link over SMs, descriptors there, by events", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def draw_planner(panel: Any, rows: list[Row]) -> None:
    for (is_measured, name), shift in zip(
        ((True, "calibrated"), (False, "built-in")), (0.97, 1.03), strict=True
    ):
        some = [row for row in rows if (row["table"] == "measured") == is_measured]
        sizes = [shift * row["bytes"] for row in some]
        panel.plot(sizes, [r["share_of_best"] for r in some], "o", alpha=0.6, label=name)
    panel.axhline(TARGET_PLANNER, color="grey", linestyle=":")
    panel.axhline(1.0, color="black", linewidth=1)
    panel.set_xscale("log", base=2)
    ticks = [1 << shift for shift in range(14, 29, 2)]
    panel.set_xticks(ticks, [size_label(tick) for tick in ticks], rotation=30, fontsize=8)
    panel.set_title("planner's speed / the best path's, over bytes of a copy", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def draw_gemms(panel: Any, rows: list[Row]) -> None:
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "alone"]
    for number, direction in enumerate(("h2d", "d2h")):
        by_method = {row["method"]: row for row in rows if row["direction"] == direction}
        places = [at + 0.4 * number for at in range(len(methods))]
        slower = [100 * by_method[method]["slower_than_alone"] for method in methods]
        panel.bar(places, slower, 0.4, label=direction)
    panel.set_xticks([at + 0.2 for at in range(len(methods))], methods, rotation=40, fontsize=8)
    panel.set_title("% by which GEMMs take longer than alone", fontsize=10)
    panel.grid(alpha=0.3, axis="y")
    panel.legend(fontsize=8)


# -- all of it -------------------------------------------------------------------------------------


def report_gpu(console: Console, found: dict[str, Any]) -> None:
    print_link(console, found["link"])
    print_planner(console, found["planner"])
    print_gemms(console, found["gemms"])
    print_both_ways(console, found["both_ways"])
    print_over_counts(
        console, "Host time to submit one copy h2d, us (p50)", found["submission"], "method"
    )
    print_over_counts(
        console, "From the call to the end of one copy h2d, us (p50)", found["growth"], "method"
    )
    for case in found["left_out"]:
        console.print(f"left out, no time: {case}")


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0])
    device, console = arguments.device, make_console()
    on_gpu = device.type == "cuda"
    # A GPU's time is not spent on a million pieces of the host's alone: its own table has them.
    scale = Scale.of(arguments.quick or on_gpu)
    machine = describe_machine(device)
    console.print(f"{machine['device']}, driver {machine['driver']}, {machine['versions']}")
    configuration: Row = {"quick": arguments.quick, "run_pieces": RUN_PIECES}
    host = measure_host(scale, console)
    if on_gpu:
        torch.cuda.set_device(device)
        found, own = measure_gpu(device, arguments.quick, console.print)
        found = {"targets": [*gpu_targets(found), *host_targets(host)], "host": host, **found}
        configuration |= own
        report_gpu(console, found)
    else:
        copies = measure_copies(scale, console)
        found = {"targets": host_targets(host), "host": host, "copies": copies}
        configuration |= {
            "rounds": scale.rounds,
            "side_bytes": scale.side_bytes,
            "loop_copies": LOOP_COPIES_ON_CPU,
            "pause_s": PAUSE_S,
            "bytes": "of the pieces, each counted once",
            "shares": "median over rounds of the speed over the peer's in the same round",
        }
        print_copies(console, copies)
    print_over_counts(
        console, f"Planning and submission: us of the host (p50), {HOST_ONLY}", host, "part"
    )
    print_targets(console, found["targets"])
    path = write_json(arguments.out, "transfer", machine, configuration, found)
    console.print(f"wrote {path}")
    plt = pyplot(console)
    if plt is not None:
        draw = draw_gpu if on_gpu else draw_cpu
        title = (
            f"Transfers, {machine['device']}, {machine['date'][:10]} (1.0 = one contiguous copy)"
        )
        draw(plt, found, title, path.with_suffix(".png"))
        console.print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
