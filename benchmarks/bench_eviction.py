"""Orders of eviction: what each finds again of many traces, and what a reference costs the host.

Peers: the offline optimum, which knows the future and stores only what will be used (Belady), and
where vLLM is installed its own LRU and ARC classes. Every order sees the same traffic:

- a request's hits are its leading chunks that are stored; all chunks of it that are stored are
  touched once, the chunks that are missing are stored, after as many were evicted, and the request
  is settled. Chunks of the request are not evicted for it. Figures are hits in % of all references,
  a request's repeated ids included;
- ``first half`` and ``second half`` are of the conversation trace, each with an empty cache. The
  constants of ``adaptive`` were chosen on this trace and on made-up ones, some of other kinds and
  all of other seeds than those here;
- ``hybrid`` is the traffic of ``chats`` for a model with three groups: 8 parts of a chunk's bytes
  are full attention, 2 a sliding window of two chunks, 20 a recurrent state. A prefix can be used
  up to a chunk if all its attention is there, the window before the end, and the state at the end.
  Figures are usable chunks in % of all.

Microseconds are of CPU time for one reference: whatever the order does for it.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _eviction_traces import MADE_UP
from _report import (
    REPOSITORY,
    Row,
    describe_machine,
    make_console,
    parse_common,
    print_machine,
    write_results,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvheap.prefix.orders import ORDERS, EvictionOrder
from kvheap.replay.trace import read_trace

TRACE = REPOSITORY.parent / "shared/traces/conversation_trace.jsonl"
CAPACITIES = (2_000, 8_000, 16_384, 40_000)
QUICK_CAPACITIES = (500, 2_000)
QUICK_REQUESTS = 1_500
SEED = 2026

ATTENTION, WINDOW, STATE = range(3)
GROUP_BYTES = (8, 2, 20)
WINDOW_CHUNKS = 2
HYBRID_REQUESTS = 5_000

Requests = Sequence[Sequence[int]]


def stored_in_vllm(policy: str) -> Callable[[int], EvictionOrder[int]] | None:
    """A policy class of vLLM as an order for chunks of one byte; None if vLLM is not installed."""
    try:
        from vllm.v1.kv_offload.base import ReqContext
        from vllm.v1.kv_offload.cpu.policies.arc import ARCCachePolicy
        from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
        from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy
    except ImportError:
        return None

    class InVLLM:
        """An order that asks vLLM's."""

        def __init__(self, heap_bytes: int) -> None:
            self.policy = (LRUCachePolicy if policy == "lru" else ARCCachePolicy)(heap_bytes)
            self.context = ReqContext("request")
            self.count = 0

        def insert(self, key: int, size_bytes: int, group: int) -> None:
            chunk = ChunkStatus(0)
            self.policy.on_store_miss([key], self.context)
            self.policy.insert(key, chunk, self.context)
            chunk.ref_cnt = 0
            self.policy.mark_evictable(key)
            self.count += 1

        def touch(self, keys: Sequence[int]) -> None:
            self.policy.touch(keys, self.context)

        def settle(self, keys: Sequence[int]) -> None:
            """Nothing: it would count as a use."""

        def evict_until(self, num_bytes: int, is_pinned: Any) -> list[int]:
            """Evict chunks; the replays give the method of a set, and vLLM wants the set."""
            victims = self.policy.evict(num_bytes, is_pinned.__self__) or []
            self.count -= len(victims)
            return [key for key, _ in victims]

        def __len__(self) -> int:
            return self.count

        def __contains__(self, key: object) -> bool:
            return self.policy.get(key) is not None

    return InVLLM  # type: ignore[return-value]


# -- replays ---------------------------------------------------------------------------------------


def replay(order: EvictionOrder[int], requests: Requests, capacity: int) -> dict[str, float]:
    """Hits in % of references, and microseconds of one."""
    hits = 0
    seconds = 0.0
    for ids in requests:
        for key in ids:
            if key not in order:
                break
            hits += 1
        distinct = list(dict.fromkeys(ids))
        stored = [key for key in distinct if key in order]
        missing = [key for key in reversed(distinct) if key not in order]
        kept = set(stored)
        excess = len(order) + len(missing) - capacity
        start = time.thread_time()
        order.touch(stored)
        if excess > 0 and not order.evict_until(excess, kept.__contains__):
            raise RuntimeError(f"a request of {len(distinct)} chunks exceeds the cache")
        for key in missing:
            order.insert(key, 1, 0)
        order.settle(distinct)
        seconds += time.thread_time() - start
    references = sum(map(len, requests))
    return {"hits": round(100 * hits / references, 2), "us": round(1e6 * seconds / references, 2)}


def optimum(requests: Requests, capacity: int) -> float:
    """Hits in % of references if the chunk that is needed last, or never, goes first."""
    never = len(requests)
    next_use = [[never] * len(ids) for ids in requests]
    seen: dict[int, int] = {}
    for number in range(len(requests) - 1, -1, -1):
        ids = requests[number]
        next_use[number] = [seen.get(key, never) for key in ids]
        for key in ids:
            seen[key] = number
    stored: dict[int, tuple[int, int]] = {}  # key -> when it is needed next, and its depth then
    queue: list[tuple[int, int, int]] = []
    hits = 0
    for ids, uses in zip(requests, next_use, strict=True):
        for key in ids:
            if key not in stored:
                break
            hits += 1
        for depth, (key, use) in enumerate(zip(ids, uses, strict=True)):
            stored.pop(key, None)
            if use < never:
                stored[key] = (use, depth)
                heapq.heappush(queue, (-use, -depth, key))
        while len(stored) > capacity:
            use, depth, key = heapq.heappop(queue)
            if stored.get(key) == (-use, -depth):
                del stored[key]
    return round(100 * hits / sum(map(len, requests)), 2)


def replay_hybrid(order: EvictionOrder[int], requests: Requests, capacity: int) -> dict[str, float]:
    """Usable chunks in %; a key is a chunk's id and its group."""
    heap_bytes = capacity * sum(GROUP_BYTES)
    used_bytes = hits = calls = 0
    sizes: dict[int, int] = {}
    seconds = 0.0
    for ids in requests:
        usable = usable_chunks(order, ids)
        hits += usable
        read = [3 * key + ATTENTION for key in ids[:usable]]
        read += [3 * key + WINDOW for key in ids[max(0, usable - WINDOW_CHUNKS) : usable]]
        read += [3 * key + STATE for key in ids[usable - 1 : usable]]
        new = [3 * key + group for key in ids[usable:] for group in (ATTENTION, WINDOW, STATE)]
        missing = [key for key in new if key not in order]
        kept = {*read, *new}
        used_bytes += sum(GROUP_BYTES[key % 3] for key in missing)
        start = time.thread_time()
        order.touch(read)
        if used_bytes > heap_bytes:
            victims = order.evict_until(used_bytes - heap_bytes, kept.__contains__)
            if not victims:
                raise RuntimeError(f"a request of {len(ids)} chunks exceeds the cache")
            used_bytes -= sum(sizes.pop(key) for key in victims)
        for key in reversed(missing):
            sizes[key] = GROUP_BYTES[key % 3]
            order.insert(key, sizes[key], key % 3)
        order.settle([*read, *new])
        seconds += time.thread_time() - start
        calls += len(read) + len(new)
    references = sum(map(len, requests))
    return {"hits": round(100 * hits / references, 2), "us": round(1e6 * seconds / calls, 2)}


def usable_chunks(order: EvictionOrder[int], ids: Sequence[int]) -> int:
    """How long a prefix can be used."""
    attention = 0
    while attention < len(ids) and 3 * ids[attention] + ATTENTION in order:
        attention += 1
    for end in range(attention, 0, -1):
        window = ids[max(0, end - WINDOW_CHUNKS) : end]
        has_window = all(3 * key + WINDOW in order for key in window)
        if has_window and 3 * ids[end - 1] + STATE in order:
            return end
    return 0


# -- cases -----------------------------------------------------------------------------------------


def traces(is_quick: bool) -> OrderedDict[str, Requests]:
    """All traces by name."""
    found: OrderedDict[str, Requests] = OrderedDict()
    if TRACE.exists():
        limit = QUICK_REQUESTS if is_quick else None
        requests = [request.hash_ids for request in read_trace(TRACE, limit)]
        found["conversation"] = requests
        found["first half"] = requests[: len(requests) // 2]
        found["second half"] = requests[len(requests) // 2 :]
    for name, (make, num_requests) in MADE_UP.items():
        number = min(num_requests, QUICK_REQUESTS) if is_quick else num_requests
        found[name] = make(random.Random(SEED), number)
    return found


def measure(requests: Requests, capacity: int, orders: dict[str, Any], is_hybrid: bool) -> Row:
    row: Row = {"chunks": capacity}
    for name, make in orders.items():
        if is_hybrid and name.startswith("vLLM"):
            continue
        if is_hybrid:
            heap_bytes = capacity * sum(GROUP_BYTES)
            row[name] = replay_hybrid(make(heap_bytes), requests, capacity)
        else:
            row[name] = replay(make(capacity), requests, capacity)
    if not is_hybrid:
        row["optimum"] = optimum(requests, capacity)
    best = max(row[name]["hits"] for name in ("lru", "arc", "s3fifo"))
    row["against_best"] = round(row["adaptive"]["hits"] - best, 2)
    return row


def print_hits(console: Console, rows: list[Row], orders: Sequence[str]) -> None:
    table = Table(title="hits, % of references (us of the host for one)")
    for name in ("trace", "chunks", *orders, "optimum", "adaptive against the best of three"):
        table.add_column(name, justify="left" if name == "trace" else "right")
    for row in rows:
        cells = [
            f"{row[name]['hits']:.2f} ({row[name]['us']:.1f})" if name in row else "-"
            for name in orders
        ]
        best = f"{row['against_best']:+.2f}"
        table.add_row(
            row["trace"], f"{row['chunks']:,}", *cells, f"{row.get('optimum', '-')}", best
        )
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """A panel for each trace: hits over the size of the cache."""
    rows = found["rows"]
    names = list(dict.fromkeys(row["trace"] for row in rows))
    figure, panels = plt.subplots(3, -(-len(names) // 3), figsize=(15, 10))
    styles = {"lru": "C0-", "arc": "C1-", "s3fifo": "C2-", "adaptive": "k-", "optimum": "C7--"}
    for name, panel in zip(names, panels.flat, strict=False):
        of_trace = [row for row in rows if row["trace"] == name]
        for order, style in styles.items():
            points = [row[order] for row in of_trace if order in row]
            hits = [point["hits"] if isinstance(point, dict) else point for point in points]
            if hits:
                panel.plot(
                    [row["chunks"] for row in of_trace], hits, style, marker=".", label=order
                )
        panel.set_title(name, fontsize=10)
        panel.set_xscale("log")
        panel.set_xticks([row["chunks"] for row in of_trace])
        panel.set_xticklabels([f"{row['chunks']:,}" for row in of_trace], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(names) :]:
        panel.axis("off")
    panels.flat[0].legend(fontsize=8)
    figure.supxlabel("chunks that the cache holds")
    figure.supylabel("hits, % of references")
    figure.suptitle(f"Orders of eviction, {found['date'][:10]}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console = make_console()
    machine = describe_machine(torch.device("cpu"))
    print_machine(console, machine)
    orders: dict[str, Any] = dict(ORDERS)
    for policy in ("lru", "arc"):
        peer = stored_in_vllm(policy)
        if peer is not None:
            orders[f"vLLM {policy}"] = peer
    capacities = QUICK_CAPACITIES if arguments.quick else CAPACITIES
    everything = traces(arguments.quick)
    if not TRACE.exists():
        console.print(f"{TRACE} is missing: no hit rates of the conversation trace")
    everything["hybrid"] = everything["chats"][:HYBRID_REQUESTS]
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("replaying", total=len(everything) * len(capacities))
        for name, requests in everything.items():
            for capacity in capacities:
                row = measure(requests, capacity, orders, name == "hybrid")
                rows.append({"trace": name, **row})
                progress.advance(task)
    print_hits(console, rows, list(orders))
    configuration = {
        "quick": arguments.quick,
        "capacities": capacities,
        "seed": SEED,
        "group_bytes": GROUP_BYTES,
        "references": {name: sum(map(len, each)) for name, each in everything.items()},
    }
    write_results(console, arguments.out, "eviction", machine, configuration, {"rows": rows}, draw)


if __name__ == "__main__":
    main()
