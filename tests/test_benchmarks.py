"""Every benchmark starts, with the packages of the tests alone, and draws its published results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from optional import need_matplotlib

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


REDRAW_EACH = """\
import json, pathlib, runpy, sys

out = pathlib.Path(sys.argv[1])
sys.path.insert(0, '.')
for number, file in enumerate(sys.argv[2:]):
    name = json.loads(pathlib.Path(file).read_text())["benchmark"]
    picture = out / f"{number}.png"
    sys.argv = [name, "--redraw", file, "--out", str(picture)]
    try:
        runpy.run_path(f"bench_{name}.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, (file, end.code)
    except Exception as error:
        raise RuntimeError(file) from error
    assert picture.stat().st_size > 10_000, file
"""


def test_every_published_result_is_drawn_again(tmp_path: Path) -> None:
    need_matplotlib()
    files = sorted(str(path) for path in (BENCHMARKS / "results").glob("*/*.json"))
    assert files
    command = [sys.executable, "-c", REDRAW_EACH, str(tmp_path), *files]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    assert ended.returncode == 0, ended.stderr


def test_every_benchmark_says_how_it_is_used() -> None:
    scripts = sorted(str(path) for path in BENCHMARKS.glob("bench_*.py"))
    assert scripts
    command = [sys.executable, "-c", RUN_EACH, *scripts]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    assert ended.returncode == 0, ended.stderr
