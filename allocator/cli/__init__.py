"""The ``kvheap`` command. Each sub-command is a module that is imported when it is run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kvheap import __version__

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["CommandError", "main"]

REPLAY_HELP = """\
Replay request traffic as a serving engine with a prefix cache would, and check every byte.

For each request, the leading chunks that the heap holds are hits: they are gathered and compared
with what was stored. The others are stored by one batched_allocate. Where the heap is full, chunks
are evicted first, in the order of --policy, and freed by one batched_free.

With --engine-layout, a paged KV cache as that engine keeps it takes part: hits are loaded from the
heap into random blocks of it, and compared where the engine would look for them; what is missing
is written to such blocks, and stored from there by one batched_store.
"""

REPLAY_NOTES = """\
geometries (KV of one chunk of 512 tokens):
  tiny              4 KiB   1 layer, 1 head, head dim 2, fp16
  small            32 KiB   2 layers, 2 KV heads, head dim 4, fp16
  small-mla        16 KiB   MLA: 2 layers, 8 elements a token, bf16
  small-indexer   132 KiB   2 layers, 128 values and a scale a token, 132 bytes
  small-opaque     12 KiB   2 layers, 32 blocks of 192 bytes
  llama-3-8b       64 MiB   32 layers, 8 KV heads, head dim 128, bf16
  llama-3-70b     160 MiB   80 layers, 8 KV heads, head dim 128, bf16
  llama-3-70b-tp4  40 MiB   one rank of four
  mistral-7b       64 MiB   32 layers, 8 KV heads, head dim 128, bf16
  qwen3-8b         72 MiB   36 layers, 8 KV heads, head dim 128, bf16
  gpt-oss-20b      24 MiB   24 layers, 8 KV heads, head dim 64, bf16
  deepseek-v3    34.3 MiB   MLA: 61 layers, 576 elements a token, bf16

engine layouts (blocks of 16 tokens):
  K and V      vllm-flash-nhd, vllm-flash-hnd, vllm-flashinfer-nhd, vllm-flashinfer-hnd,
               vllm-lbhnc, vllm-lbnhc, vllm-lhbnc, vllm-blhnc, vllm-blnhc, vllm-bhlnc,
               vllm-cross-layer, sglang-mha, trtllm, kv-tuples, kv-tuples-hnd
  MLA          mla, sglang-mla
  other        indexer, opaque

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

a trace has one request a line:
  {"timestamp": 0, "input_length": 900, "output_length": 52, "hash_ids": [46, 47]}
  timestamp in ms, lengths in tokens, one hash id for each 512-token chunk of the prompt.

times are of the host, from call to return; batched_allocate (with an engine layout:
batched_store) includes the copy (its launch, on a GPU). GB/s count each byte of KV once.

exit status: 0 all bytes were right, 1 some were not, 2 the replay could not be done.
"""

CALIBRATE_HELP = """\
Measure which path of a copy is the fastest on a GPU, and store it for kvheap.transfer.

Copies of scattered pieces of KV, between the device and pinned host memory or within the device,
can take three paths. Which is the fastest depends on the device, the direction, and the number
and size of the pieces; kvheap.transfer asks the stored table for every copy. Without one it goes
by figures that others published of an H100, H200 or A30, and by a cautious rule elsewhere.
"""

CALIBRATE_NOTES = """\
paths:
  kernel        an SM kernel over a list of pointers
  copy_engine   cuMemcpyBatchAsync, or an asynchronous copy for each piece
  staged        gathered on the device, and large copies of what was gathered (h2d and d2h)

directions:
  h2d           pinned host memory to the device
  d2h           the device to pinned host memory
  d2d           within the device

what is measured:
  pieces of 1, 4, 8, 16, 32, 64, 128, 256 KiB, 1 and 4 MiB, times 1, 4, 16, ... 65,536 pieces, up
  to 1 GiB in all, less where memory is short; by every path, in every direction. The device's
  pieces are scattered, the host's contiguous. Where time jumps between two sizes, sizes between
  them are measured too. Noisy cells (the middle half of their times spreads over more than 5 % of
  the median) are measured again; what stays noisy is marked. Larger copies are extrapolated.

  a time is what a caller waits for on an idle stream, the submission by the host included. Let
  nothing else run on the GPU meanwhile.

where it is stored:
  in $KVHEAP_CACHE_DIR, else $XDG_CACHE_HOME/kvheap, else ~/.cache/kvheap, in a file for each
  device name and driver version. Interrupted, nothing is stored. Another driver: calibrate again.

the table and the map:
  the table says which path is taken from how many pieces on: "engine, kernel 31+" is the copy
  engine up to 30 pieces, and the kernel from 31 on. The map's colour is the fastest path,
  its strength and the numbers are how many times as fast it is as the second; noisy cells are
  hatched, bars are crossovers that others published. The map needs matplotlib:
  pip install 'kvheap[plot]'.

examples:
  kvheap calibrate                                     measure cuda:0 for about a minute
  kvheap calibrate --device cuda:1 --budget 20 --json table.json
  kvheap calibrate --show                              the table that copies here go by
  kvheap calibrate --show --device-name "NVIDIA H100 80GB HBM3" --plot h100.png
  kvheap calibrate --show --table table.json           one from another machine

exit status: 0 done, 2 it could not be done, 130 interrupted.
"""


class CommandError(Exception):
    """What the user must change; printed as one line, exit status 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        command = importlib.import_module(f"kvheap.cli.{options.command}")
        status: int = command.run(options)
        return status
    except CommandError as error:
        print(f"kvheap {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kvheap {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvheap",
        description="A batched heap for KV-cache blocks.",
        epilog="'kvheap COMMAND --help' tells all about a command.",
    )
    parser.add_argument("--version", action="version", version=f"kvheap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_replay(commands)
    _add_calibrate(commands)
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
        help="bytes of the heap, as 4096, 64MiB or 1.5GB (default: %(default)s)",
    )
    replay.add_argument(
        "--geometry",
        metavar="NAME",
        help="what a chunk is, see below (default: tiny; with an engine layout, the small one "
        "that fits)",
    )
    replay.add_argument(
        "--engine-layout",
        metavar="NAME",
        help="copy to and from an engine's paged KV cache of this layout, see below",
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
        help="where the heap lives: cpu, cuda, cuda:1 (default: %(default)s)",
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
        help="of the made-up traffic and of the engine's blocks (default: %(default)s)",
    )
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    replay.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw occupancy, hit rate and the heap's map there",
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
        help="how long to measure; the largest copies are left out first (default: %(default)g)",
    )
    calibrate.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    calibrate.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the map there: .png, .svg or .pdf (with --show, default: "
        "kvheap-calibration.png)",
    )
    calibrate.add_argument(
        "--show",
        action="store_true",
        help="measure nothing: print and draw the stored table, or what is used without one",
    )
    calibrate.add_argument(
        "--device-name",
        metavar="NAME",
        help="with --show: the table of a device of this name; needs no GPU",
    )
    calibrate.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="with --show: a table that --json wrote; needs no GPU",
    )
