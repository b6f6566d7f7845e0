"""The ``kvheap`` command. Each sub-command is a module, imported only when it is run."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper

from kvheap.cli.options import parser

__all__ = ["CommandError", "MachineError", "main"]


class CommandError(Exception):
    """A mistake in the arguments or in a file's contents; printed as one line, exit status 2."""

    status = 2


class MachineError(CommandError):
    """What the machine does not provide: memory, a device, a package, room on a disk; status 3."""

    status = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    1 is a verdict (bytes were wrong, the machine is not fit) and nothing else: an error that
    nobody foresaw is 3.
    """
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may lack characters of a file's name
            stream.reconfigure(errors="backslashreplace")
    try:
        command = importlib.import_module(f"kvheap.cli.{options.command}")
        status: int = command.run(options)
        sys.stdout.flush()
        return status
    except CommandError as error:
        return _fail(options.command, str(error), error.status)
    except KeyboardInterrupt:
        return _fail(options.command, "interrupted", 130)
    except (BrokenPipeError, SystemExit):  # rich makes SystemExit(1) of the former
        # Python flushes standard output at exit, which would fail once more.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(options.command, "nobody reads the output any more", MachineError.status)
    except MemoryError:
        return _fail(options.command, "out of memory", MachineError.status)
    except OSError as error:
        return _fail(options.command, str(error), MachineError.status)
    except Exception:
        traceback.print_exc()
        return _fail(options.command, "this is a bug in kvheap; please report it", 3)


def _fail(command: str, message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"kvheap {command}: {message}", file=sys.stderr)
    return status
