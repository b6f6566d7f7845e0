"""Packages that kvheap needs only for some of its features."""

from __future__ import annotations

import pytest


def need_matplotlib() -> None:
    """Skip the test that is running if matplotlib, which draws pictures, is not installed."""
    pytest.importorskip("matplotlib", reason="draws: needs matplotlib, pip install 'kvheap[plot]'")
