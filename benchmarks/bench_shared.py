"""Chunks that processes of a host share: time to look up, read and store, beside what one writes.

One process owns a pool, and this one, a replica, reads and stores chunks of 64 KiB in it. The pool
is on the tmpfs of ``/dev/shm``. The methods:

===========  =====================================================================================
method       what it does
===========  =====================================================================================
kvheap       ``SharedHeap.attach(...)``: ``store``, ``load``, ``lookup``, and ``hold``, which reads
             nothing; the owner is another process
files        a file for each chunk in ``/dev/shm``: written under another name and renamed; opened,
             read and closed; looked up by ``os.stat``. Nobody evicts, and nothing is checked
lmdb         bytes in ``multiprocessing.shared_memory``, places in LMDB, with its lock between
             processes, as one would write it by hand. Nobody evicts, and nothing is protected or
             checked: what a reader copies may be reused meanwhile
lmdb+xxh3    the same, with a checksum that is stored and compared
===========  =====================================================================================

A store copies from host memory, a load to host memory. Before each store, its chunks are removed,
which is not timed. Ratios are medians over rounds in which all methods take turns.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _report import Row, describe_machine, make_console, parse_common, write_results
from _timing import Measure, time_in_rounds
from rich.console import Console
from rich.table import Table

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat, SharedHeap

CHUNK = 64 << 10
LAYOUT = BlockLayout.of([2, 4, 16, 256], torch.float16, MemoryFormat.KV_2LTD)
COUNTS = (1, 16, 256)
NUM_PLACES = 1024

Views = list[memoryview]
Calls = dict[str, Measure]


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(call: Callable[[], object], before: Callable[[], object] = int) -> Measure:
    def measure() -> float:
        before()
        return seconds_of(call) * 1e6

    return measure


def keys_of(count: int) -> list[bytes]:
    return [b"a chunk of a prefix %08d" % number for number in range(count)]


# -- kvheap ----------------------------------------------------------------------------------------


def own(path: str) -> None:
    """Own a heap until the input ends."""
    with SharedHeap(path, NUM_PLACES * CHUNK, LAYOUT, namespace="bench", unlink=True):
        print("ready", flush=True)
        sys.stdin.read()


@contextmanager
def kvheap(count: int, source: torch.Tensor, target: torch.Tensor, folder: Path) -> Iterator[Calls]:
    path = str(folder / "heap")
    command = [sys.executable, __file__, "--own", path]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdin is not None
    assert owner.stdout is not None
    owner.stdout.readline()
    keys = keys_of(count)
    heap = HostMemoryAllocator(count * CHUNK)
    into = heap.batched_allocate(list(LAYOUT.shapes[0]), torch.float16, count, LAYOUT.fmt)
    assert into is not None
    with SharedHeap.attach(path, LAYOUT, namespace="bench") as replica:
        blocks = source.view(torch.float16).view(count, *LAYOUT.shapes[0])
        replica.store(keys, blocks)

        def hold() -> None:
            replica.hold(keys).release()

        yield {
            "lookup": timed(lambda: replica.lookup(keys)),
            "hold": timed(hold),
            "load": timed(lambda: replica.load(keys, into)),
            "store": timed(lambda: replica.store(keys, blocks), lambda: replica.remove(keys)),
        }
        assert bytes(into[count - 1].byte_view) == bytes(source[-CHUNK:].numpy())
    owner.stdin.close()
    owner.wait()


# -- peers -----------------------------------------------------------------------------------------


@contextmanager
def files(count: int, source: torch.Tensor, target: torch.Tensor, folder: Path) -> Iterator[Calls]:
    paths = [str(folder / key.decode()) for key in keys_of(count)]
    read_from, write_to = views_of(source), views_of(target)

    def store() -> None:
        for view, path in zip(read_from, paths, strict=True):
            fd = os.open(f"{path}.new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.write(fd, view)
            os.close(fd)
            os.replace(f"{path}.new", path)

    def load() -> None:
        for view, path in zip(write_to, paths, strict=True):
            fd = os.open(path, os.O_RDONLY)
            os.readv(fd, [view])
            os.close(fd)

    def remove() -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                os.remove(path)

    store()
    yield {
        "lookup": timed(lambda: [os.stat(path) for path in paths]),
        "load": timed(load),
        "store": timed(store, remove),
    }
    assert torch.equal(source, target)
    remove()


def lmdb_pool(with_checksums: bool) -> Callable[..., Any]:
    @contextmanager
    def pool(
        count: int, source: torch.Tensor, target: torch.Tensor, folder: Path
    ) -> Iterator[Calls]:
        import lmdb
        import xxhash

        digest = xxhash.xxh3_64_intdigest if with_checksums else len
        value = struct.Struct("<QQ")
        keys = keys_of(count)
        read_from, write_to = views_of(source), views_of(target)
        memory = SharedMemory(create=True, size=NUM_PLACES * CHUNK)
        buffer = memory.buf
        buffer[:] = bytes(len(buffer))
        index = lmdb.open(str(folder / "index"), subdir=False, map_size=64 << 20, sync=False)
        free = list(range(NUM_PLACES))

        def store() -> None:
            places = [free.pop() for _ in keys]
            for view, place in zip(read_from, places, strict=True):
                buffer[place * CHUNK : (place + 1) * CHUNK] = view
            with index.begin(write=True) as transaction:
                for key, place, view in zip(keys, places, read_from, strict=True):
                    transaction.put(key, value.pack(place, digest(view)))

        def load() -> None:
            with index.begin() as transaction:
                found = [value.unpack(transaction.get(key)) for key in keys]
            for view, (place, expected) in zip(write_to, found, strict=True):
                view[:] = buffer[place * CHUNK : (place + 1) * CHUNK]
                if digest(view) != expected:
                    raise RuntimeError("damaged")

        def lookup() -> None:
            with index.begin() as transaction:
                [transaction.get(key) is not None for key in keys]

        def remove() -> None:
            with index.begin(write=True) as transaction:
                for key in keys:
                    found = transaction.pop(key)
                    if found is not None:
                        free.append(value.unpack(found)[0])

        store()
        yield {
            "lookup": timed(lookup),
            "load": timed(load),
            "store": timed(store, remove),
        }
        assert torch.equal(source, target)
        index.close()
        memory.close()
        memory.unlink()

    return pool


METHODS: dict[str, Callable[..., Any]] = {
    "kvheap": kvheap,
    "files": files,
    "lmdb": lmdb_pool(False),
    "lmdb+xxh3": lmdb_pool(True),
}


def views_of(tensor: torch.Tensor) -> Views:
    whole = memoryview(tensor.numpy())  # type: ignore[arg-type]  # an array is a Buffer
    return [whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK)]


# -- measure ---------------------------------------------------------------------------------------


def measure(rounds: int) -> list[Row]:
    rows: list[Row] = []
    for count in COUNTS:
        source = torch.randint(0, 256, (count * CHUNK,), dtype=torch.uint8)
        target = torch.zeros_like(source)
        with ExitStack() as stack:
            made: dict[str, Calls] = {}
            for name, method in METHODS.items():
                folder = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="kvheap-bench-", dir="/dev/shm")
                )
                with suppress(ImportError):
                    made[name] = stack.enter_context(method(count, source, target, Path(folder)))
            for call in ("lookup", "hold", "load", "store"):
                measures = {name: calls[call] for name, calls in made.items() if call in calls}
                samples = time_in_rounds(measures, rounds)
                for name, timing in samples.items():
                    rows.append(
                        {
                            "call": call,
                            "chunks": count,
                            "method": name,
                            **timing.percentiles(),
                            "us_per_chunk": round(timing.percentile(50) / count, 2),
                            "kvheap_speed": round(samples["kvheap"].speed_against(timing), 3),
                        }
                    )
    return rows


def print_rows(console: Console, rows: list[Row]) -> None:
    names = list(METHODS)
    table = Table(title="us per chunk of 64 KiB; in brackets kvheap's speed over it")
    for name in ("call", "chunks", *names):
        table.add_column(name, justify="left" if name == "call" else "right")
    for key in dict.fromkeys((row["call"], row["chunks"]) for row in rows):
        cells = {
            row["method"]: f"{row['us_per_chunk']}"
            + ("" if row["method"] == "kvheap" else f" ({row['kvheap_speed']:.2f}x)")
            for row in rows
            if (row["call"], row["chunks"]) == key
        }
        table.add_row(key[0], str(key[1]), *(cells.get(name, "") for name in names))
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """A panel for each call: us per chunk of each method, over the chunks of a call."""
    rows = found["calls"]
    figure, panels = plt.subplots(1, 3, figsize=(13, 4))
    for panel, call in zip(panels, ("lookup", "load", "store"), strict=True):
        for name in METHODS:
            line = [row for row in rows if (row["call"], row["method"]) == (call, name)]
            panel.plot(
                [row["chunks"] for row in line],
                [row["us_per_chunk"] for row in line],
                marker="o",
                label=name,
            )
        panel.set_title(call)
        panel.set_xlabel("chunks of a call")
        panel.set_ylabel("us per chunk")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(f"64 KiB chunks that processes share, {found['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--own"]:
        own(sys.argv[2])
        return
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console, machine = make_console(), describe_machine(torch.device("cpu"))
    rounds = 5 if arguments.quick else 40
    rows = measure(rounds)
    print_rows(console, rows)
    configuration = {"chunk_bytes": CHUNK, "places": NUM_PLACES, "rounds": rounds}
    tables = {"calls": rows}
    write_results(console, arguments.out, "shared", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
