"""The picture of a snapshot: the heap's map by state, by age and by owner."""

from __future__ import annotations

from textwrap import shorten

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kvheap.snapshots.heap_map import STATES, HeapMap
from kvheap.snapshots.summary import bytes_text, headline_of, notes_of

__all__ = ["STATE_COLOURS", "bytes_by_cell", "draw"]

STATE_COLOURS = {
    "free": "#e9edf2",
    "live": "#3b76b8",
    "pinned": "#14304f",
    "pending": "#e8a33d",
    "quarantined": "#c0392b",
    "other": "#8a8f98",
}
OWNER_COLOURS = ("#3b76b8", "#e8a33d", "#4c9f70", "#b5598f", "#7a6fbf", "#a3773b", "#4aa7b5")

ROWS, COLUMNS = 32, 256
"""Cells of the map."""

Cells = npt.NDArray[np.float64]


def bytes_by_cell(snapshot: HeapMap, rows: npt.NDArray[np.bool_], num_cells: int) -> Cells:
    """Bytes of some extents in each of equal parts of the heap, float64 ``[num_cells]``.

    Args:
        snapshot: the heap.
        rows: which extents, bool ``[E]``.
        num_cells: how many parts.
    """
    ends = np.append(0, snapshot.starts + snapshot.sizes)
    filled = np.append(0, np.cumsum(np.where(rows, snapshot.sizes, 0)))
    walls = np.linspace(0, snapshot.heap_bytes, num_cells + 1)
    found: Cells = np.diff(np.interp(walls, ends, filled))
    return found


def draw(snapshot: HeapMap) -> Figure:
    """A figure of three maps, each with its legend."""
    figure = Figure(figsize=(11, 10), layout="constrained")
    FigureCanvasAgg(figure)
    by_state, by_age, by_owner = figure.subplots(3, 1)
    title = [headline_of(snapshot), f"{snapshot.time}, kvheap {snapshot.version}"]
    figure.suptitle("\n".join(title + notes_of(snapshot)), fontsize=10)
    layers = [
        (name, colour, snapshot.states == STATES.index(name))
        for name, colour in STATE_COLOURS.items()
    ]
    _draw_map(by_state, snapshot, layers, "by state")
    _draw_ages(figure, by_age, snapshot)
    uses = snapshot.uses()
    owners = []
    rest = snapshot.batches >= 0
    for use, colour in zip(uses, OWNER_COLOURS, strict=False):
        rows = snapshot.extent_owners == snapshot.owners.index(use.owner)
        label = shorten(f"{bytes_text(use.num_bytes)}: {use.owner}", 100, placeholder=" ...")
        owners.append((label, colour, rows))
        rest &= ~rows
    owners.append(("other owners", STATE_COLOURS["other"], rest))
    owners.append(("no owner", STATE_COLOURS["free"], snapshot.batches < 0))
    _draw_map(by_owner, snapshot, owners, "by owner", columns=1)
    return figure


def _draw_map(
    panel: object,
    snapshot: HeapMap,
    layers: list[tuple[str, str, npt.NDArray[np.bool_]]],
    title: str,
    columns: int = 6,
) -> None:
    """Each cell in the mixed colours of its bytes."""
    num_cells = ROWS * COLUMNS
    cell_bytes = snapshot.heap_bytes / num_cells or 1.0
    image = np.zeros((num_cells, 3))
    shown = []
    for name, colour, rows in layers:
        if rows.any():
            share = bytes_by_cell(snapshot, rows, num_cells) / cell_bytes
            image += share[:, None] * np.array(to_rgb(colour))
            shown.append(Patch(facecolor=colour, edgecolor="#555555", linewidth=0.5, label=name))
    _show(panel, snapshot, image.reshape(ROWS, COLUMNS, 3).clip(0, 1), title)
    panel.legend(  # type: ignore[attr-defined]
        handles=shown,
        ncols=columns,
        loc="upper left",
        bbox_to_anchor=(0, -0.02),
        fontsize=8,
        frameon=False,
    )


def _draw_ages(figure: Figure, panel: object, snapshot: HeapMap) -> None:
    known = ~np.isnan(snapshot.ages)
    num_cells = ROWS * COLUMNS
    covered = bytes_by_cell(snapshot, known, num_cells)
    ends = np.append(0, snapshot.starts + snapshot.sizes)
    weighted = np.append(0, np.cumsum(np.where(known, snapshot.ages * snapshot.sizes, 0)))
    walls = np.linspace(0, snapshot.heap_bytes, num_cells + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ages = np.diff(np.interp(walls, ends, weighted)) / covered
    ages[covered <= 0] = np.nan
    image = _show(panel, snapshot, ages.reshape(ROWS, COLUMNS), "by age")
    if np.isfinite(ages).any():
        figure.colorbar(image, ax=panel, label="seconds since allocation", pad=0.01)  # type: ignore[arg-type]


def _show(panel: object, snapshot: HeapMap, image: Cells, title: str) -> object:
    shown = panel.imshow(  # type: ignore[attr-defined]
        image,
        aspect="auto",
        interpolation="nearest",
        cmap="cividis_r",
        extent=(0, COLUMNS, ROWS, 0),
    )
    row_bytes = snapshot.heap_bytes / ROWS
    panel.set(  # type: ignore[attr-defined]
        title=f"{title}: a row is {bytes_text(int(row_bytes))}, addresses go right, then down",
        xticks=[],
        yticks=range(0, ROWS + 1, 8),
        yticklabels=[bytes_text(int(row * row_bytes)) for row in range(0, ROWS + 1, 8)],
    )
    panel.title.set_fontsize(10)  # type: ignore[attr-defined]
    return shown
