"""``Finding``: one thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "State"]

State = Literal["ok", "absent", "untested", "wrong"]
"""``absent``: kvheap works without it. ``untested``: a version that kvheap's tests never met.
``wrong``: something that kvheap needs is missing or fails."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: the part of the report that it belongs to.
        name: what was looked at.
        state: whether it is there and fit for use.
        found: what was found, in a few words.
        remedy: what adds or mends it: a command, or a sentence; empty if there is nothing to do.
    """

    topic: str
    name: str
    state: State
    found: str
    remedy: str = ""
