"""The alignment that both sides of a block copy promise to kernels, which wide accesses rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvheap.kernels.block_sides import Dense, Scattered


def bytes_at(residue: int, num_bytes: int = 256) -> torch.Tensor:
    """Bytes from an address that is ``residue`` modulo 64."""
    storage = torch.zeros(num_bytes + 128, dtype=torch.uint8)
    start = (residue - storage.data_ptr()) % 64
    return storage[start : start + num_bytes]


@pytest.mark.parametrize(
    ("residue", "addresses", "alignment"),
    [
        (0, [0, 32, 96], 16),
        (8, [0, 32, 96], 8),
        (4, [0, 32, 96], 4),
        (1, [0, 32, 96], 1),
        (0, [0, 40], 8),
        (16, [0, 34], 2),
        (32, [3], 1),
        (0, [], 16),
    ],
)
def test_scattered_blocks_are_aligned_as_the_buffer_and_all_addresses(
    residue: int, addresses: list[int], alignment: int
) -> None:
    buffer = bytes_at(residue)
    assert Scattered.of(buffer, addresses, 8, 1).alignment == alignment
    assert Scattered.checked(buffer, np.array(addresses, np.int64)).alignment == alignment


def test_addresses_on_a_device_are_aligned_as_promised() -> None:
    addresses = torch.tensor([0, 32])
    assert Scattered(bytes_at(0), None, addresses, 16).alignment == 16
    assert Scattered(bytes_at(0), None, addresses, 2).alignment == 2
    assert Scattered(bytes_at(8), None, addresses, 16).alignment == 8


@pytest.mark.parametrize(
    ("residue", "stride", "num_blocks", "alignment"),
    [(0, 32, 4, 16), (0, 24, 4, 8), (4, 32, 4, 4), (0, 33, 4, 1), (0, 33, 1, 16), (2, 33, 1, 2)],
)
def test_dense_blocks_are_aligned_as_the_first_and_the_stride(
    residue: int, stride: int, num_blocks: int, alignment: int
) -> None:
    blocks = bytes_at(residue).as_strided((num_blocks, 16), (stride, 1))
    assert Dense(blocks).alignment == alignment
