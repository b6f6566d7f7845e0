"""The copy engines' driver layer: bytes on the boundary, refusals, faults, and a real driver.

Without a device the calls go to C functions that stand in for libcuda (``fake_driver``), and the
layouts are checked against the CUDA header that comes with Triton, where it does, and against a C
compiler, where there is one.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fake_driver
import numpy as np
import pytest
import torch
from fake_driver import CopyCall, FakeDriver, OtherCall
from hypothesis import given
from hypothesis import strategies as st

from kvheap.device.copy_device import known_ranges
from kvheap.kernels import copy_engine
from kvheap.kernels.copy_engine import CopyEngineError, Direction, Driver, Location, driver
from kvheap.kernels.launch import triton
from kvheap.kernels.pieces import Pieces

STREAM = 0x7F12_3456_789A_BCD0
"""Needs all of a register, as real handles do."""

BOTH_FORMS = pytest.mark.parametrize(
    ("version", "name", "form"),
    [(12080, "cuMemcpyBatchAsync", 9), (13010, "cuMemcpyBatchAsync_v2", 8)],
    ids=["12.8", "13"],
)
DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h", "d2d", "p2p")

POISON = 0xA5


def pinned_ranges(asked: Driver, start: int, end: int) -> np.ndarray:
    """What transfers find of pinned memory by asking the driver."""
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


@pytest.fixture
def world() -> World:
    return World()


# Arguments


@BOTH_FORMS
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_argument_of_a_batch_arrives(
    version: int, name: str, form: int, direction: Direction
) -> None:
    world = World(version)
    assert (world.driver.version, world.driver.batch_form) == (version, form)
    pieces = world.pieces(*ROWS)
    world.driver.copy_batch(pieces, STREAM, direction)
    capture_query, call = world.fake.calls
    assert capture_query == OtherCall("cuStreamIsCapturing", (STREAM,))
    assert isinstance(call, fake_driver.BatchCall)
    assert call.name == name
    assert call.dsts == struct.pack("<3Q", *pieces.targets.tolist())
    assert call.srcs == struct.pack("<3Q", *pieces.sources.tolist())
    assert call.sizes == struct.pack("<3Q", 64, 16, 333)
    assert call.count == 3
    # Access order of the stream; both location hints invalid; flags.
    flags = {"h2d": 1, "d2h": 1, "d2d": 0, "p2p": 0}[direction]
    assert call.attributes == struct.pack("<iiiiiI", 1, 0, 0, 0, 0, flags)
    assert call.attribute_indices == struct.pack("<Q", 0)
    assert call.num_attributes == 1
    assert (call.fail_index_address is not None) == (form == 9)
    assert call.stream == STREAM
    world.expect(*ROWS)
    world.check()


@BOTH_FORMS
def test_one_size_for_all_is_written_out(version: int, name: str, form: int) -> None:
    world = World(version)
    rows = [(64 * row, 2048 - 128 * row, 48) for row in range(10)]
    pieces = world.pieces(*rows)
    world.driver.copy_batch(Pieces(pieces.sources, pieces.targets, 48), STREAM, "d2h")
    (call,) = world.fake.batches()
    assert call.sizes == struct.pack("<10Q", *[48] * 10)
    assert call.count == 10
    world.expect(*rows)
    world.check()


@BOTH_FORMS
def test_a_single_piece_is_a_batch_of_one(version: int, name: str, form: int) -> None:
    world = World(version)
    world.driver.copy_batch(world.pieces((8, 16, 4000)), STREAM, "h2d")
    (call,) = world.fake.batches()
    assert (call.count, call.num_attributes) == (1, 1)
    world.expect((8, 16, 4000))
    world.check()


def test_no_pieces_no_call(world: World) -> None:
    world.driver.copy_batch(world.pieces(), STREAM, "h2d")
    world.driver.copy_each(world.pieces(), STREAM)
    assert not world.fake.calls


def test_the_per_thread_default_stream_is_a_stream(world: World) -> None:
    world.driver.copy_batch(world.pieces(*ROWS), 2, "h2d")
    (call,) = world.fake.batches()
    assert call.stream == 2


def test_views_with_gaps_and_other_integers_are_passed_as_they_read(world: World) -> None:
    rows = [(16 * row, 1024 + 16 * row, 1 + row) for row in range(12)]
    every_other = world.pieces(*rows)[::2]
    assert not every_other.sources.flags.c_contiguous
    unsigned = Pieces(
        every_other.sources.astype(np.uint64).view(np.int64),
        every_other.targets.astype(np.uint64),
        every_other.size_array().astype(np.uint32),
    )
    for pieces in (every_other, unsigned):
        world.target[:] = POISON
        world.driver.copy_batch(pieces, STREAM, "h2d")
        world.expect(*rows[::2])
        world.check()


def test_copy_each_calls_in_order(world: World) -> None:
    # The last two go to one place: the later one stays.
    rows = (*ROWS, (700, 512, 64))
    pieces = world.pieces(*rows)
    for stream in (STREAM, 0, 1, 2):
        world.fake.calls.clear()
        world.target[:] = POISON
        world.driver.copy_each(pieces, stream)
        expected = zip(pieces.targets.tolist(), pieces.sources.tolist(), strict=True)
        sizes = [64, 16, 333, 64]
        assert world.fake.calls == [
            CopyCall(target, source, size, stream)
            for (target, source), size in zip(expected, sizes, strict=True)
        ]
        world.expect(*rows)
        world.check()


def test_copy_each_of_one_size(world: World) -> None:
    rows = [(64 * row, 2048 - 128 * row, 48) for row in range(10)]
    pieces = world.pieces(*rows)
    world.driver.copy_each(Pieces(pieces.sources, pieces.targets, 48), STREAM)
    assert [call.size for call in world.fake.copies()] == [48] * 10
    world.expect(*rows)
    world.check()


@given(st.data(), st.sampled_from([12080, 13000]), st.booleans(), st.booleans())
def test_any_pieces_against_a_copy_of_slices(
    data: st.DataObject, version: int, is_batch: bool, deferred: bool
) -> None:
    world = World(version, deferred, num_bytes=256)
    gaps_and_sizes = data.draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=8)
    )
    ends = np.cumsum(np.array(gaps_and_sizes, np.int64).reshape(-1, 2).sum(1)).tolist()
    rows = [
        (data.draw(st.integers(0, 256 - size)), end - size, size)
        for end, (_, size) in zip(ends, gaps_and_sizes, strict=True)
    ]
    rows = data.draw(st.permutations(rows))
    pieces = world.pieces(*rows)
    if is_batch:
        world.driver.copy_batch(pieces, STREAM, "d2h")
    else:
        world.driver.copy_each(pieces, STREAM)
    if deferred:
        world.check()  # nothing yet
        world.source += 1  # read when the stream comes to it
        assert world.fake.run(STREAM) == len(rows)
    world.expect(*rows)
    world.check()


def test_queued_copies_wait_for_their_own_stream() -> None:
    world = World(deferred=True)
    world.driver.copy_batch(world.pieces((0, 0, 8)), 16, "h2d")
    world.driver.copy_each(world.pieces((8, 64, 8)), 32)
    assert world.fake.run(32) == 1
    world.expect((8, 64, 8))
    world.check()
    assert world.fake.run() == 1
    world.expect((0, 0, 8))
    world.check()


# Refusals, before anything is called


@BOTH_FORMS
@pytest.mark.parametrize("stream", [0, 1])
def test_the_legacy_default_stream_is_refused(
    version: int, name: str, form: int, stream: int
) -> None:
    world = World(version)
    with pytest.raises(ValueError, match=f"legacy default stream, got handle {stream}"):
        world.driver.copy_batch(world.pieces(*ROWS), stream, "h2d")
    assert not world.fake.calls
    world.check()


@BOTH_FORMS
@pytest.mark.parametrize("status", [1, 2], ids=["active", "invalidated"])
def test_a_captured_stream_is_refused(version: int, name: str, form: int, status: int) -> None:
    world = World(version)
    world.fake.capturing[STREAM] = status
    assert world.driver.is_capturing(STREAM)
    assert not world.driver.is_capturing(STREAM + 16)
    with pytest.raises(RuntimeError, match="cannot be captured") as caught:
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, "h2d")
    assert not isinstance(caught.value, CopyEngineError)
    assert not world.fake.batches()
    world.check()
    world.driver.copy_each(world.pieces(*ROWS), STREAM)
    world.expect(*ROWS)
    world.check()


def test_an_older_driver_has_no_batch() -> None:
    world = World(12060)
    assert (world.driver.has_batch, world.driver.batch_form) == (False, None)
    with pytest.raises(RuntimeError, match=r"came with CUDA 12\.8: it supports CUDA 12\.6"):
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, "h2d")
    assert not world.fake.calls
    world.driver.copy_each(world.pieces(*ROWS), STREAM)
    world.expect(*ROWS)
    world.check()


@pytest.mark.parametrize(
    ("version", "hidden", "form"),
    [
        (13000, (), 8),
        (13020, (), 8),
        (13000, ("cuMemcpyBatchAsync_v2",), 9),
        (13000, ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"), None),
        (12080, (), 9),
        (12090, (), 9),
        (12080, ("cuMemcpyBatchAsync",), None),
        (12070, (), None),
    ],
)
def test_the_form_follows_version_and_symbols(
    version: int, hidden: tuple[str, ...], form: int | None
) -> None:
    fake = FakeDriver(13010)
    fake.version = version  # all symbols, whatever the version
    for name in hidden:
        delattr(fake, name)
    found = Driver(fake)
    assert (found.version, found.batch_form) == (version, form)
    assert found.has_batch == (form is not None)


def test_an_unknown_direction_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"one of .*'h2d'.* got 'up'"):
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, "up")  # type: ignore[arg-type]
    assert not world.fake.calls


def test_arrays_of_different_lengths_are_refused(world: World) -> None:
    pieces = world.pieces(*ROWS)
    for wrong in (
        Pieces(pieces.sources[:2], pieces.targets, pieces.sizes),
        Pieces(pieces.sources, pieces.targets[:2], 64),
        Pieces(pieces.sources, pieces.targets, pieces.size_array()[:2]),
    ):
        with pytest.raises(ValueError, match=r"got \d sources, \d targets and \d sizes"):
            world.driver.copy_batch(wrong, STREAM, "h2d")
        with pytest.raises(ValueError, match=r"got \d sources, \d targets and \d sizes"):
            world.driver.copy_each(wrong, STREAM)
    assert not world.fake.calls


def test_a_library_without_the_driver_is_refused() -> None:
    fake = FakeDriver()
    del fake.cuMemcpyAsync  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="cuMemcpyAsync"):
        Driver(fake)


def test_a_machine_without_a_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(RuntimeError, match=r"no CUDA driver.*libcuda\.so\.1: cannot open"):
        Driver.load()


def test_the_process_has_one_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Driver] = []

    def load() -> Driver:
        loads.append(Driver(FakeDriver()))
        if len(loads) == 1:
            raise RuntimeError("not yet")
        return loads[-1]

    monkeypatch.setattr(Driver, "load", load)
    driver.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="not yet"):
            driver()
        assert driver() is driver() is loads[1]
        assert len(loads) == 2
    finally:
        driver.cache_clear()


# Faults


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("piece", [0, 2])
def test_a_batch_of_nine_arguments_names_the_piece(done: int, piece: int) -> None:
    world = World(12080)
    pieces = world.pieces(*ROWS)
    world.fake.fail("cuMemcpyBatchAsync", 1, fake_driver.INVALID_VALUE, piece, after=done)
    world.driver.copy_batch(world.pieces((9, 4000, 9)), STREAM, "h2d")
    with pytest.raises(CopyEngineError) as caught:
        world.driver.copy_batch(pieces, STREAM, "h2d")
    error = caught.value
    assert (error.call, error.code, error.name, error.piece) == (
        "cuMemcpyBatchAsync",
        1,
        "CUDA_ERROR_INVALID_VALUE",
        piece,
    )
    assert str(error) == (
        "cuMemcpyBatchAsync: CUDA_ERROR_INVALID_VALUE (1): invalid argument; "
        f"piece {piece} of 3: {ROWS[piece][2]} bytes from {pieces.sources[piece]:#x} to "
        f"{pieces.targets[piece]:#x}, on stream {STREAM:#x}"
    )
    # What was done before stays done, and the next call works.
    world.expect((9, 4000, 9), *ROWS[:done])
    world.check()
    world.driver.copy_batch(pieces, STREAM, "h2d")
    world.expect(*ROWS)
    world.check()


@pytest.mark.parametrize(
    ("version", "name", "fail_index"),
    [
        (12080, "cuMemcpyBatchAsync", None),  # SIZE_MAX
        (12080, "cuMemcpyBatchAsync", 3),  # behind the last piece
        (13000, "cuMemcpyBatchAsync_v2", 1),  # cannot arrive
    ],
)
def test_a_batch_may_name_no_piece(version: int, name: str, fail_index: int | None) -> None:
    world = World(version)
    world.fake.fail(name, 0, fake_driver.ILLEGAL_ADDRESS, fail_index, after=2)
    with pytest.raises(CopyEngineError, match="the driver does not say which") as caught:
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, "h2d")
    error = caught.value
    assert (error.call, error.code, error.name, error.piece) == (
        name,
        700,
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        None,
    )
    assert "Pieces(3 x 16 to 333 bytes, 413 bytes)" in str(error)
    assert f"{STREAM:#x}" in str(error)
    world.expect(*ROWS[:2])
    world.check()


def test_copy_each_stops_at_the_piece_that_fails(world: World) -> None:
    world.fake.fail("cuMemcpyAsync", 1, fake_driver.OUT_OF_MEMORY)
    with pytest.raises(CopyEngineError, match="piece 1 of 3: 16 bytes from 0x") as caught:
        world.driver.copy_each(world.pieces(*ROWS), STREAM)
    error = caught.value
    assert (error.call, error.code, error.name, error.piece) == (
        "cuMemcpyAsync",
        2,
        "CUDA_ERROR_OUT_OF_MEMORY",
        1,
    )
    assert len(world.fake.copies()) == 2
    world.expect(ROWS[0])
    world.check()


def test_copy_each_of_one_size_names_the_piece(world: World) -> None:
    pieces = world.pieces(*ROWS)
    world.fake.fail("cuMemcpyAsync", 2, fake_driver.INVALID_VALUE)
    with pytest.raises(CopyEngineError, match="piece 2 of 3: 12 bytes from"):
        world.driver.copy_each(Pieces(pieces.sources, pieces.targets, 12), STREAM)


def test_a_piece_across_two_registrations_is_refused_by_the_driver() -> None:
    world = World(12080)
    start = world.source.ctypes.data
    world.fake.register(start, 1000)
    world.fake.register(start + 1000, 3096)
    with pytest.raises(CopyEngineError) as caught:
        world.driver.copy_batch(
            world.pieces((0, 0, 1000), (1000, 2000, 8), (999, 3000, 2)), 16, "h2d"
        )
    assert caught.value.piece == 2
    world.check()


@pytest.mark.parametrize(
    ("call", "use"),
    [
        ("cuStreamIsCapturing", lambda d: d.is_capturing(STREAM)),
        ("cuPointerGetAttributes", lambda d: d.locate(4096)),
        ("cuPointerGetAttributes", lambda d: pinned_ranges(d, 4096, 8192)),
    ],
)
def test_a_query_that_fails_is_named(
    world: World, call: str, use: Callable[[Driver], object]
) -> None:
    world.fake.fail(call, 0, fake_driver.INVALID_CONTEXT)
    with pytest.raises(CopyEngineError) as caught:
        use(world.driver)
    error = caught.value
    assert (error.call, error.code, error.piece) == (call, 201, None)
    assert str(error).startswith(f"{call}: CUDA_ERROR_INVALID_CONTEXT (201): invalid device")
    use(world.driver)


def test_nothing_is_copied_where_the_capture_query_fails(world: World) -> None:
    world.fake.fail("cuStreamIsCapturing", 0, fake_driver.INVALID_CONTEXT)
    with pytest.raises(CopyEngineError, match="cuStreamIsCapturing"):
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, "h2d")
    assert not world.fake.batches()


def test_a_driver_without_a_version_is_refused() -> None:
    fake = FakeDriver()
    fake.fail("cuDriverGetVersion", 0, 34)
    with pytest.raises(CopyEngineError, match=r"^cuDriverGetVersion: an unknown CUDA error \(34\)"):
        Driver(fake)


def test_an_error_survives_pickling() -> None:
    error = CopyEngineError("cuMemcpyAsync", 1, "CUDA_ERROR_INVALID_VALUE", "piece 4 of 9", 4)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert vars(again) == vars(error)


# Cost and lifetime


@pytest.mark.parametrize("fails", [False, True], ids=["done", "refused"])
@pytest.mark.parametrize("is_batch", [False, True], ids=["each", "batch"])
def test_arrays_are_not_kept(world: World, is_batch: bool, fails: bool) -> None:
    pieces = world.pieces(*ROWS)
    arrays = [weakref.ref(array) for array in (pieces.sources, pieces.targets, pieces.size_array())]
    if fails:
        world.fake.fail("cuMemcpyBatchAsync_v2", 0, 1)
        world.fake.fail("cuMemcpyAsync", 0, 1)
    gc.disable()
    try:
        try:
            if is_batch:
                world.driver.copy_batch(pieces, STREAM, "h2d")
            else:
                world.driver.copy_each(pieces, STREAM)
        except CopyEngineError:
            assert fails
        else:
            assert not fails
        del pieces
        assert [array() for array in arrays] == [None] * 3
    finally:
        gc.enable()


def many_pieces(count: int, is_uniform: bool) -> Pieces:
    addresses = np.arange(1, count + 1, dtype=np.int64) * 4096
    return Pieces(addresses, addresses + 64, 64 if is_uniform else np.full(count, 64))


@pytest.fixture(params=[12080, 13000], ids=["12.8", "13"])
def idle_driver(request: pytest.FixtureRequest) -> Driver:
    """One whose batches return at once, and copy nothing."""
    fake = FakeDriver(request.param)
    for name in ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"):
        if hasattr(fake, name):
            setattr(fake, name, fake.as_function(name, lambda *arguments: 0))
    return Driver(fake)


@pytest.mark.parametrize("is_uniform", [False, True])
def test_python_makes_as_many_calls_for_few_as_for_many(
    idle_driver: Driver, is_uniform: bool
) -> None:
    def calls_for(count: int) -> list[tuple[str, str]]:
        pieces = many_pieces(count, is_uniform)
        seen: list[tuple[str, str]] = []

        def profile(frame: object, event: str, argument: object) -> None:
            seen.append((event, str(getattr(argument, "__qualname__", ""))))

        sys.setprofile(profile)
        try:
            idle_driver.copy_batch(pieces, STREAM, "h2d")
        finally:
            sys.setprofile(None)
        return seen

    calls_for(2)
    few = calls_for(3)
    assert 10 < len(few) < 200
    assert calls_for(30_000) == few


@pytest.mark.parametrize("is_uniform", [False, True])
def test_memory_is_that_of_the_sizes_written_out(idle_driver: Driver, is_uniform: bool) -> None:
    count = 30_000
    pieces = many_pieces(count, is_uniform)
    idle_driver.copy_batch(pieces, STREAM, "h2d")
    tracemalloc.start()
    try:
        idle_driver.copy_batch(pieces, STREAM, "h2d")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < (8 * count if is_uniform else 0) + 16_384


def test_threads_share_a_driver() -> None:
    world = World(num_bytes=8 * 4096)
    rows = [
        [(4096 * at + 64 * row, 4096 * at + 64 * row, 48) for row in range(64)] for at in range(8)
    ]

    def copy(at: int) -> None:
        for _ in range(20):
            world.driver.copy_batch(world.pieces(*rows[at]), 16 + at, "h2d")

    threads = [threading.Thread(target=copy, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for some in rows:
        world.expect(*some)
    world.check()
    assert len(world.fake.batches()) == 160


# Memory


def test_adjacent_registrations_are_two_ranges(world: World) -> None:
    world.fake.register(4096, 4096)
    world.fake.register(8192, 12288)
    assert pinned_ranges(world.driver, 5000, 20480).tolist() == [[4096, 8192], [8192, 20480]]
    assert pinned_ranges(world.driver, 8191, 8193).tolist() == [[4096, 8192], [8192, 20480]]
    assert pinned_ranges(world.driver, 4096, 8192).tolist() == [[4096, 8192]]
    # One query a registration, however long it is.
    assert len(world.fake.calls) == 5


def test_a_gap_ends_the_ranges(world: World) -> None:
    world.fake.register(4096, 4096)
    world.fake.register(12288, 4096)
    assert pinned_ranges(world.driver, 4096, 16384).tolist() == [[4096, 8192]]
    world.fake.unregister(4096)
    none = pinned_ranges(world.driver, 4096, 16384)
    assert none.shape == (0, 2)
    assert none.dtype == np.int64


@pytest.mark.parametrize(
    ("kind", "device_address"), [("device", None), ("managed", None), ("pinned", 0x2_04C0_0000)]
)
def test_other_memory_ends_the_ranges(world: World, kind: str, device_address: int | None) -> None:
    world.fake.register(4096, 4096)
    world.fake.register(8192, 4096, kind, device_address=device_address)
    assert pinned_ranges(world.driver, 4096, 12288).tolist() == [[4096, 8192]]


def test_a_range_without_the_address_ends_the_ranges(world: World) -> None:
    """Else the walk would stand still."""
    kinds = {2: (ctypes.c_uint, 1), 3: (ctypes.c_uint64, 4096)}

    def odd(count: int, attributes: int, out: int, address: int) -> int:
        names = (ctypes.c_int * count).from_address(attributes)
        for name, place in zip(names, (ctypes.c_size_t * count).from_address(out), strict=True):
            kind, value = kinds.get(name, (ctypes.c_uint, 0))
            kind.from_address(place).value = value
        return 0

    name = "cuPointerGetAttributes"
    setattr(world.fake, name, world.fake.as_function(name, odd))
    found = Driver(world.fake)
    assert found.locate(4096) == Location("pinned", 0, 0, 0)
    assert pinned_ranges(found, 4096, 8192).shape == (0, 2)


def test_locate_tells_what_memory_is(world: World) -> None:
    high = 0x7F00_0000_0000
    world.fake.register(high, 1 << 40, "device", device=3)
    world.fake.register(4096, 4096)
    world.fake.register(8192, 4096, "managed", device=1)
    world.fake.register(12288, 4096, device_address=0x2_04C0_0000)
    locate = world.driver.locate
    assert locate(high + (1 << 39)) == Location("device", 3, high, high + (1 << 40))
    assert locate(4096) == locate(8191) == Location("pinned", 0, 4096, 8192)
    assert locate(8192) == Location("managed", 1, 8192, 12288)
    assert locate(13000) == Location("aliased", 0, 12288, 16384)
    assert locate(16384) is None
    assert locate(4095) is None
    assert not world.fake.broken


# Layouts

HEADER = Path(triton.__file__).parent / "backends/nvidia/include/cuda.h" if triton else Path()
needs_header = pytest.mark.skipif(
    not (triton and HEADER.is_file()), reason="needs the CUDA header that comes with Triton"
)
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

# What the module holds true of the header: C expressions and their values.
FACTS = {
    "sizeof(CUmemLocation)": ctypes.sizeof(copy_engine.MemLocation),
    "offsetof(CUmemLocation, type)": copy_engine.MemLocation.type.offset,
    "offsetof(CUmemLocation, id)": copy_engine.MemLocation.id.offset,
    "sizeof(CUmemcpyAttributes)": ctypes.sizeof(copy_engine.MemcpyAttributes),
    "offsetof(CUmemcpyAttributes, srcAccessOrder)": (
        copy_engine.MemcpyAttributes.src_access_order.offset
    ),
    "offsetof(CUmemcpyAttributes, srcLocHint)": copy_engine.MemcpyAttributes.src_loc_hint.offset,
    "offsetof(CUmemcpyAttributes, dstLocHint)": copy_engine.MemcpyAttributes.dst_loc_hint.offset,
    "offsetof(CUmemcpyAttributes, flags)": copy_engine.MemcpyAttributes.flags.offset,
    "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": copy_engine.SRC_ACCESS_ORDER_STREAM,
    "CU_MEMCPY_FLAG_DEFAULT": copy_engine.FLAG_DEFAULT,
    "CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE": copy_engine.FLAG_PREFER_OVERLAP_WITH_COMPUTE,
    "CU_MEM_LOCATION_TYPE_INVALID": 0,
    "CU_MEMORYTYPE_HOST": copy_engine.MEMORY_TYPE_HOST,
    "CU_MEMORYTYPE_DEVICE": copy_engine.MEMORY_TYPE_DEVICE,
    "CU_POINTER_ATTRIBUTE_MEMORY_TYPE": copy_engine.POINTER_ATTRIBUTES["memory_type"],
    "CU_POINTER_ATTRIBUTE_IS_MANAGED": copy_engine.POINTER_ATTRIBUTES["is_managed"],
    "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": copy_engine.POINTER_ATTRIBUTES["device"],
    "CU_POINTER_ATTRIBUTE_DEVICE_POINTER": copy_engine.POINTER_ATTRIBUTES["device_pointer"],
    "CU_POINTER_ATTRIBUTE_RANGE_START_ADDR": copy_engine.POINTER_ATTRIBUTES["range_start"],
    "CU_POINTER_ATTRIBUTE_RANGE_SIZE": copy_engine.POINTER_ATTRIBUTES["range_bytes"],
    "CU_STREAM_CAPTURE_STATUS_NONE": 0,
    "CUDA_SUCCESS": 0,
    "sizeof(CUresult)": ctypes.sizeof(ctypes.c_int),
    "sizeof(CUstreamCaptureStatus)": ctypes.sizeof(ctypes.c_int),
    "sizeof(CUpointer_attribute)": ctypes.sizeof(ctypes.c_int),
}

# The same written out, for machines that have neither header nor compiler.
KNOWN = dict(
    zip(
        FACTS,
        [8, 0, 4, 24, 0, 4, 12, 20, 1, 0, 1, 0, 1, 2, 2, 8, 9, 3, 11, 12, 0, 0, 4, 4, 4],
        strict=True,
    )
)

# The arguments of each function in C, for CUDA 12.8 and for 13.
C_ARGUMENTS = {
    "cuDriverGetVersion": "int *",
    "cuGetErrorName": "CUresult, const char **",
    "cuGetErrorString": "CUresult, const char **",
    "cuMemcpyAsync": "CUdeviceptr, CUdeviceptr, size_t, CUstream",
    "cuMemcpyBatchAsync": (
        "CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t, "
        "size_t *, CUstream"
    ),
    "cuMemcpyBatchAsync_v2": (
        "CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t, "
        "CUstream"
    ),
    "cuPointerGetAttributes": "unsigned int, CUpointer_attribute *, void **, CUdeviceptr",
    "cuStreamIsCapturing": "CUstream, CUstreamCaptureStatus *",
}

CTYPES_OF_C = {
    "CUresult": ctypes.c_int,
    "CUdeviceptr": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "unsigned int": ctypes.c_uint,
    "CUstream": ctypes.c_void_p,
}


def test_the_layout_is_the_known_one() -> None:
    assert FACTS == KNOWN


def test_prototypes_are_those_of_the_driver() -> None:
    assert set(copy_engine.PROTOTYPES) == set(C_ARGUMENTS) == set(fake_driver.PROTOTYPES)
    for name, arguments in C_ARGUMENTS.items():
        expected = tuple(
            ctypes.c_void_p if argument.endswith("*") else CTYPES_OF_C[argument]
            for argument in arguments.split(", ")
        )
        assert copy_engine.PROTOTYPES[name] == expected, name
        assert fake_driver.PROTOTYPES[name] == expected, name


@needs_header
def test_the_header_says_the_same() -> None:
    text = HEADER.read_text()

    def fields(struct_name: str) -> list[str]:
        body = re.search(rf"typedef struct {struct_name} \{{(.*?)\}}", text, re.DOTALL)
        assert body is not None, struct_name
        return re.findall(r"^\s*([\w ]+?\s+\w+);", body[1], re.MULTILINE)

    assert [" ".join(field.split()) for field in fields("CUmemLocation_st")] == [
        "CUmemLocationType type",
        "int id",
    ]
    assert [" ".join(field.split()) for field in fields("CUmemcpyAttributes_st")] == [
        "CUmemcpySrcAccessOrder srcAccessOrder",
        "CUmemLocation srcLocHint",
        "CUmemLocation dstLocHint",
        "unsigned int flags",
    ]
    for name, value in KNOWN.items():
        if name.startswith("CU"):
            found = re.search(rf"^\s*{name}\s*=\s*(\w+)", text, re.MULTILINE)
            assert found is not None, name
            assert int(found[1], 0) == value, name
    for name, arguments in C_ARGUMENTS.items():
        declared = [
            ", ".join(
                # Without the argument's own name.
                re.sub(r"\s*\w+$", "", argument.strip()).replace("**", " **").replace("*", "*")
                for argument in found.split(",")
            )
            for found in re.findall(rf"CUDAAPI {name}\(([^)]*)\)", text)
        ]
        plain = [re.sub(r"\s+", " ", one).replace("* *", "**") for one in declared]
        assert arguments in plain, (name, plain)
    assert re.search(r"CU_STREAM_LEGACY\s+\(\(CUstream\)0x1\)", text)
    assert re.search(r"CU_STREAM_PER_THREAD\s+\(\(CUstream\)0x2\)", text)


@needs_header
@needs_compiler
def test_a_compiler_says_the_same(tmp_path: Path) -> None:
    lines = [f'  printf("%llu\\n", (unsigned long long)({name}));' for name in FACTS]
    source = ["#include <cuda.h>", "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    (tmp_path / "facts.c").write_text("\n".join([*source, *lines, "  return 0;", "}", ""]))
    command = [str(COMPILER), f"-I{HEADER.parent}", "-Wall", "-Werror"]
    program = tmp_path / "facts"
    subprocess.run([*command, str(tmp_path / "facts.c"), "-o", str(program)], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(FACTS, map(int, printed), strict=True)) == FACTS


@needs_header
@needs_compiler
def test_a_compiler_takes_the_functions_for_what_they_are_called_as(tmp_path: Path) -> None:
    """Of both versions: the header declares all symbols that a library may have."""
    lines = ["#define __CUDA_API_VERSION_INTERNAL", "#include <cuda.h>"]
    lines += [
        f"CUresult (*const pointer_{name})({arguments}) = {name};"
        for name, arguments in C_ARGUMENTS.items()
    ]
    source = tmp_path / "prototypes.c"
    source.write_text("\n".join([*lines, ""]))
    command = [str(COMPILER), f"-I{HEADER.parent}", "-Wall", "-Werror", "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "prototypes.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# A real driver

gpu = pytest.mark.gpu
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
    names = [name for name in copy_engine.PROTOTYPES if name != "cuMemcpyBatchAsync_v2"]
    return Driver(SimpleNamespace(**{n: getattr(library, n) for n in names if hasattr(library, n)}))


def place(buffer: torch.Tensor, on_device: bool) -> torch.Tensor:
    return buffer.cuda() if on_device else buffer.pin_memory()


@gpu
@needs_device
@pytest.mark.parametrize("form", [None, 9], ids=["own", "nine"])
@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_a_thousand_pieces_on_a_device(
    side_stream: torch.cuda.Stream, direction: Direction, is_uniform: bool, form: int | None
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
            real.copy_batch(pieces, side_stream.cuda_stream, direction)
        else:
            real.copy_each(pieces, side_stream.cuda_stream)
        side_stream.synchronize()
        assert torch.equal(there.cpu(), expected), copy


@gpu
@needs_device
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
        real.copy_batch(pieces, side_stream.cuda_stream, "d2h")
        side_stream.synchronize()
        assert (target == value).all()


@gpu
@needs_device
def test_a_real_driver_refuses_a_piece_of_no_bytes(side_stream: torch.cuda.Stream) -> None:
    real = device_driver(9)
    if not real.has_batch:
        pytest.skip(f"the driver supports CUDA {real.version}: no batched copy")
    buffer = torch.zeros(4096, dtype=torch.uint8, device="cuda")
    addresses = np.arange(4) * 64 + buffer.data_ptr()
    pieces = Pieces(addresses, addresses + 1024, np.array([64, 64, 0, 64]))
    with pytest.raises(CopyEngineError, match="CUDA_ERROR_INVALID_VALUE") as caught:
        real.copy_batch(pieces, side_stream.cuda_stream, "d2d")
    assert caught.value.piece in (2, None)
    # Nothing is left behind that a launch would report.
    assert int(buffer.sum()) == 0


@gpu
@needs_device
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
        real.copy_batch(pieces, torch.cuda.default_stream().cuda_stream, "d2d")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side_stream):
        assert real.is_capturing(side_stream.cuda_stream)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            real.copy_batch(pieces, side_stream.cuda_stream, "d2d")
        real.copy_each(pieces, side_stream.cuda_stream)
    assert not real.is_capturing(side_stream.cuda_stream)
    buffer[1024:1536] = POISON
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(buffer[1024:1536], buffer[:512])


@gpu
@needs_device
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


@gpu
@needs_device
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
