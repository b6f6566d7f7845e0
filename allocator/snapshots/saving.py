"""Writes snapshots as JSON, as a page, and as pictures."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from kvheap.snapshots.heap_map import HeapMap
from kvheap.snapshots.page import page_of
from kvheap.snapshots.snapshot_json import to_json

__all__ = ["SUFFIXES", "need_plot", "save"]

PICTURES = (".png", ".svg", ".pdf")
SUFFIXES = (".json", ".html", *PICTURES)


def save(snapshot: HeapMap, path: str | os.PathLike[str]) -> None:
    """Write a snapshot; see ``HeapSnapshot.save``."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        path.write_text(json.dumps(to_json(snapshot)) + "\n", "utf-8")
    elif suffix == ".html":
        path.write_text(page_of(snapshot), "utf-8")
    elif suffix in PICTURES:
        figure = need_plot().draw(snapshot)
        figure.savefig(path, dpi=110)
    else:
        raise ValueError(f"path must end in {', '.join(SUFFIXES)}, got {str(path)!r}")


def need_plot() -> Any:
    """The module that draws.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        return import_module("kvheap.snapshots.snapshot_plot")
    except ImportError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        raise ImportError(
            f"a picture needs the package matplotlib ({error}): pip install matplotlib",
            name="matplotlib",
        ) from error
