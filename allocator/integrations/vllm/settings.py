"""``TierSettings``: what a user writes in ``kv_connector_extra_config``, checked at start.

Needs no vLLM.

>>> settings = TierSettings.of({"cpu_bytes_to_use": 8 << 30}, world_size=2)
>>> settings.heap_bytes >> 30, settings.eviction_policy, settings.blocks_per_chunk
(4, 'lru', 1)
>>> TierSettings.of({"cpu_bytes_to_use": 1 << 30, "huge_pages": True})
Traceback (most recent call last):
...
ValueError: kv_connector_extra_config['huge_pages'] must be one of 'none', 'transparent', \
'explicit', got True
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from kvheap.addresses.integers import as_integer, is_bool
from kvheap.integrations.vllm.eviction import POLICIES
from kvheap.integrations.vllm.groups import CHUNK_ALIGN_BYTES

__all__ = ["HUGE_PAGES", "KEYS", "TierSettings"]

HUGE_PAGES = ("none", "transparent", "explicit")
"""What ``huge_pages`` may be; see ``HostBuffer``."""

PLACE = "kv_connector_extra_config"

OF_VLLM = {
    "spec_name": "names the tier",
    "spec_module_path": "names the tier's module",
    "block_size": "tokens of a chunk, instead of blocks_per_chunk",
    "self_describing_kv_events": "events carry tokens and parents",
}
"""Keys that vLLM itself reads, and checks."""

REFUSED = {
    "cache_policy_module_path": "kvheap's eviction policies are named by 'eviction_policy' alone",
    "canonical_layout": "kvheap keeps pages as the workers have them",
    "secondary_tiers": "use KVHeapTieringSpec as 'spec_name'",
    "sync_load_budget_bytes": "kvheap's loads are asynchronous",
    "backpressure": "use KVHeapTieringSpec as 'spec_name'",
    "tier_poll_interval_s": "use KVHeapTieringSpec as 'spec_name'",
    "num_cpu_blocks": "vLLM's former name: give the bytes as 'cpu_bytes_to_use'",
    "kv_bytes_per_rank": "vLLM's former name: give the bytes of all workers as 'cpu_bytes_to_use'",
    "cpu_bytes_to_use_per_rank": "give the bytes of all workers as 'cpu_bytes_to_use'",
    "lazy_offload": "kvheap stores chunks as soon as they are computed; remove it",
    "kv_offload_backend": "for a disk behind host memory use KVHeapTieringSpec as 'spec_name'",
    **dict.fromkeys(
        ("disk_path", "disk_capacity_bytes", "disk_buffer_slots", "use_page_cache"),
        "for a disk use KVHeapTieringSpec as 'spec_name', with 'secondary_tiers'",
    ),
}
"""Keys that mean something to vLLM's own tiers only, and what to do about them."""


@dataclass(frozen=True, slots=True)
class TierSettings:
    """The settings of one worker's heap and of the scheduler's books.

    Attributes:
        heap_bytes: bytes of each worker's heap: ``cpu_bytes_to_use`` divided among the workers,
            rounded down to the alignment of chunks.
        blocks_per_chunk: the engine's blocks in a chunk.
        eviction_policy: the name of the order of eviction.
        store_threshold: how often a chunk must be offered until it is stored; below 2: at once.
        max_tracker_size: how many offered chunks are counted for that.
        offload_prompt_only: whether only chunks of prompts are offered.
        heap_path: the file of the heap, which survives the process; None: anonymous memory.
        huge_pages: one of ``HUGE_PAGES``.
        numa_node: take memory of this node only; None: of any.
        index_path: the file that the books are written to at the end, so that the next process
            finds the chunks in ``heap_path``; None: it begins with an empty tier.
    """

    heap_bytes: int
    blocks_per_chunk: int = 1
    eviction_policy: str = "lru"
    store_threshold: int = 0
    max_tracker_size: int = 64_000
    offload_prompt_only: bool = True
    heap_path: str | None = None
    huge_pages: Literal["none", "transparent", "explicit"] = "none"
    numa_node: int | None = None
    index_path: str | None = None

    @classmethod
    def of(cls, extra_config: Mapping[str, Any], world_size: int = 1) -> TierSettings:
        """Read ``kv_connector_extra_config``.

        Args:
            extra_config: keys and values, as JSON has them. A value None is the default.
            world_size: the number of workers that share ``cpu_bytes_to_use``.

        Raises:
            ValueError: a key is unknown or missing, or its value wrong; the message names the key
                and says what is allowed.
        """
        for key in extra_config:
            _require_known(key)
        values = {
            key: read(key, extra_config[key])
            for key, read in KEYS.items()
            if extra_config.get(key) is not None
        }
        total = values.pop("cpu_bytes_to_use", None)
        if total is None:
            raise ValueError(
                f"{PLACE} needs the key 'cpu_bytes_to_use': the bytes of host memory for all "
                f"workers together, for example {8 << 30}"
            )
        heap_bytes = total // world_size // CHUNK_ALIGN_BYTES * CHUNK_ALIGN_BYTES
        if not heap_bytes:
            raise ValueError(
                f"{PLACE}['cpu_bytes_to_use'] is {total}: too little for {world_size} workers of "
                f"at least {CHUNK_ALIGN_BYTES} bytes"
            )
        if values.get("index_path") is not None and values.get("heap_path") is None:
            raise ValueError(
                f"{PLACE}['index_path'] is {values['index_path']!r}, but there is no 'heap_path': "
                f"an index is of use only beside a heap that survives the process"
            )
        _require_apart(values.get("heap_path"), values.get("index_path"))
        return cls(heap_bytes, **values)


def _require_apart(heap_path: str | None, index_path: str | None) -> None:
    """Raise if the index would be one of the heaps' files, which are ``PATH[.dpN].RANK``."""
    if heap_path is None or index_path is None:
        return
    heap, index = os.path.abspath(heap_path), os.path.abspath(index_path)
    if index == heap or re.fullmatch(rf"{re.escape(heap)}(\.dp\d+)?\.\d+", index):
        raise ValueError(
            f"{PLACE}['index_path'] is {index_path!r}, which is a file of 'heap_path' "
            f"({heap_path!r}): give the index a name of its own"
        )


def _require_known(key: str) -> None:
    if key in KEYS or key in OF_VLLM:
        return
    if key in REFUSED:
        raise ValueError(f"{PLACE} has the key {key!r}, which kvheap does not take: {REFUSED[key]}")
    allowed = [*KEYS, *OF_VLLM]
    similar = get_close_matches(str(key), allowed, n=1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    raise ValueError(f"{PLACE} has no key {key!r}: {hint}Allowed are {', '.join(allowed)}")


def _wrong(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{PLACE}[{key!r}] must be {allowed}, got {value!r}")


def _count(at_least: int, what: str) -> Callable[[str, Any], int]:
    """Reads a whole number; JSON may write a large one as ``8e9``."""

    def read(key: str, value: Any) -> int:
        allowed = f"{what}, a whole number of at least {at_least}"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            number = as_integer(key, value)
        except (TypeError, ValueError):
            raise _wrong(key, value, allowed) from None
        if is_bool(value) or number < at_least:
            raise _wrong(key, value, allowed)
        return number

    return read


def _one_of(names: tuple[str, ...]) -> Callable[[str, Any], str]:
    def read(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise _wrong(key, value, f"one of {', '.join(map(repr, names))}")
        return value

    return read


def _flag(key: str, value: Any) -> bool:
    if not is_bool(value):
        raise _wrong(key, value, "true or false")
    return bool(value)


def _path(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _wrong(key, value, "the path of a file")
    return value


KEYS: Mapping[str, Callable[[str, Any], Any]] = {
    "cpu_bytes_to_use": _count(1, "bytes of host memory"),
    "blocks_per_chunk": _count(1, "blocks"),
    "eviction_policy": _one_of(tuple(POLICIES)),
    "store_threshold": _count(0, "how often a chunk is offered"),
    "max_tracker_size": _count(1, "how many chunks are counted"),
    "offload_prompt_only": _flag,
    "heap_path": _path,
    "huge_pages": _one_of(HUGE_PAGES),
    "numa_node": _count(0, "the number of a NUMA node"),
    "index_path": _path,
}
"""The keys of this tier, and what reads the value of each."""
