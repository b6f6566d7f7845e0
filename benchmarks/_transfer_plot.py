"""The pictures of ``bench_transfer.py``: one for a CPU, one for a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

from _report import Row, size_label
from _spread import NOISY_LABEL, is_noisy, plot_dots, plot_shares
from _transfer_gpu import SM_BUDGETS
from _transfer_host import HOST_ONLY, PATTERNS, SUBMITTED
from _transfer_targets import (
    GROWTH_SHOWN,
    TARGET_LINK,
    TARGET_PLANNER,
    TARGET_SMS,
    TARGET_SUBMISSION_US,
    TOTALS,
    sms_needed,
)

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


SUBMISSIONS_SHOWN = {
    "arrays to copy": "",
    "batches to copy": "",
    "bindings": " (a peer)",
    "loop": " (a peer)",
}
"""Whole submissions, whose steps are in the printed table only."""


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw what was measured on a CPU, or on a GPU."""
    title = f"Transfers, {found['device']}, {found['date'][:10]} (1.0 = one contiguous copy)"
    draw_on = draw_gpu if "link" in found else draw_cpu
    draw_on(plt, path, found, title)


def draw_cpu(plt: ModuleType, path: Path, found: dict[str, Any], title: str) -> None:
    """Draw speed over the size of pieces above, and the host's time over their number below."""
    figure = plt.figure(figsize=(16, 10), layout="constrained")
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
    for panel in panels[1:]:
        noisy = [line for line in panel.get_lines() if line.get_label() == NOISY_LABEL]
        if noisy:
            panel.legend(handles=noisy, fontsize=9, loc="lower right")
    below = [figure.add_subplot(place) for place in (grid[1, :2], grid[1, 2:])]
    draw_growth(*below, found["host"])
    figure.suptitle(f"{title[:-1]}; thin lines: the middle 60 % of the times)", fontsize=12)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_shares(panel: Any, rows: list[Row]) -> None:
    """Draw shares of one contiguous copy over the size of pieces, a line for each method."""
    for number, (method, marker) in enumerate(METHOD_MARKERS.items()):
        line = [row for row in rows if row["method"] == method]
        if not line:
            continue
        is_own = method in ("kvheap", "plan made", "prepared")
        plot_shares(
            panel,
            [row["piece_bytes"] for row in line],
            line,
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


def draw_growth(times: Any, parts: Any, rows: list[Row]) -> None:
    """Draw the host's time over the number of pieces, and what it consists of for one number."""
    for number, part in enumerate(TOTALS):
        line = [row for row in rows if row["part"] == part]
        counts = [row["num_pieces"] for row in line]
        times.plot(counts, [row["p50_us"] for row in line], color=f"C{number}", label=part)
        plot_dots(times, counts, line, color=f"C{number}")
    times.plot(
        [SUBMITTED],
        [TARGET_SUBMISSION_US],
        color="black",
        marker="*",
        markersize=14,
        linestyle="",
        label=f"kvheap's own goal for {SUBMITTED:,} pieces, uploads and launches included",
    )
    times.set_ylabel("microseconds of the host")
    times.set_title(f"planning and submitting a copy: {HOST_ONLY}", fontsize=10)
    ticks = sorted({row["num_pieces"] for row in rows})
    times.set_xscale("log")
    times.set_yscale("log")
    times.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    times.minorticks_off()
    times.set_xlabel("pieces")
    times.grid(alpha=0.3)
    times.legend(fontsize=8)
    shown = {row["part"]: row for row in rows if row["num_pieces"] == SUBMITTED}
    names = [part for part in GROWTH_SHOWN if part in shown]
    for place, part in enumerate(names):
        row, color = shown[part], "C0" if part in TOTALS else "tab:gray"
        parts.barh(place, row["p50_us"], 0.7, color=color)
        parts.hlines(place, row["p20_us"], row["p80_us"], color="black", linewidth=1)
        noise = " (noisy)" if is_noisy(row) else ""
        parts.text(
            row["p80_us"], place, f"  {row['p50_us']:,.0f} us{noise}", va="center", fontsize=8
        )
    parts.set_yticks(range(len(names)), names)
    parts.invert_yaxis()
    parts.margins(x=0.15)
    parts.set_xlabel("microseconds of the host (bar: median; line: the middle 60 %)")
    parts.set_title(f"{SUBMITTED:,} pieces: in all (blue), and its steps (grey)", fontsize=10)
    parts.grid(alpha=0.3, axis="x")


def draw_gpu(plt: ModuleType, path: Path, found: dict[str, Any], title: str) -> None:
    """Draw shares of the link, SMs, the planner, GEMMs, and the host's time."""
    figure, panels = plt.subplots(2, 4, figsize=(22, 10))
    link = found["link"]
    for panel, (direction, pattern) in zip(
        panels[0], itertools.product(("h2d", "d2h"), ("scattered", "host run")), strict=True
    ):
        some = [r for r in link if (r["direction"], r["pattern"]) == (direction, pattern)]
        # The number of pieces for which most sizes were measured; of several, the largest.
        counts = [row["num_pieces"] for row in some]
        most = max(set(counts), key=lambda count: (counts.count(count), count), default=0)
        some = [r for r in some if r["num_pieces"] == most and not r["method"].endswith(" SM")]
        if not some:
            continue
        draw_shares(panel, some)
        panel.axhline(TARGET_LINK, color="grey", linestyle=":")
        panel.set_title(f"{direction}, {pattern}, {most:,} pieces: share of one copy", fontsize=10)
    panels[0, 1].legend(fontsize=8)  # this panel has staging too
    draw_sms(panels[1, 0], link)
    draw_planner(panels[1, 1], [r for r in found["planner"] if r["method"] == "planner"])
    draw_gemms(panels[1, 2], found["gemms"])
    for number, (part, label) in enumerate(SUBMISSIONS_SHOWN.items()):
        line = [row for row in found["submission"] if row["method"] == part]
        counts = [row["num_pieces"] for row in line]
        look = {"color": f"C{number}", "linestyle": "--" if label else "-"}
        times = [row["p50_us"] for row in line]
        panels[1, 3].plot(counts, times, marker="o", markersize=4, label=f"{part}{label}", **look)
    panels[1, 3].plot([SUBMITTED], [TARGET_SUBMISSION_US], "k*", markersize=14, label="own goal")
    panels[1, 3].set_xscale("log")
    panels[1, 3].set_yscale("log")
    panels[1, 3].set_title("us of the host to submit a copy, over pieces", fontsize=10)
    panels[1, 3].grid(alpha=0.3)
    panels[1, 3].legend(fontsize=8, loc="upper left")
    figure.suptitle(f"{title[:-1]}; dotted: kvheap's own goals)", fontsize=12)
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
