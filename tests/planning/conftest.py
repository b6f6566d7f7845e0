"""Tables are stored in a folder of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvheap.planning.planner import forget_tables


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVHEAP_CACHE_DIR", str(tmp_path / "cache"))
    forget_tables()
    return tmp_path / "cache"
