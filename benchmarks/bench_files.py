"""Chunks in files: time to store and load a batch, and to call for it.

A heap in host memory, and a ``FileTier`` of its chunks, of 64 KiB. *Runs*: the chunks of a call are
neighbours in the file and in memory. *Lone*: no two are, and they are asked for in random order.
Both through the page cache, with everything in it, and past it (``O_DIRECT``), if the file system
can do that. A tier computes and compares checksums, keeps an index and evicts; its peers do none of
that:

=============  ===================================================================================
method         what it does
=============  ===================================================================================
kvheap         ``tier.store(keys, batch).result()``, ``tier.load(keys, batch).result()``
calls          one file; ``pwrite`` or ``preadv``, a call for each chunk, one thread
files          a file for each chunk, as vLLM 0.33's ``fs`` tier does in Python: written under
               another name and renamed; opened, read and closed; one thread, as for a job there
memmap         ``numpy.memmap`` of one file, a copy for each chunk; through the page cache only
nixl           NIXL's POSIX backend, with one descriptor for each chunk, if it is installed
=============  ===================================================================================

Before each store of the tier, its chunks are removed; the peers overwrite, or delete their files
first. This is not timed. Another table has the host time until ``store`` and ``load`` return, and a
store and a load of one chunk until its end. Ratios are medians over rounds. The files are in
``TMPDIR``.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from _report import Row, describe_machine, make_console, parse_common, write_results
from _timing import Measure, time_in_rounds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvheap import BlockLayout, HostMemoryAllocator, MemoryBatch, MemoryFormat
from kvheap.files import FileTier, FileTransfer

CHUNK = 64 << 10
LAYOUT = BlockLayout.of([2, 4, 16, 256], torch.float16, MemoryFormat.KV_2LTD)

Views = list[memoryview]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    num_chunks: int
    rounds: int
    repeats: int

    @classmethod
    def of(cls, quick: bool) -> Scale:
        """The scale for a run of minutes; quick: of seconds."""
        return cls(256, 3, 4) if quick else cls(2_048, 15, 16)


@dataclass(frozen=True, slots=True)
class Case:
    """What is moved, and how.

    Attributes:
        pattern: ``runs`` or ``lone``.
        is_direct: past the page cache.
        folder: for the files.
        batch: the chunks in memory, in the order of the keys.
        places: the place of each chunk in the file.
    """

    pattern: str
    is_direct: bool
    folder: Path
    batch: MemoryBatch
    places: list[int]

    @property
    def flags(self) -> int:
        """For ``os.open``."""
        return os.O_DIRECT if self.is_direct else 0

    def views(self) -> Views:
        """The bytes of each chunk."""
        return [chunk.byte_view.cast("B") for chunk in self.batch]


Method = Callable[[Case], Any]


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# -- kvheap ----------------------------------------------------------------------------------------


@contextmanager
def kvheap(case: Case) -> Iterator[dict[str, Measure]]:
    count = len(case.batch)
    keys = [b"chunk %d" % number for number in range(count)]
    between = [b"between %d" % number for number in range(count)]
    size = 2 * count * CHUNK
    with FileTier(
        case.folder / "tier", size, LAYOUT, namespace="bench", direct=case.is_direct
    ) as tier:
        if case.is_direct and not tier.stats().is_direct:
            raise OSError("no O_DIRECT here")
        if case.pattern == "lone":  # every other place is taken: neighbours in the order of places
            mixed = [key for pair in zip(keys, between, strict=True) for key in pair]
            blocks = [block for block in case.batch for _ in range(2)]
            tier.store(mixed, blocks).result()
            keys = [keys[place // 2] for place in case.places]

        def store() -> float:
            tier.remove(keys)
            seconds = seconds_of(lambda: tier.store(keys, case.batch).result())
            return seconds * 1e6

        def load() -> float:
            return seconds_of(lambda: loaded(tier.load(keys, case.batch))) * 1e6

        yield {"store": store, "load": load}
        tier.check()


def loaded(loading: FileTransfer | None) -> None:
    assert loading is not None
    loading.result()


# -- peers -----------------------------------------------------------------------------------------


@contextmanager
def calls(case: Case) -> Iterator[dict[str, Measure]]:
    views = case.views()
    offsets = [place * CHUNK for place in case.places]
    fd = os.open(case.folder / "calls", os.O_RDWR | os.O_CREAT | case.flags, 0o600)
    try:

        def store() -> None:
            for view, offset in zip(views, offsets, strict=True):
                os.pwrite(fd, view, offset)

        def load() -> None:
            for view, offset in zip(views, offsets, strict=True):
                os.preadv(fd, [view], offset)

        store()
        yield {"store": lambda: seconds_of(store) * 1e6, "load": lambda: seconds_of(load) * 1e6}
    finally:
        os.close(fd)


@contextmanager
def files(case: Case) -> Iterator[dict[str, Measure]]:
    views = case.views()
    paths = [str(case.folder / f"{place:08d}.bin") for place in case.places]

    def store() -> None:
        for view, path in zip(views, paths, strict=True):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | case.flags
            fd = os.open(f"{path}.new", flags, 0o600)
            try:
                os.write(fd, view)
            finally:
                os.close(fd)
            os.replace(f"{path}.new", path)

    def load() -> None:
        for view, path in zip(views, paths, strict=True):
            fd = os.open(path, os.O_RDONLY | case.flags)
            try:
                os.readv(fd, [view])
            finally:
                os.close(fd)

    def store_anew() -> float:
        for path in paths:
            with suppress(FileNotFoundError):
                os.remove(path)
        return seconds_of(store) * 1e6

    store_anew()
    yield {"store": store_anew, "load": lambda: seconds_of(load) * 1e6}


@contextmanager
def memmap(case: Case) -> Iterator[dict[str, Measure]]:
    if case.is_direct:
        raise OSError("a mapping is of the page cache")
    arrays = [np.frombuffer(view, np.uint8) for view in case.views()]
    offsets = [place * CHUNK for place in case.places]
    size = max(offsets) + CHUNK
    mapped = np.memmap(case.folder / "memmap", np.uint8, "w+", shape=(size,))

    def store() -> None:
        for array, offset in zip(arrays, offsets, strict=True):
            mapped[offset : offset + CHUNK] = array

    def load() -> None:
        for array, offset in zip(arrays, offsets, strict=True):
            array[:] = mapped[offset : offset + CHUNK]

    store()
    yield {"store": lambda: seconds_of(store) * 1e6, "load": lambda: seconds_of(load) * 1e6}


@contextmanager
def nixl(case: Case) -> Iterator[dict[str, Measure]]:
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(f"bench-{os.getpid()}-{time.monotonic_ns()}", nixl_agent_config(backends=[]))
    agent.create_backend("POSIX")
    pointers = [np.frombuffer(view, np.uint8).ctypes.data for view in case.views()]
    offsets = [place * CHUNK for place in case.places]
    fd = os.open(case.folder / "nixl", os.O_RDWR | os.O_CREAT | case.flags, 0o600)
    try:
        os.ftruncate(fd, max(offsets) + CHUNK)
        memory = [(pointer, CHUNK, 0) for pointer in pointers]
        extents = [(offset, CHUNK, fd) for offset in offsets]
        spans = [(pointer, CHUNK, 0, "") for pointer in pointers]
        agent.register_memory(spans, "DRAM", backends=["POSIX"])
        agent.register_memory([(0, max(offsets) + CHUNK, fd, "")], "FILE", backends=["POSIX"])
        near, far = agent.get_xfer_descs(memory, "DRAM"), agent.get_xfer_descs(extents, "FILE")

        def move(direction: str) -> Measure:
            def once() -> None:
                handle = agent.initialize_xfer(direction, near, far, agent.name)
                state = agent.transfer(handle)
                while state == "PROC":
                    state = agent.check_xfer_state(handle)
                agent.release_xfer_handle(handle)
                if state != "DONE":
                    raise RuntimeError(f"NIXL: {state}")

            return lambda: seconds_of(once) * 1e6

        move("WRITE")()
        yield {"store": move("WRITE"), "load": move("READ")}
    finally:
        os.close(fd)


METHODS: dict[str, Method] = {
    "kvheap": kvheap,
    "calls": calls,
    "files": files,
    "memmap": memmap,
    "nixl": nixl,
}


# -- measure ---------------------------------------------------------------------------------------


def cases(scale: Scale, folder: Path) -> Iterator[Case]:
    count = scale.num_chunks
    heap = HostMemoryAllocator(3 * count * CHUNK)
    shape, dtype = list(LAYOUT.shapes[0]), LAYOUT.dtypes[0]
    in_a_row = heap.batched_allocate(shape, dtype, count, LAYOUT.fmt)
    around = heap.batched_allocate(shape, dtype, 2 * count, LAYOUT.fmt)
    assert around is not None
    heap.batched_free(around[::2])
    lone = heap.batched_allocate(shape, dtype, count, LAYOUT.fmt)  # takes the holes
    assert in_a_row is not None
    assert lone is not None
    assert (in_a_row.num_runs, lone.num_runs) == (1, count)
    heap.buffer.random_(0, 256)
    rng = np.random.default_rng(1)
    for is_direct in (False, True):
        for pattern in ("runs", "lone"):
            place = folder / f"{pattern}-{is_direct}"
            place.mkdir()
            if pattern == "runs":
                yield Case(pattern, is_direct, place, in_a_row, list(range(count)))
            else:
                places = (2 * rng.permutation(count)).tolist()
                yield Case(pattern, is_direct, place, lone, places)


def measure_moves(console: Console, scale: Scale, folder: Path) -> list[Row]:
    rows: list[Row] = []
    for case in track(list(cases(scale, folder)), "stores and loads", console=console):
        with ExitStack() as stack:
            made: dict[str, dict[str, Measure]] = {}
            for name, method in METHODS.items():
                with suppress(ImportError, OSError):
                    made[name] = stack.enter_context(method(case))
            if "kvheap" not in made:
                continue
            for call in ("store", "load"):
                measures = {name: of_one[call] for name, of_one in made.items()}
                samples = time_in_rounds(measures, scale.rounds)
                count = len(case.batch)
                for name, timing in samples.items():
                    median_us = timing.percentile(50)
                    rows.append(
                        {
                            "call": call,
                            "pattern": case.pattern,
                            "way": "O_DIRECT" if case.is_direct else "page cache",
                            "method": name,
                            "chunks": count,
                            **timing.percentiles(),
                            "us_per_chunk": round(median_us / count, 2),
                            "gb_per_s": round(count * CHUNK / median_us / 1e3, 3),
                            "kvheap_speed": round(samples["kvheap"].speed_against(timing), 3),
                        }
                    )
    return rows


def measure_calls(scale: Scale, folder: Path) -> list[Row]:
    """Host time until a call returns, and until one chunk is there."""
    rows: list[Row] = []
    heap = HostMemoryAllocator(2048 * CHUNK)
    shape, dtype = list(LAYOUT.shapes[0]), LAYOUT.dtypes[0]
    fd = os.open(folder / "one", os.O_RDWR | os.O_CREAT, 0o600)
    page = mmap.mmap(-1, CHUNK)
    os.pwrite(fd, page, 0)
    with FileTier(folder / "calls", 1024 * CHUNK, LAYOUT, namespace="bench", direct=False) as tier:
        for count in (1, 64, 1024):
            keys = [b"%d" % number for number in range(count)]
            batch = heap.batched_allocate(shape, dtype, count, LAYOUT.fmt)

            def returned(
                move: Callable[[Any, Any], Any], keys: list[bytes] = keys, batch: Any = batch
            ) -> Measure:
                def measure() -> float:
                    seconds = 0.0
                    for _ in range(scale.repeats):
                        start = time.perf_counter()
                        moving = move(keys, batch)
                        seconds += time.perf_counter() - start
                        moving.result()
                    return seconds * 1e6 / scale.repeats

                return measure

            measures = {"store returns": returned(tier.store), "load returns": returned(tier.load)}
            if count == 1:

                def ended(call: Callable[[], object]) -> Measure:
                    def measure() -> float:
                        return seconds_of(call) * 1e6

                    return measure

                def store_one(keys: list[bytes] = keys, batch: Any = batch) -> None:
                    tier.store(keys, batch).result()

                def store_one_anew(call: Callable[[], None] = store_one) -> float:
                    tier.remove([b"0"])
                    return seconds_of(call) * 1e6

                measures |= {
                    "store ends": store_one_anew,
                    "load ends": ended(lambda k=keys, b=batch: loaded(tier.load(k, b))),  # type: ignore[misc]
                    "pwrite": ended(lambda: os.pwrite(fd, page, 0)),
                    "preadv": ended(lambda: os.preadv(fd, [page], 0)),
                }
            for name, timing in time_in_rounds(measures, 2 * scale.rounds).items():
                rows.append({"call": name, "chunks": count, **timing.percentiles()})
    os.close(fd)
    return rows


# -- report ----------------------------------------------------------------------------------------


def print_moves(console: Console, rows: list[Row]) -> None:
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    table = Table(title="us per chunk of 64 KiB; in brackets GB/s, and kvheap's speed over it")
    for name in ("call", "pattern", "way", *names):
        table.add_column(name, justify="left" if name in ("call", "pattern", "way") else "right")
    keys = list(dict.fromkeys((row["call"], row["pattern"], row["way"]) for row in rows))
    for key in keys:
        cells = {
            row["method"]: f"{row['us_per_chunk']} ({row['gb_per_s']:.2f}"
            + ("" if row["method"] == "kvheap" else f", {row['kvheap_speed']:.2f}x")
            + ")"
            for row in rows
            if (row["call"], row["pattern"], row["way"]) == key
        }
        table.add_row(*key, *(cells.get(name, "") for name in names))
    console.print(table)


def print_calls(console: Console, rows: list[Row]) -> None:
    table = Table(title="us of the host, through the page cache")
    for name in ("call", "chunks", "p20", "p50", "p80"):
        table.add_column(name, justify="left" if name == "call" else "right")
    for row in rows:
        numbers = [f"{row[f'p{percent}_us']:,.1f}" for percent in (20, 50, 80)]
        table.add_row(row["call"], f"{row['chunks']:,}", *numbers)
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """A panel for each call and way: GB/s of each method, for runs and lone chunks."""
    rows = found["moves"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure, panels = plt.subplots(2, len(ways), figsize=(5.5 * len(ways), 7), squeeze=False)
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    for line, call in zip(panels, ("store", "load"), strict=True):
        for panel, way in zip(line, ways, strict=True):
            for at, name in enumerate(names):
                speeds = {
                    row["pattern"]: row["gb_per_s"]
                    for row in rows
                    if (row["call"], row["way"], row["method"]) == (call, way, name)
                }
                if speeds:
                    width = 0.8 / len(names)
                    spots = np.arange(2) + at * width
                    panel.bar(spots, [speeds["runs"], speeds["lone"]], width, label=name)
            panel.set_title(f"{call}, {way}")
            panel.set_xticks(np.arange(2) + 0.3, ["runs", "lone chunks"])
            panel.set_ylabel("GB/s")
            panel.grid(alpha=0.3, axis="y")
            panel.set_ylim(top=1.2 * panel.get_ylim()[1])
            panel.legend(fontsize=8, loc="upper center", ncols=len(names))
    figure.suptitle(f"64 KiB chunks in files, {found['device']}, {found['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console, scale = make_console(), Scale.of(arguments.quick)
    machine = describe_machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        moves = measure_moves(console, scale, Path(folder))
        made = Path(folder) / "calls"
        made.mkdir()
        host = measure_calls(scale, made)
    print_moves(console, moves)
    print_calls(console, host)
    configuration = {"chunk_bytes": CHUNK, "chunks": scale.num_chunks, "rounds": scale.rounds}
    write_results(
        console,
        arguments.out,
        "files",
        machine,
        configuration,
        {"moves": moves, "calls": host},
        draw,
    )


if __name__ == "__main__":
    main()
