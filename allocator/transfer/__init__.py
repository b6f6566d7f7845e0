"""Transfers: copy pieces of KV asynchronously, on a stream, by the fastest path.

``copy`` executes a ``CopyPlan`` within a device, between a device and pinned host memory, between
devices, or within host memory. ``offload`` and ``restore`` move blocks to another heap.
"""

from kvheap.device.transfer import Part, Transfer
from kvheap.transfer.moves import copy, offload, restore
from kvheap.transfer.pairing import block_runs, extents, paired_runs
from kvheap.transfer.plan import CopyPlan

__all__ = [
    "CopyPlan",
    "Part",
    "Transfer",
    "block_runs",
    "copy",
    "extents",
    "offload",
    "paired_runs",
    "restore",
]
