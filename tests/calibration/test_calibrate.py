"""Calibration: a made-up world of costs, noise and a clock is measured, and must be found again."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvheap.calibration import calibrate as module
from kvheap.calibration.calibrate import (
    GRID_COUNTS,
    GRID_SIZES,
    CalibrationError,
    CudaMeasure,
    calibrate,
)
from kvheap.errors import TransferError
from kvheap.planning.path_costs import DIRECTIONS, PATHS, Direction, MeasuredCost, Path, PathCost
from kvheap.planning.planner import CopyTable
from kvheap.planning.published_costs import published_costs

COSTS = published_costs("NVIDIA H100")
assert COSTS is not None
NUM_KINDS = len(COSTS)


@dataclass
class World:
    """A device: what copies cost there, how noisy they are, and the time that measuring takes."""

    costs: dict[tuple[Direction, Path], PathCost] = field(default_factory=lambda: dict(COSTS))
    noise: Callable[[Direction, Path, int, int, int], float] = lambda *_: 0.01
    repetitions: int = 5
    now: float = 0.0
    calls: Counter[tuple[Direction, Path, int, int]] = field(default_factory=Counter)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def measure(
        self, direction: Direction, path: Path, count: int, size: int
    ) -> list[float] | None:
        key = (direction, path, count, size)
        self.calls[key] += 1
        cost = self.costs.get((direction, path))
        if cost is None:
            return None
        noise = self.noise(*key, self.calls[key])
        factors = np.exp(noise * self.random.standard_normal(self.repetitions))
        seconds = (cost.seconds(count, count * size) * factors).tolist()
        self.now += sum(seconds)
        return seconds

    def calibrate(self, **options: Any) -> CopyTable:
        options = {"budget_s": 1e9, "clock": lambda: self.now} | options
        return calibrate(self.measure, "made up", "1.0", **options)


class TestWhatIsFound:
    def test_crossovers_are_where_the_world_has_them(self) -> None:
        world = World()
        truth = CopyTable("made up", "", "built in", COSTS)
        table = world.calibrate()
        for direction in DIRECTIONS:
            for kib in (1, 4, 8, 16, 24, 28, 32):
                (_, first), (count, second), *_ = truth.choices(direction, kib << 10)
                found = table.choices(direction, kib << 10)
                assert [path for _, path in found[:2]] == [first, second]
                assert found[1][0] == pytest.approx(count, rel=0.15, abs=1)

    def test_the_choice_loses_little_anywhere(self) -> None:
        table = World().calibrate()
        random = np.random.default_rng(0)
        losses = []
        for _ in range(5000):
            direction = DIRECTIONS[random.integers(3)]
            count, size = np.round(2.0 ** random.uniform((0, 10), (17, 23))).astype(int).tolist()
            paths = [path for path in PATHS if (direction, path) in COSTS]
            times = {path: COSTS[direction, path].seconds(count, count * size) for path in paths}
            chosen = table.choose(direction, count, count * size, paths)
            # Where in the strip a cliff is that it was narrowed to, is not known.
            if not 26 << 10 < size < 28 << 10:
                losses.append(times[chosen] / min(times.values()))
        losses.sort()
        assert losses[-6] < 1.05
        assert losses[-1] < 1.10

    def test_all_cells_of_the_grid_are_there_but_those_too_large(self) -> None:
        table = World().calibrate(max_bytes=1 << 24)
        assert len(table.costs) == NUM_KINDS
        expected = {
            (size, count) for size in GRID_SIZES for count in GRID_COUNTS if size * count <= 1 << 24
        }
        cost = table.costs["d2h", "kernel"]
        assert isinstance(cost, MeasuredCost)
        assert {cell[:2] for cell in cost.cells} == expected

    def test_a_cliff_is_narrowed_to_an_eighth(self) -> None:
        table = World().calibrate()
        sizes = {}
        for of, cost in table.costs.items():
            assert isinstance(cost, MeasuredCost)
            sizes[of] = sorted({cell.piece_bytes for cell in cost.cells} - set(GRID_SIZES))
        around = [size for size in sizes.pop(("h2d", "copy_engine")) if size != 24 << 10]
        assert around == [26 << 10, 28 << 10]
        assert not any(sizes.values())

    def test_a_single_noisy_cell_is_no_cliff(self) -> None:
        def noise(_: Direction, path: Path, count: int, size: int, __: int) -> float:
            return 2.0 if (path, count, size) == ("kernel", 64, 4096) else 0.0

        world = World(noise=noise, repetitions=1)
        world.calibrate()
        assert {key[3] for key in world.calls if key[1] == "kernel"} == set(GRID_SIZES)

    def test_the_table_says_what_it_is(self) -> None:
        table = World().calibrate(versions={"torch": "9.9"})
        assert (table.device_name, table.driver_version) == ("made up", "1.0")
        assert table.source == "measured"
        assert table.created.endswith("+00:00")
        assert set(table.versions) == {"kvheap", "python", "numpy", "torch"}
        assert CopyTable.from_json(table.to_json()) == table


class TestNoise:
    def test_a_noisy_cell_is_measured_again_and_marked(self) -> None:
        def noise(direction: Direction, _: Path, count: int, size: int, __: int) -> float:
            return 0.2 if (direction, count, size) == ("h2d", 256, 8192) else 0.005

        world = World(noise=noise)
        table = world.calibrate()
        cells = table.noisy_cells("h2d")
        assert {cell[:2] for cell in cells} == {(8192, 256)}
        assert table.noisy_cells("d2h") == []
        assert world.calls["h2d", "kernel", 256, 8192] == module.MAX_CALLS
        kernel = max(cells, key=lambda cell: cell.num_samples)
        assert kernel.num_samples == module.MAX_CALLS * world.repetitions
        assert kernel.spread > 0.05

    def test_it_is_measured_until_it_is_not(self) -> None:
        def noise(_: Direction, __: Path, count: int, size: int, call: int) -> float:
            return 0.1 if (count, size) == (256, 8192) and call == 1 else 0.001

        world = World(noise=noise, repetitions=7)
        table = world.calibrate()
        assert 1 < world.calls["d2h", "kernel", 256, 8192] < module.MAX_CALLS
        assert not table.noisy_cells("d2h")

    def test_what_is_clearly_not_the_fastest_is_measured_once(self) -> None:
        world = World(noise=lambda *_: 0.2)
        world.calibrate()
        assert world.calls["h2d", "copy_engine", 65_536, 1024] == 1
        assert world.calls["h2d", "kernel", 65_536, 1024] == module.MAX_CALLS

    def test_a_noisy_cell_without_rivals_is_measured_again(self) -> None:
        world = World(
            costs={("d2h", "copy_engine"): COSTS["d2h", "copy_engine"]}, noise=lambda *_: 0.2
        )
        world.calibrate()
        assert world.calls["d2h", "copy_engine", 16, 1024] == module.MAX_CALLS


class TestWhatIsMissing:
    def test_a_path_that_cannot_be_taken_is_not_in_the_table(self) -> None:
        costs = {of: cost for of, cost in COSTS.items() if of[1] != "copy_engine"}
        table = World(costs=costs).calibrate()
        assert set(table.costs) == set(costs)
        assert table.choose("h2d", 10, 10_000, PATHS) != "copy_engine"

    def test_staging_is_not_asked_for_within_the_device(self) -> None:
        world = World()
        world.calibrate(max_bytes=1 << 20)
        assert not any(key[:2] == ("d2d", "staged") for key in world.calls)

    def test_a_cell_without_memory_is_extrapolated(self) -> None:
        world = World()

        def measure(direction: Direction, path: Path, count: int, size: int) -> list[float] | None:
            if path == "staged" and (count < 16 or count * size > 1 << 26):
                return None
            return world.measure(direction, path, count, size)

        table = calibrate(measure, "made up", "1.0", budget_s=1e9)
        for count, size in ((1, 4096), (65_536, 16_384)):
            seconds = table.seconds("d2h", "staged", count, count * size)
            expected = COSTS["d2h", "staged"].seconds(max(count, 16), max(count, 16) * size)
            assert seconds == pytest.approx(expected, rel=0.2)

    @pytest.mark.parametrize("answer", [None, []])
    def test_where_nothing_can_be_measured_there_is_no_table(self, answer: Any) -> None:
        with pytest.raises(CalibrationError, match="made up"):
            calibrate(lambda *_: answer, "made up", "1.0")

    @pytest.mark.parametrize(
        "options", [{"budget_s": 0}, {"budget_s": float("nan")}, {"max_bytes": 1023}]
    )
    def test_wrong_arguments(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            World().calibrate(**options)


class TestBudget:
    @pytest.mark.parametrize("budget_s", [0.5, 2, 5])
    def test_the_last_call_begins_within_it(self, budget_s: float) -> None:
        began = []
        world = World(noise=lambda *_: 0.2, repetitions=9)

        def measure(*key: Any) -> list[float] | None:
            began.append(world.now)
            return world.measure(*key)

        table = calibrate(measure, "made up", "1.0", budget_s=budget_s, clock=lambda: world.now)
        # A survey ends with all paths of its last cell.
        assert began[-1] < budget_s
        assert table.choose("h2d", 2000, 2000 * 1024, PATHS) != "copy_engine"

    def test_the_largest_cells_are_left_out_first(self) -> None:
        world = World()
        table = world.calibrate(budget_s=1)
        survey = {key for key in world.calls if key[3] in GRID_SIZES}
        largest = max(count * size for _, _, count, size in survey)
        assert 1 << 20 < largest < 1 << 30
        for direction in DIRECTIONS:
            of_path = [
                {cell[:2] for cell in cost.cells if cell.piece_bytes in GRID_SIZES}
                for of, cost in table.costs.items()
                if of[0] == direction and isinstance(cost, MeasuredCost)
            ]
            assert all(cells == of_path[0] for cells in of_path)

    def test_progress_ends_at_its_total(self) -> None:
        told: list[tuple[int, int, str]] = []
        World(noise=lambda *_: 0.2).calibrate(progress=lambda *each: told.append(each))
        assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
        assert all(done <= total for done, total, _ in told)
        assert told[-1][0] == told[-1][1]
        assert {what for _, _, what in told} >= {"h2d copy engine", "d2h staged", "d2d kernel"}

    def test_an_interrupt_goes_through(self) -> None:
        world = World()

        def measure(*key: Any) -> list[float] | None:
            if sum(world.calls.values()) == 100:
                raise KeyboardInterrupt
            return world.measure(*key)

        with pytest.raises(KeyboardInterrupt):
            calibrate(measure, "made up", "1.0")


class FakeEvent:
    """Keeps the time when it was recorded on the fake device."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self, stream: object) -> None:
        assert stream is self.device.stream
        self.at_s = self.device.now_s

    def synchronize(self) -> None:
        self.device.synchronized += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at_s - self.at_s)


@dataclass
class FakeDevice:
    """What :class:`CudaMeasure` needs of torch and of ``kvheap.transfer``."""

    now_s: float = 0.0
    copy_s: float = 1e-3
    error: Exception | None = None
    result_error: Exception | None = None
    synchronized: int = 0
    stream: Any = field(default_factory=lambda: SimpleNamespace(synchronize=lambda: None))
    plans: list[tuple[Any, ...]] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def of_addresses(self, *arguments: Any) -> tuple[Any, ...]:
        self.plans.append(arguments)
        return arguments

    def copy(self, plan: object, *, stream: object, path: str) -> SimpleNamespace:
        assert plan is self.plans[-1]
        assert stream is self.stream
        self.copies.append(path)
        if self.error is not None:
            raise self.error
        self.now_s += self.copy_s
        return SimpleNamespace(result=self.result)

    def result(self) -> None:
        if self.result_error is not None:
            raise self.result_error


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    transfer = ModuleType("kvheap.transfer")
    transfer.CopyPlan = SimpleNamespace(of_addresses=fake.of_addresses)  # type: ignore[attr-defined]
    transfer.copy = fake.copy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvheap.transfer", transfer)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: fake.stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(fake))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **kw: zeros(*size, **kw))
    return fake


class TestCudaMeasure:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_scattered_on_the_device_and_contiguous_on_the_host(
        self, device: FakeDevice, direction: Direction
    ) -> None:
        measure = CudaMeasure("cpu", max_bytes=1 << 20)
        assert measure(direction, "kernel", 64, 4096) == pytest.approx([1e-3] * 11)
        assert device.copies == ["kernel"] * 12  # the first warms up
        plans = []
        for source, target, sources, targets, size in device.plans:
            assert size == 4096
            for buffer, addresses, is_host in (
                (source, sources, direction == "h2d"),
                (target, targets, direction == "d2h"),
            ):
                assert addresses.dtype == np.int64
                assert len(set(addresses.tolist())) == 64
                assert (addresses % 4096 == 0).all()
                assert 0 <= addresses.min() <= addresses.max() <= buffer.nbytes - 4096
                assert (addresses.tolist() == list(range(0, 64 * 4096, 4096))) == is_host
            assert source.data_ptr() != target.data_ptr()
            plans.append((tuple(sources), tuple(targets)))
        assert len(set(plans)) == len(plans)  # every repetition has pieces of its own

    def test_time_is_the_devices_or_the_hosts_if_longer(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure = CudaMeasure("cpu", max_bytes=1 << 16)
        host = iter(range(1000))
        monkeypatch.setattr(module, "perf_counter", lambda: next(host) * 2e-3)
        assert measure("h2d", "kernel", 16, 1024) == pytest.approx([2e-3] * 11)
        device.copy_s = 20e-3
        assert measure("h2d", "kernel", 16, 1024) == pytest.approx([20e-3] * 3)

    def test_a_path_that_is_refused_is_none(self, device: FakeDevice) -> None:
        device.error = ValueError("path 'staged' cannot be taken")
        assert CudaMeasure("cpu", max_bytes=1 << 16)("h2d", "staged", 16, 1024) is None
        assert device.copies == ["staged"]

    def test_what_is_larger_than_the_buffers_is_none(self, device: FakeDevice) -> None:
        assert CudaMeasure("cpu", max_bytes=1 << 16)("h2d", "kernel", 65, 1024) is None
        assert device.copies == []

    def test_out_of_memory_is_none_and_another_failure_is_told(self, device: FakeDevice) -> None:
        measure = CudaMeasure("cpu", max_bytes=1 << 16)
        failure = TransferError("failed")
        device.result_error = failure
        with pytest.raises(TransferError):
            measure("h2d", "staged", 16, 1024)
        failure.__cause__ = torch.cuda.OutOfMemoryError()
        assert measure("h2d", "staged", 16, 1024) is None
        device.error = torch.cuda.OutOfMemoryError()
        assert measure("h2d", "staged", 16, 1024) is None

    def test_buffers_are_halved_until_they_fit(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zeros = torch.zeros
        limit = 300 << 20

        def zeros_within(size: int, **options: Any) -> torch.Tensor:
            if size > limit:
                raise RuntimeError(f"no {size} bytes\nCUDA says more")
            return zeros(1, **options).expand(size)

        monkeypatch.setattr(torch, "zeros", zeros_within)
        monkeypatch.setattr(torch, "zeros_like", lambda tensor: tensor)
        assert CudaMeasure("cpu").max_bytes == 256 << 20
        limit = 1 << 20
        with pytest.raises(CalibrationError, match="no room for buffers of 67108864 bytes: no 6"):
            CudaMeasure("cpu")

    def test_a_whole_calibration(self, device: FakeDevice) -> None:
        measure = CudaMeasure("cpu", max_bytes=1 << 20)
        table = calibrate(measure, "fake", "1.0", max_bytes=measure.max_bytes)
        assert len(table.costs) == NUM_KINDS
        assert table.seconds("d2d", "kernel", 16, 16 * 1024) == pytest.approx(1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_every_path_is_measured(self) -> None:
        measure = CudaMeasure("cuda", max_bytes=64 << 20)
        for direction in DIRECTIONS:
            for path in PATHS:
                seconds = measure(direction, path, 256, 16 << 10)
                if (direction, path) == ("d2d", "staged"):
                    assert seconds is None
                else:
                    assert seconds is not None
                    assert all(1e-6 < each < 1 for each in seconds)

    def test_a_short_calibration(self) -> None:
        measure = CudaMeasure("cuda", max_bytes=64 << 20)
        table = calibrate(measure, "gpu", "1.0", budget_s=10, max_bytes=measure.max_bytes)
        for direction in DIRECTIONS:
            assert table.choices(direction, 8192)
