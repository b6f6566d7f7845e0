"""The exit status says what happened: 1 is the verdict that bytes were wrong, and nothing else."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvheap.cli import main, replay

QUICK = ["replay", "--requests", "30", "--heap", "2MiB"]


def fails(error: BaseException) -> Any:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def test_help_and_versions_need_no_heavy_package() -> None:
    code = """
import sys
from kvheap.cli import main
for arguments in (["--help"], ["replay", "--help"], ["bench", "--help"], ["--version"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
heavy = {"torch", "numpy", "triton", "rich", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "kvheap 0." in ended.stdout


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError(), 3, "out of memory"),
        (OSError(errno.EIO, "Input/output error"), 3, "Input/output error"),
        (ZeroDivisionError("surprise"), 3, "this is a bug in kvheap"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("where", ["synthetic_trace", "Replay", "_table"])
def test_what_goes_wrong_is_never_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    words: str,
    where: str,
) -> None:
    monkeypatch.setattr(replay, where, fails(error))
    assert main(QUICK) == status
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_figures_are_written_before_the_table_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replay, "_table", fails(OSError(errno.ENOSPC, "No space left")))
    assert main([*QUICK, "--json", str(tmp_path / "out.json")]) == 3
    assert json.loads((tmp_path / "out.json").read_text())["mismatches"] == 0


def test_a_closed_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main([*QUICK, "--json", str(tmp_path / "out.json")]) == 3
        monkeypatch.undo()
    assert (tmp_path / "out.json").exists()


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    assert main([*QUICK, "--json", "/dev/full"]) == 3
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_characters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    trace = tmp_path / "Gespräch [red]日本[bold].jsonl"
    row = {"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}
    trace.write_text(json.dumps(row))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert main(["replay", str(trace)]) == 0
    sys.stdout.flush()
    assert b"[red]" in raw.getvalue()  # names are no markup


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_link_of_the_trace_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], link: Any
) -> None:
    trace, other = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text(
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n'
    )
    link(trace, other)
    before = trace.read_text()
    assert main(["replay", str(trace), "--json", str(other)]) == 2
    assert "is the trace itself" in capsys.readouterr().err
    assert trace.read_text() == before
