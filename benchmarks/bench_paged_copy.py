"""Store and load of paged KV caches, compared with one plain ``copy_`` of as many bytes.

An engine's cache has twice as many slots as there are tokens. A store copies the tokens of all
layers into chunks of 256 tokens in a heap, [2, L, 256, H * C] or [1, L, 256, D]; a load copies them
back. The places of the tokens:

=========  =======================================================================================
pattern    how the tokens are named
=========  =======================================================================================
blocks     whole blocks in random order, as ``BlockIds``
runs       the same, in runs of 8 neighbouring blocks in random order (CPU only)
tokens     each token in a random slot, as a slot mapping
=========  =======================================================================================

Every method moves the same bytes in the same round:

================  ================================================================================
method            what runs
================  ================================================================================
copy_             one contiguous ``Tensor.copy_``: the ceiling that shares refer to
kvheap            ``kvheap.store`` or ``kvheap.load``; on a GPU, with slots or block ids on it
kvheap + upload   the same with slots or block ids on the host (GPU only)
LMCache           its CPU implementation of the same transfer, ``multi_layer_kv_transfer``, once per
                  chunk, by slots (CPU only; it has none for HND; see ``_lmcache.py``)
index             one ``index_select`` or ``index_copy_`` of int64 words per layer, on blocks where
                  they are contiguous; it does not fill chunks but [L, planes, tokens, heads]
loop              one ``copy_`` per block and layer (on a GPU, only the first 512)
list              a Triton kernel of 12 programs over (source, target, bytes), as vLLM's for
                  offloading; the list is on the device, and its first 16,384 entries are copied
================  ================================================================================

Bytes are read + written, without slots and addresses. On a GPU, ``copy_`` and ``kvheap`` are queued
behind a kernel that keeps the GPU busy until all calls are submitted. Their times therefore exclude
submission, and include the upload of the chunks' addresses, which is part of every call and the
reason why they are not replayed from a CUDA graph. ``index`` and ``list`` are replayed from one.
``kvheap + upload`` and ``loop`` include their submission, as a caller would see it. Several sets of
tensors take turns, so that one turn moves at least four times the L2. A table of its own has the
host time to submit one call. Before a case is timed, the bytes of every method that moves
everything are checked.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from _lmcache import machine_with_lmcache
from _paged_cases import (
    CHUNK_TOKENS,
    CPU_GEOMETRIES,
    GPU_GEOMETRIES,
    LLAMA_8B,
    OPERATIONS,
    PATTERNS,
    RUN_BLOCKS,
    SLOTS_PER_TOKEN,
    Case,
    Geometry,
    World,
)
from _paged_peers import LMCache, calls_of, check, moved_shares
from _paged_plot import draw
from _report import (
    Row,
    grouped,
    make_console,
    parse_common,
    print_submission,
    size_label,
    write_results,
)
from _timing import (
    Call,
    Measure,
    Samples,
    in_a_graph,
    on_the_host,
    on_the_stream,
    submission,
    time_in_rounds,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

LONGEST_SLEEP = 1 << 28
"""Cycles that the device is kept busy at most while calls are submitted."""

TARGET_TIMES_LMCACHE = 2.0
TARGET_SUBMISSION_US = 30.0
TARGET_FROM_BYTES = 64 << 20
"""Bytes read from which on shares are judged; below, launches count more than copying."""

MEMORY_SHARE = 0.8
"""The share of a GPU's free memory that all sets of a case may take."""

SECONDS_ON_GPU = 85
"""Cases that have not begun by then are left out; they are the largest."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    geometries: tuple[Geometry, ...]
    token_counts: tuple[int, ...]
    patterns: tuple[str, ...]
    rounds: int
    submitted_tokens: tuple[int, ...]

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Scale:
        """The scale for a minute or two on this kind of device; quick: for some seconds."""
        if device.type != "cuda":
            counts = (512 if quick else 1024,)
            return cls(CPU_GEOMETRIES, counts, tuple(PATTERNS), 3 if quick else 15, ())
        token_counts = (64, 8192) if quick else (64, 1024, 8192, 32_768, 131_072)
        submitted = (64, 8192) if quick else (64, 1024, 8192, 32_768)
        return cls(GPU_GEOMETRIES, token_counts, ("blocks", "tokens"), 5 if quick else 7, submitted)


# -- timing ----------------------------------------------------------------------------------------


def behind_a_sleep(calls: Sequence[Call]) -> Measure:
    """Device time of the mean call; the device is kept busy until all calls are submitted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 1 << 20

    def measure() -> float:
        nonlocal cycles
        while True:
            torch.cuda._sleep(cycles)
            start.record()
            for call in calls:
                call()
            end.record()
            is_hidden = not start.query()
            end.synchronize()
            if is_hidden:
                return float(start.elapsed_time(end)) * 1e3 / len(calls)
            cycles *= 2
            if cycles > LONGEST_SLEEP:
                raise RuntimeError("the device became idle before all calls were submitted")

    return measure


def timed(method: str, calls: Sequence[Call], device: torch.device) -> Measure:
    if device.type != "cuda":
        return on_the_host(calls)
    if method in ("copy_", "kvheap"):
        return behind_a_sleep(calls)
    return in_a_graph(calls) if method in ("index", "list") else on_the_stream(calls)


def measure_group(
    worlds: list[World], pattern: str, operation: str, scale: Scale, lmcache: LMCache | None
) -> list[Row]:
    """Time every method on one case; a row each."""
    device = worlds[0].cache.device
    cases = [Case.make(world, pattern, seed) for seed, world in enumerate(worlds)]
    of_each = [calls_of(case, operation, lmcache) for case in cases]
    shares = moved_shares(cases[0])
    for method, call in of_each[0].items():
        if method != "copy_" and shares.get(method, 1.0) == 1.0:
            check(cases[0], operation, method, call)
    measures = {
        method: timed(method, [calls[method] for calls in of_each], device) for method in of_each[0]
    }
    samples = time_in_rounds(measures, scale.rounds)
    return [
        labels_of(worlds[0], pattern, operation)
        | {"method": method}
        | figures(samples, method, worlds[0].side_bytes, shares.get(method, 1.0))
        for method in samples
    ]


def labels_of(world: World, pattern: str, operation: str) -> Row:
    geometry = world.geometry
    return {
        "operation": operation,
        "pattern": pattern,
        "model": geometry.model,
        "layout": geometry.layout,
        "num_tokens": world.num_tokens,
        "block_size": geometry.block_size,
        "run_bytes": geometry.run_bytes(pattern),
        "side_bytes": world.side_bytes,
    }


def figures(samples: dict[str, Samples], method: str, side_bytes: int, share: float) -> Row:
    timing = samples[method]
    bytes_moved = 2 * side_bytes * share
    row: Row = {
        "bytes_read_and_written": round(bytes_moved),
        **timing.percentiles(),
        "gb_per_s": round(bytes_moved / timing.percentile(50) / 1e3, 2),
        "share_of_copy": round(timing.speed_against(samples["copy_"], share), 4),
    }
    if method == "kvheap" and "LMCache" in samples:
        row["times_lmcache"] = round(timing.speed_against(samples["LMCache"]), 2)
    return row


def num_sets(device: torch.device, side_bytes: int) -> int:
    if device.type != "cuda":
        return 2
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-4 * l2_bytes // (2 * side_bytes)))


def memory_needed(device: torch.device, geometry: Geometry, num_tokens: int) -> int:
    """Bytes of all sets of a case, and of the temporary tensors of checks and indices."""
    chunk_tokens = -(-num_tokens // CHUNK_TOKENS) * CHUNK_TOKENS
    set_bytes = (SLOTS_PER_TOKEN * num_tokens + chunk_tokens) * geometry.token_bytes
    sets = num_sets(device, num_tokens * geometry.token_bytes)
    return sets * set_bytes + 6 * num_tokens * geometry.num_planes * geometry.row_bytes


def fits(device: torch.device, geometry: Geometry, num_tokens: int) -> bool:
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return memory_needed(device, geometry, num_tokens) <= MEMORY_SHARE * free_bytes


def measure_size(
    device: torch.device,
    geometry: Geometry,
    num_tokens: int,
    scale: Scale,
    lmcache: LMCache | None,
) -> list[Row]:
    """Measure all patterns and operations for one geometry and number of tokens."""
    count = num_sets(device, num_tokens * geometry.token_bytes)
    worlds = [World.make(device, geometry, num_tokens) for _ in range(count)]
    rows = []
    for pattern, operation in itertools.product(scale.patterns, OPERATIONS):
        rows += measure_group(worlds, pattern, operation, scale, lmcache)
        gc.collect()  # graphs hold memory
    return rows


def measure_all(
    device: torch.device, scale: Scale, lmcache: LMCache | None, console: Console
) -> tuple[list[Row], list[Row]]:
    """Measure all cases; rows in the order of the geometries, and the cases left out."""
    rows: list[Row] = []
    left_out: list[Row] = []
    end = time.monotonic() + (SECONDS_ON_GPU if device.type == "cuda" else float("inf"))
    sizes = list(itertools.product(scale.token_counts, scale.geometries))
    for num_tokens, geometry in track(sizes, "measuring", console=console, transient=True):
        case = {"case": geometry.name, "num_tokens": num_tokens}
        gc.collect()
        if time.monotonic() > end:
            left_out.append(case | {"reason": f"{SECONDS_ON_GPU} s were over"})
        elif not fits(device, geometry, num_tokens):
            gib = memory_needed(device, geometry, num_tokens) / 2**30
            left_out.append(case | {"reason": f"needs {gib:.1f} GiB"})
        else:
            rows += measure_size(device, geometry, num_tokens, scale, lmcache)
    order = [(geometry.model, geometry.layout) for geometry in scale.geometries]
    rows.sort(key=lambda row: order.index((row["model"], row["layout"])))
    return rows, left_out


def measure_submission(device: torch.device, scale: Scale) -> list[Row]:
    """Host time to submit one store on an idle GPU."""
    rows = []
    for num_tokens in scale.submitted_tokens:
        if not fits(device, LLAMA_8B, num_tokens):
            continue
        world = World.make(device, LLAMA_8B, num_tokens)
        measures = {}
        for pattern in ("blocks", "tokens"):
            calls = calls_of(Case.make(world, pattern, 0), "store", None)
            measures["copy_"] = submission(calls["copy_"])
            measures[f"{pattern} on the device"] = submission(calls["kvheap"])
            measures[f"{pattern} on the host"] = submission(calls["kvheap + upload"])
        for method, timing in time_in_rounds(measures, scale.rounds).items():
            rows.append({"method": method, "num_tokens": num_tokens, **timing.percentiles()})
        del world, measures, calls
        gc.collect()
    return rows


# -- report ----------------------------------------------------------------------------------------

GROUP = ("model", "layout", "pattern", "num_tokens", "operation")


def methods_of(rows: list[Row]) -> list[str]:
    """All methods but the ceiling, in their order."""
    return [method for method in dict.fromkeys(row["method"] for row in rows) if method != "copy_"]


def print_shares(console: Console, rows: list[Row]) -> None:
    methods = methods_of(rows)
    has_lmcache = "LMCache" in methods
    table = Table(title="Share of copy_ in the same rounds; copy_ in GB/s read + write")
    for title in ("model", "layout", "pattern"):
        table.add_column(title, overflow="fold")
    for title in ("tokens", "run", "", "copy_", *methods):
        table.add_column(title, justify="right")
    if has_lmcache:
        table.add_column("x LMCache", justify="right")
    last = None
    for key, group in grouped(rows, *GROUP).items():
        model, layout, pattern, num_tokens, operation = key
        if last is not None and last != key[:2]:
            table.add_section()
        run = size_label(group["copy_"]["run_bytes"])
        cells = [
            f"{group[m]['share_of_copy']:.1%}" if m in group else "" for m in ("copy_", *methods)
        ]
        cells[0] = f"{group['copy_']['gb_per_s']:,.1f}"
        if has_lmcache:
            times = group["kvheap"].get("times_lmcache")
            cells.append("" if times is None else f"{times:.2f}")
        names = (model, layout) if last != key[:2] else ("", "")
        table.add_row(*names, pattern, f"{num_tokens:,}", run, operation, *cells)
        last = key[:2]
    console.print(table)


def target_share(geometry: Geometry, pattern: str) -> float | None:
    """The share of ``copy_`` to reach on a GPU; None: no target."""
    run_bytes = geometry.run_bytes(pattern)
    if pattern != "tokens":
        return 0.92 if run_bytes >= 4096 else None
    if run_bytes >= 1024:
        return 0.85
    return 0.75 if geometry.layout == "mla" and run_bytes >= 576 else None


def targets_of(rows: list[Row], submitted: list[Row], on_gpu: bool) -> list[Row]:
    """Each target with the worst of the figures that it is for."""
    own = [row for row in rows if row["method"] == "kvheap"]
    if not on_gpu:
        compared = [r for r in own if r["pattern"] == "tokens" and "times_lmcache" in r]
        return [
            worst_of("LMCache's speed, tokens", TARGET_TIMES_LMCACHE, compared, "times_lmcache")
        ]
    targets: dict[tuple[str, float], list[Row]] = {}
    by_name = {(g.model, g.layout): g for g in GPU_GEOMETRIES}
    for row in own:
        target = target_share(by_name[row["model"], row["layout"]], row["pattern"])
        if target is not None and row["side_bytes"] >= TARGET_FROM_BYTES:
            targets.setdefault((row["pattern"], target), []).append(row)
    found = [
        worst_of(
            f"copy_, {pattern} of {size_label(min(r['run_bytes'] for r in judged))} and more",
            target,
            judged,
            "share_of_copy",
        )
        for (pattern, target), judged in targets.items()
    ]
    on_device = [row for row in submitted if row["method"].endswith("on the device")]
    if on_device:
        slowest = max(on_device, key=lambda row: row["p50_us"])
        reached = slowest["p50_us"] <= TARGET_SUBMISSION_US
        found.append(
            {
                "target": "us of the host to submit",
                "asked": TARGET_SUBMISSION_US,
                "worst": slowest["p50_us"],
                "where": f"{slowest['method']}, {slowest['num_tokens']:,} tokens",
                "reached": reached,
            }
        )
    return found


def worst_of(title: str, asked: float, rows: list[Row], figure: str) -> Row:
    if not rows:
        return {"target": title, "asked": asked, "worst": None, "where": "", "reached": None}
    worst = min(rows, key=lambda row: row[figure])
    where = ", ".join(worst[k] for k in ("model", "layout", "pattern", "operation"))
    return {
        "target": title,
        "asked": asked,
        "worst": worst[figure],
        "where": f"{where}, {worst['num_tokens']:,} tokens",
        "reached": worst[figure] >= asked,
    }


def print_targets(console: Console, targets: list[Row]) -> None:
    for target in targets:
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[target["reached"]]
        worst = "" if target["worst"] is None else f"; worst {target['worst']} ({target['where']})"
        console.print(f"target of {target['asked']} ({target['target']}): {verdict}{worst}")


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    device, console = arguments.device, make_console()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    scale = Scale.of(device, arguments.quick)
    lmcache = None if on_gpu else LMCache.find()
    machine = machine_with_lmcache(console, device, lmcache is not None)
    rows, left_out = measure_all(device, scale, lmcache, console)
    submitted = measure_submission(device, scale) if on_gpu else []
    targets = targets_of(rows, submitted, on_gpu)
    print_shares(console, rows)
    if submitted:
        title = f"Host time to submit one store, {LLAMA_8B.name}, us (p50)"
        print_submission(console, title, submitted, "num_tokens")
    print_targets(console, targets)
    for case in left_out:
        console.print(f"left out: {case['case']}, {case['num_tokens']:,} tokens: {case['reason']}")
    configuration = {
        "quick": arguments.quick,
        "rounds": scale.rounds,
        "chunk_tokens": CHUNK_TOKENS,
        "slots_per_token": SLOTS_PER_TOKEN,
        "run_blocks": RUN_BLOCKS,
        "bytes": "read + write, without slots and addresses",
        "share_of_copy": "median over rounds of the speed over copy_'s in the same round",
        "times_lmcache": "median over rounds of LMCache's time over kvheap's",
        "judged_from_side_bytes": TARGET_FROM_BYTES if on_gpu else 0,
    }
    tables = {"targets": targets, "copies": rows, "submission": submitted, "left_out": left_out}
    write_results(console, arguments.out, "paged_copy", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
