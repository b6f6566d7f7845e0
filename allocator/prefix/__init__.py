"""What is stored under which key, and what is evicted next.

=============  ===================================================================================
module         idea
=============  ===================================================================================
policies/      which chunk goes next: LRU, GDSF, S3FIFO, ARC
turns          one call at a time changes anything, whatever runs in the middle of it
keys           checks of the keys that callers name
books          chunks by state, changed whole or not at all
index_handles  what users hold of an index: ``Hold``, ``PendingStore``
index          ``PrefixIndex``: look-ups, holds, stores and evictions by key; needs no torch
space          room in a heap for new chunks, and freeing what has ended
store_handles  what users hold of a store: ``ChunkHold``, ``StoreInFlight``
sources        checks of what chunks are stored from
storing        how new chunks come into a store, whole or not at all
store          ``PrefixStore``: an index over a heap
=============  ===================================================================================

Names are loaded when first used, so that ``PrefixIndex`` and the policies never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvheap.prefix.books import IndexStats as IndexStats
    from kvheap.prefix.index import PrefixIndex as PrefixIndex
    from kvheap.prefix.index_handles import Hold as Hold
    from kvheap.prefix.index_handles import PendingStore as PendingStore
    from kvheap.prefix.policies import ARC as ARC
    from kvheap.prefix.policies import GDSF as GDSF
    from kvheap.prefix.policies import LRU as LRU
    from kvheap.prefix.policies import POLICIES as POLICIES
    from kvheap.prefix.policies import S3FIFO as S3FIFO
    from kvheap.prefix.policies import CachedChunk as CachedChunk
    from kvheap.prefix.policies import EvictionPolicy as EvictionPolicy
    from kvheap.prefix.space import RequestTooLargeError as RequestTooLargeError
    from kvheap.prefix.store import PrefixStore as PrefixStore
    from kvheap.prefix.store import StoreStats as StoreStats
    from kvheap.prefix.store_handles import ChunkHold as ChunkHold
    from kvheap.prefix.store_handles import StoreInFlight as StoreInFlight
    from kvheap.prefix.turns import BusyError as BusyError

_MODULE_OF = {
    "ARC": "policies",
    "BusyError": "turns",
    "CachedChunk": "policies",
    "ChunkHold": "store_handles",
    "EvictionPolicy": "policies",
    "GDSF": "policies",
    "Hold": "index_handles",
    "IndexStats": "books",
    "LRU": "policies",
    "POLICIES": "policies",
    "PendingStore": "index_handles",
    "PrefixIndex": "index",
    "PrefixStore": "store",
    "RequestTooLargeError": "space",
    "S3FIFO": "policies",
    "StoreInFlight": "store_handles",
    "StoreStats": "store",
}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kvheap.prefix' has no attribute {name!r}")
    value = getattr(import_module(f"kvheap.prefix.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
