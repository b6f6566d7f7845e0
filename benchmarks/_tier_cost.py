"""Part 3 of ``bench_vllm_tier``: microseconds of the managers' calls. Needs the vllm package."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

from _timing import Samples
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvheap.integrations.vllm.groups import ChunkGroup
from kvheap.integrations.vllm.manager import KVHeapManager
from kvheap.integrations.vllm.settings import TierSettings

CHUNK_BYTES = 1 << 20
CALLS = (
    "lookup",
    "prepare_load",
    "complete_load",
    "prepare_store",
    "complete_store",
    "on_request_finished",
)
VLLM, EQUAL, UNLIKE = "vLLM", "kvheap, equal groups", "kvheap, unlike groups"

Row = dict[str, Any]


class Traffic:
    """Requests to a full tier: each stores keys of its own, looks them up and loads them.

    Args:
        manager: the tier's; every store evicts as many chunks as it brings.
        num_groups: among which the keys are shared.
        num_chunks: that the tier holds.
    """

    def __init__(self, manager: Any, num_groups: int, num_chunks: int) -> None:
        self.manager = manager
        self.num_groups = num_groups
        self.numbers = count()
        for _ in range(2 * num_chunks // 256):
            self.request(256)

    def request(self, num_keys: int) -> dict[str, float]:
        """Microseconds of each call of one request."""
        manager, clock = self.manager, time.perf_counter
        keys = [
            make_offload_key(next(self.numbers).to_bytes(32, "little"), at % self.num_groups)
            for at in range(num_keys)
        ]
        keys.sort(key=lambda key: key[-4:])  # group after group, as vLLM has them
        context, as_set = ReqContext("request"), set(keys)
        for position, key in enumerate(keys):
            context.set_offload_key_position(key, position)
        manager.on_new_request(context)

        def look_up() -> None:
            for key in keys:
                manager.lookup(key, context)

        calls: dict[str, Callable[[], object]] = {
            "prepare_store": lambda: manager.prepare_store(keys, context),
            "complete_store": lambda: manager.complete_store(as_set, context),
            "lookup": look_up,
            "prepare_load": lambda: manager.prepare_load(keys, context),
            "complete_load": lambda: manager.complete_load(as_set, context),
            "on_request_finished": lambda: manager.on_request_finished(context),
        }
        microseconds = {}
        for name, call in calls.items():
            start = clock()
            call()
            microseconds[name] = (clock() - start) * 1e6
        return microseconds


def tiers(num_chunks: int, policy: str) -> dict[str, Traffic]:
    """The managers of vLLM and of kvheap, each full of chunks."""
    settings = TierSettings.of(
        {"cpu_bytes_to_use": num_chunks * CHUNK_BYTES, "eviction_policy": policy}
    )
    equal = [ChunkGroup("full", CHUNK_BYTES)]
    unlike = [ChunkGroup("full", CHUNK_BYTES), ChunkGroup("window", CHUNK_BYTES * 7 // 8)]
    return {
        VLLM: Traffic(CPUOffloadingManager(num_chunks, policy), 1, num_chunks),
        EQUAL: Traffic(KVHeapManager(equal, settings), 1, num_chunks),
        UNLIKE: Traffic(KVHeapManager(unlike, settings), 2, num_chunks),
    }


def measure_cost(num_chunks: int, policy: str, num_keys: int, rounds: int) -> list[Row]:
    """A row for each call: percentiles of each manager over rounds, which they take in turn."""
    managers = tiers(num_chunks, policy)
    samples: dict[str, dict[str, list[float]]] = {
        name: {call: [] for call in CALLS} for name in managers
    }
    for round_number in range(rounds + 3):
        for name, traffic in managers.items():
            for call, microseconds in traffic.request(num_keys).items():
                if round_number >= 3:
                    samples[name][call].append(microseconds)
    rows = []
    for call in CALLS:
        timed = {name: Samples(tuple(of_one[call])) for name, of_one in samples.items()}
        row: Row = {"call": call, "keys": num_keys, "chunks": num_chunks, "policy": policy}
        row |= {name: timing.percentiles() for name, timing in timed.items()}
        for name in (EQUAL, UNLIKE):
            row[f"{name}: times as fast"] = round(timed[name].speed_against(timed[VLLM]), 2)
        rows.append(row)
    return rows
