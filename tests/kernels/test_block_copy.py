"""Block copy against a byte-wise NumPy model: the CPU path, the interpreted kernels, a GPU."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import PATHS, WITHOUT_A_GPU, needs_triton, on_a_gpu, running

from kvheap.kernels import block_copy, fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.block_sides import Dense, Scattered

POISON = 0xA5

ON_ALL_PATHS = pytest.mark.parametrize("path", ["cpu-bulk", "cpu-moves", *PATHS])


@dataclass
class Case:
    """Blocks, and places for them in a buffer that starts at any byte of its storage."""

    buffer_bytes: int
    buffer_offset: int
    block_bytes: int
    padding: int
    dense_offset: int
    addresses: np.ndarray
    seed: int

    def buffer(self, device: torch.device) -> torch.Tensor:
        storage = torch.full((self.buffer_offset + self.buffer_bytes,), POISON, dtype=torch.uint8)
        return storage.to(device)[self.buffer_offset :]

    def random_buffer(self, device: torch.device) -> torch.Tensor:
        generator = np.random.default_rng(self.seed)
        data = generator.integers(0, 256, self.buffer_bytes, dtype=np.uint8)
        buffer = self.buffer(device)
        buffer.copy_(torch.from_numpy(data))
        return buffer

    def blocks(self, device: torch.device, fill: int | None = None) -> torch.Tensor:
        """``[N, block_bytes]`` with ``padding`` bytes between the blocks."""
        row = self.block_bytes + self.padding
        size = self.dense_offset + len(self.addresses) * row
        generator = np.random.default_rng(self.seed + 1)
        data = generator.integers(0, 256, size, dtype=np.uint8)
        if fill is not None:
            data[:] = fill
        flat = torch.from_numpy(data).to(device)[self.dense_offset :]
        return flat.view(len(self.addresses), row)[:, : self.block_bytes]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    granule = draw(st.sampled_from([1, 2, 4, 8, 16, 64]))
    block_bytes = granule * draw(st.integers(1, 40))
    num_blocks = draw(st.integers(0, 12))
    places = draw(st.permutations(range(num_blocks + 4)))[:num_blocks]
    gap = granule * draw(st.integers(0, 2))
    shift = draw(st.sampled_from([0, granule, 1]))
    addresses = np.array(places, np.int64) * (block_bytes + gap) + shift
    return Case(
        buffer_bytes=(num_blocks + 4) * (block_bytes + gap) + shift + draw(st.integers(0, 3)),
        buffer_offset=draw(st.sampled_from([0, 1, 8, 16])),
        block_bytes=block_bytes,
        padding=draw(st.sampled_from([0, granule, 1])),
        dense_offset=draw(st.sampled_from([0, 1, 16])),
        addresses=addresses,
        seed=draw(st.integers(0, 2**32)),
    )


def model_scatter(case: Case, blocks: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    expected = buffer.copy()
    for address, block in zip(case.addresses.tolist(), blocks, strict=True):
        expected[address : address + case.block_bytes] = block
    return expected


@ON_ALL_PATHS
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_scatter_writes_the_blocks_and_nothing_else(path: str, case: Case) -> None:
    with running(path) as device:
        buffer, blocks = case.buffer(device), case.blocks(device)
        expected = model_scatter(case, blocks.cpu().numpy(), buffer.cpu().numpy())
        scatter_blocks(blocks, buffer, case.addresses)
        np.testing.assert_array_equal(buffer.cpu().numpy(), expected)


@ON_ALL_PATHS
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_gather_reads_the_blocks_and_writes_nothing_else(path: str, case: Case) -> None:
    with running(path) as device:
        buffer, out = case.random_buffer(device), case.blocks(device, fill=POISON)
        before = buffer.clone()
        assert gather_blocks(buffer, case.addresses, out) is out
        expected = [
            before.cpu().numpy()[address : address + case.block_bytes]
            for address in case.addresses.tolist()
        ]
        if len(out):
            np.testing.assert_array_equal(out.cpu().numpy(), np.stack(expected))
            whole = torch.as_strided(out, (len(out), out.stride(0)), (out.stride(0), 1))
            assert (whole[:, case.block_bytes :] == POISON).all()
        assert torch.equal(buffer, before)


@ON_ALL_PATHS
@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_move_copies_to_disjoint_targets(path: str, case: Case, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(case.addresses.tolist()))
    half = len(shuffled) // 2
    targets, free_sources = shuffled[:half], shuffled[half:] or shuffled[:1]
    sources = [data.draw(st.sampled_from(free_sources)) for _ in targets]
    if data.draw(st.booleans()) and len(free_sources) > 1:  # a block onto itself, twice read
        targets, sources = [*targets, free_sources[0]], [*sources, free_sources[0]]
    with running(path) as device:
        buffer = case.random_buffer(device)
        expected = buffer.cpu().numpy().copy()
        for source, target in zip(sources, targets, strict=True):
            expected[target : target + case.block_bytes] = expected[
                source : source + case.block_bytes
            ].copy()
        move_blocks(buffer, sources, targets, case.block_bytes)
        np.testing.assert_array_equal(buffer.cpu().numpy(), expected)


@ON_ALL_PATHS
@settings(max_examples=60, deadline=None)
@given(case=cases(), value=st.integers(0, 255))
def test_fill_sets_the_blocks_and_nothing_else(path: str, case: Case, value: int) -> None:
    with running(path) as device:
        buffer = case.random_buffer(device)
        filled = np.full((len(case.addresses), case.block_bytes), value, np.uint8)
        expected = model_scatter(case, filled, buffer.cpu().numpy())
        fill_blocks(buffer, case.addresses, case.block_bytes, value)
        np.testing.assert_array_equal(buffer.cpu().numpy(), expected)


@ON_ALL_PATHS
@pytest.mark.parametrize("block_bytes", [1, 132, 576, 656, 4096, 5000, 70_000])
def test_sizes_around_a_tile_survive_a_round_trip(path: str, block_bytes: int) -> None:
    num_blocks = 37 if block_bytes < 10_000 else 6
    with running(path) as device:
        blocks = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8, device=device)
        addresses = np.random.default_rng(0).permutation(2 * num_blocks)[:num_blocks] * block_bytes
        buffer = torch.full((2 * num_blocks * block_bytes,), POISON, dtype=torch.uint8).to(device)
        scatter_blocks(blocks, buffer, addresses)
        out = torch.full_like(blocks, POISON)
        assert torch.equal(gather_blocks(buffer, addresses, out), blocks)
        assert int((buffer.view(2 * num_blocks, -1) == POISON).all(1).sum()) >= (
            num_blocks if block_bytes > 8 else 0
        )


@ON_ALL_PATHS
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64],
)
def test_every_dtype_is_copied_bit_by_bit(path: str, dtype: torch.dtype) -> None:
    with running(path) as device:
        raw = torch.randint(0, 256, (6, 3, 8 * dtype.itemsize), dtype=torch.uint8)
        blocks = raw.view(dtype).to(device)  # NaN patterns and odd bools included
        buffer = torch.zeros(8 * raw[0].numel(), dtype=torch.uint8, device=device)
        addresses = [i * raw[0].numel() for i in (7, 0, 3, 1, 6, 2)]
        scatter_blocks(blocks, buffer, addresses)
        out = gather_blocks(buffer, addresses, torch.zeros_like(blocks))
        assert torch.equal(out.view(torch.uint8), blocks.view(torch.uint8))


@WITHOUT_A_GPU
def test_aligned_tensors_in_a_storage_that_is_not_are_copied(path: str) -> None:
    memory = np.full(4096, POISON, np.uint8)
    odd = torch.from_numpy(memory[1 + -memory.ctypes.data % 16 :])  # its storage starts there
    buffer, blocks = odd[15:1039], odd[2047 : 2047 + 160].view(5, 32)
    assert (odd.data_ptr() % 16, buffer.data_ptr() % 16, blocks.data_ptr() % 16) == (1, 0, 0)
    blocks.copy_(torch.randint(0, 256, (5, 32), dtype=torch.uint8))
    addresses = np.array([64, 0, 256, 992, 128])
    with running(path):
        scatter_blocks(blocks, buffer, addresses)
        for address, block in zip(addresses, blocks, strict=True):
            assert torch.equal(buffer[address : address + 32], block)
        assert torch.equal(gather_blocks(buffer, addresses, torch.empty_like(blocks)), blocks)
        fill_blocks(buffer, addresses, 32, 3)
        assert int((buffer == 3).sum()) == 160


@ON_ALL_PATHS
@pytest.mark.parametrize("block_bytes", [16, 24, 4097])
def test_one_run_of_neighbours_is_copied_whole(path: str, block_bytes: int) -> None:
    with running(path) as device:
        blocks = torch.randint(0, 256, (8, block_bytes), dtype=torch.uint8).to(device)
        buffer = torch.full((20 * block_bytes,), POISON, dtype=torch.uint8, device=device)
        addresses = np.arange(3, 11) * block_bytes
        scatter_blocks(blocks, buffer, addresses)
        assert torch.equal(buffer[addresses[0] :][: blocks.numel()], blocks.view(-1))
        assert (buffer[: addresses[0]] == POISON).all()
        assert (buffer[11 * block_bytes :] == POISON).all()
        out = torch.zeros_like(blocks)
        assert torch.equal(gather_blocks(buffer, addresses, out), blocks)
        move_blocks(buffer, addresses, addresses + 8 * block_bytes, block_bytes)
        assert torch.equal(buffer[11 * block_bytes : 19 * block_bytes], blocks.view(-1))


@ON_ALL_PATHS
@pytest.mark.parametrize("shift", [0, 1])  # words of 8 bytes, and of one
def test_addresses_beyond_two_to_the_31(path: str, shift: int) -> None:
    size, block_bytes = (5 << 30) + 4096, 48
    addresses = np.array([(5 << 30) + 16, (1 << 31) - 32, (1 << 32) + 64, 0], np.int64) + shift
    with running(path) as device:
        if device.type == "cpu":  # only the pages that are touched become real
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            buffer = torch.frombuffer(pages, dtype=torch.uint8)
        else:
            buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        blocks = torch.randint(1, 256, (4, block_bytes), dtype=torch.uint8, device=device)
        scatter_blocks(blocks, buffer, addresses)
        for address, block in zip(addresses.tolist(), blocks, strict=True):
            assert torch.equal(buffer[address : address + block_bytes], block)
        assert torch.equal(gather_blocks(buffer, addresses, torch.zeros_like(blocks)), blocks)
        move_blocks(buffer, addresses[:1], [(3 << 30) + 5], block_bytes)
        start = (3 << 30) + 5
        assert torch.equal(buffer[start : start + block_bytes], blocks[0])


@ON_ALL_PATHS
@pytest.mark.parametrize("shift", [0, 1])
def test_dense_strides_beyond_two_to_the_31(path: str, shift: int) -> None:
    stride, block_bytes = (3 << 30) + 16 + shift, 48
    with running(path) as device:
        if device.type == "cpu":
            pages = mmap.mmap(-1, stride + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            storage = torch.frombuffer(pages, dtype=torch.uint8)
        else:
            storage = torch.zeros(stride + 4096, dtype=torch.uint8, device=device)
        out = storage.as_strided((2, block_bytes), (stride, 1))
        buffer = torch.randint(1, 256, (256,), dtype=torch.uint8, device=device)
        gather_blocks(buffer, [64, 16], out)
        assert torch.equal(storage[:block_bytes], buffer[64 : 64 + block_bytes])
        assert torch.equal(storage[stride : stride + block_bytes], buffer[16 : 16 + block_bytes])
        assert not storage[block_bytes:4096].any()
        back = torch.zeros_like(buffer)
        scatter_blocks(out, back, [64, 16])
        assert torch.equal(back[16:112], buffer[16:112])


@needs_triton
@pytest.mark.parametrize("promise", [1, 2, 8, 4096])
def test_promised_alignment_of_device_addresses_is_used(promise: int) -> None:
    with running("interpreter"):
        buffer = torch.full((40_000,), POISON, dtype=torch.uint8)
        blocks = torch.randint(0, 256, (3, 4096), dtype=torch.uint8)
        addresses = torch.tensor([20480, 0, 8192])
        target = Scattered(buffer, None, addresses, promise)
        assert target.alignment == min(promise, 16)
        block_copy._launch_copy(Dense(blocks), target, 3, 4096)
        for address, block in zip(addresses.tolist(), blocks, strict=True):
            assert torch.equal(buffer[address : address + 4096], block)
        assert (buffer == POISON).sum() >= len(buffer) - blocks.numel()


@ON_ALL_PATHS
def test_nothing_to_copy_launches_nothing(path: str) -> None:
    with running(path) as device:
        buffer = torch.full((64,), POISON, dtype=torch.uint8, device=device)
        scatter_blocks(torch.empty(0, 8, device=device), buffer, [])
        gather_blocks(buffer, [], torch.empty(0, 8, device=device))
        scatter_blocks(torch.empty(3, 0, device=device), buffer, [1, 1, 1])
        move_blocks(buffer, [], [], 8)
        move_blocks(buffer, [8], [8], 8)
        fill_blocks(buffer, [], 8, 1)
        assert (buffer == POISON).all()


@on_a_gpu
def test_on_a_gpu_addresses_may_be_there_and_streams_are_honoured() -> None:
    num_blocks, block_bytes = 50_000, 4096
    blocks = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8, device="cuda")
    buffer = torch.zeros(2 * num_blocks * block_bytes, dtype=torch.uint8, device="cuda")
    addresses = torch.randperm(2 * num_blocks, device="cuda")[:num_blocks] * block_bytes
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        scatter_blocks(blocks, buffer, addresses, address_alignment=4096)
        out = gather_blocks(buffer, addresses, torch.zeros_like(blocks), address_alignment=4096)
    side.synchronize()
    assert torch.equal(out, blocks)
    fill_blocks(buffer, addresses, block_bytes, POISON, address_alignment=4096)
    assert int((buffer == POISON).sum()) >= blocks.numel()
    with pytest.raises(TypeError, match="on the host"):
        move_blocks(buffer, addresses, addresses, block_bytes)


@on_a_gpu
@pytest.mark.parametrize("block_bytes", [1, 48, 132])
def test_on_a_gpu_millions_of_small_blocks_are_one_launch(block_bytes: int) -> None:
    num_blocks = 2_000_003
    blocks = torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8, device="cuda")
    addresses = torch.randperm(num_blocks) * block_bytes
    buffer = torch.zeros(num_blocks * block_bytes, dtype=torch.uint8, device="cuda")
    scatter_blocks(blocks, buffer, addresses)
    assert torch.equal(gather_blocks(buffer, addresses, torch.zeros_like(blocks)), blocks)
    expected = torch.zeros(num_blocks, block_bytes, dtype=torch.uint8, device="cuda")
    expected[addresses.cuda() // block_bytes] = blocks
    assert torch.equal(buffer, expected.view(-1))


@on_a_gpu
def test_on_a_gpu_a_launch_does_not_wait_for_the_device() -> None:
    buffer = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    blocks = torch.ones(64, 4096, dtype=torch.uint8, device="cuda")
    addresses = np.arange(64) * 8192
    scatter_blocks(blocks, buffer, addresses)  # compiled now
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of cycles
    scatter_blocks(blocks, buffer, addresses)
    assert not torch.cuda.current_stream().query()
    addresses[:] = 0  # already copied: the caller's array is its own again
    torch.cuda.synchronize()
    assert torch.equal(gather_blocks(buffer, np.arange(64) * 8192, blocks * 0), blocks)
