"""The soak, for seconds: that it runs and finds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")

FOLDER = Path(__file__).parent.parent / "soak"


def test_processes_that_are_killed_and_files_that_are_damaged_for_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import soak_files

    soak = soak_files.Soak(tmp_path, 5)
    soak.run(4.0)
    assert not soak.wrong
    assert soak.done["looks"]
