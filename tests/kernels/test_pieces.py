"""What a transfer moves, against sets of single bytes."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvheap.kernels.pieces import Pieces, first_outside, is_covered

BASE = 4096


def each_byte(pieces: Pieces) -> list[tuple[int, int]]:
    """Source and target of each byte, in order."""
    return [
        (source + at, target + at)
        for source, target, size in zip(
            pieces.sources.tolist(),
            pieces.targets.tolist(),
            pieces.size_array().tolist(),
            strict=True,
        )
        for at in range(size)
    ]


@st.composite
def some_pieces(draw: st.DrawFn, most: int = 12) -> Pieces:
    """Pieces that often are neighbours, on one side or both."""
    sources, targets, sizes = [], [], []
    source, target = BASE, BASE
    one_size = draw(st.sampled_from([0, 0, 4]))
    for _ in range(draw(st.integers(0, most))):
        source += draw(st.sampled_from([0, 0, 0, 1, 7]))
        target += draw(st.sampled_from([0, 0, 0, 1, 9]))
        size = one_size or draw(st.integers(1, 9))
        sources.append(source)
        targets.append(target)
        sizes.append(size)
        source += size
        target += size
    return Pieces.of(sources, targets, sizes)


class TestOf:
    def test_one_size_for_all(self) -> None:
        pieces = Pieces.of([16, 32], [64, 128], 8)
        assert pieces.sizes == 8
        assert (len(pieces), pieces.num_bytes, pieces.size_array().tolist()) == (2, 16, [8, 8])
        assert repr(pieces) == "Pieces(2 x 8 bytes, 16 bytes)"

    def test_pieces_of_no_bytes_are_left_out(self) -> None:
        pieces = Pieces.of([16, 0, 48], [64, 0, 96], [1, 0, 3])
        assert each_byte(pieces) == [(16, 64), (48, 96), (49, 97), (50, 98)]
        assert len(Pieces.of([16, 32], [64, 128], 0)) == 0
        assert len(Pieces.of([], [], [])) == 0

    @pytest.mark.parametrize("kind", [np.int32, np.uint8, np.uint64, np.int64])
    def test_integers_of_any_kind(self, kind: type) -> None:
        pieces = Pieces.of(np.array([16], kind), np.array([64], kind), np.array([8], kind))
        assert pieces.sources.dtype == pieces.targets.dtype == np.int64
        assert each_byte(pieces)[-1] == (23, 71)

    @pytest.mark.parametrize(
        ("sources", "targets", "sizes", "message"),
        [
            ([16, 32], [64], 8, "2 sources but 1 targets"),
            ([16, 32], [64, 128], [8], "2 sources, 2 targets and 1 sizes"),
            ([[16]], [64], 8, "sources must be one-dimensional"),
            ([16], [64], [[8]], "sizes must be one-dimensional"),
            ([16], [64], -8, "sizes must not be negative, got -8"),
            ([16, 32], [64, 128], [8, -1], "sizes[1] is -1"),
            ([0], [64], 8, "sources must be positive addresses: sources[0] is 0"),
            ([16, 32], [64, -4], 8, "targets must be positive addresses: targets[1] is -4"),
            ([16], [2**63 - 8], 8, "targets must not wrap around: targets[0] is"),
            (np.array([2**63], np.uint64), [64], 8, "sources must be below 2**63"),
        ],
    )
    def test_wrong_values(
        self, sources: object, targets: object, sizes: object, message: str
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            Pieces.of(sources, targets, sizes)  # type: ignore[arg-type]

    @pytest.mark.parametrize("wrong", [[1.5], [True], ["16"]])
    def test_wrong_types(self, wrong: list[object]) -> None:
        with pytest.raises(TypeError, match="sources must be integers"):
            Pieces.of(wrong, [64], 8)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="sizes must be integers"):
            Pieces.of([16], [64], wrong)  # type: ignore[arg-type]


class TestSameBytes:
    @given(some_pieces())
    def test_merged(self, pieces: Pieces) -> None:
        merged = pieces.merged()
        assert each_byte(merged) == each_byte(pieces)
        assert merged.num_bytes == pieces.num_bytes
        sizes = merged.size_array()
        follows = (merged.sources[1:] == (merged.sources + sizes)[:-1]) & (
            merged.targets[1:] == (merged.targets + sizes)[:-1]
        )
        assert not follows.any()

    @given(
        some_pieces(),
        st.sets(st.integers(BASE - 5, BASE + 150), max_size=8),
        st.sets(st.integers(BASE - 5, BASE + 150), max_size=8),
    )
    def test_split(self, pieces: Pieces, source_walls: set[int], target_walls: set[int]) -> None:
        walls = [np.array(sorted(side), np.int64) for side in (source_walls, target_walls)]
        split = pieces.split(*walls)
        assert each_byte(split) == each_byte(pieces)
        assert (split.size_array() > 0).all()
        for starts, side in ((split.sources, walls[0]), (split.targets, walls[1])):
            for start, size in zip(starts.tolist(), split.size_array().tolist(), strict=True):
                assert not ((side > start) & (side < start + size)).any()
        if not source_walls and not target_walls:
            assert split is pieces

    @given(some_pieces(), st.integers(1, 12))
    def test_cut(self, pieces: Pieces, most: int) -> None:
        cut = pieces.cut(most)
        assert each_byte(cut) == each_byte(pieces)
        assert (cut.size_array() <= most).all()
        assert (cut.size_array() > 0).all()
        assert len(cut) == sum(-(-size // most) for size in pieces.size_array().tolist())

    @given(some_pieces(), st.integers(1, 40))
    def test_by_bytes(self, pieces: Pieces, most: int) -> None:
        groups = list(pieces.by_bytes(most))
        assert [byte for group in groups for byte in each_byte(group)] == each_byte(pieces)
        assert all(group.num_bytes == most for group in groups[:-1])
        assert all(0 < group.num_bytes <= most for group in groups)

    @given(st.lists(some_pieces(4), max_size=4))
    def test_joined(self, parts: list[Pieces]) -> None:
        joined = Pieces.joined(parts)
        assert each_byte(joined) == [byte for part in parts for byte in each_byte(part)]

    @given(some_pieces(), st.data())
    def test_some_of_them(self, pieces: Pieces, data: st.DataObject) -> None:
        rows = np.flatnonzero(data.draw(st.lists(st.booleans(), max_size=len(pieces))))
        expected = [byte for row in rows for byte in each_byte(pieces[int(row) : int(row) + 1])]
        assert each_byte(pieces[rows]) == expected

    def test_equal_sizes_are_one_number(self) -> None:
        merged = Pieces.of([16, 20, 40, 44], [116, 120, 140, 144], 4).merged()
        assert merged.sizes == 8


def test_alignment() -> None:
    assert Pieces.of([16, 32], [64, 128], 32).alignment == 16
    assert Pieces.of([16, 32], [64, 132], 32).alignment == 4
    assert Pieces.of([16, 32], [64, 128], [32, 31]).alignment == 1
    assert Pieces.of([8], [64], 2).alignment == 2
    assert Pieces.of([], [], []).alignment >= 1


class TestOverlaps:
    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8)), max_size=6)
    )
    def test_against_sets(self, triples: list[tuple[int, int, int]]) -> None:
        pieces = Pieces.of(*([triple[at] for triple in triples] for at in range(3)))
        written = [target for _, target in each_byte(pieces)]
        read = {source for source, _ in each_byte(pieces)}
        if len(set(written)) == len(written):
            pieces.require_distinct_targets()
        else:
            with pytest.raises(ValueError, match="targets overlap: piece"):
                pieces.require_distinct_targets()
        if read & set(written):
            with pytest.raises(ValueError, match=r"the target of piece \d.*overlaps the source"):
                pieces.require_apart()
        else:
            pieces.require_apart()

    @given(st.data(), st.sampled_from([1, 3, 4, 7, 8]), st.sampled_from([0, 64]))
    def test_targets_of_one_size_against_sets(
        self, data: st.DataObject, size: int, max_cells: int
    ) -> None:
        near = st.sampled_from([size, size, size, size + 1, 2 * size + 1, size - 1])
        steps = data.draw(st.lists(near, max_size=6))
        targets = data.draw(st.permutations((100 + np.cumsum([0, *steps])).tolist()))
        pieces = Pieces.of([900] * len(targets), targets, size)
        written = [target for _, target in each_byte(pieces)]
        room = st.integers(0, 40)
        within = (min(targets) - data.draw(room), max(targets) + size + data.draw(room))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvheap.kernels.pieces.MAX_CELLS_PER_PIECE", max_cells)
            for known in (None, within):
                if len(set(written)) == len(written):
                    pieces.require_distinct_targets(known)
                else:
                    with pytest.raises(ValueError, match="targets overlap: piece"):
                        pieces.require_distinct_targets(known)

    def test_the_two_are_named(self) -> None:
        with pytest.raises(ValueError, match="piece 2 ends at address 108, piece 1 starts at 104"):
            Pieces.of([16, 32, 48], [300, 104, 100], 8).require_distinct_targets()
        with pytest.raises(ValueError, match=r"piece 1, \[20, 28\), overlaps the source of pie"):
            Pieces.of([16, 32, 48], [300, 20, 100], 8).require_apart()


class TestFirstOutside:
    @given(
        st.lists(st.tuples(st.integers(0, 50), st.integers(1, 10)), max_size=5),
        st.lists(st.tuples(st.integers(0, 10), st.integers(1, 15)), max_size=4),
    )
    def test_against_sets(self, places: list[tuple[int, int]], gaps: list[tuple[int, int]]) -> None:
        at, ranges = 0, []
        for gap, size in gaps:
            ranges.append((at + gap, at + gap + size))
            at += gap + size
        inside = {byte for start, end in ranges for byte in range(start, end)}
        wrong = [
            row
            for row, (start, size) in enumerate(places)
            if not set(range(start, start + size)) <= inside
        ]
        starts = np.array([start for start, _ in places], np.int64)
        ends = starts + np.array([size for _, size in places], np.int64)
        found = first_outside(starts, ends, np.array(ranges, np.int64).reshape(-1, 2))
        assert found == (wrong[0] if wrong else None)

    @given(st.lists(st.integers(0, 40), unique=True, max_size=8), st.data())
    def test_one_stretch_covers(self, bounds: list[int], data: st.DataObject) -> None:
        bounds.sort()
        kept = data.draw(st.lists(st.booleans(), min_size=len(bounds), max_size=len(bounds)))
        between = zip(pairwise(bounds), kept, strict=False)
        ranges = [stretch for stretch, is_in in between if is_in]
        inside = {byte for first, last in ranges for byte in range(first, last)}
        is_one = all(before[1] == after[0] for before, after in pairwise(ranges))
        start = data.draw(st.integers(0, 40))
        end = data.draw(st.integers(start + 1, 41))
        found = is_covered(start, end, np.array(ranges, np.int64).reshape(-1, 2))
        assert found == (is_one and inside.issuperset(range(start, end)))
