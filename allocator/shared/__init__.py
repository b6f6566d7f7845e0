"""A heap of chunks that all processes of a host share, and that outlives them.

Needs xxhash for checksums, imported when a heap is opened: ``pip install lmdb xxhash``, the extra
``files``.
"""

from __future__ import annotations

from kvheap.shared.errors import (
    LeaseLostError,
    NoOwnerError,
    SegmentDamagedError,
    SegmentInUseError,
    SegmentMismatchError,
    SegmentReplacedError,
)
from kvheap.shared.holds import SharedHold
from kvheap.shared.shared_heap import SharedHeap
from kvheap.shared.stats import KeeperStats, SharedHeapStats
from kvheap.shared.stores import SharedStore

__all__ = [
    "KeeperStats",
    "LeaseLostError",
    "NoOwnerError",
    "SegmentDamagedError",
    "SegmentInUseError",
    "SegmentMismatchError",
    "SegmentReplacedError",
    "SharedHeap",
    "SharedHeapStats",
    "SharedHold",
    "SharedStore",
]
