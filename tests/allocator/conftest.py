"""Lets the tests of this folder import the helpers beside them; a GPU that is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "kernels")]

from fake_device import FakeDevice  # noqa: E402

from kvheap import copy_device, planner, staging, transfer_paths  # noqa: E402


@pytest.fixture
def device(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FakeDevice]:
    """A stand-in for a GPU, and its peer ``device.peers[0]``; extents for staging are small."""
    found, peer = FakeDevice(), FakeDevice("Fake peer", index=1)
    found.peers, peer.peers = [peer], [found]
    peer.pinned = found.pinned

    def find_device(named: torch.device) -> FakeDevice | None:
        return None if named.type == "cpu" else (found, peer)[named.index or 0]

    monkeypatch.setattr(copy_device, "device_of", found.device_of)
    monkeypatch.setattr(copy_device, "find_device", find_device)
    monkeypatch.setattr(transfer_paths, "_told_of", set())
    monkeypatch.setattr(staging, "MIN_EXTENT_BYTES", 8 << 10)
    monkeypatch.setattr(staging, "MAX_EXTENT_BYTES", 16 << 10)
    monkeypatch.setenv(
        "KVHEAP_CACHE_DIR", str(tmp_path_factory.getbasetemp())
    )  # nobody's calibration counts here
    forget = planner.table_for.cache_clear
    forget()
    yield found
    forget()
    found.drain()
    peer.drain()
    assert found.violations + peer.violations == []


@pytest.fixture
def peer(device: FakeDevice) -> FakeDevice:
    """Another device that the first reaches."""
    return device.peers[0]
