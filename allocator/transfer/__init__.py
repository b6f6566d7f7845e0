"""Transfers: move pieces of KV from here to there, on this stream, by the fastest path.

``copy`` carries out a ``CopyPlan`` within a device, between a device and pinned host memory,
between devices, or within host memory; ``offload`` and ``restore`` move blocks to another heap.
"""

from kvheap.device.transfer import Part, Transfer
from kvheap.transfer.moves import copy, offload, restore
from kvheap.transfer.plan import CopyPlan

__all__ = ["CopyPlan", "Part", "Transfer", "copy", "offload", "restore"]
