"""The Grafana dashboard: that it is whole, and asks for nothing but what a scrape has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs prometheus_client: kvheap[prometheus]")

from watched_world import Scrape, whole_world

from kvheap.metrics import dashboard

WORDS = re.compile(r"\bkvheap_\w+")
MATCHERS = re.compile(r"\b(kvheap_\w+)\{([^}]*)\}")
GROUPS = re.compile(r"\bby \(([\w, ]+)\)")


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrape]:
    folder: Path = tmp_path_factory.mktemp("tier")
    with whole_world(folder) as found:
        yield found


def queries() -> list[str]:
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return found + [
        each["definition"] for each in dashboard()["templating"]["list"] if each["type"] == "query"
    ]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def labels_of(scrape: Scrape, name: str) -> set[str]:
    return {
        label
        for family in scrape.families
        for sample in family.samples
        if sample.name == name
        for label in sample.labels
    }


def test_every_metric_that_it_asks_for_is_in_a_scrape(scrape: Scrape) -> None:
    asked = {name for query in queries() for name in WORDS.findall(query)}
    # Counters of errors and of closed objects are there once there was one.
    assert asked - scrape.names == {"kvheap_scrape_errors_total"}
    assert "kvheap_scrape_errors" in {family.name for family in scrape.families}


def test_every_metric_is_asked_for(scrape: Scrape) -> None:
    asked = {
        re.sub(r"_(bucket|sum|count|total)$", "", name)
        for query in queries()
        for name in WORDS.findall(query)
    }
    without_panel = {family.name for family in scrape.families} - asked
    assert without_panel == {
        "kvheap_heap_page_locked_bytes",
        "kvheap_heap_view_only",
        "kvheap_file_tier_restored_chunks",
        "kvheap_shared_heap_owner",
        "kvheap_shared_heap_restored_chunks",
        "kvheap_shared_heap_writers",
        "kvheap_address_space_bytes",
        "kvheap_address_space_free_extents",
        "kvheap_address_space_largest_free_extent_bytes",
    }


def test_every_label_that_it_matches_is_the_metrics(scrape: Scrape) -> None:
    for query in queries():
        for name, matchers in MATCHERS.findall(query):
            if not name.endswith("_errors_total"):
                for label in re.findall(r"(\w+)\s*=", matchers):
                    assert label in labels_of(scrape, name), query


def test_every_label_that_it_groups_by_is_the_metrics(scrape: Scrape) -> None:
    for query in queries():
        name = WORDS.findall(query)[0]
        for group in GROUPS.findall(query):
            for label in group.split(","):
                assert label.strip() in labels_of(scrape, name), query


def test_counters_are_rated_and_gauges_are_not(scrape: Scrape) -> None:
    types = {family.name: family.type for family in scrape.families}
    for query in queries():
        for name in WORDS.findall(query):
            stem = re.sub(r"_(bucket|sum|count|total)$", "", name)
            rated = re.search(rf"(rate|increase)\({name}\b", query) is not None
            assert rated == (types[stem] in ("counter", "histogram")), query


def test_legends_name_labels_that_the_query_keeps(scrape: Scrape) -> None:
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            kept = {
                label.strip() for group in GROUPS.findall(query) for label in group.split(",")
            } or {*labels_of(scrape, WORDS.findall(query)[0]), "instance", "name"}
            assert {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= kept, query


def test_parentheses_are_closed_and_variables_known() -> None:
    names = {each["name"] for each in dashboard()["templating"]["list"]}
    for query in queries():
        for opening, closing in ("()", "{}", "[]"):
            assert query.count(opening) == query.count(closing), query
        assert {*re.findall(r"\$(\w+)", query)} <= {*names, "__rate_interval"}, query


def test_grafana_can_load_it() -> None:
    """What Grafana requires of a dashboard that is imported or provisioned."""
    found = dashboard()
    assert found["title"] == "kvheap"
    assert found["schemaVersion"] >= 36
    assert "id" not in found  # Grafana's own
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len({*ids})
    taken: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len({*references})
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_the_module_prints_it() -> None:
    command = [sys.executable, "-W", "error", "-m", "kvheap.metrics"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == dashboard()
