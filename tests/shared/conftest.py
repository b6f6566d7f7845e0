from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("xxhash")

from shared_heaps import Stage, attach, own
from small_shared_heaps import NUM_CHUNKS

from kvheap import SharedHeap

SHM = Path("/dev/shm")


@pytest.fixture
def path() -> Iterator[Path]:
    """On the tmpfs of shared memory, where nothing but the heap may be left."""
    folder = SHM / f"kvheap-test-{uuid.uuid4().hex}"
    folder.mkdir()
    yield folder / "heap"
    left = {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert left <= {"heap", "heap.owner"}


@pytest.fixture
def heap(path: Path) -> Iterator[SharedHeap]:
    with own(path, NUM_CHUNKS) as heap:
        yield heap
        heap.check()


@pytest.fixture
def replica(heap: SharedHeap) -> Iterator[SharedHeap]:
    with attach(heap.path) as replica:
        yield replica


@pytest.fixture(scope="session")
def one_stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
def stage(one_stage: Stage) -> Stage:
    one_stage.reports()
    one_stage.counts.clear()
    return one_stage
