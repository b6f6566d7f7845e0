"""The JSON form of a table: every wrong value is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_tables import made_up_costs, measured

from kvheap.device.directions import Direction
from kvheap.planning.table_files import load_table
from kvheap.planning.table_json import table_from_json, table_to_json


class TestWrongValues:
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data.pop("driver_version"),
            lambda data: data.update(device_name=3),
            lambda data: data.update(source="guessed"),
            lambda data: data.update(margins={"kernel": 0}),
            lambda data: data.update(margins=[]),
            lambda data: data.update(versions={"torch": 2}),
            lambda data: data.update(link_sms=[]),
            lambda data: data.update(link_sms=None),
            lambda data: data.update(link_sms={"d2d": 2}),
            *(
                lambda data, value=value: data.update(link_sms={"h2d": value})
                for value in (0, -1, 2.0, True, "3", None)
            ),
            lambda data: data.update(costs=3),
            lambda data: data["costs"].append(3),
            lambda data: data["costs"][0].update(path="carrier pigeon"),
            lambda data: data["costs"][0].update(path="host"),
            lambda data: data["costs"][0].update(direction="p2p"),
            lambda data: data["costs"][0].update(direction=["h2d"]),
            lambda data: data["costs"][0].update(cells=[]),
            lambda data: data["costs"][0].pop("cells"),
            lambda data: data["costs"][0].update(formula={"fixed_s": 1}),
            lambda data: data["costs"][0]["cells"][0].pop(),
            lambda data: data["costs"][0]["cells"].append(data["costs"][0]["cells"][0]),
            *(
                lambda data, at=at, value=value: data["costs"][0]["cells"][0].__setitem__(at, value)
                for at, value in [
                    (0, 0),
                    (2, 1e308),
                    (2, 5e-324),
                    (0, 1.5),
                    (1, True),
                    (1, 1 << 70),
                    (2, -1.0),
                    (2, float("nan")),
                    (2, float("inf")),
                    (2, 10**400),
                    (2, "fast"),
                    (3, -0.1),
                    (3, None),
                    (4, 0),
                ]
            ),
        ],
    )
    def test_a_table_with_a_wrong_value_is_ignored(
        self, spoil, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = table_to_json(measured(made_up_costs(0)))
        assert table_from_json(data)
        spoil(data)
        text = json.dumps(data)
        with pytest.raises(ValueError, match=r"."):
            table_from_json(json.loads(text))
        (tmp_path / "table.json").write_text(text)
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert load_table(tmp_path / "table.json") is None
        assert "table.json is ignored" in caplog.text


class TestLinkSms:
    """The SM budgets came later than the format."""

    def test_a_table_of_before_is_valid(self) -> None:
        data = table_to_json(measured(made_up_costs(0)))
        del data["link_sms"]
        table = table_from_json(data)
        assert table == measured(made_up_costs(0))
        assert (table.default_sms("h2d"), table.default_sms("d2h")) == (3, 2)

    def test_it_comes_back(self) -> None:
        table = replace(measured(made_up_costs(0)), link_sms={"h2d": 7})
        found = table_from_json(json.loads(json.dumps(table_to_json(table))))
        assert found == table
        ways: tuple[Direction, ...] = ("h2d", "d2h", "d2d", "p2p", "h2h")
        assert [found.default_sms(way) for way in ways] == [7, 2, None, None, None]
