"""``kvheap plot``: what it draws, and what it says of files that it cannot draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from optional import need_matplotlib

from kvheap import TensorMemoryAllocator
from kvheap.cli import main
from kvheap.planning.planner import table_for
from kvheap.planning.table_json import table_to_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``tests/test_benchmarks.py`` draws every published result."""
    need_matplotlib()
    picture = tmp_path / "it.png"
    (found,) = RESULTS.glob("*/files-*.json")
    assert main(["plot", str(found), "--out", str(picture)]) == 0
    assert is_picture(picture)
    assert capsys.readouterr().out == f"a benchmark's results drawn to {picture}\n"


def test_a_replay(tmp_path: Path) -> None:
    need_matplotlib()
    figures = tmp_path / "replay.json"
    arguments = ["--geometry", "tiny", "--heap", "1MiB", "--requests", "60", "--compare"]
    assert main(["replay", *arguments, "--json", str(figures), "--plot", f"{figures}.png"]) == 0
    assert main(["plot", str(figures)]) == 0
    assert is_picture(tmp_path / "replay.png")
    assert (tmp_path / "replay.png").read_bytes() == Path(f"{figures}.png").read_bytes()


def test_a_calibration(tmp_path: Path) -> None:
    need_matplotlib()
    table = tmp_path / "table.json"
    table.write_text(json.dumps(table_to_json(table_for("NVIDIA H100 80GB HBM3", "13.0"))))
    assert main(["plot", str(table)]) == 0
    assert is_picture(tmp_path / "table.png")


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_a_snapshot(tmp_path: Path, suffix: str) -> None:
    need_matplotlib()
    heap = TensorMemoryAllocator(torch.empty(1 << 20, dtype=torch.uint8))
    batch = heap.batched_allocate([2048], torch.float32, 5)
    assert batch is not None
    heap.snapshot().save(tmp_path / "heap.json")
    drawn = tmp_path / f"map{suffix}"
    assert main(["plot", str(tmp_path / "heap.json"), "--out", str(drawn)]) == 0
    assert is_picture(drawn) if suffix == ".png" else "<canvas" in drawn.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[1]", "holds no results: a list"),
        ("{}", "is of no kind that can be drawn: a benchmark's results, a replay, a calibration"),
        ('{"benchmark": "nonsense"}', "is of a benchmark that is not installed: 'nonsense'"),
        ('{"benchmark": "../replay"}', "is of a benchmark that is not installed"),
        ('{"benchmark": ["files"]}', "is damaged, as a benchmark's results"),
        ('{"kind": "replay"}', "is damaged, as a replay: KeyError"),
        ('{"format": "kvheap copy table"}', "is damaged, as a calibration"),
    ],
)
def test_a_file_that_cannot_be_drawn(
    text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_matplotlib()
    path = tmp_path / "it.json"
    if text is not None:
        path.write_text(text)
    assert main(["plot", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "it.png").exists()


def test_the_picture_does_not_overwrite_what_it_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_matplotlib()
    path = tmp_path / "it.png"
    path.write_text('{"kind": "replay"}')
    assert main(["plot", str(path)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert path.read_text() == '{"kind": "replay"}'


def test_a_damaged_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_matplotlib()
    path = tmp_path / "it.json"
    path.write_text('{"benchmark": "files"}')
    assert main(["plot", str(path)]) == 3
    assert "could not be drawn by bench_files.py: KeyError" in capsys.readouterr().err
