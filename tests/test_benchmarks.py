"""Every benchmark starts, with the packages of the tests alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

RUN_EACH = """\
import contextlib, io, runpy, sys

scripts = sys.argv[1:]
sys.path.insert(0, '.')
for script in scripts:
    sys.argv = [script, "--help"]
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, (script, end.code)
    except Exception as error:
        raise RuntimeError(script) from error
    assert text.getvalue().startswith("usage:"), script
"""


def test_every_benchmark_says_how_it_is_used() -> None:
    scripts = sorted(str(path) for path in BENCHMARKS.glob("bench_*.py"))
    assert scripts
    command = [sys.executable, "-c", RUN_EACH, *scripts]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    assert ended.returncode == 0, ended.stderr
