"""How many SMs a copy over the host link is given where its caller names no number."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvheap.device.directions import Direction

__all__ = ["LINK_DIRECTIONS", "LINK_SMS"]

LINK_DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h")
"""The directions over the host link."""

LINK_SMS: Mapping[Direction, int] = MappingProxyType({"h2d": 3, "d2h": 2})
"""SMs of the kernel where a device was not calibrated. They saturate an H200's link; a third one to
the host slows a matrix product beside it by half. See benchmarks/NOTES.md."""
