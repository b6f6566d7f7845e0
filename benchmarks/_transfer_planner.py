"""What ``bench_transfer.py`` measures of the planner: its choices, compared with each path."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from _report import Row
from _transfer_gpu import Gpu, GpuScale, can_take, clocked, figures

from kvheap.calibration.calibrate import calibrate
from kvheap.calibration.cuda_measure import CudaMeasure
from kvheap.device.copy_device import CopyDevice
from kvheap.device.cuda import find_device
from kvheap.planning.copy_table import CopyTable
from kvheap.planning.path_costs import MEASURED_DIRECTIONS, MEASURED_PATHS
from kvheap.planning.planner import forget_tables, table_for
from kvheap.planning.table_files import cache_path, save_table
from kvheap.transfer import copy
from kvheap.transfer.plan import CopyPlan


@dataclass(frozen=True)
class Tables:
    """The folders of two caches of tables: one with a table of this run, and one without any."""

    device: CopyDevice
    folders: Mapping[str, Path]

    def use(self, name: str) -> CopyTable:
        """Let the planner use this cache from now on; loads its table and returns it."""
        os.environ["KVHEAP_CACHE_DIR"] = str(self.folders[name])
        forget_tables()
        return table_for(self.device.name, self.device.driver_version)


@contextmanager
def calibrated(device: torch.device, scale: GpuScale) -> Iterator[Tables]:
    """Calibrate within a small budget, into a temporary folder."""
    found = find_device(device)
    assert found is not None
    kept = os.environ.get("KVHEAP_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder, name.replace(" ", "-")) for name in ("measured", "built in")}
        tables = Tables(found, folders)
        try:
            tables.use("measured")
            measure = CudaMeasure(device, scale.max_bytes)
            table = calibrate(
                measure,
                found.name,
                found.driver_version,
                budget_s=scale.calibration_s,
                max_bytes=measure.max_bytes,
            )
            save_table(table, cache_path(found.name, found.driver_version))
            del measure
            torch.cuda.empty_cache()
            tables.use("measured")
            yield tables
        finally:
            if kept is None:
                del os.environ["KVHEAP_CACHE_DIR"]
            else:
                os.environ["KVHEAP_CACHE_DIR"] = kept
            forget_tables()


def measure_planner(
    gpu: Gpu, tables: Tables, scale: GpuScale, left_out: list[str], elapsed: Callable[[], float]
) -> list[Row]:
    """The planner's choice, compared with each path by itself."""
    rows = []
    cells = [
        (count, piece, direction, pattern)
        for count, piece in product(scale.planner_counts, scale.planner_pieces)
        for direction in MEASURED_DIRECTIONS
        for pattern in (("scattered",) if direction == "d2d" else ("host run", "scattered"))
        if count * piece <= scale.max_bytes and 2 * count * piece <= gpu.host.nbytes
    ]
    cells.sort(key=lambda cell: cell[0] * cell[1])
    for count, piece, direction, pattern in cells:
        if elapsed() > scale.planner_until_s:
            left_out.append(f"planner: {direction}, {pattern}, {count:,} pieces of {piece >> 10} K")
            continue
        plans = [case.plan() for case in gpu.cases(direction, piece, count, pattern)]
        of_cell = {
            "direction": direction,
            "pattern": pattern,
            "piece_bytes": piece,
            "num_pieces": count,
            "bytes": count * piece,
        }
        rows += planner_rows(gpu, tables, plans, of_cell, scale.rounds)
    return rows


def planner_rows(
    gpu: Gpu, tables: Tables, plans: Sequence[CopyPlan], of_cell: Row, rounds: int
) -> list[Row]:
    """One cell: all paths and the planner in the same rounds; then the built-in table's choice."""
    paths = [path for path in MEASURED_PATHS if can_take(plans[0], path)]
    by_path = {path: [partial(copy, plan, path=path) for plan in plans] for path in paths}
    chosen_freely = [partial(copy, plan) for plan in plans]
    table = tables.use("measured")
    chosen = copy(plans[0]).path
    timings = clocked(gpu, {**by_path, "planner": chosen_freely}, rounds)
    best = min(paths, key=lambda path: timings[path].wall.percentile(50))
    rows = [
        of_cell | {"method": path} | figures(timings[path], timings[best], of_cell["bytes"])
        for path in paths
    ]
    rows.append(
        of_cell
        | {"method": "planner", "table": table.source, "chosen": chosen, "best": best}
        | figures(timings["planner"], timings[best], of_cell["bytes"])
    )
    table = tables.use("built in")
    chosen = copy(plans[0]).path
    timings = clocked(gpu, {best: by_path[best], "planner": chosen_freely}, rounds)
    rows.append(
        of_cell
        | {"method": "planner", "table": table.source, "chosen": chosen, "best": best}
        | figures(timings["planner"], timings[best], of_cell["bytes"])
    )
    tables.use("measured")
    for row in rows:
        row["share_of_best"] = row.pop("share_of_copy")
        row["share_of_best_by_events"] = row.pop("share_of_copy_by_events")
    return rows
