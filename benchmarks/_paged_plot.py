"""The picture of ``bench_paged_copy.py``: shares of ``copy_``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from _paged_cases import GPU_GEOMETRIES, LLAMA_8B, OPERATIONS, PATTERNS, Geometry
from _report import Row
from _spread import is_noisy, mark_noisy, spread_of


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw a panel for each operation and pattern."""
    rows = found["copies"]
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    on_gpu = found["driver"] is not None
    size = (5.5 * len(patterns), 8.5) if on_gpu else (5 * len(patterns), 7.5)
    figure, panels = plt.subplots(
        2, len(patterns), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    draw_panel = draw_lines if on_gpu else draw_bars
    for across, operation in zip(panels, OPERATIONS, strict=True):
        for panel, pattern in zip(across, patterns, strict=True):
            shown = [r for r in rows if (r["operation"], r["pattern"]) == (operation, pattern)]
            draw_panel(panel, shown)
            panel.axhline(1.0, color="black", linewidth=1)
            panel.set_title(f"{operation}, {PATTERNS[pattern]}")
            panel.grid(alpha=0.3, axis="both" if on_gpu else "y")
        across[0].set_ylabel("speed / speed of one copy_")
    if on_gpu:
        for panel in panels[1]:
            panel.set_xlabel("tokens")
    panels[0, 0].set_ylim(0, 1.08 * max(1.0, *(row["share_of_copy"] for row in rows)))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if on_gpu else {}
    columns = {} if on_gpu else {"ncols": len(labels), "loc": "lower center"}
    note = (
        "1.0 = copy_"
        if on_gpu
        else "1.0 = copy_; labels: kvheap against LMCache; lines: the middle 60 %"
    )
    title = f"Paged KV copy, {found['device']}, {found['date'][:10]} ({note})"
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(rect=(0, 0 if on_gpu else 0.05, 1, 1))
    figure.legend(handles, labels, **place, **columns)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_bars(panel: Any, rows: list[Row]) -> None:
    """Draw a group of bars for each engine layout, a bar for each method."""
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    methods = ("kvheap", "LMCache", "index", "loop")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        shown = {row["layout"]: row for row in rows if row["method"] == method}
        places = [layouts.index(layout) + (number - 1.5) * width for layout in shown]
        bars = panel.bar(
            places, [row["share_of_copy"] for row in shown.values()], width, label=method
        )
        for place, row in zip(places, shown.values(), strict=True):
            low, high = spread_of(row)
            share = row["share_of_copy"]
            panel.vlines(place, share / high, share / low, color="black", linewidth=1, alpha=0.6)
        noisy = [at for at, row in enumerate(shown.values()) if is_noisy(row)]
        shares = [row["share_of_copy"] for row in shown.values()]
        mark_noisy(panel, [places[at] for at in noisy], [shares[at] for at in noisy])
        if method == "kvheap":
            times = [row.get("times_lmcache") for row in shown.values()]
            texts = ["" if value is None else f"{value:.2f}x" for value in times]
            panel.bar_label(bars, texts, fontsize=8, padding=4)
    panel.set_xticks(range(len(layouts)), layouts, rotation=15)


def draw_lines(panel: Any, rows: list[Row]) -> None:
    """Draw shares over tokens: kvheap for each geometry; dashed, the peers for the first one."""
    peers = {"kvheap + upload": "P", "index": "^", "loop": "v", "list": "x"}
    for geometry in GPU_GEOMETRIES:
        label = f"{geometry.model}, {geometry.layout}"
        draw_line(panel, rows, geometry, "kvheap", marker="o", label=label)
    for method, marker in peers.items():
        look = {"color": "black", "linestyle": "--", "linewidth": 1, "marker": marker}
        label = f"{method}: {LLAMA_8B.model}, {LLAMA_8B.layout}"
        draw_line(panel, rows, LLAMA_8B, method, **look, label=label)
    counts = sorted({row["num_tokens"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [f"{count:,}" for count in counts])
    panel.minorticks_off()


def draw_line(panel: Any, rows: list[Row], geometry: Geometry, method: str, **look: Any) -> None:
    wanted = (geometry.model, geometry.layout, method)
    shown = [row for row in rows if (row["model"], row["layout"], row["method"]) == wanted]
    if shown:
        tokens = [row["num_tokens"] for row in shown]
        panel.plot(tokens, [row["share_of_copy"] for row in shown], **look)
