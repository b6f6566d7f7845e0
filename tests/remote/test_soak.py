"""The soak, for seconds: that it runs and finds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from remote_nodes import need_nixl

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

FOLDER = Path(__file__).parent.parent / "soak"


def test_owners_that_are_killed_and_frozen_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import soak_remote

    found_nothing, counts = soak_remote.soak(0.06, 7)
    assert found_nothing, counts
    assert counts["read"]
    assert counts["checked"]
