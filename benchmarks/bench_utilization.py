"""How full a heap gets before an allocation fails: requested bytes over heap bytes.

The workloads of Mooncake's allocator benchmark (kvcache-ai/Mooncake,
``mooncake-store/benchmarks/allocator_bench.cpp``), on addresses alone:

=========  =========================================================================================
workload   what happens
=========  =========================================================================================
uniform    One size: 32 B * 4**k below 64 MiB, each also -17 B, +17 B, x0.9 and x1.1. The heap,
           2 GiB or 128 MiB for sizes below 1 KiB, is filled; then blocks come one by one. One that
           does not fit evicts a random block and tries again. Sampled after every allocation.
random     Sizes anywhere in 1 KiB..64 MiB, heap 2 GiB, else the same. Warm-up: requests of one
           heap's bytes.
pairs      KV of 3,274,752 B and indexer of 643 KiB. A round is 1..128 KV blocks, then as many
           indexer blocks. One that does not fit evicts 5 % of all blocks, at random. Sampled just
           before each eviction. Warm-up: requests of two heaps' bytes; the first, orderly filling
           is gone by then. Heap 1 TiB, as published; and 64 GiB, which is harder, as there are
           fewer free extents to choose from.
aged       Pairs in 64 GiB for a long time, one seed: what each tenth of it averages. Rules that
           start well may age badly.
=========  =========================================================================================

Every allocator gets the same requests, and draws whom to evict from the same seed. After each run
the blocks that are alive are checked for overlaps. Beside kvheap and LMCache's ``AddressManager``
(``pip install --no-deps lmcache==0.5.6`` and the modules that its import asks for), a plain
allocator tries other placement rules on ``random`` and on ``pairs`` in 64 GiB; first fit only where
LMCache, which takes the same places, is missing:

============  ======================================================================================
rule          the free extent that it takes
============  ======================================================================================
best fit      the smallest that holds the request, at the lowest address (kvheap)
first fit     the one at the lowest address (LMCache)
worst fit     the largest
two-ended     as best fit; but small sizes get the high end of the one at the highest address
split from X  as best fit; but rather one that is left empty, or with X or more, than with less
============  ======================================================================================
"""

from __future__ import annotations

import logging
import random
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from _placement import (
    FreeExtents,
    Heap,
    MakeHeap,
    Rule,
    first_fit,
    split_from,
    two_ended,
    worst_fit,
)
from _report import (
    describe_machine,
    make_console,
    parse_common,
    pyplot,
    size_label,
    write_json,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvheap import AddressManager

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Row = dict[str, Any]

PEER = "LMCache"
MOONCAKE = "Mooncake, published"

MAX_ALIGN_BYTES = 4096
MAX_ALIGN_WASTE = 0.001

UNIFORM_BASES = tuple(32 * 4**k for k in range(11))
UNIFORM_VARIANTS: dict[str, Callable[[int], int]] = {
    "exact": lambda base: base,
    "-17 B": lambda base: base - 17,
    "+17 B": lambda base: base + 17,
    "x0.9": lambda base: int(base * 0.9),
    "x1.1": lambda base: int(base * 1.1),
}
UNIFORM_HEAP_BYTES = 2 * GIB
UNIFORM_HEAP_BYTES_BELOW_1_KIB = 128 * MIB

RANDOM_HEAP_BYTES = 2 * GIB
RANDOM_SIZES = (1 * KIB, 64 * MIB)
RANDOM_ALIGN_BYTES = 1 * KIB
"""The smallest size. Rounding up to it wastes 512 B of 32 MiB on average, 0.0015 %."""

KV_BYTES = 3_274_752
INDEXER_BYTES = 643 * KIB
PAIRS_A_ROUND = 128
PAIRS_EVICTED_SHARE = 0.05
PAIRS_PUBLISHED_HEAP_BYTES = 1024 * GIB
PAIRS_SMALL_HEAP_BYTES = 64 * GIB
AGED_PARTS = 10
AGED_RULES = ("first fit", "two-ended")

SPLIT_BYTES = {"random": (1 * MIB, 8 * MIB), "pairs": (INDEXER_BYTES, KV_BYTES)}
"""Of ``random``, where the smallest size is one unit of the alignment: small parts of the mean."""
SMALL_BELOW_BYTES = {"random": 32 * MIB, "pairs": KV_BYTES}

PUBLISHED_UNIFORM = (0.87, 1.0)
PUBLISHED: dict[str, Row] = {
    "random": {
        "heap_bytes": RANDOM_HEAP_BYTES,
        "min": 0.544250,
        "p50": 0.847867,
        "avg": 0.841576,
    },
    "pairs": {"heap_bytes": PAIRS_PUBLISHED_HEAP_BYTES, "avg": 0.952},
}
"""Mooncake's OffsetAllocator, from the results published with its benchmark."""
TARGETS = {"random": 0.865, "pairs": 0.997}

RULES = {"kvheap": "kvheap (best fit)", PEER: f"{PEER} (first fit)"}
COLORS = {"kvheap": "tab:blue", PEER: "tab:orange", MOONCAKE: "grey"}

Floats = npt.NDArray[np.float64]


# -- placement rules -------------------------------------------------------------------------------


def placement_rules(workload: str) -> dict[str, MakeHeap]:
    """The rules beside best fit, with the thresholds that suit ``random`` or ``pairs``."""
    rules: dict[str, Rule] = {
        "first fit": first_fit,
        "worst fit": worst_fit,
        "two-ended": partial(two_ended, small_below=SMALL_BELOW_BYTES[workload]),
    }
    for threshold in SPLIT_BYTES[workload]:
        rules[f"split from {size_label(threshold)}"] = partial(split_from, threshold=threshold)
    return {name: partial(FreeExtents, rule=rule) for name, rule in rules.items()}


# -- workloads -------------------------------------------------------------------------------------


class Occupancy:
    """One heap, the blocks that live in it, and who has to go when it is full.

    Attributes:
        requested_bytes: of the blocks alive, as asked for, without alignment.
        allocations: how many succeeded.
        full_at: utilization just before each eviction.
    """

    def __init__(self, heap: Heap, heap_bytes: int, seed: int) -> None:
        self._heap = heap
        self.heap_bytes = heap_bytes
        self.requested_bytes = 0
        self.allocations = 0
        self.full_at = array("d")
        self._addresses = array("q")
        self._sizes = array("q")
        self._chance = random.Random(f"evictions {seed}")

    @property
    def utilization(self) -> float:
        """Requested bytes over heap bytes."""
        return self.requested_bytes / self.heap_bytes

    def fill(self, size: int) -> None:
        """As many blocks of ``size`` bytes as a fresh heap holds.

        They are allocated as one, which gives them the addresses that one by one would.
        """
        step = self._heap.compute_aligned_size(size)
        blocks = self.heap_bytes // step
        first, _ = self._heap.allocate(blocks * step)
        addresses = first + step * np.arange(blocks, dtype=np.int64)
        self._addresses.frombytes(addresses.tobytes())
        self._sizes.extend(array("q", [size]) * blocks)
        self.requested_bytes += blocks * size

    def allocate(self, size: int, evicted_share: float = 0.0) -> None:
        """Allocate, evicting that share of the blocks, at least one, until it succeeds."""
        while True:
            try:
                address, _ = self._heap.allocate(size)
            except RuntimeError:  # what a full heap raises, in LMCache too
                self.full_at.append(self.utilization)
                self._evict(max(1, int(len(self._addresses) * evicted_share)))
                continue
            self._addresses.append(address)
            self._sizes.append(size)
            self.requested_bytes += size
            self.allocations += 1
            return

    def _evict(self, count: int) -> None:
        addresses, sizes, heap = self._addresses, self._sizes, self._heap
        for _ in range(count):
            index = self._chance.randrange(len(addresses))
            address, size = addresses[index], sizes[index]
            addresses[index], sizes[index] = addresses[-1], sizes[-1]
            addresses.pop()
            sizes.pop()
            heap.free(address, heap.compute_aligned_size(size))
            self.requested_bytes -= size

    def check(self) -> None:
        """Utilization of blocks that overlap is worth nothing."""
        starts = np.frombuffer(self._addresses, np.int64)
        order = np.argsort(starts, kind="stable")  # fast on what is nearly sorted already
        starts, sizes = starts[order], np.frombuffer(self._sizes, np.int64)[order]
        ends = starts + sizes
        inside = starts[0] >= 0 and ends[-1] <= self.heap_bytes
        if not inside or (ends[:-1] > starts[1:]).any() or sizes.sum() != self.requested_bytes:
            raise RuntimeError(f"{type(self._heap)} handed out bytes twice, or outside the heap")


class Run(NamedTuple):
    """What one allocator did with one seed."""

    utilization: Floats
    allocations: int


Traffic = Callable[[Occupancy, random.Random, int], "array[float]"]
"""Warms an occupied heap up, then runs so many allocations or rounds; the utilization samples."""


def uniform_traffic(
    occupancy: Occupancy, _: random.Random, count: int, *, size: int
) -> array[float]:
    occupancy.fill(size)
    return sampled(occupancy, (size for _ in range(count)))


def random_traffic(occupancy: Occupancy, requests: random.Random, count: int) -> array[float]:
    requested = 0
    while requested <= occupancy.heap_bytes:
        size = requests.randint(*RANDOM_SIZES)
        occupancy.allocate(size)
        requested += size
    return sampled(occupancy, (requests.randint(*RANDOM_SIZES) for _ in range(count)))


def sampled(occupancy: Occupancy, sizes: Iterator[int]) -> array[float]:
    """The utilization after each allocation."""
    occupancy.allocations = 0
    samples = array("d")
    for size in sizes:
        occupancy.allocate(size)
        samples.append(occupancy.utilization)
    return samples


def pairs_traffic(occupancy: Occupancy, requests: random.Random, rounds: int) -> array[float]:
    requested = 0
    while requested <= 2 * occupancy.heap_bytes:
        requested += one_round(occupancy, requests)
    occupancy.allocations = 0
    warmed_up = len(occupancy.full_at)
    for _ in range(rounds):
        one_round(occupancy, requests)
    return occupancy.full_at[warmed_up:]


def one_round(occupancy: Occupancy, requests: random.Random) -> int:
    """Some KV blocks, then as many indexer blocks; the bytes that were requested."""
    blocks = requests.randint(1, PAIRS_A_ROUND)
    for size in (KV_BYTES, INDEXER_BYTES):
        for _ in range(blocks):
            occupancy.allocate(size, PAIRS_EVICTED_SHARE)
    return blocks * (KV_BYTES + INDEXER_BYTES)


@dataclass(frozen=True, slots=True)
class Workload:
    """One traffic over heaps of one size, and how much of it is measured."""

    name: str
    heap_bytes: int
    align_bytes: int
    count: int
    traffic: Traffic
    parts: int = 1
    """In how many parts the samples are averaged too."""

    def run(self, make: MakeHeap, seed: int) -> Run:
        """Occupy a fresh heap; the same seed gives every allocator the same requests."""
        heap = make(self.heap_bytes, self.align_bytes)
        occupancy = Occupancy(heap, self.heap_bytes, seed)
        samples = self.traffic(occupancy, random.Random(f"requests {seed}"), self.count)
        occupancy.check()
        return Run(np.array(samples), occupancy.allocations)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    seeds: int
    uniform_bases: tuple[int, ...]
    uniform_allocations: int
    random_allocations: int
    pairs_rounds: dict[int, int]
    """Rounds, by the heap's bytes."""
    aged_rounds: int

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """What takes a few minutes, or a few seconds."""
        if quick:
            return cls(1, UNIFORM_BASES[3::3], 1_000, 20_000, {PAIRS_SMALL_HEAP_BYTES: 400}, 800)
        rounds = {PAIRS_PUBLISHED_HEAP_BYTES: 3_000, PAIRS_SMALL_HEAP_BYTES: 1_500}
        return cls(3, UNIFORM_BASES, 5_000, 100_000, rounds, 12_000)


def align_for(*sizes: int) -> int:
    """The largest power of two up to 4096 that wastes at most 0.1 % of any of these sizes.

    15 B get 1, 29,491 B get 64, 1 MiB gets 4096.
    """
    align_bytes = MAX_ALIGN_BYTES
    while any(-size % align_bytes > MAX_ALIGN_WASTE * size for size in sizes):
        align_bytes //= 2
    return align_bytes


def uniform_workload(size: int, count: int) -> Workload:
    heap_bytes = UNIFORM_HEAP_BYTES_BELOW_1_KIB if size < KIB else UNIFORM_HEAP_BYTES
    traffic = partial(uniform_traffic, size=size)
    return Workload("uniform", heap_bytes, align_for(size), count, traffic)


def random_workload(count: int) -> Workload:
    return Workload("random", RANDOM_HEAP_BYTES, RANDOM_ALIGN_BYTES, count, random_traffic)


def pairs_workload(heap_bytes: int, rounds: int) -> Workload:
    align_bytes = align_for(KV_BYTES, INDEXER_BYTES)
    return Workload("pairs", heap_bytes, align_bytes, rounds, pairs_traffic)


def aged_workload(rounds: int) -> Workload:
    pairs = pairs_workload(PAIRS_SMALL_HEAP_BYTES, rounds)
    return replace(pairs, name="aged", parts=AGED_PARTS)


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peer:
    """LMCache's allocator, where it can be imported."""

    address_manager: MakeHeap
    version: str

    @classmethod
    def find(cls) -> Peer | None:
        """None where LMCache, or a module that its import asks for, is missing."""
        try:
            from importlib.metadata import version

            from lmcache.v1.memory_management import AddressManager as PeerAddressManager
        except ImportError:
            return None
        return cls(PeerAddressManager, version("lmcache"))


@dataclass(frozen=True, slots=True)
class Job:
    """One row to be: an allocator under a workload, over some seeds."""

    label: Row
    workload: Workload
    make: MakeHeap
    seeds: int


def plan_uniform(scale: Scale, allocators: Mapping[str, MakeHeap]) -> Iterator[Job]:
    for base in scale.uniform_bases:
        for variant, size_of in UNIFORM_VARIANTS.items():
            workload = uniform_workload(size_of(base), scale.uniform_allocations)
            about = {"base_bytes": base, "variant": variant} | capacity_of(workload, size_of(base))
            for name, make in allocators.items():
                yield Job({"allocator": name} | about, workload, make, scale.seeds)


def plan_mixed(scale: Scale, allocators: Mapping[str, MakeHeap]) -> Iterator[Job]:
    """Random sizes and pairs; the rules too, but in the heap that takes longest."""
    workloads = [random_workload(scale.random_allocations)]
    workloads += [
        pairs_workload(*heap_and_rounds) for heap_and_rounds in scale.pairs_rounds.items()
    ]
    for workload in workloads:
        makes = dict(allocators)
        if workload.heap_bytes != PAIRS_PUBLISHED_HEAP_BYTES:
            makes |= rules_beside(allocators, workload.name)
        for name, make in makes.items():
            yield Job({"allocator": name, "workload": workload.name}, workload, make, scale.seeds)


def plan_aged(scale: Scale, allocators: Mapping[str, MakeHeap]) -> Iterator[Job]:
    workload = aged_workload(scale.aged_rounds)
    rules = rules_beside(allocators, "pairs")
    makes = dict(allocators) | {name: rules[name] for name in AGED_RULES if name in rules}
    for name, make in makes.items():
        yield Job({"allocator": name, "workload": workload.name}, workload, make, 1)


def rules_beside(allocators: Mapping[str, MakeHeap], workload: str) -> dict[str, MakeHeap]:
    """The rules that none of the allocators follows."""
    rules = placement_rules(workload)
    if PEER in allocators:
        del rules["first fit"]
    return rules


def capacity_of(workload: Workload, size: int) -> Row:
    """What alignment and the heap's size leave of a heap for blocks of one size."""
    aligned_bytes = -(-size // workload.align_bytes) * workload.align_bytes
    blocks = workload.heap_bytes // aligned_bytes
    return {
        "size_bytes": size,
        "aligned_bytes": aligned_bytes,
        "blocks": blocks,
        "ceiling": round(blocks * size / workload.heap_bytes, 6),
    }


def measure(job: Job) -> Row:
    """Run every seed; min, median and mean over all samples, and over each seed's."""
    workload = job.workload
    runs = [workload.run(job.make, seed) for seed in range(job.seeds)]
    samples = np.concatenate([run.utilization for run in runs])
    row = {
        **job.label,
        "heap_bytes": workload.heap_bytes,
        "align_bytes": workload.align_bytes,
        "allocations": [run.allocations for run in runs],
        "samples": [len(run.utilization) for run in runs],
        "min": round(float(samples.min()), 6),
        "p50": round(float(np.median(samples)), 6),
        "avg": round(float(samples.mean()), 6),
        "avg_of_seeds": [round(float(run.utilization.mean()), 6) for run in runs],
        "min_of_seeds": [round(float(run.utilization.min()), 6) for run in runs],
    }
    if workload.parts > 1:
        parts = np.array_split(samples, workload.parts)
        row["avg_of_parts"] = [round(float(part.mean()), 6) for part in parts]
    return row


def measure_all(console: Console, jobs: Mapping[str, list[Job]]) -> dict[str, list[Row]]:
    """A row for each job, under the name of its plan."""
    measured: dict[str, list[Row]] = {name: [] for name in jobs}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, jobs.values())))
        for name, planned in jobs.items():
            for job in planned:
                heap = size_label(job.workload.heap_bytes)
                now = f"{job.workload.name}, {heap}, {job.label['allocator']}"
                progress.update(task, description=now)
                measured[name].append(measure(job))
                progress.advance(task)
    return measured


# -- reporting -------------------------------------------------------------------------------------


def of_allocator(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["allocator"] == name]


def lowest_share(rows: list[Row]) -> float:
    """The lowest utilization as a share of its ceiling."""
    return min(float(row["min"] / row["ceiling"]) for row in rows)


def print_uniform(console: Console, rows: list[Row]) -> None:
    allocators = list(dict.fromkeys(row["allocator"] for row in rows))
    table = Table(title="uniform sizes: kvheap's lowest utilization; lowest share of the ceiling")
    for title in ("size", *UNIFORM_VARIANTS, *(f"{name} / ceiling" for name in allocators)):
        table.add_column(title, justify="right")
    for base in dict.fromkeys(row["base_bytes"] for row in rows):
        of_base = [row for row in rows if row["base_bytes"] == base]
        cells = [f"{row['min']:.4f}" for row in of_allocator(of_base, "kvheap")]
        shares = [f"{lowest_share(of_allocator(of_base, name)):.4f}" for name in allocators]
        table.add_row(size_label(base), *cells, *shares)
    console.print(table)


def print_mixed(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title)
    for column in ("workload", "heap", "allocator"):
        table.add_column(column)
    for column in ("allocations", "samples", "min", "p50", "avg", "avg of the seeds"):
        table.add_column(column, justify="right")
    for row in rows:
        lowest, highest = min(row["avg_of_seeds"]), max(row["avg_of_seeds"])
        table.add_row(
            row["workload"],
            size_label(row["heap_bytes"]),
            row["allocator"],
            f"{sum(row['allocations']):,}",
            f"{sum(row['samples']):,}",
            *(f"{row[figure]:.4f}" for figure in ("min", "p50", "avg")),
            f"{lowest:.4f}..{highest:.4f}",
        )
    console.print(table)


def turnovers_of(row: Row) -> float:
    """How many heaps' bytes the pairs asked for while they were measured."""
    pair_bytes = KV_BYTES + INDEXER_BYTES
    return float(sum(row["allocations"]) / 2 * pair_bytes / row["heap_bytes"])


def print_aged(console: Console, rows: list[Row]) -> None:
    turnovers = turnovers_of(rows[0])
    heap = size_label(rows[0]["heap_bytes"])
    table = Table(title=f"pairs in {heap}, mean of each tenth of {turnovers:.0f} turnovers")
    table.add_column("allocator")
    for part in range(1, AGED_PARTS + 1):
        table.add_column(f"{turnovers * part / AGED_PARTS:.1f}", justify="right")
    for row in rows:
        table.add_row(row["allocator"], *(f"{mean:.4f}" for mean in row["avg_of_parts"]))
    console.print(table)


def verdicts(uniform: list[Row], mixed: list[Row]) -> list[Row]:
    """Each target beside what was measured of kvheap, and whether it is reached."""
    found: list[Row] = []

    def add(target: str, at_least: float, measured: float) -> None:
        reached = measured >= at_least
        found.append(
            {"target": target, "at_least": at_least, "measured": measured, "reached": reached}
        )

    add("uniform, lowest share of the ceiling", 1.0, lowest_share(of_allocator(uniform, "kvheap")))
    for row in of_allocator(mixed, "kvheap"):
        target = f"{row['workload']} in {size_label(row['heap_bytes'])}, mean"
        add(target, TARGETS[row["workload"]], row["avg"])
    return found


def print_verdicts(console: Console, found: list[Row], uniform: list[Row]) -> None:
    lowest = min(row["ceiling"] for row in uniform)
    wasted = max(1 - row["size_bytes"] / row["aligned_bytes"] for row in uniform)
    console.print(f"uniform: ceiling {lowest:.4f} or more, of which alignment costs {wasted:.2%}")
    for row in found:
        word = "reached" if row["reached"] else "NOT reached"
        console.print(f"{row['target']} >= {row['at_least']}: {row['measured']:.4f} - {word}")


def tables_of(measured: Mapping[str, list[Row]]) -> dict[str, Any]:
    """What is written; kvheap and its peer stand among the placement rules as well."""
    uniform, mixed = measured["uniform"], measured["mixed"]
    return {
        "targets": verdicts(uniform, mixed),
        "published": {"uniform": PUBLISHED_UNIFORM} | PUBLISHED,
        "uniform": uniform,
        "random_and_pairs": [row for row in mixed if row["allocator"] in COLORS],
        "placement_rules": [
            row for row in mixed if row["heap_bytes"] != PAIRS_PUBLISHED_HEAP_BYTES
        ],
        "aged": measured["aged"],
    }


def print_tables(console: Console, tables: Mapping[str, Any]) -> None:
    print_uniform(console, tables["uniform"])
    print_mixed(console, "random sizes and pairs", tables["random_and_pairs"])
    rules = "placement rules (kvheap: best fit, LMCache: first fit)"
    print_mixed(console, rules, tables["placement_rules"])
    print_aged(console, tables["aged"])
    published = ", ".join(f"{name} {figures['avg']:.3f}" for name, figures in PUBLISHED.items())
    low, high = PUBLISHED_UNIFORM
    console.print(f"{MOONCAKE}: uniform {low} to {high}, {published} (means)")
    print_verdicts(console, tables["targets"], of_allocator(tables["uniform"], "kvheap"))


def draw(
    plt: ModuleType, measured: Mapping[str, list[Row]], machine: dict[str, Any], path: Path
) -> None:
    """Uniform sizes and aged pairs above; random sizes and pairs, with the rules, below."""
    layout = [["uniform", "aged"], ["random", "pairs"]]
    figure, panels = plt.subplot_mosaic(layout, figsize=(13, 10), height_ratios=(1, 1.3))
    mixed = measured["mixed"]
    draw_uniform(panels["uniform"], measured["uniform"])
    draw_aged(panels["aged"], measured["aged"])
    for workload in ("random", "pairs"):
        of_workload = [row for row in mixed if row["workload"] == workload]
        draw_mixed(panels[workload], lines_of(of_workload, workload), workload)
    panels["pairs"].set_xscale("logit")
    ticks = (0.7, 0.9, 0.99, 0.999, 0.9999)
    panels["pairs"].set_xticks(ticks, [f"{tick}" for tick in ticks])
    panels["pairs"].minorticks_off()
    title = f"Utilization of full heaps, {machine['device']}, {machine['date'][:10]}"
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(w_pad=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_uniform(panel: Any, rows: list[Row]) -> None:
    label = "{}: {} to {}".format(MOONCAKE, *PUBLISHED_UNIFORM)
    panel.axhspan(*PUBLISHED_UNIFORM, color="grey", alpha=0.12, label=label)
    styles = {PEER: ("o", 9, "none"), "kvheap": ("o", 4, "full")}
    for name, (marker, size, fill) in styles.items():
        own = of_allocator(rows, name)
        sizes, lowest = [row["size_bytes"] for row in own], [row["min"] for row in own]
        if own:
            line = panel.plot(sizes, lowest, marker, label=name, color=COLORS[name])[0]
            line.set(markersize=size, fillstyle=fill)
    bases = list(dict.fromkeys(row["base_bytes"] for row in rows))
    panel.set_xscale("log", base=2)
    panel.set_xticks(bases, [size_label(base) for base in bases], rotation=30, ha="right")
    panel.minorticks_off()
    panel.set_ylim(0.86, 1.01)
    panel.grid(alpha=0.3)
    panel.set_ylabel("requested bytes / heap bytes")
    panel.set_title(
        "uniform sizes, each also -17 B, +17 B, x0.9, x1.1\n"
        "(missing: less than one block, and up to 0.1 % for alignment)",
        fontsize=11,
    )
    panel.legend(loc="lower left")


def draw_aged(panel: Any, rows: list[Row]) -> None:
    """The mean of each tenth, in its middle."""
    ends = turnovers_of(rows[0]) * np.arange(1, AGED_PARTS + 1) / AGED_PARTS
    middles = ends - ends[0] / 2
    for row in rows:
        name = row["allocator"]
        color, label = COLORS.get(name, "tab:green"), RULES.get(name, name)
        panel.plot(middles, row["avg_of_parts"], marker="o", color=color, label=label)
    panel.axhline(TARGETS["pairs"], color="black", linewidth=1, linestyle="--")
    panel.grid(alpha=0.3)
    panel.set_xlabel("heap's bytes requested, in heaps, after two")
    panel.set_ylabel("requested bytes / heap bytes")
    heap = size_label(rows[0]["heap_bytes"])
    panel.set_title(f"aged: pairs in {heap}, mean of each tenth\n(dashed: the target)", fontsize=11)
    panel.legend(loc="best")


def lines_of(rows: list[Row], workload: str) -> list[Row]:
    """The rows with their names in the figure; the published one follows the first peers."""
    published = PUBLISHED[workload] | {"allocator": MOONCAKE}
    peers = [row for row in rows if row["allocator"] in COLORS]
    after = sum(row["heap_bytes"] == rows[0]["heap_bytes"] for row in peers)
    lines = [*rows[:after], published, *rows[after:]]
    names = [RULES.get(row["allocator"], row["allocator"]) for row in lines]
    if len({row["heap_bytes"] for row in lines}) > 1:
        heaps = [size_label(row["heap_bytes"]) for row in lines]
        names = [f"{name}, {heap}" for name, heap in zip(names, heaps, strict=True)]
    return [row | {"text": name} for row, name in zip(lines, names, strict=True)]


def draw_mixed(panel: Any, lines: list[Row], workload: str) -> None:
    """Each allocator's mean, with a line from the lowest sample and a tick at the median."""
    for height, row in enumerate(lines):
        color = COLORS.get(row["allocator"], "tab:green")
        panel.plot([row.get("min", row["avg"]), row["avg"]], [height, height], color=color)
        panel.plot(row["avg"], height, "o", color=color)
        if "p50" in row:
            panel.plot(row["p50"], height, "|", color=color, markersize=14)
        where = {"xy": (1.02, height), "xycoords": ("axes fraction", "data"), "va": "center"}
        panel.annotate(f"{row['avg']:.4f}", **where)
    panel.set_yticks(range(len(lines)), [row["text"] for row in lines])
    panel.invert_yaxis()
    panel.axvline(TARGETS[workload], color="black", linewidth=1, linestyle="--")
    panel.grid(alpha=0.3, axis="x")
    panel.set_xlabel(f"lowest to mean (o), median (|); dashed: target {TARGETS[workload]}")
    panel.set_title(f"{workload} (mean at the right)", fontsize=11)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0])
    console, scale, peer = make_console(), Scale.of(arguments.quick), Peer.find()
    logging.disable(logging.WARNING)  # LMCache logs a line for every allocation that fails
    machine = describe_machine(torch.device("cpu"))
    machine["versions"]["lmcache"] = peer.version if peer else None
    console.print(f"{machine['device']}, {machine['versions']}")
    if peer is None:
        console.print("lmcache is not installed: kvheap's figures stand alone")
    allocators: dict[str, MakeHeap] = {"kvheap": AddressManager}
    if peer is not None:
        allocators[PEER] = peer.address_manager
    plans = {"uniform": plan_uniform, "mixed": plan_mixed, "aged": plan_aged}
    jobs = {name: list(plan(scale, allocators)) for name, plan in plans.items()}
    measured = measure_all(console, jobs)
    configuration = {
        "quick": arguments.quick,
        "seeds": scale.seeds,
        "utilization": "requested bytes over heap bytes",
        "samples": "uniform, random: after each allocation; pairs: before each eviction",
        "allocations": "those measured, after the warm-up, with each seed",
        "rules": RULES,
    }
    tables = tables_of(measured)
    print_tables(console, tables)
    path = write_json(arguments.out, "utilization", machine, configuration, tables)
    console.print(f"wrote {path}")
    plt = pyplot(console)
    if plt is not None:
        draw(plt, measured, machine, path.with_suffix(".png"))
        console.print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
