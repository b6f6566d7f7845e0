"""The picture of ``bench_utilization.py``, and what its figures are compared with."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from _lmcache import PEER
from _report import Row, size_label
from _utilization_workloads import (
    AGED_PARTS,
    INDEXER_BYTES,
    KV_BYTES,
    PAIRS_PUBLISHED_HEAP_BYTES,
    RANDOM_HEAP_BYTES,
)

MOONCAKE = "Mooncake, published"

PUBLISHED_UNIFORM = (0.87, 1.0)
PUBLISHED: dict[str, Row] = {
    "random": {
        "heap_bytes": RANDOM_HEAP_BYTES,
        "min": 0.544250,
        "p50": 0.847867,
        "avg": 0.841576,
    },
    "pairs": {"heap_bytes": PAIRS_PUBLISHED_HEAP_BYTES, "avg": 0.952},
}
"""Mooncake's OffsetAllocator, from the results published with its benchmark."""

TARGETS = {"random": 0.865, "pairs": 0.997}

"""What kvheap aims at."""

WORKLOADS = {
    "random": "random sizes of 1 KiB to 64 MiB in 2 GiB",
    "pairs": "KV blocks of 3,274,752 B and indexer blocks of 643 KiB",
}

RULES = {"kvheap": "kvheap (best fit)", PEER: f"{PEER} (first fit)"}
COLORS = {"kvheap": "tab:blue", PEER: "tab:orange", MOONCAKE: "grey"}


def of_allocator(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["allocator"] == name]


def turnovers_of(row: Row) -> float:
    """The bytes that the pairs requested while they were measured, over the heap's bytes."""
    pair_bytes = KV_BYTES + INDEXER_BYTES
    return float(sum(row["allocations"]) / 2 * pair_bytes / row["heap_bytes"])


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw uniform sizes and aged pairs above; random sizes and pairs, with the rules, below."""
    layout = [["uniform", "aged"], ["random", "pairs"]]
    figure, panels = plt.subplot_mosaic(layout, figsize=(13, 10), height_ratios=(1, 1.3))
    beside = [row for row in found["placement_rules"] if row["allocator"] not in COLORS]
    mixed = [*found["random_and_pairs"], *beside]
    draw_uniform(panels["uniform"], found["uniform"])
    draw_aged(panels["aged"], found["aged"])
    for workload in ("random", "pairs"):
        of_workload = [row for row in mixed if row["workload"] == workload]
        draw_mixed(panels[workload], lines_of(of_workload, workload), workload)
    title = f"Utilization of full heaps, {found['device']}, {found['date'][:10]}"
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(w_pad=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_uniform(panel: Any, rows: list[Row]) -> None:
    label = "{}: {} to {}".format(MOONCAKE, *PUBLISHED_UNIFORM)
    panel.axhspan(*PUBLISHED_UNIFORM, color="grey", alpha=0.12, label=label)
    styles = {PEER: ("o", 9, "none"), "kvheap": ("o", 4, "full")}
    for name, (marker, size, fill) in styles.items():
        own = of_allocator(rows, name)
        sizes, lowest = [row["size_bytes"] for row in own], [row["min"] for row in own]
        if own:
            line = panel.plot(sizes, lowest, marker, label=name, color=COLORS[name])[0]
            line.set(markersize=size, fillstyle=fill)
    bases = list(dict.fromkeys(row["base_bytes"] for row in rows))
    panel.set_xscale("log", base=2)
    panel.set_xticks(bases, [size_label(base) for base in bases], rotation=30, ha="right")
    panel.minorticks_off()
    panel.set_ylim(0.86, 1.01)
    panel.grid(alpha=0.3)
    panel.set_ylabel("requested bytes / heap bytes")
    panel.set_title(
        "uniform sizes, each also -17 B, +17 B, x0.9, x1.1\n"
        "(missing: less than one block, and up to 0.1 % for alignment)",
        fontsize=11,
    )
    panel.legend(loc="lower left")


def draw_aged(panel: Any, rows: list[Row]) -> None:
    """Draw the mean of each tenth of the time, at its middle."""
    ends = turnovers_of(rows[0]) * np.arange(1, AGED_PARTS + 1) / AGED_PARTS
    middles = ends - ends[0] / 2
    for row in rows:
        name = row["allocator"]
        color, label = COLORS.get(name, "tab:green"), RULES.get(name, name)
        panel.plot(middles, row["avg_of_parts"], marker="o", color=color, label=label)
    label = f"kvheap's own goal: {TARGETS['pairs']}"
    panel.axhline(TARGETS["pairs"], color="black", linewidth=1, linestyle="--", label=label)
    panel.grid(alpha=0.3)
    panel.set_xlabel("how often the heap's bytes have been allocated anew")
    panel.set_ylabel("requested bytes / heap bytes")
    heap = size_label(rows[0]["heap_bytes"])
    panel.set_title(f"the same pairs for a long time, {heap}: mean of each tenth", fontsize=11)
    panel.legend(loc="best")


def lines_of(rows: list[Row], workload: str) -> list[Row]:
    """The rows with their labels; the published figure follows the peers in the same heap."""
    published = PUBLISHED[workload] | {"allocator": MOONCAKE}
    peers = [row for row in rows if row["allocator"] in COLORS]
    after = sum(row["heap_bytes"] == rows[0]["heap_bytes"] for row in peers)
    lines = [*rows[:after], published, *rows[after:]]
    names = [RULES.get(row["allocator"], row["allocator"]) for row in lines]
    if len({row["heap_bytes"] for row in lines}) > 1:
        heaps = [size_label(row["heap_bytes"]) for row in lines]
        names = [f"{name}, {heap}" for name, heap in zip(names, heaps, strict=True)]
    return [row | {"text": name} for row, name in zip(lines, names, strict=True)]


def draw_mixed(panel: Any, lines: list[Row], workload: str) -> None:
    """Draw which share of the heap each allocator leaves unused on average; shorter is better."""
    unused = [100 * (1 - row["avg"]) for row in lines]
    *_, second, most = sorted(unused)
    limit = second if most > 3 * second else most  # one that is far off would hide the others
    for height, (row, share) in enumerate(zip(lines, unused, strict=True)):
        panel.barh(height, share, 0.6, color=COLORS.get(row["allocator"], "tab:green"))
        text = f"{share:.3g} %" if share <= limit else f"{share:.3g} % (beyond the axis)"
        at = (share + 0.02 * limit, "left") if share <= limit else (1.17 * limit, "right")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        panel.text(at[0], height, text, ha=at[1], va="center", fontsize=9, bbox=box)
    panel.set_yticks(range(len(lines)), [row["text"] for row in lines])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.2 * limit)
    goal = 100 * (1 - TARGETS[workload])
    panel.axvline(goal, color="black", linewidth=1, linestyle="--", zorder=0.5)
    panel.grid(alpha=0.3, axis="x")
    about = "unused when an allocation fails, mean, % of the heap"
    panel.set_xlabel(f"{about}\n(dashed: kvheap's own goal, {goal:.3g})")
    panel.set_title(WORKLOADS[workload], fontsize=11)
