"""The planner: what is chosen, how well cells stand for what lies between, and which table is used.

The truth is a made-up world of costs: its cells are measured exactly, and every choice is compared
with the fastest path of the world itself.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from itertools import product
from math import log2
from pathlib import Path
from random import Random

import pytest

from kvheap.planning import planner
from kvheap.planning.path_costs import Cell, MeasuredCost, PathCost
from kvheap.planning.planner import (
    DIRECTIONS,
    PATHS,
    CopyTable,
    cache_path,
    forget_tables,
    table_for,
)
from kvheap.planning.published_costs import PUBLISHED_CROSSOVERS, Crossover, published_costs

H100 = "NVIDIA H100 80GB HBM3"
SIZES = [kib << 10 for kib in (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)]
COUNTS = [4**power for power in range(9)]
CELLS = [(size, count) for size, count in product(SIZES, COUNTS) if size * count <= 1 << 30]

A30_RATIOS = {
    1: (0.49, 0.66, 0.92, 1.36, 2.02, 3.43, 4.23),
    4: (0.57, 0.81, 1.19, 1.80, 2.68, 4.17, 4.47),
    8: (0.68, 0.99, 1.48, 2.20, 3.09, 3.73, 4.17),
    16: (0.86, 1.20, 1.81, 2.49, 2.99, 3.24, 3.73),
    24: (0.99, 1.44, 1.82, 2.44, 2.60, 3.02, 3.56),
    28: (0.57, 0.77, 0.94, 1.19, 1.29),
}
"""vLLM #57555: time by the copy engine over time by the kernel, host to device, by KiB of a piece,
at the counts below."""

A30_COUNTS = (16, 32, 64, 128, 256, 1024, 4096)

H100_ENGINE_GBPS = {4: 4.0, 8: 5.2, 16: 6.3, 24: 6.7}
"""vLLM #42212: 50,000 pieces by the copy engine, host to device, by KiB of a piece."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVHEAP_CACHE_DIR", str(tmp_path / "cache"))
    forget_tables()
    return tmp_path / "cache"


def made_up_costs(seed: int) -> dict[tuple[planner.Direction, planner.Path], PathCost]:
    random = Random(seed)
    return {
        (direction, path): PathCost(
            random.uniform(5e-6, 80e-6), 10 ** random.uniform(-8, -5.7), random.uniform(1e10, 6e10)
        )
        for direction, path in product(DIRECTIONS, PATHS)
        if (direction, path) != ("d2d", "staged")
    }


def measured(costs: dict[tuple[planner.Direction, planner.Path], PathCost]) -> CopyTable:
    cells = {
        of: MeasuredCost(
            tuple(
                Cell(size, count, cost.seconds(count, count * size), 0.01, 5)
                for size, count in CELLS
            )
        )
        for of, cost in costs.items()
    }
    return CopyTable("made up", "1.0", "measured", cells, versions={"kvheap": "0"})


class TestCosts:
    def test_a_cost_adds_up_call_pieces_and_bytes(self) -> None:
        cost = PathCost(20e-6, 0.5e-6, 50e9, small_piece_bytes=1000, small_bytes_per_s=10e9)
        assert cost.seconds(100, 100_000) == pytest.approx(20e-6 + 50e-6 + 2e-6)
        assert cost.seconds(100, 99_900) == pytest.approx(20e-6 + 50e-6 + 9.99e-6)

    def test_a_measured_cost_is_exact_at_its_cells(self) -> None:
        random = Random(1)
        cells = tuple(
            Cell(size, count, 10 ** random.uniform(-6, -1), 0.0, 3) for size, count in CELLS
        )
        cost = MeasuredCost(cells)
        for cell in cells:
            seconds = cost.seconds(cell.num_pieces, cell.num_pieces * cell.piece_bytes)
            assert seconds == pytest.approx(cell.seconds, rel=1e-9)

    @pytest.mark.parametrize("seed", range(3))
    def test_between_and_beyond_its_cells_time_grows_with_pieces_and_bytes(self, seed: int) -> None:
        cost = measured(made_up_costs(seed)).costs["h2d", "kernel"]
        random = Random(seed)
        for _ in range(2000):
            count, size = round(2 ** random.uniform(0, 20)), round(2 ** random.uniform(6, 26))
            more = round(count * random.uniform(1, 3)) + 1
            seconds = cost.seconds(count, count * size)
            assert cost.seconds(more, more * size) > seconds
            assert cost.seconds(count, count * size + random.randint(0, 1 << 20)) >= seconds

    def test_beyond_the_grid_time_grows_as_between_the_last_cells(self) -> None:
        truth = made_up_costs(0)["d2h", "kernel"]
        cost = measured(made_up_costs(0)).costs["d2h", "kernel"]
        for count, size in ((16, SIZES[-1] * 8), (1, SIZES[-1] * 64), (COUNTS[-1] * 8, 1024)):
            seconds = truth.seconds(count, count * size)
            assert cost.seconds(count, count * size) == pytest.approx(seconds, rel=0.07)

    def test_far_beyond_the_grid_time_is_proportional(self) -> None:
        cost = measured(made_up_costs(0)).costs["d2h", "kernel"]
        for count, size in ((16, SIZES[-1] * 64), (COUNTS[-1] * 64, 1024)):
            far = 8 * cost.seconds(count, count * size)
            more = (count, size * 8) if count == 16 else (count * 8, size)
            assert cost.seconds(more[0], more[0] * more[1]) == pytest.approx(far)

    def test_time_never_falls_beyond_the_grid(self) -> None:
        cost = MeasuredCost((Cell(1024, 16, 2e-5, 0, 3), Cell(1024, 64, 1e-5, 0, 3)))
        assert cost.seconds(256, 256 * 1024) == pytest.approx(1e-5)

    def test_below_the_grid_it_goes_on_as_between_the_outermost_cells(self) -> None:
        flat = MeasuredCost((Cell(1024, 16, 1e-5, 0, 3), Cell(1024, 64, 1e-5, 0, 3)))
        steep = MeasuredCost((Cell(1024, 16, 1e-5, 0, 3), Cell(1024, 64, 4e-5, 0, 3)))
        falling = MeasuredCost((Cell(1024, 16, 2e-5, 0, 3), Cell(1024, 64, 1e-5, 0, 3)))
        assert flat.seconds(4, 4096) == pytest.approx(1e-5)
        assert steep.seconds(4, 4096) == pytest.approx(0.25e-5)
        assert falling.seconds(4, 4096) == pytest.approx(2e-5)

    def test_a_missing_cell_grows_from_the_next_smaller_or_is_as_the_next_larger(self) -> None:
        cells = (
            Cell(1024, 16, 1e-5, 0, 3),
            Cell(1024, 64, 2e-5, 0, 3),
            Cell(1024, 256, 6e-5, 0, 3),
            Cell(4096, 16, 3e-5, 0, 3),
            Cell(16384, 64, 9e-5, 0, 3),
            Cell(65536, 16, 1e-4, 0, 3),
            Cell(65536, 64, 2e-4, 0, 3),
        )
        cost = MeasuredCost(cells)
        assert cost.seconds(64, 64 * 4096) == pytest.approx(12e-5)  # from a single one
        assert cost.seconds(256, 256 * 65536) == pytest.approx(6e-4)  # by 1e-4 for 48 pieces
        assert cost.seconds(16, 16 * 16384) == pytest.approx(9e-5)

    @pytest.mark.parametrize("cells", [(), (Cell(1, 1, 1.0, 0, 1), Cell(1, 1, 2.0, 0, 1))])
    def test_no_cells_and_one_twice_are_refused(self, cells: tuple[Cell, ...]) -> None:
        with pytest.raises(ValueError, match="cell"):
            MeasuredCost(cells)


class TestChoice:
    @pytest.mark.parametrize("seed", range(8))
    def test_in_every_cell_it_is_the_fastest(self, seed: int) -> None:
        costs = made_up_costs(seed)
        table = measured(costs)
        for direction, (size, count) in product(DIRECTIONS, CELLS):
            paths = [path for path in PATHS if (direction, path) in costs]
            times = {path: costs[direction, path].seconds(count, count * size) for path in paths}
            chosen = table.choose(direction, count, count * size, paths)
            assert times[chosen] <= min(times.values()) * (1 + 1e-9)

    @pytest.mark.parametrize("seed", range(8))
    def test_elsewhere_it_is_within_5_percent_of_the_fastest(self, seed: int) -> None:
        """Up to 8 times beyond the grid; in 999 of 1,000 places, and never by more than 10 %."""
        costs = made_up_costs(seed)
        table = measured(costs)
        random = Random(seed)
        losses = []
        for _ in range(5000):
            direction = random.choice(DIRECTIONS)
            count, size = round(2 ** random.uniform(0, 19)), round(2 ** random.uniform(10, 25))
            paths = [path for path in PATHS if (direction, path) in costs]
            times = {path: costs[direction, path].seconds(count, count * size) for path in paths}
            chosen = table.choose(direction, count, count * size, paths)
            losses.append(times[chosen] / min(times.values()))
        losses.sort()
        assert losses[-6] < 1.05
        assert losses[-1] < 1.10

    def test_only_allowed_paths_are_chosen(self) -> None:
        table = table_for(H100, "0.0")
        assert table.choose("h2d", 10_000, 10_000 * 4096, ["copy_engine"]) == "copy_engine"
        assert table.choose("h2d", 1, 4096, ("kernel", "staged")) == "kernel"

    def test_an_unknown_path_is_chosen_where_no_known_one_is_allowed(self) -> None:
        table = CopyTable("x", "", "measured", {("h2d", "kernel"): PathCost(1.0, 1.0, 1.0)})
        assert table.choose("h2d", 1, 1, PATHS) == "kernel"
        assert table.choose("d2h", 1, 1, PATHS) == "copy_engine"
        assert table.choose("d2h", 1, 1, ("staged", "kernel")) == "staged"
        assert table.seconds("h2d", "staged", 1, 1) is None
        assert table.choices("d2h", 1024) == []

    @pytest.mark.parametrize(
        ("count", "num_bytes", "allowed"), [(1, 1, []), (0, 1, PATHS), (1, 0, PATHS)]
    )
    def test_nothing_allowed_or_to_copy_is_refused(
        self, count: int, num_bytes: int, allowed: list[planner.Path]
    ) -> None:
        with pytest.raises(ValueError, match=r"no path|nothing to copy"):
            table_for(H100, "0.0").choose("h2d", count, num_bytes, allowed)

    def test_a_margin_must_be_exceeded(self) -> None:
        costs = {
            ("h2d", "copy_engine"): PathCost(1.0, 0.0, 1e9),
            ("h2d", "kernel"): PathCost(0.9, 0.0, 1e9),
        }
        table = CopyTable("x", "", "cautious", costs, {"kernel": 1.2})
        assert table.choose("h2d", 1, 1, PATHS) == "copy_engine"
        assert CopyTable("x", "", "measured", costs).choose("h2d", 1, 1, PATHS) == "kernel"

    @pytest.mark.parametrize("seed", range(4))
    def test_choices_are_what_is_chosen(self, seed: int) -> None:
        table = measured(made_up_costs(seed))
        for direction, size in product(DIRECTIONS, (1024, 5000, 1 << 20)):
            paths = [path for path in PATHS if (direction, path) in table.costs]
            changes = table.choices(direction, size, 2048)
            assert changes[0][0] == 1
            for count in range(1, 2049):
                path = [path for first, path in changes if first <= count][-1]
                assert path == table.choose(direction, count, count * size, paths)


class TestBuiltInCosts:
    @pytest.mark.parametrize("crossover", PUBLISHED_CROSSOVERS)
    def test_the_kernel_overtakes_the_copy_engine_where_it_was_seen_to(
        self, crossover: Crossover
    ) -> None:
        table = table_for(f"NVIDIA {crossover.device}", "0.0")
        size = crossover.piece_bytes
        for count, path in (
            (crossover.slower_at, "copy_engine"),
            (crossover.faster_at, "kernel"),
        ):
            assert table.choose("h2d", count, count * size, ("copy_engine", "kernel")) == path

    def test_an_a30s_ratios_are_met_within_a_third_and_a_sixth_in_the_middle(self) -> None:
        costs = published_costs("NVIDIA A30")
        assert costs is not None
        errors = []
        for kib, ratios in A30_RATIOS.items():
            for count, ratio in zip(A30_COUNTS, ratios, strict=False):
                num_bytes = count * kib << 10
                engine, kernel = (
                    costs["h2d", path].seconds(count, num_bytes)
                    for path in ("copy_engine", "kernel")
                )
                errors.append(abs(log2(engine / kernel / ratio)))
        assert max(errors) < log2(1.37)
        assert sorted(errors)[len(errors) // 2] < log2(1.1)

    @pytest.mark.parametrize(("kib", "gbps"), H100_ENGINE_GBPS.items())
    def test_an_h100s_copy_engine_is_as_slow_for_small_pieces_as_published(
        self, kib: int, gbps: float
    ) -> None:
        num_bytes = 50_000 * kib << 10
        seconds = table_for(H100, "0.0").seconds("h2d", "copy_engine", 50_000, num_bytes)
        assert seconds is not None
        assert num_bytes / seconds / 1e9 == pytest.approx(gbps, rel=0.06)

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            (H100, "built in"),
            ("NVIDIA H100 PCIe", "built in"),
            ("NVIDIA H200", "built in"),
            ("NVIDIA A30", "built in"),
            ("NVIDIA GH200 480GB", "cautious"),
            ("NVIDIA A300", "cautious"),
            ("NVIDIA GB10", "cautious"),
            ("", "cautious"),
        ],
    )
    def test_they_are_used_for_devices_of_that_name_alone(self, name: str, source: str) -> None:
        assert table_for(name, "0.0").source == source

    def test_the_cautious_rule_takes_the_copy_engine_where_it_is_close(self) -> None:
        known, unknown = table_for("NVIDIA A30", "0.0"), table_for("NVIDIA A40", "0.0")
        for direction, size in product(DIRECTIONS, SIZES[:6]):
            (_, engine), *others = unknown.choices(direction, size)
            assert engine == "copy_engine"
            assert not others or others[0][0] > known.choices(direction, size)[1][0]


class TestFiles:
    def test_a_stored_table_is_used_for_its_device_and_driver(self) -> None:
        table = measured(made_up_costs(0))
        assert table_for("made up", "1.0").source == "cautious"
        table.save(cache_path("made up", "1.0"))
        assert table_for("made up", "1.0").source == "cautious"  # remembered
        forget_tables()
        assert table_for("made up", "1.0") == table
        assert table_for("made up", "1.1").source == "cautious"
        assert table_for("made-up too", "1.0").source == "cautious"

    def test_formulas_are_written_too(self, tmp_path: Path) -> None:
        for name in (H100, "NVIDIA GB10"):
            table = table_for(name, "0.0")
            table.save(tmp_path / "table.json")
            assert CopyTable.load(tmp_path / "table.json") == table

    def test_a_table_of_another_device_in_its_place_is_ignored(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = cache_path("Made Up!", "1.0")
        assert place == cache_path("made up", "1.0")
        measured(made_up_costs(0)).save(place)
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert table_for("Made Up!", "1.0").source == "cautious"
        assert str(place) in caplog.text
        assert "it is of made up, driver 1.0" in caplog.text

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "Expecting value"),
            ("[" * 100_000, "recursion"),
            ("\xff", "utf-8"),
            ("[]", "no table of copies"),
            ('{"format": "something else"}', "no table of copies"),
            ('{"format": "kvheap copy table", "format_version": 2}', "version 2, not 1"),
            ('{"format": "kvheap copy table", "format_version": 1}', "it has no 'costs'"),
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

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data.pop("driver_version"),
            lambda data: data.update(device_name=3),
            lambda data: data.update(source="guessed"),
            lambda data: data.update(margins={"kernel": 0}),
            lambda data: data.update(margins=[]),
            lambda data: data.update(versions={"torch": 2}),
            lambda data: data.update(costs=3),
            lambda data: data["costs"].append(3),
            lambda data: data["costs"][0].update(path="carrier pigeon"),
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
        data = measured(made_up_costs(0)).to_json()
        assert CopyTable.from_json(data)
        spoil(data)
        (tmp_path / "table.json").write_text(json.dumps(data))
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert CopyTable.load(tmp_path / "table.json") is None
        assert "table.json is ignored" in caplog.text

    def test_what_cannot_be_read_is_ignored_with_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = cache_path(H100, "1.0")
        place.mkdir(parents=True)
        with caplog.at_level(logging.WARNING, "kvheap"):
            assert table_for(H100, "1.0").source == "built in"
        assert str(place) in caplog.text

    def test_a_folder_that_cannot_be_made_is_an_error(self, cache: Path) -> None:
        cache.write_text("a file")
        with pytest.raises(OSError, match="cache"):
            table_for(H100, "1.0").save(cache_path(H100, "1.0"))

    def test_a_failed_write_leaves_the_old_table_and_no_other_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "table.json"
        table = table_for(H100, "0.0")
        table.save(place)

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(planner.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            table_for("other", "0.0").save(place)
        assert CopyTable.load(place) == table
        assert list(tmp_path.iterdir()) == [place]

    def test_where_it_is_stored(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert cache_path("a", "1").parent == tmp_path / "cache"
        monkeypatch.setenv("KVHEAP_CACHE_DIR", "")
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        assert cache_path("a", "1").parent == Path("/x/kvheap")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/somebody")
        assert cache_path("a", "1").parent == Path("/home/somebody/.cache/kvheap")

    @pytest.mark.parametrize("name", ["", "../../etc/passwd", "a/b", "Tesla\0", ".."])
    def test_no_name_leads_out_of_the_folder(self, name: str, cache: Path) -> None:
        assert cache_path(name, name).parent == cache


def test_it_imports_no_torch() -> None:
    code = "import kvheap.planning.planner, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
