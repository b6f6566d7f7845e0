"""``kvheap plot``: draws a file of results, whatever kind it is of."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kvheap.cli import CommandError, MachineError
from kvheap.cli.outputs import cannot_write, require_picture, require_writable
from kvheap.cli.scripts import find_scripts, script_command
from kvheap.planning.table_json import FORMAT
from kvheap.snapshots import HeapSnapshot, is_snapshot

__all__ = ["KINDS", "Kind", "run"]

Contents = dict[str, Any]


class Kind(NamedTuple):
    """A kind of file that can be drawn."""

    name: str
    """What it is, for messages."""
    recognizes: Callable[[Contents], bool]
    """Whether contents are of this kind."""
    draw: Callable[[Path, Contents, Path], None]
    """Draws the file and its contents to a picture."""
    other_suffixes: tuple[str, ...] = ()
    """Suffixes of what it can be drawn to besides pictures."""


def run(options: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit status.

    Raises:
        CommandError: the file cannot be read, is of no known kind, or the picture cannot be
            written.
    """
    path: Path = options.file
    picture: Path = options.out or path.with_suffix(".png")
    contents = _read(path)
    kind = next((kind for kind in KINDS if kind.recognizes(contents)), None)
    if kind is None:
        known = ", ".join(kind.name for kind in KINDS)
        raise CommandError(f"{path} is of no kind that can be drawn: {known}")
    if picture.suffix.lower() not in kind.other_suffixes:
        require_picture(picture, "kvheap plot" if options.out is None else "--out")
    if picture.resolve() == path.resolve():
        raise CommandError(f"{path} would be overwritten by its picture: give another --out")
    require_writable(picture)
    try:
        kind.draw(path, contents, picture)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CommandError(f"{path} is damaged, as {kind.name}: {error!r}") from None
    except OSError as error:
        raise cannot_write(picture, error) from None
    print(f"{kind.name} drawn to {picture}")
    return 0


def _read(path: Path) -> Contents:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not JSON: {error}") from None
    if not isinstance(contents, dict):
        raise CommandError(f"{path} holds no results: a {type(contents).__name__}")
    return contents


def _draw_benchmark(path: Path, contents: Contents, picture: Path) -> None:
    """By the benchmark's own script, in a process of its own."""
    name, folder = contents["benchmark"], find_scripts()
    if name not in {script.stem.removeprefix("bench_") for script in folder.glob("bench_*.py")}:
        raise CommandError(f"{path} is of a benchmark that is not installed: {name!r}")
    command = script_command(folder, name, "--redraw", path, "--out", picture)
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MachineError(f"{path} could not be drawn by bench_{name}.py: {last}")


def _draw_replay(path: Path, contents: Contents, picture: Path) -> None:
    from kvheap.cli.replay_plot import draw

    draw(picture, contents)


def _draw_calibration(path: Path, contents: Contents, picture: Path) -> None:
    from kvheap.cli.calibrate import source_words
    from kvheap.cli.calibrate_plot import draw
    from kvheap.planning.table_json import table_from_json

    table = table_from_json(contents)
    draw(picture, table, source_words(table))


def _draw_snapshot(path: Path, contents: Contents, picture: Path) -> None:
    HeapSnapshot.from_json(contents).save(picture)


KINDS = [
    Kind("a benchmark's results", lambda found: "benchmark" in found, _draw_benchmark),
    Kind("a replay", lambda found: found.get("kind") == "replay", _draw_replay),
    Kind("a calibration", lambda found: found.get("format") == FORMAT, _draw_calibration),
    Kind("a heap's snapshot", is_snapshot, _draw_snapshot, (".html",)),
]
"""All kinds, in the order in which they are tried."""
