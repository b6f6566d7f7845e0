"""``kvheap replay --peer``: a second process holds the second tier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from remote_nodes import need_nixl

from kvheap.cli import main

WHY_NOT = need_nixl()


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_what_is_evicted_comes_back_right(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--requests", "60", "--heap", "2MiB", "--geometry", "small", "--json", str(path)]
    assert main(["replay", *options, "--peer", "16MiB"]) == 0
    beside = json.loads(path.read_text())
    assert beside["mismatches"] == 0
    assert beside["fetched"] > 50
    assert main(["replay", *options]) == 0
    alone = json.loads(path.read_text())
    assert alone["fetched"] is None
    assert alone["hits"] == beside["hits"]
    assert alone["stored"] == beside["stored"] + beside["fetched"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--peer", "no"], "--peer must be a positive number of bytes"),
        (
            ["--geometry", "tiny", "--peer", "1kB"],
            "--peer 1kB has no room for a chunk of 4096 bytes",
        ),
    ],
)
def test_wrong_sizes(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *options]) == 2
    assert text in capsys.readouterr().err.replace("\n", " ")
