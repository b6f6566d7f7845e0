"""The soak, for seconds: that it runs, finds nothing, and would find something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parent.parent / "soak" / "soak_allocators.py"

BREAK_COUNTS = """
import runpy, sys
from kvheap.blocks.memory_batch import MemoryBatch
claim = MemoryBatch.claim
MemoryBatch.claim = lambda batch, rows, skip_freed=False: (
    claim(batch, rows, skip_freed) if rows is None else rows
)
sys.argv = ["soak", *sys.argv[2:]]
runpy.run_path({soak!r}, run_name="__main__")
"""


def soak(*command: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--minutes", "0.08", "--threads", "8", "--seed", "20"]
    return subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, check=False
    )


def test_eight_threads_do_everything_for_seconds() -> None:
    done = soak(str(SOAK))
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_would_find_blocks_that_are_freed_unclaimed() -> None:
    done = soak("-c", BREAK_COUNTS.format(soak=str(SOAK)), "soak")
    assert done.returncode == 1
    assert "seed 20" in done.stdout + done.stderr
