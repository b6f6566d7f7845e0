"""The compiled kernel of pointer copies, executed: every byte against one memmove a piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled import ON_ALL_CAPABILITIES, needs_compiler
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory
from sparse import sparse_memory

from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy

pytestmark = needs_compiler

CPU = torch.device("cpu")
GIB = 1 << 30


def spread(sizes: np.ndarray, granule: int, seed: int) -> np.ndarray:
    """Offsets of disjoint pieces in random order, multiples of the granule, with gaps between."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(sizes))
    steps = -(-sizes[order] // granule) * granule + random.integers(1, 4, len(sizes)) * granule
    offsets = np.empty(len(sizes), np.int64)
    offsets[order] = np.cumsum(steps) - steps
    return offsets


def check(
    source: torch.Tensor,
    target: torch.Tensor,
    offsets: tuple[np.ndarray, np.ndarray],
    sizes: np.ndarray,
    capability: int,
    max_sms: int | None,
) -> int:
    """Copy pieces of one tensor to the other; return how many launches that took."""
    rows = list(zip(offsets[0].tolist(), offsets[1].tolist(), sizes.tolist(), strict=True))
    memory = GlobalMemory(
        reads=[source[start : start + size] for start, _, size in rows],
        writes=[target[start : start + size] for _, start, size in rows],
    )
    pieces = Pieces.of(source.data_ptr() + offsets[0], target.data_ptr() + offsets[1], sizes)
    with running_ptx(capability, memory) as gpu:
        PointerCopy.prepare(pieces, CPU).run(max_sms)
    return len(gpu.launches)


SIZES = {
    "1-to-7": np.array([1, 2, 3, 4, 5, 6, 7] * 9),
    "rows-of-7": np.full(40, 7),
    "rows-of-132": np.full(50, 132),
    "rows-of-4096": np.full(9, 4096),
    "rows-of-65536": np.full(3, 1 << 16),
    "tokens-and-blocks": np.array([576, 2048, 32768, 576, 48]),
    "anything": np.array([1, 64, 1000, 33, 4097, 70_001, 16, 250, 12_288]),
}
GRANULES = {"rows-of-132": 4, "rows-of-4096": 16, "rows-of-65536": 16, "tokens-and-blocks": 16}


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("max_sms", [1, None])
@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_are_copied(sizes: str, max_sms: int | None, capability: int) -> None:
    found, granule = SIZES[sizes], GRANULES.get(sizes, 1)
    offsets = spread(found, granule, 1), spread(found, granule, 2)
    ends = [int((starts + found).max()) for starts in offsets]
    random = np.random.default_rng(3)
    source, target = (
        torch.from_numpy(random.integers(0, 256, end + 64, dtype=np.uint8)) for end in ends
    )
    before, expected = source.clone(), target.clone()
    for start, to, size in zip(*(o.tolist() for o in offsets), found.tolist(), strict=True):
        expected[to : to + size] = source[start : start + size]
    check(source, target, offsets, found, capability, max_sms)
    assert torch.equal(target, expected)
    assert torch.equal(source, before)


@ON_ALL_CAPABILITIES
def test_every_width_of_access_in_one_copy(capability: int) -> None:
    """Five launches: bodies of 16, 8, 4 and 2 bytes, and all the rest byte by byte."""
    sizes = np.array([400, 333, 222, 777, 65, 100])
    offsets = np.arange(6) * 1024 + 3, np.arange(6) * 1024 + np.array([3, 11, 7, 5, 4, 19])
    source = torch.randint(0, 256, (6 << 10,), dtype=torch.uint8)
    target = torch.zeros(7 << 10, dtype=torch.uint8)
    expected = target.clone()
    for start, to, size in zip(*(o.tolist() for o in offsets), sizes.tolist(), strict=True):
        expected[to : to + size] = source[start : start + size]
    assert check(source, target, offsets, sizes, capability, None) == 5
    assert torch.equal(target, expected)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("size", [4096, 97])
def test_pieces_beyond_two_to_the_32_words(size: int, capability: int) -> None:
    """Addresses are counted from the descriptors, in words: 40 GiB wrap in words of 8 bytes too."""
    offsets = np.array([0, 4 * GIB - 4096, 4 * GIB, 17 * GIB, 41 * GIB, 79 * GIB])
    near, far = sparse_memory(80 * GIB), sparse_memory(80 * GIB)
    sizes = np.full(6, size)
    for source, target in ((near, far), (far, near)):
        for offset in offsets.tolist():
            source[offset : offset + size] = torch.randint(1, 256, (size,), dtype=torch.uint8)
            target[offset : offset + size] = 0
        check(source, target, (offsets, offsets[::-1].copy()), sizes, capability, 2)
        for start, to in zip(offsets.tolist(), offsets[::-1].tolist(), strict=True):
            assert torch.equal(target[to : to + size], source[start : start + size])
