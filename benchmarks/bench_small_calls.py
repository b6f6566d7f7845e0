"""What one call costs with few blocks, beside the loop that a user would write instead.

Engines call a heap with 1 to 64 blocks, where the fixed cost of a call decides. Every method moves
the same bytes in the same round, on a CPU:

===============  =================================================================================
table            what runs
===============  =================================================================================
pages            ``kvheap.store`` and ``kvheap.load`` of whole pages, N pages of 1 to 64 KiB in each
                 of 1 or 32 layers, whose tensors are ``apart`` or in one ``shared`` storage, into
                 chunks of one page, which follow each other as the rows of the loop's tensor do;
                 against a loop over the layers of ``index_select(out=)`` or ``index_copy_``, and
                 one ``index_select(out=)`` over the shared storage
blocks           ``batched_allocate(source=)`` and ``batched_free(out=)``, less the same calls
                 without them; ``scatter_blocks`` and ``gather_blocks`` at scattered addresses;
                 against a loop of slice and ``copy_`` per block
transfers        ``copy`` of a plan within host memory, and of two batches
host             **host only, no GPU**: ``store`` and ``load`` up to the launch, which is replaced
                 by a function that does nothing; ``copy`` of 12,288 scattered pieces to the copy
                 engine, whose library does nothing, from arrays and from two batches; and of a
                 prepared plan to the kernel
objects          one object, and one page, allocated and freed, and eight of them in one list;
                 batches of 1 to 64 blocks; against LMCache's if it is installed. Counts, pins and
                 tensors of an object, rows of a batch, and a batch that a running stream uses
===============  =================================================================================

Every row of ``targets`` says what was asked, the worst figure, and whether it was reached. Ratios
are kvheap's time over the loop's, median over the rounds; less is better.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _host_only_device import HostOnlyDevice
from _lmcache import PEER, lmcache_allocator, machine_with_lmcache
from _report import Row, make_console, parse_common, size_label, write_results
from _timing import Call, Measure, Samples, on_the_host, time_in_rounds
from _transfer_host import PAUSE_S, SUBMITTED, host_parts
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, PagedTensorMemoryAllocator
from kvheap import TensorMemoryAllocator as Heap
from kvheap.engine import chunks
from kvheap.kernels import gather_blocks, scatter_blocks
from kvheap.transfer import CopyPlan, copy

PAGE_TOKENS = 16
MAX_SIDE_BYTES = 64 << 20
SAMPLE_US = 2_000
"""A sample is the mean of so many calls as take about this long, at most 100."""

FEW = 8
"""From this many blocks on, a call is to cost no more than the loop."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    counts: tuple[int, ...]
    page_bytes: tuple[int, ...]
    layers: tuple[int, ...]
    rounds: int

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """The scale for a run of some minutes; quick: of some seconds."""
        if quick:
            return cls((1, 16, 1024), (2 << 10,), (1, 32), 5)
        return cls((1, 2, 4, 8, 16, 64, 1024), (1 << 10, 2 << 10, 16 << 10, 64 << 10), (1, 32), 21)


def timed(calls: dict[str, Call], rounds: int) -> dict[str, Samples]:
    """Time calls in rounds, each sample the mean of several calls."""
    measures = {}
    for name, call in calls.items():
        call()
        once = min(on_the_host([call])() for _ in range(5))  # one of them may be disturbed
        repeats = max(1, min(100, round(SAMPLE_US / max(once, 1.0))))
        measures[name] = after_a_pause(on_the_host([call] * repeats))
    gc.collect()
    gc.disable()
    try:
        return time_in_rounds(measures, rounds)
    finally:
        gc.enable()


def after_a_pause(measure: Measure) -> Measure:
    """The same measure, after a pause in which torch's threads, which spin after a call, sleep."""

    def measure_later() -> float:
        time.sleep(PAUSE_S)
        return measure()

    return measure_later


def row_of(case: Row, samples: dict[str, Samples], peer: str) -> Row:
    """The times of a case, and kvheap's over those of its peer."""
    ratio = 1 / samples["kvheap"].speed_against(samples[peer])
    times = {name: each.percentiles() for name, each in samples.items()}
    return {**case, "us": round(samples["kvheap"].percentile(50), 2), "ratio": ratio} | times


# -- pages of an engine's cache --------------------------------------------------------------------


def measure_pages(scale: Scale, console: Console) -> list[Row]:
    """Stores and loads of whole pages."""
    rows = []
    cells = list(itertools.product(scale.layers, ("shared", "apart"), scale.page_bytes))
    for layers, where, page_bytes in track(cells, "pages", console=console, transient=True):
        for count in scale.counts:
            if layers * page_bytes * count <= MAX_SIDE_BYTES:
                rows += measure_page(layers, where, page_bytes, count, scale.rounds)
    return rows


def measure_page(layers: int, where: str, page_bytes: int, count: int, rounds: int) -> list[Row]:
    """One store and one load of ``count`` pages."""
    num_pages, width = max(2 * count, 64), page_bytes // PAGE_TOKENS // 2
    storage = torch.rand(layers, num_pages, PAGE_TOKENS, width).bfloat16()
    tensors = list(storage) if where == "shared" else [layer.clone() for layer in storage]
    cache = PagedKVCache.of("mla", tensors)
    chunk_bytes = layers * page_bytes
    memory = torch.ones(count * max(chunk_bytes, 4096) + 4096, dtype=torch.uint8)
    heap = Heap(memory, align_bytes=min(chunk_bytes, 4096))
    shape = (1, layers, PAGE_TOKENS, width)
    batch = heap.batched_allocate(shape, torch.bfloat16, count, MemoryFormat.KV_MLA_FMT)
    assert batch is not None
    ids = torch.randperm(num_pages)[:count]
    slots, out = BlockIds(ids), torch.ones(layers, count, PAGE_TOKENS, width).bfloat16()

    def select() -> None:
        for tensor, part in zip(tensors, out, strict=True):
            torch.index_select(tensor, 0, ids, out=part)

    def put() -> None:
        for tensor, part in zip(tensors, out, strict=True):
            tensor.index_copy_(0, ids, part)

    store: dict[str, Call] = {"kvheap": partial(kvheap.store, cache, slots, batch), "loop": select}
    load: dict[str, Call] = {"kvheap": partial(kvheap.load, batch, cache, slots), "loop": put}
    if where == "shared":
        store["one index_select"] = partial(torch.index_select, storage, 1, ids, out=out)
    store["kvheap"]()
    select()
    if not torch.equal(torch.stack([obj.tensor[0] for obj in batch], 1), out):
        raise RuntimeError(f"a store of {count} pages of {page_bytes} bytes went wrong")
    rows = []
    for name, calls in (("store", store), ("load", load)):
        case = {"call": name, "where": where, "layers": layers, "size": page_bytes, "n": count}
        rows.append(row_of(case, timed(calls, rounds), "loop"))
    return rows


# -- blocks of a dense tensor ----------------------------------------------------------------------


def measure_blocks(scale: Scale, console: Console) -> list[Row]:
    """Blocks that are allocated from a source, gathered into ``out``, scattered and gathered."""
    rows = []
    cells = list(itertools.product(scale.page_bytes, scale.counts))
    for size, count in track(cells, "blocks", console=console, transient=True):
        rows += measure_block(size, count, scale.rounds)
    return rows


def measure_block(size: int, count: int, rounds: int) -> list[Row]:
    """The four calls with ``count`` blocks of ``size`` bytes."""
    room = 4 * count * max(size, 4096)
    heap, buffer = (Heap(torch.ones(room, dtype=torch.uint8)) for _ in range(2))
    source, out = (torch.ones(count, size // 2, dtype=torch.float16) for _ in range(2))
    width = size // 2
    allocate = partial(heap.batched_allocate, [width], torch.float16, count)
    flat = buffer.buffer.view(torch.float16)
    places = np.random.default_rng(0).permutation(2 * count)[:count] * max(size, 4096)
    firsts = (places // 2).tolist()

    def plain() -> None:
        heap.batched_free(allocate())

    def filled() -> None:
        heap.batched_free(allocate(source=source))

    def gathered() -> None:
        heap.batched_free(allocate(), out=out)

    def write() -> None:
        for first, block in zip(firsts, source, strict=True):
            flat[first : first + width].copy_(block)

    def read() -> None:
        for first, block in zip(firsts, out, strict=True):
            block.copy_(flat[first : first + width])

    plans: dict[str, tuple[Call, Call]] = {
        "source=": (filled, write),
        "out=": (gathered, read),
        "scatter_blocks": (partial(scatter_blocks, source, buffer.buffer, places), write),
        "gather_blocks": (partial(gather_blocks, buffer.buffer, places, out), read),
    }
    rows = []
    for name, (call, loop) in plans.items():
        calls: dict[str, Call] = {"kvheap": call, "loop": loop}
        case: Row = {"call": name, "where": "heap", "layers": 1, "size": size, "n": count}
        if name.endswith("="):
            calls["plain"] = plain
            samples = timed(calls, rounds)
            both = zip(samples["kvheap"].microseconds, samples["plain"].microseconds, strict=True)
            samples["kvheap"] = Samples(tuple(whole - bare for whole, bare in both))
        else:
            samples = timed(calls, rounds)
        rows.append(row_of(case, samples, "loop"))
    return rows


# -- what the host does ----------------------------------------------------------------------------


class _NotLaunched:
    """Stands in for a kernel."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **constants: None


@contextmanager
def without_launches() -> Iterator[None]:
    """Copies on CPU tensors go the way of a GPU's up to the launch, which does nothing."""
    from triton.runtime.jit import JITFunction

    found = [module for name, module in sys.modules.items() if name.startswith("kvheap.kernels.")]
    patches = []
    for module in found:
        for name, value in list(vars(module).items()):
            origin = getattr(value, "__module__", None)
            if name == "runs_kernels":
                patches.append(patch.object(module, name, lambda device: True))
            elif name == "launch" and origin == "kvheap.kernels.direct_launch":
                patches.append(patch.object(module, name, lambda *arguments: None))
            elif isinstance(value, JITFunction):
                patches.append(patch.object(module, name, _NotLaunched()))
    # The short way of a CPU keeps nothing for a cache on a GPU: it ends at its first question.
    patches.append(patch.object(chunks, "keep_for_few", lambda *arguments: None))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def measure_host(scale: Scale) -> list[Row]:
    """Host time up to the driver."""
    rows = []
    layers, width = 32, 64
    tensors = [torch.zeros(256, PAGE_TOKENS, width).bfloat16() for _ in range(layers)]
    cache = PagedKVCache.of("mla", tensors)
    heap = Heap(torch.zeros(32 << 20, dtype=torch.uint8), debug=False)
    for count in (each for each in scale.counts if each <= 64):
        shape = (1, layers, PAGE_TOKENS, width)
        batch = heap.batched_allocate(shape, torch.bfloat16, count, MemoryFormat.KV_MLA_FMT)
        assert batch is not None
        slots = BlockIds(np.random.default_rng(0).permutation(256)[:count])
        calls: dict[str, Call] = {
            "store, no launch": partial(kvheap.store, cache, slots, batch),
            "load, no launch": partial(kvheap.load, batch, cache, slots),
        }
        with without_launches():
            kvheap.store(cache, slots, batch)  # a load asks for what was stored
            samples = timed(calls, scale.rounds)
        rows += [host_row(name, count, each) for name, each in samples.items()]
        heap.batched_free(batch)
    device = HostOnlyDevice()
    parts = host_parts(device, SUBMITTED)
    names = {"arrays to copy engine": "arrays", "batches to copy engine": "batches"}
    plan = device.plan_of([kvheap_pieces(SUBMITTED)])
    plan.prepare()
    calls = {short: parts[name] for name, short in names.items()}
    calls["prepared"] = partial(copy, plan, path="kernel")
    samples = timed(calls, scale.rounds)
    return rows + [host_row(name, SUBMITTED, each) for name, each in samples.items()]


def kvheap_pieces(count: int) -> Any:
    """Scattered pieces, of which nothing is read."""
    from kvheap.kernels.pieces import Pieces

    places = 4096 + np.random.default_rng(0).permutation(2 * count)[:count] * 256
    return Pieces.of(places, places + (1 << 30), 256)


def host_row(name: str, count: int, samples: Samples) -> Row:
    """A time without a peer."""
    us = round(samples.percentile(50), 2)
    return {"call": name, "n": count, "us": us, "kvheap": samples.percentiles()}


def measure_transfers(scale: Scale) -> list[Row]:
    """Copies within host memory, waited for."""
    rows = []
    near, far = (Heap(torch.ones(16 << 20, dtype=torch.uint8)) for _ in range(2))
    for count in (each for each in scale.counts if each <= 64):
        source, target = (h.batched_allocate([2048], torch.float16, count) for h in (near, far))
        assert source is not None
        assert target is not None
        plan = CopyPlan.between(source, target)
        calls: dict[str, Call] = {
            "copy(plan)": lambda plan=plan: copy(plan).result(),  # type: ignore[misc]
            "copy((batch, batch))": lambda pair=(source, target): copy(pair).result(),  # type: ignore[misc]
        }
        samples = timed(calls, scale.rounds)
        rows += [host_row(name, count, each) for name, each in samples.items()]
    return rows


def measure_objects(scale: Scale) -> list[Row]:
    """One object, and one page, allocated and freed."""
    shape, dtype = torch.Size([2048]), torch.float16
    kinds: dict[str, dict[str, Any]] = {
        "one object": {"kvheap": Heap(torch.ones(16 << 20, dtype=torch.uint8))},
        "one page": {
            "kvheap": PagedTensorMemoryAllocator(
                torch.ones(16 << 20, dtype=torch.uint8), shape, dtype
            )
        },
    }
    peers = {
        "one object": ("tensor_memory_allocator", "TensorMemoryAllocator", ()),
        "one page": (
            "paged_tensor_memory_allocator",
            "PagedTensorMemoryAllocator",
            ([shape], [dtype]),
        ),
    }
    for name, (module, class_name, more) in peers.items():
        peer = lmcache_allocator(module, class_name)
        if peer is not None:
            kinds[name][PEER] = peer(torch.ones(16 << 20, dtype=torch.uint8), *more)
    rows = []
    for name, allocators in kinds.items():

        def once(allocator: Any) -> None:
            allocator.free(allocator.allocate(shape, dtype))

        def listed(allocator: Any) -> None:
            allocator.batched_free([allocator.allocate(shape, dtype) for _ in range(8)])

        def batch(allocator: Any, count: int) -> None:
            allocator.batched_free(allocator.batched_allocate(shape, dtype, count))

        rows.append(peer_row(name, 1, once, allocators, scale))
        rows.append(peer_row(f"{name} of a list", 8, listed, allocators, scale))
        for count in (each for each in scale.counts if each <= 64):
            call = partial(batch, count=count)
            rows.append(peer_row(f"{name}: a batch", count, call, allocators, scale))
    heap = kinds["one object"]["kvheap"]
    return rows + [host_row(*each) for each in measure_handles(heap, shape, dtype, scale)]


def peer_row(
    name: str, count: int, call: Callable[[Any], None], allocators: dict[str, Any], scale: Scale
) -> Row:
    """The time of a call on kvheap's allocator, and on LMCache's."""
    samples = timed({who: partial(call, each) for who, each in allocators.items()}, scale.rounds)
    row = host_row(name, count, samples["kvheap"])
    if PEER in samples:
        row[PEER] = samples[PEER].percentiles()
    return row


class _Running:
    """A stream whose work does not end before somebody says so."""

    has_let_go = False

    def record_event(self) -> _Running:
        return self

    def query(self) -> bool:
        return self.has_let_go


def measure_handles(
    heap: Any, shape: torch.Size, dtype: torch.dtype, scale: Scale
) -> list[tuple[str, int, Samples]]:
    """Calls on an object or on some blocks of a batch, kvheap's only."""
    batch = heap.batched_allocate(shape, dtype, 16)
    obj = batch[0]

    def counted() -> None:
        obj.ref_count_up()
        obj.ref_count_down()

    def pinned() -> None:
        obj.pin()
        obj.unpin()

    def last_reference() -> None:
        heap.allocate(shape, dtype).ref_count_down()

    def in_halves() -> None:
        blocks = heap.batched_allocate(shape, dtype, 16)
        heap.batched_free(blocks[:8])
        heap.batched_free(blocks[8:])

    def behind_a_stream() -> None:
        stream = _Running()
        for _ in range(8):
            blocks = heap.batched_allocate(shape, dtype, 4)
            blocks.record_stream(stream)
            heap.batched_free(blocks)
        stream.has_let_go = True
        heap.stats()

    calls: dict[str, tuple[int, Call]] = {
        "ref_count_up, ref_count_down": (1, counted),
        "pin, unpin": (1, pinned),
        "batch[0].tensor": (1, lambda: batch[0].tensor),
        "one object, ref_count_down": (1, last_reference),
        "16 blocks, freed in two lists": (16, in_halves),
        "8 batches of 4 behind a running stream, all": (32, behind_a_stream),
    }
    samples = timed({name: call for name, (_, call) in calls.items()}, scale.rounds)
    return [(name, count, samples[name]) for name, (count, _) in calls.items()]


# -- report ----------------------------------------------------------------------------------------


def target(what: str, asked: float, rows: list[Row], figure: str) -> Row:
    """A target with the worst of the figures that it is for."""
    if not rows:
        return {"target": what, "asked": asked, "worst": None, "where": "", "reached": None}
    worst = max(rows, key=lambda row: row[figure])
    keys = ("call", "where", "layers", "size", "n")
    where = ", ".join(f"{key} {worst[key]}" for key in keys if key in worst)
    within = sum(row[figure] <= asked for row in rows)
    found: Row = {"target": what, "asked": asked, "worst": round(worst[figure], 2), "where": where}
    return found | {"reached": within == len(rows), "rows_within": f"{within} of {len(rows)}"}


def targets_of(tables: dict[str, list[Row]]) -> list[Row]:
    """Each target."""
    pages, blocks = tables["pages"], tables["blocks"]
    added = [row for row in blocks if row["call"].endswith("=") and row["n"] < FEW]
    one = [row for row in pages if row["where"] == "shared" and row["n"] == 1]
    named = {
        name: [row for row in tables["host"] if row["call"].startswith(name)]
        for name in ("store", "load", "arrays", "batches", "prepared")
    }
    plans = [row for row in tables["transfers"] if (row["call"], row["n"]) == ("copy(plan)", 1)]
    found = [
        target("blocks: x the loop, from 8", 1.0, [r for r in blocks if r["n"] >= FEW], "ratio"),
        target("source=, out=: us over the plain call, below 8", 15.0, added, "us"),
    ]
    for layers in dict.fromkeys(row["layers"] for row in pages):
        shown = [row for row in pages if row["layers"] == layers]
        found.append(target(f"store, load: x the loop, {layers} layers", 1.0, shown, "ratio"))
    return [
        *found,
        target("store, load: us of one page, one storage", 30.0, one, "us"),
        target("copy(plan) of one block: us", 40.0, plans, "us"),
        target("store, load up to the launch: us", 30.0, named["store"] + named["load"], "us"),
        target("12,288 pieces from arrays: us", 110.0, named["arrays"], "us"),
        target("12,288 pieces from batches: us", 70.0, named["batches"], "us"),
        target("12,288 pieces, prepared: us", 10.0, named["prepared"], "us"),
        *(
            target(f"{name}: us", asked, [r for r in tables["objects"] if r["call"] == name], "us")
            for name, asked in (("one object", 6.0), ("one page", 4.0))
        ),
    ]


def print_ratios(console: Console, title: str, rows: list[Row]) -> None:
    """Print kvheap's us and its ratio to the loop, a column for each number of blocks."""
    counts = list(dict.fromkeys(row["n"] for row in rows))
    table = Table(title=title)
    for column in ("call", "layers", "block", *(f"N = {count:,}" for count in counts)):
        table.add_column(column, justify="left" if column == "call" else "right")
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        key = (f"{row['call']}, {row['where']}", row["layers"], row["size"])
        groups.setdefault(key, {})[row["n"]] = row
    for (call, layers, size), by_count in groups.items():
        cells = [
            f"{by_count[n]['us']:,.1f} ({by_count[n]['ratio']:.2f})" if n in by_count else ""
            for n in counts
        ]
        table.add_row(call, str(layers), size_label(size), *cells)
    console.print(table)


def print_times(console: Console, rows: list[Row]) -> None:
    """Print the calls without a loop beside them."""
    table = Table(title="us (p50)")
    for column in ("call", "N", "kvheap", PEER):
        table.add_column(column, justify="left" if column == "call" else "right")
    for row in rows:
        peer = f"{row[PEER]['p50_us']:,.1f}" if PEER in row else ""
        table.add_row(row["call"], f"{row['n']:,}", f"{row['us']:,.1f}", peer)
    console.print(table)


def print_targets(console: Console, targets: list[Row]) -> None:
    """Print what was asked, and whether it was reached."""
    for each in targets:
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[each["reached"]]
        worst = "" if each["worst"] is None else f"; worst {each['worst']} ({each['where']})"
        within = f", {each['rows_within']} within" if each["worst"] is not None else ""
        console.print(f"{each['target']} <= {each['asked']:g}: {verdict}{within}{worst}")


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw kvheap's time over the loop's, over the number of blocks."""
    rows = found["pages"] + found["blocks"]
    calls = list(dict.fromkeys((r["call"], r["where"], r["layers"]) for r in rows))
    figure, panels = plt.subplots(-(-len(calls) // 4), 4, figsize=(18, 9), sharey=True)
    for panel, key in zip(panels.flat, calls, strict=False):
        shown = [r for r in rows if (r["call"], r["where"], r["layers"]) == key]
        for size in dict.fromkeys(r["size"] for r in shown):
            line = [r for r in shown if r["size"] == size]
            places, heights = [r["n"] for r in line], [r["ratio"] for r in line]
            panel.plot(places, heights, marker="o", label=size_label(size))
        panel.axhline(1.0, color="black", linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel="blocks")
        panel.set_title(f"{key[0]}, {key[1]}, {key[2]} layers")
        panel.grid(alpha=0.3)
    panels.flat[0].set_ylabel("kvheap's time / the loop's")
    panels.flat[0].legend()
    figure.suptitle(f"Small calls, {found['device']}, {found['date'][:10]} (below 1.0: faster)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console, scale = make_console(), Scale.of(arguments.quick)
    cpu = torch.device("cpu")
    has_peer = lmcache_allocator("tensor_memory_allocator", "TensorMemoryAllocator") is not None
    machine = machine_with_lmcache(console, cpu, has_peer)
    tables = {
        "pages": measure_pages(scale, console),
        "blocks": measure_blocks(scale, console),
        "transfers": measure_transfers(scale),
        "host": measure_host(scale),
        "objects": measure_objects(scale),
    }
    targets = targets_of(tables)
    note = "us of kvheap (times the loop's time)"
    print_ratios(console, f"Pages of an engine's cache, {note}", tables["pages"])
    print_ratios(console, f"Blocks of a dense tensor, {note}", tables["blocks"])
    print_times(console, tables["transfers"] + tables["host"] + tables["objects"])
    print_targets(console, targets)
    configuration = {
        "quick": arguments.quick,
        "rounds": scale.rounds,
        "page_tokens": PAGE_TOKENS,
        "ratio": "median over rounds of kvheap's time over the loop's",
        "host": "no GPU: nothing is launched, and the copy engine's library does nothing",
    }
    write_results(
        console,
        arguments.out,
        "small_calls",
        machine,
        configuration,
        {"targets": targets, **tables},
        draw,
    )


if __name__ == "__main__":
    main()
