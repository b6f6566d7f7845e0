"""``kvheap bench``: what it runs, leaves out, reports and writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvheap.cli import bench, main
from kvheap.cli.bench import BENCHMARKS
from kvheap.cli.bench_summary import SUMMARIES, lines_of
from kvheap.cli.texts import BENCH_NOTES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

SCRIPT = """
import json, sys
arguments = sys.argv[1:]
out = arguments[arguments.index("--out") + 1]
print("a table")
times = {"p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0}
rows = [{"extents": 7, "kvheap": times, "LMCache": dict(times, p50_us=8.0)}]
found = {"benchmark": NAME, "pair": rows, "arguments": arguments}
found["noisy"] = {"figures": 2, "of": 3}
open(f"{out}/{NAME}-2026-01-02.json", "w").write(json.dumps(found))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts; the command runs beside it."""
    monkeypatch.chdir(tmp_path)
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "_report.py").touch()
    for benchmark in BENCHMARKS:
        text = f"NAME = {benchmark.name!r}\n{SCRIPT}"
        (scripts / f"bench_{benchmark.name}.py").write_text(text)
    return scripts


def test_one_table_and_a_folder_of_results(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_is_installed", lambda name: name != "vllm")
    assert main(["bench", "--quick", "--device", "cpu", "--benchmarks", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "allocate + free, 7 free extents" in printed
    assert "LMCache: 8 us" in printed
    assert "4.00" in printed
    assert "2 of 3" in printed
    assert "left out: vllm_tier needs vllm" in printed
    out = Path("kvheap-bench")
    names = {each.name for each in BENCHMARKS} - {"vllm_tier"}
    assert {path.stem for path in out.glob("*.log")} == names
    assert (out / "files.log").read_text() == "a table\n"
    summary = {each["benchmark"]: each for each in json.loads((out / "summary.json").read_text())}
    assert summary.keys() == names
    assert summary["address_manager"]["lines"][0]["ratio"] == 4.0
    arguments = json.loads((out / "transfer-2026-01-02.json").read_text())["arguments"]
    assert arguments == ["--out", "kvheap-bench", "--quick", "--device", "cpu"]
    arguments = json.loads((out / "files-2026-01-02.json").read_text())["arguments"]
    assert arguments == ["--out", "kvheap-bench", "--quick"]


def test_one_that_fails_is_named_and_the_others_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bench_block_copy.py").write_text("print('before'); raise SystemExit('no luck')")
    arguments = ["bench", "block_copy", "allocators", "--benchmarks", str(folder)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "block_copy failed: no luck" in printed
    assert "results of 1 benchmarks" in printed


@pytest.mark.parametrize("is_there", [True, False])
def test_a_peer_that_is_not_installed_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_there: bool,
) -> None:
    monkeypatch.setattr(bench, "_is_installed", lambda name: is_there)
    arguments = ["bench", "allocators", "transfer", "small_calls", "--benchmarks", str(folder)]
    assert main(arguments) == 0
    words = "lmcache is not installed: the lines of allocators, small_calls that have no peer"
    assert (words in capsys.readouterr().out) is not is_there


def test_results_of_an_earlier_run_are_not_taken_for_its_own(folder: Path) -> None:
    arguments = ["bench", "allocators", "--benchmarks", str(folder)]
    assert main(arguments) == 0
    (folder / "bench_allocators.py").write_text("")
    os.utime("kvheap-bench/allocators-2026-01-02.json", (1, 1))
    assert main(arguments) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "unknown benchmark 'nonsense'; known are address_manager"),
        (["vllm_engine"], "vllm_engine needs vllm_cpu"),
        (["--benchmarks", "/nowhere"], "--benchmarks /nowhere: there are no benchmarks"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "_is_installed", lambda name: False)
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_an_interrupt_ends_the_benchmark_too(folder: Path) -> None:
    marker = folder / "marker"
    (folder / "bench_transfer.py").write_text(
        f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(1000)"
    )
    # What runs in a shell's background ignores the signal, and so would its children.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "kvheap", "bench", "transfer"]
    process = subprocess.Popen(
        [*command, "--benchmarks", str(folder)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert not Path(f"/proc/{children[0]}").exists()


def test_the_help_names_every_benchmark() -> None:
    names = [each.name for each in BENCHMARKS]
    assert [line.split()[0] for line in BENCH_NOTES.splitlines()[1:13]] == names
    assert SUMMARIES.keys() == set(names)
    scripts = {path.stem for path in RESULTS.parent.glob("bench_*.py")}
    assert scripts >= {f"bench_{name}" for name in names}


def test_published_results_are_summarized() -> None:
    for path in RESULTS.glob("*/*.json"):
        found = json.loads(path.read_text())
        if found["benchmark"] in SUMMARIES:
            lines = lines_of(found)
            assert lines, path
            assert all(line.own for line in lines)
