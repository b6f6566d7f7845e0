"""The driver's copies on a real GPU."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from driver_worlds import POISON, pinned_ranges
from kernel_paths import on_a_gpu

from kvheap.kernels import cuda_declarations
from kvheap.kernels.copy_engine import CopyEngineError, Driver, driver
from kvheap.kernels.pieces import Pieces


@pytest.fixture
def side_stream() -> Iterator[torch.cuda.Stream]:
    """A stream of its own; the device's context is current on this thread."""
    torch.cuda.mem_get_info()
    stream = torch.cuda.Stream()
    yield stream
    stream.synchronize()


def device_driver(form: int | None) -> Driver:
    """The real driver, by the form of 12.8 where asked for: later ones have it too."""
    if form != 9:
        return driver()
    library = ctypes.CDLL("libcuda.so.1")
    names = [name for name in cuda_declarations.PROTOTYPES if name != "cuMemcpyBatchAsync_v2"]
    return Driver(SimpleNamespace(**{n: getattr(library, n) for n in names if hasattr(library, n)}))


def place(buffer: torch.Tensor, on_device: bool) -> torch.Tensor:
    return buffer.cuda() if on_device else buffer.pin_memory()


@on_a_gpu
@pytest.mark.parametrize("form", [None, 9], ids=["own", "nine"])
@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_a_thousand_pieces_on_a_device(
    side_stream: torch.cuda.Stream, direction: str, is_uniform: bool, form: int | None
) -> None:
    real = device_driver(form)
    if not real.has_batch:
        pytest.skip(f"the driver supports CUDA {real.version}: no batched copy")
    rng = np.random.default_rng(11)
    count, slot_bytes = 1000, 4096
    source = torch.from_numpy(rng.integers(0, 256, count * slot_bytes, np.uint8))
    expected = torch.full_like(source, POISON)
    here, there = place(source, direction[0] == "d"), place(expected, direction[2] == "d")
    torch.cuda.synchronize()
    sizes = np.full(count, 1000) if is_uniform else rng.integers(1, slot_bytes + 1, count)
    froms, tos = (rng.permutation(count) * slot_bytes for _ in range(2))
    for one, other, size in zip(froms.tolist(), tos.tolist(), sizes.tolist(), strict=True):
        expected[other : other + size] = source[one : one + size]
    pieces = Pieces.of(
        froms + here.data_ptr(), tos + there.data_ptr(), 1000 if is_uniform else sizes
    )
    for copy in ("batch", "each"):
        there.fill_(POISON)
        torch.cuda.synchronize()
        if copy == "batch":
            real.copy_batch(pieces, side_stream.cuda_stream, over_link=direction != "d2d")
        else:
            real.copy_each(pieces, side_stream.cuda_stream)
        side_stream.synchronize()
        assert torch.equal(there.cpu(), expected), copy


@on_a_gpu
def test_sources_are_read_in_stream_order(side_stream: torch.cuda.Stream) -> None:
    real = driver()
    if not real.has_batch:
        pytest.skip(f"the driver supports CUDA {real.version}: no batched copy")
    source = torch.zeros(64 * 65536, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source, device="cpu").pin_memory()
    torch.cuda.synchronize()
    slots = np.arange(64) * 65536
    pieces = Pieces.of(slots + source.data_ptr(), slots + target.data_ptr(), 65536)
    for value in range(1, 21):
        with torch.cuda.stream(side_stream):
            torch.cuda._sleep(200_000)
            source.fill_(value)
        real.copy_batch(pieces, side_stream.cuda_stream, over_link=True)
        side_stream.synchronize()
        assert (target == value).all()


@on_a_gpu
def test_a_real_driver_refuses_a_piece_of_no_bytes(side_stream: torch.cuda.Stream) -> None:
    real = device_driver(9)
    if not real.has_batch:
        pytest.skip(f"the driver supports CUDA {real.version}: no batched copy")
    buffer = torch.zeros(4096, dtype=torch.uint8, device="cuda")
    addresses = np.arange(4) * 64 + buffer.data_ptr()
    pieces = Pieces(addresses, addresses + 1024, np.array([64, 64, 0, 64]))
    with pytest.raises(CopyEngineError, match="CUDA_ERROR_INVALID_VALUE") as caught:
        real.copy_batch(pieces, side_stream.cuda_stream, over_link=False)
    assert caught.value.piece in (2, None)
    # Nothing is left behind that a launch would report.
    assert int(buffer.sum()) == 0


@on_a_gpu
def test_a_real_driver_refuses_the_legacy_stream_and_captures(
    side_stream: torch.cuda.Stream,
) -> None:
    real = driver()
    assert real.version >= 11000
    if not real.has_batch:
        pytest.skip(f"the driver supports CUDA {real.version}: no batched copy")
    buffer = torch.arange(4096, device="cuda").to(torch.uint8)
    pieces = Pieces.of([buffer.data_ptr()], [buffer.data_ptr() + 1024], 512)
    with pytest.raises(ValueError, match="legacy default stream"):
        real.copy_batch(pieces, torch.cuda.default_stream().cuda_stream, over_link=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side_stream):
        assert real.is_capturing(side_stream.cuda_stream)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            real.copy_batch(pieces, side_stream.cuda_stream, over_link=False)
        real.copy_each(pieces, side_stream.cuda_stream)
    assert not real.is_capturing(side_stream.cuda_stream)
    buffer[1024:1536] = POISON
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(buffer[1024:1536], buffer[:512])


@on_a_gpu
def test_a_real_driver_knows_memory(side_stream: torch.cuda.Stream) -> None:
    real = driver()
    device = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    found = real.locate(device.data_ptr() + 5)
    assert found is not None
    assert (found.kind, found.device) == ("device", device.device.index)
    assert found.start <= device.data_ptr()
    assert device.data_ptr() + device.nbytes <= found.end
    pageable = np.zeros(1 << 20, np.uint8)
    assert real.locate(pageable.ctypes.data) is None
    assert pinned_ranges(real, pageable.ctypes.data, pageable.ctypes.data + 1).shape == (0, 2)
    pinned = torch.zeros(1 << 20, dtype=torch.uint8).pin_memory()
    start, end = pinned.data_ptr(), pinned.data_ptr() + pinned.nbytes
    ranges = pinned_ranges(real, start, end)
    assert ranges[0, 0] <= start
    assert ranges[-1, 1] >= end


@on_a_gpu
def test_a_real_driver_tells_registrations_apart(side_stream: torch.cuda.Stream) -> None:
    real = driver()
    half_bytes = 16 * mmap.PAGESIZE
    with mmap.mmap(-1, 3 * half_bytes) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        start = view.ctypes.data
        middle, gap = start + half_bytes, start + 2 * half_bytes
        cudart = torch.cuda.cudart()
        assert int(cudart.cudaHostRegister(start, half_bytes, 1)) == 0
        assert int(cudart.cudaHostRegister(middle, half_bytes, 1)) == 0
        try:
            ranges = pinned_ranges(real, start + 1, gap + half_bytes)
            assert ranges.tolist() == [[start, middle], [middle, gap]]
            assert real.locate(gap) is None
        finally:
            assert int(cudart.cudaHostUnregister(start)) == 0
            assert int(cudart.cudaHostUnregister(middle)) == 0
            del view
        assert real.locate(start) is None
