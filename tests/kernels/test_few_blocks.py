"""Runs of blocks on a CPU: which of them start torch's threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvheap import TensorMemoryAllocator
from kvheap.kernels import gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.few_blocks import MAX_RUN_BYTES, MAX_RUN_OF_SMALL
from kvheap.kernels.words import GRAIN


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each copy has that torch's threads share."""
    sizes: list[int] = []
    copy = torch.Tensor.copy_

    def noted(target: torch.Tensor, source: torch.Tensor, *more: Any) -> torch.Tensor:
        if target.numel() > GRAIN:
            sizes.append(target.nbytes)
        return copy(target, source, *more)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    return sizes


CASES = [
    (16 << 10, 80, False),  # a loop over the blocks starts no thread
    (64 << 10, 100, False),
    (128 << 10, 4, False),  # as few bytes as NumPy copies as fast
    (128 << 10, 20, True),
    (64 << 10, 140, True),  # NumPy would keep other threads from Python for too long
]


@pytest.mark.parametrize(("block_bytes", "count", "is_shared"), CASES)
@pytest.mark.parametrize("padding", [0, 64])
def test_a_run_is_shared_where_the_loop_is(
    block_bytes: int, count: int, is_shared: bool, padding: int, shared: list[int]
) -> None:
    most = MAX_RUN_BYTES if block_bytes // 2 > GRAIN else MAX_RUN_OF_SMALL
    assert is_shared == (block_bytes * count > most)
    block_bytes -= padding
    buffer = torch.zeros((block_bytes + padding) * (count + 1), dtype=torch.uint8)
    heap = TensorMemoryAllocator(buffer, align_bytes=128)
    source = torch.randint(0, 1000, (count, block_bytes // 2), dtype=torch.int16)
    batch = heap.batched_allocate(source.shape[1:], source.dtype, count, source=source)
    assert batch is not None
    assert torch.equal(batch[count - 1].tensor, source[-1])
    out = torch.zeros_like(source)
    heap.batched_free(batch, out=out)
    assert torch.equal(out, source)
    assert len(shared) == 2 * is_shared


@pytest.mark.parametrize(("block_bytes", "count", "is_shared"), CASES[:4])
def test_a_run_of_addresses_is_shared_where_the_loop_is(
    block_bytes: int, count: int, is_shared: bool, shared: list[int]
) -> None:
    count = min(count, 64)
    source = torch.randint(0, 1000, (count, block_bytes // 2), dtype=torch.int16)
    buffer = torch.zeros((count + 1) * block_bytes, dtype=torch.uint8)
    scatter_blocks(source, buffer, [place * block_bytes for place in range(count)])
    assert torch.equal(buffer[: source.nbytes].view(torch.int16), source.view(-1))
    assert len(shared) == is_shared


@pytest.mark.parametrize(("block_bytes", "count"), [(2 << 10, 600), (136, 5000), (4 << 10, 1000)])
def test_scattered_blocks_start_no_thread(
    block_bytes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    select, copy = torch.index_select, torch.Tensor.index_copy_

    def noted_select(rows: torch.Tensor, dim: int, ids: torch.Tensor, **out: Any) -> torch.Tensor:
        sizes.append(len(ids) * rows.shape[1])
        return select(rows, dim, ids, **out)

    def noted_copy(rows: torch.Tensor, dim: int, ids: torch.Tensor, run: torch.Tensor) -> Any:
        sizes.append(run.numel())
        return copy(rows, dim, ids, run)

    monkeypatch.setattr(torch, "index_select", noted_select)
    monkeypatch.setattr(torch.Tensor, "index_copy_", noted_copy)
    places = np.random.default_rng(0).permutation(2 * count) * block_bytes
    here, there = places[:count], places[count:]
    source = torch.randint(0, 256, (count, block_bytes), dtype=torch.uint8)
    buffer, out = torch.zeros(2 * count * block_bytes, dtype=torch.uint8), torch.zeros_like(source)
    scatter_blocks(source, buffer, here)
    move_blocks(buffer, here, there, block_bytes)
    gather_blocks(buffer, there, out)
    assert torch.equal(out, source)
    assert sizes
    assert max(sizes) <= GRAIN
