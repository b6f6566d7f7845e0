"""Reads snapshots that were saved as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvheap.snapshots.columns import SnapshotError
from kvheap.snapshots.heap_snapshot import HeapSnapshot
from kvheap.snapshots.snapshot_json import FORMAT

__all__ = ["is_snapshot", "open_snapshot"]


def open_snapshot(path: str | os.PathLike[str]) -> HeapSnapshot:
    """Read a snapshot that was saved as JSON.

    Raises:
        SnapshotError: the file is no snapshot, or damaged. A ``ValueError``.
        OSError: it cannot be read.
    """
    try:
        data: Any = json.loads(Path(path).read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SnapshotError(f"{os.fspath(path)!r} is no snapshot: {error}") from None
    try:
        return HeapSnapshot.from_json(data)
    except SnapshotError as error:
        raise SnapshotError(f"{os.fspath(path)!r}: {error}") from None


def is_snapshot(data: object) -> bool:
    """Whether an object of JSON claims to be a snapshot, of this or another version."""
    name = data.get("format") if isinstance(data, dict) else None
    return isinstance(name, str) and name.rpartition(" ")[0] == FORMAT.rpartition(" ")[0]
