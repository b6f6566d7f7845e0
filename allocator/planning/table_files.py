"""Where tables of copies are stored: one JSON file for each device name and driver version."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path

from kvheap.planning.copy_table import CopyTable
from kvheap.planning.table_json import table_from_json, table_to_json

__all__ = ["cache_path", "load_table", "save_table"]

LOGGER = logging.getLogger("kvheap")

_logger = LOGGER


def cache_path(device_name: str, driver_version: str) -> Path:
    """The file of the table of a device and driver.

    It is in the folder ``$KVHEAP_CACHE_DIR``, else in ``kvheap`` under ``$XDG_CACHE_HOME``, else in
    ``~/.cache/kvheap``.

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
    return Path(folder) / f"copies-{device}-driver-{driver}.json"


def save_table(table: CopyTable, path: Path) -> None:
    """Write ``table`` to ``path``, completely or not at all; creates the folder.

    Raises:
        OSError: the file or its folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table_to_json(table), indent=1) + "\n"
    # In the same folder, because os.replace() is atomic only within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_table(path: Path) -> CopyTable | None:
    """Read the table in ``path``; None if there is no such file.

    Also returns None, and logs a warning with the path to ``kvheap``, if the file cannot be read,
    holds no valid table, or has another format version.
    """
    try:
        return table_from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _logger.warning("%s is ignored, run 'kvheap calibrate' again: %s", path, error)
        return None
