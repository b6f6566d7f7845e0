"""The allocator family: what each costs the host to make, use and close, and what options add.

Peer: LMCache's classes of the same names, in the same rounds, where it can be imported (see
``bench_address_manager.py``). Memory is on the CPU, and no block is written but where an option
does it. The tables:

============  ====================================================================================
table         what is timed, in microseconds of the host
============  ====================================================================================
construct     making an allocator of 64 MiB (``PagedTensorMemoryAllocator``: of 100,000 pages of
              4 KiB); ``LazyMemoryAllocator`` starts with 16 MiB
single        ``allocate`` and ``free`` of one block of 4 KiB
allocate,     ``batched_allocate`` and ``batched_free`` of N such blocks, after one such pair of
free          calls that is not timed
options       ``batched_allocate`` and ``batched_free`` of 64 blocks of 4 KiB with each option;
              ``scrub`` and ``debug`` write all 256 KiB, ``debug`` reads them, too
leaks         ``leaks()`` with 10,000 live batches
============  ====================================================================================
"""

from __future__ import annotations

import gc
import importlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _report import (
    Measure,
    describe_machine,
    make_console,
    on_the_host,
    parse_common,
    pyplot,
    time_in_rounds,
    write_json,
)
from bench_address_manager import PEER, Row, compared, print_times
from rich.progress import track

from kvheap import (
    AdHocMemoryAllocator,
    GPUMemoryAllocator,
    HostMemoryAllocator,
    LazyMemoryAllocator,
    MixedMemoryAllocator,
    PagedTensorMemoryAllocator,
    PinMemoryAllocator,
    TensorMemoryAllocator,
)

BLOCK_BYTES = 4096
SHAPE = torch.Size([BLOCK_BYTES])
HEAP_BYTES = 64 << 20
PAGES = 100_000
OPTION_BLOCKS = 64
LIVE_BATCHES = 10_000

Make = Callable[[], Any]


class PassedStream:
    """A stream whose work has always ended."""

    def record_event(self) -> PassedStream:
        """Itself: it is its own event."""
        return self

    def query(self) -> bool:
        """Whether the work has ended."""
        return True


def makers(num_bytes: int) -> dict[str, Make]:
    """How each of kvheap's allocators is made; without CUDA where torch sees none."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    return {
        "TensorMemoryAllocator": lambda: TensorMemoryAllocator(buffer),
        "PagedTensorMemoryAllocator": lambda: PagedTensorMemoryAllocator(
            buffer, SHAPE, torch.uint8
        ),
        "GPUMemoryAllocator": lambda: GPUMemoryAllocator(num_bytes, "cpu"),
        "HostMemoryAllocator": lambda: HostMemoryAllocator(num_bytes),
        "PinMemoryAllocator": lambda: PinMemoryAllocator(num_bytes, allow_unpinned=True),
        "MixedMemoryAllocator": lambda: MixedMemoryAllocator(HostMemoryAllocator(num_bytes)),
        "LazyMemoryAllocator": lambda: LazyMemoryAllocator(16 << 20, num_bytes, pin="no"),
        "AdHocMemoryAllocator": AdHocMemoryAllocator,
    }


def peer_makers(num_bytes: int) -> dict[str, Make]:
    """The same of LMCache's: those that can be made on a CPU. Empty without LMCache."""
    try:
        folder = "lmcache.v1.memory_allocators"
        kinds = {
            name: getattr(importlib.import_module(f"{folder}.{module}"), name)
            for name, module in {
                "TensorMemoryAllocator": "tensor_memory_allocator",
                "PagedTensorMemoryAllocator": "paged_tensor_memory_allocator",
                "HostMemoryAllocator": "host_memory_allocator",
                "PinMemoryAllocator": "pin_memory_allocator",
                "MixedMemoryAllocator": "mixed_memory_allocator",
            }.items()
        }
    except ImportError:
        return {}
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    found: dict[str, Make] = {
        "TensorMemoryAllocator": lambda: kinds["TensorMemoryAllocator"](buffer),
        "PagedTensorMemoryAllocator": lambda: kinds["PagedTensorMemoryAllocator"](
            buffer, [SHAPE], [torch.uint8]
        ),
    }
    for name in ("HostMemoryAllocator", "PinMemoryAllocator", "MixedMemoryAllocator"):
        found[name] = lambda name=name: kinds[name](num_bytes)
    return {name: make for name, make in found.items() if can_be_made(make)}


def can_be_made(make: Make) -> bool:
    try:
        make().close()
    except Exception:
        return False
    return True


def sides(name: str, num_bytes: int) -> dict[str, Make]:
    """Makers, kvheap's and LMCache's, of allocator; LMCache's where there is one."""
    found = {"kvheap": makers(num_bytes)[name]}
    peer = peer_makers(num_bytes).get(name)
    return found | ({PEER: peer} if peer is not None else {})


def measure_construct(name: str, rounds: int) -> list[Row]:
    is_paged = name.startswith("Paged")
    num_bytes = PAGES * BLOCK_BYTES if is_paged else HEAP_BYTES

    def timed(make: Make) -> Measure:
        def measure() -> float:
            start = time.perf_counter()
            allocator = make()
            spent = time.perf_counter() - start
            allocator.close()
            return spent * 1e6

        return measure

    measures = {side: timed(make) for side, make in sides(name, num_bytes).items()}
    times = compared(time_in_rounds(measures, 3 if is_paged else rounds))
    return [{"operation": name, "MiB": num_bytes >> 20} | times]


def measure_single(name: str, rounds: int) -> list[Row]:
    def pair(allocator: Any) -> Callable[[], object]:
        return lambda: allocator.free(allocator.allocate(SHAPE, torch.uint8))

    made = {side: make() for side, make in sides(name, HEAP_BYTES).items()}
    measures = {side: on_the_host([pair(allocator)] * 200) for side, allocator in made.items()}
    row = {"operation": name} | compared(time_in_rounds(measures, rounds))
    for allocator in made.values():
        allocator.close()
    return [row]


class BatchTimer:
    """Allocates a batch and frees it; both times, each in its own measure."""

    def __init__(self, make: Make, num_blocks: int) -> None:
        self.allocator = make()
        self.num_blocks = num_blocks
        self.free_us = 0.0

    def allocate(self) -> float:
        """Time of the allocation, the second of two."""
        for _ in range(2):
            start = time.perf_counter()
            batch = self.allocator.batched_allocate(SHAPE, torch.uint8, self.num_blocks)
            allocated = time.perf_counter()
            self.allocator.batched_free(batch)
            self.free_us = (time.perf_counter() - allocated) * 1e6
        return (allocated - start) * 1e6

    def free(self) -> float:
        """Of the last :meth:`allocate`, which each round calls before."""
        return self.free_us


def measure_batch(name: str, num_blocks: int, rounds: int) -> tuple[list[Row], list[Row]]:
    timers = {side: BatchTimer(make, num_blocks) for side, make in sides(name, HEAP_BYTES).items()}
    measures: dict[str, Measure] = {}
    for side, timer in timers.items():
        if name.startswith("Lazy"):
            timer.allocator.wait_until_grown()
        measures[side] = timer.allocate
        measures[f"{side} free"] = timer.free
    samples = time_in_rounds(measures, rounds)
    label: Row = {"operation": name, "blocks": num_blocks}
    allocated = compared({side: samples[side] for side in timers})
    freed = compared({side: samples[f"{side} free"] for side in timers})
    for timer in timers.values():
        timer.allocator.close()
    return [label | allocated], [label | freed]


def measure_options(rounds: int) -> list[Row]:
    buffers = [torch.zeros(OPTION_BLOCKS * BLOCK_BYTES, dtype=torch.uint8) for _ in range(5)]
    heaps = {
        "none": TensorMemoryAllocator(buffers[0]),
        "trace_frames=4": TensorMemoryAllocator(buffers[1], trace_frames=4),
        "record_stream": TensorMemoryAllocator(buffers[2]),
        "scrub": TensorMemoryAllocator(buffers[3], scrub=True),
        "debug": TensorMemoryAllocator(buffers[4], debug=True),
    }
    stream = PassedStream()

    def pair(option: str, heap: TensorMemoryAllocator) -> None:
        batch = heap.batched_allocate(SHAPE, torch.uint8, OPTION_BLOCKS)
        assert batch is not None
        if option == "record_stream":
            batch.record_stream(stream)
        heap.batched_free(batch)

    measures = {
        option: on_the_host([lambda option=option, heap=heap: pair(option, heap)] * 100)
        for option, heap in heaps.items()
    }
    samples = time_in_rounds(measures, rounds)
    return [
        {
            "operation": option,
            "kvheap": timing.percentiles(),
            "times_as_slow": round(1 / timing.speed_against(samples["none"]), 2),
        }
        for option, timing in samples.items()
    ]


def measure_leaks(rounds: int) -> list[Row]:
    heap = TensorMemoryAllocator(torch.empty(HEAP_BYTES, dtype=torch.uint8), trace_frames=4)
    held = [heap.allocate(SHAPE, torch.uint8) for _ in range(LIVE_BATCHES)]
    samples = time_in_rounds({"kvheap": on_the_host([heap.leaks])}, rounds)
    return [{"operation": "leaks", "blocks": len(held)} | compared(samples)]


def draw(plt: ModuleType, tables: dict[str, list[Row]], machine: Row, path: Path) -> None:
    """Bars of a single block, and lines over the blocks of a batch; logarithmic."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    names = [row["operation"] for row in tables["single"]]
    for offset, side, color in ((-0.2, "kvheap", "tab:blue"), (0.2, PEER, "tab:orange")):
        found = [(i, row[side]["p50_us"]) for i, row in enumerate(tables["single"]) if side in row]
        places = [i + offset for i, _ in found]
        left.barh(places, [us for _, us in found], height=0.38, color=color, label=side)
        for table, style in (("allocate", "-"), ("free", "--")):
            for number, name in enumerate(("TensorMemoryAllocator", "PagedTensorMemoryAllocator")):
                rows = [r for r in tables[table] if r["operation"] == name and side in r]
                label = f"{side}: {name.removesuffix('MemoryAllocator')} {table}"
                points = [(row["blocks"], row[side]["p50_us"]) for row in rows]
                if points:
                    marker = "os"[number]
                    xs, ys = zip(*points, strict=True)
                    right.plot(xs, ys, style, marker=marker, color=color, label=label)
    left.set_yticks(range(len(names)), [name.removesuffix("MemoryAllocator") for name in names])
    left.invert_yaxis()
    left.set_title("allocate + free of one block")
    left.set_xlabel("microseconds of the host")
    left.legend()
    right.set_title("one batch")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("blocks in the batch")
    right.set_ylabel("microseconds of the host")
    right.legend(fontsize=7)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.suptitle(f"Allocators, {machine['device']}, {machine['date'][:10]}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0])
    logging.disable(logging.WARNING)  # LMCache logs a line for much of what it does
    console, rounds = make_console(), 5 if arguments.quick else 11
    batches = (64, 1_024) if arguments.quick else (64, 1_024, 16_384)
    machine = describe_machine(torch.device("cpu"))
    has_peer = bool(peer_makers(1 << 20))
    console.print(f"{machine['device']}, {machine['versions']}")
    if not has_peer:
        console.print("lmcache is not installed: kvheap's figures stand alone")
    tables: dict[str, list[Row]] = {"construct": [], "single": [], "allocate": [], "free": []}
    for name in track(makers(1 << 20), "measuring", console=console, transient=True):
        tables["construct"] += measure_construct(name, rounds)
        tables["single"] += measure_single(name, rounds)
        for num_blocks in batches:
            allocated, freed = measure_batch(name, num_blocks, rounds)
            tables["allocate"] += allocated
            tables["free"] += freed
        gc.collect()
    tables["options"] = measure_options(rounds)
    tables["leaks"] = measure_leaks(rounds)
    print_times(console, "make an allocator, us", tables["construct"])
    print_times(console, "allocate + free one block of 4 KiB, us", tables["single"])
    print_times(console, "batched_allocate of N blocks of 4 KiB, us", tables["allocate"])
    print_times(console, "batched_free of the same, us", tables["free"])
    for row in tables["options"]:
        microseconds, factor = row["kvheap"]["p50_us"], row["times_as_slow"]
        console.print(f"{OPTION_BLOCKS} blocks, {row['operation']}: {microseconds} us, {factor}x")
    print_times(console, "leaks(), us", tables["leaks"])
    configuration = {
        "quick": arguments.quick,
        "rounds": rounds,
        "block_bytes": BLOCK_BYTES,
        "times_as_fast": "median over rounds of the peer's time over kvheap's",
        "times_as_slow": "median over rounds of the time over that without options",
    }
    path = write_json(arguments.out, "allocators", machine, configuration, tables)
    console.print(f"wrote {path}")
    plt = pyplot(console)
    if plt is not None:
        draw(plt, tables, machine, path.with_suffix(".png"))
        console.print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
