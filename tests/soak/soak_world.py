"""One heap, and who may touch which of its blocks.

========  ========================================================================================
holding   one thread's own batch: the thread knows every count, and what each call must answer
contest   a batch on the common board. In a *ticket* contest, a ticket is the right to drop the one
          reference that a block was born with, while visitors take and return counts of their own.
          In a *race*, every thread frees at random, and each block must be freed once
========  ========================================================================================
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from soak_checks import holds, require
from soak_faults import Device, FakeStream, Faults

from kvheap import MemoryBatch, MemoryFormat, TensorMemoryAllocator
from kvheap.blocks.block_layout import BlockLayout

PAGE = 4096
HEAP_PAGES = 640
MAX_BLOCKS = 48
STREAM_WAIT_S = 0.02
NUM_STREAMS = 4

LAYOUTS = (
    BlockLayout.of([96], torch.uint8, MemoryFormat.BINARY),
    BlockLayout.of([2, 1, 16, 32], torch.float16, MemoryFormat.KV_2LTD),
    BlockLayout.of([4097], torch.uint8, MemoryFormat.BINARY),
    BlockLayout.of([3, 2048], torch.int32, MemoryFormat.HS_TD),
    BlockLayout.of([(8, 64), (33,)], [torch.bfloat16, torch.int8], MemoryFormat.UNDEFINED),
)


@dataclass(eq=False)
class Holding:
    """A batch of one thread's own. Each live block has one reference and no pin count."""

    batch: MemoryBatch
    values: torch.Tensor
    live: list[int]
    only_whole: bool = False
    """A stream works on all blocks: they are given up together."""
    has_streams: bool = False
    """A stream was recorded on one of the blocks, or on all."""

    def value(self, row: int) -> int:
        """What every byte of a block must be."""
        return int(self.values[row])

    def check(self, rows: Sequence[int]) -> None:
        """Require that blocks have their contents."""
        for row in rows:
            block = self.batch[row].raw_tensor
            require(block is not None, f"{self.batch!r} lost block {row}")
            assert block is not None
            require(holds(block, self.value(row)), f"{self.batch[row]!r} has other contents")

    def check_counts(self) -> None:
        """Require one reference of each live block, and no other count."""
        counts = np.zeros(len(self.batch), np.int32)
        counts[self.live] = 1
        require(np.array_equal(self.batch.ref_counts, counts), f"wrong counts: {self.batch!r}")
        require(not self.batch.pin_counts.any(), f"pinned: {self.batch!r}")


@dataclass(eq=False)
class Contest:
    """A batch that all threads work on; see the module's docstring."""

    holding: Holding
    is_race: bool
    tickets: deque[int]
    freed: deque[int] = field(default_factory=deque)


class Cycle:
    """Garbage that only the cyclic collector finds."""

    def __init__(self, kept: object) -> None:
        self.kept = kept
        self.itself = self


class World:
    """A heap, and what the threads at it share.

    Args:
        options: of the heap: ``debug``, ``scrub``.
        seed: of the streams.
    """

    def __init__(self, options: dict[str, bool], seed: int) -> None:
        self.options = options
        buffer = torch.zeros(HEAP_PAGES * PAGE, dtype=torch.uint8)
        self.heap = TensorMemoryAllocator(
            buffer, PAGE, stream_wait_s=STREAM_WAIT_S, on_full=None, **options
        )
        other = TensorMemoryAllocator(torch.zeros(PAGE, dtype=torch.uint8), debug=False)
        foreign = other.allocate([1], torch.uint8)
        assert foreign is not None
        self.foreign = foreign
        """A block of another heap."""
        self.faults = Faults()
        self.device = Device(self.report)
        self.streams = [FakeStream(self.device, seed + number, []) for number in range(NUM_STREAMS)]
        """Streams that work on no block in particular."""
        self.board: list[Contest] = []
        self.board_lock = threading.Lock()
        self.violations: deque[str] = deque()
        self.stopping = threading.Event()

    def report(self, violation: str) -> None:
        """Note a violation, and stop all threads."""
        self.violations.append(violation)
        self.stopping.set()
