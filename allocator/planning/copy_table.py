"""``CopyTable``: the cost of each path of a copy on one device, and the choice of the fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, log2
from typing import Literal, TypeAlias, get_args

import numpy as np

from kvheap.device.directions import Direction, Path
from kvheap.planning.link_sms import LINK_SMS
from kvheap.planning.path_costs import MEASURED_PATHS, Cell, MeasuredCost, PathCost

__all__ = ["SOURCES", "CopyTable", "Costs", "Source"]

Source = Literal["measured", "built in", "cautious"]
SOURCES: tuple[Source, ...] = get_args(Source)

Costs: TypeAlias = Mapping[tuple[Direction, Path], "PathCost | MeasuredCost"]


@dataclass(frozen=True, slots=True)
class CopyTable:
    """What each path costs on one device, by direction.

    Attributes:
        device_name: the device's name, as CUDA reports it.
        driver_version: the driver that it was measured with; empty if it was not measured.
        source: ``measured``: on this device; ``built in``: derived from figures that others
            published for this device, not measured by us; ``cautious``: nothing is known about
            this device.
        costs: the cost of each direction and path; if a pair is missing, its cost is not known.
        margins: how many times as fast as the others a path must be to be chosen; 1 if missing.
        created: time of the measurement, ISO 8601; empty if it was not measured.
        versions: versions of the software that it was measured with.
        link_sms: for each direction over the host link, the fewest SMs that saturate it, as
            measured; empty if that was not measured.

    >>> from kvheap.planning.planner import table_for
    >>> table = table_for("NVIDIA H100 80GB HBM3", "0.0")
    >>> [table.choose("h2d", n, n * 8192, ("kernel", "copy_engine")) for n in (16, 64)]
    ['copy_engine', 'kernel']
    """

    device_name: str
    driver_version: str
    source: Source
    costs: Costs
    margins: Mapping[Path, float] = field(default_factory=dict)
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    link_sms: Mapping[Direction, int] = field(default_factory=dict)

    def default_sms(self, direction: Direction) -> int | None:
        """SMs of a copy by the kernel whose caller names no number; None for no limit.

        Over the host link, what was measured or else
        :data:`~kvheap.planning.link_sms.LINK_SMS`. O(1); called for each copy.
        """
        measured = self.link_sms.get(direction)
        return LINK_SMS.get(direction) if measured is None else measured

    def seconds(
        self, direction: Direction, path: Path, num_pieces: int, num_bytes: int
    ) -> float | None:
        """Seconds that a path takes; None if the table has no cost for it. O(log cells)."""
        cost = self.costs.get((direction, path))
        return None if cost is None else cost.seconds(num_pieces, num_bytes)

    def choose(
        self, direction: Direction, num_pieces: int, num_bytes: int, allowed: Sequence[Path]
    ) -> Path:
        """Choose the fastest path after applying :attr:`margins`. O(log cells); called per copy.

        Args:
            direction: from host to device, from device to host, or within the device.
            num_pieces: number of pieces that are submitted, after neighbours were merged; at
                least 1.
            num_bytes: bytes of all pieces; at least 1.
            allowed: the paths to choose from. If none of them has a cost, the copy engine is
                chosen if it is allowed, else the first one.

        Raises:
            ValueError: ``allowed`` is empty, or there is nothing to copy.
        """
        if num_pieces < 1 or num_bytes < 1:
            raise ValueError(f"nothing to copy: {num_pieces} pieces, {num_bytes} bytes")
        best, least = None, inf
        for path in allowed:
            cost = self.costs.get((direction, path))
            if cost is None:
                continue
            seconds = cost.seconds(num_pieces, num_bytes) * self.margins.get(path, 1.0)
            if seconds < least:
                best, least = path, seconds
        if best is not None:
            return best
        if not allowed:
            raise ValueError(f"no path is allowed to copy {num_pieces} pieces, {direction}")
        return "copy_engine" if "copy_engine" in allowed else allowed[0]

    def choices(
        self, direction: Direction, piece_bytes: int, max_pieces: int = 65_536
    ) -> list[tuple[int, Path]]:
        """The paths chosen for pieces of one size, each with the count from which it is chosen.

        Evaluates 16 counts per power of two, and bisects between two counts with different paths.
        Misses a path that is chosen only between two of these counts.

        >>> from kvheap.planning.planner import table_for
        >>> table_for("NVIDIA H100 80GB HBM3", "0.0").choices("h2d", 8192)
        [(1, 'copy_engine'), (31, 'kernel')]
        """
        paths = [path for path in MEASURED_PATHS if (direction, path) in self.costs]
        if not paths:
            return []

        def chosen(count: int) -> Path:
            return self.choose(direction, count, count * piece_bytes, paths)

        changes = [(1, chosen(1))]
        before = 1
        steps = np.arange(16 * log2(max_pieces) + 1) / 16
        for count in np.unique(np.round(2.0**steps)).astype(int).tolist():
            path = chosen(count)
            if path != changes[-1][1]:
                while count - before > 1:
                    middle = (before + count) // 2
                    if chosen(middle) == changes[-1][1]:
                        before = middle
                    else:
                        count = middle
                changes.append((count, path))
            before = count
        return changes

    def noisy_cells(self, direction: Direction) -> list[Cell]:
        """The noisy cells of all paths of a direction."""
        return [
            cell
            for (of, _), cost in self.costs.items()
            if of == direction and isinstance(cost, MeasuredCost)
            for cell in cost.cells
            if cell.is_noisy
        ]
