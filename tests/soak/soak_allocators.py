"""Soak: many threads do everything to one heap at once, right and wrong, for minutes.

Every block is filled with a byte of its owner's, which is checked before the block is given up.
Every allocation and every way of giving a block up is counted. In the end the heap must be empty,
must have reclaimed exactly the blocks that were dropped, and must have let exactly those leases
expire that were not released.

Phases: a plain heap, one with ``scrub`` and one with ``debug``. Run it for longer than the tests
do after any change to lifetimes::

    python tests/soak/soak_allocators.py --minutes 10 --threads 8

Exit status 1, with the seed printed, if anything is wrong. The seed fixes what each thread tries,
not how the threads interleave.

===================  =============================================================================
module               what is in it
===================  =============================================================================
soak_world           one heap, what the threads share, and who may touch which block
soak_worker          one thread: what it holds, and the ways to give it up
soak_operations      what a thread does, and how often; allocating and freeing
soak_lifetimes       counts, leases and streams
soak_contests        many threads at one batch
soak_mistakes        what must be refused
soak_looks           statistics, reports, views
soak_faults          copies that fail, a device and streams that take their time
soak_phase           threads at one heap for a while, and what must hold in the end
soak_checks          errors
soak_internals       the only module that knows private parts of kvheap
===================  =============================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from soak_phase import Phase

PHASES: tuple[tuple[str, float, dict[str, bool]], ...] = (
    ("plain", 0.6, {"debug": False}),
    ("scrub", 0.2, {"debug": False, "scrub": True}),
    ("debug", 0.2, {"debug": True}),
)
"""Name, share of the time, and options of the heap."""

SWITCH_INTERVAL_S = 20e-6


@contextlib.contextmanager
def restless_interpreter() -> Iterator[None]:
    """Switch threads often; collect garbage often, and only what the soak has made."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(60, 4, 4)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.unfreeze()


@contextlib.contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Let torch start no threads of its own for small copies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def unraisable_errors_reported(report: Callable[[str], None]) -> Iterator[None]:
    """What a finalizer raises is a violation too."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda error: report(f"{error.object!r} raised {error.exc_value!r}")
    try:
        yield
    finally:
        sys.unraisablehook = before


def soak(minutes: float, threads: int, seed: int, console: Console) -> bool:
    """Run all phases and print their counters; returns whether all was as it must be."""
    with single_threaded_torch():
        return run_phases(minutes * 60, threads, seed, console)


def run_phases(seconds: float, threads: int, seed: int, console: Console) -> bool:
    """Run all phases one after the other, until one finds a violation."""
    counted: dict[str, Counter[str]] = {}
    with Progress(console=console, transient=True) as progress, restless_interpreter():
        task = progress.add_task("soaking", total=seconds)
        for name, share, options in PHASES:
            progress.update(task, description=name)
            phase = Phase(name, options, threads, seed)
            violations = phase.world.violations
            with unraisable_errors_reported(phase.world.report):
                counted[name] = phase.run(
                    share * seconds, lambda passed: progress.advance(task, passed)
                )
            if violations:
                progress.stop()
                for violation in violations:
                    console.print(violation, markup=False, highlight=False)
                console.print(f"VIOLATION in phase {name}, seed {seed}")
                return False
    console.print(table_of(counted, f"{threads} threads, seed {seed}"))
    return True


def table_of(counted: dict[str, Counter[str]], title: str) -> Table:
    """A row for each count, a column for each phase."""
    table = Table(title=title)
    table.add_column("count")
    for name in counted:
        table.add_column(name, justify="right")
    for key in sorted({key for counts in counted.values() for key in counts}):
        table.add_row(key, *(f"{counts[key]:,}" for counts in counted.values()))
    return table


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of all phases (10)")
    parser.add_argument("--threads", type=int, default=8, help="at one heap (8)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, help="random")
    arguments = parser.parse_args()
    faulthandler.enable()
    console = Console()
    console.print(f"seed {arguments.seed}")
    sys.stdout.flush()
    if soak(arguments.minutes, arguments.threads, arguments.seed, console):
        console.print(f"no violation in {arguments.minutes:g} minutes")
        return 0
    return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at once: a thread that hangs must not hold the exit up
