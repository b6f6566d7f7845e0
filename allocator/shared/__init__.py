"""A heap of chunks that all processes of a host share, and that outlives them.

Needs ``pip install lmdb xxhash``, the extra ``files``: xxhash for checksums, imported when a heap is
opened.
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
