"""Transfers of scattered pieces, compared with one contiguous copy, each single path, and peers.

On a GPU (the link is the ceiling: one contiguous pinned copy of as many bytes):

=================  ===============================================================================
method             what runs
=================  ===============================================================================
copy_              one contiguous ``copy_``: the ceiling
kvheap             ``CopyPlan.of_addresses`` and ``copy``; the planner was calibrated just before
plan made          ``copy`` of an existing plan: plans descriptors, uploads them, launches
prepared           ``copy`` of a plan whose descriptors are on the device
1 .. 16 SM         the same on so many multiprocessors; ``prepared`` has 8 of them
copy engine        ``path="copy_engine"``: ``cuMemcpyBatchAsync`` of the merged runs
unmerged           the same call with all pieces, not merged
bindings           the same call through cuda-bindings, which takes lists
staged             ``path="staged"``: gathered on the device, then moved by large copies
list               a Triton kernel of 12 programs over (source, target, bytes), in words of 8 bytes,
                   as vLLM's for offloading; each call uploads the list
loop               one ``copy_(non_blocking=True)`` for each of the first 512 pieces
=================  ===============================================================================

Pieces are scattered on both sides, contiguous on the host's side (``host run``), or in scattered
``runs`` of 8. Each call is timed alone on an idle stream, with a cold L2, by the host's clock from
the call to the end of the work, and by events. Both include upload and submission, which a table of
its own reports too. The planner's choice is compared with every path in the same rounds. A loop of
bf16 GEMMs shows how much copies slow down computation.

On a CPU: copies within host memory, compared with one contiguous ``copy_`` and a loop of them; and
what the host does to submit copies by a GPU, **host only, no GPU**: the copy engine's library is a
C function that returns at once, descriptors are written to host memory, and nothing is launched.

Bytes are those of the pieces, each counted once; twice as many are read and written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _report import (
    Row,
    describe_machine,
    grouped,
    make_console,
    parse_common,
    print_machine,
    size_label,
    write_results,
)
from _transfer_cases import RUN_PIECES
from _transfer_gpu import Gpu, GpuScale
from _transfer_host import (
    HOST_ONLY,
    LOOP_COPIES_ON_CPU,
    PAUSE_S,
    Scale,
    measure_copies,
    measure_host,
)
from _transfer_link import measure_growth, measure_link, measure_submission
from _transfer_overlap import measure_both_ways, measure_gemms
from _transfer_peers import LOOP_COPIES
from _transfer_planner import calibrated, measure_planner
from _transfer_plot import draw
from _transfer_targets import gpu_targets, host_targets
from rich.console import Console
from rich.table import Table

# -- tables ----------------------------------------------------------------------------------------


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
    """Print the speed of copies within host memory."""
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
    """Print median microseconds of each part over the number of pieces; last, ns per piece."""
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


# -- all of it -------------------------------------------------------------------------------------


def measure_gpu(
    device: torch.device, quick: bool, tell: Callable[[str], None]
) -> tuple[dict[str, Any], Row]:
    """Measure on a GPU; all tables, and the configuration."""
    scale = GpuScale.of(quick)
    begun = time.monotonic()
    elapsed = lambda: time.monotonic() - begun  # noqa: E731
    left_out: list[str] = []
    with calibrated(device, scale) as tables:
        gpu = Gpu.make(device, scale.arena_bytes)
        found: dict[str, Any] = {}
        with torch.cuda.stream(gpu.stream):
            for name, measure in (
                ("submission", partial(measure_submission, gpu, tables.use("measured"), scale)),
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
    arguments = parse_common(__doc__.splitlines()[0], draw)
    device, console = arguments.device, make_console()
    on_gpu = device.type == "cuda"
    # On a GPU, a million pieces are not measured for the host alone: the table ``growth`` has them.
    scale = Scale.of(arguments.quick or on_gpu)
    machine = describe_machine(device)
    print_machine(console, machine)
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
    write_results(console, arguments.out, "transfer", machine, configuration, found, draw)


if __name__ == "__main__":
    main()
