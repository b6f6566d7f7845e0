"""The compiled kernel of bulk copies, executed: every byte against one memmove a piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled import needs_compiler
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory

from kvheap.kernels.bulk_copy import BulkCopy
from kvheap.kernels.pieces import Pieces

pytestmark = needs_compiler

CPU = torch.device("cpu")
ON_BULK_CAPABILITIES = pytest.mark.parametrize("capability", [90, 100])


class World:
    """Pieces of given sizes at random places of one tensor, and where they go in another."""

    def __init__(self, sizes: np.ndarray, seed: int = 1) -> None:
        self._random = np.random.default_rng(seed)
        self.sizes = sizes
        self.places = [self._spread() for _ in range(2)]
        ends = [int((starts + sizes).max()) for starts in self.places]
        self.source, self.target = (
            torch.from_numpy(self._random.integers(0, 256, end + 64, dtype=np.uint8))
            for end in ends
        )
        rows = np.stack([*self.places, sizes], axis=1).tolist()
        self.memory = GlobalMemory(
            reads=[self.source[start : start + size] for start, _, size in rows],
            writes=[self.target[to : to + size] for _, to, size in rows],
        )
        self.expected = self.target.clone()
        for start, to, size in rows:
            self.expected[to : to + size] = self.source[start : start + size]

    def _spread(self) -> np.ndarray:
        """Offsets of disjoint pieces in random order, multiples of 16, with gaps between."""
        order = self._random.permutation(len(self.sizes))
        steps = self.sizes[order] + self._random.integers(0, 4, len(self.sizes)) * 16
        offsets = np.empty(len(self.sizes), np.int64)
        offsets[order] = np.cumsum(steps) - steps
        return offsets

    @property
    def pieces(self) -> Pieces:
        sources, targets = self.places
        return Pieces.of(
            self.source.data_ptr() + sources, self.target.data_ptr() + targets, self.sizes
        )

    def check(self, max_sms: int | None, capability: int = 90, **options) -> None:
        with running_ptx(capability, self.memory, **options) as gpu:
            BulkCopy.prepare(self.pieces, CPU).run(max_sms)
        assert len(gpu.launches) == 1
        assert torch.equal(self.target, self.expected)


SIZES = {
    "16": np.full(1000, 16),
    "1040": np.full(70, 1040),
}

@ON_BULK_CAPABILITIES
@pytest.mark.parametrize("max_sms", [1, 3, None])
@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_are_copied(sizes: str, max_sms: int | None, capability: int) -> None:
    World(SIZES[sizes]).check(max_sms, capability)
