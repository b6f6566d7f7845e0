"""One heap for all workers: who makes it, who maps it, and what each may use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from host_memory_probes import FakeRegistrar
from vllm_cpu_scenes import MadeUpCaches, chunk_bytes, locations, need_vllm

need_vllm()

from vllm.v1.kv_offload.base import GPULoadStoreSpec  # noqa: E402
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec  # noqa: E402

import kvheap.integrations.vllm.shared_memory as shared  # noqa: E402
from kvheap.integrations.vllm import KVHeapWorker  # noqa: E402
from kvheap.integrations.vllm.shared_memory import SharedMemory  # noqa: E402
from kvheap.integrations.vllm.spec import shares_heap  # noqa: E402

HEAP_BYTES = 3 << 20

GROUPS = ([(128, 128), (64, 80)], [[(0, 128), (1, 64)], [(0, 96)]])


class Workers:
    """What the workers of an engine say to each other: the first one's word goes to all."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, path: str | None) -> str:
        if path is not None:
            self.said.append(path)
        return self.said[-1]


@pytest.fixture
def heaps() -> Iterator[list[SharedMemory]]:
    said = Workers()
    made = [SharedMemory(HEAP_BYTES, said, is_first=at == 0, pin=False) for at in range(3)]
    yield made
    for heap in made:
        heap.close()


def test_all_workers_have_the_same_bytes(heaps: list[SharedMemory]) -> None:
    for heap in heaps:
        heap.wait_until_grown()
        assert heap.ready_bytes == heap.tensor.nbytes == HEAP_BYTES
        assert heap.pinned_share == 0
    heaps[0].tensor[1000:1003] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    heaps[2].tensor[-1] = 7
    assert heaps[1].tensor[1000:1003].tolist() == [1, 2, 3]
    assert heaps[0].tensor[-1] == heaps[1].tensor[-1] == 7
    assert len({heap.tensor.data_ptr() for heap in heaps}) == 3
    for heap in heaps:
        absolute = heap.absolute(np.array([0, 512]), np.array([1, 2]))
        assert absolute.tolist() == [heap.tensor.data_ptr(), heap.tensor.data_ptr() + 512]


def test_another_process_maps_it(heaps: list[SharedMemory]) -> None:
    said = Workers()
    first = SharedMemory(HEAP_BYTES, said, is_first=True, pin=False)
    first.tensor[:4] = torch.tensor([9, 8, 7, 6], dtype=torch.uint8)
    script = (
        "import sys; from kvheap.integrations.vllm.shared_memory import SharedMemory\n"
        f"heap = SharedMemory({HEAP_BYTES}, lambda _: sys.argv[1], is_first=False, pin=False)\n"
        "assert heap.tensor[:4].tolist() == [9, 8, 7, 6]\n"
        "heap.tensor[4] = 5; heap.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, said.said[0]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert first.tensor[:5].tolist() == [9, 8, 7, 6, 5]
    first.close()


def test_nothing_is_left_behind() -> None:
    before, said = set(os.listdir("/dev/shm")), Workers()
    first = SharedMemory(HEAP_BYTES, said, is_first=True, pin=False)
    second = SharedMemory(HEAP_BYTES, said, is_first=False, pin=False)
    assert set(os.listdir("/dev/shm")) == before
    first.tensor[0] = 3
    first.close()
    assert second.tensor[0] == 3, "gone with the first worker"
    second.close()
    assert not os.path.exists(said.said[0])


def test_the_others_do_not_wait_for_a_heap_that_could_not_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("made up")

    said = Workers()
    monkeypatch.setattr(shared.HostBuffer, "shared", refuse)
    with pytest.raises(OSError, match="made up"):
        SharedMemory(HEAP_BYTES, said, is_first=True, pin=False)
    with pytest.raises(RuntimeError, match="first worker could not make the heap"):
        SharedMemory(HEAP_BYTES, said, is_first=False, pin=False)


def test_each_worker_pins_its_own_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "FIRST_BYTES", 1 << 20)
    monkeypatch.setattr(shared, "PIECE_BYTES", 1 << 20)
    said, registrars = Workers(), [FakeRegistrar(), FakeRegistrar()]
    heaps = [
        SharedMemory(HEAP_BYTES, said, is_first=at == 0, pin=True, registrar=registrar)
        for at, registrar in enumerate(registrars)
    ]
    for heap, registrar in zip(heaps, registrars, strict=True):
        heap.wait_until_grown()
        assert heap.pinned_share == 1
        start = heap.tensor.data_ptr()
        assert registrar.registered == {start + at * (1 << 20): 1 << 20 for at in range(3)}
        heap.close()
        assert not registrar.registered


def test_bytes_that_are_not_ready_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the heap grows, and for ever if it cannot."""
    monkeypatch.setattr(shared, "FIRST_BYTES", 1 << 20)
    monkeypatch.setattr(shared.HostBuffer, "populate", _fail_behind(1 << 20))
    heap = SharedMemory(HEAP_BYTES, Workers(), is_first=True, pin=False)
    with pytest.raises(OSError, match="no more"):
        heap.wait_until_grown()
    assert heap.ready_bytes == 1 << 20
    heap.absolute(np.array([(1 << 20) - 1]), np.array([1]))
    with pytest.raises(ValueError, match="no more will be: no more"):
        heap.absolute(np.array([1 << 20]), np.array([1]))
    with pytest.raises(TypeError, match="job of a kvheap tier has ChunkLocations"):
        heap.locations(CPULoadStoreSpec([0]))
    heap.close()


def _fail_behind(limit: int) -> Any:
    def populate(_: object, start: int, end: int, threads: int | None = None) -> None:
        if end > limit:
            raise OSError("no more")

    return populate


def test_what_the_first_worker_stores_the_others_load(heaps: list[SharedMemory]) -> None:
    """Into caches of their own, as tensor-parallel workers have."""
    caches = [MadeUpCaches(*GROUPS) for _ in heaps]
    workers = [
        KVHeapWorker(cache.canonical, heap) for cache, heap in zip(caches, heaps, strict=True)
    ]
    for seed, cache in enumerate(caches):
        cache.fill(seed)
    chunks = locations(chunk_bytes(GROUPS[1], 1))
    pages = [caches[0].block(0, 3), caches[0].block(1, 4)]
    workers[0].submit_store(1, GPULoadStoreSpec([3, 4], [1, 1], [0, 0]), chunks)
    workers[0].wait({1})
    assert workers[0].get_finished()[0].success
    for worker, cache in zip(workers, caches, strict=True):
        worker.submit_load(2, chunks, GPULoadStoreSpec([7, 8], [1, 1], [0, 0]))
        worker.wait({2})
        assert worker.get_finished()[0].success
        assert [cache.block(0, 7), cache.block(1, 8)] == pages
    for worker in workers:
        worker.shutdown()


@pytest.mark.parametrize(
    ("extra", "is_replicated", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"heap_path": "/somewhere"}, True, False),
        ({"huge_pages": "explicit"}, True, False),
        ({"huge_pages": "transparent", "heap_path": None}, True, True),
    ],
)
def test_who_shares_a_heap(extra: Any, is_replicated: bool, expected: bool) -> None:
    config: Any = SimpleNamespace(extra_config=extra, replicated_layout=is_replicated)
    assert shares_heap(config) == expected
