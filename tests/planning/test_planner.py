"""The planner: which table a device gets."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from made_up_tables import made_up_costs, measured

from kvheap.planning.planner import forget_tables, table_for
from kvheap.planning.table_files import cache_path, save_table

H100 = "NVIDIA H100 80GB HBM3"


class TestTableFor:
    def test_a_stored_table_is_used_for_its_device_and_driver(self) -> None:
        table = measured(made_up_costs(0))
        assert table_for("made up", "1.0").source == "cautious"
        save_table(table, cache_path("made up", "1.0"))
        assert table_for("made up", "1.0").source == "cautious"  # remembered
        forget_tables()
        assert table_for("made up", "1.0") == table
        assert table_for("made up", "1.1").source == "cautious"
        assert table_for("made-up too", "1.0").source == "cautious"

    def test_a_table_of_another_device_in_its_place_is_ignored(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = cache_path("Made Up!", "1.0")
        assert place == cache_path("made up", "1.0")
        save_table(measured(made_up_costs(0)), place)
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert table_for("Made Up!", "1.0").source == "cautious"
        assert str(place) in caplog.text
        assert "it belongs to made up, driver 1.0, not to Made Up!, driver 1.0" in caplog.text

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "Expecting value"),
            ("[" * 100_000, "recursion"),
            ("\xff", "utf-8"),
            ("[]", "not a kvheap copy table"),
            ('{"format": "something else"}', "not a kvheap copy table"),
            ('{"format": "kvheap copy table", "format_version": 2}', "version is 2, not 1"),
            ('{"format": "kvheap copy table", "format_version": 1}', "'costs' is missing"),
        ],
    )
    def test_a_file_that_is_no_table_is_ignored_with_a_warning(
        self, text: str, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = cache_path(H100, "1.0")
        place.parent.mkdir()
        place.write_bytes(text.encode("latin-1"))
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert table_for(H100, "1.0").source == "built in"
        (record,) = caplog.records
        assert str(place) in record.getMessage()
        assert reason in record.getMessage()

    def test_what_cannot_be_read_is_ignored_with_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = cache_path(H100, "1.0")
        place.mkdir(parents=True)
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert table_for(H100, "1.0").source == "built in"
        assert str(place) in caplog.text


def test_it_imports_no_torch() -> None:
    code = "import kvheap.planning.planner, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
