"""The ``kvheap`` command. Each sub-command is a module that is imported when it is run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvheap import __version__

__all__ = ["CommandError", "main"]

REPLAY_HELP = """\
Replay request traffic as a serving engine with a prefix cache would, and check every byte.

For each request, the leading chunks that the heap holds are hits: they are gathered and compared
with what was stored. The others are stored by one batched_allocate. When the heap is full, the
least recently used chunks are freed by one batched_free, and it is tried again.

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

examples:
  kvheap replay                                        made-up traffic, 16 MiB heap
  kvheap replay trace.jsonl --heap 1GiB --json out.json
  kvheap replay --geometry llama-3-8b --heap 40GiB --device cuda --plot heap.png
  kvheap replay trace.jsonl --engine-layout vllm-flash-hnd --heap 512MiB

a trace has one request a line:
  {"timestamp": 0, "input_length": 900, "output_length": 52, "hash_ids": [46, 47]}
  timestamp in ms, lengths in tokens, one hash id for each 512-token chunk of the prompt.

times are of the host, from call to return; batched_allocate (with an engine layout:
batched_store) includes the copy (its launch, on a GPU). GB/s count each byte of KV once.

exit status: 0 all bytes were right, 1 some were not, 2 the replay could not be done.
"""


class CommandError(Exception):
    """What the user must change; printed as one line, exit status 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        from kvheap.cli import replay

        return replay.run(options)
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
    return parser
