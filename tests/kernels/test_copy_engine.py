"""The driver's copies: bytes on the boundary, what is refused, what a call costs.

The calls go to C functions that stand in for libcuda (``fake_driver``).
"""

from __future__ import annotations

import ctypes
import gc
import struct
import sys
import threading
import tracemalloc
import weakref

import fake_driver
import numpy as np
import pytest
from driver_worlds import BOTH_FORMS, POISON, ROWS, STREAM, World
from fake_driver import CopyCall, FakeDriver, OtherCall
from hypothesis import given
from hypothesis import strategies as st

from kvheap.kernels.copy_engine import CopyEngineError, Driver, driver
from kvheap.kernels.pieces import Pieces


@pytest.fixture
def world() -> World:
    return World()


@BOTH_FORMS
@pytest.mark.parametrize("over_link", [True, False])
def test_every_argument_of_a_batch_arrives(
    version: int, name: str, form: int, over_link: bool
) -> None:
    world = World(version)
    assert (world.driver.version, world.driver.batch_form) == (version, form)
    pieces = world.pieces(*ROWS)
    world.driver.copy_batch(pieces, STREAM, over_link=over_link)
    capture_query, call = world.fake.calls
    assert capture_query == OtherCall("cuStreamIsCapturing", (STREAM,))
    assert isinstance(call, fake_driver.BatchCall)
    assert call.name == name
    assert call.dsts == struct.pack("<3Q", *pieces.targets.tolist())
    assert call.srcs == struct.pack("<3Q", *pieces.sources.tolist())
    assert call.sizes == struct.pack("<3Q", 64, 16, 333)
    assert call.count == 3
    # Access order of the stream; both location hints invalid; flags.
    assert call.attributes == struct.pack("<iiiiiI", 1, 0, 0, 0, 0, int(over_link))
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
    world.driver.copy_batch(Pieces(pieces.sources, pieces.targets, 48), STREAM, over_link=True)
    (call,) = world.fake.batches()
    assert call.sizes == struct.pack("<10Q", *[48] * 10)
    assert call.count == 10
    world.expect(*rows)
    world.check()


@BOTH_FORMS
def test_a_single_piece_is_a_batch_of_one(version: int, name: str, form: int) -> None:
    world = World(version)
    world.driver.copy_batch(world.pieces((8, 16, 4000)), STREAM, over_link=True)
    (call,) = world.fake.batches()
    assert (call.count, call.num_attributes) == (1, 1)
    world.expect((8, 16, 4000))
    world.check()


def test_no_pieces_no_call(world: World) -> None:
    world.driver.copy_batch(world.pieces(), STREAM, over_link=True)
    world.driver.copy_each(world.pieces(), STREAM)
    assert not world.fake.calls


def test_the_per_thread_default_stream_is_a_stream(world: World) -> None:
    world.driver.copy_batch(world.pieces(*ROWS), 2, over_link=True)
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
        world.driver.copy_batch(pieces, STREAM, over_link=True)
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
        world.driver.copy_batch(pieces, STREAM, over_link=True)
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
    world.driver.copy_batch(world.pieces((0, 0, 8)), 16, over_link=True)
    world.driver.copy_each(world.pieces((8, 64, 8)), 32)
    assert world.fake.run(32) == 1
    world.expect((8, 64, 8))
    world.check()
    assert world.fake.run() == 1
    world.expect((0, 0, 8))
    world.check()


@BOTH_FORMS
@pytest.mark.parametrize("stream", [0, 1])
def test_the_legacy_default_stream_is_refused(
    version: int, name: str, form: int, stream: int
) -> None:
    world = World(version)
    with pytest.raises(ValueError, match=f"legacy default stream, got handle {stream}"):
        world.driver.copy_batch(world.pieces(*ROWS), stream, over_link=True)
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
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, over_link=True)
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
        world.driver.copy_batch(world.pieces(*ROWS), STREAM, over_link=True)
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


def test_arrays_of_different_lengths_are_refused(world: World) -> None:
    pieces = world.pieces(*ROWS)
    for wrong in (
        Pieces(pieces.sources[:2], pieces.targets, pieces.sizes),
        Pieces(pieces.sources, pieces.targets[:2], 64),
        Pieces(pieces.sources, pieces.targets, pieces.size_array()[:2]),
    ):
        with pytest.raises(ValueError, match=r"got \d sources, \d targets and \d sizes"):
            world.driver.copy_batch(wrong, STREAM, over_link=True)
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
                world.driver.copy_batch(pieces, STREAM, over_link=True)
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

        gc.collect()
        gc.disable()  # finalizers of other tests are no calls of the copy
        sys.setprofile(profile)
        try:
            idle_driver.copy_batch(pieces, STREAM, over_link=True)
        finally:
            sys.setprofile(None)
            gc.enable()
        return seen

    calls_for(2)
    few = calls_for(3)
    assert 10 < len(few) < 200
    assert calls_for(30_000) == few


@pytest.mark.parametrize("is_uniform", [False, True])
def test_memory_is_that_of_the_sizes_written_out(idle_driver: Driver, is_uniform: bool) -> None:
    count = 30_000
    pieces = many_pieces(count, is_uniform)
    idle_driver.copy_batch(pieces, STREAM, over_link=True)
    tracemalloc.start()
    try:
        idle_driver.copy_batch(pieces, STREAM, over_link=True)
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
            world.driver.copy_batch(world.pieces(*rows[at]), 16 + at, over_link=True)

    threads = [threading.Thread(target=copy, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for some in rows:
        world.expect(*some)
    world.check()
    assert len(world.fake.batches()) == 160
