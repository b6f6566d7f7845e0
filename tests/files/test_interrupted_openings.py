"""Openings of tiers that a signal handler's exception ends: the caller gets that exception."""

from __future__ import annotations

from pathlib import Path

import pytest
from file_tiers import open_tier
from foreign_code import interrupts, no_deadlock

from kvheap.files import FileTier

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")


def test_it_is_no_want_of_room(tmp_path: Path) -> None:
    number = 0
    opened: list[FileTier] = []
    while True:
        with no_deadlock():
            was_struck = interrupts(
                number,
                lambda: opened.append(open_tier(tmp_path / f"{number}")),  # noqa: B023
                TimeoutError,
                modules=("kvheap.files.data_file", "kvheap.memory.boots"),
            )
        assert not (was_struck and opened), f"nobody was told at place {number}"
        if not was_struck:
            break
        number += 1
    opened.pop().close()
    assert number > 10
