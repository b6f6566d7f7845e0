"""Where the benchmarks' scripts are, and how one is started."""

from __future__ import annotations

import sys
from pathlib import Path

import kvheap
from kvheap.cli import CommandError, MachineError

__all__ = ["find_scripts", "script_command"]


def find_scripts(folder: Path | None = None) -> Path:
    """The folder of the benchmarks' scripts.

    Args:
        folder: as the user says; None: what is installed with kvheap, or the checkout that kvheap
            is imported from.

    Raises:
        CommandError: the user's folder has none.
        MachineError: none are installed.
    """
    if folder is not None:
        if not (folder / "_report.py").is_file():
            raise CommandError(f"--benchmarks {folder}: there are no benchmarks of kvheap")
        return folder
    package = Path(kvheap.__file__)
    for found in (package.parent / "benchmarks", package.resolve().parent.parent / "benchmarks"):
        if (found / "_report.py").is_file():
            return found
    raise MachineError(
        "the scripts of the benchmarks are not installed: give --benchmarks DIR, the folder "
        "'benchmarks' of a checkout of kvheap"
    )


def script_command(folder: Path, name: str, *arguments: str | Path) -> list[str]:
    """The command line that runs a benchmark with this Python."""
    return [sys.executable, str(folder / f"bench_{name}.py"), *map(str, arguments)]
