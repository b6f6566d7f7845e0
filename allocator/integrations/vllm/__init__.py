"""kvheap inside vLLM: a host tier in which the chunks of every KV cache group take their own bytes.

Selected by vLLM's ``--kv-transfer-config``; see the README. Names are loaded when first used: the
modules that need no vLLM (``groups``, ``chunk_store``, ``eviction``, ``settings``) import without
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvheap.integrations.vllm.connector import KVHeapConnector as KVHeapConnector
    from kvheap.integrations.vllm.locations import ChunkLocations as ChunkLocations
    from kvheap.integrations.vllm.manager import KVHeapManager as KVHeapManager
    from kvheap.integrations.vllm.spec import KVHeapOffloadingSpec as KVHeapOffloadingSpec
    from kvheap.integrations.vllm.spec import KVHeapTieringSpec as KVHeapTieringSpec
    from kvheap.integrations.vllm.worker import KVHeapWorker as KVHeapWorker

_MODULE_OF = {
    "ChunkLocations": "locations",
    "KVHeapConnector": "connector",
    "KVHeapManager": "manager",
    "KVHeapOffloadingSpec": "spec",
    "KVHeapTieringSpec": "spec",
    "KVHeapWorker": "worker",
}

__all__ = [
    "ChunkLocations",
    "KVHeapConnector",
    "KVHeapManager",
    "KVHeapOffloadingSpec",
    "KVHeapTieringSpec",
    "KVHeapWorker",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First, so that a missing or unknown vLLM is named before a module stumbles over it.
    import_module(f"{__name__}.versions").require_vllm()
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
