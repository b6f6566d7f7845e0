"""What the benchmarks share: timing, a description of the machine, result files.

Every benchmark compares methods inside rounds: each round times every method once, in turn, and
what is reported of a method against a peer is the median, over rounds, of the ratio of the two.
Another machine's load, or a clock that drifts, then falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

REPOSITORY = Path(__file__).resolve().parent.parent

PACKAGES = ("torch", "triton", "numpy", "kvheap")

Measure = Callable[[], float]
"""Runs a method once and returns the microseconds of one call."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Microseconds of one method, one sample for each round."""

    microseconds: tuple[float, ...]

    def percentile(self, percent: int) -> float:
        if len(self.microseconds) == 1:
            return self.microseconds[0]
        return statistics.quantiles(self.microseconds, n=100, method="inclusive")[percent - 1]

    def percentiles(self) -> dict[str, float]:
        return {f"p{percent}_us": round(self.percentile(percent), 3) for percent in (20, 50, 80)}

    def speed_against(self, peer: Samples, work_share: float = 1.0) -> float:
        """The peer's time over this one's, median of the rounds.

        ``work_share`` is how much of the peer's work this method did.
        """
        rounds = zip(self.microseconds, peer.microseconds, strict=True)
        return statistics.median(work_share * theirs / own for own, theirs in rounds)


def time_in_rounds(measures: Mapping[str, Measure], rounds: int) -> dict[str, Samples]:
    """One sample of every method in each round, after one that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for round_number in range(rounds + 1):
        for name, measure in measures.items():
            microseconds = measure()
            if round_number:
                samples[name].append(microseconds)
    return {name: Samples(tuple(values)) for name, values in samples.items()}


def on_the_host(calls: Sequence[Callable[[], object]]) -> Measure:
    """Wall-clock time of the mean call; nothing waits for a device."""

    def measure() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)

    return measure


def on_the_stream(calls: Sequence[Callable[[], object]]) -> Measure:
    """Device time from before the first call to after the last, by events, of the mean call.

    Submission is inside: where it takes longer than the work, this is the time of submission.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / len(calls)

    return measure


def in_a_graph(calls: Sequence[Callable[[], object]]) -> Measure:
    """Device time of the mean call in a replayed CUDA graph: submission is outside."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replay = on_the_stream([graph.replay])
    return lambda: replay() / len(calls)


def submission(call: Callable[[], object]) -> Measure:
    """Host time of one call on an idle device."""
    measure = on_the_host([call])

    def measure_when_idle() -> float:
        torch.cuda.synchronize()
        return measure()

    return measure_when_idle


def slug(name: str) -> str:
    """A device's name as a folder's: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date: what makes a figure a measurement."""
    machine: dict[str, Any] = {
        "device": device_name(device),
        "driver": None,
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine["driver"] = (_output(query) or "unknown").splitlines()[0]
        machine["capability"] = f"{properties.major}.{properties.minor}"
        machine["l2_bytes"] = properties.L2_cache_size
        machine["multiprocessors"] = properties.multi_processor_count
    return machine


def write_json(
    directory: Path,
    stem: str,
    machine: Mapping[str, Any],
    configuration: Mapping[str, Any],
    tables: Mapping[str, Any],
) -> Path:
    """Write ``<stem>-<date>.json`` and return its path; the figure takes the same name."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem}-{machine['date'][:10]}.json"
    payload = {"benchmark": stem, **machine, "configuration": configuration, **tables}
    path.write_text(json.dumps(payload, indent=1) + "\n")
    return path


def pyplot(console: Console) -> ModuleType | None:
    """``matplotlib.pyplot`` for files, or None, said aloud, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        console.print("matplotlib is not installed: no figure is drawn")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def make_console() -> Console:
    """A console that does not fold tables when its output is a file."""
    return Console(width=None if sys.stdout.isatty() else 140)


def size_label(size_bytes: int) -> str:
    """Bytes in the largest unit that divides them: 4096 is ``4 KiB``."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift} {unit}"
    return f"{size_bytes} B"


def parse_common(description: str) -> argparse.Namespace:
    """The arguments that every benchmark takes: ``--device``, ``--quick``, ``--out``."""
    parser = argparse.ArgumentParser(description=description)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rounds and bytes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/")
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if arguments.device.type == "cuda" and arguments.device.index is None:
        arguments.device = torch.device("cuda", torch.cuda.current_device())
    if arguments.out is None:
        arguments.out = REPOSITORY / "benchmarks/results" / slug(device_name(arguments.device))
    return arguments


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD, marked when tracked files differ; KVHEAP_COMMIT where there is no git repository."""
    head = _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    if head is None:
        return os.environ.get("KVHEAP_COMMIT")
    changed = _output(["git", "-C", str(REPOSITORY), "status", "--porcelain", "-uno"])
    return f"{head}+changes" if changed else head


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
