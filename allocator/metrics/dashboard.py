"""``dashboard``: a Grafana dashboard of kvheap's metrics, to be imported or provisioned.

``python -m kvheap.metrics > kvheap.json`` writes it to a file.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

__all__ = ["dashboard"]


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model of the dashboard; its data source and names are variables."""
    text = resources.files("kvheap.metrics").joinpath("dashboard.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
