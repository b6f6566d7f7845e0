"""Bulk copies as launchers see them; ``tests/ptx/test_bulk_copy.py`` executes the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_paths import on_a_gpu

from kvheap.kernels import bulk_copy, piece_copy
from kvheap.kernels.bulk_copy import (
    DRAINING,
    ITEM_BYTES,
    PROGRAMS_PER_SM,
    SHARED_BYTES,
    BulkCopy,
    Items,
)
from kvheap.kernels.bulk_loop import MAX_STAGES, SLOT_HEAD_BYTES
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy

CPU = torch.device("cpu")
NUM_SMS = 132

sizes_16 = st.integers(1, 70_000).map(lambda granules: 16 * granules)


@dataclass
class Launches:
    """A kernel that only notes how it is launched."""

    grids: list[int] = field(default_factory=list)
    arguments: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, num_warps: int) -> None:
            assert num_warps == 1
            self.grids.append(grid[0])
            self.arguments.append(arguments)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    monkeypatch.setattr(bulk_copy, "_copy_bulk_kernel", found)
    monkeypatch.setattr(bulk_copy, "_num_sms", lambda _: NUM_SMS)
    monkeypatch.setattr(bulk_copy, "has_bulk_copies", lambda _: True)
    return found


def imagined(sizes: Any, count: int | None = None, granule: int = 16) -> Pieces:
    count = len(sizes) if count is None else count
    places = np.arange(1, count + 1) * (1 << 22) * granule
    return Pieces.of(places, places + (1 << 60), sizes)


def granules_of(pieces: Pieces) -> np.ndarray:
    """The address of each 16 bytes that are read, in the order of the pieces."""
    rows = zip(pieces.sources.tolist(), pieces.size_array().tolist(), strict=True)
    return np.concatenate([np.arange(at, at + size, 16) for at, size in rows])


class TestItems:
    @given(num_pieces=st.integers(1, 50), size=sizes_16)
    def test_items_of_one_size_are_the_whole_piece(self, num_pieces: int, size: int) -> None:
        items = Items.of_one_size(num_pieces, size)
        assert (items.cols - 1) * items.item_bytes + items.last_bytes == size
        assert 0 < items.last_bytes <= items.item_bytes <= ITEM_BYTES
        assert items.item_bytes % 16 == items.last_bytes % 16 == 0
        assert items.num_items == num_pieces * items.cols

    @given(size=sizes_16)
    def test_items_of_one_size_are_as_few_as_possible(self, size: int) -> None:
        assert Items.of_one_size(1, size).cols == -(-size // ITEM_BYTES)

    @given(sizes=st.lists(sizes_16, min_size=2, max_size=20, unique=True))
    def test_items_of_many_sizes_are_cut_on_the_host(self, sizes: list[int]) -> None:
        pieces = imagined(sizes)
        items, cut = Items.of(pieces)
        assert items.last_bytes == 0
        assert items.num_rows == len(cut)
        assert cut.num_bytes == sum(sizes)
        assert items.item_bytes <= ITEM_BYTES
        assert cut.size_array().max() <= items.cols * items.item_bytes
        assert cut.alignment == 16
        assert np.array_equal(granules_of(cut), granules_of(pieces))
        assert np.array_equal(cut.targets - cut.sources, np.full(len(cut), 1 << 60))

    @given(size=sizes_16)
    def test_stages_fit_shared_memory(self, size: int) -> None:
        items = Items.of_one_size(1, size)
        num_slots = items.stage_items * items.stages
        assert 1 <= items.stage_items <= 32
        assert DRAINING < items.stages <= MAX_STAGES
        assert 8 * MAX_STAGES + num_slots * SLOT_HEAD_BYTES <= items.first_slot
        assert items.first_slot + num_slots * items.slot_bytes <= SHARED_BYTES
        assert items.item_bytes <= items.slot_bytes

    @given(size=sizes_16)
    def test_an_item_crosses_no_more_lines_than_it_must(self, size: int) -> None:
        items = Items.of_one_size(1, size)
        starts = items.first_slot + items.slot_bytes * np.arange(items.stage_items)
        ends = starts + items.item_bytes
        lines = -(-ends // 128) - starts // 128
        assert (lines == -(-items.item_bytes // 128)).all()

    @given(num_pieces=st.integers(1, 10_000), size=sizes_16, programs=st.integers(1, 600))
    def test_batches_keep_every_program_busy(
        self, num_pieces: int, size: int, programs: int
    ) -> None:
        items = Items.of_one_size(num_pieces, size)
        batch = items.batch_items(programs)
        assert batch % items.stage_items == 0
        assert items.stage_items <= batch <= 32
        # With batches of one stage less, there would be enough for all programs.
        if batch > items.stage_items:
            assert -(-items.num_items // (batch - items.stage_items)) > programs


class TestRun:
    def test_a_budget_is_a_number_of_programs(self, launches: Launches) -> None:
        ready = BulkCopy.prepare(imagined(65_536, 100), CPU)
        for budget in (1, 7, 10_000):
            ready.run(budget)
        assert launches.grids == [1, 7, 3200]
        assert ready.num_launches == 1

    def test_without_a_budget_every_multiprocessor_has_some(self, launches: Launches) -> None:
        BulkCopy.prepare(imagined(65_536, 2000), CPU).run()
        assert launches.grids == [PROGRAMS_PER_SM * NUM_SMS]

    def test_a_small_copy_is_spread_over_the_budget(self, launches: Launches) -> None:
        BulkCopy.prepare(imagined(16_384, 2), CPU).run(8)
        assert launches.grids == [8]

    def test_a_warm_up_copies_nothing(self, launches: Launches) -> None:
        BulkCopy.prepare(imagined(4096, 5), CPU).warm_up()
        ((_, num_rows, num_items, *_),) = launches.arguments
        assert (launches.grids, num_rows, num_items) == ([1], 5, 0)

    @pytest.mark.parametrize("budget", [0, -3])
    def test_budgets_below_one_are_refused(self, budget: int, launches: Launches) -> None:
        ready = BulkCopy.prepare(imagined(4096, 5), CPU)
        with pytest.raises(ValueError, match=f"max_sms must be at least 1, got {budget}"):
            ready.run(budget)
        assert launches.grids == []

    @pytest.mark.parametrize("budget", [1.5, True, "2"])
    def test_budgets_that_are_no_numbers_are_refused(self, budget: Any, launches: Launches) -> None:
        ready = BulkCopy.prepare(imagined(4096, 5), CPU)
        with pytest.raises(TypeError, match="max_sms must be an integer, got "):
            ready.run(budget)
        assert launches.grids == []

    def test_no_pieces_need_no_launch(self, launches: Launches) -> None:
        ready = BulkCopy.prepare(imagined([]), CPU)
        ready.warm_up()
        ready.run()
        assert (ready.num_launches, ready.num_bytes, launches.grids) == (0, 0, [])


class TestPrepare:
    def test_pieces_of_one_size_have_two_words_each(self, launches: Launches) -> None:
        pieces = imagined(100_000, 9)
        ready = BulkCopy.prepare(pieces, CPU)
        assert ready.descriptor_bytes == 16 * 9
        assert ready.num_bytes == 900_000
        expected = np.concatenate([pieces.sources, pieces.targets])
        assert ready.descriptors.tolist() == expected.tolist()

    def test_equal_sizes_in_an_array_count_as_one_size(self, launches: Launches) -> None:
        assert BulkCopy.prepare(imagined([4096] * 6), CPU).descriptor_bytes == 16 * 6

    def test_other_pieces_have_three_words_for_each_row(self, launches: Launches) -> None:
        ready = BulkCopy.prepare(imagined([65_536, 131_072, 65_520]), CPU)
        assert ready.descriptors.view(3, -1)[2].tolist() == [65_536] * 3 + [65_520]

    def test_small_pieces_of_many_sizes_are_rows_of_one_item(self, launches: Launches) -> None:
        ready = BulkCopy.prepare(imagined([48, 64, 16]), CPU)
        assert ready.descriptors.view(3, -1)[2].tolist() == [48, 64, 16]
        assert (ready.items.cols, ready.items.item_bytes) == (1, 64)

    @pytest.mark.parametrize(("size", "granule"), [(4088, 16), (4096, 8)])
    def test_other_alignments_are_refused(
        self, size: int, granule: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bulk_copy, "staging", lambda *_: pytest.fail("uploaded"))
        places = granule * np.arange(1, 3) * 10_001
        pieces = Pieces.of(places, places + (1 << 50), size)
        with pytest.raises(ValueError, match=r"multiples of 16, but those of .* of 8: use Point"):
            BulkCopy.prepare(pieces, CPU)
        assert BulkCopy.prepare_if_suited(pieces, CPU) is None

    def test_older_devices_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bulk_copy, "has_bulk_copies", lambda _: False)
        with pytest.raises(ValueError, match="cpu has no bulk copies, which need compute cap"):
            BulkCopy.prepare(imagined(64, 3), CPU)
        assert BulkCopy.prepare_if_suited(imagined(64, 3), CPU) is None

    @pytest.mark.parametrize(
        ("capability", "has"), [((8, 9), False), ((9, 0), True), ((12, 1), True)]
    )
    def test_the_instructions_came_with_compute_capability_9(
        self, capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        bulk_copy.has_bulk_copies.cache_clear()
        try:
            assert bulk_copy.has_bulk_copies(torch.device("cuda", 5)) is has
        finally:
            bulk_copy.has_bulk_copies.cache_clear()

    def test_too_many_items_are_refused(
        self, launches: Launches, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bulk_copy, "MAX_ITEMS", 60)
        assert BulkCopy.prepare(imagined(ITEM_BYTES, 59), CPU)
        monkeypatch.setattr(bulk_copy, "staging", lambda *_: pytest.fail("uploaded"))
        with pytest.raises(ValueError, match=r"Pieces\(30 x 4096 bytes.* need 60 items, too many"):
            BulkCopy.prepare(imagined(2 * ITEM_BYTES, 30), CPU)


class TestChoice:
    """Which kernel ``prepare_pieces`` takes, if bulk copies are preferred over the link."""

    @pytest.fixture(autouse=True)
    def preferred(self, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(piece_copy, "BULK_OVER_LINK", True)
        monkeypatch.setattr(piece_copy, "BULK_WITHIN_DEVICE", False)

    def test_bulk_copies_where_they_are_preferred(self) -> None:
        pieces = imagined(4096, 3)
        assert type(piece_copy.prepare_pieces(pieces, CPU, over_link=True)) is BulkCopy
        assert type(piece_copy.prepare_pieces(pieces, CPU, over_link=False)) is PointerCopy

    def test_the_pointer_kernel_for_other_alignments(self) -> None:
        pieces = imagined(4088, 3)
        assert type(piece_copy.prepare_pieces(pieces, CPU, over_link=True)) is PointerCopy

    def test_the_pointer_kernel_on_older_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bulk_copy, "has_bulk_copies", lambda _: False)
        pieces = imagined(4096, 3)
        assert type(piece_copy.prepare_pieces(pieces, CPU, over_link=True)) is PointerCopy


@on_a_gpu
class TestGpu:
    @pytest.fixture(autouse=True)
    def needs_bulk_copies(self) -> None:
        if not bulk_copy.has_bulk_copies(torch.device("cuda", 0)):
            pytest.skip("this GPU has no bulk copies")

    @pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
    @pytest.mark.parametrize("top", [64, 4096, 1 << 15])
    @pytest.mark.parametrize("max_sms", [1, 4, None])
    def test_pieces_are_copied(self, direction: str, top: int, max_sms: int | None) -> None:
        random = np.random.default_rng(top)
        sizes = random.integers(1, top // 16 + 1, 200) * 16
        places = []
        for _ in range(2):
            order = random.permutation(len(sizes))
            steps = sizes[order] + random.integers(0, 4, len(sizes)) * 16
            offsets = np.empty(len(sizes), np.int64)
            offsets[order] = np.cumsum(steps) - steps
            places.append(offsets)
        size = int(max((each + sizes).max() for each in places)) + 64
        first = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8))
        expected = torch.full((size,), 0xDE, dtype=torch.uint8)
        source = first.cuda() if direction[0] == "d" else first.pin_memory()
        target = expected.cuda() if direction[2] == "d" else expected.clone().pin_memory()
        for start, to, num_bytes in zip(*places, sizes, strict=True):
            expected[to : to + num_bytes] = first[start : start + num_bytes]
        pieces = Pieces.of(source.data_ptr() + places[0], target.data_ptr() + places[1], sizes)
        BulkCopy.prepare(pieces, torch.device("cuda", 0)).run(max_sms)
        torch.cuda.synchronize()
        assert torch.equal(target.cpu(), expected)
