"""The picture of a replay: occupancy and hit rate, and the map of the heap over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvheap.replay.replay import Replay

__all__ = ["draw"]

AGE_COLOURS = "cividis_r"
"""A colour map from new (light) to old (dark), readable if colour-blind and in grey prints."""


def draw(path: Path, replay: Replay, figures: dict[str, Any]) -> None:
    """Draw the replay's samples into a file whose suffix chooses the format: PNG, SVG or PDF."""
    samples = replay.samples
    # Requests are served in the order of the file; if its clock steps back, time stands still.
    minutes = np.maximum.accumulate([sample.timestamp_ms for sample in samples]) / 60_000
    occupancy = np.array([sample.occupancy for sample in samples])
    heap_mib = figures["heap_bytes"] / 2**20

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=[3, 4, 0.7])
    figure.suptitle(
        f"{figures['trace']}: {figures['geometry']} in a heap of {heap_mib:,.0f} MiB, "
        f"policy {figures['policy']}\n"
        f"{figures['device']}, kvheap {figures['versions']['kvheap']}: "
        f"{figures['requests']:,} requests, {figures['hit_rate']:.1%} hits, "
        f"{figures['evicted']:,} evicted, {figures['mismatches']:,} mismatches",
        fontsize=11,
    )

    top.plot(minutes, [100 * s.utilization for s in samples], color="#00224e", label="occupancy")
    hits = np.array([sample.hits for sample in samples])
    refs = np.array([sample.block_refs for sample in samples])
    window = max(1, len(samples) // 30)
    recent_hits = hits - np.concatenate((np.zeros(window, int), hits))[: len(hits)]
    recent_refs = refs - np.concatenate((np.zeros(window, int), refs))[: len(refs)]
    hit_rate = 100 * recent_hits / np.maximum(recent_refs, 1)
    top.plot(minutes, hit_rate, color="#c98b00", label="hit rate (moving)")
    top.set(ylabel="%", ylim=(0, 105), xlim=(minutes[0], max(minutes[-1], minutes[0] + 1e-9)))
    top.grid(alpha=0.3)
    top.legend(loc="lower right", ncols=2)

    # Ranges that are mostly free stay white; the others are coloured by their age.
    ages = np.array([sample.age_ms for sample in samples]) / 60_000
    ages = np.where(occupancy > 0.5, ages, np.nan)
    oldest = max(float(np.nanmax(ages, initial=0.0)), 1e-9)
    image = middle.pcolormesh(
        minutes,
        np.linspace(0, heap_mib, ages.shape[1]),
        ages.T,
        cmap=AGE_COLOURS,
        vmin=0,
        vmax=oldest,
        shading="nearest",
        rasterized=True,
    )
    middle.set(xlabel="trace time, minutes", ylabel="address, MiB")
    figure.colorbar(
        image, ax=[middle, bottom], label="minutes since stored (white: free)", pad=0.01
    )
    bottom.imshow(
        ages[-1:], aspect="auto", cmap=AGE_COLOURS, vmin=0, vmax=oldest, extent=(0, heap_mib, 0, 1)
    )
    bottom.set(yticks=[], xlabel="address, MiB")
    bottom.set_title(
        f"at the end: {figures['free_extents']:,} free extents, the largest "
        f"{figures['largest_free_bytes'] / 2**20:,.2f} MiB",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
