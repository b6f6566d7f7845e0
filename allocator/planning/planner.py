"""The planner: which path moves N pieces fastest, by a table of what each path costs on a device.

A copy of scattered pieces can be made by an SM kernel, by the copy engine, or staged: gathered on
the device into extents that large copies move. Which of them is fastest depends on device,
direction, and the number and size of the pieces. :class:`CopyTable` knows what each costs:

* measured on this device, when somebody ran ``kvheap calibrate``;
* else reasoned, for devices of which somebody published figures (H100, H200, A30). Those costs
  are derived from published figures, not measured by us, and are those of other kernels;
* else cautious: the costs of the slowest of these, and what takes SMs from the forward pass must
  be faster by a clear margin before it is chosen. That can be wrong: on a GB10 the kernel is 2.3
  times as fast for 16 pieces of 28 KiB already (vLLM #57555), where the cautious rule takes the
  copy engine. ``kvheap calibrate`` is the answer to that.

This module decides only; it imports no torch and asks no device.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf, isfinite, log2
from pathlib import Path as FilePath
from typing import Any, Literal, get_args

import numpy as np

from kvheap.planning.path_costs import (
    DIRECTIONS,
    PATHS,
    Cell,
    Direction,
    MeasuredCost,
    Path,
    PathCost,
)
from kvheap.planning.published_costs import CAUTIOUS_COSTS, published_costs

__all__ = [
    "DIRECTIONS",
    "PATHS",
    "Cell",
    "CopyTable",
    "Direction",
    "MeasuredCost",
    "Path",
    "PathCost",
    "cache_path",
    "forget_tables",
    "table_for",
]

Source = Literal["measured", "built in", "cautious"]

FORMAT = "kvheap copy table"
FORMAT_VERSION = 1

CAUTIOUS_MARGIN = 1.25
"""On a device of which nothing is known, the copy engine is taken where the others are not clearly
faster, since it leaves the SMs to the forward pass. Clearly is by a quarter: so far may even the
built-in costs be from the figures that they were derived from."""

STAGED_MARGIN = 1.25
"""Where nothing was measured, staging must be as clearly faster than the kernel: it takes memory
too, and all it could gain is the tenth of the link that SMs are said not to reach."""

_logger = logging.getLogger("kvheap")


@dataclass(frozen=True, slots=True)
class CopyTable:
    """What each path costs on one device: measured cells, or costs reasoned from published figures.

    Attributes:
        device_name: as CUDA calls the device.
        driver_version: of the driver it was measured with; empty where it was not.
        source: ``measured``; ``built in``: derived from figures that others published of this
            device, not measured by us; ``cautious``: nothing is known of this device.
        costs: the cost of each direction and path; one that is not here is not known.
        margins: how many times as fast as the others a path must be to be chosen; 1 where it is
            not here.
        created: when, ISO 8601; empty where it was not measured.
        versions: what it was measured with.

    >>> table = table_for("NVIDIA H100 80GB HBM3", "0.0")
    >>> table.choose("h2d", 16, 16 * 8192, PATHS), table.choose("h2d", 64, 64 * 8192, PATHS)
    ('copy_engine', 'kernel')
    """

    device_name: str
    driver_version: str
    source: Source
    costs: Mapping[tuple[Direction, Path], PathCost | MeasuredCost]
    margins: Mapping[Path, float] = field(default_factory=dict)
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def seconds(
        self, direction: Direction, path: Path, num_pieces: int, num_bytes: int
    ) -> float | None:
        """What a path takes; None where the table does not know. O(log cells)."""
        cost = self.costs.get((direction, path))
        return None if cost is None else cost.seconds(num_pieces, num_bytes)

    def choose(
        self, direction: Direction, num_pieces: int, num_bytes: int, allowed: Sequence[Path]
    ) -> Path:
        """The fastest path, :attr:`margins` considered. O(log cells): it is asked for each copy.

        Args:
            direction: from where to where.
            num_pieces: how many pieces are submitted, neighbours already merged; at least 1.
            num_bytes: bytes of all pieces; at least 1.
            allowed: paths to choose from. Those that the table knows nothing of are chosen only
                where it knows none: the copy engine first.

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
            raise ValueError(f"no path is allowed for {num_pieces} pieces, {direction}")
        return "copy_engine" if "copy_engine" in allowed else allowed[0]

    def choices(
        self, direction: Direction, piece_bytes: int, max_pieces: int = 65_536
    ) -> list[tuple[int, Path]]:
        """Which paths are chosen for pieces of one size: from how many pieces on, which.

        Looks at 16 counts between each two powers of two: what is chosen only between two of them
        is missed.

        >>> table_for("NVIDIA H100 80GB HBM3", "0.0").choices("h2d", 8192)
        [(1, 'copy_engine'), (31, 'kernel')]
        """
        paths = [path for path in PATHS if (direction, path) in self.costs]
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
        """The cells of a direction whose times spread too much."""
        return [
            cell
            for (of, _), cost in self.costs.items()
            if of == direction and isinstance(cost, MeasuredCost)
            for cell in cost.cells
            if cell.is_noisy
        ]

    def to_json(self) -> dict[str, Any]:
        """The table as objects that ``json`` writes; a cell is a list in :class:`Cell`'s order."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "device_name": self.device_name,
            "driver_version": self.driver_version,
            "source": self.source,
            "created": self.created,
            "versions": dict(self.versions),
            "margins": dict(self.margins),
            "costs": [
                {"direction": direction, "path": path} | _cost_to_json(cost)
                for (direction, path), cost in self.costs.items()
            ],
        }

    @classmethod
    def from_json(cls, data: object) -> CopyTable:
        """What :meth:`to_json` made.

        Raises:
            ValueError: it is no table, or of another version; the message says what is wrong.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError("this is no table of copies")
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"its format is version {data.get('format_version')!r}, not {FORMAT_VERSION}"
            )
        try:
            costs = {
                (_one_of(DIRECTIONS, each["direction"]), _one_of(PATHS, each["path"])): (
                    _cost_from_json(each)
                )
                for each in data["costs"]
            }
            return cls(
                _string(data["device_name"]),
                _string(data["driver_version"]),
                _one_of(get_args(Source), data["source"]),
                costs,
                {_one_of(PATHS, path): _positive(each) for path, each in data["margins"].items()},
                _string(data["created"]),
                {_string(name): _string(text) for name, text in data["versions"].items()},
            )
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is broken: {error}") from None

    def save(self, path: FilePath) -> None:
        """Write the table there, all of it or nothing; makes the folder.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1) + "\n"
        # Beside its place: only within a file system can a file be replaced at once.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: FilePath) -> CopyTable | None:
        """The table in a file; None where there is none.

        A file that is broken, of another version, or no table is ignored too, with a warning in
        the log of ``kvheap`` that names it.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            _logger.warning("%s is ignored, run 'kvheap calibrate' again: %s", path, error)
            return None


def _cost_to_json(cost: PathCost | MeasuredCost) -> dict[str, Any]:
    if isinstance(cost, MeasuredCost):
        return {"cells": [list(cell) for cell in cost.cells]}
    formula: dict[str, Any] = {
        "fixed_s": cost.fixed_s,
        "piece_s": cost.piece_s,
        "bytes_per_s": cost.bytes_per_s,
    }
    if cost.small_piece_bytes:
        formula |= {
            "small_piece_bytes": cost.small_piece_bytes,
            "small_bytes_per_s": cost.small_bytes_per_s,
        }
    return {"formula": formula}


def _cost_from_json(data: Mapping[str, Any]) -> PathCost | MeasuredCost:
    if "formula" in data:
        formula = data["formula"]
        cost = PathCost(
            _positive(formula["fixed_s"]),
            _positive(formula["piece_s"]),
            _positive(formula["bytes_per_s"]),
        )
        if "small_piece_bytes" not in formula:
            return cost
        return replace(
            cost,
            small_piece_bytes=_whole(formula["small_piece_bytes"]),
            small_bytes_per_s=_positive(formula["small_bytes_per_s"]),
        )
    cells = []
    for piece_bytes, num_pieces, seconds, spread, num_samples in data["cells"]:
        if not 0 <= spread < inf:
            raise ValueError(f"{spread!r} is no spread")
        cells.append(
            Cell(
                _whole(piece_bytes),
                _whole(num_pieces),
                _positive(seconds),
                spread,
                _whole(num_samples),
            )
        )
    return MeasuredCost(tuple(cells))


def _one_of(names: Sequence[Any], name: object) -> Any:
    if name not in names:
        raise ValueError(f"{name!r} is none of {', '.join(names)}")
    return name


def _string(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no text")
    return text


def _positive(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{number!r} is no number")
    if not (number > 0 and isfinite(number)):
        raise ValueError(f"{number!r} is not positive")
    return number


def _whole(number: object) -> int:
    if not isinstance(number, int) or _positive(number) >= 1 << 63:
        raise ValueError(f"{number!r} is no number of bytes, pieces or samples")
    return number


# -- tables of devices ---------------------------------------------------------------------------


@lru_cache(maxsize=64)
def table_for(device_name: str, driver_version: str) -> CopyTable:
    """The table of a device: the stored one, else a built-in one, else the cautious rule.

    Stored is what ``kvheap calibrate`` measured on a device of this name with this driver. The
    answer is remembered for the life of the process, or until :func:`forget_tables`.
    """
    path = cache_path(device_name, driver_version)
    stored = CopyTable.load(path)
    if stored is None:
        return _unmeasured_table(device_name)
    if (stored.device_name, stored.driver_version) != (device_name, driver_version):
        _logger.warning(
            "%s is ignored: it is of %s, driver %s, not of %s, driver %s",
            path,
            stored.device_name,
            stored.driver_version,
            device_name,
            driver_version,
        )
        return _unmeasured_table(device_name)
    return stored


def forget_tables() -> None:
    """Let this process look for stored tables again, as after a calibration."""
    table_for.cache_clear()


def cache_path(device_name: str, driver_version: str) -> FilePath:
    """Where the table of a device and driver is stored.

    In ``$KVHEAP_CACHE_DIR``, else in ``kvheap`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.

    >>> cache_path("NVIDIA H100 80GB HBM3", "580.95.05").name
    'copies-nvidia-h100-80gb-hbm3-driver-580.95.05.json'
    """
    device, driver = (
        re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unknown"
        for name in (device_name, driver_version)
    )
    folder = os.environ.get("KVHEAP_CACHE_DIR")
    if not folder:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(caches, "kvheap")
    return FilePath(folder) / f"copies-{device}-driver-{driver}.json"


def _unmeasured_table(device_name: str) -> CopyTable:
    costs = published_costs(device_name)
    if costs is not None:
        return CopyTable(device_name, "", "built in", costs, {"staged": STAGED_MARGIN})
    margins: dict[Path, float] = {
        "kernel": CAUTIOUS_MARGIN,
        "staged": CAUTIOUS_MARGIN * STAGED_MARGIN,
    }
    return CopyTable(device_name, "", "cautious", CAUTIOUS_COSTS, margins)
