"""The lines of the table of ``kvheap bench``: a few figures of each benchmark, beside a peer's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["Line", "lines_of"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison."""

    what: str
    """What was measured."""
    own: str
    """kvheap's figure, with its unit."""
    peer: str
    """The peer's name and figure; empty if it is not installed."""
    ratio: float | None
    """How many times as good kvheap is; None without a peer."""


def lines_of(results: Row) -> list[Line]:
    """The lines for a result file; none for a benchmark that is not known here, or old files."""
    summarize = SUMMARIES.get(results["benchmark"])
    if summarize is None:
        return []
    lines: list[Line] = []
    with suppress(KeyError, IndexError, ValueError):  # tables that an older file lacks
        lines.extend(summarize(results))  # keeps those before the error
    return lines


def _time(us: float) -> str:
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us < 1000 * scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def _timed(what: str, row: Row, own: str, peer: str) -> Line:
    """A line from a row with times of both by name."""
    mine = row[own]["p50_us"]
    if peer not in row:
        return Line(what, _time(mine), "", None)
    theirs = row[peer]["p50_us"]
    return Line(what, _time(mine), f"{peer}: {_time(theirs)}", theirs / mine)


def _address_manager(found: Row) -> Iterator[Line]:
    row = max(found["pair"], key=lambda row: row["extents"])
    yield _timed(f"allocate + free, {row['extents']:,} free extents", row, "kvheap", "LMCache")
    for operation in ("batched_allocate", "batched_free"):
        rows = [row for row in found["batch"] if row["operation"] == operation]
        row = max(rows, key=lambda row: row["blocks"])
        yield _timed(f"{operation}, {row['blocks']:,} blocks, addresses", row, "kvheap", "LMCache")
    row = max(found["filled"], key=lambda row: row["blocks"])
    yield _timed(f"{row['blocks']:,} blocks allocated and filled", row, "kvheap", "LMCache")


def _allocators(found: Row) -> Iterator[Line]:
    rows = [row for row in found["life"] if row["allocator"] == "TensorMemoryAllocator"]
    for row in [row for row in rows if row["operation"].startswith("batched")][-2:]:
        yield _timed(f"{row['operation']}, TensorMemoryAllocator", row, "kvheap", "LMCache")


def _shares(rows: Iterable[Row], by: str, peers: tuple[str, ...]) -> Iterator[Line]:
    """Median shares of ``copy_`` for each value of a column, beside the best peer."""
    rows = list(rows)
    for value in dict.fromkeys(row[by] for row in rows):
        medians = {
            method: statistics.median(
                [
                    row["share_of_copy"]
                    for row in rows
                    if (row[by], row["method"]) == (value, method)
                ]
            )
            for method in dict.fromkeys(row["method"] for row in rows if row[by] == value)
        }
        own, measured = (
            medians["kvheap"],
            {name: medians[name] for name in peers if name in medians},
        )
        best = max(measured, key=lambda name: measured[name])
        yield Line(
            f"{value}: median share of copy_'s speed",
            f"{own:.0%}",
            f"{best}: {measured[best]:.0%}",
            own / measured[best],
        )


def _block_copy(found: Row) -> Iterator[Line]:
    yield from _shares(found["copies"], "operation", ("index", "loop"))


def _paged_copy(found: Row) -> Iterator[Line]:
    yield from _shares(found["copies"], "operation", ("LMCache", "index", "loop"))


def _transfer(found: Row) -> Iterator[Line]:
    if "copies" in found:
        yield from _shares(found["copies"], "pattern", ("loop",))
    else:
        link = [row for row in found["link"] if row["pattern"] != "runs"]
        yield from _shares(link, "direction", ("list", "copy engine", "bindings", "loop"))


def _small_calls(found: Row) -> Iterator[Line]:
    for table in ("pages", "blocks"):
        ratio = statistics.median(row["ratio"] for row in found[table])
        yield Line(f"{table}, median of all calls", f"{ratio:.2g} x the loop", "loop: 1", 1 / ratio)


def _utilization(found: Row) -> Iterator[Line]:
    rows = found["random_and_pairs"]
    cells = dict.fromkeys((row["workload"], row["heap_bytes"]) for row in rows)
    for workload, heap_bytes in cells:
        shares = {
            row["allocator"]: row["avg"]
            for row in rows
            if (row["workload"], row["heap_bytes"]) == (workload, heap_bytes)
        }
        own = shares.pop("kvheap")
        peer, theirs = next(iter(shares.items()), ("", 0.0))
        yield Line(
            f"{workload} in {heap_bytes >> 30} GiB: mean utilisation",
            f"{own:.2%}",
            f"{peer}: {theirs:.2%}" if peer else "",
            own / theirs if peer else None,
        )


def _prefix_index(found: Row) -> Iterator[Line]:
    for call in ("look-up", "store", "evict"):
        rows = [row for row in found["calls"] if row["call"] == call and not row["held"]]
        if rows:
            row = max(rows, key=lambda row: (row["stored"], row["keys"]))
            what = f"{call} of {row['keys']} keys beside {row['stored']:,}"
            yield _timed(what, row, "lru", "OrderedDict")


def _eviction(found: Row) -> Iterator[Line]:
    for trace in dict.fromkeys(row["trace"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["trace"] == trace]
        row = rows[(len(rows) - 1) // 2]
        own, lru = row["adaptive"]["hits"], row["lru"]["hits"]
        what = f"hits, {trace}, {row['chunks']:,} chunks: adaptive"
        yield Line(what, f"{own:.1f} %", f"LRU: {lru:.1f} %", own / lru if lru else None)


def _files(found: Row) -> Iterator[Line]:
    cells = dict.fromkeys((row["call"], row["way"]) for row in found["moves"])
    for call, way in cells:
        speeds = {
            row["method"]: row["gb_per_s"]
            for row in found["moves"]
            if (row["call"], row["way"], row["pattern"]) == (call, way, "runs")
        }
        own, theirs = speeds["kvheap"], speeds["files"]
        what = f"{call}, {way}, runs of 64 KiB chunks"
        yield Line(what, f"{own:.2g} GB/s", f"a file for each: {theirs:.2g} GB/s", own / theirs)


def _vllm_tier(found: Row) -> Iterator[Line]:
    for row in found["cost"]:
        if row["keys"] == max(each["keys"] for each in found["cost"]):
            what = f"{row['call']} of {row['keys']} keys"
            yield _timed(what, row, "kvheap, equal groups", "vLLM")


def _vllm_engine(found: Row) -> Iterator[Line]:
    for row in found["ttft"]:
        own, theirs = row["kvheap"]["p50_ms"], row["none"]["p50_ms"]
        what = f"first token, {row['model']}, {row['prefix_tokens']:,} tokens known"
        yield Line(what, f"{own:.3g} ms", f"no tier: {theirs:.3g} ms", theirs / own)


SUMMARIES: dict[str, Callable[[Row], Iterator[Line]]] = {
    "address_manager": _address_manager,
    "allocators": _allocators,
    "block_copy": _block_copy,
    "eviction": _eviction,
    "files": _files,
    "paged_copy": _paged_copy,
    "prefix_index": _prefix_index,
    "small_calls": _small_calls,
    "transfer": _transfer,
    "utilization": _utilization,
    "vllm_engine": _vllm_engine,
    "vllm_tier": _vllm_tier,
}
