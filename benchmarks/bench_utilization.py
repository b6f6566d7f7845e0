"""How full a heap gets before an allocation fails: requested bytes over heap bytes.

The workloads are those of Mooncake's allocator benchmark, on addresses alone (see
``_utilization_workloads.py``):

=========  =========================================================================================
workload   what happens
=========  =========================================================================================
uniform    One size: 32 B * 4**k below 64 MiB, and each of these -17 B, +17 B, x0.9 and x1.1. The
           heap (2 GiB, or 128 MiB for sizes below 1 KiB) is filled; then more blocks are
           allocated. If one does not fit, a random block is evicted. Sampled after every
           allocation.
random     Sizes anywhere in 1 KiB..64 MiB in a heap of 2 GiB, otherwise the same. Warm-up: requests
           of the heap's bytes.
pairs      KV blocks of 3,274,752 B and indexer blocks of 643 KiB. A round is 1..128 KV blocks, then
           as many indexer blocks. If one does not fit, a random 5 % of all blocks are evicted.
           Sampled just before each eviction. Warm-up: requests of twice the heap's bytes, after
           which nothing is left of the first, orderly filling. Heaps of 1 TiB, as published, and of
           64 GiB, which is harder because there are fewer free extents to choose from.
aged       Pairs in 64 GiB for a long time, one seed: the mean of each tenth. Rules that are good in
           a young heap may be bad in an old one.
=========  =========================================================================================

Every allocator gets the same requests, and evicts at random from the same seed. After each run, the
live blocks are checked for overlaps. Beside kvheap and LMCache's ``AddressManager`` (see
``_lmcache.py``), a plain allocator runs ``random`` and ``pairs`` in 64 GiB with other placement
rules. First fit is among them only if LMCache, which places blocks the same way, is missing:

============  ======================================================================================
rule          the free extent that it takes
============  ======================================================================================
best fit      the smallest that holds the request, at the lowest address (kvheap)
first fit     the one at the lowest address (LMCache)
worst fit     the largest
two-ended     as best fit; but small sizes get the high end of the one at the highest address
split from X  as best fit; but it prefers extents of which nothing, or at least X, would be left
============  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _lmcache import PEER, lmcache_address_manager, machine_with_lmcache
from _placement import (
    FreeExtents,
    MakeHeap,
    Rule,
    first_fit,
    split_from,
    two_ended,
    worst_fit,
)
from _report import Row, make_console, parse_common, size_label, write_results
from _utilization_plot import (
    COLORS,
    MOONCAKE,
    PUBLISHED,
    PUBLISHED_UNIFORM,
    RULES,
    TARGETS,
    draw,
    of_allocator,
    turnovers_of,
)
from _utilization_workloads import (
    AGED_PARTS,
    INDEXER_BYTES,
    KV_BYTES,
    MIB,
    PAIRS_PUBLISHED_HEAP_BYTES,
    PAIRS_SMALL_HEAP_BYTES,
    Workload,
    aged_workload,
    pairs_workload,
    random_workload,
    uniform_workload,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvheap import AddressManager

UNIFORM_BASES = tuple(32 * 4**k for k in range(11))
UNIFORM_VARIANTS: dict[str, Callable[[int], int]] = {
    "exact": lambda base: base,
    "-17 B": lambda base: base - 17,
    "+17 B": lambda base: base + 17,
    "x0.9": lambda base: int(base * 0.9),
    "x1.1": lambda base: int(base * 1.1),
}

SPLIT_BYTES = {"random": (1 * MIB, 8 * MIB), "pairs": (INDEXER_BYTES, KV_BYTES)}
"""X of ``split from X``; for ``random``, whose smallest size is one unit of the alignment, small
parts of the mean size."""

SMALL_BELOW_BYTES = {"random": 32 * MIB, "pairs": KV_BYTES}
"""``two-ended`` takes sizes below this for small."""

AGED_RULES = ("first fit", "two-ended")


# -- placement rules -------------------------------------------------------------------------------


def placement_rules(workload: str) -> dict[str, MakeHeap]:
    """The rules other than best fit, with thresholds for ``random`` or for ``pairs``."""
    rules: dict[str, Rule] = {
        "first fit": first_fit,
        "worst fit": worst_fit,
        "two-ended": partial(two_ended, small_below=SMALL_BELOW_BYTES[workload]),
    }
    for threshold in SPLIT_BYTES[workload]:
        rules[f"split from {size_label(threshold)}"] = partial(split_from, threshold=threshold)
    return {name: partial(FreeExtents, rule=rule) for name, rule in rules.items()}


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    seeds: int
    uniform_bases: tuple[int, ...]
    uniform_allocations: int
    random_allocations: int
    pairs_rounds: dict[int, int]
    """Rounds by the heap's bytes."""
    aged_rounds: int

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """The scale for a run of a few minutes; quick: of a few seconds."""
        if quick:
            return cls(1, UNIFORM_BASES[3::3], 1_000, 20_000, {PAIRS_SMALL_HEAP_BYTES: 400}, 800)
        rounds = {PAIRS_PUBLISHED_HEAP_BYTES: 3_000, PAIRS_SMALL_HEAP_BYTES: 1_500}
        return cls(3, UNIFORM_BASES, 5_000, 100_000, rounds, 12_000)


@dataclass(frozen=True, slots=True)
class Job:
    """An allocator under a workload with some seeds; it will make one row."""

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
    """Random sizes and pairs; with the other rules too, except in the largest heap."""
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
    """The rules that none of the allocators uses."""
    rules = placement_rules(workload)
    if PEER in allocators:
        del rules["first fit"]
    return rules


def capacity_of(workload: Workload, size: int) -> Row:
    """The utilization that alignment and the heap's size allow for blocks of one size."""
    aligned_bytes = -(-size // workload.align_bytes) * workload.align_bytes
    blocks = workload.heap_bytes // aligned_bytes
    return {
        "size_bytes": size,
        "aligned_bytes": aligned_bytes,
        "blocks": blocks,
        "ceiling": round(blocks * size / workload.heap_bytes, 6),
    }


def measure(job: Job) -> Row:
    """Run every seed; minimum, median and mean of all samples, and of each seed."""
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
    """Run all jobs; a row for each, by the name of its plan."""
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
    """Each target, with kvheap's figure and whether it reaches the target."""
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
    console.print(
        f"uniform: ceilings of {lowest:.4f} and more; alignment costs up to {wasted:.2%} of them"
    )
    for row in found:
        word = "reached" if row["reached"] else "NOT reached"
        console.print(f"{row['target']} >= {row['at_least']}: {row['measured']:.4f} - {word}")


def tables_of(measured: Mapping[str, list[Row]]) -> dict[str, Any]:
    """The tables to write. kvheap and its peer are among the placement rules, too."""
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


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console, scale, peer = make_console(), Scale.of(arguments.quick), lmcache_address_manager()
    machine = machine_with_lmcache(console, torch.device("cpu"), peer is not None)
    allocators: dict[str, MakeHeap] = {"kvheap": AddressManager}
    if peer is not None:
        allocators[PEER] = peer
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
    write_results(console, arguments.out, "utilization", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
