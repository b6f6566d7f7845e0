"""A tier over the real Mooncake Store: its master, and a client in each of two processes.

The other process has the pool, so every byte goes through a socket on loopback.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("KVHEAP_REQUIRE_MOONCAKE"):
    pass
else:
    pytest.importorskip(
        "mooncake.store",
        reason="meets Mooncake Store: pip install mooncake-transfer-engine-non-cuda, apt-get "
        "install libibverbs1 libnl-3-200 libnl-route-3-200",
        exc_type=ImportError,
    )

from mooncake_peer import LAYOUT, Master, Peer, blank, filled, keys_of, wrong_rows

from kvheap import BlockLayout, HostMemoryAllocator, MemoryFormat
from kvheap.integrations.mooncake import MooncakeError, MooncakeTier, connect

POOL = 128 << 20


class World:
    """A master, a peer that has the pool, and a client here."""

    def __init__(self, folder: Path) -> None:
        self.master = Master(folder / "master.log")
        self.peer = Peer(self.master, folder / "peer.log", POOL)
        self.client = connect(self.master.address)

    def end(self) -> None:
        self.peer.end()
        self.master.end()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("mooncake"))
    yield world
    world.client.close()
    world.end()


@pytest.fixture
def heap() -> HostMemoryAllocator:
    return HostMemoryAllocator(4096 * 4096, stream_wait_s=0.0)


@pytest.fixture
def tier(world: World, heap: HostMemoryAllocator) -> Iterator[MooncakeTier]:
    with MooncakeTier(world.client, heap, LAYOUT, namespace="a model") as tier:
        yield tier
    heap.close(5)


def test_chunks_go_from_one_process_to_the_other(world: World, tier: Any, heap: Any) -> None:
    numbers = range(100)
    assert world.peer.ask("put", 0, 100) == 100
    batch = blank(heap, 101)
    found = tier.get([*keys_of(numbers), b"missing"], batch)
    assert found.tolist() == [True] * 100 + [False]
    assert not wrong_rows(numbers, batch)
    assert (batch[100].tensor == -1).all()
    assert tier.lookup([b"missing", *keys_of([99])]).tolist() == [False, True]
    assert tier.remove(keys_of(numbers)) == []  # leased
    assert tier.remove([b"missing", *keys_of(numbers)], force=True) == keys_of(numbers)
    assert not tier.lookup(keys_of(numbers)).any()


def test_and_back_in_calls_of_1024(world: World, tier: Any, heap: Any) -> None:
    numbers = range(1000, 4000)
    assert tier.put(keys_of(numbers), filled(heap, numbers)).all()
    assert world.peer.ask("get", 1000, 4000) == [3000, 0]
    assert len(tier.remove(keys_of(numbers), force=True)) == 3000


def test_a_chunk_that_is_there_stays(world: World, tier: Any, heap: Any) -> None:
    assert tier.put(keys_of([5000]), filled(heap, [5000]))[0]
    assert tier.put(keys_of([5000]), filled(heap, [1]))[0]
    assert world.peer.ask("get", 5000, 5001) == [1, 0]


def test_values_of_another_size_are_refused(world: World, tier: Any, heap: Any) -> None:
    keys = [b"short", b"long"]
    wrong = HostMemoryAllocator(1 << 20)
    for key, elements in zip(keys, (400, 600), strict=True):
        layout = BlockLayout.of([elements], torch.int64, MemoryFormat.UNDEFINED)
        with MooncakeTier(world.client, wrong, layout, namespace="a model") as other:
            other._prefix = tier._prefix
            batch = wrong.batched_allocate([elements], torch.int64, 1, layout.fmt)
            assert other.put([key], batch)[0]
    batch = blank(heap, 2)
    with pytest.raises(MooncakeError, match="larger than a block") as found:
        tier.get(keys, batch)
    assert found.value.codes == {b"short": 3200, b"long": -600}
    heap.batched_free(batch)
    assert heap.stats().pending_bytes == 0


def test_a_full_store(tier: Any, heap: Any) -> None:
    big = BlockLayout.of([1 << 20], torch.int64, MemoryFormat.UNDEFINED)
    wide = HostMemoryAllocator(4 * big.size_bytes)
    with MooncakeTier(tier._client, wide, big, namespace="a model") as other:
        batch = wide.batched_allocate([1 << 20], torch.int64, 4, big.fmt)
        stored = np.concatenate(
            [other.put([bytes([at, n]) for n in range(4)], batch) for at in range(6)]
        )
        assert stored.any()
        assert not stored.all()


def test_a_heap_is_registered_once(tier: Any, heap: Any, world: World) -> None:
    with pytest.raises(RuntimeError, match="one tier for each heap"):
        MooncakeTier(world.client, heap, LAYOUT, namespace="another")
    with pytest.raises(ValueError, match="tier's heap"):
        tier.put([b"k"], filled(HostMemoryAllocator(1 << 20), [1]))


@pytest.mark.parametrize("who", ["the other process", "the master"])
def test_who_is_killed_ends_calls_with_an_error(tmp_path: Path, who: str, heap: Any) -> None:
    world = World(tmp_path)
    try:
        tier = MooncakeTier(world.client, heap, LAYOUT, namespace="a model")
        numbers = range(2000)
        assert tier.put(keys_of(numbers), filled(heap, numbers)).all()
        world.peer.end() if who == "the other process" else world.master.end()
        batch = blank(heap, 2000)
        begun = time.monotonic()
        with pytest.raises(MooncakeError) as found:
            tier.get(keys_of(numbers), batch)
        assert time.monotonic() - begun < 30  # not the 60 s of one that does not answer
        assert len(found.value.untried) == 976
        if who == "the master":
            assert {*found.value.codes.values()} == {-900}
            with pytest.raises(MooncakeError, match="master cannot be reached"):
                tier.lookup([b"k"])
        else:
            assert {*found.value.codes.values()} == {-800}
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 0
        tier.close(5)
    finally:
        world.end()


@pytest.mark.skipif(
    not os.environ.get("KVHEAP_REQUIRE_MOONCAKE"), reason="takes 60 s: KVHEAP_REQUIRE_MOONCAKE=1"
)
def test_who_is_frozen_writes_into_no_block_of_others(tmp_path: Path) -> None:
    """The client gives up after 60 s; what wakes later still sends the bytes."""
    heap = HostMemoryAllocator(300 * 4096, stream_wait_s=0.0)
    world = World(tmp_path)
    try:
        tier = MooncakeTier(world.client, heap, LAYOUT, namespace="a model")
        numbers = range(200)
        batch = filled(heap, numbers)
        assert tier.put(keys_of(numbers), batch).all()
        heap.batched_free(batch)
        batch = blank(heap, 200)
        addresses = batch.addresses
        os.kill(world.peer.process.pid, signal.SIGSTOP)
        with pytest.raises(MooncakeError, match="does not answer"):
            tier.get(keys_of(numbers), batch)
        heap.batched_free(batch)
        assert heap.stats().pending_bytes == 200 * 4096
        other = blank(heap, 100)
        assert not {*other.addresses.tolist()} & {*addresses.tolist()}
        memory = heap.buffer
        before = memory.clone()
        os.kill(world.peer.process.pid, signal.SIGCONT)
        deadline = time.monotonic() + 20
        while torch.equal(memory, before) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not torch.equal(memory, before)  # or there was nothing to protect from
        time.sleep(0.5)
        assert all((obj.tensor == -1).all() for obj in other)
        tier.close(5)
    finally:
        world.end()
