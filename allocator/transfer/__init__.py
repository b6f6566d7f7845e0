"""Transfers: move pieces of KV from here to there, on this stream, by the fastest path."""

from kvheap.transfer.moves import Part, Transfer, copy, offload, restore
from kvheap.transfer.plan import CopyPlan

__all__ = ["CopyPlan", "Part", "Transfer", "copy", "offload", "restore"]
