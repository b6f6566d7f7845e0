"""What a path of a copy costs: the time to copy N pieces, from a formula or from measured cells.

:class:`PathCost` is a formula with a few coefficients; :class:`MeasuredCost` interpolates between
cells that were measured. The planner evaluates costs for every copy that is submitted, so
everything that depends on the cells alone is computed when a cost is made.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from math import inf, log2
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.device.directions import Direction, Path

__all__ = [
    "MEASURED_DIRECTIONS",
    "MEASURED_PATHS",
    "NOISY_SPREAD",
    "Cell",
    "MeasuredCost",
    "PathCost",
]

MEASURED_DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h", "d2d")
"""The directions that have costs; their host memory is pinned."""

MEASURED_PATHS: tuple[Path, ...] = ("kernel", "copy_engine", "staged")
"""The paths that have costs."""

NOISY_SPREAD = 0.05
"""A cell is noisy if its interquartile range exceeds this share of its median: if the medians of
two paths differ by less, either path could be the faster one."""


@dataclass(frozen=True, slots=True)
class PathCost:
    """The cost of a path as a formula.

    ``seconds = fixed_s + num_pieces * piece_s + num_bytes / bytes_per_s``. Pieces that are smaller
    than ``small_piece_bytes`` on average move at ``small_bytes_per_s`` instead.

    The work per piece and the work per byte are added. Taking the larger of the two would be
    wrong: for 10,000 pieces of 64 KiB the link needs 12.6 ms for the bytes and the copy engine
    5 ms for the pieces, and the copy takes 16.9 ms (H100, vLLM #42212).

    Attributes:
        fixed_s: seconds per call, including its submission.
        piece_s: seconds per piece, whatever its size.
        bytes_per_s: bandwidth.
        small_piece_bytes: pieces below this size are slow, as for the copy engine; 0: no limit.
        small_bytes_per_s: bandwidth for pieces below that size.

    >>> cost = PathCost(20e-6, 0.5e-6, 50e9)
    >>> round(cost.seconds(100, 100 * 50_000) * 1e6)
    170
    """

    fixed_s: float
    piece_s: float
    bytes_per_s: float
    small_piece_bytes: int = 0
    small_bytes_per_s: float = inf

    def seconds(self, num_pieces: int, num_bytes: int) -> float:
        """Seconds to copy ``num_pieces`` pieces that have ``num_bytes`` in total."""
        is_small = num_bytes < num_pieces * self.small_piece_bytes
        rate = self.small_bytes_per_s if is_small else self.bytes_per_s
        return self.fixed_s + num_pieces * self.piece_s + num_bytes / rate


class Cell(NamedTuple):
    """The measurement of one number and size of pieces.

    Attributes:
        piece_bytes: bytes of each piece.
        num_pieces: number of pieces.
        seconds: the median time.
        spread: the interquartile range as a share of the median.
        num_samples: number of samples.
    """

    piece_bytes: int
    num_pieces: int
    seconds: float
    spread: float
    num_samples: int

    @property
    def is_noisy(self) -> bool:
        """Whether the spread is above :data:`NOISY_SPREAD`."""
        return self.spread > NOISY_SPREAD


GROWN_COLUMNS = 3
GROWN_STEP = 2.0
"""The grid is extended to 4, 16 and 64 times the largest count and size: 3 columns, and log2(4)
from one to the next."""

Patch: TypeAlias = tuple[float, float, float, float]
"""The coefficients ``a, b, c, d`` of ``a + b x + c y + d x y``."""


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """The cost of a path from measured cells.

    Between cells, log(time) is interpolated bilinearly over log(count) and log(size).

    Above the grid, and in its cells that were not measured, each additional byte or piece takes as
    long as between the last two cells. But time never falls, and never grows faster than the bytes
    or pieces. Beyond 64 times the largest cell, time is proportional to bytes or pieces.

    Below the grid, log(time) continues with the slope between the first two cells, limited in the
    same way.

    Attributes:
        cells: at least one, and no two of the same size and count.

    Raises:
        ValueError: there is no cell, or there are two of the same size and count.

    >>> cost = MeasuredCost((Cell(1024, 16, 10e-6, 0.0, 5), Cell(1024, 64, 20e-6, 0.0, 5)))
    >>> [round(cost.seconds(count, count * 1024) * 1e6, 1) for count in (16, 32, 64, 256)]
    [10.0, 14.1, 20.0, 60.0]
    """

    cells: tuple[Cell, ...]
    _sizes: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _counts: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _patches: tuple[tuple[Patch, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = sorted({cell.piece_bytes for cell in self.cells})
        counts = sorted({cell.num_pieces for cell in self.cells})
        times = np.full((len(sizes), len(counts)), np.nan)
        for cell in self.cells:
            at = sizes.index(cell.piece_bytes), counts.index(cell.num_pieces)
            if not np.isnan(times[at]):
                raise ValueError(
                    f"two cells of {cell.num_pieces} pieces of {cell.piece_bytes} bytes"
                )
            times[at] = log2(cell.seconds)
        if not self.cells:
            raise ValueError("a measured cost needs at least one cell")
        y, x = np.log2(sizes), np.log2(counts)
        times = _filled(times, x)
        x, times = _extended(x, times)
        y, columns = _extended(y, times.T)
        for name, value in (
            ("_sizes", tuple(y[1:-1].tolist())),
            ("_counts", tuple(x[1:-1].tolist())),
            ("_patches", _patches(y, x, columns.T)),
        ):
            object.__setattr__(self, name, value)

    def seconds(self, num_pieces: int, num_bytes: int) -> float:
        """Seconds to copy ``num_pieces`` pieces of ``num_bytes`` in total; O(log cells)."""
        x = log2(num_pieces)
        y = log2(num_bytes / num_pieces)
        a, b, c, d = self._patches[bisect_right(self._sizes, y)][bisect_right(self._counts, x)]
        return float(2.0 ** (a + b * x + (c + d * x) * y))


# The functions below take and return log2(time): one row for each size, one column for each
# count. ``x`` is log2(count) of the columns and ``y`` is log2(size) of the rows.

Float64Array = npt.NDArray[np.float64]


def _filled(times: Float64Array, x: Float64Array) -> Float64Array:
    """Replace NaN, which marks cells without a measurement; each row has a number.

    A missing cell is extrapolated from the cells on its left. If there are none, it takes the value
    of the nearest cell on its right.
    """
    times = times.copy()
    for j in range(1, len(x)):
        grown = _grown(times[:, :j], x[:j], x[j])
        times[:, j] = np.where(np.isnan(times[:, j]), grown, times[:, j])
    for j in reversed(range(len(x) - 1)):
        times[:, j] = np.where(np.isnan(times[:, j]), times[:, j + 1], times[:, j])
    return times


def _grown(times: Float64Array, x: Float64Array, to: float) -> Float64Array:
    """Extrapolate a column at ``to``: linear from the last two, but never falling.

    Time grows at most in proportion to the count. If only one of the last two columns is known, it
    grows in proportion to the count.
    """
    last: Float64Array = times[:, -1]
    growth: Float64Array = np.full(len(last), to - x[-1])
    if len(x) > 1:
        before, after = 2.0 ** times[:, -2], 2.0**last
        steps = (2.0**to - 2.0 ** x[-1]) / (2.0 ** x[-1] - 2.0 ** x[-2])
        linear = np.log2(np.maximum(1 + (after - before) * steps / after, 1.0))
        growth = np.fmin(growth, linear)  # fmin ignores NaN
    return last + growth


def _extended(x: Float64Array, times: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Add columns on both sides. The slopes at both ends also hold for everything beyond them."""
    for _ in range(GROWN_COLUMNS):
        times = np.column_stack((times, _grown(times, x, x[-1] + GROWN_STEP)))
        x = np.append(x, x[-1] + GROWN_STEP)
    below = np.zeros(len(times))
    if len(x) > 1:
        below = np.clip((times[:, 1] - times[:, 0]) / (x[1] - x[0]), 0.0, 1.0)
    times = np.column_stack((times[:, 0] - below, times, times[:, -1] + 1.0))
    return np.concatenate((x[:1] - 1, x, x[-1:] + 1)), times


def _patches(
    y: Float64Array, x: Float64Array, times: Float64Array
) -> tuple[tuple[Patch, ...], ...]:
    """The bilinear function over each rectangle of four neighbouring cells."""
    low, high = times[:-1], times[1:]
    width, height = np.diff(x), np.diff(y)[:, None]
    d = (high[:, 1:] - high[:, :-1] - low[:, 1:] + low[:, :-1]) / (width * height)
    b = (low[:, 1:] - low[:, :-1]) / width - d * y[:-1, None]
    c = (high[:, :-1] - low[:, :-1]) / height - d * x[:-1]
    a = low[:, :-1] - b * x[:-1] - (c + d * x[:-1]) * y[:-1, None]
    rows = np.stack((a, b, c, d), axis=-1).tolist()
    return tuple(tuple(tuple(patch) for patch in row) for row in rows)
