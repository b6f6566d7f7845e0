"""Fixtures for the command's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def single_threaded_torch() -> Iterator[None]:
    """One torch thread: a replay makes thousands of small copies.

    On a busy machine they would wait for each other's threads ten times as long as they copy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
