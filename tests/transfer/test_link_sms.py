"""The SMs of copies over the link: the device's table says, where the caller does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice

from kvheap.planning.planner import forget_tables, table_for
from kvheap.planning.table_files import cache_path, save_table
from kvheap.transfer import CopyPlan, copy


@pytest.fixture
def calibrated(
    device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeDevice]:
    """A device whose table has 5 SMs to the device, and none to the host."""
    monkeypatch.setenv("KVHEAP_CACHE_DIR", str(tmp_path))
    forget_tables()
    table = replace(
        table_for(device.name, device.driver_version),
        driver_version=device.driver_version,
        source="measured",
        link_sms={"h2d": 5},
    )
    save_table(table, cache_path(device.name, device.driver_version))
    forget_tables()
    yield device
    forget_tables()


def sms_of(device: FakeDevice, direction: str, path: Any, max_sms: int | None) -> set[object]:
    """The SMs with which a copy's kernels were launched."""
    own, host = device.tensor(1 << 16), device.pinned_tensor(1 << 16)
    source, target = {"h2d": (host, own), "d2h": (own, host)}.get(
        direction, (own, device.tensor(1 << 16))
    )
    spread, packed = np.arange(0, 1 << 16, 4096), np.arange(0, 16 * 64, 64)
    on_host = {"h2d": (packed, spread), "d2h": (spread, packed)}
    sources, targets = on_host.get(direction, (spread, spread))
    source.copy_(torch.arange(1 << 16, dtype=torch.int64).to(torch.uint8))
    before = len(device.calls)
    plan = CopyPlan.of_addresses(source, target, sources, targets, 64)
    transfer = copy(plan, stream=device.side, path=path, max_sms=max_sms)
    transfer.result()
    for start, place in zip(sources.tolist(), targets.tolist(), strict=True):
        assert torch.equal(target[place : place + 64], source[start : start + 64])
    return {call[3] for call in device.calls[before:] if call[0] == "run"}


@pytest.mark.parametrize("path", ["kernel", "staged"])
@pytest.mark.parametrize(
    ("direction", "wanted"), [("h2d", 5), ("d2h", 2)], ids=["measured", "default"]
)
def test_a_copy_over_the_link(
    calibrated: FakeDevice, direction: str, wanted: int, path: str
) -> None:
    assert sms_of(calibrated, direction, path, None) == {wanted}
    assert sms_of(calibrated, direction, path, 7) == {7}


def test_a_copy_within_the_device_has_no_limit(calibrated: FakeDevice) -> None:
    assert sms_of(calibrated, "d2d", "kernel", None) == {None}


def test_a_device_that_was_not_calibrated(device: FakeDevice) -> None:
    assert sms_of(device, "h2d", "kernel", None) == {3}
    assert sms_of(device, "d2h", "kernel", None) == {2}
