"""Even pieces against ``Pieces``, which takes more passes, and against a set of bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvheap.kernels.even_pieces import even_pieces
from kvheap.kernels.pieces import FIRST_LOOK, Pieces

SOURCE, TARGET = (1 << 20, 4096), (1 << 24, 4096)


def expected(sources: np.ndarray, targets: np.ndarray, size: int) -> Pieces | None:
    """By the general way; None where it raises, or a piece leaves its buffer."""
    for offsets, (_, num_bytes) in ((sources, SOURCE), (targets, TARGET)):
        if (offsets < 0).any() or (offsets > num_bytes - size).any():
            return None
    pieces = Pieces.of(sources + SOURCE[0], targets + TARGET[0], size)
    try:
        pieces.require_distinct_targets()
    except ValueError:
        return None
    return pieces.merged()


def bytes_of(starts: np.ndarray, size: int) -> list[int]:
    return [start + at for start in starts.tolist() for at in range(size)]


def require_equal(found: Pieces, wanted: Pieces) -> None:
    assert np.array_equal(found.sources, wanted.sources)
    assert np.array_equal(found.targets, wanted.targets)
    assert found.sources.dtype == found.targets.dtype == np.int64
    assert np.array_equal(found.size_array(), wanted.size_array())
    assert isinstance(found.sizes, int) == isinstance(wanted.sizes, int)


@given(st.data(), st.sampled_from([1, 3, 64, 192, 256, 4096]), st.sampled_from([1, 64, 256]))
def test_they_are_those_of_the_general_way(data: st.DataObject, size: int, unit: int) -> None:
    count = data.draw(st.integers(0, 40))
    sources, targets = (
        unit * np.array(data.draw(st.lists(st.integers(-1, 64), min_size=count, max_size=count)))
        for _ in range(2)
    )
    sources, targets = sources.astype(np.int64), targets.astype(np.int64)
    if data.draw(st.booleans()):
        targets = unit * data.draw(st.permutations(range(count)).map(np.array)).astype(np.int64)
    if data.draw(st.booleans()):
        targets = np.sort(targets)
    before = sources.copy(), targets.copy()
    found = even_pieces(sources, targets, size, SOURCE, TARGET)
    assert np.array_equal(sources, before[0])
    assert np.array_equal(targets, before[1])
    if found is None:
        return
    wanted = expected(sources, targets, size)
    assert wanted is not None
    require_equal(found, wanted)
    written = bytes_of(targets, size)
    assert len(set(written)) == len(written)


@pytest.mark.parametrize("pattern", ["scattered", "ascending", "into a run", "runs", "descending"])
@pytest.mark.parametrize("count", [2, FIRST_LOOK, 1000])
def test_the_usual_case_is_taken(pattern: str, count: int) -> None:
    rng = np.random.default_rng(count)
    size = 64
    buffers = (1 << 20, 4 * count * size), (1 << 26, 4 * count * size)
    sources, targets = (rng.permutation(2 * count)[:count] * size for _ in range(2))
    if pattern == "ascending":
        targets = np.sort(targets)
    elif pattern == "into a run":
        targets = np.arange(count) * size
    elif pattern == "descending":
        targets = np.arange(count)[::-1] * size
    elif pattern == "runs":
        sources = targets = np.arange(count) * size + size * (np.arange(count) // 8)
    found = even_pieces(sources, targets.copy(), size, *buffers)
    assert found is not None
    wanted = Pieces.of(sources + buffers[0][0], targets + buffers[1][0], size)
    require_equal(found, wanted.merged())


@pytest.mark.parametrize("at", [0, 1, FIRST_LOOK, 99])
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("value", [-64, -1, 64 * 199 + 1, 64 * 200, 1 << 62, -(1 << 63)])
def test_a_piece_outside_its_buffer_is_left_to_others(side: str, at: int, value: int) -> None:
    sources, targets = np.arange(100) * 64, np.arange(100)[::-1] * 64
    buffers = (1 << 20, 200 * 64), (1 << 26, 200 * 64)
    assert even_pieces(sources, targets, 64, *buffers) is not None
    (sources if side == "source" else targets)[at] = value
    assert even_pieces(sources, targets, 64, *buffers) is None


@pytest.mark.parametrize("is_ascending", [True, False])
@pytest.mark.parametrize(("at", "other"), [(1, 0), (50, 3), (99, 98)])
def test_two_targets_in_one_place_are_left_to_others(
    is_ascending: bool, at: int, other: int
) -> None:
    sources, targets = np.arange(100) * 64, np.arange(100) * 64
    if not is_ascending:
        targets = targets[::-1].copy()
    targets[at] = targets[other]
    assert even_pieces(sources, targets, 64, (1 << 20, 6400), (1 << 26, 6400)) is None


def test_what_is_not_quick_to_tell_is_left_to_others() -> None:
    few, far = np.arange(3) * 64, np.array([1 << 40, 0, 1 << 30])
    assert even_pieces(few, far, 64, (1 << 20, 6400), (1 << 44, 1 << 43)) is None
    assert even_pieces(few, few[::-1] + 1, 64, (1 << 20, 6400), (1 << 26, 6400)) is None
    assert even_pieces(few * 3, few[::-1] * 3, 192, (1 << 20, 6400), (1 << 26, 6400)) is None
    assert even_pieces(few, few[:2], 64, (1 << 20, 6400), (1 << 26, 6400)) is None


@pytest.mark.parametrize("size", [64, 192])
def test_targets_whose_steps_wrap_around_are_left_to_others(size: int) -> None:
    """Each is above the one before, modulo 2**64, and the last one is in the buffer."""
    sources, targets = np.arange(100) * size, np.arange(100) * size
    targets[50:53] = [1 << 62, (1 << 63) - 64, -(1 << 62)]
    with np.errstate(over="ignore"):
        assert (np.diff(targets) >= size).all()
    buffers = (1 << 20, 100 * size), (1 << 26, 100 * size)
    assert even_pieces(sources, targets, size, *buffers) is None
    assert even_pieces(targets, sources, size, *buffers) is None
