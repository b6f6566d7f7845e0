"""The orders in which chunks leave a full host tier, by the names of ``eviction_policy``.

>>> from kvheap.integrations.vllm.eviction import POLICIES
>>> order = POLICIES["lru"](1 << 30)
>>> order.insert(b"key", 4096, group=0)
>>> order.evict_until(1, lambda key: False)
[b'key']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvheap.prefix.orders import ORDERS, EvictionOrder

__all__ = ["POLICIES", "EvictionOrder"]

POLICIES: Mapping[str, Callable[[int], EvictionOrder[Any]]] = ORDERS
"""By the name that users write, what makes a new order for a heap of so many bytes.

``lru`` and ``arc`` are what vLLM means by these names; ``s3fifo`` and ``adaptive`` are kvheap's.
"""
