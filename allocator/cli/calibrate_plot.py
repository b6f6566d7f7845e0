"""The map of a table of copies: for each direction, the fastest path and its lead."""

from __future__ import annotations

from itertools import product
from math import log2
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from kvheap.device.directions import Direction
from kvheap.planning.copy_table import CopyTable
from kvheap.planning.path_costs import MEASURED_DIRECTIONS, MEASURED_PATHS, Cell
from kvheap.planning.published_costs import PUBLISHED_CROSSOVERS, Crossover

__all__ = ["draw"]

COLORS = {"kernel": "#c0570b", "copy_engine": "#1f4e9c", "staged": "#2b7a4b"}
"""Colours that colour-blind readers can tell apart; staging is the rarest path."""

TITLES = {
    "h2d": "host to device (h2d)",
    "d2h": "device to host (d2h)",
    "d2d": "within the device (d2d)",
}

SIZE_POWERS = np.arange(10, 22.01, 0.125)
COUNT_POWERS = np.arange(0, 16.01, 0.125)
"""Powers of two on the axes: 1 KiB to 4 MiB, and 1 to 65,536 pieces."""

NUMBERED_SIZES = range(11, 22, 2)
NUMBERED_COUNTS = range(1, 16, 2)
"""Powers of two at which the speedup is written as a number."""

FULL_SPEEDUP = 4.0
"""A path with at least this speedup over the second fastest is drawn in full colour."""

PALEST = 0.22
"""The strength of the colour of a path that is no faster than the second fastest."""


def draw(path: Path, table: CopyTable, source: str) -> None:
    """Draw ``table`` to ``path``; the suffix chooses the format (PNG, SVG, PDF).

    Args:
        path: the file.
        table: the costs to draw.
        source: where they come from, for the title.
    """
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{table.device_name}: the fastest path of a copy\n{source}{_margins_words(table)}",
        fontsize=12,
    )
    panels = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.04})
    crossovers = _crossovers(table.device_name)
    for axes, direction in zip(panels, MEASURED_DIRECTIONS, strict=True):
        marked = crossovers if direction == "h2d" else []
        _draw_panel(axes, table, direction)
        _number(axes, table, direction, marked)
        _hatch(axes, table.noisy_cells(direction))
        _mark(axes, marked)
    panels[0].set_ylabel("number of pieces")
    handles: list[Patch | Line2D] = [
        Patch(facecolor=COLORS[name], label=name.replace("_", " ")) for name in MEASURED_PATHS
    ]
    handles.append(
        Patch(facecolor="white", edgecolor="0.35", hatch="////", label="noisy measurement")
    )
    if crossovers:
        devices = " and ".join(dict.fromkeys(each.device for each in crossovers))
        label = f"published: the kernel overtakes the copy engine in between ({devices})"
        handles.append(Line2D([], [], color="black", marker="_", markersize=9, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Axes, table: CopyTable, direction: Direction) -> None:
    image = np.ones((len(COUNT_POWERS), len(SIZE_POWERS), 3))
    for row, count_power in enumerate(COUNT_POWERS):
        for column, size_power in enumerate(SIZE_POWERS):
            found = _winner(table, direction, count_power, size_power)
            if found is not None:
                image[row, column] = _shade(*found)
    axes.imshow(
        image,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(*_edges(SIZE_POWERS), *_edges(COUNT_POWERS)),
    )
    sizes, counts = range(10, 23, 2), range(0, 17, 2)
    axes.set_xticks(sizes, [_bytes(1 << power) for power in sizes])
    axes.set_yticks(counts, [f"{1 << power:,}" for power in counts])
    axes.set(
        title=TITLES[direction],
        xlabel="size of a piece (numbers: times as fast as the second)",
        xlim=_edges(SIZE_POWERS),
        ylim=_edges(COUNT_POWERS),
    )


def _number(axes: Axes, table: CopyTable, direction: Direction, marked: list[Crossover]) -> None:
    """Write the speedup over the second fastest path as numbers, but not over a bar."""
    for count_power, size_power in product(NUMBERED_COUNTS, NUMBERED_SIZES):
        found = _winner(table, direction, count_power, size_power)
        is_covered = any(
            abs(log2(each.piece_bytes) - size_power) < 0.5
            and log2(each.slower_at) - 0.5 < count_power < log2(each.faster_at) + 0.5
            for each in marked
        )
        if found is not None and not is_covered:
            speedup = found[1]
            axes.text(
                size_power,
                count_power,
                f"{speedup:.1f}" if speedup < 9.95 else f"{speedup:.0f}",
                color="white" if _strength(speedup) > 0.6 else "black",
                fontsize=8.5,
                ha="center",
                va="center",
            )


def _hatch(axes: Axes, cells: list[Cell]) -> None:
    """Hatch a square around each cell; cells of several paths in one place get one square."""
    for piece_bytes, num_pieces in {(cell.piece_bytes, cell.num_pieces) for cell in cells}:
        corner = (log2(piece_bytes) - 0.5, log2(num_pieces) - 0.5)
        axes.add_patch(
            Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="0.35", linewidth=0)
        )


def _winner(
    table: CopyTable, direction: Direction, count_power: float, size_power: float
) -> tuple[str, float] | None:
    """The chosen path, and its speedup over the second fastest; None if there are no costs.

    Times are multiplied by the table's margins, as in ``choose``: the chosen path is the fastest.
    """
    count = max(round(2.0**count_power), 1)
    num_bytes = round(count * 2.0**size_power)
    known = {
        path: seconds * table.margins.get(path, 1.0)
        for path in MEASURED_PATHS
        if (seconds := table.seconds(direction, path, count, num_bytes)) is not None
    }
    if not known:
        return None
    chosen = table.choose(direction, count, num_bytes, tuple(known))
    others = [seconds for path, seconds in known.items() if path != chosen]
    return chosen, min(others) / known[chosen] if others else FULL_SPEEDUP


def _strength(speedup: float) -> float:
    """The strength of the colour: 0 for no speedup, 1 from :data:`FULL_SPEEDUP` on."""
    return min(log2(speedup) / log2(FULL_SPEEDUP), 1.0)


def _shade(name: str, speedup: float) -> npt.NDArray[np.float64]:
    weight = PALEST + (1 - PALEST) * _strength(speedup)
    return 1 - weight * (1 - np.array(to_rgb(COLORS[name])))


def _mark(axes: Axes, crossovers: list[Crossover]) -> None:
    """Draw a bar between the two counts of each published crossover."""
    for each in crossovers:
        size = log2(each.piece_bytes)
        ends = [log2(each.slower_at), log2(each.faster_at)]
        axes.plot([size, size], ends, color="white", linewidth=4.5, solid_capstyle="butt")
        axes.plot([size, size], ends, color="black", linewidth=1.8, marker="_", markersize=9)


def _margins_words(table: CopyTable) -> str:
    words = [
        f"{path.replace('_', ' ')} counts as {margin:.3g} times as slow"
        for path, margin in table.margins.items()
    ]
    return f"\n{', '.join(words)}" if words else ""


def _crossovers(device_name: str) -> list[Crossover]:
    """The crossovers of a device. An H200 gets those of an H100, an unknown device gets all."""
    name = device_name.replace("H200", "H100")
    own = [each for each in PUBLISHED_CROSSOVERS if each.device in name]
    return own or list(PUBLISHED_CROSSOVERS)


def _edges(powers: npt.NDArray[np.float64]) -> tuple[float, float]:
    half = (powers[1] - powers[0]) / 2
    return float(powers[0] - half), float(powers[-1] + half)


def _bytes(size: int) -> str:
    return f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
