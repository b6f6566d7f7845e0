"""The terms of a copy: from where to where, and by which path."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["DIRECTIONS", "PATHS", "Direction", "Path"]

Direction = Literal["h2d", "d2h", "d2d", "p2p", "h2h"]
"""From where to where: h is host memory, d a device; p2p goes from one device to another."""

Path = Literal["kernel", "copy_engine", "staged", "host"]
"""How: an SM kernel, the copy engine, staged through an extent on the device, or by the host."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PATHS: tuple[Path, ...] = get_args(Path)
