"""``kvheap calibrate``: measure which path of a copy is fastest here, store it, show it."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvheap.calibration.calibrate import CalibrationError, CudaMeasure, calibrate
from kvheap.cli import CommandError
from kvheap.errors import TransferError
from kvheap.planning.path_costs import DIRECTIONS
from kvheap.planning.planner import CopyTable, Direction, cache_path, forget_tables, table_for

__all__ = ["run"]

DEFAULT_PICTURE = Path("kvheap-calibration.png")

SHOWN_SIZES = tuple(kib << 10 for kib in (1, 4, 8, 16, 24, 28, 32, 64, 256, 1024, 4096))

PLOT_HINT = "no picture without matplotlib: pip install 'kvheap[plot]'"

_SOURCES = {
    "measured": "measured {created}",
    "built in": "built in: derived from what others published of such a device, not measured",
    "cautious": "the cautious rule: nothing is known of this device; run 'kvheap calibrate' there",
}


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit status.

    Raises:
        CommandError: the options or the machine do not allow it.
    """
    _require_outputs(options)
    if options.show:
        return _show(options)
    if options.table or options.device_name:
        raise CommandError("--table and --device-name say what to show: add --show")
    if not options.budget > 0:
        raise CommandError(f"--budget must be a positive number of seconds, got {options.budget}")
    name, driver_version, index = _device(options.device)
    place = cache_path(name, driver_version)
    _require_writable(place)
    table = _calibrated(name, driver_version, index, options.budget)
    try:
        table.save(place)
    except OSError as error:
        raise CommandError(f"cannot write {place}: {error.strerror}") from None
    forget_tables()
    _print(table)
    # Not through rich: a path is to be copied, not wrapped.
    print(f"stored in {place}")
    _write(table, options.json, options.plot)
    return 0


def _show(options: argparse.Namespace) -> int:
    table = _table_to_show(options)
    _print(table)
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    picture = (options.plot or DEFAULT_PICTURE) if has_matplotlib else None
    _write(table, options.json, picture)
    print(f"drawn to {picture}" if picture else PLOT_HINT)
    return 0


def _table_to_show(options: argparse.Namespace) -> CopyTable:
    if options.table:
        try:
            return CopyTable.from_json(json.loads(options.table.read_text(encoding="utf-8")))
        except OSError as error:
            raise CommandError(f"cannot read {options.table}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{options.table} holds no table: {error}") from None
    if not options.device_name:
        name, driver_version, _ = _device(options.device, "; --device-name NAME needs none")
        return table_for(name, driver_version)
    try:
        driver_version = _device(options.device)[1]
    except CommandError:
        driver_version = ""
    return table_for(options.device_name, driver_version)


def _device(text: str, hint: str = "") -> tuple[str, str, int]:
    """Name, driver version and index of a CUDA device, as a transfer sees them."""
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        raise CommandError(f"unknown device {text!r}; try cuda:0") from None
    if device.type != "cuda":
        raise CommandError(f"--device must be a CUDA device, got {text!r}")
    if not torch.cuda.is_available():
        raise CommandError(f"--device {text}: torch sees no CUDA device here{hint}")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise CommandError(f"--device {text}: there are {torch.cuda.device_count()} devices")

    from kvheap.device.cuda import find_device

    found = find_device(device)
    assert found is not None  # which it is for a CPU alone
    index = torch.cuda.current_device() if device.index is None else device.index
    return found.name, found.driver_version, index


def _calibrated(name: str, driver_version: str, index: int, budget_s: float) -> CopyTable:
    """Measure under a progress bar."""
    import torch

    console = Console(stderr=True)
    columns = (
        TextColumn("calibrate"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} cells"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("buffers", total=1)

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        try:
            measure = CudaMeasure(torch.device("cuda", index))
            return calibrate(
                measure,
                name,
                driver_version,
                progress=tell,
                budget_s=budget_s,
                max_bytes=measure.max_bytes,
                versions=versions,
            )
        except (CalibrationError, TransferError) as error:
            raise CommandError(str(error)) from None


def _require_outputs(options: argparse.Namespace) -> None:
    """Find out before a long run, not after it, that a result could not be written."""
    if options.plot:
        if importlib.util.find_spec("matplotlib") is None:
            if not options.show:
                raise CommandError(PLOT_HINT)
        else:
            from kvheap.cli.replay_plot import SUFFIXES

            if options.plot.suffix.lower() not in SUFFIXES:
                names = ", ".join(SUFFIXES)
                raise CommandError(f"--plot {options.plot}: the name must end in {names}")
    for path in (options.json, options.plot):
        if path is not None:
            _require_writable(path, make_folder=False)


def _require_writable(path: Path, make_folder: bool = True) -> None:
    is_new = not path.exists() and not path.is_symlink()
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    if is_new:
        path.unlink()


def _write(table: CopyTable, json_file: Path | None, picture: Path | None) -> None:
    try:
        if json_file:
            json_file.write_text(json.dumps(table.to_json(), indent=1) + "\n")
        if picture:
            from kvheap.cli.calibrate_plot import draw

            draw(picture, table, source_words(table))
    except OSError as error:
        raise CommandError(
            f"cannot write {error.filename or 'a result'}: {error.strerror}"
        ) from None


def source_words(table: CopyTable) -> str:
    """Where a table's costs come from, in words."""
    return _SOURCES[table.source].format(created=table.created)


def _print(table: CopyTable) -> None:
    console = Console()
    text = Table(title=f"{table.device_name}: which path, from how many pieces on")
    text.add_column("piece", justify="right")
    for direction in DIRECTIONS:
        text.add_column(direction)
    for size in SHOWN_SIZES:
        choices = (_choices_words(table, direction, size) for direction in DIRECTIONS)
        text.add_row(f"{size >> 10:,} KiB", *choices)
    console.print(text)
    print(source_words(table))
    noisy = {direction: len(table.noisy_cells(direction)) for direction in DIRECTIONS}
    if any(noisy.values()):
        words = ", ".join(f"{number} {direction}" for direction, number in noisy.items() if number)
        print(f"noisy cells, whose times spread by more than 5 %: {words}")


def _choices_words(table: CopyTable, direction: Direction, piece_bytes: int) -> str:
    """As ``engine, kernel 31+``."""
    words = [
        path.removeprefix("copy_") + (f" {count:,}+" if count > 1 else "")
        for count, path in table.choices(direction, piece_bytes)
    ]
    return ", ".join(words) or "not measured"
