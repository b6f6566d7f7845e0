"""Scatter and gather of equal blocks, compared with one plain ``copy_`` of as many bytes.

A heap has twice as many slots as there are blocks. Blocks lie in random slots, or in runs of 32
neighbouring slots in random order. Every method moves the same bytes in the same round:

=================  ===============================================================================
method             what runs
=================  ===============================================================================
copy_              one contiguous ``Tensor.copy_``: the ceiling that shares refer to
kvheap             ``scatter_blocks`` or ``gather_blocks``; on a GPU, with addresses on the device
kvheap + upload    the same with host addresses, which each call checks and uploads (GPU only)
index              ``index_copy_`` or ``index_select`` on rows of int64
loop               one ``copy_`` per block (on a GPU, for the first 4096 blocks only)
=================  ===============================================================================

Bytes are read + written, without addresses. On a GPU, ``kvheap``, ``copy_`` and ``index`` are
replayed from a CUDA graph; the times of the others include submission, as a caller would see them.
Several sets of tensors take turns, so that one turn moves at least four times the L2. A table of
its own has the host time to submit one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from _buffers import random_bytes
from _report import (
    Row,
    describe_machine,
    grouped,
    make_console,
    parse_common,
    print_machine,
    print_submission,
    size_label,
    write_results,
)
from _spread import NOISY_LABEL, plot_shares
from _timing import (
    Call,
    Samples,
    in_a_graph,
    on_the_host,
    on_the_stream,
    submission,
    time_in_calm_rounds,
    time_in_rounds,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvheap.kernels import gather_blocks, scatter_blocks
from kvheap.kernels.launch import upload

TARGET_SHARE = 0.92
TARGET_FROM_BYTES = 4096
RUN_BLOCKS = 32
LOOP_BLOCKS_ON_GPU = 4096
SLOTS = {"random": "random slots", "runs": f"runs of {RUN_BLOCKS} slots"}
GRAPH_METHODS = ("copy_", "kvheap", "index")
SUBMITTED_BLOCK_BYTES = 1024
GROUP = ("operation", "pattern", "block_bytes")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    block_bytes: tuple[int, ...]
    side_bytes: int
    rounds: int
    submitted_blocks: tuple[int, ...]

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Scale:
        """The scale for a minute or two on this kind of device; quick: for a few seconds."""
        sizes = tuple(1 << shift for shift in ((10, 12, 16, 20) if quick else range(10, 23, 2)))
        submitted = (64, 4096) if quick else (64, 1024, 16384, 131072)
        if device.type == "cuda":
            return cls(sizes, (128 if quick else 256) << 20, 7 if quick else 25, submitted)
        return cls(sizes, (16 if quick else 32) << 20, 5 if quick else 11, ())


@dataclass(frozen=True, slots=True)
class Workload:
    """A set of tensors: N dense blocks, a heap of 2 N slots, and a slot for each block."""

    blocks: torch.Tensor
    heap: torch.Tensor
    slots: torch.Tensor
    host_addresses: np.ndarray
    addresses: np.ndarray | torch.Tensor

    @classmethod
    def make(
        cls, device: torch.device, block_bytes: int, num_blocks: int, pattern: str, seed: int
    ) -> Workload:
        """Fill both sides with random bytes, and choose slots for the blocks."""
        slots = slots_of(pattern, num_blocks, seed)
        host_addresses = slots * block_bytes
        on_gpu = device.type == "cuda"
        return cls(
            blocks=random_bytes(num_blocks * block_bytes, device).view(num_blocks, -1),
            heap=random_bytes(2 * num_blocks * block_bytes, device).view(2 * num_blocks, -1),
            slots=torch.from_numpy(slots).to(device),
            host_addresses=host_addresses,
            addresses=torch.from_numpy(host_addresses).to(device) if on_gpu else host_addresses,
        )

    def scatter(self, addresses: np.ndarray | torch.Tensor, alignment: int) -> None:
        """Write the blocks to their addresses."""
        scatter_blocks(self.blocks, self.heap.view(-1), addresses, address_alignment=alignment)

    def gather(self, addresses: np.ndarray | torch.Tensor, alignment: int) -> None:
        """Read the blocks from their addresses."""
        gather_blocks(self.heap.view(-1), addresses, self.blocks, address_alignment=alignment)

    def calls(self, operation: str) -> dict[str, Call]:
        """The call of each method that does the operation once."""
        blocks, heap = self.blocks, self.heap
        half = heap[: len(blocks)]
        wide_blocks, wide_heap = blocks.view(torch.int64), heap.view(torch.int64)
        looped = LOOP_BLOCKS_ON_GPU if heap.is_cuda else len(blocks)
        places = self.slots[:looped].tolist()
        alignment = blocks.shape[1] & -blocks.shape[1]
        if operation == "scatter":
            method, plain = self.scatter, partial(half.copy_, blocks)
            index: Call = partial(wide_heap.index_copy_, 0, self.slots, wide_blocks)
            loop: Call = lambda: [heap[slot].copy_(blocks[i]) for i, slot in enumerate(places)]  # noqa: E731
        else:
            method, plain = self.gather, partial(blocks.copy_, half)
            index = partial(torch.index_select, wide_heap, 0, self.slots, out=wide_blocks)
            loop = lambda: [blocks[i].copy_(heap[slot]) for i, slot in enumerate(places)]  # noqa: E731
        calls: dict[str, Call] = {
            "copy_": plain,
            "kvheap": partial(method, self.addresses, alignment),
            "index": index,
            "loop": loop,
        }
        if heap.is_cuda:
            calls["kvheap + upload"] = partial(method, self.host_addresses, 1)
        return calls


def slots_of(pattern: str, num_blocks: int, seed: int) -> np.ndarray:
    """Choose ``num_blocks`` of twice as many slots: at random, or in runs of neighbours."""
    generator = np.random.default_rng(seed)
    run = 1 if pattern == "random" else min(RUN_BLOCKS, num_blocks)
    firsts = generator.permutation(2 * num_blocks // run)[: -(-num_blocks // run)] * run
    return (firsts[:, None] + np.arange(run)).ravel()[:num_blocks]


def measure_group(
    device: torch.device, operation: str, pattern: str, block_bytes: int, scale: Scale
) -> list[Row]:
    """Time every method with one block size; a row each."""
    num_blocks = scale.side_bytes // block_bytes
    num_sets = 2
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        num_sets = max(2, -(-4 * l2_bytes // (2 * scale.side_bytes)))
    sets = [Workload.make(device, block_bytes, num_blocks, pattern, i) for i in range(num_sets)]
    of_each = [workload.calls(operation) for workload in sets]
    check(sets[0], operation)
    measures = {}
    for method in of_each[0]:
        calls = [calls_of_set[method] for calls_of_set in of_each]
        if device.type != "cuda":
            measures[method] = on_the_host(calls)
        else:
            timer = in_a_graph if method in GRAPH_METHODS else on_the_stream
            measures[method] = timer(calls)
    samples = time_in_calm_rounds(measures, scale.rounds)
    rows = []
    for method, timing in samples.items():
        moved = num_blocks
        if method == "loop" and device.type == "cuda":
            moved = min(num_blocks, LOOP_BLOCKS_ON_GPU)
        group = {"operation": operation, "pattern": pattern, "method": method}
        rows.append(group | figures(timing, samples["copy_"], block_bytes, moved, num_blocks))
    return rows


def figures(timing: Samples, peak: Samples, block_bytes: int, moved: int, num_blocks: int) -> Row:
    bytes_moved = 2 * moved * block_bytes
    return {
        "block_bytes": block_bytes,
        "num_blocks": moved,
        "bytes_read_and_written": bytes_moved,
        **timing.percentiles(),
        "gb_per_s": round(bytes_moved / timing.percentile(50) / 1e3, 2),
        "share_of_copy": round(timing.speed_against(peak, moved / num_blocks), 4),
    }


def check(workload: Workload, operation: str) -> None:
    """Raise if the operation moves wrong bytes."""
    workload.calls(operation)["kvheap"]()
    if not torch.equal(workload.heap[workload.slots], workload.blocks):
        raise RuntimeError(f"{operation} moved wrong bytes")


def measure_submission(device: torch.device, scale: Scale) -> list[Row]:
    """Host time to submit one scatter of random blocks on an idle GPU."""
    rows = []
    for num_blocks in scale.submitted_blocks:
        workload = Workload.make(device, SUBMITTED_BLOCK_BYTES, num_blocks, "random", 0)
        calls = workload.calls("scatter")
        measures = {name: submission(calls[name]) for name in ("copy_", "kvheap")}
        measures["kvheap + upload"] = submission(calls["kvheap + upload"])
        measures["upload alone"] = submission(partial(upload, workload.host_addresses, device))
        for method, timing in time_in_rounds(measures, scale.rounds).items():
            rows.append({"method": method, "num_blocks": num_blocks, **timing.percentiles()})
    return rows


def print_shares(console: Console, rows: list[Row]) -> None:
    others = [method for method in dict.fromkeys(r["method"] for r in rows) if method != "copy_"]
    table = Table(title="GB/s read + write, and share of copy_ in the same rounds")
    for title in ("operation", "slots", "block", "blocks"):
        table.add_column(title, justify="right" if title.startswith("block") else "left")
    for method in ("copy_", *others):
        table.add_column(method, justify="right")
    for (operation, pattern, block_bytes), group in grouped(rows, *GROUP).items():
        peak = group["copy_"]
        cells = [f"{group[m]['gb_per_s']:,.1f} {group[m]['share_of_copy']:6.1%}" for m in others]
        label = (operation, pattern, size_label(block_bytes), f"{peak['num_blocks']:,}")
        table.add_row(*label, f"{peak['gb_per_s']:,.1f}", *cells)
    console.print(table)


def print_target(console: Console, rows: list[Row]) -> None:
    own = [r for r in rows if r["method"] == "kvheap" and r["block_bytes"] >= TARGET_FROM_BYTES]
    worst = min(own, key=lambda row: row["share_of_copy"])
    verdict = "reached" if worst["share_of_copy"] >= TARGET_SHARE else "NOT reached"
    console.print(
        f"target of {TARGET_SHARE} of copy_ from {size_label(TARGET_FROM_BYTES)} up: {verdict}; "
        f"lowest {worst['share_of_copy']:.3f} ({worst['operation']}, {SLOTS[worst['pattern']]}, "
        f"{size_label(worst['block_bytes'])})"
    )


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """Draw the share of ``copy_`` over block size: a panel for each operation and pattern."""
    rows = found["copies"]
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True)
    groups = grouped(rows, *GROUP)
    sizes = sorted({row["block_bytes"] for row in rows})
    measured = {row["method"] for row in rows}
    methods = [m for m in ("kvheap", "kvheap + upload", "index", "loop") if m in measured]
    on_gpu = found["driver"] is not None
    for across, operation in zip(panels, ("scatter", "gather"), strict=True):
        for panel, pattern in zip(across, ("random", "runs"), strict=True):
            panel.axhline(1.0, color="black", linewidth=1)
            if on_gpu:
                panel.axhline(TARGET_SHARE, color="grey", linewidth=1, linestyle="--")
            for method, marker in zip(methods, "os^vD", strict=False):
                shown = [groups[operation, pattern, size][method] for size in sizes]
                plot_shares(panel, sizes, shown, marker=marker, label=method)
            panel.set_title(f"{operation}, {SLOTS[pattern]}")
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [size_label(size) for size in sizes], rotation=30)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylim(0, 1.05 * max(1.0, *(row["share_of_copy"] for row in rows)))
    for panel in panels[:, 0]:
        panel.set_ylabel("speed / speed of one copy_")
    for panel in panels[1]:
        panel.set_xlabel("block size")
    panels[0, 0].legend()
    for panel in panels.flat:  # a panel that has noisy points explains the mark itself
        if panel is not panels[0, 0] and NOISY_LABEL in panel.get_legend_handles_labels()[1]:
            noisy = [line for line in panel.get_lines() if line.get_label() == NOISY_LABEL]
            panel.legend(handles=noisy, loc="lower right")
    mark = f"; dashed: target {TARGET_SHARE}" if on_gpu else ""
    title = (
        f"Block copy, {found['device']}, {found['date'][:10]} (1.0 = copy_{mark}; bars: the middle "
        f"60 % of the times)"
    )
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    device, console = arguments.device, make_console()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    scale = Scale.of(device, arguments.quick)
    machine = describe_machine(device)
    print_machine(console, machine)
    groups = [
        (operation, pattern, block_bytes)
        for operation in ("scatter", "gather")
        for pattern in ("random", "runs")
        for block_bytes in scale.block_bytes
    ]
    rows = []
    for group in track(groups, "measuring", console=console, transient=True):
        rows += measure_group(device, *group, scale)
    submitted = measure_submission(device, scale) if device.type == "cuda" else []
    print_shares(console, rows)
    if submitted:
        title = "Host time to submit one scatter, us (p50)"
        print_submission(console, title, submitted, "num_blocks")
        print_target(console, rows)
    configuration = {
        "quick": arguments.quick,
        "side_bytes": scale.side_bytes,
        "rounds": scale.rounds,
        "run_blocks": RUN_BLOCKS,
        "bytes": "read + write, without addresses",
        "share_of_copy": "median over rounds of the speed over copy_'s in the same round",
    }
    tables = {"copies": rows, "submission": submitted}
    write_results(console, arguments.out, "block_copy", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
