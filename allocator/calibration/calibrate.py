"""Calibration: what each path of a transfer costs on this device, measured cell by cell.

:func:`calibrate` decides what to measure and how often; what it asks, a :data:`Measure`, is
:class:`CudaMeasure` on a GPU and a made-up world in tests. The budget goes, in this order, to

1. a survey of the grid, small copies first, one call for each cell: what remains when time runs
   out are the largest cells, which ``MeasuredCost`` extrapolates best;
2. cliffs: where time jumps between two sizes (on an H100 the copy engine takes twice as long for
   24 KiB as for 28 KiB), sizes between them, until they are an eighth apart;
3. noisy cells, again and again until they are not, except those that are clearly not the fastest.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from itertools import pairwise, product
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvheap.errors import TransferError
from kvheap.planning.path_costs import DIRECTIONS, PATHS, Cell, Direction, MeasuredCost, Path
from kvheap.planning.planner import CopyTable

if TYPE_CHECKING:
    import torch

__all__ = ["GRID_COUNTS", "GRID_SIZES", "CalibrationError", "CudaMeasure", "Measure", "calibrate"]

Measure = Callable[[Direction, Path, int, int], "list[float] | None"]
"""``measure(direction, path, num_pieces, piece_bytes)``: the seconds of several repetitions. None
where the path cannot be taken, or there is no memory for so much."""

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``; the total grows when more turns out to be worth measuring."""

GRID_SIZES = tuple(kib << 10 for kib in (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096))
"""Twice as dense where blocks of KV are, and where the cliffs of two published devices are."""

GRID_COUNTS = tuple(4**step for step in range(9))
"""From 1: what merging leaves of a batch is often a single run."""

MAX_BYTES = 1 << 30
"""Of one copy: larger ones are bound by bytes, and take as long as they are large."""

SURVEY_SHARE = 0.7
CLIFFS_SHARE = 0.85
"""When the survey and the look for cliffs must end, as shares of the budget."""

CLIFF_DROP = 0.9
CLIFF_JUMP = 1.25
"""Time must not fall below so much of a smaller size's, or grow so much more than in proportion."""

CLIFF_CLOSE = 1.125
"""Sizes that are closer together are not parted further."""

SIZE_STEP = 256
"""Sizes between those of the grid are multiples of it."""

MAX_CALLS = 5
"""How often a noisy cell is measured in all. Its times are pooled."""

CLEARLY_SLOWER = 2.0
"""A path that takes so many times as long as the fastest is not measured again: no noise will
make it the fastest."""

Key = tuple[Direction, Path, int, int]
"""Direction, path, number of pieces, bytes of each."""


class CalibrationError(RuntimeError):
    """Nothing could be measured."""


def calibrate(
    measure: Measure,
    device_name: str,
    driver_version: str,
    *,
    progress: Progress | None = None,
    budget_s: float = 60.0,
    max_bytes: int = MAX_BYTES,
    versions: Mapping[str, str] | None = None,
    clock: Callable[[], float] = perf_counter,
) -> CopyTable:
    """Measure what each path costs in each direction. Stores nothing.

    Args:
        measure: what is asked; it decides how often a call repeats the copy.
        device_name: as CUDA calls the device.
        driver_version: of its driver.
        progress: told after every call.
        budget_s: seconds in which to begin calls; the last one ends later.
        max_bytes: of one copy; larger cells are left out.
        versions: of what else took part, for the table.
        clock: seconds that pass.

    Returns:
        A table with ``source="measured"``.

    Raises:
        ValueError: the budget or ``max_bytes`` is not positive, or too small for a single cell.
        CalibrationError: no path could be measured in any direction.
    """
    if not budget_s > 0:
        raise ValueError(f"budget_s must be positive, got {budget_s}")
    if max_bytes < GRID_COUNTS[0] * GRID_SIZES[0]:
        raise ValueError(f"max_bytes is {max_bytes}: too small for a single cell")
    run = _Calibration(measure, progress, max_bytes, budget_s, clock)
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
        versions={**_own_versions(), **(versions or {})},
    )


def _own_versions() -> dict[str, str]:
    from kvheap import __version__

    return {
        "kvheap": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


class _Calibration:
    """One calibration under way: what was measured, how often, and how much time is left."""

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
        self._samples: dict[Key, list[float]] = {}
        self._calls: dict[Key, int] = {}
        self._done = 0
        self._total = 0

    def survey(self) -> None:
        """Every cell of the grid once: all paths of a cell, then the next larger one."""
        cells = [
            (count, size)
            for count, size in product(GRID_COUNTS, GRID_SIZES)
            if count * size <= self._max_bytes
        ]
        cells.sort(key=lambda cell: (cell[0] * cell[1], cell))
        groups = [
            [(direction, path, *cell) for path in _paths_of(direction)]
            for cell, direction in product(cells, DIRECTIONS)
        ]
        self._total = sum(map(len, groups))
        for group in groups:
            if self._is_late(SURVEY_SHARE):
                return
            for key in group:
                self._call(key)

    def part_cliffs(self) -> None:
        """Sizes between any two of a path between which time jumps."""
        open_pairs = [
            (direction, path, *sizes)
            for direction in DIRECTIONS
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
        """Measure noisy cells again, each once a round, until they are not or have had enough."""
        for _ in range(1, MAX_CALLS):
            noisy = [key for key in self._samples if self._is_worth_repeating(key)]
            self._total += len(noisy)
            for key in noisy:
                if self._is_late(1.0):
                    return
                self._call(key)

    def costs(self) -> dict[tuple[Direction, Path], MeasuredCost]:
        """What was measured, by direction and path."""
        cells: dict[tuple[Direction, Path], list[Cell]] = {}
        for (direction, path, count, size), samples in self._samples.items():
            median, spread = _summary(samples)
            cell = Cell(size, count, median, spread, len(samples))
            cells.setdefault((direction, path), []).append(cell)
        return {of: MeasuredCost(tuple(sorted(some))) for of, some in sorted(cells.items())}

    def _call(self, key: Key) -> None:
        direction, path, count, size = key
        samples = self._measure(direction, path, count, size)
        if samples:
            self._samples.setdefault(key, []).extend(samples)
        self._calls[key] = self._calls.get(key, 0) + 1
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, f"{direction} {path.replace('_', ' ')}")

    def _is_late(self, share: float) -> bool:
        return self._clock() - self._start >= share * self._budget_s

    def _is_cliff(self, direction: Direction, path: Path, low: int, high: int) -> bool:
        """Whether time jumps at two counts at least: one may be noise."""
        jumps = 0
        for count in GRID_COUNTS:
            before = self._samples.get((direction, path, count, low))
            after = self._samples.get((direction, path, count, high))
            if before and after:
                ratio = _summary(after)[0] / _summary(before)[0]
                jumps += not CLIFF_DROP <= ratio <= CLIFF_JUMP * high / low
        return jumps >= 2

    def _is_worth_repeating(self, key: Key) -> bool:
        direction, _, count, size = key
        median, spread = _summary(self._samples[key])
        if not Cell(size, count, median, spread, 1).is_noisy or self._calls[key] >= MAX_CALLS:
            return False
        rivals = (self._samples.get((direction, path, count, size)) for path in PATHS)
        return median < CLEARLY_SLOWER * min(_summary(each)[0] for each in rivals if each)


def _paths_of(direction: Direction) -> Iterator[Path]:
    """The paths that there are; staging is for a contiguous host side."""
    return (path for path in PATHS if path != "staged" or direction != "d2d")


def _summary(samples: list[float]) -> tuple[float, float]:
    """The median, and how far the middle half spreads as a share of it."""
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    return median, (high - low) / median


# -- on a GPU ------------------------------------------------------------------------------------

TIMED_S = 0.05
MIN_REPETITIONS = 3
MAX_REPETITIONS = 11
"""A call repeats a copy for about so long, but so often at least and at most."""

MIN_BUFFER_BYTES = 64 << 20


class CudaMeasure:
    """Measures copies by :func:`kvheap.transfer.copy` on a CUDA device.

    What is timed is what a caller waits for that has an idle stream: from before the call of
    ``copy`` to the end of the last byte on the device. The event that starts the clock is recorded
    on the idle stream before ``copy`` is called, so what the host takes to submit is in it; where
    the host is busy with the call for longer still, the host's time counts. Making the plan is
    not in it: it is the same for every path. Nor are the first copies of each kind, which compile.

    The device's pieces are scattered at random, on a side stream that nothing else uses; the
    host's are contiguous, as for an offload into a fresh extent. Every repetition has pieces of
    its own, so that a plan never finds its descriptors uploaded, nor small copies their bytes in
    the L2 cache. Copies within the device are scattered on both sides.

    Args:
        device: a CUDA device.
        max_bytes: of one copy. Two buffers on the device and one in pinned host memory have as
            much, or half as often as it takes where there is no room.

    Raises:
        CalibrationError: there is no room for buffers of 64 MiB, or of ``max_bytes`` if less.

    Attributes:
        max_bytes: the bytes of each buffer.
    """

    def __init__(self, device: torch.device | str, max_bytes: int = MAX_BYTES) -> None:
        import torch

        self._device = torch.device(device)
        self._random = np.random.default_rng(0)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):  # else memory is pinned for the current one
            self._first, self._second, self._host = self._buffers(max_bytes)
        self.max_bytes = self._host.nbytes

    def __call__(
        self, direction: Direction, path: Path, num_pieces: int, piece_bytes: int
    ) -> list[float] | None:
        """See :data:`Measure`."""
        import torch

        if num_pieces * piece_bytes > self.max_bytes:
            return None
        try:
            with torch.cuda.device(self._device):
                return self._repeat(direction, path, num_pieces, piece_bytes)
        except torch.cuda.OutOfMemoryError:
            return None
        except TransferError as error:
            if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
                return None
            raise

    def _repeat(
        self, direction: Direction, path: Path, num_pieces: int, piece_bytes: int
    ) -> list[float] | None:
        first = self._time(direction, path, num_pieces, piece_bytes)  # it may compile
        if first is None:
            return None
        repetitions = min(max(round(TIMED_S / max(first, 1e-6)), MIN_REPETITIONS), MAX_REPETITIONS)
        some = [self._time(direction, path, num_pieces, piece_bytes) for _ in range(repetitions)]
        return [seconds for seconds in some if seconds is not None]

    def _buffers(self, max_bytes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        def zeros(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            first = torch.zeros(size, dtype=torch.uint8, device=self._device)
            second = torch.zeros_like(first)
            host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
            torch.cuda.synchronize(self._device)
            return first, second, host

        size = max_bytes
        while size // 2 >= MIN_BUFFER_BYTES:
            with suppress(RuntimeError):  # torch's, where memory or memory to pin is out
                return zeros(size)
            size //= 2
        try:
            return zeros(size)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CalibrationError(f"no room for buffers of {size} bytes: {reason}") from None

    def _time(
        self, direction: Direction, path: Path, num_pieces: int, piece_bytes: int
    ) -> float | None:
        """Seconds of one copy; None where the path cannot be taken."""
        from kvheap.transfer import CopyPlan, copy

        sides = {
            "h2d": (self._host, self._first),
            "d2h": (self._first, self._host),
            "d2d": (self._first, self._second),
        }[direction]
        source, target = (self._addresses(side, num_pieces, piece_bytes) for side in sides)
        plan = CopyPlan.of_addresses(*sides, source, target, piece_bytes)
        start, end = _event(), _event()
        self._stream.synchronize()
        start.record(self._stream)
        called = perf_counter()
        try:
            transfer = copy(plan, stream=self._stream, path=path)
        except ValueError:
            return None
        submitted = perf_counter() - called
        end.record(self._stream)
        end.synchronize()
        transfer.result()
        return max(submitted, float(start.elapsed_time(end)) / 1e3)

    def _addresses(
        self, side: torch.Tensor, num_pieces: int, piece_bytes: int
    ) -> npt.NDArray[np.int64]:
        if side is self._host:
            return np.arange(num_pieces, dtype=np.int64) * piece_bytes
        slots = side.nbytes // piece_bytes
        return self._random.choice(slots, num_pieces, replace=False) * np.int64(piece_bytes)


def _event() -> Any:
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
