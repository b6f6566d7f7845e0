"""What goes wrong with a heap that processes share, beside ``OSError`` and the errors of blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kvheap.errors import InUseError, MismatchError
from kvheap.prefix.keys import shown_keys

__all__ = [
    "LeaseLostError",
    "NoOwnerError",
    "SegmentDamagedError",
    "SegmentInUseError",
    "SegmentMismatchError",
    "SegmentReplacedError",
]


class SegmentInUseError(InUseError):
    """Another ``SharedHeap``, of this process or another one, owns the segment.

    Attributes:
        path: the segment.
        owner_pid: the process that owns it; None if it is not known.
    """

    def __init__(self, path: str, owner_pid: int | None) -> None:
        advice = "a segment has one owner at a time; " + (
            "close the heap that it has open"
            if owner_pid == os.getpid()
            else "use SharedHeap.attach to read it and to have chunks stored"
        )
        super().__init__(path, owner_pid, "owned", advice)


class SegmentMismatchError(MismatchError):
    """The segment is another model's, layout's, size's or version's.

    Attributes:
        path: the segment.
        field: what differs.
        found: what the segment has.
        wanted: what it was opened with.
    """

    def __init__(self, path: str, field: str, found: object, wanted: object) -> None:
        advice = "give the heap another path, or delete this file"
        super().__init__(path, field, found, wanted, "the heap", advice)


class SegmentDamagedError(ValueError):
    """The file is no segment of kvheap, or not a whole one; nothing of it was touched.

    Attributes:
        path: the file.
        reason: what is wrong.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"{path} {reason}: give the heap another path, or delete this file to begin empty"
        )
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[SegmentDamagedError], tuple[Any, ...]]:
        return type(self), (self.path, self.reason)


class SegmentReplacedError(RuntimeError):
    """The path leads to another file now, or to none; nothing was stored.

    Whoever opens the path does not find this segment any more.

    Attributes:
        path: the path.
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} was removed or replaced by another file while this process had it open: "
            f"close this heap, and open the path again"
        )
        self.path = path

    def __reduce__(self) -> tuple[type[SegmentReplacedError], tuple[Any, ...]]:
        return type(self), (self.path,)


class NoOwnerError(RuntimeError):
    """Nobody owns the segment now, or its owner has gone meanwhile; nothing was stored."""


class LeaseLostError(RuntimeError):
    """Chunks were reused while this process held them: what was read of them may be wrong.

    It happens to a process that held chunks, or was stopped, for longer than the heap's
    ``lease_s``, while they were evicted or removed.

    Attributes:
        keys: the keys of the chunks.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        super().__init__(
            f"this process held chunks for longer than the heap's lease_s, or was stopped for so "
            f"long, and they were reused: {shown_keys(keys)}; do not use what was read from them"
        )
        self.keys = tuple(keys)

    def __reduce__(self) -> tuple[type[LeaseLostError], tuple[Any, ...]]:
        return type(self), (self.keys,)
