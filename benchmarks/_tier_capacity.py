"""Part 1 of ``bench_vllm_tier``: what equal bytes hold, in vLLM's tier and in a heap.

Both managers get the same requests. A request stores, of each group, the chunks that vLLM keeps of
it: all of a full group, the last ones of a sliding window, one state. Needs the vllm package.
"""

from __future__ import annotations

import random
import statistics
from itertools import count
from typing import Any

from _tier_models import Model, Tier, tier_of
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvheap.integrations.vllm.manager import KVHeapManager
from kvheap.integrations.vllm.settings import TierSettings

SHORTEST, LONGEST = 500, 32_000
"""Tokens of a request, drawn evenly on a logarithmic scale."""

TURNOVERS = 3
"""How often the bytes of the tier are written anew before its useful share is measured."""

Row = dict[str, Any]


def requests(seed: int) -> Any:
    """Lengths of requests in tokens, without end."""
    rng = random.Random(seed)
    while True:
        yield round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())


def store(manager: Any, tier: Tier, num_tokens: int, number: int) -> tuple[bool, bool]:
    """Store a request of its own keys; whether all of it was, and whether something left."""
    keys = [
        make_offload_key(b"%16d%16d" % (number, at), group.group_id or 0)
        for group, chunks in zip(tier.groups, tier.chunks_of(num_tokens), strict=True)
        for at in range(chunks)
    ]
    context = ReqContext(str(number))
    manager.on_new_request(context)
    output = manager.prepare_store(keys, context)
    if output is None:
        return False, False
    manager.complete_store(output.keys_to_store, context)
    manager.on_request_finished(context)
    return True, bool(output.evicted_keys)


def held_requests(manager: Any, tier: Tier) -> tuple[int, int]:
    """Requests, and their tokens, that a new tier takes before something leaves."""
    held = tokens = 0
    for number, num_tokens in enumerate(requests(1)):
        is_stored, has_evicted = store(manager, tier, num_tokens, number)
        if not is_stored or has_evicted:
            return held, tokens
        held, tokens = held + 1, tokens + num_tokens
    raise AssertionError


def measure_capacity(model: Model, heap_bytes: int) -> Row:
    """Requests held by both, and the useful share of a heap that is full for long."""
    tier = tier_of(model)
    settings = TierSettings.of({"cpu_bytes_to_use": heap_bytes})
    ours = KVHeapManager(tier.groups, settings)
    theirs = CPUOffloadingManager(tier.num_slots(heap_bytes))
    held, tokens = held_requests(ours, tier)
    held_by_vllm, tokens_by_vllm = held_requests(theirs, tier)
    written, shares = 0, []
    for number, num_tokens in zip(count(1_000_000), requests(2), strict=False):
        store(ours, tier, num_tokens, number)
        written += sum(
            group.chunk_bytes * chunks
            for group, chunks in zip(tier.groups, tier.chunks_of(num_tokens), strict=True)
        )
        if written > TURNOVERS * heap_bytes:
            shares.append(ours.store.stats().useful_bytes / heap_bytes)
        if written > 2 * TURNOVERS * heap_bytes:
            break
    ours.store.check()
    stats = ours.store.stats()
    slots = tier.num_slots(heap_bytes) * tier.slot_bytes
    typical = tier.chunks_of(8_000)
    own = sum(g.chunk_bytes * n for g, n in zip(tier.groups, typical, strict=True))
    return {
        "model": model.name,
        "source": " ".join(model.source.split()),
        "groups": {group.name: group.chunk_bytes for group in tier.groups},
        "slot_bytes": tier.slot_bytes,
        "heap_bytes": heap_bytes,
        "is_packed": tier.is_packed,
        "requests": held,
        "requests_vllm": held_by_vllm,
        "tokens": tokens,
        "tokens_vllm": tokens_by_vllm,
        "ratio": round(tokens / tokens_by_vllm, 3),
        "useful_mean": round(statistics.mean(shares), 4),
        "useful_least": round(min(shares), 4),
        "useful_vllm": round(slots / heap_bytes * own / (sum(typical) * tier.slot_bytes), 4),
        "largest_free_extent": stats.largest_free_extent,
        "free_bytes": stats.free_bytes,
        "evicted_for_a_span": round(stats.span_evictions / max(stats.evicted_chunks, 1), 4),
    }
