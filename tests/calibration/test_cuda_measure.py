"""Measuring on a GPU: what is copied, what is timed, and what is told; on a fake device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvheap.calibration import cuda_measure
from kvheap.calibration.calibrate import calibrate
from kvheap.calibration.cuda_measure import CudaMeasure
from kvheap.calibration.measure import CalibrationError
from kvheap.device.directions import Direction
from kvheap.errors import TransferError
from kvheap.planning.path_costs import MEASURED_DIRECTIONS, MEASURED_PATHS


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
class FakePlan:
    """The arguments of a plan, and the device's time when it was prepared."""

    arguments: tuple[Any, ...]
    device: FakeDevice
    prepared_at_s: float | None = None

    def prepare(self) -> None:
        self.device.now_s += 1.0
        self.prepared_at_s = self.device.now_s


@dataclass
class FakeDevice:
    """What :class:`CudaMeasure` needs of torch and of ``kvheap.transfer``."""

    now_s: float = 0.0
    copy_s: float = 1e-3
    error: Exception | None = None
    result_error: Exception | None = None
    synchronized: int = 0
    stream: Any = field(default_factory=lambda: SimpleNamespace(synchronize=lambda: None))
    has_kernel: bool = True
    plans: list[FakePlan] = field(default_factory=list)
    sms: list[int | None] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def of_addresses(self, *arguments: Any) -> FakePlan:
        self.plans.append(FakePlan(arguments, self))
        return self.plans[-1]

    def copy(
        self, plan: object, *, stream: object, path: str, max_sms: int | None
    ) -> SimpleNamespace:
        assert plan is self.plans[-1]
        assert stream is self.stream
        self.copies.append(path)
        self.sms.append(max_sms)
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
    plans = SimpleNamespace(of_addresses=fake.of_addresses)
    monkeypatch.setattr(cuda_measure, "CopyPlan", plans)
    monkeypatch.setattr(cuda_measure, "copy", fake.copy)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: fake.stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(fake))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **kw: zeros(*size, **kw))
    return fake


class TestCudaMeasure:
    @pytest.mark.parametrize("direction", MEASURED_DIRECTIONS)
    def test_scattered_on_the_device_and_contiguous_on_the_host(
        self, device: FakeDevice, direction: Direction
    ) -> None:
        measure = CudaMeasure("cpu", max_bytes=1 << 20)
        assert measure(direction, "kernel", 64, 4096) == pytest.approx([1e-3] * 11)
        assert device.copies == ["kernel"] * 12  # the first warms up
        plans = []
        assert set(device.sms) == {None}
        for plan in device.plans:
            assert plan.prepared_at_s is None
            source, target, sources, targets, size = plan.arguments
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

    @pytest.mark.parametrize("direction", ["h2d", "d2h"])
    def test_the_link_is_measured_with_prepared_plans_on_so_many_sms(
        self, device: FakeDevice, direction: Direction
    ) -> None:
        measure = CudaMeasure("cpu", max_bytes=1 << 20)
        assert measure.link(direction, 5) == pytest.approx([1e-3] * 11)  # preparing is not in it
        assert device.copies == ["kernel"] * 12
        assert device.sms == [5] * 12
        for plan in device.plans:
            sources, targets, size = plan.arguments[2:]
            assert plan.prepared_at_s is not None
            assert len(sources) * size == len(targets) * size == 1 << 20
            addresses = sources if direction == "h2d" else targets
            assert addresses.tolist() == list(range(0, 1 << 20, size))

    def test_a_link_that_cannot_be_measured_is_none(self, device: FakeDevice) -> None:
        assert CudaMeasure("cpu", max_bytes=1 << 10).link("h2d", 1) is None  # not one piece
        device.has_kernel = False
        assert CudaMeasure("cpu", max_bytes=1 << 20).link("h2d", 1) is None
        assert device.copies == []

    def test_a_budget_is_passed_on(self, device: FakeDevice) -> None:
        CudaMeasure("cpu", max_bytes=1 << 20)("h2d", "staged", 4, 1024, max_sms=7)
        assert set(device.sms) == {7}

    def test_time_is_the_devices_or_the_hosts_if_longer(
        self, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure = CudaMeasure("cpu", max_bytes=1 << 16)
        host = iter(range(1000))
        monkeypatch.setattr(cuda_measure, "perf_counter", lambda: next(host) * 2e-3)
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
        kinds = set(product(MEASURED_DIRECTIONS, MEASURED_PATHS))
        assert set(table.costs) == kinds - {("d2d", "staged")}
        assert table.seconds("d2d", "kernel", 16, 16 * 1024) == pytest.approx(1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_every_path_is_measured(self) -> None:
        measure = CudaMeasure("cuda", max_bytes=64 << 20)
        for direction in MEASURED_DIRECTIONS:
            for path in MEASURED_PATHS:
                seconds = measure(direction, path, 256, 16 << 10)
                if (direction, path) == ("d2d", "staged"):
                    assert seconds is None
                else:
                    assert seconds is not None
                    assert all(1e-6 < each < 1 for each in seconds)

    @pytest.mark.parametrize("direction", ["h2d", "d2h"])
    def test_the_link_is_measured(self, direction: Direction) -> None:
        measure = CudaMeasure("cuda", max_bytes=64 << 20)
        for num_sms in (1, 4):
            seconds = measure.link(direction, num_sms)
            assert seconds is not None
            assert all(1e-6 < each < 1 for each in seconds)

    def test_a_short_calibration(self) -> None:
        measure = CudaMeasure("cuda", max_bytes=64 << 20)
        table = calibrate(measure, "gpu", "1.0", budget_s=10, max_bytes=measure.max_bytes)
        for direction in MEASURED_DIRECTIONS:
            assert table.choices(direction, 8192)
