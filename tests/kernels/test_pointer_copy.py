"""Pointer copies against one memmove a piece: the interpreted kernel, and a GPU.

Every check compares every byte of the target's memory, so what lies between pieces and around
them must be as before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import T, interpreted, needs_gpu, needs_triton, on_a_gpu, sample

from kvheap import PagedKVCache
from kvheap.kernels import Chunks, load_tokens, pointer_copy, store_tokens
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import (
    MIN_TILES_PER_PROGRAM,
    PIECE_TILE,
    PROGRAMS_PER_SM,
    SMALL_PIECE_TILE,
    PointerCopy,
    copy_pieces,
)

POISON = 0xA5
CPU = torch.device("cpu")
NUM_SMS = 3
"""Multiprocessors of the interpreter's device."""


@dataclass(frozen=True)
class Path:
    """Which device copies, and which memories it copies between."""

    device: str
    source: str
    target: str

    def sample(self, values: Sequence[T], at: int, count: int) -> list[T]:
        """All values on a GPU; for the interpreted kernel, ``count`` of them, from index ``at``."""
        return sample(values, "interpreter" if self.device == "cpu" else "cuda", at, count)


PATHS = [
    pytest.param(Path("cpu", "cpu", "cpu"), marks=needs_triton, id="interpreter"),
    pytest.param(Path("cuda", "cuda", "cuda"), marks=needs_gpu, id="cuda"),
    pytest.param(Path("cuda", "pinned", "cuda"), marks=needs_gpu, id="host-to-cuda"),
    pytest.param(Path("cuda", "cuda", "pinned"), marks=needs_gpu, id="cuda-to-host"),
    pytest.param(Path("cuda", "pinned", "pinned"), marks=needs_gpu, id="host-to-host"),
]
ON_ALL_PATHS = pytest.mark.parametrize("path", PATHS)
BUDGETS = (1, 2, 8, None)
LARGE = [[200_003], [300_000], [200_000, 65, 48]]


@contextmanager
def running(path: Path) -> Iterator[torch.device]:
    """The device that copies; on the CPU, the kernel is interpreted."""
    if path.device == "cuda":
        yield torch.device("cuda")
        return
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointer_copy, "_num_sms", lambda _: NUM_SMS)
        yield CPU


def copy_pieces_reference(pieces: Pieces) -> None:
    """One memmove a piece, between memory of the host."""
    for source, target, size in zip(
        pieces.sources.tolist(), pieces.targets.tolist(), pieces.size_array().tolist(), strict=True
    ):
        ctypes.memmove(target, source, size)


def memory(data: np.ndarray, place: str) -> torch.Tensor:
    """The bytes in a memory of their own, which starts at a multiple of 16 bytes."""
    host = torch.from_numpy(data)
    tensor = {"cpu": host.clone, "cuda": host.cuda, "pinned": host.pin_memory}[place]()
    assert tensor.data_ptr() % 16 == 0
    return tensor


class World:
    """Random bytes to copy, poison to copy them to, and pieces at offsets in the two."""

    def __init__(
        self,
        path: Path,
        sources: Sequence[int] | np.ndarray,
        targets: Sequence[int] | np.ndarray,
        sizes: Sequence[int] | np.ndarray | int,
    ) -> None:
        self.sources, self.targets = np.array(sources, np.int64), np.array(targets, np.int64)
        self.sizes = sizes if isinstance(sizes, int) else np.array(sizes, np.int64)
        ends = [int((start + self.sizes).max(initial=0)) for start in (self.sources, self.targets)]
        self.path, self.source_bytes, self.target_bytes = path, ends[0] + 64, ends[1] + 64
        self.source = memory(self.random_bytes(0), path.source)
        self.target = memory(np.full(self.target_bytes, POISON, np.uint8), path.target)

    def random_bytes(self, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return generator.integers(0, 256, self.source_bytes, dtype=np.uint8)

    def pieces(self, source: int, target: int) -> Pieces:
        return Pieces.of(source + self.sources, target + self.targets, self.sizes)

    @property
    def real_pieces(self) -> Pieces:
        return self.pieces(self.source.data_ptr(), self.target.data_ptr())

    def renew(self, seed: int) -> None:
        """Other bytes in the source, poison in the target."""
        self.source.copy_(torch.from_numpy(self.random_bytes(seed)))
        self.target.fill_(POISON)

    def expected(self) -> np.ndarray:
        source = self.source.cpu().numpy()
        target = np.full(self.target_bytes, POISON, np.uint8)
        copy_pieces_reference(self.pieces(source.ctypes.data, target.ctypes.data))
        return target

    def require_copied(self) -> None:
        if self.path.device == "cuda":
            torch.cuda.synchronize()
        np.testing.assert_array_equal(self.target.cpu().numpy(), self.expected())

    def check(self, max_sms: int | None) -> PointerCopy:
        with running(self.path) as device:
            ready = PointerCopy.prepare(self.real_pieces, device)
            ready.run(max_sms)
            self.require_copied()
        assert ready.num_bytes == self.real_pieces.num_bytes
        assert ready.num_launches <= 5
        return ready


def laid_out(
    sizes: Sequence[int] | np.ndarray,
    residues: Sequence[int] | np.ndarray,
    order: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """Offsets of pieces one behind another, in this order, each with its residue modulo 32.

    >>> laid_out([8, 40], [1, 2], [1, 0]).tolist()
    [65, 2]
    """
    sizes, residues, order = (np.asarray(values, np.int64) for values in (sizes, residues, order))
    rooms = (sizes + residues + 31) // 32 * 32
    ends = np.cumsum(rooms[order])
    starts = np.empty_like(sizes)
    starts[order] = ends - rooms[order]
    return starts + residues


def scattered(
    path: Path, sizes: np.ndarray, source_residues: np.ndarray, target_residues: np.ndarray
) -> World:
    generator = np.random.default_rng(len(sizes))
    orders = [generator.permutation(len(sizes)) for _ in range(2)]
    return World(
        path,
        laid_out(sizes, source_residues, orders[0]),
        laid_out(sizes, target_residues, orders[1]),
        sizes,
    )


@ON_ALL_PATHS
def test_pieces_of_one_size_are_copied_and_nothing_else(path):
    for at, size in enumerate((1, 7, 12, 16, 24, 132, 576, 4096, 5000, 70_000)):
        step = -(-size // 16) * 16 + 16
        targets = np.random.default_rng(size).permutation(9) * step
        for max_sms in path.sample(BUDGETS, at, count=2):
            ready = World(path, np.arange(9)[::-1] * step, targets, size).check(max_sms)
            assert ready.num_launches == (2 if size % 8 and size > 64 else 1)


@ON_ALL_PATHS
@pytest.mark.parametrize("granule", [1, 4, 8, 16])
def test_pieces_of_many_sizes_are_copied_and_nothing_else(path, granule):
    generator = np.random.default_rng(granule)
    sizes = generator.integers(1, 5001 // granule, 60) * granule
    residues = [generator.integers(0, 18 // granule, 60) * granule for _ in range(2)]
    for max_sms in path.sample(BUDGETS, granule.bit_length(), count=2):
        ready = scattered(path, sizes, *residues).check(max_sms)
        assert (ready.num_launches == 1) == (granule >= 8)


@ON_ALL_PATHS
@pytest.mark.parametrize("size", [63, 64, 65, 200])
def test_every_pair_of_residues_is_copied_together(path, size):
    residues = np.indices((18, 18)).reshape(2, -1)
    ready = scattered(path, np.full(18 * 18, size), *residues).check(8)
    assert ready.num_launches == (1 if size < 64 else 5)


@ON_ALL_PATHS
def test_every_pair_of_residues_is_copied_alone(path):
    shifts = (0, 16, 8, 4, 2, 1, 12, 6, 3, 5, 7, 9, 10, 11, 13, 14, 15, 17)
    for source in range(18):
        for shift in path.sample(shifts, 3 * source, count=3):
            World(path, [source], [source + shift], [70 + source + shift]).check(1)


@ON_ALL_PATHS
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_a_piece_larger_than_a_tile_is_split_over_programs(path, sizes):
    pairs = [(0, 0), (8, 0), (4, 0), (2, 0), (1, 0), (3, 3), (7, 15)]
    for at, (source, target) in enumerate(pairs):
        residues = [np.full(len(sizes), residue) for residue in (source, target)]
        for max_sms in path.sample(BUDGETS, at + LARGE.index(sizes), count=1):
            scattered(path, np.array(sizes), *residues).check(max_sms)


@ON_ALL_PATHS
@pytest.mark.parametrize("max_sms", [1, None])
def test_many_tiny_pieces_take_one_launch(path, max_sms):
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 20, 5000)
    residues = generator.integers(0, 18, (2, 5000))
    assert scattered(path, sizes, *residues).check(max_sms).num_launches == 1


@ON_ALL_PATHS
def test_nothing_to_copy_launches_and_uploads_nothing(path, monkeypatch):
    monkeypatch.setattr(pointer_copy, "staging", lambda *_: pytest.fail("uploaded"))
    for sizes in ([], [0, 0], 0):
        offsets = [0, 32] if sizes != [] else []
        ready = World(path, offsets, offsets, sizes).check(None)
        assert (ready.num_launches, ready.descriptor_bytes, ready.num_bytes) == (0, 0, 0)


@ON_ALL_PATHS
def test_pieces_may_have_one_source_and_targets_that_touch(path):
    World(path, [5] * 40, np.arange(40) * 77, 77).check(2)
    World(path, [16] * 40, np.arange(40) * 48, 48).check(2)


@ON_ALL_PATHS
def test_a_copy_runs_again_with_what_is_there_then(path):
    generator = np.random.default_rng(0)
    world = scattered(path, generator.integers(1, 900, 30), *generator.integers(0, 18, (2, 30)))
    with running(path) as device:
        ready = PointerCopy.prepare(world.real_pieces, device)
        for seed, max_sms in enumerate((2, 2, None)):
            world.renew(seed)
            ready.run(max_sms)
            world.require_copied()


@ON_ALL_PATHS
def test_the_arrays_may_change_once_a_copy_is_prepared(path):
    world = World(path, [0, 512], [256, 0], 128)
    with running(path) as device:
        pieces = world.real_pieces
        ready = PointerCopy.prepare(pieces, device)
        pieces.sources[:] = pieces.targets[:] = 0
        ready.run(1)
        world.require_copied()


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Any, ...]:
    """Sizes, residues and orders of both sides: what a :class:`World` of any path is made of."""
    granule = draw(st.sampled_from([1, 2, 4, 8, 16]))
    count = draw(st.integers(1, 12))
    any_size = st.one_of(st.integers(1, 20), st.integers(1, 300), st.integers(1, 40_000 // granule))
    if draw(st.booleans()):
        sizes = [draw(any_size)] * count
    else:
        sizes = draw(st.lists(any_size, min_size=count, max_size=count))
    sides = [
        (
            np.array(draw(st.lists(st.integers(0, 17), min_size=count, max_size=count))) * granule,
            draw(st.permutations(range(count))),
        )
        for _ in range(2)
    ]
    return np.array(sizes) * granule, sides, draw(st.sampled_from([1, 2, 3, 8, None]))


@ON_ALL_PATHS
def test_any_pieces_are_copied_and_nothing_else(path):
    @settings(max_examples=60 if path.device == "cpu" else 150, deadline=None)
    @given(drawn=worlds())
    def look(drawn):
        sizes, ((source, source_order), (target, target_order)), max_sms = drawn
        starts = [laid_out(sizes, source, source_order), laid_out(sizes, target, target_order)]
        World(path, *starts, sizes).check(max_sms)

    look()


@on_a_gpu
@pytest.mark.parametrize("max_sms", [4, None])
@pytest.mark.parametrize("path", PATHS[1:])
def test_a_captured_copy_replays_with_other_bytes(path, max_sms):
    generator = np.random.default_rng(0)
    world = scattered(path, generator.integers(1, 9000, 99), *generator.integers(0, 18, (2, 99)))
    ready = PointerCopy.prepare(world.real_pieces, torch.device("cuda"))
    ready.run(max_sms)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ready.run(max_sms)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            PointerCopy.prepare(world.real_pieces, torch.device("cuda"))
    for seed in (7, 8):
        world.renew(seed)
        torch.cuda.synchronize()
        graph.replay()
        world.require_copied()


@on_a_gpu
def test_a_piece_beyond_two_to_the_31_bytes():
    for size in ((2 << 30) + 48, (2 << 30) + 49):
        source = torch.empty(size + 64, dtype=torch.uint8, device="cuda").random_(0, 256)
        target = torch.full_like(source, POISON)
        pieces = Pieces.of([source.data_ptr() + 1], [target.data_ptr() + 17], [size])
        copy_pieces(pieces, torch.device("cuda"))
        assert torch.equal(target[17 : 17 + size], source[1 : 1 + size])
        assert (target[:17] == POISON).all()
        assert (target[17 + size :] == POISON).all()


class Recorder:
    """Takes the kernel's place and keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, int]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(descriptors, num_rows, num_tiles, *_, **constants):
            self.launches.append((grid[0], num_tiles, constants["VECTORS"]))

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(pointer_copy, "_copy_pieces_kernel", found)
    monkeypatch.setattr(pointer_copy, "_num_sms", lambda _: NUM_SMS)
    return found


def imagined(sizes: Sequence[int] | np.ndarray | int, count: int = 1, granule: int = 16) -> Pieces:
    """Pieces of memory that is not there."""
    counts = np.arange(count if isinstance(sizes, int) else len(sizes))
    step = int(np.max(sizes, initial=0)) // 16 * 16 + 32
    return Pieces.of((1 << 40) + counts * step + granule, (1 << 50) + counts * step, sizes)


@needs_triton
@pytest.mark.parametrize("pieces", [imagined(4096, 1000), imagined(1 << 26), imagined(777, 99, 1)])
@pytest.mark.parametrize("max_sms", [1, 2, 8, 10_000, None])
def test_no_launch_has_more_programs_than_the_budget_or_than_tiles(recorder, pieces, max_sms):
    copy_pieces(pieces, CPU, max_sms)
    allowed = max_sms or NUM_SMS * PROGRAMS_PER_SM
    is_wide = pieces.alignment == 16
    for grid, num_tiles, vectors in recorder.launches:
        assert grid == min(allowed, num_tiles)
        assert vectors in (SMALL_PIECE_TILE.vectors, PIECE_TILE.vectors)
        if is_wide and vectors == PIECE_TILE.vectors:
            assert num_tiles >= MIN_TILES_PER_PROGRAM * grid


@needs_triton
def test_tiles_are_large_where_every_program_gets_some(recorder):
    ready = PointerCopy.prepare(imagined(1 << 20), CPU)
    for max_sms in (8, 9):
        ready.run(max_sms)
    assert recorder.launches == [(8, 16, PIECE_TILE.vectors), (9, 64, SMALL_PIECE_TILE.vectors)]


@pytest.mark.parametrize("max_sms", [0, -1])
@pytest.mark.parametrize("pieces", [imagined(64), imagined([])], ids=["one", "none"])
def test_a_budget_of_no_multiprocessor_is_refused(recorder, pieces, max_sms):
    with pytest.raises(ValueError, match=f"max_sms must be at least 1, got {max_sms}"):
        copy_pieces(pieces, CPU, max_sms)
    assert recorder.launches == []


@pytest.mark.parametrize("max_sms", [1.5, True, "2"])
def test_a_budget_that_is_no_number_is_refused(recorder, max_sms):
    cache = PagedKVCache.of("mla", [torch.zeros(2, 4, 8)])
    chunk = cache.chunk_layout(4).layout
    target = torch.zeros(128, dtype=torch.uint8)
    chunks = Chunks(target, np.array([target.data_ptr()]), 128, 16, chunk)
    for call in (
        lambda: copy_pieces(imagined(64), CPU, max_sms),
        lambda: store_tokens(cache, [0, 1, 2, 3], chunks, max_sms=max_sms),
        lambda: load_tokens(chunks, cache, [0, 1, 2, 3], max_sms=max_sms),
    ):
        with pytest.raises(TypeError, match="max_sms must be an integer, got "):
            call()
    assert recorder.launches == []


def test_all_launches_share_one_upload(monkeypatch):
    uploads = []
    staging = pointer_copy.staging

    def counted(num_words, device):
        uploads.append(8 * num_words)
        return staging(num_words, device)

    monkeypatch.setattr(pointer_copy, "staging", counted)
    # Three pieces of each width, of three sizes: descriptors of an odd length each.
    sources = (1 << 40) + 4096 * np.arange(15)
    targets = (1 << 50) + 4096 * np.arange(15) + np.repeat([16, 8, 4, 2, 1], 3)
    pieces = Pieces.of(sources, targets, np.tile([992, 1008, 1024], 5))
    prepared = PointerCopy.prepare(pieces, CPU)
    assert prepared.num_launches == 5
    assert uploads == [prepared.descriptor_bytes]
    assert all(launch.descriptors.data_ptr() % 16 == 0 for launch in prepared.launches)


def test_descriptors_that_are_not_aligned_are_refused(monkeypatch):
    def misplaced(num_words, device):
        return torch.empty(num_words + 1, dtype=torch.int64)[1:]

    monkeypatch.setattr(pointer_copy, "staging", misplaced)
    with pytest.raises(RuntimeError, match=r"must be at a multiple of 16 bytes, got address \d+"):
        PointerCopy.prepare(imagined(64), CPU)


def test_a_capture_refuses_to_prepare(monkeypatch):
    monkeypatch.setattr(pointer_copy, "current", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        PointerCopy.prepare(imagined(64), torch.device("cuda", 0))


def rows_of(launch: Any) -> Pieces:
    """The descriptors of a launch, read back."""
    columns = launch.descriptors.numpy()
    sources, targets, sizes = (columns[i * launch.num_rows :][: launch.num_rows] for i in range(3))
    return Pieces.of(sources, targets, launch.row_bytes if launch.is_uniform else sizes)


@settings(max_examples=200, deadline=None)
@given(drawn=worlds())
def test_rows_are_all_bytes_once_and_accesses_divide_them(drawn):
    sizes, ((source, source_order), (target, target_order)), _ = drawn
    sources = 4096 + laid_out(sizes, source, source_order)
    targets = 1 << 20 | laid_out(sizes, target, target_order)
    ready = PointerCopy.prepare(Pieces.of(sources, targets, sizes), CPU)
    rows = [rows_of(launch) for launch in ready.launches]
    for launch, part in zip(ready.launches, rows, strict=True):
        assert part.alignment % launch.alignment == 0
        assert (part.size_array() <= launch.row_bytes).all()
    pieces = Pieces.of(sources, targets, sizes)
    np.testing.assert_array_equal(bytes_of(Pieces.joined(rows)), bytes_of(pieces))


def bytes_of(pieces: Pieces) -> np.ndarray:
    """Source and target of every byte, ``[2, bytes]``, in order of the sources."""
    within = np.concatenate([np.arange(size) for size in pieces.size_array()])
    each = pieces.size_array()
    sources = np.repeat(pieces.sources, each) + within
    targets = np.repeat(pieces.targets, each) + within
    order = np.lexsort((targets, sources))
    return np.stack((sources[order], targets[order]))


@pytest.mark.parametrize(
    ("granule", "size", "access"), [(16, 4096, 16), (8, 4096, 8), (16, 4104, 8), (4, 4096, 4)]
)
def test_one_launch_has_the_widest_access_that_divides_everything(granule, size, access):
    ready = PointerCopy.prepare(imagined(size, 10, granule), CPU)
    assert [launch.alignment for launch in ready.launches] == [access]
    assert ready.descriptor_bytes == 2 * 8 * 10


def test_bodies_get_the_width_that_source_and_target_agree_on():
    sources = [(1 << 40) + 4096 * i + 3 for i in range(5)]
    targets = [(1 << 50) + 4096 * i + 3 + shift for i, shift in enumerate((16, 8, 4, 2, 1))]
    ready = PointerCopy.prepare(Pieces.of(sources, targets, 1000), CPU)
    assert [launch.alignment for launch in ready.launches] == [16, 8, 4, 2, 1]
    narrow = rows_of(ready.launches[-1])
    assert narrow.num_bytes == 1000 + (13 + 11) + (5 + 3) + (1 + 3) + (1 + 1)


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_pieces_of_one_size_given_as_an_array_are_found_to_be(count):
    pieces = imagined(np.full(count, 4096))
    assert PointerCopy.prepare(pieces, CPU).descriptor_bytes == 16 * count


@pytest.mark.parametrize("size", [(1 << 30) - 1, (1 << 30) + 1, (3 << 30) + 1])
def test_a_piece_of_more_accesses_than_a_row_may_have_is_cut_into_rows(size):
    ready = PointerCopy.prepare(imagined(size, granule=1), CPU)
    (launch,) = ready.launches
    assert launch.is_uniform == (size < 1 << 30)
    assert repr(rows_of(launch).merged()) == repr(Pieces.of([1], [1], size))


@pytest.mark.parametrize(
    "pieces",
    [imagined(1 << 50), imagined([1 << 50, 48]), imagined(1 << 50, 1, 1), imagined(1 << 34, 1024)],
)
def test_more_tiles_than_32_bits_count_are_refused(recorder, pieces):
    message = r"Pieces\(.*\) need \d+ rows and \d+ tiles, too many for one launch: split them"
    with pytest.raises(ValueError, match=message):
        copy_pieces(pieces, CPU)
    assert recorder.launches == []


@ON_ALL_PATHS
def test_a_warm_up_copies_nothing_and_changes_no_later_run(path):
    sizes = np.array([1, 5000, 70_000, 16, 333])
    world = scattered(path, sizes, np.arange(5), np.arange(5) * 3)
    with running(path) as device:
        ready = PointerCopy.prepare(world.real_pieces, device)
        ready.warm_up()
        if path.device == "cuda":
            torch.cuda.synchronize()
        assert world.target.eq(POISON).all()
        ready.run(2)
        world.require_copied()
