"""The files that a command writes. Checks before a long run that they can be written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kvheap.cli import CommandError, MachineError

__all__ = [
    "PICTURE_SUFFIXES",
    "cannot_write",
    "has_matplotlib",
    "require_picture",
    "require_writable",
]

_WRONG_PATH = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def has_matplotlib() -> bool:
    """Whether matplotlib is installed; imports nothing."""
    return importlib.util.find_spec("matplotlib") is not None


def require_picture(path: Path, option: str = "--plot") -> None:
    """Check that a picture can be drawn to ``path``, the value of ``option``.

    Raises:
        MachineError: matplotlib is missing.
        CommandError: the suffix is not of a supported format.
    """
    if not has_matplotlib():
        raise MachineError(f"{option} needs matplotlib: pip install matplotlib")
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise CommandError(f"{option} {path}: the name must end in {suffixes}")


def require_writable(path: Path) -> None:
    """Check that ``path`` can be written, without leaving a new file behind.

    Raises:
        CommandError: it cannot be written, or its folder does not exist.
    """
    is_new = not path.exists() and not path.is_symlink()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise cannot_write(path, error) from None
    if is_new:
        path.unlink()


def cannot_write(path: object, error: OSError) -> CommandError:
    """The error to raise when writing ``path`` failed with ``error``.

    A path that leads nowhere is the user's mistake; a full or broken disk is the machine's.
    """
    is_wrong_path = isinstance(error, _WRONG_PATH)
    kind = CommandError if is_wrong_path else MachineError
    return kind(f"cannot write {path}: {error.strerror}")
