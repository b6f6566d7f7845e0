"""The sub-commands of ``kvheap`` and their options; imports none of what they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kvheap import __version__
from kvheap.cli.texts import (
    BENCH_HELP,
    BENCH_NOTES,
    CALIBRATE_HELP,
    CALIBRATE_NOTES,
    DOCTOR_HELP,
    DOCTOR_NOTES,
    PLOT_HELP,
    REPLAY_HELP,
    REPLAY_NOTES,
)

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["parser"]


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command; its ``command`` is the module to run."""
    found = argparse.ArgumentParser(
        prog="kvheap",
        description="A batched heap for KV-cache blocks.",
        epilog="'kvheap COMMAND --help' describes a command.",
    )
    found.add_argument("--version", action="version", version=f"kvheap {__version__}")
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_replay(commands)
    _add_calibrate(commands)
    _add_bench(commands)
    _add_plot(commands)
    _add_doctor(commands)
    return found


def _add_command(
    commands: Commands, name: str, help: str, description: str, notes: str = ""
) -> argparse.ArgumentParser:
    """A command, whose help is printed as it is written."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_file(command: argparse.ArgumentParser, name: str, help: str) -> None:
    command.add_argument(name, type=Path, metavar="FILE", help=help)


def _add_replay(commands: Commands) -> None:
    replay = _add_command(
        commands,
        "replay",
        "replay request traffic through a heap and check every byte",
        REPLAY_HELP,
        REPLAY_NOTES,
    )
    replay.add_argument(
        "trace", nargs="?", type=Path, help="request trace; without it, made-up traffic"
    )
    replay.add_argument(
        "--heap",
        help="size of the heap, such as 4096, 64MiB or 1.5GB (default: 16MiB; see below)",
    )
    replay.add_argument(
        "--geometry",
        metavar="NAME",
        help="the geometry of a chunk, see below (default: tiny; with an engine layout, the "
        "small one that fits; without any option, that of a real model)",
    )
    replay.add_argument(
        "--engine-layout",
        metavar="NAME",
        help="copy to and from an engine's paged KV cache of this layout, see below",
    )
    replay.add_argument(
        "--chunk-tokens",
        type=int,
        metavar="N",
        help="tokens of the chunk that an id of the trace names (default: what the trace's lengths "
        "say, else 512)",
    )
    replay.add_argument(
        "--policy",
        default="lru",
        metavar="NAME",
        help="which chunks are evicted first, see below (default: %(default)s)",
    )
    replay.add_argument(
        "--device",
        default="cpu",
        help="the device of the heap: cpu, cuda, cuda:1 (default: %(default)s)",
    )
    replay.add_argument(
        "--peer",
        metavar="SIZE",
        help="keep what is evicted in a heap of this size in a second process, and read it back "
        "by NIXL",
    )
    replay.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="at most N requests (default: all; made-up traffic: 2000, or 100 of a real model)",
    )
    replay.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the made-up traffic and of the engine's random blocks (default: %(default)s)",
    )
    replay.add_argument(
        "--compare",
        action="store_true",
        help="also tell the hit rates of every policy, with heaps of a quarter to four times the "
        "size; without bytes, so it takes about a fifth of the time for each",
    )
    _add_file(replay, "--json", "write the figures to FILE; 'kvheap plot' draws it")
    _add_file(replay, "--plot", "draw occupancy, hit rate and the heap's map to FILE")


def _add_calibrate(commands: Commands) -> None:
    calibrate = _add_command(
        commands,
        "calibrate",
        "measure which path of a copy is the fastest on this GPU",
        CALIBRATE_HELP,
        CALIBRATE_NOTES,
    )
    calibrate.add_argument(
        "--device", default="cuda:0", help="the GPU to measure (default: %(default)s)"
    )
    calibrate.add_argument(
        "--budget",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="time for measuring; if it is too short, the largest copies are left out first "
        "(default: %(default)g)",
    )
    _add_file(calibrate, "--json", "write the table to FILE too")
    _add_file(
        calibrate,
        "--plot",
        "draw the map to FILE, a .png, .svg or .pdf (default with --show: kvheap-calibration.png)",
    )
    calibrate.add_argument(
        "--show",
        action="store_true",
        help="measure nothing; print and draw the stored table, or the one used in its place",
    )
    calibrate.add_argument(
        "--device-name",
        metavar="NAME",
        help="with --show: the table for a device of this name; needs no GPU",
    )
    _add_file(calibrate, "--table", "with --show: a table written by --json; needs no GPU")


def _add_bench(commands: Commands) -> None:
    bench = _add_command(
        commands,
        "bench",
        "run the benchmarks that suit this machine, and compare with their peers",
        BENCH_HELP,
        BENCH_NOTES,
    )
    bench.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks to run, see below (default: all)"
    )
    bench.add_argument("--quick", action="store_true", help="fewer sizes, rounds and bytes")
    bench.add_argument(
        "--device", metavar="NAME", help="cpu or cuda (default: cuda if torch sees a GPU)"
    )
    bench.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("kvheap-bench"),
        help="where results, pictures and logs go (default: %(default)s)",
    )
    bench.add_argument(
        "--benchmarks",
        type=Path,
        metavar="DIR",
        help="the folder of the scripts (default: those that are installed with kvheap)",
    )


def _add_plot(commands: Commands) -> None:
    plot = _add_command(
        commands,
        "plot",
        "draw the results of a benchmark, a replay or a calibration again",
        PLOT_HELP,
    )
    plot.add_argument("file", type=Path, help="the file, a .json")
    _add_file(
        plot,
        "--out",
        "the picture, a .png, .svg or .pdf, for a heap's map also a page, an .html "
        "(default: FILE with .png for its suffix)",
    )


def _add_doctor(commands: Commands) -> None:
    doctor = _add_command(
        commands,
        "doctor",
        "say what this machine has for kvheap, and what is missing",
        DOCTOR_HELP,
        DOCTOR_NOTES,
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
