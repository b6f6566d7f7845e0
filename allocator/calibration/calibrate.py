"""Calibration: measures the cost of each path of a copy on a device.

:func:`calibrate` decides what to measure and how often. It measures through a
:data:`~kvheap.calibration.measure.Measure`: on a GPU that is
:class:`~kvheap.calibration.cuda_measure.CudaMeasure`, in tests a simulated device.

The time budget is spent on, in this order:

1. The SM budget of the host link, if it is to be measured: the fewest SMs that saturate it. What
   follows is measured with that budget.
2. A survey of a grid of counts and sizes: each cell once, small copies first. If time runs out, the
   largest cells are missing, and those are the ones that ``MeasuredCost`` extrapolates best.
3. Cliffs: if time jumps between two neighbouring sizes, sizes between them are measured until
   neighbours are within an eighth of each other. (On an H100, the copy engine takes twice as long
   for 24 KiB as for 28 KiB.)
4. Noisy cells: they are measured again until they are no longer noisy, unless their path is clearly
   not the fastest.

This module imports no torch.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from itertools import pairwise, product
from time import perf_counter

import numpy as np

from kvheap import __version__
from kvheap.calibration.link_budget import ROUNDS, TRIED_SMS, find_link_sms
from kvheap.calibration.measure import MAX_COPY_BYTES, CalibrationError, LinkMeasure, Measure
from kvheap.device.directions import Direction, Path
from kvheap.planning.copy_table import CopyTable
from kvheap.planning.link_sms import LINK_DIRECTIONS
from kvheap.planning.path_costs import MEASURED_DIRECTIONS, MEASURED_PATHS, Cell, MeasuredCost

__all__ = ["GRID_COUNTS", "GRID_SIZES", "MAX_CALLS", "Progress", "calibrate"]

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``; the total grows when more cells turn out to need measuring."""

GRID_SIZES = tuple(kib << 10 for kib in (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096))
"""Bytes of a piece; twice as dense in the range of KV blocks and of the published cliffs."""

GRID_COUNTS = tuple(4**step for step in range(9))
"""Numbers of pieces. They start at 1, since merging neighbours often leaves one run of a batch."""

LINK_SHARE = 0.1
"""The share of the budget within which the SM budget must be found, or it is left out."""

SURVEY_SHARE = 0.7
CLIFFS_SHARE = 0.85
"""The shares of the budget after which the survey, and then the search for cliffs, must end."""

CLIFF_DROP = 0.9
CLIFF_JUMP = 1.25
"""There is a cliff if the larger size takes less than this share of the smaller one's time, or more
than this multiple of the time by proportional growth; see benchmarks/NOTES.md."""

CLIFF_CLOSE = 1.125
"""Two sizes whose ratio is below this are close enough: none is measured between them."""

SIZE_STEP = 256
"""Bytes; the sizes measured between those of the grid are multiples of it."""

MAX_CALLS = 5
"""The most times that a noisy cell is measured. All its samples are pooled."""

CLEARLY_SLOWER = 2.0
"""A path that takes this many times as long as the fastest is not measured again, because noise
cannot make it the fastest."""

Key = tuple[Direction, Path, int, int]
"""Direction, path, number of pieces, bytes of each piece."""


def calibrate(
    measure: Measure,
    device_name: str,
    driver_version: str,
    *,
    link: LinkMeasure | None = None,
    progress: Progress | None = None,
    budget_s: float = 60.0,
    max_bytes: int = MAX_COPY_BYTES,
    versions: Mapping[str, str] | None = None,
    clock: Callable[[], float] = perf_counter,
) -> CopyTable:
    """Measure the cost of each path in each direction. Stores nothing.

    Args:
        measure: measures one cell; it decides how often a call repeats the copy.
        device_name: the device's name, as CUDA reports it.
        driver_version: version of its driver.
        link: measures the SM budget of the host link; None: it is not measured, and copies have the
            one that they have.
        progress: called after every measurement.
        budget_s: seconds within which measurements are started; the last one may end later.
        max_bytes: bytes of the largest copy; larger cells are left out.
        versions: versions of other software that was used, for the table.
        clock: returns the time in seconds.

    Returns:
        A table with ``source="measured"``.

    Raises:
        ValueError: ``budget_s`` is not positive, or ``max_bytes`` is too small for a single cell.
        CalibrationError: no path could be measured in any direction.
    """
    if not budget_s > 0:
        raise ValueError(f"budget_s must be positive, got {budget_s}")
    if max_bytes < GRID_COUNTS[0] * GRID_SIZES[0]:
        raise ValueError(f"max_bytes is {max_bytes}: too small for a single cell")
    run = _Calibration(measure, progress, max_bytes, budget_s, clock)
    if link is not None:
        run.find_link_sms(link)
    run.survey()
    run.part_cliffs()
    run.repeat_noisy()
    costs = run.costs()
    if not costs:
        raise CalibrationError(f"no path could be measured on {device_name}")
    return CopyTable(
        device_name,
        driver_version,
        "measured",
        costs,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={
            "kvheap": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            **(versions or {}),
        },
        link_sms=run.link_sms,
    )


class _Calibration:
    """A calibration in progress: the samples so far, and the time that is left."""

    def __init__(
        self,
        measure: Measure,
        progress: Progress | None,
        max_bytes: int,
        budget_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._measure = measure
        self._progress = progress
        self._max_bytes = max_bytes
        self._budget_s = budget_s
        self._clock = clock
        self._start = clock()
        self.link_sms: dict[Direction, int] = {}
        self._samples: dict[Key, list[float]] = {}
        self._done = 0
        self._total = 0

    def find_link_sms(self, link: LinkMeasure) -> None:
        """Find the SM budget of each direction over the link; later copies have it."""

        def measure(direction: Direction, num_sms: int) -> list[float] | None:
            samples = link(direction, num_sms)
            self._tell(f"{direction} SMs")
            return samples

        self._total = ROUNDS * len(LINK_DIRECTIONS) * len(TRIED_SMS)
        self.link_sms = find_link_sms(measure, lambda: self._is_late(LINK_SHARE))
        self._total = self._done

    def survey(self) -> None:
        """Measure every cell of the grid once, in order of bytes, with all paths of a cell."""
        cells = [
            (count, size)
            for count, size in product(GRID_COUNTS, GRID_SIZES)
            if count * size <= self._max_bytes
        ]
        cells.sort(key=lambda cell: (cell[0] * cell[1], cell))
        groups = [
            [(direction, path, *cell) for path in _paths_of(direction)]
            for cell, direction in product(cells, MEASURED_DIRECTIONS)
        ]
        self._total += sum(map(len, groups))
        for group in groups:
            if self._is_late(SURVEY_SHARE):
                return
            for key in group:
                self._call(key)

    def part_cliffs(self) -> None:
        """Measure sizes between neighbours if time jumps there, and repeat for the new gaps."""
        open_pairs = [
            (direction, path, *sizes)
            for direction in MEASURED_DIRECTIONS
            for path in _paths_of(direction)
            for sizes in pairwise(GRID_SIZES)
        ]
        while open_pairs:
            direction, path, low, high = open_pairs.pop()
            middle = (low + high) // 2 // SIZE_STEP * SIZE_STEP
            if middle <= low or high / low < CLIFF_CLOSE:
                continue
            if not self._is_cliff(direction, path, low, high):
                continue
            counts = [count for count in GRID_COUNTS if count * middle <= self._max_bytes]
            self._total += len(counts)
            for count in counts:
                if self._is_late(CLIFFS_SHARE):
                    return
                self._call((direction, path, count, middle))
            open_pairs += [(direction, path, low, middle), (direction, path, middle, high)]

    def repeat_noisy(self) -> None:
        """Measure noisy cells again, once per round; the survey was their first measurement."""
        for _ in range(1, MAX_CALLS):
            noisy = [key for key in self._samples if self._is_worth_repeating(key)]
            self._total += len(noisy)
            for key in noisy:
                if self._is_late(1.0):
                    return
                self._call(key)

    def costs(self) -> dict[tuple[Direction, Path], MeasuredCost]:
        """The measured costs by direction and path."""
        cells: dict[tuple[Direction, Path], list[Cell]] = {}
        for (direction, path, count, size), samples in self._samples.items():
            median, spread = _summary(samples)
            cell = Cell(size, count, median, spread, len(samples))
            cells.setdefault((direction, path), []).append(cell)
        return {of: MeasuredCost(tuple(sorted(some))) for of, some in sorted(cells.items())}

    def _call(self, key: Key) -> None:
        direction, path = key[:2]
        if direction in self.link_sms:
            samples = self._measure(*key, max_sms=self.link_sms[direction])
        else:
            samples = self._measure(*key)
        if samples:
            self._samples.setdefault(key, []).extend(samples)
        self._tell(f"{direction} {path.replace('_', ' ')}")

    def _tell(self, what: str) -> None:
        """Count a measurement."""
        self._done += 1
        self._total = max(self._total, self._done)
        if self._progress is not None:
            self._progress(self._done, self._total, what)

    def _is_late(self, share: float) -> bool:
        """Whether this share of the budget has passed."""
        return self._clock() - self._start >= share * self._budget_s

    def _is_cliff(self, direction: Direction, path: Path, low: int, high: int) -> bool:
        """Whether time jumps between two sizes for at least two counts; one could be noise."""
        jumps = 0
        for count in GRID_COUNTS:
            before = self._samples.get((direction, path, count, low))
            after = self._samples.get((direction, path, count, high))
            if before and after:
                ratio = _summary(after)[0] / _summary(before)[0]
                jumps += not CLIFF_DROP <= ratio <= CLIFF_JUMP * high / low
        return jumps >= 2

    def _is_worth_repeating(self, key: Key) -> bool:
        """Whether a cell is noisy and its path could be the fastest."""
        direction, _, count, size = key
        median, spread = _summary(self._samples[key])
        if not Cell(size, count, median, spread, 1).is_noisy:
            return False
        rivals = (self._samples.get((direction, path, count, size)) for path in MEASURED_PATHS)
        return median < CLEARLY_SLOWER * min(_summary(each)[0] for each in rivals if each)


def _paths_of(direction: Direction) -> Iterator[Path]:
    """The paths of a direction; only copies between host and device can be staged."""
    return (path for path in MEASURED_PATHS if path != "staged" or direction != "d2d")


def _summary(samples: list[float]) -> tuple[float, float]:
    """The median, and the interquartile range as a share of it."""
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    return median, (high - low) / median
