"""Transfers: copy pieces of KV asynchronously, on a stream, by the fastest path.

``copy`` executes a ``CopyPlan`` within a device, between a device and pinned host memory, between
devices, or within host memory. ``offload`` and ``restore`` move blocks to another heap.
``foreign_transfer`` tracks a transfer that others make; ``extents`` and ``paired_runs`` tell them
what to copy.
"""

from kvheap.device.transfer import Part, Transfer
from kvheap.transfer.foreign import foreign_transfer
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
    "foreign_transfer",
    "offload",
    "paired_runs",
    "restore",
]
