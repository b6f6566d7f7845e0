"""Directions and paths of a copy."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["DIRECTIONS", "PATHS", "Direction", "FileDirection", "FilePath", "Path"]

Direction = Literal["h2d", "d2h", "d2d", "p2p", "h2h"]
"""Source and target: h is host memory, d a device; p2p is from one device to another."""

Path = Literal["kernel", "copy_engine", "staged", "host"]
"""An SM kernel, the copy engine, staging through extents on the device, or a host copy."""

FileDirection = Literal["h2f", "f2h"]
"""Between host memory and a file; no copy plan has such a direction."""

FilePath = Literal["file"]
"""Reads and writes of a file, on threads."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PATHS: tuple[Path, ...] = get_args(Path)
