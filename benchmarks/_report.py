"""What the benchmarks share: arguments, the description of the machine, tables, result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _spread import NOISY_RATIO, count_noisy
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent

PACKAGES = ("torch", "triton", "numpy", "kvheap")

Row = dict[str, Any]
"""A row of a table: figures and what they belong to."""

Draw = Callable[[ModuleType, Path, dict[str, Any]], None]
"""Draws what a result file holds with ``matplotlib.pyplot``, and writes the picture to a file."""


def slug(name: str) -> str:
    """A device's name as the name of a folder: ``NVIDIA H200`` becomes ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date: what a figure needs to be a measurement."""
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


def print_machine(console: Console, machine: Mapping[str, Any]) -> None:
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    console.print(f"{machine['device']}{driver}, {machine['versions']}")


def write_results(
    console: Console,
    directory: Path,
    stem: str,
    machine: Mapping[str, Any],
    configuration: Mapping[str, Any],
    tables: Mapping[str, Any],
    draw: Draw,
) -> None:
    """Write ``<stem>-<date>.json``, and a picture of the same name if matplotlib is installed."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem}-{machine['date'][:10]}.json"
    payload = {"benchmark": stem, **machine, "configuration": configuration, **tables}
    noisy, total = count_noisy(payload)
    payload["noisy"] = {"figures": noisy, "of": total, "p80_over_p20": NOISY_RATIO}
    text = json.dumps(payload, indent=1) + "\n"
    path.write_text(text)
    console.print(f"wrote {path}")
    if noisy:
        console.print(
            f"{noisy} of {total} times are noisy (p80 more than {NOISY_RATIO:g} x p20): measure "
            f"again on an idle machine before you publish them",
            style="bold yellow",
        )
    plt = _pyplot()
    if plt is None:
        console.print("matplotlib is not installed: no picture is drawn")
        return
    picture = path.with_suffix(".png")
    draw(plt, picture, json.loads(text))
    console.print(f"wrote {picture}")


def grouped(rows: list[Row], *keys: str) -> dict[Any, dict[str, Row]]:
    """The rows that agree in ``keys``, by their method."""
    groups: dict[Any, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["method"]] = row
    return groups


def print_submission(console: Console, title: str, rows: list[Row], count: str) -> None:
    """Print the median microseconds: a line for each count, a column for each method.

    Args:
        console: where to.
        title: of the table.
        rows: a row for each method and count.
        count: the key of the count, as ``num_blocks``.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table(title=title)
    for column in (count.removeprefix("num_"), *methods):
        table.add_column(column, justify="right")
    for number in dict.fromkeys(row[count] for row in rows):
        of_count = {row["method"]: row for row in rows if row[count] == number}
        table.add_row(f"{number:,}", *(f"{of_count[m]['p50_us']:,.1f}" for m in methods))
    console.print(table)


def make_console() -> Console:
    """A console that does not wrap tables when its output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 140)


def size_label(size_bytes: int) -> str:
    """Bytes in the largest unit that divides them: 4096 becomes ``4 KiB``."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift} {unit}"
    return f"{size_bytes} B"


def parse_common(description: str, draw: Draw) -> argparse.Namespace:
    """The arguments that every benchmark takes: ``--device``, ``--quick``, ``--out``.

    With ``--redraw FILE``, nothing is measured: the picture of a result file is drawn, and the
    program ends.
    """
    parser = argparse.ArgumentParser(description=description)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rounds and bytes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/")
    parser.add_argument(
        "--redraw", type=Path, metavar="FILE", help="draw the picture of this result file, and end"
    )
    arguments = parser.parse_args()
    if arguments.redraw is not None:
        redraw(parser, arguments.redraw, arguments.out, draw)
        parser.exit()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if arguments.device.type == "cuda" and arguments.device.index is None:
        arguments.device = torch.device("cuda", torch.cuda.current_device())
    if arguments.out is None:
        arguments.out = REPOSITORY / "benchmarks/results" / slug(device_name(arguments.device))
    return arguments


def redraw(parser: argparse.ArgumentParser, path: Path, out: Path | None, draw: Draw) -> None:
    """Draw the picture of a result file, beside it or to ``out``, a file or a folder."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--redraw {path}: {error}")
    plt = _pyplot()
    if plt is None:
        parser.error("--redraw needs matplotlib: pip install matplotlib")
    picture = path.with_suffix(".png") if out is None else out
    if picture.is_dir():
        picture /= f"{path.stem}.png"
    draw(plt, picture, found)
    print(f"wrote {picture}")


def _pyplot() -> ModuleType | None:
    """``matplotlib.pyplot`` for writing files; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """KVHEAP_COMMIT; without it HEAD, marked if tracked files have changed."""
    told = os.environ.get("KVHEAP_COMMIT")
    if told:
        return told
    head = _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    if head is None:
        return None
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
