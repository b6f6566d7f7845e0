"""Copies through a stand-in driver, between two buffers whose every byte is compared."""

from __future__ import annotations

import numpy as np
import pytest
from fake_driver import FakeDriver

from kvheap.device.copy_device import known_ranges
from kvheap.kernels.copy_engine import Driver
from kvheap.kernels.pieces import Pieces

STREAM = 0x7F12_3456_789A_BCD0
"""Needs all of a register, as real handles do."""

POISON = 0xA5

ROWS = ((0, 512, 64), (2048, 0, 16), (100, 3000, 333))
"""Source offset, target offset and bytes of some pieces."""

BOTH_FORMS = pytest.mark.parametrize(
    ("version", "name", "form"),
    [(12080, "cuMemcpyBatchAsync", 9), (13010, "cuMemcpyBatchAsync_v2", 8)],
    ids=["12.8", "13"],
)


def pinned_ranges(asked: Driver, start: int, end: int) -> np.ndarray:
    """The ranges of pinned memory that transfers find by asking the driver."""
    return known_ranges(asked, np.array([start]), np.array([end]), on_device=False)  # type: ignore[arg-type]


class World:
    """Two buffers, a stand-in driver, and what the target should be after some copies."""

    def __init__(self, version: int = 13010, deferred: bool = False, num_bytes: int = 4096) -> None:
        self.fake = FakeDriver(version, deferred)
        self.driver = Driver(self.fake)
        self.source = np.random.default_rng(7).integers(0, 256, num_bytes, np.uint8)
        self.target = np.full(num_bytes, POISON, np.uint8)
        self.expected = self.target.copy()

    def pieces(self, *rows: tuple[int, int, int]) -> Pieces:
        """Pieces of ``(source offset, target offset, bytes)``."""
        table = np.array(rows, np.int64).reshape(-1, 3)
        sources = table[:, 0] + self.source.ctypes.data
        return Pieces(sources, table[:, 1] + self.target.ctypes.data, table[:, 2].copy())

    def expect(self, *rows: tuple[int, int, int]) -> None:
        for source, target, size in rows:
            self.expected[target : target + size] = self.source[source : source + size]

    def check(self) -> None:
        """Every byte of the target, and nothing broke in the stand-in."""
        assert not self.fake.broken
        assert np.array_equal(self.target, self.expected)


ROWS = ((0, 512, 64), (2048, 0, 16), (100, 3000, 333))
