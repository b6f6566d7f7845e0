"""kvheap's host tier for vLLM beside vLLM's own: what equal bytes hold, and what managers cost.

Drives vLLM's real managers with the same keys as kvheap's. Needs the vllm package (0.32 or 0.33, of
which only its Python is used: no engine, no GPU, no weights). The parts:

============  ======================================================================================
part          what is measured
============  ======================================================================================
capacity      requests of 500 to 32,000 tokens that a tier takes before the first chunk leaves it,
              for models with unlike KV cache groups: vLLM's slots, sized by its
              ``CPUOffloadingSpec``, and a heap of as many bytes. Then the share of the heap's bytes
              that are KV while it is full, after it was written anew several times
cost          microseconds of each call of a manager with 1, 16 and 256 keys beside a full tier, in
              which every store evicts. The managers take turns in every round
============  ======================================================================================

``KVHEAP_COMMIT`` names the commit if git is not there. Times are of the host; ratios are medians
over rounds, vLLM's time over kvheap's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _report import (
    describe_machine,
    make_console,
    parse_common,
    print_machine,
    size_label,
    write_results,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

Row = dict[str, Any]

HEAP_BYTES, QUICK_HEAP_BYTES = 64 << 30, 8 << 30
NUM_CHUNKS, QUICK_NUM_CHUNKS = 65_536, 8_192
NUM_KEYS = (1, 16, 256)


def print_capacity(console: Console, rows: list[Row]) -> None:
    table = Table(title=f"requests and tokens held by {size_label(rows[0]['heap_bytes'])}")
    columns = ("model", "groups", "slot", "requests", "vLLM's", "tokens: ratio")
    for column in (*columns, "KV share", "least", "vLLM's"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"] + ("*" if row["is_packed"] else ""),
            f"{len(row['groups'])}",
            f"{row['slot_bytes']:,}",
            f"{row['requests']:,}",
            f"{row['requests_vllm']:,}",
            f"{row['ratio']:.2f}",
            *(f"{row[name]:.1%}" for name in ("useful_mean", "useful_least", "useful_vllm")),
        )
    console.print(table)
    console.print(
        "* the pages of all layers are packed in one block, which vLLM's tier keeps whole"
    )


def print_cost(console: Console, rows: list[Row]) -> None:
    managers = [name for name, value in rows[0].items() if isinstance(value, dict)]
    table = Table(title="us of one call, medians; and vLLM's time over kvheap's")
    for column in ("call", "keys", *managers, *(f"{name}: ratio" for name in managers[1:])):
        table.add_column(column, justify="left" if column == "call" else "right")
    for row in rows:
        table.add_row(
            row["call"],
            f"{row['keys']:,}",
            *(f"{row[name]['p50_us']:,.1f}" for name in managers),
            *(f"{row[f'{name}: times as fast']:,.1f}x" for name in managers[1:]),
        )
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """The useful share and the ratio by model; the cost of the calls with 1 and 256 keys."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    rows = found["capacity"]
    places = range(len(rows))
    for shift, key, label in ((-0.2, "useful_vllm", "vLLM's slots"), (0.2, "useful_mean", "heap")):
        left.bar(
            [at + shift for at in places], [100 * r[key] for r in rows], width=0.38, label=label
        )
    for at, row in enumerate(rows):
        left.text(at, 101, f"{row['ratio']:.2f}x", ha="center")
    left.set_xticks(list(places), [row["model"] for row in rows], rotation=30, ha="right")
    left.set_ylim(0, 115)
    left.set_ylabel("KV, % of the tier's bytes")
    left.set_title("equal bytes; above: tokens held, heap over slots")
    left.legend(loc="lower left")
    costs = [row for row in found["cost"] if row["keys"] in (1, 256)]
    managers = [name for name, value in costs[0].items() if isinstance(value, dict)]
    for at, name in enumerate(managers):
        places = [place + 0.2 * (at - 1) for place in range(len(costs))]
        line = right.plot([row[name]["p50_us"] for row in costs], places, "o", label=name)[0]
        lows, highs = ([row[name][f"p{percent}_us"] for row in costs] for percent in (20, 80))
        right.hlines(places, lows, highs, color=line.get_color(), linewidth=2, alpha=0.5)
    right.set_yticks(range(len(costs)), [f"{row['call']}, {row['keys']}" for row in costs])
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_xlabel("microseconds of the host (dot: median; line: the middle 60 %)")
    right.set_title("calls of the managers, a full tier")
    right.legend()
    right.grid(alpha=0.3, axis="x")
    figure.suptitle(f"A host tier for vLLM, {found['device']}, {found['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0], draw)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from _tier_capacity import LONGEST, SHORTEST, TURNOVERS, measure_capacity
    from _tier_cost import measure_cost
    from _tier_models import models
    from vllm.version import __version__

    quick = arguments.quick
    heap_bytes = QUICK_HEAP_BYTES if quick else HEAP_BYTES
    num_chunks = QUICK_NUM_CHUNKS if quick else NUM_CHUNKS
    rounds = 50 if quick else 300
    console = make_console()
    machine = describe_machine(torch.device("cpu"))
    machine["versions"]["vllm"] = __version__
    print_machine(console, machine)
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        *(("capacity", lambda m=m: [measure_capacity(m, heap_bytes)]) for m in models()),
        *(("cost", lambda n=n: measure_cost(num_chunks, "lru", n, rounds)) for n in NUM_KEYS),
    ]
    tables: dict[str, Any] = {"capacity": [], "cost": []}
    for name, measure in track(parts, "measuring", console=console, transient=True):
        tables[name] += measure()
    print_capacity(console, tables["capacity"])
    print_cost(console, tables["cost"])
    configuration = {
        "quick": quick,
        "heap_bytes": heap_bytes,
        "request_tokens": [SHORTEST, LONGEST],
        "turnovers": TURNOVERS,
        "chunks": num_chunks,
        "rounds": rounds,
        "blocks_per_chunk": 1,
        "eviction_policy": "lru",
        "times_as_fast": "median over rounds of vLLM's time over kvheap's",
    }
    write_results(console, arguments.out, "vllm_tier", machine, configuration, tables, draw)


if __name__ == "__main__":
    main()
