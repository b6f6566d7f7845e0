"""What watching costs: a scrape, by how much there is to look at; a call; a snapshot.

A scrape is measured alone, and by the longest that an engine's thread waits beside it: a thread
allocates and frees all the time while another one scrapes. Calls are compared in rounds: on a heap
that nobody watches, and on the same heap while it is watched. Of a snapshot, the time for which
other threads wait is reported apart: that under the heap's guard.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _report import (
    Row,
    describe_machine,
    make_console,
    parse_common,
    print_machine,
    write_results,
)
from _timing import on_the_host, time_in_rounds
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from rich.table import Table

from kvheap import TensorMemoryAllocator
from kvheap.metrics import Metrics

PAGE = 4096
BATCHES = (1, 100, 10_000, 100_000)
QUICK_BATCHES = (1, 1_000)


def heap_of(num_pages: int) -> TensorMemoryAllocator:
    """A heap that costs no memory: its pages are never touched."""
    return TensorMemoryAllocator(torch.empty(num_pages * PAGE, dtype=torch.uint8))


def measure_scrapes(counts: tuple[int, ...], rounds: int) -> list[Row]:
    """A scrape of a heap with this many batches of one block, of which each tenth is pinned."""
    rows: list[Row] = []
    for count in counts:
        heap, busy = heap_of(count + 64), heap_of(64)
        kept = [heap.batched_allocate([PAGE], torch.uint8, 1) for _ in range(count)]
        for batch in kept[::10]:
            assert batch is not None
            batch[0].pin()
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        metrics.watch(heap, "h", calls=False)
        scrape = on_the_host([lambda registry=registry: generate_latest(registry)])  # type: ignore[misc]
        alone = time_in_rounds({"scrape": scrape}, rounds)["scrape"]
        still, beside = longest_call(heap, 0.5, None), longest_call(heap, 0.5, registry)
        other = longest_call(busy, 0.5, registry)
        rows.append(
            {
                "batches": count,
                **alone.percentiles(),
                "waits_alone_us": still,
                "waits_beside_us": beside,
                "waits_of_another_heap_us": other,
            }
        )
        metrics.close()
    return rows


def longest_call(
    heap: TensorMemoryAllocator, seconds: float, registry: CollectorRegistry | None
) -> dict[str, float]:
    """Microseconds of an allocation and its free, while another thread scrapes all the time."""
    has_ended = threading.Event()

    def scrape() -> None:
        while registry is not None and not has_ended.is_set():
            generate_latest(registry)

    thread = threading.Thread(target=scrape)
    thread.start()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while (began := time.perf_counter()) < deadline:
        batch = heap.batched_allocate([PAGE], torch.uint8, 8)
        assert batch is not None
        heap.batched_free(batch)
        times.append((time.perf_counter() - began) * 1e6)
    has_ended.set()
    thread.join()
    times.sort()
    return {
        "p50": round(times[len(times) // 2], 1),
        "p99": round(times[len(times) * 99 // 100], 1),
        "max": round(times[-1], 1),
    }


def measure_calls(rounds: int) -> list[Row]:
    """Allocation and free of 4 blocks, unwatched and watched, in turn."""
    heap = heap_of(64)
    metrics = Metrics(CollectorRegistry())

    def call() -> None:
        batch = heap.batched_allocate([PAGE], torch.uint8, 4)
        assert batch is not None
        heap.batched_free(batch)

    measure, adapt = on_the_host([call] * 100), on_the_host([call] * 2000)

    def least() -> float:
        adapt()  # the interpreter, to methods that were replaced
        return min(measure() for _ in range(20))

    def unwatched() -> float:
        return least()

    def watched() -> float:
        metrics.watch(heap, "h")
        found = least()
        metrics.unwatch("h")
        return found

    samples = time_in_rounds({"unwatched": unwatched, "watched": watched}, rounds)
    own, theirs = samples["watched"].microseconds, samples["unwatched"].microseconds
    added = statistics.median(a - b for a, b in zip(own, theirs, strict=True))
    return [
        {
            "method": name,
            "added_us_a_call": round(added / 2, 3),
            "least_us": round(min(each.microseconds), 3),
            **each.percentiles(),
        }
        for name, each in samples.items()
    ]


class GuardTime:
    """Times how long a heap's lock is held: takes the lock's place."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._lock.__enter__()
        self._began = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self.seconds = max(self.seconds, time.perf_counter() - self._began)
        self._lock.__exit__(*error)


def measure_snapshots(counts: tuple[int, ...], rounds: int) -> list[Row]:
    """A snapshot of a heap with this many batches of two blocks, each second one freed."""
    rows: list[Row] = []
    for count in counts:
        heap = heap_of(2 * count + 64)
        kept = [heap.batched_allocate([PAGE], torch.uint8, 2) for _ in range(count)]
        for batch in kept[::2]:
            assert batch is not None
            heap.free(batch[1])
        guard = heap.address_manager.guard
        whole, held = [], []
        for _ in range(rounds):
            lock, guard.lock = guard.lock, GuardTime(guard.lock)
            began = time.perf_counter()
            snapshot = heap.snapshot()
            whole.append((time.perf_counter() - began) * 1e3)
            held.append(guard.lock.seconds * 1e3)
            guard.lock = lock
        rows.append(
            {
                "batches": count,
                "extents": snapshot.num_extents,
                "p50_ms": round(statistics.median(whole), 3),
                "guard_p50_ms": round(statistics.median(held), 3),
            }
        )
    return rows


def print_tables(
    console: Console, scrapes: list[Row], calls: list[Row], snapshots: list[Row]
) -> None:
    table = Table(title="a scrape, and calls beside scrapes that never end: us (p50 / p99 / max)")
    for column in ("batches", "scrape, p50", "calls alone", "beside", "of another heap"):
        table.add_column(column, justify="right")
    for row in scrapes:
        waits = (row["waits_alone_us"], row["waits_beside_us"], row["waits_of_another_heap_us"])
        table.add_row(
            f"{row['batches']:,}",
            f"{row['p50_us']:,.0f}",
            *(" / ".join(f"{value:,.0f}" for value in each.values()) for each in waits),
        )
    console.print(table)
    table = Table(title="allocation and free of 4 blocks, two calls: us")
    for column in ("", "least", "p50"):
        table.add_column(column, justify="right")
    for row in calls:
        table.add_row(row["method"], f"{row['least_us']:.2f}", f"{row['p50_us']:.2f}")
    console.print(table)
    console.print(
        f"watching adds {calls[0]['added_us_a_call']:.2f} us to a call (median of rounds)"
    )
    table = Table(title="heap.snapshot(): ms (p50)")
    for column in ("batches", "extents", "in all", "of it under the guard"):
        table.add_column(column, justify="right")
    for row in snapshots:
        table.add_row(
            f"{row['batches']:,}",
            f"{row['extents']:,}",
            f"{row['p50_ms']:.2f}",
            f"{row['guard_p50_ms']:.2f}",
        )
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw a scrape's time over the number of batches."""
    scrapes = found["scrapes"]
    figure, panel = plt.subplots(figsize=(7, 4.5))
    counts = [row["batches"] for row in scrapes]
    panel.plot(counts, [row["p50_us"] for row in scrapes], marker="o", label="a scrape (p50)")
    for key, label in (
        ("waits_alone_us", "a call, no scrapes (p99)"),
        ("waits_beside_us", "a call beside endless scrapes (p99)"),
    ):
        panel.plot(counts, [row[key]["p99"] for row in scrapes], marker="s", label=label)
    panel.set(xscale="log", yscale="log", xlabel="live batches of the heap", ylabel="us")
    panel.grid(alpha=0.3)
    panel.legend()
    panel.set_title(f"Metrics, {found['device']}, {found['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console = make_console()
    machine = describe_machine(torch.device("cpu"))
    print_machine(console, machine)
    sys.setswitchinterval(0.005)  # CPython's default
    rounds = 5 if arguments.quick else 40
    scrapes = measure_scrapes(QUICK_BATCHES if arguments.quick else BATCHES, rounds)
    calls = measure_calls(rounds)
    snapshots = measure_snapshots(QUICK_BATCHES if arguments.quick else BATCHES, 5)
    print_tables(console, scrapes, calls, snapshots)
    configuration = {"quick": arguments.quick, "page_bytes": PAGE, "switch_interval_s": 0.005}
    tables = {"scrapes": scrapes, "calls": calls, "snapshots": snapshots}
    write_results(console, arguments.out, "metrics", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
