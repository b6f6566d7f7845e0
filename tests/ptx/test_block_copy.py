"""The compiled kernels of block copies, executed: every byte against a loop over the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from compiled import ON_ALL_CAPABILITIES, needs_compiler
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory
from sparse import sparse_memory

from kvheap.kernels import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.block_copy import TILE

pytestmark = needs_compiler


@dataclass(frozen=True)
class Case:
    """Blocks in random order at multiples of ``alignment``, in a buffer that begins anywhere."""

    block_bytes: int
    num_blocks: int
    alignment: int
    shift: int = 0
    padding: int = 0
    """Bytes between the blocks of the dense tensor."""

    def __str__(self) -> str:
        return f"{self.num_blocks}x{self.block_bytes}B-at-{self.alignment}+{self.shift}"


NARROW = [
    Case(1, 40, 1),
    Case(7, 33, 1, shift=3, padding=1),
    Case(2, 300, 2, shift=2),
    Case(132, 17, 4, padding=4),
    Case(656, 5, 8, shift=8),
]
WIDE = [
    Case(16, 200, 16, padding=16),
    Case(576, 9, 64),
    Case(4096, 5, 4096),
    Case(16384 + 48, 2, 16, padding=16),
    Case(64 << 10, 3, 64),
]


class World:
    """A buffer, its blocks, and a dense tensor of as many blocks, all random."""

    def __init__(self, case: Case) -> None:
        self.case = case
        step = -(-case.block_bytes // case.alignment) * case.alignment
        random = np.random.default_rng(case.block_bytes)
        self.addresses = random.permutation(2 * case.num_blocks)[: case.num_blocks] * step
        self.storage = self.random_bytes(case.shift + 2 * case.num_blocks * step)
        self.buffer = self.storage[case.shift :]
        row = case.block_bytes + case.padding
        self.dense_storage = self.random_bytes(case.num_blocks * row)
        self.dense = self.dense_storage.view(-1, row)[:, : case.block_bytes]

    def random_bytes(self, size: int) -> torch.Tensor:
        data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
        return torch.from_numpy(data)

    def blocks(self, addresses: np.ndarray) -> list[torch.Tensor]:
        """The blocks of the buffer at these addresses."""
        return [self.buffer[at : at + self.case.block_bytes] for at in addresses.tolist()]

    def require(self, buffer: torch.Tensor, dense: torch.Tensor) -> None:
        """Compare every byte of both storages."""
        assert torch.equal(self.storage, buffer)
        assert torch.equal(self.dense_storage, dense)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("case", NARROW + WIDE, ids=str)
def test_scatter_gather_and_fill(case: Case, capability: int) -> None:
    world = World(case)
    blocks, rows = world.blocks(world.addresses), list(world.dense)
    before, dense = world.storage.clone(), world.dense_storage.clone()

    with running_ptx(capability, GlobalMemory(reads=rows, writes=blocks)):
        scatter_blocks(world.dense, world.buffer, world.addresses)
    scattered = before.clone()
    for address, row in zip(world.addresses.tolist(), rows, strict=True):
        start = case.shift + address
        scattered[start : start + case.block_bytes] = row
    world.require(scattered, dense)

    world.storage.copy_(before)
    with running_ptx(capability, GlobalMemory(reads=blocks, writes=rows)):
        gather_blocks(world.buffer, world.addresses, world.dense)
    gathered = dense.clone().view(-1, case.block_bytes + case.padding)
    for row, address in zip(gathered, world.addresses.tolist(), strict=True):
        start = case.shift + address
        row[: case.block_bytes] = before[start : start + case.block_bytes]
    world.require(before, gathered.view(-1))

    with running_ptx(capability, GlobalMemory(writes=blocks)):
        fill_blocks(world.buffer, world.addresses, case.block_bytes, 0xDE)
    filled = before.clone()
    for address in world.addresses.tolist():
        start = case.shift + address
        filled[start : start + case.block_bytes] = 0xDE
    world.require(filled, gathered.view(-1))


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("case", [NARROW[1], WIDE[1]], ids=str)
def test_move(case: Case, capability: int) -> None:
    world = World(case)
    half = case.num_blocks // 2
    sources, targets = world.addresses[:half], world.addresses[half : 2 * half]
    expected, dense = world.storage.clone(), world.dense_storage.clone()
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        block = world.buffer[source : source + case.block_bytes]
        expected[case.shift + target : case.shift + target + case.block_bytes] = block
    memory = GlobalMemory(reads=world.blocks(sources), writes=world.blocks(targets))
    with running_ptx(capability, memory):
        move_blocks(world.buffer, sources, targets, case.block_bytes)
    world.require(expected, dense)


class TestBeyondTwoToThe32:
    """Only the blocks may be touched, so an offset that wraps is caught wherever it leads."""

    @ON_ALL_CAPABILITIES
    @pytest.mark.parametrize("shift", [0, 1])
    def test_addresses(self, shift: int, capability: int) -> None:
        buffer = sparse_memory(72 << 30)
        addresses = np.array([0, 2, 4, 16, 35, 71]) << 30  # in words of 8 bytes, 32 GiB wrap
        addresses[1:] += shift
        places = [buffer[at : at + 48] for at in addresses.tolist()]
        blocks = torch.randint(1, 256, (6, 48), dtype=torch.uint8)
        with running_ptx(capability, GlobalMemory(reads=[blocks], writes=places)):
            scatter_blocks(blocks, buffer, addresses)
        assert all(map(torch.equal, places, blocks))
        out = torch.zeros_like(blocks)
        with running_ptx(capability, GlobalMemory(reads=places, writes=[out])):
            gather_blocks(buffer, addresses, out)
        assert torch.equal(out, blocks)
        with running_ptx(capability, GlobalMemory(writes=places)):
            fill_blocks(buffer, addresses, 48, 0xDE)
        assert all((place == 0xDE).all() for place in places)

    @ON_ALL_CAPABILITIES
    @pytest.mark.parametrize("stride", [(12 << 30) + 16, (3 << 30) + 1])
    def test_strides(self, stride: int, capability: int) -> None:
        """From the fourth block on, a stride of 12 GiB wraps even where accesses are counted."""
        dense = sparse_memory(4 * stride + 48).as_strided((5, 48), (stride, 1))
        dense.copy_(torch.randint(1, 256, (5, 48), dtype=torch.uint8))
        buffer = torch.zeros(5, 48, dtype=torch.uint8)
        with running_ptx(capability, GlobalMemory(reads=list(dense), writes=[buffer])):
            scatter_blocks(dense, buffer.view(-1), range(0, 240, 48))
        assert torch.equal(buffer, dense)
        dense.zero_()
        with running_ptx(capability, GlobalMemory(reads=[buffer], writes=list(dense))):
            gather_blocks(buffer.view(-1), range(0, 240, 48), dense)
        assert torch.equal(buffer, dense)

    @ON_ALL_CAPABILITIES
    @pytest.mark.parametrize("shift", [0, 1])
    def test_one_block_of_5_gib(self, shift: int, capability: int) -> None:
        """A few of its tiles are executed: the first, those around 2 and 4 GiB, and the last."""
        size = 5 << 30
        tile_bytes = TILE.vectors * (1 if shift else 16)
        tiles = [0, *((bytes_ << 30) // tile_bytes + more for bytes_ in (2, 4) for more in (-1, 0))]
        tiles.append(size // tile_bytes - 1)
        block, buffer = sparse_memory(size)[None], sparse_memory(size + 16)
        target = buffer[shift : shift + size]
        parts = [slice(tile * tile_bytes, (tile + 1) * tile_bytes) for tile in tiles]
        for part in parts:
            block[0, part].copy_(torch.randint(1, 256, (tile_bytes,), dtype=torch.uint8))
        memory = GlobalMemory(
            reads=[block[0, part] for part in parts], writes=[target[part] for part in parts]
        )
        done = 0

        def chosen(num_blocks: int) -> list[int]:
            """Of this launch; a block of so many narrow accesses takes several."""
            nonlocal done
            done %= size // tile_bytes
            found = [tile - done for tile in tiles if 0 <= tile - done < num_blocks]
            done += num_blocks
            return found

        with running_ptx(capability, memory, blocks=chosen):
            scatter_blocks(block, buffer, [shift])
            assert all(torch.equal(target[part], block[0, part]) for part in parts)
            assert done == size // tile_bytes
            fill_blocks(buffer, [shift], size, 0xDE)
            assert all((target[part] == 0xDE).all() for part in parts)
