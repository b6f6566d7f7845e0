"""What is run only if asked for."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what takes two engine processes and minutes, unless a marker selects it."""
    if "tensor_parallel" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="takes 150 s: run with -m tensor_parallel")
    for item in items:
        if item.get_closest_marker("tensor_parallel"):
            item.add_marker(skip)
