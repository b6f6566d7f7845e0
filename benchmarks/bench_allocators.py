"""The allocators: what making, using and closing each costs the host, and what its options cost.

Peer: LMCache's classes of the same names, in the same rounds (``pip install --no-deps
lmcache==0.5.6`` and the modules that its import asks for). Without it, kvheap's figures stand
alone. Blocks have 4 KiB, so that time is not spent in copying. The tables:

==========  ======================================================================================
table       what is timed
==========  ======================================================================================
life        an allocator from construction to close: the constructor; ``allocate`` + ``free`` of
            one block, the mean of many; ``batched_allocate`` and ``batched_free`` of N blocks;
            ``close``. Each round makes one anew. The paged ones have 100,000 pages, the others
            room for the largest batch. GPUMemoryAllocator lies in host memory where there is no
            GPU. LMCache's LazyMemoryAllocator needs memory that can be pinned, and its
            AdHocMemoryAllocator has no batches
options     ``allocate`` + ``free`` of one block and of a batch of 64, 256 KiB, from
            ``TensorMemoryAllocator`` without options, with four frames of tracing, with ``scrub``
            (which zeroes what is freed) and with ``debug`` (which fills it, looks at it when it is
            handed out again, and traces)
streams     ``record_stream`` alone; the pair of calls on a batch of 64 with a stream recorded, that
            has ended; and without one, while other freed batches wait for a stream
leaks       ``leaks()`` over live batches of 8 blocks, without and with tracing
==========  ======================================================================================

Times are of the host, in microseconds; streams are stand-ins, whose events cost nothing. Ratios are
medians over rounds.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _report import (
    Measure,
    Samples,
    describe_machine,
    make_console,
    parse_common,
    pyplot,
    time_in_rounds,
    write_json,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvheap import (
    AdHocMemoryAllocator,
    GPUMemoryAllocator,
    HeapOptions,
    HostMemoryAllocator,
    LazyMemoryAllocator,
    MixedMemoryAllocator,
    PagedTensorMemoryAllocator,
    PinMemoryAllocator,
    TensorMemoryAllocator,
)

PEER = "LMCache"
BLOCK = torch.Size([4096])
BLOCK_BYTES = 4096
BATCH = 64
TRACE_FRAMES = 4
LEAK_BLOCKS = 8

Row = dict[str, Any]
Make = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    blocks: tuple[int, ...]
    pages: int
    pairs: int
    waiting: tuple[int, ...]
    batches: int
    rounds: int
    slow_rounds: int
    """Of the paged allocators, of which LMCache makes one object for each page."""

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """What takes a minute, or a few seconds."""
        if quick:
            return cls((64, 1_024), 10_000, 100, (0, 100), 1_000, 3, 3)
        return cls((64, 1_024, 16_384), 100_000, 500, (0, 100, 1_000), 10_000, 15, 5)


# -- life ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """One allocator by kvheap, and by LMCache where it has one that can be made here."""

    name: str
    make: Make
    peer: Make | None

    def rounds(self, scale: Scale) -> int:
        """How many lives of it are timed."""
        return scale.slow_rounds if self.name.startswith("Paged") else scale.rounds


def find_peer(name: str, module: str) -> Any | None:
    """LMCache's class; None where LMCache, or a module that its import asks for, is missing."""
    try:
        return getattr(importlib.import_module(f"lmcache.v1.memory_allocators.{module}"), name)
    except ImportError:
        return None


def peer_version() -> str | None:
    if find_peer("TensorMemoryAllocator", "tensor_memory_allocator") is None:
        return None
    return importlib.metadata.version("lmcache")


def subject(name: str, module: str, make: Make, *peer_arguments: Any) -> Subject:
    """An allocator, with a peer only where that runs on this machine."""
    peer = find_peer(name, module)
    if peer is None:
        return Subject(name, make, None)
    peer_make = partial(peer, *peer_arguments)
    try:
        peer_make().close()
    except RuntimeError:  # it needs a device that is not there
        return Subject(name, make, None)
    return Subject(name, make, peer_make)


def find_subjects(scale: Scale) -> list[Subject]:
    """All allocators."""
    size = scale.blocks[-1] * BLOCK_BYTES
    buffer = torch.empty(size, dtype=torch.uint8)
    pages = torch.empty(scale.pages * BLOCK_BYTES, dtype=torch.uint8)
    page = (pages, [BLOCK], [torch.uint8])
    return [
        subject(
            "TensorMemoryAllocator",
            "tensor_memory_allocator",
            lambda: TensorMemoryAllocator(buffer),
            buffer,
        ),
        subject(
            "PagedTensorMemoryAllocator",
            "paged_tensor_memory_allocator",
            lambda: PagedTensorMemoryAllocator(*page),
            *page,
        ),
        subject(
            "GPUMemoryAllocator",
            "gpu_memory_allocator",
            lambda: GPUMemoryAllocator(size, allow_cpu=True),
            size,
        ),
        subject(
            "HostMemoryAllocator",
            "host_memory_allocator",
            lambda: HostMemoryAllocator(size),
            size,
        ),
        subject(
            "PinMemoryAllocator",
            "pin_memory_allocator",
            lambda: PinMemoryAllocator(size, allow_unpinned=True),
            size,
        ),
        subject(
            "MixedMemoryAllocator",
            "mixed_memory_allocator",
            lambda: MixedMemoryAllocator(PinMemoryAllocator(size, allow_unpinned=True)),
            size,
        ),
        subject(
            "LazyMemoryAllocator",
            "lazy_memory_allocator",
            lambda: LazyMemoryAllocator(size, 2 * size, pin="no"),
            size,
            2 * size,
        ),
        subject("AdHocMemoryAllocator", "ad_hoc_memory_allocator", AdHocMemoryAllocator),
    ]


class Life:
    """Lives of one allocator: each round makes one, uses it and closes it."""

    def __init__(self, make: Make, scale: Scale) -> None:
        self.make = make
        self.scale = scale
        self.microseconds: dict[str, float] = {}

    def live(self) -> None:
        """Take the times of one life."""
        allocator = self._timed("construct", self.make)
        self._pairs(allocator)
        for num_blocks in self.scale.blocks:
            with suppress(NotImplementedError):
                self._batch(allocator, num_blocks)
        self._timed("close", allocator.close)

    def _pairs(self, allocator: Any) -> None:
        allocate, free = allocator.allocate, allocator.free
        free(allocate(BLOCK, torch.uint8))
        start = time.perf_counter()
        for _ in range(self.scale.pairs):
            free(allocate(BLOCK, torch.uint8))
        elapsed = (time.perf_counter() - start) * 1e6
        self.microseconds["allocate + free"] = elapsed / self.scale.pairs

    def _batch(self, allocator: Any, num_blocks: int) -> None:
        """The second of two: the first also pays for what any batch pays for once."""
        for _ in range(2):
            batch = self._timed(
                f"batched_allocate {num_blocks:,}",
                lambda: allocator.batched_allocate(BLOCK, torch.uint8, num_blocks),
            )
            self._timed(
                f"batched_free {num_blocks:,}", lambda batch=batch: allocator.batched_free(batch)
            )
            del batch

    def _timed(self, operation: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.microseconds[operation] = (time.perf_counter() - start) * 1e6
        return result


def measure_life(scale: Scale, subject: Subject) -> list[Row]:
    lives = {"kvheap": Life(subject.make, scale)}
    if subject.peer is not None:
        lives[PEER] = Life(subject.peer, scale)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in lives}
    for round_number in range(subject.rounds(scale) + 1):
        for name, life in lives.items():
            life.live()
            if round_number:
                taken[name].append(dict(life.microseconds))
    rows = []
    for operation in taken["kvheap"][0]:
        of_operation = {
            name: Samples(tuple(times[operation] for times in rounds))
            for name, rounds in taken.items()
            if operation in rounds[0]
        }
        rows.append({"allocator": subject.name, "operation": operation} | compared(of_operation))
    return rows


# -- options ---------------------------------------------------------------------------------------

OPTIONS: dict[str, HeapOptions] = {
    "plain": {"debug": False},
    f"trace_frames={TRACE_FRAMES}": {"debug": False, "trace_frames": TRACE_FRAMES},
    "scrub": {"debug": False, "scrub": True},
    "debug": {"debug": True},
}


def small_heap(options: HeapOptions) -> TensorMemoryAllocator:
    """Room for two batches, in memory that is touched already."""
    return TensorMemoryAllocator(torch.zeros(2 * BATCH * BLOCK_BYTES, dtype=torch.uint8), **options)


def one_block(heap: TensorMemoryAllocator) -> None:
    obj = heap.allocate(BLOCK, torch.uint8)
    assert obj is not None
    heap.free(obj)


def one_batch(heap: TensorMemoryAllocator) -> None:
    batch = heap.batched_allocate(BLOCK, torch.uint8, BATCH)
    assert batch is not None
    heap.batched_free(batch)


def repeated(call: Callable[[], object], times: int) -> Measure:
    """Wall-clock time of the mean call."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) * 1e6 / times

    return measure


def measure_options(scale: Scale) -> list[Row]:
    rows = []
    for title, pair in (("one block", one_block), (f"a batch of {BATCH}", one_batch)):
        measures = {
            name: repeated(partial(pair, small_heap(options)), scale.pairs)
            for name, options in OPTIONS.items()
        }
        samples = time_in_rounds(measures, scale.rounds)
        rows += against_first({"allocate + free": title}, samples)
    return rows


# -- streams and leaks -----------------------------------------------------------------------------


class FakeStream:
    """A stream and its only event."""

    def __init__(self, has_ended: bool) -> None:
        self.has_ended = has_ended

    def record_event(self) -> FakeStream:
        """The event."""
        return self

    def query(self) -> bool:
        """Whether the work has ended."""
        return self.has_ended


def heap_with_waiting(num_waiting: int, stream: FakeStream) -> TensorMemoryAllocator:
    """A heap in which so many freed blocks, each a release of its own, wait for a stream."""
    size = (num_waiting + 2 * BATCH) * BLOCK_BYTES
    heap = TensorMemoryAllocator(torch.empty(size, dtype=torch.uint8), debug=False)
    blocks = [heap.allocate(BLOCK, torch.uint8) for _ in range(num_waiting)]
    for block in blocks:
        assert block is not None
        block.record_stream(stream)
        heap.free(block)
    return heap


def measure_streams(scale: Scale) -> list[Row]:
    ended, working = FakeStream(True), FakeStream(False)
    heap = small_heap(OPTIONS["plain"])

    def recorded_batch() -> None:
        batch = heap.batched_allocate(BLOCK, torch.uint8, BATCH)
        assert batch is not None
        batch.record_stream(ended)
        heap.batched_free(batch)

    measures = {
        f"a batch of {BATCH}": repeated(lambda: one_batch(heap), scale.pairs),
        "the same, with a stream that has ended": repeated(recorded_batch, scale.pairs),
    }
    for count in scale.waiting[1:]:
        busy = heap_with_waiting(count, working)
        name = f"no stream, while {count:,} others wait"
        measures[name] = repeated(lambda busy=busy: one_batch(busy), scale.pairs // 10)
    rows = against_first({}, time_in_rounds(measures, scale.rounds))
    return [*measure_recording(scale), *rows]


def measure_recording(scale: Scale) -> list[Row]:
    """``record_stream`` alone, each call the first on its block or batch."""
    heap = TensorMemoryAllocator(
        torch.empty(scale.pairs * BLOCK_BYTES, dtype=torch.uint8), debug=False
    )
    stream = FakeStream(True)

    def record(size: int) -> Measure:
        def measure() -> float:
            batches = [
                heap.batched_allocate(BLOCK, torch.uint8, size) for _ in range(scale.pairs // size)
            ]
            start = time.perf_counter()
            for batch in batches:
                batch.record_stream(stream)  # type: ignore[union-attr]  # all fit
            elapsed = (time.perf_counter() - start) * 1e6
            for batch in batches:
                heap.batched_free(batch)  # type: ignore[arg-type]
            return elapsed / len(batches)

        return measure

    measures = {f"record_stream alone, a batch of {size}": record(size) for size in (1, BATCH)}
    samples = time_in_rounds(measures, scale.rounds)
    return [{"case": name} | {"kvheap": timing.percentiles()} for name, timing in samples.items()]


def heap_with_batches(num_batches: int, trace_frames: int) -> tuple[TensorMemoryAllocator, Any]:
    size = num_batches * LEAK_BLOCKS * BLOCK_BYTES
    heap = TensorMemoryAllocator(
        torch.empty(size, dtype=torch.uint8), debug=False, trace_frames=trace_frames
    )
    batches = [heap.batched_allocate(BLOCK, torch.uint8, LEAK_BLOCKS) for _ in range(num_batches)]
    return heap, batches


def measure_leaks(scale: Scale) -> list[Row]:
    heaps = {
        f"leaks() of {scale.batches:,} live batches{title}": heap_with_batches(
            scale.batches, frames
        )
        for title, frames in (("", 0), (f", trace_frames={TRACE_FRAMES}", TRACE_FRAMES))
    }
    measures = {name: repeated(heap.leaks, 1) for name, (heap, _) in heaps.items()}
    return against_first({}, time_in_rounds(measures, scale.rounds))


# -- report ----------------------------------------------------------------------------------------


def compared(samples: Mapping[str, Samples]) -> Row:
    """Percentiles of each, and the peer's time over kvheap's where there is a peer."""
    row: Row = {name: timing.percentiles() for name, timing in samples.items()}
    if PEER in samples:
        row["times_as_fast"] = round(samples["kvheap"].speed_against(samples[PEER]), 2)
    return row


def against_first(labels: Row, samples: Mapping[str, Samples]) -> list[Row]:
    """One row for each, with its time over that of the first."""
    first = next(iter(samples.values()))
    return [
        labels
        | {
            "case": name,
            "kvheap": timing.percentiles(),
            "times_the_first": round(first.speed_against(timing), 2),
        }
        for name, timing in samples.items()
    ]


def per_page(rows: list[Row]) -> list[Row]:
    """The paged allocator's batches, by page."""
    found = []
    for row in rows:
        name, _, count = row["operation"].partition(" ")
        if row["allocator"].startswith("Paged") and name.startswith("batched"):
            pages = int(count.replace(",", ""))
            values = {
                who: round(row[who]["p50_us"] / pages, 4) for who in ("kvheap", PEER) if who in row
            }
            found.append({"operation": name, "pages": pages} | values)
    return found


def print_life(console: Console, rows: list[Row]) -> None:
    table = Table(title="An allocator's life, us")
    for name in ("allocator", "operation", "kvheap", PEER, "ratio"):
        table.add_column(name, justify="left" if name in ("allocator", "operation") else "right")
    last = None
    for row in rows:
        cells = [row["allocator"] if row["allocator"] != last else "", row["operation"]]
        cells.append(f"{row['kvheap']['p50_us']:,.2f}")
        cells.append(f"{row[PEER]['p50_us']:,.2f}" if PEER in row else "")
        cells.append(f"{row['times_as_fast']:,.1f}x" if PEER in row else "")
        if last is not None and row["allocator"] != last:
            table.add_section()
        table.add_row(*cells)
        last = row["allocator"]
    console.print(table)


def print_plain(console: Console, title: str, rows: list[Row]) -> None:
    """Any rows; of percentiles the median, in us."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for key in keys:
        is_text = isinstance(rows[0].get(key), str)
        table.add_column(key.replace("_", " "), justify="left" if is_text else "right")
    for row in rows:
        cells = [row.get(key, "") for key in keys]
        table.add_row(*(cell if isinstance(cell, str) else figure(cell) for cell in cells))
    console.print(table)


def figure(value: Any) -> str:
    return f"{value['p50_us']:,.2f}" if isinstance(value, dict) else f"{value:,}"


def draw(plt: ModuleType, tables: dict[str, Any], machine: dict[str, Any], path: Path) -> None:
    """One life of each allocator, by operation; and the pairs of calls under each option."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(14, 6), width_ratios=(3, 1))
    draw_life(left, tables["life"])
    draw_options(right, tables["options"])
    for panel in (left, right):
        panel.set_yscale("log")
        panel.set_ylim(bottom=1)
        panel.set_ylabel("microseconds of the host")
        panel.grid(alpha=0.3, axis="y")
        panel.legend()
    picture.suptitle(f"Allocators, {machine['device']}, {machine['date'][:10]}", fontsize=11)
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    plt.close(picture)


def draw_life(panel: Any, rows: list[Row]) -> None:
    """Construction, and the largest batch in and out, side by side for each allocator."""
    operations = [row["operation"] for row in rows if row["operation"].startswith("batched")]
    size = operations[-1].partition(" ")[2]
    shown = {
        "construct": "construct",
        f"batched_allocate {size}": f"allocate {size}",
        f"batched_free {size}": f"free {size}",
    }
    names = list(dict.fromkeys(row["allocator"] for row in rows))
    labels: dict[float, str] = {}
    for row in rows:
        if row["operation"] not in shown:
            continue
        place = 4.0 * names.index(row["allocator"]) + list(shown).index(row["operation"])
        labels[place] = shown[row["operation"]]
        for who, color, shift in (("kvheap", "tab:blue", -0.2), (PEER, "tab:orange", 0.2)):
            if who in row:
                panel.bar(place + shift, row[who]["p50_us"], 0.4, color=color)
    for who, color in (("kvheap", "tab:blue"), (PEER, "tab:orange")):
        if any(who in row for row in rows):
            panel.bar(0, 0, color=color, label=who)
    panel.set_xticks(list(labels), list(labels.values()), rotation=90, fontsize=8)
    for number, name in enumerate(names):
        title = name.removesuffix("MemoryAllocator")
        panel.text(
            4.0 * number + 1, 1.01, title, transform=panel.get_xaxis_transform(), ha="center"
        )


def draw_options(panel: Any, rows: list[Row]) -> None:
    titles = list(dict.fromkeys(row["allocate + free"] for row in rows))
    names = list(dict.fromkeys(row["case"] for row in rows))
    looks = zip(titles, (-0.2, 0.2), ("tab:blue", "tab:cyan"), strict=True)
    for title, shift, color in looks:
        heights = [row["kvheap"]["p50_us"] for row in rows if row["allocate + free"] == title]
        places = [number + shift for number in range(len(names))]
        bars = panel.bar(places, heights, 0.4, label=title, color=color)
        panel.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=8)
    panel.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
    panel.set_title("TensorMemoryAllocator: allocate + free\nof blocks of 4 KiB", fontsize=10)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0])
    console, scale = make_console(), Scale.of(arguments.quick)
    logging.disable(logging.WARNING)  # LMCache logs a line for every allocator
    version = peer_version()
    machine = describe_machine(torch.device("cpu"))
    machine["versions"]["lmcache"] = version
    console.print(f"{machine['device']}, {machine['versions']}")
    if version is None:
        console.print("lmcache is not installed: kvheap's figures stand alone")
    cases: list[tuple[str, Callable[[], list[Row]]]] = [
        *(("life", lambda s=s: measure_life(scale, s)) for s in find_subjects(scale)),
        ("options", lambda: measure_options(scale)),
        ("streams", lambda: measure_streams(scale)),
        ("leaks", lambda: measure_leaks(scale)),
    ]
    tables: dict[str, Any] = {}
    for name, measure in track(cases, "measuring", console=console, transient=True):
        tables.setdefault(name, []).extend(measure())
        gc.collect()
    tables["per_page"] = per_page(tables["life"])
    print_life(console, tables["life"])
    print_plain(console, f"us for each of {scale.pages:,} pages", tables["per_page"])
    print_plain(console, "allocate + free with options, blocks of 4 KiB, us", tables["options"])
    print_plain(console, "streams: allocate + free, us", tables["streams"])
    print_plain(console, "leaks, us", tables["leaks"])
    configuration = {
        "quick": arguments.quick,
        "rounds": scale.rounds,
        "rounds_paged": scale.slow_rounds,
        "block_bytes": BLOCK_BYTES,
        "pages": scale.pages,
        "times_as_fast": "median over rounds of the peer's time over kvheap's",
        "times_the_first": "median over rounds of the time over that of the table's first row",
    }
    path = write_json(arguments.out, "allocators", machine, configuration, tables)
    console.print(f"wrote {path}")
    plt = pyplot(console)
    if plt is not None:
        draw(plt, tables, machine, path.with_suffix(".png"))
        console.print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
