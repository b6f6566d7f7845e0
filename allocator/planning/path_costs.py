"""What a path of a transfer costs: :class:`PathCost` by a formula, :class:`MeasuredCost` by cells.

A cost tells how long N pieces take. Both kinds are asked for every copy that is submitted, so
that what can be reckoned ahead is.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from math import inf, log2
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

__all__ = ["DIRECTIONS", "PATHS", "Cell", "Direction", "MeasuredCost", "Path", "PathCost"]

Direction = Literal["h2d", "d2h", "d2d"]
"""From where to where: h is pinned host memory, d the device."""

Path = Literal["kernel", "copy_engine", "staged"]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PATHS: tuple[Path, ...] = get_args(Path)

NOISY_SPREAD = 0.05
"""A cell is noisy when the middle half of its times spreads over more than so much of the median:
two paths whose medians differ by less could then be in either order."""


@dataclass(frozen=True, slots=True)
class PathCost:
    """What a path costs, by a formula.

    ``seconds = fixed_s + num_pieces * piece_s + num_bytes / bytes_per_s``, where pieces smaller
    than ``small_piece_bytes`` on average move at ``small_bytes_per_s`` instead.

    A piece's work and its bytes add up. The larger of the two would be wrong: 10,000 pieces of
    64 KiB, which a link carries in 12.6 ms and the copy engine takes in 5 ms, take it 16.9 ms
    (H100, vLLM #42212).

    Attributes:
        fixed_s: of a call, its submission included.
        piece_s: of each piece, whatever its size.
        bytes_per_s: how fast bytes move.
        small_piece_bytes: where the cliff is that the copy engine has; 0 for none.
        small_bytes_per_s: how fast bytes move below it.

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
        """What ``num_pieces`` pieces take that have ``num_bytes`` in all."""
        is_small = num_bytes < num_pieces * self.small_piece_bytes
        rate = self.small_bytes_per_s if is_small else self.bytes_per_s
        return self.fixed_s + num_pieces * self.piece_s + num_bytes / rate


class Cell(NamedTuple):
    """What was measured for one number and size of pieces.

    Attributes:
        piece_bytes: bytes of each piece.
        num_pieces: how many pieces.
        seconds: the median.
        spread: from the first to the third quartile, as a share of the median.
        num_samples: how often it was measured.
    """

    piece_bytes: int
    num_pieces: int
    seconds: float
    spread: float
    num_samples: int

    @property
    def is_noisy(self) -> bool:
        """Whether it spreads more than :data:`NOISY_SPREAD`."""
        return self.spread > NOISY_SPREAD


GROWN_COLUMNS = 3
GROWN_STEP = 2.0
"""Beyond the grid, time is reckoned at 4, 16 and 64 times the largest count and size."""

Patch: TypeAlias = tuple[float, float, float, float]
"""``a, b, c, d`` of ``a + b x + c y + d x y``."""


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What a path costs, by measured cells.

    Between cells, the logarithm of time is interpolated, linear in the logarithms of size and of
    count. Above the grid, and where a cell of it was not measured, time grows by as much for each
    byte or piece as between the last two cells, at most in proportion; far above in proportion.
    Below, the logarithm goes on as between the first two cells, neither faster than in proportion
    nor against it.

    Attributes:
        cells: at least one; no two of equal size and count.

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
                raise ValueError(f"two cells of {cell[1]} pieces of {cell[0]} bytes")
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
        """What ``num_pieces`` pieces take that have ``num_bytes`` in all; O(log cells)."""
        x = log2(num_pieces)
        y = log2(num_bytes / num_pieces)
        a, b, c, d = self._patches[bisect_right(self._sizes, y)][bisect_right(self._counts, x)]
        return float(2.0 ** (a + b * x + (c + d * x) * y))


Float64Array = npt.NDArray[np.float64]


def _filled(times: Float64Array, x: Float64Array) -> Float64Array:
    """Rows of logarithms of time at ``x``, NaN where nothing was measured; each row has a number.

    Where one is NaN, time grows from those on its left. Where there are none, it is as the nearest
    on its right.
    """
    times = times.copy()
    for j in range(1, len(x)):
        grown = _grown(times[:, :j], x[:j], x[j])
        times[:, j] = np.where(np.isnan(times[:, j]), grown, times[:, j])
    for j in reversed(range(len(x) - 1)):
        times[:, j] = np.where(np.isnan(times[:, j]), times[:, j + 1], times[:, j])
    return times


def _grown(times: Float64Array, x: Float64Array, to: float) -> Float64Array:
    """The next column: time grows as between the last two, between not at all and in proportion."""
    last: Float64Array = times[:, -1]
    growth: Float64Array = np.full(len(last), to - x[-1])
    if len(x) > 1:
        before, after = 2.0 ** times[:, -2], 2.0**last
        steps = (2.0**to - 2.0 ** x[-1]) / (2.0 ** x[-1] - 2.0 ** x[-2])
        linear = np.log2(np.maximum(1 + (after - before) * steps / after, 1.0))
        growth = np.fmin(growth, linear)  # in proportion where only one of both is known
    return last + growth


def _extended(x: Float64Array, times: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Columns on both sides, for what lies beyond the grid; the outermost go on for ever."""
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
    """The bilinear function of each rectangle between neighbours."""
    low, high = times[:-1], times[1:]
    width, height = np.diff(x), np.diff(y)[:, None]
    d = (high[:, 1:] - high[:, :-1] - low[:, 1:] + low[:, :-1]) / (width * height)
    b = (low[:, 1:] - low[:, :-1]) / width - d * y[:-1, None]
    c = (high[:, :-1] - low[:, :-1]) / height - d * x[:-1]
    a = low[:, :-1] - b * x[:-1] - (c + d * x[:-1]) * y[:-1, None]
    rows = np.stack((a, b, c, d), axis=-1).tolist()
    return tuple(tuple(tuple(patch) for patch in row) for row in rows)
