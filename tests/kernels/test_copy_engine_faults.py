"""A driver that refuses: which call, which piece, and what was copied before."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import fake_driver
import pytest
from driver_worlds import ROWS, STREAM, World, pinned_ranges
from fake_driver import FakeDriver

from kvheap.kernels.copy_engine import CopyEngineError, Driver
from kvheap.kernels.pieces import Pieces


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("piece", [0, 2])
def test_a_batch_of_nine_arguments_names_the_piece(done: int, piece: int) -> None:
    world = World(12080)
    pieces = world.pieces(*ROWS)
    world.fake.fail("cuMemcpyBatchAsync", 1, fake_driver.INVALID_VALUE, piece, after=done)
    world.driver.copy_batch(world.pieces((9, 4000, 9)), STREAM, over_link=True)
    with pytest.raises(CopyEngineError) as caught:
        world.driver.copy_batch(pieces, STREAM, over_link=True)
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
    world.driver.copy_batch(pieces, STREAM, over_link=True)
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
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, over_link=True)
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
            world.pieces((0, 0, 1000), (1000, 2000, 8), (999, 3000, 2)), 16, over_link=True
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
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, over_link=True)
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
