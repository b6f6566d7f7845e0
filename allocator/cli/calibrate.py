"""``kvheap calibrate``: measures which path of a copy is the fastest; stores and shows the table.

torch is imported only to look up or measure a device; a table in a file is shown without it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvheap.calibration.calibrate import calibrate
from kvheap.calibration.measure import CalibrationError
from kvheap.cli import CommandError, MachineError
from kvheap.cli.outputs import cannot_write, has_matplotlib, require_picture, require_writable
from kvheap.device.directions import Direction
from kvheap.errors import TransferError
from kvheap.planning.copy_table import CopyTable
from kvheap.planning.link_sms import LINK_DIRECTIONS
from kvheap.planning.path_costs import MEASURED_DIRECTIONS, NOISY_SPREAD
from kvheap.planning.planner import forget_tables, table_for
from kvheap.planning.table_files import cache_path, save_table
from kvheap.planning.table_json import table_from_json, table_to_json

__all__ = ["run", "source_words"]

DEFAULT_PICTURE = Path("kvheap-calibration.png")

SHOWN_SIZES = tuple(kib << 10 for kib in (1, 4, 8, 16, 24, 28, 32, 64, 256, 1024, 4096))
"""Bytes of a piece, one row of the printed table each."""

SOURCE_WORDS = {
    "measured": "measured {created}",
    "built in": "built in: derived from figures published for this device by others, not measured",
    "cautious": (
        "the cautious rule: nothing is known about this device; run 'kvheap calibrate' on it"
    ),
}


WITHOUT_GPU = (
    ". Measuring needs a GPU; without one you can look at a table: kvheap calibrate --show "
    "--device-name 'NVIDIA H100 80GB HBM3', or --show --table FILE for one from another machine"
)
"""What can be done on a machine without a GPU."""


def run(options: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit status.

    Raises:
        CommandError: an option is wrong, the device cannot be measured, or a file cannot be
            written.
    """
    _require_outputs(options)
    if options.show:
        return _show(options)
    if options.table or options.device_name:
        raise CommandError("--table and --device-name need --show")
    if not options.budget > 0:
        raise CommandError(f"--budget must be a positive number of seconds, got {options.budget}")
    name, driver_version, index = _device(options.device, WITHOUT_GPU)
    stored = cache_path(name, driver_version)
    _require_cache(stored)
    table = _calibrated(name, driver_version, index, options.budget)
    try:
        save_table(table, stored)
    except OSError as error:
        raise cannot_write(stored, error) from None
    forget_tables()
    _print(table)
    # Not through rich, which would wrap the path.
    print(f"stored in {stored}")
    _write(table, options.json, options.plot)
    return 0


def _show(options: argparse.Namespace) -> int:
    table = _table_to_show(options)
    _print(table)
    picture = (options.plot or DEFAULT_PICTURE) if has_matplotlib() else None
    _write(table, options.json, picture)
    if picture:
        print(f"drawn to {picture}")
    else:
        print("no picture without matplotlib: pip install matplotlib")
    return 0


def _table_to_show(options: argparse.Namespace) -> CopyTable:
    """The table in the file, of the named device (with this machine's driver), or used here."""
    if options.table:
        try:
            return table_from_json(json.loads(options.table.read_text(encoding="utf-8")))
        except OSError as error:
            raise CommandError(f"cannot read {options.table}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{options.table} holds no valid table: {error}") from None
    if not options.device_name:
        name, driver_version, _ = _device(options.device, WITHOUT_GPU)
        return table_for(name, driver_version)
    try:
        driver_version = _device(options.device)[1]
    except CommandError:
        driver_version = ""
    return table_for(options.device_name, driver_version)


def _device(text: str, hint: str = "") -> tuple[str, str, int]:
    """Name, driver version and index of a CUDA device, with the names that transfers use.

    Args:
        text: the value of ``--device``.
        hint: appended to the error if there is no CUDA device.
    """
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        raise CommandError(f"unknown device {text!r}; try cuda:0") from None
    if device.type != "cuda":
        raise CommandError(f"--device must be a CUDA device, got {text!r}")
    if not torch.cuda.is_available():
        raise MachineError(f"--device {text}: torch sees no CUDA device here{hint}")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise MachineError(f"--device {text}: there are {torch.cuda.device_count()} devices")

    from kvheap.device.cuda import find_device

    found = find_device(device)
    assert found is not None  # None is for CPUs
    index = torch.cuda.current_device() if device.index is None else device.index
    return found.name, found.driver_version, index


def _calibrated(name: str, driver_version: str, index: int, budget_s: float) -> CopyTable:
    """Measure, with a progress bar on a terminal."""
    import torch

    from kvheap.calibration.cuda_measure import CudaMeasure

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
                link=measure.link,
                progress=tell,
                budget_s=budget_s,
                max_bytes=measure.max_bytes,
                versions=versions,
            )
        except (CalibrationError, TransferError) as error:
            raise MachineError(str(error)) from None


def _require_outputs(options: argparse.Namespace) -> None:
    """Check before measuring that the results can be written."""
    # --show prints a hint if it cannot draw.
    if options.plot and (has_matplotlib() or not options.show):
        require_picture(options.plot)
    for path in (options.json, options.plot):
        if path is not None:
            require_writable(path)


def _require_cache(path: Path) -> None:
    """Create the folder of ``path``, and check that it can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    require_writable(path)


def _write(table: CopyTable, json_file: Path | None, picture: Path | None) -> None:
    try:
        if json_file:
            json_file.write_text(json.dumps(table_to_json(table), indent=1) + "\n")
        if picture:
            from kvheap.cli.calibrate_plot import draw

            draw(picture, table, source_words(table))
    except OSError as error:
        raise cannot_write(error.filename or "a result", error) from None


def source_words(table: CopyTable) -> str:
    """Where the costs of a table come from, in words."""
    return SOURCE_WORDS[table.source].format(created=table.created)


def _print(table: CopyTable) -> None:
    console = Console()
    text = Table(title=Text(f"{table.device_name}: which path, from how many pieces on"))
    text.add_column("piece", justify="right")
    for direction in MEASURED_DIRECTIONS:
        text.add_column(direction)
    for size in SHOWN_SIZES:
        choices = (_choices_words(table, direction, size) for direction in MEASURED_DIRECTIONS)
        text.add_row(f"{size >> 10:,} KiB", *choices)
    console.print(text)
    print(source_words(table))
    print(_sms_words(table))
    noisy = {direction: len(table.noisy_cells(direction)) for direction in MEASURED_DIRECTIONS}
    if any(noisy.values()):
        words = ", ".join(f"{number} {direction}" for direction, number in noisy.items() if number)
        print(f"noisy cells, whose times spread by more than {100 * NOISY_SPREAD:g} %: {words}")


def _sms_words(table: CopyTable) -> str:
    """The SMs that copies over the link have, and where the numbers come from."""
    words = []
    for direction in LINK_DIRECTIONS:
        of = "measured" if direction in table.link_sms else "default, not measured"
        words.append(f"{table.default_sms(direction)} {direction} ({of})")
    return f"SMs of a kernel over the host link: {', '.join(words)}"


def _choices_words(table: CopyTable, direction: Direction, piece_bytes: int) -> str:
    """The chosen paths for one size of pieces, as in ``engine, kernel 31+``."""
    words = [
        path.removeprefix("copy_") + (f" {count:,}+" if count > 1 else "")
        for count, path in table.choices(direction, piece_bytes)
    ]
    return ", ".join(words) or "not measured"
