"""Scrapes and queries, as Prometheus' own tool checks them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="needs prometheus_client: kvheap[prometheus]")

from watched_world import whole_world

from kvheap.metrics import dashboard


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run promtool; skips the test where there is none, unless KVHEAP_REQUIRE_PROMTOOL is set."""
    path = shutil.which("promtool")
    if path is None:
        reason = "needs promtool (Debian: prometheus)"
        if os.environ.get("KVHEAP_REQUIRE_PROMTOOL"):
            pytest.fail(reason)
        pytest.skip(reason)
    command = [path, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stderr.lower(), done.stderr


def test_it_finds_no_fault_in_a_scrape(tmp_path: Path) -> None:
    with whole_world(tmp_path) as scrape:
        promtool("check", "metrics", text=scrape.text)


def test_it_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [
        re.sub(r"\$(heap|store|tier|shared_heap|node)\b", ".*", target["expr"]).replace(
            "$__rate_interval", "5m"
        )
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "rules.yml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))
