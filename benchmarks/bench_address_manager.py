"""AddressManager and TensorMemoryAllocator: host time of allocating and freeing.

All cases but ``filled`` handle addresses only: no byte of a block is read or written.

The peer is LMCache, with its classes of the same names, in the same rounds (see ``_lmcache.py``).
The cases:

============  ====================================================================================
case          what is timed
============  ====================================================================================
pair          allocate two pages and free them again, beside F - 1 free extents of one page each,
              all at lower addresses than the only extent that fits
batch         ``TensorMemoryAllocator``: allocate N blocks of 64 KiB from a fresh heap in one call,
              then free all of them in one call; a first pair of such calls is not timed
filled        the same allocation with ``source=``, which writes every byte; LMCache allocates, then
              copies block by block. ``share_of_copy``: the time of one ``copy_`` of as many bytes
              over kvheap's
holes         ``AddressManager``: allocate a batch that takes 65,536 free extents of one block each;
              then free the blocks in random order, in one call: as an array of addresses, and as a
              list of pairs. LMCache's AddressManager has no such call and frees them one by one
objects       get a ``MemoryObj`` from a batch by its index; LMCache makes all of them in
              ``batched_allocate``
memory        bytes of Python and NumPy memory per block of a live batch (tracemalloc)
runs          number of runs of a batch of N pages in a heap fragmented by random traffic
============  ====================================================================================

Times are microseconds of the host; ratios are medians over rounds, peer over kvheap.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from _lmcache import (
    PEER,
    compared,
    lmcache_address_manager,
    lmcache_allocator,
    machine_with_lmcache,
)
from _report import Row, make_console, parse_common, write_results
from _timing import Measure, on_the_host, time_in_rounds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvheap import AddressManager, TensorMemoryAllocator

PAGE = 4096
BLOCK_BYTES = 64 << 10
SPARE_PAGES = 64
"""Pages of the only extent that holds two."""

PAIR_TARGETS = {1: 1.5, 1_000: 5.0, 10_000: 25.0, 50_000: 150.0}
FLATNESS_TARGET = 3.0
BATCH_TARGET_US = 40.0
HOLES_TARGET = 10.0
SHUFFLED_FREE_TARGET = 50.0
OBJECT_TARGET_US = 1.0
MEMORY_TARGET_BYTES = 48.0

Pairs = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Peer:
    """The two classes of LMCache."""

    address_manager: Any
    tensor_allocator: Any

    @classmethod
    def find(cls) -> Peer | None:
        """None if LMCache cannot be imported."""
        manager = lmcache_address_manager()
        allocator = lmcache_allocator("tensor_memory_allocator", "TensorMemoryAllocator")
        return None if manager is None or allocator is None else cls(manager, allocator)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    extents: tuple[int, ...]
    peer_extents: int
    blocks: tuple[int, ...]
    holes: int
    rounds: int

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """The scale for a run of half a minute; quick: of a few seconds."""
        if quick:
            return cls((1, 1_000, 10_000), 10_000, (64, 1_024, 4_096), 8_192, 5)
        extents = (1, 1_000, 10_000, 50_000, 1_000_000)
        return cls(extents, 50_000, (64, 1_024, 4_096, 16_384), 65_536, 15)


def full_heap(kind: Any, num_pages: int) -> Any:
    """A heap with every page allocated."""
    heap = kind(num_pages * PAGE)
    heap.allocate(num_pages * PAGE)
    return heap


def free_all(heap: Any, extents: Pairs) -> None:
    """Free all in one call; LMCache has no such call, and frees them one by one."""
    if isinstance(heap, AddressManager):
        heap.batched_free(extents)
    else:
        for address, size in extents:
            heap.free(address, size)


# -- pair ------------------------------------------------------------------------------------------


def heap_with_small_holes(kind: Any, num_extents: int) -> Any:
    """A heap of ``num_extents`` free extents; only the last holds two pages."""
    heap = full_heap(kind, 2 * num_extents + SPARE_PAGES)
    free_all(heap, [(2 * i * PAGE, PAGE) for i in range(num_extents - 1)])
    heap.free(2 * num_extents * PAGE, SPARE_PAGES * PAGE)
    return heap


def time_pairs(heap: Any, num_pairs: int) -> Measure:
    allocate, free = heap.allocate, heap.free

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(num_pairs):
            address, size = allocate(2 * PAGE)
            free(address, size)
        return (time.perf_counter() - start) * 1e6 / num_pairs

    return measure


def measure_pairs(scale: Scale, peer: Peer | None, num_extents: int) -> Row:
    measures = {"kvheap": time_pairs(heap_with_small_holes(AddressManager, num_extents), 2000)}
    if peer is not None and num_extents <= scale.peer_extents:
        heap = heap_with_small_holes(peer.address_manager, num_extents)
        measures[PEER] = time_pairs(heap, max(10, 10_000 // num_extents))
    return {"extents": num_extents} | compared(time_in_rounds(measures, scale.rounds))


# -- batch -----------------------------------------------------------------------------------------


class BatchTimer:
    """Allocates a batch from a fresh heap and frees it; a measure for each of the two times."""

    def __init__(self, kind: Any, num_blocks: int) -> None:
        self.kind = kind
        self.num_blocks = num_blocks
        self.buffer = torch.empty(num_blocks * BLOCK_BYTES, dtype=torch.uint8)
        self.shape = torch.Size([BLOCK_BYTES])
        self.free_us = 0.0

    def allocate(self) -> float:
        """Time of the allocation. Both calls are made twice, and the second time counts."""
        for _ in range(2):
            heap = self.kind(self.buffer)
            start = time.perf_counter()
            batch = heap.batched_allocate(self.shape, torch.uint8, self.num_blocks)
            allocated = time.perf_counter()
            heap.batched_free(batch)
            self.free_us = (time.perf_counter() - allocated) * 1e6
        return (allocated - start) * 1e6

    def free(self) -> float:
        """Time of the free in the last :meth:`allocate`, which each round calls first."""
        return self.free_us


def measure_batches(scale: Scale, peer: Peer | None, num_blocks: int) -> list[Row]:
    timers = {"kvheap": BatchTimer(TensorMemoryAllocator, num_blocks)}
    if peer is not None:
        timers[PEER] = BatchTimer(peer.tensor_allocator, num_blocks)
    measures: dict[str, Measure] = {}
    for name, timer in timers.items():
        measures[name] = timer.allocate
        measures[f"{name} free"] = timer.free
    samples = time_in_rounds(measures, scale.rounds)
    rows = []
    for operation, suffix in (("batched_allocate", ""), ("batched_free", " free")):
        own = {name: samples[name + suffix] for name in timers}
        rows.append({"operation": operation, "blocks": num_blocks} | compared(own))
    return rows


# -- filled ----------------------------------------------------------------------------------------


def time_filled(kind: Any, source: torch.Tensor, fill_one_by_one: bool) -> Measure:
    """Allocates blocks and fills them from the rows of ``source``; the free is not timed."""
    num_blocks, shape = len(source), torch.Size(source.shape[1:])
    heap = kind(torch.empty(source.nbytes, dtype=torch.uint8))

    def measure() -> float:
        start = time.perf_counter()
        if fill_one_by_one:
            batch = heap.batched_allocate(shape, torch.uint8, num_blocks)
            for obj, row in zip(batch, source, strict=True):
                obj.tensor.copy_(row)
        else:
            batch = heap.batched_allocate(shape, torch.uint8, num_blocks, source=source)
        taken_us = (time.perf_counter() - start) * 1e6
        heap.batched_free(batch)
        return taken_us

    return measure


def measure_filled(scale: Scale, peer: Peer | None, num_blocks: int) -> Row:
    source = torch.ones((num_blocks, BLOCK_BYTES), dtype=torch.uint8)
    target = torch.empty_like(source)
    measures = {"kvheap": time_filled(TensorMemoryAllocator, source, False)}
    if peer is not None:
        measures[PEER] = time_filled(peer.tensor_allocator, source, True)
    measures["copy_"] = on_the_host([lambda: target.copy_(source)])
    samples = time_in_rounds(measures, max(5, scale.rounds // 2))
    copy = samples.pop("copy_")
    share = round(1 / copy.speed_against(samples["kvheap"]), 2)
    return {"blocks": num_blocks, "share_of_copy": share} | compared(samples)


# -- holes -----------------------------------------------------------------------------------------


class HolesTimer:
    """Fills all one-block holes of a heap with one batch, then frees the blocks shuffled."""

    def __init__(self, kind: Any, num_holes: int, as_pairs: bool, seed: int) -> None:
        self.heap = full_heap(kind, 2 * num_holes)
        free_all(self.heap, [(2 * i * PAGE, PAGE) for i in range(num_holes)])
        self.num_holes = num_holes
        self.as_pairs = as_pairs
        self.generator = np.random.default_rng(seed)
        self.free_us = 0.0

    def allocate(self) -> float:
        """Time of the allocation; then frees the blocks and stores the time of that."""
        start = time.perf_counter()
        batch = self.heap.batched_allocate(PAGE, self.num_holes)
        taken_us = (time.perf_counter() - start) * 1e6
        addresses = self.generator.permutation(np.array([address for address, _ in batch]))
        del batch
        self.free_us = self._free(addresses)
        return taken_us

    def _free(self, addresses: np.ndarray) -> float:
        if not self.as_pairs:
            start = time.perf_counter()
            self.heap.batched_free(addresses, PAGE)
            return (time.perf_counter() - start) * 1e6
        pairs = [(address, PAGE) for address in addresses.tolist()]
        start = time.perf_counter()
        free_all(self.heap, pairs)
        return (time.perf_counter() - start) * 1e6

    def free(self) -> float:
        """Time of the free in the last :meth:`allocate`, which each round calls first."""
        return self.free_us


def measure_holes(scale: Scale, peer: Peer | None) -> list[Row]:
    timers = {
        "kvheap": HolesTimer(AddressManager, scale.holes, False, 1),
        "kvheap, pairs": HolesTimer(AddressManager, scale.holes, True, 1),
    }
    if peer is not None:
        timers[PEER] = HolesTimer(peer.address_manager, scale.holes, True, 1)
    measures: dict[str, Measure] = {}
    for name, timer in timers.items():
        measures[name] = timer.allocate
        measures[f"{name} free"] = timer.free
    samples = time_in_rounds(measures, max(3, scale.rounds // 2))
    names = ("kvheap", PEER) if peer else ("kvheap",)
    rows = [{"operation": "batched_allocate"} | compared({n: samples[n] for n in names})]
    for own in ("kvheap", "kvheap, pairs"):
        of_free = {"kvheap": samples[f"{own} free"]}
        if peer is not None:
            of_free[PEER] = samples[f"{PEER} free"]
        title = "free, as pairs" if own.endswith("pairs") else "free, as an array"
        rows.append({"operation": title} | compared(of_free))
    return [{"blocks": scale.holes} | row for row in rows]


# -- objects and memory ----------------------------------------------------------------------------


def allocate_batch(kind: Any, num_blocks: int) -> tuple[Any, Any]:
    """A heap that one batch fills, and the batch."""
    heap = kind(torch.empty(num_blocks * BLOCK_BYTES, dtype=torch.uint8))
    return heap, heap.batched_allocate(torch.Size([BLOCK_BYTES]), torch.uint8, num_blocks)


def measure_objects(scale: Scale, peer: Peer | None) -> Row:
    num_blocks = scale.blocks[-1]
    _, batch = allocate_batch(TensorMemoryAllocator, num_blocks)

    def by_index() -> float:
        start = time.perf_counter()
        for row in range(num_blocks):
            batch[row]
        return (time.perf_counter() - start) * 1e6 / num_blocks

    measures: dict[str, Measure] = {"kvheap": by_index}
    if peer is not None:
        timer = BatchTimer(peer.tensor_allocator, 1024)
        measures[PEER] = lambda: timer.allocate() / 1024
    return {"blocks": num_blocks} | compared(time_in_rounds(measures, scale.rounds))


def bytes_per_block(make: Callable[[], object], num_blocks: int) -> float:
    """Bytes of memory that the result of ``make`` keeps alive, per block."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = make()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return (after - before) / num_blocks


def measure_memory(scale: Scale, peer: Peer | None) -> list[Row]:
    num_blocks = scale.blocks[-1]

    def touched() -> object:
        heap, batch = allocate_batch(TensorMemoryAllocator, num_blocks)
        batch[0].pin()
        batch[0].ref_count_up()
        return heap, batch, batch.addresses

    def handles() -> object:
        heap, batch = allocate_batch(TensorMemoryAllocator, num_blocks)
        return heap, list(batch)

    cases: dict[str, Callable[[], object]] = {
        "kvheap: the batch": lambda: allocate_batch(TensorMemoryAllocator, num_blocks),
        "kvheap: its counts and addresses too": touched,
        "kvheap: and a MemoryObj held for each": handles,
    }
    if peer is not None:
        cases[f"{PEER}: its list of objects"] = lambda: allocate_batch(
            peer.tensor_allocator, num_blocks
        )
    rows = []
    for case, make in cases.items():
        size = round(bytes_per_block(make, num_blocks), 2)
        rows.append({"case": case, "blocks": num_blocks, "bytes_per_block": size})
    return rows


# -- runs ------------------------------------------------------------------------------------------


def fragmented_heap(kind: Any, seed: int) -> Any:
    """A heap of 65,536 pages, half of it free after random traffic of 1 to 64 pages."""
    source, heap, live, used = random.Random(seed), kind(65_536 * PAGE), [], 0
    while used < 60_000:
        extent = heap.allocate(source.randint(1, 64) * PAGE)
        live.append(extent)
        used += extent[1] // PAGE
    for _ in range(20_000):
        place = source.randrange(len(live))
        live[place], live[-1] = live[-1], live[place]
        heap.free(*live.pop())
        try:
            live.append(heap.allocate(source.randint(1, 64) * PAGE))
        except RuntimeError:  # full for this size: the next step frees another
            continue
    source.shuffle(live)
    while heap.get_free_size() < 32_768 * PAGE:
        heap.free(*live.pop())
    return heap


def count_runs(blocks: Pairs) -> int:
    starts = sorted(address for address, _ in blocks)
    return 1 + sum(after - before != PAGE for before, after in pairwise(starts))


def measure_runs(peer: Peer | None) -> list[Row]:
    kinds = {"kvheap": AddressManager} | ({PEER: peer.address_manager} if peer else {})
    heaps = {name: fragmented_heap(kind, 1) for name, kind in kinds.items()}
    rows = []
    for num_blocks in (16, 64, 256, 1_024, 4_096, 16_384):
        row: Row = {"blocks": num_blocks}
        for name, heap in heaps.items():
            batch = heap.batched_allocate(PAGE, num_blocks)
            row[name] = count_runs(list(batch))
            free_all(heap, list(batch))
        rows.append(row)
    return rows


# -- report ----------------------------------------------------------------------------------------


def print_times(console: Console, title: str, rows: list[Row]) -> None:
    labels = [key for key in rows[0] if key not in ("kvheap", PEER, "times_as_fast")]
    table = Table(title=title)
    for name in (*labels, "kvheap", PEER, "ratio"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for row in rows:
        cells = [f"{row[k]:,}" if isinstance(row[k], int) else str(row[k]) for k in labels]
        cells.append(f"{row['kvheap']['p50_us']:,.2f}")
        cells.append(f"{row[PEER]['p50_us']:,.2f}" if PEER in row else "")
        cells.append(f"{row['times_as_fast']:,.1f}x" if PEER in row else "")
        table.add_row(*cells)
    console.print(table)


def print_plain(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "case" else "right")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    console.print(table)


def verdicts(tables: dict[str, Any]) -> list[Row]:
    """Every target, with the measured figure and whether it reaches the target."""
    found: list[Row] = []

    def add(target: str, measured: float, bound: float, at_least: bool) -> None:
        reached = measured >= bound if at_least else measured <= bound
        found.append({"target": target, "measured": round(measured, 2), "reached": reached})

    pairs = {row["extents"]: row for row in tables["pair"]}
    for extents, ratio in PAIR_TARGETS.items():
        if "times_as_fast" in pairs.get(extents, {}):
            measured = pairs[extents]["times_as_fast"]
            add(f"pair, F = {extents:,}: >= {ratio:g}x", measured, ratio, True)
    widest = max(pairs)
    growth = pairs[widest]["kvheap"]["p50_us"] / pairs[1]["kvheap"]["p50_us"]
    title = f"pair, F = {widest:,} over F = 1: <= {FLATNESS_TARGET:g}x"
    add(title, growth, FLATNESS_TARGET, False)
    for operation in ("batched_allocate", "batched_free"):
        rows = [row for row in tables["batch"] if row["operation"] == operation]
        slowest = max(row["kvheap"]["p50_us"] for row in rows)
        add(f"{operation}, any N: <= {BATCH_TARGET_US:g} us", slowest, BATCH_TARGET_US, False)
    for row in tables["holes"]:
        if "times_as_fast" in row and row["operation"] != "free, as pairs":
            bound = HOLES_TARGET if row["operation"] == "batched_allocate" else SHUFFLED_FREE_TARGET
            title = f"{row['blocks']:,} holes, {row['operation']}: >= {bound:g}x"
            add(title, row["times_as_fast"], bound, True)
    per_object = tables["objects"][0]["kvheap"]["p50_us"]
    add(f"a MemoryObj: <= {OBJECT_TARGET_US:g} us", per_object, OBJECT_TARGET_US, False)
    memory = tables["memory"][1]["bytes_per_block"]
    title = f"memory of a batch: <= {MEMORY_TARGET_BYTES:g} B a block"
    add(title, memory, MEMORY_TARGET_BYTES, False)
    return found


def print_verdicts(console: Console, found: list[Row]) -> None:
    for row in found:
        word = "reached" if row["reached"] else "NOT reached"
        console.print(f"{row['target']}: {row['measured']:,} - {word}")


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw time over free extents, and time over blocks of a batch; all axes logarithmic."""
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    colors = {"kvheap": "tab:blue", PEER: "tab:orange"}
    for name, color in colors.items():
        points = [(row["extents"], row[name]["p50_us"]) for row in found["pair"] if name in row]
        if points:
            left.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
        for operation, style in (("batched_allocate", "-"), ("batched_free", "--")):
            rows = [row for row in found["batch"] if row["operation"] == operation]
            points = [(row["blocks"], row[name]["p50_us"]) for row in rows if name in row]
            if points:
                label = f"{name}: {operation}"
                right.plot(*zip(*points, strict=True), style, marker="o", color=color, label=label)
    left.set_title("allocate + free, beside F free extents that are too small")
    left.set_xlabel("free extents F")
    right.set_title("one batch of blocks of 64 KiB, from a fresh heap")
    right.set_xlabel("blocks in the batch")
    for panel in (left, right):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        panel.set_ylabel("microseconds of the host")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"Address management, {found['device']}, {found['date'][:10]}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console, scale, peer = make_console(), Scale.of(arguments.quick), Peer.find()
    machine = machine_with_lmcache(console, torch.device("cpu"), peer is not None)
    cases: list[tuple[str, Callable[[], list[Row]]]] = [
        *(("pair", lambda n=n: [measure_pairs(scale, peer, n)]) for n in scale.extents),
        *(("batch", lambda n=n: measure_batches(scale, peer, n)) for n in scale.blocks),
        *(("filled", lambda n=n: [measure_filled(scale, peer, n)]) for n in scale.blocks[:3]),
        ("holes", lambda: measure_holes(scale, peer)),
        ("objects", lambda: [measure_objects(scale, peer)]),
        ("memory", lambda: measure_memory(scale, peer)),
        ("runs", lambda: measure_runs(peer)),
    ]
    tables: dict[str, Any] = {}
    for name, measure in track(cases, "measuring", console=console, transient=True):
        tables.setdefault(name, []).extend(measure())
        gc.collect()
    print_times(console, "allocate + free beside F free extents, us", tables["pair"])
    print_times(console, "N blocks of 64 KiB, fresh heap, addresses only, us", tables["batch"])
    print_times(console, "N blocks of 64 KiB, allocated and filled, us", tables["filled"])
    print_times(console, "one-block holes, us of the whole batch", tables["holes"])
    print_times(console, "one MemoryObj of a batch, us", tables["objects"])
    print_plain(console, "memory of a live batch", tables["memory"])
    print_plain(console, "runs of a batch of pages in a fragmented heap", tables["runs"])
    tables["targets"] = verdicts(tables)
    print_verdicts(console, tables["targets"])
    configuration = {
        "quick": arguments.quick,
        "rounds": scale.rounds,
        "page_bytes": PAGE,
        "block_bytes": BLOCK_BYTES,
        "times_as_fast": "median over rounds of the peer's time over kvheap's",
    }
    write_results(console, arguments.out, "address_manager", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
