"""Packages that kvheap needs only for some of its features."""

from __future__ import annotations

import pytest

NEED_VLLM = {
    f"kvheap.integrations.vllm.{name}"
    for name in (
        "chunk_memory",
        "connector",
        "failures",
        "file_tier",
        "geometry",
        "identity",
        "locations",
        "manager",
        "metrics",
        "shared_memory",
        "spec",
        "worker",
    )
}
"""Modules that cannot be imported without vLLM."""


NEED_NIXL = {"kvheap.remote.node"}
"""Modules whose examples need NIXL."""


def need_matplotlib() -> None:
    """Skip the test that is running if matplotlib, which draws pictures, is not installed."""
    pytest.importorskip("matplotlib", reason="draws: needs matplotlib, pip install matplotlib")
