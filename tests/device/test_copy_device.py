"""What a transfer asks of a device: whose memory, which driver, how many pieces a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvheap.device import cuda as cuda_module
from kvheap.device.copy_device import known_ranges
from kvheap.device.cuda import MAX_BATCH_PIECES, CudaDevice, find_device, module_version
from kvheap.kernels.copy_engine import Location
from kvheap.kernels.pieces import Pieces


class Memory:
    """A device that knows some allocations, and counts how often it is asked."""

    def __init__(self, *ranges: tuple[int, int], kind: Any = "pinned") -> None:
        self.ranges = ranges
        self.kind = kind
        self.asked = 0

    def locate(self, address: int) -> Location | None:
        self.asked += 1
        for start, end in self.ranges:
            if start <= address < end:
                return Location(self.kind, 0, start, end)
        return None

    def is_own(self, location: Location) -> bool:
        return location.kind == "device"


def ranges_of(
    memory: Any, starts: list[int], size: int, on_device: bool = False
) -> list[list[int]]:
    array = np.array(starts, np.int64)
    return known_ranges(memory, array, array + size, on_device).tolist()


class TestKnownRanges:
    def test_each_allocation_is_asked_for_once(self) -> None:
        memory = Memory((0, 1 << 20), (1 << 30, (1 << 30) + (1 << 20)))
        starts = np.concatenate((np.arange(0, 1 << 20, 64), (1 << 30) + np.arange(0, 1 << 20, 64)))
        np.random.default_rng(0).shuffle(starts)
        assert ranges_of(memory, starts.tolist(), 64) == [list(pair) for pair in memory.ranges]
        assert memory.asked == 2

    def test_a_piece_may_go_on_in_the_next_registration(self) -> None:
        memory = Memory((0, 100), (100, 200), (200, 300), (1000, 1100))
        assert ranges_of(memory, [50], 200) == [[0, 100], [100, 200], [200, 300]]

    def test_it_ends_where_nothing_is_known(self) -> None:
        memory = Memory((0, 100), (150, 200))
        assert ranges_of(memory, [0, 90, 160], 20) == [[0, 100]]

    @pytest.mark.parametrize("kind", ["pinned", "managed", "aliased", "device"])
    @pytest.mark.parametrize("on_device", [True, False])
    def test_only_memory_of_the_right_kind_counts(self, kind: str, on_device: bool) -> None:
        expected = [[0, 100]] if kind == ("device" if on_device else "pinned") else []
        assert ranges_of(Memory((0, 100), kind=kind), [0], 10, on_device) == expected


class Driver:
    version = 13010
    has_batch = True

    def __init__(self) -> None:
        self.batches: list[Pieces] = []

    def copy_batch(self, pieces: Pieces, stream: int, *, over_link: bool) -> None:
        assert stream == 7
        assert over_link
        self.batches.append(pieces)

    def locate(self, address: int) -> Location:
        return Location("device", address, 0, 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CudaDevice:
    """A CUDA device whose driver is a stand-in, on a machine that may have none."""
    driver, bound = Driver(), []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", bound.append)
    monkeypatch.setattr(cuda_module, "driver", lambda: driver)
    monkeypatch.setattr(cuda_module, "MODULE_VERSION_FILE", tmp_path / "version")
    return CudaDevice(1)


class Stream:
    cuda_stream = 7


class TestCudaDevice:
    def test_a_large_batch_is_several_calls(self, cuda: CudaDevice) -> None:
        count = 2 * MAX_BATCH_PIECES + 5
        pieces = Pieces(np.arange(count) * 8 + 8, np.arange(count) * 16 + 8, 4)
        cuda.copy_batch(pieces, Stream(), over_link=True)  # type: ignore[arg-type]
        batches = cuda._bound_driver().batches  # type: ignore[attr-defined]
        assert [len(batch) for batch in batches] == [MAX_BATCH_PIECES, MAX_BATCH_PIECES, 5]
        assert np.array_equal(np.concatenate([each.sources for each in batches]), pieces.sources)
        assert np.array_equal(np.concatenate([each.targets for each in batches]), pieces.targets)

    def test_only_its_own_memory_is_its_own(self, cuda: CudaDevice) -> None:
        assert cuda.is_own(Location("device", 1, 0, 1))
        assert not cuda.is_own(Location("device", 0, 0, 1))
        assert not cuda.is_own(Location("pinned", 1, 0, 1))

    def test_the_driver_is_named_by_its_module(self, cuda: CudaDevice, tmp_path: Path) -> None:
        text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23\n"
        (tmp_path / "version").write_text(text + "GCC version:  gcc version 12.3.0\n")
        assert cuda.driver_version == "550.54.15"

    @pytest.mark.parametrize("text", [None, "", "GCC version:  gcc version 12.3.0"])
    def test_else_by_its_cuda(self, cuda: CudaDevice, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / "version").write_text(text)
        assert cuda.driver_version == "CUDA 13.1"

    def test_streams_of_other_kinds_are_refused(self, cuda: CudaDevice) -> None:
        with pytest.raises(TypeError, match=r"must be a torch.cuda.Stream, got 7"):
            cuda.require_stream(7)
        with pytest.raises(TypeError, match=r"must be a torch.cuda.Stream, got 7"):
            cuda.wait_event(7, object())  # type: ignore[arg-type]


def test_versions_of_other_modules_are_none() -> None:
    assert module_version("GCC version:  gcc version 12.3.0 (Ubuntu)") is None


def test_other_devices_are_refused() -> None:
    assert find_device(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="must be on a CPU or a CUDA device, got meta"):
        find_device(torch.device("meta"))


def test_a_device_is_one_object_however_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    found = [find_device(torch.device("cuda", index)) for index in (61, 62)]
    assert found[0] is not found[1]
    for index, wanted in zip((61, 62, 61), (*found, found[0]), strict=True):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        assert find_device(torch.device("cuda")) is wanted
        assert find_device(torch.device(f"cuda:{index}")) is wanted
