"""The targets of ``bench_transfer.py``, and which figures reach them."""

from __future__ import annotations

from typing import Any

from _report import Row, size_label
from _transfer_gpu import SM_BUDGETS
from _transfer_host import HOST_ONLY, SUBMITTED

TARGET_PLANNER = 0.95
TARGET_LINK = 0.90
TARGET_SMS = 8
TARGET_SLOWER = 0.03
TARGET_BOTH_WAYS = 0.90
TARGET_SUBMISSION_US = 150.0

LINEAR_FROM = 65_536
TARGET_LINEAR = 1.5
"""Time per piece of the largest number of pieces over that of 65,536, which leave the caches."""

MORE_SMS = 2 * SM_BUDGETS[-1]
"""Stands for more SMs than were tried."""

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
"""The parts of a submission whose growth is drawn and judged."""


def judged(target: str, asked: float, rows: list[Row], figure: str, least: bool, where: Any) -> Row:
    """A target with the worst row that it is for.

    Args:
        target: its name.
        asked: the figure to reach.
        rows: the rows that must reach it.
        figure: the key of the figure.
        least: whether figures must be at least, or else at most, ``asked``.
        where: names a row.
    """
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
    """The time per piece of the largest number of pieces, over that of 65,536."""
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
    """The fewest SMs that reach the target, for each size, with the most pieces measured."""
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
