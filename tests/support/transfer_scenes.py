"""What tests of transfers are played on: memory in two places, blocks in it, gates and streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from fake_device import DIRECTIONS, FakeDevice, FakeStream, filled, memory_of, random_bytes

from kvheap import MemoryBatch, MemoryObj, TensorMemoryAllocator
from kvheap.transfer import Transfer

BLOCK = 4096


def stream_of(device: FakeDevice, direction: str) -> FakeStream | None:
    """A new stream for copies of this direction; copies within the host take none."""
    return None if direction == "h2h" else device.stream()


def drain(device: FakeDevice) -> None:
    """Do all work that is queued on the device and on its peer."""
    device.drain()
    device.peers[0].drain()


def allocated(*heaps: TensorMemoryAllocator) -> list[int]:
    return [heap.stats().allocated_bytes for heap in heaps]


class Gate:
    """Holds up who waits at it until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def wait(self) -> None:
        assert self.opened.wait(20)

    def open(self) -> None:
        self.opened.set()


@dataclass
class Places:
    """A layout of N blocks in two buffers: scattered on the device, in a row on the host."""

    source: torch.Tensor
    target: torch.Tensor
    starts: tuple[np.ndarray, np.ndarray]
    sizes: np.ndarray

    @classmethod
    def of(cls, device: FakeDevice, direction: str, sizes: np.ndarray, seed: int = 1) -> Places:
        kinds = DIRECTIONS[direction]
        count, slot = len(sizes), -(-int(sizes.max()) // 64) * 64
        rng = np.random.default_rng(seed)
        buffers, starts = [], []
        for kind in kinds:
            buffers.append(memory_of(device, kind, 2 * count * slot))
            if kind == "host" and direction != "h2h":
                starts.append(slot + np.cumsum(sizes) - sizes)
            else:
                room = 2 * slot - sizes
                starts.append(rng.permutation(count) * 2 * slot + rng.integers(0, room + 1))
        buffers[0].copy_(random_bytes(buffers[0].numel(), seed))
        return cls(buffers[0], buffers[1], (starts[0], starts[1]), sizes)

    def expected(self) -> torch.Tensor:
        """What a loop would make of the target."""
        found = self.target.clone()
        for source, target, size in zip(*self.starts, self.sizes, strict=True):
            found[target : target + size] = self.source[source : source + size]
        return found


def blocks_of(
    heap: TensorMemoryAllocator, how: str, count: int, shape: list[int]
) -> MemoryBatch | list[MemoryObj]:
    """Blocks in a row, or objects of three batches that are no neighbours."""
    if how == "batch":
        batch = heap.batched_allocate(shape, torch.float32, count)
        assert batch is not None
        return batch
    batches = [heap.batched_allocate(shape, torch.float32, count) for _ in range(3)]
    found = [batch[row] for row in range(0, count, 2) for batch in batches if batch is not None]
    return found[:count]


def in_a_row(heap: TensorMemoryAllocator, count: int) -> tuple[MemoryBatch, None]:
    """Blocks that are neighbours, with nothing between them."""
    return filled(heap, count), None


def scattered(heap: TensorMemoryAllocator, count: int) -> tuple[MemoryBatch, list[MemoryObj]]:
    """Blocks that are no neighbours, and what is between them, of a heap that is then full."""
    room = filled(heap, 2 * count)
    heap.batched_free(room[::2])
    return filled(heap, count), room[1::2]


@dataclass
class InFlight:
    """A transfer in three parts, of which nothing is done before ``finish``, or a wait, does it."""

    device: FakeDevice
    source: torch.Tensor
    target: torch.Tensor
    transfer: Transfer
    finish: Callable[[], None]


@dataclass
class Tiers:
    """A heap on the device, and one of as many bytes on the host."""

    device: FakeDevice
    near: TensorMemoryAllocator
    far: TensorMemoryAllocator


class Registrar:
    """Registers with a stand-in for a GPU, but the numbers in ``refused``."""

    def __init__(self, device: FakeDevice, refused: Iterable[int] = ()) -> None:
        self.device = device
        self.refused = set(refused)
        self.count = 0

    def register(self, pointer: int, num_bytes: int) -> None:
        number, self.count = self.count, self.count + 1
        if number in self.refused:
            raise RuntimeError("no pages left")
        self.device.pinned.append((pointer, pointer + num_bytes))

    def unregister(self, pointer: int) -> None:
        self.device.pinned[:] = [each for each in self.device.pinned if each[0] != pointer]
