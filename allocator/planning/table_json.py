"""The JSON form of a table of copies: writing it, and reading and validating it.

``kvheap calibrate`` stores tables in this form, and ``--json`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import Any

from kvheap.planning.copy_table import SOURCES, CopyTable
from kvheap.planning.link_sms import LINK_DIRECTIONS
from kvheap.planning.path_costs import (
    MEASURED_DIRECTIONS,
    MEASURED_PATHS,
    Cell,
    MeasuredCost,
    PathCost,
)

__all__ = ["FORMAT", "FORMAT_VERSION", "table_from_json", "table_to_json"]

FORMAT = "kvheap copy table"
FORMAT_VERSION = 1

MIN_SECONDS, MAX_SECONDS = 1e-9, 1e6
"""No measured copy took less or more."""


def table_to_json(table: CopyTable) -> dict[str, Any]:
    """The table as objects that ``json`` can write; a cell is a list in :class:`Cell`'s order."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "device_name": table.device_name,
        "driver_version": table.driver_version,
        "source": table.source,
        "created": table.created,
        "versions": dict(table.versions),
        "margins": dict(table.margins),
        "link_sms": dict(table.link_sms),
        "costs": [
            {"direction": direction, "path": path} | _cost_to_json(cost)
            for (direction, path), cost in table.costs.items()
        ],
    }


def table_from_json(data: object) -> CopyTable:
    """The table that :func:`table_to_json` turned into ``data``.

    Raises:
        ValueError: ``data`` is not a table, has another format version, or has a wrong value; the
            message says which.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError("not a kvheap copy table")
    if data.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"the format version is {data.get('format_version')!r}, not {FORMAT_VERSION}"
        )
    try:
        costs = {
            (
                _one_of(MEASURED_DIRECTIONS, entry["direction"]),
                _one_of(MEASURED_PATHS, entry["path"]),
            ): _cost_from_json(entry)
            for entry in data["costs"]
        }
        margins = {
            _one_of(MEASURED_PATHS, path): _positive(margin)
            for path, margin in data["margins"].items()
        }
        link_sms = {  # tables of before it was measured lack it
            _one_of(LINK_DIRECTIONS, direction): _whole(num_sms)
            for direction, num_sms in data.get("link_sms", {}).items()
        }
        return CopyTable(
            _string(data["device_name"]),
            _string(data["driver_version"]),
            _one_of(SOURCES, data["source"]),
            costs,
            margins,
            _string(data["created"]),
            {_string(name): _string(version) for name, version in data["versions"].items()},
            link_sms,
        )
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"malformed: {error}") from None


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
            raise ValueError(f"a spread must be finite and not negative, got {spread!r}")
        cells.append(
            Cell(
                _whole(piece_bytes),
                _whole(num_pieces),
                _seconds(seconds),
                spread,
                _whole(num_samples),
            )
        )
    return MeasuredCost(tuple(cells))


def _one_of(names: Sequence[Any], name: object) -> Any:
    if name not in names:
        raise ValueError(f"{name!r} is not one of {', '.join(names)}")
    return name


def _string(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f"expected a string, got {text!r}")
    return text


def _positive(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"expected a number, got {number!r}")
    if not (number > 0 and isfinite(number)):
        raise ValueError(f"expected a positive, finite number, got {number!r}")
    return number


def _seconds(number: object) -> float:
    """The time of a copy; others would leave the range of a float where they are extrapolated."""
    seconds = _positive(number)
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(
            f"expected a time of {MIN_SECONDS:g} to {MAX_SECONDS:g} seconds, got {seconds:g}"
        )
    return seconds


def _whole(number: object) -> int:
    """A number of bytes, pieces, samples or SMs."""
    if not isinstance(number, int) or _positive(number) >= 1 << 63:
        raise ValueError(f"expected a whole number below 2**63, got {number!r}")
    return number
