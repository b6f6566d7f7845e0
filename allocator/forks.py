"""Resets objects in a forked child, before the child uses them.

A fork copies locks as they are: a lock that another thread holds at that moment is never released
in the child. Objects that own locks or threads register here, and start over in the child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Forkable", "starts_over_after_fork"]


class Forkable(Protocol):
    """An object with state that a fork invalidates."""

    def start_over_after_fork(self) -> None:
        """Create that state again; called in the child, which has one thread."""
        ...


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def starts_over_after_fork(obj: Forkable) -> None:
    """Call ``obj.start_over_after_fork()`` in every child that is forked while it lives."""
    _registered.add(obj)


def _start_over() -> None:
    for obj in list(_registered):
        obj.start_over_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)
