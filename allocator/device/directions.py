"""Directions and paths of a transfer."""

from __future__ import annotations

from typing import Literal

__all__ = ["DIRECTIONS", "PATHS", "Direction", "Path"]

Direction = Literal["h2d", "d2h", "d2d", "p2p", "h2h", "h2f", "f2h"]
"""Source and target: h is host memory, d a device, f a file; p2p is from one device to another."""

Path = Literal["kernel", "copy_engine", "staged", "host", "file"]
"""An SM kernel, the copy engine, staging through extents on the device, a host copy, or calls that
read and write a file."""

DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h", "d2d", "p2p", "h2h")
"""Those of a copy."""

PATHS: tuple[Path, ...] = ("kernel", "copy_engine", "staged", "host")
"""Those that a copy can take."""
