"""Fixtures for the command's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvheap.cli import replay


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little memory that a replay takes small chunks if nothing else is said."""
    monkeypatch.setattr(replay, "available_bytes", lambda: replay.MODEL_NEEDS_BYTES - 1)


@pytest.fixture(autouse=True)
def single_threaded_torch() -> Iterator[None]:
    """One torch thread: a replay makes thousands of small copies.

    On a busy machine they would wait for each other's threads ten times as long as they copy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
