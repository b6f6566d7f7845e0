"""Snapshots of heaps: which bytes are live, pinned, pending or free, how old, and whose.

``heap.snapshot()`` takes one, ``snapshot.save("heap.json")`` keeps it for a bug report, and
``open_snapshot("heap.json")`` reads it in another process, which needs neither torch nor the heap.
"""

from kvheap.snapshots.columns import SnapshotError
from kvheap.snapshots.files import is_snapshot, open_snapshot
from kvheap.snapshots.heap_map import STATES, Owner, OwnerUse
from kvheap.snapshots.heap_snapshot import HeapSnapshot

__all__ = [
    "STATES",
    "HeapSnapshot",
    "Owner",
    "OwnerUse",
    "SnapshotError",
    "is_snapshot",
    "open_snapshot",
]
