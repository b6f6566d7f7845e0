"""The allocators: host time of making, using and closing each, and of their options.

The peer is LMCache, with its classes of the same names, in the same rounds (see ``_lmcache.py``).
Blocks have 4 KiB, so that little time is spent on copying bytes. The tables:

==========  ======================================================================================
table       what is timed
==========  ======================================================================================
life        an allocator from construction to close: the constructor; ``allocate`` + ``free`` of
            one block, the mean of many; ``batched_allocate`` and ``batched_free`` of N blocks;
            ``close``. Each round makes a new one. The paged allocators have 100,000 pages, the
            others room for the largest batch. Without a GPU, GPUMemoryAllocator is in host memory.
            LMCache's LazyMemoryAllocator needs memory that can be pinned, and its
            AdHocMemoryAllocator has no batches
options     ``allocate`` + ``free`` of one block and of a batch of 64 (256 KiB) from
            ``TensorMemoryAllocator``: without options, with four frames of tracing, with ``scrub``
            (zeroes freed bytes) and with ``debug`` (fills freed bytes, checks them when they are
            allocated again, and traces)
streams     ``record_stream`` alone; ``allocate`` + ``free`` of a batch of 64 with a recorded stream
            that has ended; and without a stream, while other freed batches wait for one
leaks       ``leaks()`` over live batches of 8 blocks, without and with tracing
==========  ======================================================================================

Times are microseconds of the host; streams are stand-ins whose events cost nothing. Ratios are
medians over rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _lmcache import PEER, compared, lmcache_allocator, machine_with_lmcache
from _report import Row, make_console, parse_common, write_results
from _spread import plot_dots
from _timing import Call, Measure, Samples, on_the_host, time_in_rounds
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

BLOCK = torch.Size([4096])
BLOCK_BYTES = 4096
BATCH = 64
TRACE_FRAMES = 4
LEAK_BLOCKS = 8

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
    """Rounds of the paged allocators, which are slow in LMCache: an object for each page."""

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """The scale for a run of a minute; quick: of a few seconds."""
        if quick:
            return cls((64, 1_024), 10_000, 100, (0, 100), 1_000, 3, 3)
        return cls((64, 1_024, 16_384), 100_000, 500, (0, 100, 1_000), 10_000, 15, 5)


# -- life ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """An allocator of kvheap, and LMCache's if there is one that can be made here."""

    name: str
    make: Make
    peer: Make | None

    def rounds(self, scale: Scale) -> int:
        """The number of lives to time."""
        return scale.slow_rounds if self.name.startswith("Paged") else scale.rounds


def subject(name: str, module: str, make: Make, *peer_arguments: Any) -> Subject:
    """An allocator, with its peer if that runs on this machine."""
    peer = lmcache_allocator(module, name)
    if peer is None:
        return Subject(name, make, None)
    peer_make = partial(peer, *peer_arguments)
    try:
        peer_make().close()
    except RuntimeError:  # it needs a device that this machine lacks
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
        """Time one life."""
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
        """Time the second of two batches: the first also pays for what is made once."""
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
    """A heap with room for two batches, in memory that was touched before."""
    return TensorMemoryAllocator(torch.zeros(2 * BATCH * BLOCK_BYTES, dtype=torch.uint8), **options)


def one_block(heap: TensorMemoryAllocator) -> None:
    obj = heap.allocate(BLOCK, torch.uint8)
    assert obj is not None
    heap.free(obj)


def one_batch(heap: TensorMemoryAllocator) -> None:
    batch = heap.batched_allocate(BLOCK, torch.uint8, BATCH)
    assert batch is not None
    heap.batched_free(batch)


def repeated(call: Call, times: int) -> Measure:
    return on_the_host([call] * times)


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
    """Stands in for a stream and for its only event."""

    def __init__(self, has_ended: bool) -> None:
        self.has_ended = has_ended

    def record_event(self) -> FakeStream:
        """The event."""
        return self

    def query(self) -> bool:
        """Whether the work has ended."""
        return self.has_ended


def heap_with_waiting(num_waiting: int, stream: FakeStream) -> TensorMemoryAllocator:
    """A heap with ``num_waiting`` freed blocks that wait for a stream, each released by itself."""
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
    """``record_stream`` alone; each call is the first on its block or batch."""
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


def against_first(labels: Row, samples: Mapping[str, Samples]) -> list[Row]:
    """A row for each case, with its time over that of the first case."""
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
    """Times of the paged allocator's batches, divided by their pages."""
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
    """Print rows as they are; percentiles show their median, in us."""
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


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw a life of each allocator by operation, and ``allocate`` + ``free`` by option.

    Dots, since bars on a logarithmic axis would begin anywhere.
    """
    picture, (left, right) = plt.subplots(1, 2, figsize=(14, 6), width_ratios=(3, 1))
    draw_life(left, found["life"])
    draw_options(right, found["options"])
    for panel in (left, right):
        panel.set_yscale("log")
        panel.set_ylim(1, 2 * panel.get_ylim()[1])
        panel.set_ylabel("microseconds of the host (dot: median; line: the middle 60 %)")
        panel.grid(alpha=0.3, axis="y")
        panel.legend()
    picture.suptitle(f"Allocators, {found['device']}, {found['date'][:10]}", fontsize=11)
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    plt.close(picture)


def draw_life(panel: Any, rows: list[Row]) -> None:
    """Draw construction, and allocation and free of the largest batch, for each allocator."""
    operations = [row["operation"] for row in rows if row["operation"].startswith("batched")]
    size = operations[-1].partition(" ")[2]
    shown = {
        "construct": "construct",
        f"batched_allocate {size}": f"allocate {size}",
        f"batched_free {size}": f"free {size}",
    }
    names = list(dict.fromkeys(row["allocator"] for row in rows))
    labels: dict[float, str] = {}
    points: dict[str, list[tuple[float, Row]]] = {"kvheap": [], PEER: []}
    for row in rows:
        if row["operation"] not in shown:
            continue
        place = 4.0 * names.index(row["allocator"]) + list(shown).index(row["operation"])
        labels[place] = shown[row["operation"]]
        for who, shift in (("kvheap", -0.2), (PEER, 0.2)):
            if who in row:
                points[who].append((place + shift, row[who]))
    for who, color in (("kvheap", "tab:blue"), (PEER, "tab:orange")):
        if points[who]:
            places, times = zip(*points[who], strict=True)
            plot_dots(panel, places, times, color=color, label=who)
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
        times = [row["kvheap"] for row in rows if row["allocate + free"] == title]
        places = [number + shift for number in range(len(names))]
        plot_dots(panel, places, times, label=title, color=color)
        for place, each in zip(places, times, strict=True):
            text = f"{each['p50_us']:.3g}"
            panel.annotate(
                text,
                (place, each["p50_us"]),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    panel.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
    panel.set_title("TensorMemoryAllocator: allocate + free\nof blocks of 4 KiB", fontsize=10)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console, scale = make_console(), Scale.of(arguments.quick)
    peer = lmcache_allocator("tensor_memory_allocator", "TensorMemoryAllocator")
    machine = machine_with_lmcache(console, torch.device("cpu"), peer is not None)
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
    write_results(console, arguments.out, "allocators", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
