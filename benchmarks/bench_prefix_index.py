"""PrefixIndex: what its calls cost the host, and what each eviction policy finds again.

Peer: an ``OrderedDict`` of keys with pin counts, least recently used first, as a first version of
a prefix cache has it; in the same rounds. It steps over pinned chunks when it evicts. The cases:

============  ======================================================================================
case          what is measured
============  ======================================================================================
calls         microseconds of one call with 1, 16 and 256 keys of 36 bytes, as vLLM's are: looking
              up a prefix that is stored; a hold and its release; beginning and completing a store
              of new chunks; evicting as many. Beside 1,000 and 100,000 stored chunks, of which
              none are held, or the 10,000 that LRU would evict next
trace         share of the block references of the conversation trace that are hits: leading chunks
              of a request that are stored. Each request holds and uses what is stored of it, then
              stores the rest
made-up       the same for ``synthetic_trace(5000)``, the traffic of ``kvheap replay``
============  ======================================================================================

Times are of the host; ratios are medians over rounds, the peer's time over that of the index.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _report import (
    REPOSITORY,
    describe_machine,
    make_console,
    parse_common,
    print_machine,
    write_results,
)
from _timing import Measure, time_in_rounds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvheap import PrefixIndex
from kvheap.prefix import POLICIES
from kvheap.replay.hit_rates import hit_rate
from kvheap.replay.trace import read_trace, synthetic_trace

TRACE = REPOSITORY.parent / "shared/traces/conversation_trace.jsonl"
CHUNK_BYTES = 1 << 20
PEER = "OrderedDict"

CAPACITIES = (2_000, 8_000, 16_384, 40_000)
MADE_UP_CAPACITIES = (256, 1_024, 4_096)
MADE_UP_REQUESTS = 5_000

Row = dict[str, Any]
Key = bytes
Requests = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    states: tuple[tuple[int, int], ...]
    """Stored chunks, and how many of them are held."""
    num_keys: tuple[int, ...]
    rounds: int
    trace_requests: int | None
    capacities: tuple[int, ...]

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """What takes some minutes, or a few seconds."""
        if quick:
            return cls(((1_000, 0), (20_000, 10_000)), (1, 256), 5, 2_000, (2_000, 8_000))
        states = ((1_000, 0), (100_000, 0), (100_000, 10_000))
        return cls(states, (1, 16, 256), 15, None, CAPACITIES)


# -- calls -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cache:
    """The calls that are timed, of the index or of the peer."""

    look_up: Callable[[list[Key]], int]
    hold: Callable[[list[Key]], object]
    hold_and_release: Callable[[list[Key]], object]
    store: Callable[[list[Key], list[int]], object]
    evict: Callable[[int], object]
    check: Callable[[], None] = lambda: None


def index_cache(policy: str) -> Cache:
    """The index, with a policy."""
    index: PrefixIndex[Key, int] = PrefixIndex(POLICIES[policy]())
    return Cache(
        look_up=index.prefix_length,
        hold=index.hold,
        hold_and_release=lambda keys: index.hold(keys).release(),
        store=lambda keys, values: index.begin(keys, values, CHUNK_BYTES).complete(),
        evict=lambda num_keys: index.evict(num_keys * CHUNK_BYTES),
        check=index.check,
    )


def plain_cache() -> Cache:
    """The peer: no states, no bytes, no other policy, and pins in the order of eviction."""
    chunks: OrderedDict[Key, list[int]] = OrderedDict()  # value and pin count

    def look_up(keys: list[Key]) -> int:
        for length, key in enumerate(keys):
            if key not in chunks:
                return length
        return len(keys)

    def hold(keys: list[Key]) -> None:
        for key in keys:
            chunks[key][1] += 1

    def hold_and_release(keys: list[Key]) -> None:
        hold(keys)
        for key in keys:
            chunks[key][1] -= 1
        for key in reversed(keys):
            chunks.move_to_end(key)

    def store(keys: list[Key], values: list[int]) -> None:
        for key, value in zip(reversed(keys), reversed(values), strict=True):
            chunks[key] = [value, 0]

    def evict(num_keys: int) -> list[tuple[Key, int]]:
        victims: list[Key] = []
        for key, chunk in chunks.items():
            if not chunk[1]:
                victims.append(key)
                if len(victims) == num_keys:
                    break
        return [(key, chunks.pop(key)[0]) for key in victims]

    return Cache(look_up, hold, hold_and_release, store, evict)


class Bench:
    """A cache in a state that every measurement leaves as it was."""

    def __init__(self, cache: Cache, num_stored: int, num_held: int) -> None:
        self.cache = cache
        self.numbers = count()
        first = self.new_keys(num_held)
        for keys in (first, *(self.new_keys(256) for _ in range(0, num_stored - num_held, 256))):
            cache.store(keys, list(range(len(keys))))
        cache.hold(first)

    def new_keys(self, num_keys: int) -> list[Key]:
        """Keys as vLLM makes them: a hash of 32 bytes and a group of 4."""
        return [next(self.numbers).to_bytes(36, "little") for _ in range(num_keys)]

    def calls(self, num_keys: int, repeats: int) -> dict[str, Measure]:
        """A measurement of each call; the first two are of chunks that the others may evict."""
        cache, values = self.cache, list(range(num_keys))
        known = self.new_keys(num_keys)
        cache.store(known, values)

        def timed(call: Callable[[], object], after: Callable[[], object]) -> float:
            seconds = 0.0
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                seconds += time.perf_counter() - start
                after()
            return seconds * 1e6 / repeats

        def store() -> float:
            keys = iter([self.new_keys(num_keys) for _ in range(repeats)])
            return timed(lambda: cache.store(next(keys), values), lambda: cache.evict(num_keys))

        def evict() -> float:
            cache.store(self.new_keys(num_keys), values)
            microseconds = timed(
                lambda: cache.evict(num_keys),
                lambda: cache.store(self.new_keys(num_keys), values),
            )
            cache.evict(num_keys)
            return microseconds

        return {
            "look-up": lambda: timed(lambda: cache.look_up(known), lambda: None),
            "hold + release": lambda: timed(lambda: cache.hold_and_release(known), lambda: None),
            "begin + complete": store,
            "evict": evict,
        }


def measure_calls(scale: Scale, num_stored: int, num_held: int) -> list[Row]:
    caches = {name: index_cache(name) for name in POLICIES} | {PEER: plain_cache()}
    benches = {name: Bench(cache, num_stored, num_held) for name, cache in caches.items()}
    rows = []
    for num_keys in scale.num_keys:
        repeats = max(4, 64 // num_keys)
        calls = {name: bench.calls(num_keys, repeats) for name, bench in benches.items()}
        for call in ("look-up", "hold + release", "begin + complete", "evict"):
            measures = {name: of_one[call] for name, of_one in calls.items()}
            samples = time_in_rounds(measures, scale.rounds)
            row: Row = {"call": call, "keys": num_keys, "stored": num_stored, "held": num_held}
            row |= {name: timing.percentiles() for name, timing in samples.items()}
            row["times_as_fast"] = round(samples["lru"].speed_against(samples[PEER]), 2)
            rows.append(row)
    for cache in caches.values():
        cache.check()
    return rows


# -- hit rates -------------------------------------------------------------------------------------


def plain_hit_rate(requests: Requests, capacity: int) -> float:
    """The same with the peer, which is LRU."""
    chunks: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in requests:
        hits += next((length for length, key in enumerate(ids) if key not in chunks), len(ids))
        for key in reversed(ids):
            chunks[key] = None
            chunks.move_to_end(key)
        while len(chunks) > capacity:
            chunks.popitem(last=False)
    return 100 * hits / sum(map(len, requests))


def measure_hits(requests: Requests, capacity: int) -> Row:
    row: Row = {"chunks": capacity}
    for policy in POLICIES:
        row[policy] = round(100 * hit_rate(requests, POLICIES[policy](), capacity), 2)
    row[PEER] = round(plain_hit_rate(requests, capacity), 2)
    if row[PEER] != row["lru"]:
        raise RuntimeError(f"LRU finds {row['lru']} %, the peer {row[PEER]} %: one is wrong")
    return row


# -- report ----------------------------------------------------------------------------------------


def print_calls(console: Console, rows: list[Row]) -> None:
    table = Table(title="us of one call; the ratio is the peer's time over LRU's")
    for name in ("call", "keys", "stored", "held", *POLICIES, PEER, "ratio"):
        table.add_column(name, justify="left" if name == "call" else "right")
    for row in rows:
        cells = [row["call"], *(f"{row[name]:,}" for name in ("keys", "stored", "held"))]
        cells += [f"{row[name]['p50_us']:,.1f}" for name in (*POLICIES, PEER)]
        table.add_row(*cells, f"{row['times_as_fast']:,.1f}x")
    console.print(table)


def print_hits(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title)
    names = ("chunks", *POLICIES, PEER)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{row[name]:,}" for name in names))
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Hit rates over the size of the cache, and the cost of an eviction beside held chunks."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    rows = found["trace"] or found["made_up"]
    for name in POLICIES:
        left.plot([r["chunks"] for r in rows], [r[name] for r in rows], marker="o", label=name)
    left.set_title("the conversation trace" if found["trace"] else "made-up traffic")
    left.set_xlabel("chunks that the cache holds")
    left.set_ylabel("hits, % of block references")
    left.set_xscale("log")
    left.set_xticks([row["chunks"] for row in rows], [f"{row['chunks']:,}" for row in rows])
    left.minorticks_off()
    for name, color in (("lru", "tab:blue"), ("gdsf", "tab:orange"), (PEER, "grey")):
        for is_held, style in ((False, "-"), (True, "--")):
            evictions = [
                row
                for row in found["calls"]
                if row["call"] == "evict" and bool(row["held"]) == is_held and row["stored"] > 1_000
            ]
            points = [(row["keys"], row[name]["p50_us"]) for row in evictions]
            if points:
                label = f"{name}{', 10,000 held' if is_held else ''}"
                right.plot(*zip(*points, strict=True), style, color=color, marker="o", label=label)
    right.set_title("eviction from a large index")
    right.set_xlabel("chunks evicted by one call")
    right.set_ylabel("microseconds of the host")
    right.set_xscale("log")
    right.set_yscale("log")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"Prefix index, {found['device']}, {found['date'][:10]}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console, scale = make_console(), Scale.of(arguments.quick)
    machine = describe_machine(torch.device("cpu"))
    print_machine(console, machine)
    made_up = [request.hash_ids for request in synthetic_trace(MADE_UP_REQUESTS)]
    cases: list[tuple[str, Callable[[], list[Row]]]] = [
        *(("calls", lambda s=s: measure_calls(scale, *s)) for s in scale.states),
        *(("made_up", lambda n=n: [measure_hits(made_up, n)]) for n in MADE_UP_CAPACITIES),
    ]
    if TRACE.exists():
        trace = [request.hash_ids for request in read_trace(TRACE, scale.trace_requests)]
        cases += [("trace", lambda n=n: [measure_hits(trace, n)]) for n in scale.capacities]
    else:
        console.print(f"{TRACE} is missing: no hit rates of the conversation trace")
    tables: dict[str, Any] = {"calls": [], "trace": [], "made_up": []}
    for name, measure in track(cases, "measuring", console=console, transient=True):
        tables[name] += measure()
    print_calls(console, tables["calls"])
    if tables["trace"]:
        title = "hits on the conversation trace, % of block references"
        print_hits(console, title, tables["trace"])
    print_hits(console, "hits on made-up traffic, %", tables["made_up"])
    configuration = {
        "quick": arguments.quick,
        "rounds": scale.rounds,
        "key_bytes": 36,
        "trace_requests": scale.trace_requests,
        "made_up_requests": MADE_UP_REQUESTS,
        "times_as_fast": "median over rounds of the peer's time over LRU's",
    }
    write_results(console, arguments.out, "prefix_index", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
