"""The soak, for seconds: that it runs, finds nothing, and would find something."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

FOLDER = Path(__file__).parent
MINUTES = 0.08
THREADS = 8
SEED = 20

BREAK_AND_RUN = """
import runpy, sys
soak = sys.argv[1]
sys.path.insert(0, soak.rpartition("/")[0])
import soak_internals
soak_internals.let_rows_be_freed_unclaimed()
del sys.argv[0]
runpy.run_path(soak, run_name="__main__")
"""


def test_eight_threads_do_everything_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import soak_allocators

    output = io.StringIO()
    found_nothing = soak_allocators.soak(MINUTES, THREADS, SEED, Console(file=output))
    assert found_nothing, output.getvalue()


@pytest.mark.parametrize("options", [{}, {"scrub": True}, {"debug": True}])
def test_a_storm_of_signals_for_a_second(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from soak_signals import Storm

    # A log record that is kept keeps a traceback, whose frames keep batches.
    monkeypatch.setattr(logging.getLogger("kvheap"), "propagate", False)
    storm = Storm(SEED, **options)
    storm.blow(1.5)
    assert storm.checkpoints >= 2
    assert storm.interrupts > 50
    assert storm.calls > 5


def test_the_command_would_find_blocks_that_are_freed_unclaimed() -> None:
    arguments = ["--minutes", str(MINUTES), "--threads", str(THREADS), "--seed", str(SEED)]
    command = [sys.executable, "-c", BREAK_AND_RUN, str(FOLDER / "soak_allocators.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"VIOLATION in phase plain, seed {SEED}" in done.stdout


def test_processes_that_share_a_heap_are_killed_for_seconds() -> None:
    command = [sys.executable, str(FOLDER / "soak_shared.py"), "--minutes", "0.03"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills" in done.stdout
