"""The planner: finds the table of costs that tells the fastest path of a copy on a device.

Scattered pieces can be copied by an SM kernel, by the copy engine, or staged: gathered on the
device into extents, which are then moved by large copies. Which path is the fastest depends on the
device, the direction, and the number and size of the pieces.
:meth:`~kvheap.planning.copy_table.CopyTable.choose` looks it up in a table, and :func:`table_for`
finds the table of a device:

* the one that ``kvheap calibrate`` measured on this device, if there is one;
* else a built-in one, if others published figures for this device (H100, H200, A30). Its costs are
  derived from those figures, which we did not measure, and which are of other kernels than ours;
* else a cautious one: the costs of the slowest device above, and a path that takes SMs away from
  the forward pass must be faster by a clear margin to be chosen. This can be wrong: on a GB10, the
  kernel is 2.3 times as fast even for 16 pieces of 28 KiB (vLLM #57555), but the cautious table
  chooses the copy engine. Running ``kvheap calibrate`` corrects it.

The planner only decides: it imports no torch and asks no device.
"""

from __future__ import annotations

import logging
from functools import lru_cache

from kvheap.device.directions import Path
from kvheap.planning.copy_table import CopyTable
from kvheap.planning.published_costs import CAUTIOUS_COSTS, published_costs
from kvheap.planning.table_files import cache_path, load_table

__all__ = ["forget_tables", "table_for"]

LOGGER = logging.getLogger("kvheap")

CAUTIOUS_MARGIN = 1.25
"""How many times as fast as the copy engine another path must be on an unknown device. Even the
built-in costs can differ by a quarter from the figures that they were derived from."""

STAGED_MARGIN = 1.25
"""How many times as fast as the kernel staging must be without a measurement. It needs memory, and
can gain at most the tenth of the link that SMs reportedly do not reach."""

_logger = LOGGER


@lru_cache(maxsize=64)
def table_for(device_name: str, driver_version: str) -> CopyTable:
    """The table of a device: the stored one, else a built-in one, else the cautious one.

    The stored table was measured by ``kvheap calibrate`` on a device of this name with this driver.
    The result is cached for the life of the process, or until :func:`forget_tables`.
    """
    path = cache_path(device_name, driver_version)
    stored = load_table(path)
    if stored is None:
        return _unmeasured_table(device_name)
    if (stored.device_name, stored.driver_version) != (device_name, driver_version):
        _logger.warning(
            "%s is ignored: it belongs to %s, driver %s, not to %s, driver %s",
            path,
            stored.device_name,
            stored.driver_version,
            device_name,
            driver_version,
        )
        return _unmeasured_table(device_name)
    return stored


def forget_tables() -> None:
    """Drop the cached tables, so that this process reads the stored ones again."""
    table_for.cache_clear()


def _unmeasured_table(device_name: str) -> CopyTable:
    costs = published_costs(device_name)
    if costs is not None:
        return CopyTable(device_name, "", "built in", costs, {"staged": STAGED_MARGIN})
    margins: dict[Path, float] = {
        "kernel": CAUTIOUS_MARGIN,
        "staged": CAUTIOUS_MARGIN * STAGED_MARGIN,
    }
    return CopyTable(device_name, "", "cautious", CAUTIOUS_COSTS, margins)
