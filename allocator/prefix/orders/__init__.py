"""Orders of eviction over keys and sizes, for a heap whose scheduler pins chunks itself.

>>> from kvheap.prefix.orders import ORDERS
>>> sorted(ORDERS)
['adaptive', 'arc', 'lru', 's3fifo']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kvheap.prefix.orders.adaptive import AdaptiveOrder
from kvheap.prefix.orders.arc import ARCOrder
from kvheap.prefix.orders.base import EvictionOrder
from kvheap.prefix.orders.lru import LRUOrder
from kvheap.prefix.orders.s3fifo import S3FIFOOrder

__all__ = ["ORDERS", "ARCOrder", "AdaptiveOrder", "EvictionOrder", "LRUOrder", "S3FIFOOrder"]

ORDERS: Mapping[str, Callable[[int], EvictionOrder[Any]]] = MappingProxyType(
    {
        "lru": lambda heap_bytes: LRUOrder(),
        "arc": ARCOrder,
        "s3fifo": lambda heap_bytes: S3FIFOOrder(),
        "adaptive": AdaptiveOrder,
    }
)
"""By name, what makes a new order for a heap of so many bytes."""
