"""The picture of a replay: occupancy, hit rates, and the map of the heap over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvheap.sizes import size_text

__all__ = ["draw"]

AGE_COLOURS = "cividis_r"
"""A colour map from new (light) to old (dark), readable if colour-blind and in grey prints."""


MINUTES_FROM_S = 120
"""Traces of so many seconds have their times in minutes."""

POLICY_COLOURS = {"lru": "#00224e", "arc": "#7f7f7f", "s3fifo": "#2a9d8f", "gdsf": "#c98b00"}


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Draw a replay into a file whose suffix chooses the format: PNG, SVG or PDF.

    Args:
        path: the file.
        figures: what ``--json`` writes, with ``samples``, and perhaps ``compared``.
    """
    samples, compared = figures["samples"], figures.get("compared")
    # Requests are served in the order of the file; if its clock steps back, time stands still.
    times_s = np.maximum.accumulate([sample["timestamp_ms"] for sample in samples]) / 1000
    unit, unit_s = ("minutes", 60) if np.ptp(times_s) >= MINUTES_FROM_S else ("seconds", 1)
    times = times_s / unit_s
    heap_mib = figures["heap_bytes"] / 2**20

    figure = Figure(figsize=(10, 10.5 if compared else 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    if compared:
        rates, top, middle, bottom = figure.subplots(4, 1, height_ratios=[3, 3, 4, 0.7])
        _draw_rates(rates, figures)
    else:
        top, middle, bottom = figure.subplots(3, 1, height_ratios=[3, 4, 0.7])
    figure.suptitle(
        f"{figures['trace']}: chunks of {size_text(figures['chunk_bytes'])} "
        f"({figures['geometry']}) in a heap of {size_text(figures['heap_bytes'])}, "
        f"policy {figures['policy']}\n"
        f"{figures['device']}, kvheap {figures['versions']['kvheap']}: "
        f"{figures['requests']:,} requests, {figures['hit_rate']:.1%} hits, "
        f"{figures['evicted']:,} evicted, {figures['mismatches']:,} mismatches",
        fontsize=11,
    )

    occupancy = [100 * sample["utilization"] for sample in samples]
    top.plot(times, occupancy, color="#00224e", label="occupancy")
    hits = np.array([sample["hits"] for sample in samples])
    refs = np.array([sample["block_refs"] for sample in samples])
    window = max(1, len(samples) // 30)
    recent_hits = hits - np.concatenate((np.zeros(window, int), hits))[: len(hits)]
    recent_refs = refs - np.concatenate((np.zeros(window, int), refs))[: len(refs)]
    hit_rate = 100 * recent_hits / np.maximum(recent_refs, 1)
    top.plot(times, hit_rate, color="#c98b00", label="hit rate (moving)")
    top.set(ylabel="%", ylim=(0, 105), xlim=(times[0], max(times[-1], times[0] + 1e-9)))
    evicts = (
        "the heap fills, then chunks are evicted" if figures["evicted"] else "nothing is evicted"
    )
    top.set_title(evicts, fontsize=10)
    top.grid(alpha=0.3)
    top.legend(loc="center right", ncols=2)

    # Ranges that are mostly free have no age and stay white.
    ages = np.array([sample["age_s"] for sample in samples], float) / unit_s
    oldest = max(float(np.nanmax(ages, initial=0.0)), 1e-9)
    image = middle.pcolormesh(
        times,
        np.linspace(0, heap_mib, ages.shape[1]),
        ages.T,
        cmap=AGE_COLOURS,
        vmin=0,
        vmax=oldest,
        shading="nearest",
        rasterized=True,
    )
    middle.set(xlabel=f"trace time, {unit}", ylabel="address, MiB")
    figure.colorbar(
        image, ax=[middle, bottom], label=f"{unit} since stored (white: free)", pad=0.01
    )
    bottom.imshow(
        ages[-1:], aspect="auto", cmap=AGE_COLOURS, vmin=0, vmax=oldest, extent=(0, heap_mib, 0, 1)
    )
    bottom.set(yticks=[], xlabel="address, MiB")
    largest = size_text(figures["largest_free_bytes"])
    bottom.set_title(
        f"at the end: {figures['free_extents']:,} free extents"
        f"{'' if figures['free_extents'] == 0 else ', the largest ' + largest}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _draw_rates(panel: Axes, figures: dict[str, Any]) -> None:
    """Draw the hit rate over the size of the heap, a line for each policy."""
    compared = figures["compared"]
    sizes = sorted({row["heap_bytes"] for row in compared})
    for policy in dict.fromkeys(row["policy"] for row in compared):
        rows = sorted(
            (row for row in compared if row["policy"] == policy), key=lambda row: row["heap_bytes"]
        )
        panel.plot(
            [row["heap_bytes"] for row in rows],
            [100 * row["hit_rate"] for row in rows],
            color=POLICY_COLOURS.get(policy),
            marker="o",
            label=policy,
        )
    most = 100 * figures["most_hits"]
    panel.axhline(most, color="black", linewidth=1, linestyle="--", label="nothing evicted")
    panel.axvline(figures["heap_bytes"], color="black", linewidth=1, linestyle=":")
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [f"{size / 2**20:,.4g}" for size in sizes])
    panel.minorticks_off()
    panel.set(xlabel="heap, MiB (dotted: the one below)", ylabel="hits, %", ylim=(0, 1.1 * most))
    panel.set_title("hit rate by policy and size of the heap", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", ncols=5)
