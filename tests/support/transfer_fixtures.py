"""Fixtures for tests of transfers: a stand-in for a GPU, and copies in flight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import POISON, WAYS, FakeDevice, heap_on
from transfer_scenes import Gate, InFlight, Places, Tiers, drain, stream_of

from kvheap.device import cuda
from kvheap.planning import planner
from kvheap.transfer import CopyPlan, copy, paths, runs, staging


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

    monkeypatch.setattr(cuda, "device_of", found.device_of)
    monkeypatch.setattr(cuda, "find_device", find_device)
    monkeypatch.setattr(paths, "_told_of", set())
    monkeypatch.setattr(staging, "MIN_EXTENT_BYTES", 8 << 10)
    monkeypatch.setattr(staging, "MAX_EXTENT_BYTES", 16 << 10)
    monkeypatch.setenv(
        "KVHEAP_CACHE_DIR", str(tmp_path_factory.getbasetemp())
    )  # nobody's calibration counts here
    forget = planner.table_for.cache_clear
    forget()
    yield found
    forget()
    drain(found)
    assert found.violations + peer.violations == []


@pytest.fixture
def peer(device: FakeDevice) -> FakeDevice:
    """Another device that the first reaches."""
    return device.peers[0]


@pytest.fixture
def by_queue(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Copies within the host are made by the queue's thread, when a test opens the gate."""
    gate = Gate()
    monkeypatch.setattr(runs, "INLINE_COPY_BYTES", 0)
    copy_on_host = runs.copy_on_host

    def held_up(pieces: Any) -> None:
        gate.wait()
        copy_on_host(pieces)

    monkeypatch.setattr(runs, "copy_on_host", held_up)
    return gate


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def flying(
    request: pytest.FixtureRequest, device: FakeDevice, by_queue: Gate
) -> Iterator[InFlight]:
    """A transfer in flight, of every direction by every path that it can take."""
    direction, path = request.param
    places = Places.of(device, direction, np.full(64, 512))
    places.target.fill_(POISON)
    plan = CopyPlan.of_addresses(
        places.source, places.target, *places.starts, 512, parts=[32, 0, 32]
    )
    transfer = copy(plan, stream_of(device, direction), path=path)

    def finish() -> None:
        by_queue.open()
        drain(device)

    yield InFlight(device, places.expected(), places.target, transfer, finish)
    finish()


@pytest.fixture
def tiers(device: FakeDevice) -> Tiers:
    """Room for 64 blocks on the device, and for as many on the host."""
    return Tiers(device, heap_on(device, "device", 1 << 18), heap_on(device, "host", 1 << 18))
