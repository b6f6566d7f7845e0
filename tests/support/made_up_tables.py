"""Made-up costs of copies, and tables that measure them exactly on the grid of a calibration."""

from __future__ import annotations

from itertools import product
from random import Random

from kvheap.device.directions import Direction, Path
from kvheap.planning.copy_table import CopyTable
from kvheap.planning.path_costs import (
    MEASURED_DIRECTIONS,
    MEASURED_PATHS,
    Cell,
    MeasuredCost,
    PathCost,
)

SIZES = [kib << 10 for kib in (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)]
COUNTS = [4**power for power in range(9)]
CELLS = [(size, count) for size, count in product(SIZES, COUNTS) if size * count <= 1 << 30]

Formulas = dict[tuple[Direction, Path], PathCost]


def made_up_costs(seed: int) -> Formulas:
    """Random costs of every direction and path that there is."""
    random = Random(seed)
    return {
        (direction, path): PathCost(
            random.uniform(5e-6, 80e-6), 10 ** random.uniform(-8, -5.7), random.uniform(1e10, 6e10)
        )
        for direction, path in product(MEASURED_DIRECTIONS, MEASURED_PATHS)
        if (direction, path) != ("d2d", "staged")
    }


def measured(costs: Formulas) -> CopyTable:
    """A table of cells that have exactly these costs."""
    cells = {
        of: MeasuredCost(
            tuple(
                Cell(size, count, cost.seconds(count, count * size), 0.01, 5)
                for size, count in CELLS
            )
        )
        for of, cost in costs.items()
    }
    return CopyTable("made up", "1.0", "measured", cells, versions={"kvheap": "0"})
