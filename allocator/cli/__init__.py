"""The ``kvheap`` command. Each sub-command is a module, imported only when it is run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kvheap import __version__

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["CommandError", "MachineError", "main"]

REPLAY_HELP = """\
Replay request traffic as a serving engine with a prefix cache would, and check every byte.

For each request, the leading chunks that the heap holds are hits: they are gathered and compared
with what was stored. The others are stored by one batched_allocate. When the heap is full, chunks
are evicted first, in the order of --policy, and freed by one batched_free.

With --engine-layout, chunks go through a paged KV cache in the layout of that engine. Hits are
loaded from the heap into random blocks of the cache, and compared at the places where the engine
would read them. Missing chunks are written to random blocks of the cache, and stored from there by
one batched_store.
"""

REPLAY_NOTES = """\
geometries (KV of one chunk of 512 tokens):
  tiny              4 KiB   1 layer, 1 head, head dim 2, fp16
  small            32 KiB   2 layers, 2 KV heads, head dim 4, fp16
  small-nvfp4     144 KiB   2 layers, 2 KV heads, head dim 64, NVFP4: 36 bytes a head
  small-mla        16 KiB   MLA: 2 layers, 8 elements a token, bf16
  small-indexer   132 KiB   2 layers, 132 bytes a token: 128 values and a scale
  small-opaque     12 KiB   2 layers, 32 blocks of 192 bytes
  llama-3-8b       64 MiB   32 layers, 8 KV heads, head dim 128, bf16
  llama-3-8b-nvfp4 18 MiB   the same in NVFP4: 72 bytes a head
  llama-3-70b     160 MiB   80 layers, 8 KV heads, head dim 128, bf16
  llama-3-70b-tp4  40 MiB   one rank of four
  mistral-7b       64 MiB   32 layers, 8 KV heads, head dim 128, bf16
  qwen3-8b         72 MiB   36 layers, 8 KV heads, head dim 128, bf16
  gpt-oss-20b      24 MiB   24 layers, 8 KV heads, head dim 64, bf16
  deepseek-v3    34.3 MiB   MLA: 61 layers, 576 elements a token, bf16

engine layouts (blocks of 16 tokens):
  K and V      vllm-flash-nhd, vllm-flash-hnd, vllm-flashinfer-nhd, vllm-flashinfer-hnd,
               vllm-lbhnc, vllm-lbnhc, vllm-lhbnc, vllm-blhnc, vllm-blnhc, vllm-bhlnc,
               vllm-cpu, vllm-cross-layer, sglang-mha, sglang-mha-hnd, trtllm, kv-tuples,
               kv-tuples-hnd, kv-tuples-slots
  NVFP4        vllm-nvfp4, vllm-nvfp4-linear
  MLA          mla, sglang-mla, sglang-rows, vllm-packed, plane-tuples
  other        indexer, values-scales, opaque

policies (which chunks are evicted first):
  lru      the least recently used
  gdsf     those with the fewest uses, where a use counts less the longer ago it was
  s3fifo   those that were not used again soon after they were stored; then the oldest
  arc      the least recently used, of those used once or of those used again: of the list that
           has more than its share, which follows the hits

examples:
  kvheap replay                                        made-up traffic, 16 MiB heap
  kvheap replay trace.jsonl --heap 1GiB --json out.json
  kvheap replay --geometry llama-3-8b --heap 40GiB --device cuda --plot heap.png
  kvheap replay trace.jsonl --engine-layout vllm-flash-hnd --heap 512MiB
  kvheap replay trace.jsonl --policy gdsf --heap 64MiB

a trace has one request per line:
  {"timestamp": 0, "input_length": 900, "output_length": 52, "hash_ids": [46, 47]}
  timestamp in ms, lengths in tokens, one hash id for each 512-token chunk of the prompt.

times are measured on the host, from call to return. That of batched_allocate (with an engine
layout, of batched_store) includes the copy, or on a GPU, its launch. GB/s count each byte of KV
once.

exit status: 0 all bytes were right, 1 some were wrong, 2 an argument or the trace is wrong,
3 the machine cannot do it (memory, device, disk, package), 130 interrupted.
"""

CALIBRATE_HELP = """\
Measure which path of a copy is the fastest on a GPU, and store the table for kvheap.transfer.

Copies of scattered pieces of KV, between the device and pinned host memory or within the device,
can take three paths. Which path is the fastest depends on the device, the direction, and the number
and size of the pieces; kvheap.transfer looks it up in the stored table for every copy. Without a
table it uses published figures for an H100, H200 or A30, and a cautious rule for other devices.
"""

CALIBRATE_NOTES = """\
paths:
  kernel        an SM kernel over a list of pointers
  copy_engine   cuMemcpyBatchAsync, or an asynchronous copy for each piece
  staged        through an extent on the device, with large copies across the link (h2d, d2h)

directions:
  h2d           pinned host memory to the device
  d2h           the device to pinned host memory
  d2d           within the device

what is measured:
  every path in every direction; pieces of 1, 4, 8, 16, 32, 64, 128, 256 KiB, 1 and 4 MiB,
  1, 4, 16, ... 65,536 of them at a time, up to 1 GiB in all, or less if memory is short. Pieces are
  scattered on the device and contiguous on the host. If the time jumps between two sizes, sizes
  between them are measured too. Noisy cells, in which the middle half of the times spreads over
  more than 5 % of the median, are measured again; those that stay noisy are marked. Times of larger
  copies are extrapolated.

  a time is how long a caller waits on an idle stream, including the submission by the host. Run
  nothing else on the GPU meanwhile.

where it is stored:
  in $KVHEAP_CACHE_DIR, else $XDG_CACHE_HOME/kvheap, else ~/.cache/kvheap; one file for each device
  name and driver version, so calibrate again after a driver update. An interrupted calibration
  stores nothing.

the table and the map:
  the table shows the path for each number of pieces: "engine, kernel 31+" means the copy engine
  for up to 30 pieces, and the kernel for 31 or more. The colour of the map shows the fastest path;
  the strength of the colour and the numbers show its speedup over the second fastest path. Noisy
  cells are hatched; bars are published crossovers. The map needs matplotlib:
  pip install 'kvheap[plot]'.

examples:
  kvheap calibrate                                     measure cuda:0 for about a minute
  kvheap calibrate --device cuda:1 --budget 20 --json table.json
  kvheap calibrate --show                              the table that copies use on this machine
  kvheap calibrate --show --device-name "NVIDIA H100 80GB HBM3" --plot h100.png
  kvheap calibrate --show --table table.json           a table from another machine

exit status: 0 done, 2 an argument or a table is wrong, 3 the machine cannot do it (no CUDA device,
memory, disk, package), 130 interrupted.
"""


DOCTOR_HELP = """\
Look at this machine, and say what it has for kvheap, what kvheap will use, and what is missing.

Looks at packages and their versions, CUDA, GPUs and their driver, memory, huge pages, NUMA nodes,
a C compiler for Triton, and the engines that kvheap has adapters for. Changes nothing. Engines are
not imported: only the versions of what is installed are read.
"""

DOCTOR_NOTES = """\
states:
  ok        there, and fit for use
  absent    kvheap works without it
  untested  a version that kvheap's tests never met; it may work
  wrong     something that kvheap needs is missing or fails

exit status: 0 nothing is wrong, 1 something is, 3 the report could not be made or printed.
"""


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
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvheap",
        description="A batched heap for KV-cache blocks.",
        epilog="'kvheap COMMAND --help' describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"kvheap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_replay(commands)
    _add_calibrate(commands)
    _add_doctor(commands)
    return parser


def _add_replay(commands: Commands) -> None:
    replay = commands.add_parser(
        "replay",
        help="replay request traffic through a heap and check every byte",
        description=REPLAY_HELP,
        epilog=REPLAY_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument(
        "trace", nargs="?", type=Path, help="request trace; without it, made-up traffic"
    )
    replay.add_argument(
        "--heap",
        default="16MiB",
        help="size of the heap, such as 4096, 64MiB or 1.5GB (default: %(default)s)",
    )
    replay.add_argument(
        "--geometry",
        metavar="NAME",
        help="the geometry of a chunk, see below (default: tiny; with an engine layout, the "
        "small one that fits)",
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
        "through NIXL (needs kvheap[nixl])",
    )
    replay.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="at most N requests (default: all; made-up traffic: 2000)",
    )
    replay.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the made-up traffic and of the engine's random blocks (default: %(default)s)",
    )
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    replay.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw occupancy, hit rate and the heap's map to FILE",
    )


def _add_calibrate(commands: Commands) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="measure which path of a copy is the fastest on this GPU",
        description=CALIBRATE_HELP,
        epilog=CALIBRATE_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    calibrate.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE too")
    calibrate.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the map to FILE, a .png, .svg or .pdf (default with --show: "
        "kvheap-calibration.png)",
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
    calibrate.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="with --show: a table written by --json; needs no GPU",
    )


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has for kvheap, and what is missing",
        description=DOCTOR_HELP,
        epilog=DOCTOR_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
