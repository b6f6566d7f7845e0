"""``kvheap replay``: reads the options, runs the replay, prints and writes the results."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from decimal import Decimal
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table
from rich.text import Text

from kvheap import __version__
from kvheap.addresses.address_manager import AddressManager
from kvheap.cli import CommandError, MachineError
from kvheap.cli.outputs import cannot_write, require_picture, require_writable
from kvheap.heaps.tensor_allocator import TensorMemoryAllocator
from kvheap.memory.available import available_bytes
from kvheap.prefix.policies import POLICIES, EvictionPolicy
from kvheap.prefix.space import RequestTooLargeError
from kvheap.replay.copies import EngineCopies
from kvheap.replay.engine_cache import ENGINE_LAYOUTS, EngineCache
from kvheap.replay.geometry import GEOMETRIES, Geometry
from kvheap.replay.hit_rates import hit_rate
from kvheap.replay.replay import FurtherTier, Replay
from kvheap.replay.samples import HeapSample
from kvheap.replay.trace import (
    Request,
    TraceError,
    infer_chunk_tokens,
    read_trace,
    synthetic_trace,
)

__all__ = ["parse_bytes", "run"]

DEFAULT_REQUESTS = 2000
"""Requests of made-up traffic, unless ``--requests`` says otherwise."""

MODEL_GEOMETRY, MODEL_HEAP, MODEL_REQUESTS = "qwen2.5-0.5b", "1GiB", 100
"""What is replayed if nothing is said: chunks of a real model, so that copies take their real time.
On two idle cores it takes about 10 s."""

MODEL_NEEDS_BYTES = 3 << 30
"""Available memory from which on they are the default: the heap, and twice that to spare."""

ROOM_FOR_REQUESTS = 4
"""How many of the largest request a heap should hold, for the advice in a message."""

SMALL_HEAP = "16MiB"

COMPARED_HEAPS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes of the heap for ``--compare``, as multiples of ``--heap``."""

PLOT_SAMPLES = 300
"""Samples of the heap for a picture."""

HEAP_BYTES_END = 1 << 63
"""``--heap`` must be below this: sizes of tensors are int64."""

_DEFAULT_GEOMETRIES = {
    "attention": "small",
    "nvfp4": "small-nvfp4",
    "latent": "small-mla",
    "indexer": "small-indexer",
    "opaque": "small-opaque",
}
"""The default geometry with an engine layout, by the kind of KV that the layout keeps."""

_COPIES = {
    "gather": "gathered",
    "scatter": "scattered",
    "load": "loaded into the engine",
    "store": "stored from the engine",
}
"""The label of each copy in the printed table."""

SPEED_FROM_BYTES = 4 << 20
"""Calls of fewer bytes on average take the time of a call, not that of bytes: no GB/s is shown."""

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4} | {
    f"{prefix}i": 1024 ** (power + 1) for power, prefix in enumerate("kmgt")
}


def run(options: argparse.Namespace) -> int:
    """Run the replay that the options describe, and return the exit status.

    Raises:
        CommandError: the options are wrong, a file cannot be read or written, or there is too
            little memory.
    """
    device = _device(options.device)
    _choose_defaults(options, device)
    geometry = _geometry(options.geometry, options.engine_layout)
    _require_chunk_tokens(options.chunk_tokens)
    heap_bytes = parse_bytes(options.heap)
    policy = _policy(options.policy)
    _require_outputs(options)
    requests = _requests(options)
    geometry = _with_chunks_of(geometry, options.chunk_tokens or infer_chunk_tokens(requests))
    _require_room(requests, geometry, heap_bytes)
    # The copies are timed by events on the current device.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        allocator = _allocator(heap_bytes, device, geometry)
        copies = None
        if options.engine_layout is not None:
            copies = EngineCopies(_engine(options, geometry, device))
        with _second_tier(options.peer, allocator, geometry) as tier:
            replay = Replay(allocator, geometry, copies, policy, tier)
            num_samples = PLOT_SAMPLES if options.plot or options.json else 0
            seconds = _replay(replay, requests, num_samples)
    name = options.trace.name if options.trace else f"made-up traffic, seed {options.seed}"
    figures = _figures(replay, seconds, name, options)
    if options.compare:
        figures |= _compared(requests, geometry, heap_bytes)
    try:  # before anything is printed, which may fail by itself
        _write(options, figures)
    except OSError as error:
        raise cannot_write(error.filename or "a result", error) from None
    Console().print(_table(figures))
    return 1 if replay.mismatches else 0


def parse_bytes(text: str, option: str = "--heap") -> int:
    """Parse a number of bytes with an optional unit: B, kB, MB, GB, TB, KiB, MiB, GiB or TiB.

    >>> parse_bytes("4096"), parse_bytes("1.5 GiB"), parse_bytes("2kB")
    (4096, 1610612736, 2000)

    Raises:
        CommandError: the text is not a positive number with a known unit, or exceeds int64.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    size = int(Decimal(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if not 0 < size < HEAP_BYTES_END:
        raise CommandError(
            f"{option} must be a positive number of bytes such as 64MiB, got {text!r}"
        )
    return size


def _choose_defaults(options: argparse.Namespace, device: torch.device) -> None:
    """Fill in what was not said: a real model's chunks if there is room for them."""
    is_open = (options.trace, options.geometry, options.engine_layout, options.heap) == (None,) * 4
    if is_open and _available_bytes(device) >= MODEL_NEEDS_BYTES:
        options.geometry, options.heap = MODEL_GEOMETRY, MODEL_HEAP
        options.requests = MODEL_REQUESTS if options.requests is None else options.requests
    elif options.heap is None:
        options.heap = SMALL_HEAP


def _available_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def _geometry(name: str | None, engine_layout: str | None) -> Geometry:
    if name is not None and name not in GEOMETRIES:
        raise CommandError(f"unknown geometry {name!r}; known are {', '.join(GEOMETRIES)}")
    if engine_layout is None:
        return GEOMETRIES[name or "tiny"]
    if engine_layout not in ENGINE_LAYOUTS:
        known = ", ".join(ENGINE_LAYOUTS)
        raise CommandError(f"unknown engine layout {engine_layout!r}; known are {known}")
    kind = ENGINE_LAYOUTS[engine_layout].kind
    geometry = GEOMETRIES[name or _DEFAULT_GEOMETRIES[kind]]
    if geometry.kind != kind:
        fitting = [each.name for each in GEOMETRIES.values() if each.kind == kind]
        raise CommandError(
            f"geometry {name} does not fit engine layout {engine_layout}; geometries that fit are "
            f"{', '.join(fitting)}"
        )
    return geometry


def _require_chunk_tokens(chunk_tokens: int | None) -> None:
    if chunk_tokens is not None and chunk_tokens <= 0:
        raise CommandError(f"--chunk-tokens must be positive, got {chunk_tokens}")


def _with_chunks_of(geometry: Geometry, chunk_tokens: int) -> Geometry:
    try:
        return geometry.with_chunks_of(chunk_tokens)
    except ValueError as error:
        raise CommandError(f"{error}: give another --chunk-tokens") from None


def _policy(name: str) -> EvictionPolicy:
    if name not in POLICIES:
        raise CommandError(f"unknown policy {name!r}; known are {', '.join(POLICIES)}")
    return POLICIES[name]()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CommandError(f"unknown device {name!r}; try cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise MachineError("--device cuda: torch sees no CUDA device here")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise MachineError(f"--device {name}: there are {torch.cuda.device_count()} devices")
    return device


def _require_outputs(options: argparse.Namespace) -> None:
    """Check before a long run that its results can be written."""
    if options.plot:
        require_picture(options.plot)
    for path in (options.json, options.plot):
        if path is not None:
            if options.trace is not None and _is_same_file(path, options.trace):
                raise CommandError(f"{path} is the trace itself: it would be overwritten")
            require_writable(path)


def _is_same_file(path: Path, other: Path) -> bool:
    """Whether two names are of one file, also by a link of either kind."""
    try:
        return path.samefile(other)
    except OSError:  # one of them does not exist yet
        return path.resolve() == other.resolve()


def _requests(options: argparse.Namespace) -> Sequence[Request]:
    limit: int | None = options.requests
    if limit is not None and limit <= 0:
        raise CommandError(f"--requests must be positive, got {limit}")
    if options.trace is None:
        return synthetic_trace(limit or DEFAULT_REQUESTS, options.seed)
    try:
        requests = read_trace(options.trace, limit)
    except TraceError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"cannot read {options.trace}: {error.strerror}") from None
    if not requests:
        raise CommandError(f"{options.trace} holds no request")
    return requests


def _require_room(requests: Sequence[Request], geometry: Geometry, heap_bytes: int) -> None:
    largest = max(requests, key=lambda request: len(set(request.hash_ids)))
    needed = len(set(largest.hash_ids)) * geometry.chunk_bytes
    if needed > heap_bytes:
        advised = -(-ROOM_FOR_REQUESTS * needed >> 30)
        raise CommandError(
            f"a heap of {_bytes(heap_bytes)} is smaller than the request at "
            f"{largest.timestamp_ms} ms: {len(set(largest.hash_ids))} chunks of "
            f"{_bytes(geometry.chunk_bytes)} ({geometry.name}); give --heap {advised}GiB to keep "
            f"several requests, {_bytes(needed)} at least, or a smaller --geometry"
        )


def _allocator(heap_bytes: int, device: torch.device, geometry: Geometry) -> TensorMemoryAllocator:
    try:
        buffer = torch.empty(heap_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch's out-of-memory errors
        reason = str(error).splitlines()[0].partition("DefaultCPUAllocator: ")
        words = f"{device} has no room for a heap of {_bytes(heap_bytes)}: give a smaller --heap"
        raise MachineError(f"{words} ({reason[2] or reason[0]})") from None
    chunk_bytes = 1 << (geometry.chunk_bytes - 1).bit_length()
    align_bytes = min(AddressManager.ALIGN_BYTES, chunk_bytes)  # small chunks share a unit
    if heap_bytes < align_bytes:
        raise CommandError(f"a heap of {heap_bytes} bytes has no room for {align_bytes}")
    return TensorMemoryAllocator(buffer, align_bytes)


def _second_tier(
    size: str | None, allocator: TensorMemoryAllocator, geometry: Geometry
) -> AbstractContextManager[FurtherTier | None]:
    if size is None:
        return nullcontext()
    size_bytes = parse_bytes(size, "--peer")
    if allocator.device.type != "cpu":
        raise CommandError("--peer needs --device cpu")
    if size_bytes < geometry.chunk_bytes:
        raise CommandError(f"--peer {size} has no room for a chunk of {geometry.chunk_bytes} bytes")
    from kvheap.replay.second_tier import SecondTier

    try:
        return SecondTier(allocator, geometry, size_bytes)
    except ImportError as error:
        raise MachineError(f"--peer: {error}") from None
    except (OSError, RuntimeError) as error:
        raise MachineError(f"--peer: {error}") from error


def _engine(options: argparse.Namespace, geometry: Geometry, device: torch.device) -> EngineCache:
    try:
        return EngineCache(options.engine_layout, geometry, device, seed=options.seed)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except RuntimeError as error:  # torch's out-of-memory errors
        reason = str(error).splitlines()[0]
        raise MachineError(f"{device} has no room for the engine's KV cache: {reason}") from None


def _replay(replay: Replay, requests: Sequence[Request], num_samples: int) -> float:
    """Run the replay under a progress bar, and return how many seconds it took."""
    console = Console(stderr=True)
    columns = (TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("replay", total=len(requests))
        try:
            replay.run(requests, num_samples, lambda done: progress.update(task, completed=done))
        except RequestTooLargeError as error:
            raise CommandError(str(error)) from None
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise MachineError(f"no room beside the heap for a request: {reason}") from None
    return perf_counter() - start


def _figures(
    replay: Replay, seconds: float, trace: str, options: argparse.Namespace
) -> dict[str, Any]:
    stats = replay.stats()
    device = replay.heap.heap.device
    is_cuda = device.type == "cuda"
    return {
        "kind": "replay",
        "requests": replay.requests,
        "block_refs": replay.block_refs,
        "hits": replay.hits,
        "hit_rate": replay.hits / replay.block_refs if replay.block_refs else 0.0,
        "stored": replay.stored,
        "resident": replay.resident,
        "evicted": replay.store.stats().evicted_chunks,
        "fetched": replay.fetched if options.peer else None,
        "mismatches": replay.mismatches,
        "utilization_peak": replay.utilization_peak,
        "utilization_final": stats.utilization,
        "free_extents": stats.free_extents,
        "largest_free_bytes": stats.largest_free_bytes,
        "batched_allocate_us": _percentiles(replay.heap.allocations),
        "batched_free_us": _percentiles(replay.heap.frees),
        **{f"{name}_gbps": speed for name, speed in replay.speeds_gbps().items()},
        **{
            f"{name}_call": None if call is None else {"us": call[0], "bytes": call[1]}
            for name, call in replay.copy_calls().items()
        },
        "seconds": seconds,
        "device": torch.cuda.get_device_name(device) if is_cuda else f"cpu ({platform.machine()})",
        "geometry": replay.geometry.name,
        "chunk_bytes": replay.geometry.chunk_bytes,
        "chunk_tokens": replay.geometry.chunk_tokens,
        "engine_layout": options.engine_layout,
        "policy": options.policy,
        "heap_bytes": stats.heap_bytes,
        "trace": trace,
        "samples": [_sample(sample) for sample in replay.samples],
        "versions": {
            "kvheap": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def _compared(
    requests: Sequence[Request], geometry: Geometry, heap_bytes: int
) -> dict[str, object]:
    """Hit rates of each policy with heaps of several sizes, and of one that never evicts."""
    ids = [request.hash_ids for request in requests]
    largest = max(len(set(each)) for each in ids)
    all_chunks = max(len({key for each in ids for key in each}), 1)
    sizes = [int(share * heap_bytes) for share in COMPARED_HEAPS]
    runs = [
        (size, size // geometry.chunk_bytes, policy)
        for size in sizes
        if size // geometry.chunk_bytes >= largest
        for policy in POLICIES
    ]
    console = Console(stderr=True)
    rows = [
        {
            "heap_bytes": size,
            "policy": policy,
            "hit_rate": hit_rate(ids, POLICIES[policy](), capacity),
        }
        for size, capacity, policy in track(
            runs, "compare", console=console, disable=not console.is_terminal
        )
    ]
    return {"compared": rows, "most_hits": hit_rate(ids, POLICIES["lru"](), all_chunks)}


def _write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    if options.json:
        samples = [json.dumps(sample) for sample in figures["samples"]]
        text = json.dumps({**figures, "samples": []}, indent=2)
        lines = ",\n".join(f"    {sample}" for sample in samples)
        options.json.write_text(text.replace('"samples": []', f'"samples": [\n{lines}\n  ]') + "\n")
    if options.plot:
        from kvheap.cli.replay_plot import draw

        draw(options.plot, figures)


def _sample(sample: HeapSample) -> dict[str, Any]:
    """A sample as JSON: for each range of addresses, the age of its chunks, null if mostly free."""
    is_known = (sample.occupancy > 0.5) & ~np.isnan(sample.age_ms)
    return {
        "timestamp_ms": sample.timestamp_ms,
        "utilization": round(sample.utilization, 6),
        "hits": sample.hits,
        "block_refs": sample.block_refs,
        "age_s": [
            round(age_ms / 1000, 1) if known else None
            for age_ms, known in zip(sample.age_ms.tolist(), is_known.tolist(), strict=True)
        ],
    }


def _percentiles(calls: Sequence[tuple[float, int]]) -> dict[str, float | None]:
    """p50 and p99, in us, of the time of each call and of that time divided by its blocks."""
    if not calls:
        return {"p50": None, "p99": None, "p50_per_block": None, "p99_per_block": None}
    seconds, blocks = np.array(calls).T
    whole = np.percentile(seconds, (50, 99)) * 1e6
    share = np.percentile(seconds / blocks, (50, 99)) * 1e6
    return {
        "p50": float(whole[0]),
        "p99": float(whole[1]),
        "p50_per_block": float(share[0]),
        "p99_per_block": float(share[1]),
    }


def _table(figures: dict[str, Any]) -> Table:
    """What happened, what one call takes, how fast bytes move, and the heap at the end."""
    title = f"{figures['trace']}: {figures['geometry']} in {_bytes(figures['heap_bytes'])}"
    table = Table(title=Text(f"{title} on {figures['device']}"), show_header=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    if figures["engine_layout"]:
        table.add_row("engine layout", figures["engine_layout"])
    table.add_row("policy", figures["policy"])
    chunk = f"{figures['chunk_tokens']:,} tokens, {_bytes(figures['chunk_bytes'])}"
    table.add_row("a chunk", chunk)
    for name in ("requests", "block_refs"):
        table.add_row(name.replace("block_refs", "references to chunks"), f"{figures[name]:,}")
    table.add_row("hits", f"{figures['hits']:,} ({figures['hit_rate']:.2%})")
    table.add_row("stored", f"{figures['stored']:,}")
    table.add_row("resident (there, but behind a gap)", f"{figures['resident']:,}")
    table.add_row("evicted", f"{figures['evicted']:,}")
    if figures["fetched"] is not None:
        table.add_row("fetched from the second process", f"{figures['fetched']:,}")
    style = "bold red" if figures["mismatches"] else "green"
    table.add_row("mismatches", f"{figures['mismatches']:,}", style=style, end_section=True)
    _add_calls(table, figures)
    _add_speeds(table, figures)
    peak, final = figures["utilization_peak"], figures["utilization_final"]
    table.add_row("utilisation peak / final", f"{peak:.2%} / {final:.2%}")
    table.add_row("free extents", f"{figures['free_extents']:,}")
    table.add_row("largest free extent", _bytes(figures["largest_free_bytes"]))
    table.add_row("time", f"{figures['seconds']:.1f} s")
    _add_compared(table, figures.get("compared", ()))
    return table


def _add_calls(table: Table, figures: dict[str, Any]) -> None:
    """Latencies: whole calls, p50 and p99; and what a call copies."""
    for name, note in (("batched_allocate", ", with its copy"), ("batched_free", "")):
        times = figures[f"{name}_us"]
        table.add_row(f"{name}{note}, p50 / p99", _pair(times["p50"], times["p99"]))
        shares = _pair(times["p50_per_block"], times["p99_per_block"])
        table.add_row(f"{name}{note}, a chunk", shares)
    for name, words in _COPIES.items():
        if f"{name}_gbps" in figures:
            call = figures[f"{name}_call"]
            cost = f"{_times(call['us'])} for {_bytes(call['bytes'])}" if call else "-"
            table.add_row(f"{words}, a call", cost)
    table.add_section()


def _add_speeds(table: Table, figures: dict[str, Any]) -> None:
    """Bandwidths, if calls move so many bytes that these decide."""
    for name, words in _COPIES.items():
        speed, call = figures.get(f"{name}_gbps"), figures.get(f"{name}_call")
        if speed is not None and call is not None and call["bytes"] >= SPEED_FROM_BYTES:
            table.add_row(words, f"{speed:.2f} GB/s")
    table.add_section()


def _add_compared(table: Table, compared: Sequence[Mapping[str, Any]]) -> None:
    """Hit rates by policy, a row for each size of the heap."""
    if not compared:
        return
    table.add_section()
    table.add_row("hits with", " / ".join(dict.fromkeys(row["policy"] for row in compared)))
    for size in dict.fromkeys(row["heap_bytes"] for row in compared):
        rates = [row["hit_rate"] for row in compared if row["heap_bytes"] == size]
        table.add_row(f"in {_bytes(size)}", " / ".join(f"{rate:.1%}" for rate in rates))


def _pair(first_us: float | None, second_us: float | None) -> str:
    return "-" if first_us is None or second_us is None else _times(first_us, second_us)


def _times(*times_us: float) -> str:
    """Times in microseconds, or if the first is a millisecond or more, in milliseconds."""
    unit, unit_us = ("us", 1.0) if times_us[0] < 1000 else ("ms", 1000.0)
    return " / ".join(f"{time_us / unit_us:,.2f}" for time_us in times_us) + f" {unit}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
