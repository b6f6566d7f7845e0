"""The values of a heap's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

__all__ = ["heap_values"]


def heap_values(heap: Any) -> Mapping[str, Any]:
    """``stats()`` of a ``TensorMemoryAllocator``, and its bytes by state. O(batches).

    The states add up to the heap: what other threads change while they are read is counted as
    ``other_bytes``, or not at all.

    Raises:
        ClosedError: the heap is closed.
    """
    from kvheap.blocks.usage import usage_of  # needs torch, which a scheduler may lack

    usage = usage_of(heap.lifetime)
    values = asdict(heap.stats())
    pending = values["pending_bytes"]
    quarantined = min(usage.quarantined_bytes, pending)
    left = values["allocated_bytes"] - pending
    pinned = min(usage.pinned_bytes, left)
    live = min(usage.live_bytes - usage.pinned_bytes, left - pinned)
    return values | {
        "live_blocks": usage.live_blocks,
        "pinned_blocks": usage.pinned_blocks,
        "oldest_s": usage.oldest_s,
        "live_state_bytes": live,
        "pinned_state_bytes": pinned,
        "pending_state_bytes": pending - quarantined,
        "quarantined_state_bytes": quarantined,
        "other_state_bytes": left - pinned - live,
    }
