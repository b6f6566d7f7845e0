"""``kvheap calibrate``: what it stores, prints and draws, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from optional import need_matplotlib

from kvheap.calibration import cuda_measure
from kvheap.calibration.calibrate import GRID_COUNTS, GRID_SIZES
from kvheap.calibration.measure import CalibrationError
from kvheap.cli import calibrate, main
from kvheap.cli.texts import CALIBRATE_HELP, CALIBRATE_NOTES
from kvheap.device import cuda
from kvheap.planning.copy_table import CopyTable
from kvheap.planning.path_costs import MEASURED_DIRECTIONS, MEASURED_PATHS
from kvheap.planning.planner import forget_tables, table_for
from kvheap.planning.published_costs import published_costs
from kvheap.planning.table_files import cache_path, save_table
from kvheap.planning.table_json import table_from_json

H100 = "NVIDIA H100 80GB HBM3"
COSTS = published_costs(H100)
assert COSTS is not None


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs, with a cache of its own in ``cache``."""
    monkeypatch.setenv("KVHEAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    forget_tables()
    return tmp_path


class MadeUpMeasure:
    """A device on which one cell is noisy."""

    def __init__(self, device: object, max_bytes: int = 1 << 24) -> None:
        self.max_bytes = max_bytes
        self.random = np.random.default_rng(0)

    def link(self, direction: Any, num_sms: int) -> list[float]:
        return [1e-3 / min(num_sms, 4)]

    def __call__(
        self, direction: Any, path: Any, count: int, size: int, max_sms: int | None = None
    ) -> list[float]:
        noise = 0.3 if (direction, count, size) == ("d2h", 256, 16_384) else 0.01
        factors = np.exp(noise * self.random.standard_normal(5))
        return (COSTS[direction, path].seconds(count, count * size) * factors).tolist()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up H100 in the place of CUDA."""
    found = SimpleNamespace(name=H100, driver_version="13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "find_device", lambda _: found)
    monkeypatch.setattr(cuda_measure, "CudaMeasure", MadeUpMeasure)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def is_picture(path: Path) -> bool:
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 20_000


@pytest.mark.usefixtures("gpu")
class TestMeasuring:
    def test_the_table_is_stored_printed_and_used(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        need_matplotlib()
        assert table_for(H100, "13.0").source == "built in"
        assert main(["calibrate", "--json", "table.json", "--plot", "map.png"]) == 0
        table = table_for(H100, "13.0")
        assert table.source == "measured"
        assert set(table.costs) == set(COSTS)
        assert table.versions["torch"] == torch.__version__
        assert table.link_sms == {"h2d": 4, "d2h": 4}
        assert table_from_json(json.loads((folder / "table.json").read_text())) == table
        assert is_picture(folder / "map.png")
        printed = capsys.readouterr().out
        assert H100 in printed
        assert f"stored in {cache_path(H100, '13.0')}" in printed
        assert f"measured {table.created}" in printed
        assert "SMs of a kernel over the host link: 4 h2d (measured), 4 d2h (measured)" in printed
        assert "noisy cells, whose times spread by more than 5 %" in printed
        assert " d2h" in printed.partition("noisy cells")[2]

    def test_an_interrupt_stores_nothing(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(self: MadeUpMeasure, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(MadeUpMeasure, "__call__", interrupt)
        assert main(["calibrate", "--json", "table.json"]) == 130
        assert "interrupted" in capsys.readouterr().err
        assert [path.name for path in folder.rglob("*")] == ["cache"]

    def test_the_budget_is_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = {}

        def remember(*_: object, **options: object) -> CopyTable:
            seen.update(options)
            return table_for(H100, "13.0")

        monkeypatch.setattr(calibrate, "calibrate", remember)
        assert main(["calibrate", "--budget", "7.5"]) == 0
        assert seen["budget_s"] == 7.5
        assert seen["max_bytes"] == 1 << 24

    def test_a_failure_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object) -> None:
            raise CalibrationError("no room for buffers")

        monkeypatch.setattr(cuda_measure, "CudaMeasure", fail)
        assert main(["calibrate"]) == 3
        assert capsys.readouterr().err.endswith("kvheap calibrate: no room for buffers\n")

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--budget", "0"], "--budget must be a positive number"),
            (["--budget", "nan"], "--budget must be a positive number"),
            (["--device", "cuda:1"], "there are 1 devices"),
            (["--device", "cpu"], "must be a CUDA device"),
            (["--device", "quantum"], "unknown device 'quantum'"),
            (["--json", "missing/table.json"], "cannot write missing/table.json"),
            (["--plot", "map.xyz"], "must end in .png"),
            (["--table", "table.json"], "need --show"),
            (["--device-name", "x"], "need --show"),
        ],
    )
    def test_wrong_options_are_told_before_measuring(
        self,
        arguments: list[str],
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if "--plot" in arguments:
            need_matplotlib()
        monkeypatch.setattr(calibrate, "calibrate", None)
        assert main(["calibrate", *arguments]) == (3 if "devices" in reason else 2)
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1

    def test_a_cache_that_cannot_be_written_is_told_before_measuring(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (folder / "cache").write_text("a file")
        monkeypatch.setattr(calibrate, "calibrate", None)
        assert main(["calibrate"]) == 2
        assert "cannot write" in capsys.readouterr().err

    def test_a_picture_without_matplotlib_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert main(["calibrate", "--plot", "map.png"]) == 3
        assert "pip install matplotlib" in capsys.readouterr().err

    def test_the_stored_table_of_this_device_is_shown(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        need_matplotlib()
        assert main(["calibrate", "--show"]) == 0
        assert (
            "built in: derived from figures published for this device by others"
            in capsys.readouterr().out
        )
        assert main(["calibrate"]) == 0
        capsys.readouterr()
        assert main(["calibrate", "--show"]) == 0
        assert "measured 20" in capsys.readouterr().out
        assert is_picture(folder / "kvheap-calibration.png")
        assert main(["calibrate", "--show", "--device-name", H100, "--plot", "other.svg"]) == 0
        assert "measured 20" in capsys.readouterr().out
        assert (folder / "other.svg").stat().st_size > 20_000


@pytest.mark.usefixtures("no_gpu")
class TestWithoutAGpu:
    def test_measuring_is_refused_in_one_line(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["calibrate"]) == 3
        error = capsys.readouterr().err
        assert error.startswith("kvheap calibrate: --device cuda:0: torch sees no CUDA device here")
        assert "kvheap calibrate --show --device-name 'NVIDIA H100 80GB HBM3'" in error
        assert error.count("\n") == 1
        assert list(folder.iterdir()) == []

    def test_showing_without_a_name_says_what_would_help(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["calibrate", "--show"]) == 3
        assert "--device-name" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            (H100, "built in: derived from figures published for this device by others"),
            ("NVIDIA A30", "built in"),
            ("NVIDIA GB10", "the cautious rule: nothing is known"),
        ],
    )
    def test_what_would_be_used_is_shown(
        self, name: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        need_matplotlib()
        arguments = ["--device-name", name, "--plot", "map.png", "--json", "table.json"]
        assert main(["calibrate", "--show", *arguments]) == 0
        printed = capsys.readouterr().out
        assert name in printed
        assert words in printed
        assert "engine, kernel " in printed
        assert "3 h2d (default, not measured), 2 d2h (default, not measured)" in printed
        assert is_picture(folder / "map.png")
        assert (folder / "table.json").exists()

    def test_a_table_from_another_machine_is_shown(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        need_matplotlib()
        save_table(table_for(H100, "0.0"), folder / "table.json")
        assert main(["calibrate", "--show", "--table", "table.json"]) == 0
        assert H100 in capsys.readouterr().out
        assert is_picture(folder / "kvheap-calibration.png")

    @pytest.mark.parametrize(
        ("text", "reason"),
        [(None, "cannot read"), ("[]", "holds no valid table"), ("{", "holds no valid table")],
    )
    def test_a_file_without_a_table_is_told(
        self,
        text: str | None,
        reason: str,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if text is not None:
            (folder / "table.json").write_text(text)
        assert main(["calibrate", "--show", "--table", "table.json"]) == 2
        assert reason in capsys.readouterr().err

    def test_a_direction_that_was_not_measured_is_empty(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        need_matplotlib()
        costs = {of: cost for of, cost in COSTS.items() if of[0] != "d2d"}
        save_table(CopyTable("half", "1.0", "measured", costs), folder / "table.json")
        assert main(["calibrate", "--show", "--table", "table.json"]) == 0
        assert "not measured" in capsys.readouterr().out
        assert is_picture(folder / "kvheap-calibration.png")

    def test_without_matplotlib_there_is_text_and_a_hint(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        for more in ([], ["--plot", "map.png"]):
            assert main(["calibrate", "--show", "--device-name", H100, *more]) == 0
            printed = capsys.readouterr().out
            assert "engine, kernel " in printed
            assert "pip install matplotlib" in printed
        assert list(folder.iterdir()) == []


class TestHelp:
    def test_it_tells_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["calibrate", "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert CALIBRATE_HELP in printed
        assert CALIBRATE_NOTES in printed
        options = ("device", "budget", "json", "plot", "show", "device-name", "table")
        for word in (*MEASURED_PATHS, *MEASURED_DIRECTIONS, *(f"--{option}" for option in options)):
            assert word in printed
        for word in ("$KVHEAP_CACHE_DIR", "$XDG_CACHE_HOME", "~/.cache", "exit status"):
            assert word in printed

    def test_it_names_the_grid(self) -> None:
        sizes = ", ".join(str(size >> 10) for size in GRID_SIZES if size < 1 << 20)
        assert f"{sizes} KiB, 1 and 4 MiB" in CALIBRATE_NOTES
        assert GRID_SIZES[-2:] == (1 << 20, 4 << 20)
        assert f"{', '.join(map(str, GRID_COUNTS[:3]))}, ... {GRID_COUNTS[-1]:,}" in CALIBRATE_NOTES

    def test_a_table_that_is_built_in_needs_no_device(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        need_matplotlib()
        assert main(["calibrate", "--show", "--device-name", H100]) == 0
        printed = capsys.readouterr()
        assert "engine, kernel " in printed.out
        assert printed.err == ""
        assert is_picture(folder / "kvheap-calibration.png")
