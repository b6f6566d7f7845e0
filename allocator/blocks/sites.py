"""Allocation sites: which code allocated a batch, recorded when ``trace_frames`` asks for it."""

from __future__ import annotations

import sys
from types import CodeType
from typing import TypeAlias

__all__ = ["Site", "allocated_at", "callers", "site_lines"]

Site: TypeAlias = tuple[tuple[CodeType, int], ...]
"""Code object and line number of each caller of an allocation, innermost first."""


def callers(count: int) -> Site:
    """The nearest ``count`` callers outside this package."""
    frame = sys._getframe(1)
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < count:
        if not frame.f_globals.get("__name__", "").startswith("kvheap."):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def site_lines(site: Site) -> tuple[str, ...]:
    """A site as ``file:line in function``, innermost caller first."""
    return tuple(f"{code.co_filename}:{line} in {code.co_name}" for code, line in site)


def allocated_at(site: Site) -> str:
    """A site as the last words of a message; empty if none was recorded."""
    return f", allocated at {' from '.join(site_lines(site))}" if site else ""
