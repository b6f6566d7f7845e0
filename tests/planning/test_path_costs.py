"""Costs: the formula, and how measured cells stand for what lies between and beyond them."""

from __future__ import annotations

from random import Random

import pytest
from made_up_tables import CELLS, COUNTS, SIZES, made_up_costs, measured

from kvheap.planning.path_costs import Cell, MeasuredCost, PathCost


class TestCosts:
    def test_a_cost_adds_up_call_pieces_and_bytes(self) -> None:
        cost = PathCost(20e-6, 0.5e-6, 50e9, small_piece_bytes=1000, small_bytes_per_s=10e9)
        assert cost.seconds(100, 100_000) == pytest.approx(20e-6 + 50e-6 + 2e-6)
        assert cost.seconds(100, 99_900) == pytest.approx(20e-6 + 50e-6 + 9.99e-6)

    def test_a_measured_cost_is_exact_at_its_cells(self) -> None:
        random = Random(1)
        cells = tuple(
            Cell(size, count, 10 ** random.uniform(-6, -1), 0.0, 3) for size, count in CELLS
        )
        cost = MeasuredCost(cells)
        for cell in cells:
            seconds = cost.seconds(cell.num_pieces, cell.num_pieces * cell.piece_bytes)
            assert seconds == pytest.approx(cell.seconds, rel=1e-9)

    @pytest.mark.parametrize("seed", range(3))
    def test_between_and_beyond_its_cells_time_grows_with_pieces_and_bytes(self, seed: int) -> None:
        cost = measured(made_up_costs(seed)).costs["h2d", "kernel"]
        random = Random(seed)
        for _ in range(2000):
            count, size = round(2 ** random.uniform(0, 20)), round(2 ** random.uniform(6, 26))
            more = round(count * random.uniform(1, 3)) + 1
            seconds = cost.seconds(count, count * size)
            assert cost.seconds(more, more * size) > seconds
            assert cost.seconds(count, count * size + random.randint(0, 1 << 20)) >= seconds

    def test_beyond_the_grid_time_grows_as_between_the_last_cells(self) -> None:
        truth = made_up_costs(0)["d2h", "kernel"]
        cost = measured(made_up_costs(0)).costs["d2h", "kernel"]
        for count, size in ((16, SIZES[-1] * 8), (1, SIZES[-1] * 64), (COUNTS[-1] * 8, 1024)):
            seconds = truth.seconds(count, count * size)
            assert cost.seconds(count, count * size) == pytest.approx(seconds, rel=0.07)

    def test_far_beyond_the_grid_time_is_proportional(self) -> None:
        cost = measured(made_up_costs(0)).costs["d2h", "kernel"]
        for count, size in ((16, SIZES[-1] * 64), (COUNTS[-1] * 64, 1024)):
            far = 8 * cost.seconds(count, count * size)
            more = (count, size * 8) if count == 16 else (count * 8, size)
            assert cost.seconds(more[0], more[0] * more[1]) == pytest.approx(far)

    def test_time_never_falls_beyond_the_grid(self) -> None:
        cost = MeasuredCost((Cell(1024, 16, 2e-5, 0, 3), Cell(1024, 64, 1e-5, 0, 3)))
        assert cost.seconds(256, 256 * 1024) == pytest.approx(1e-5)

    def test_below_the_grid_it_goes_on_as_between_the_outermost_cells(self) -> None:
        flat = MeasuredCost((Cell(1024, 16, 1e-5, 0, 3), Cell(1024, 64, 1e-5, 0, 3)))
        steep = MeasuredCost((Cell(1024, 16, 1e-5, 0, 3), Cell(1024, 64, 4e-5, 0, 3)))
        falling = MeasuredCost((Cell(1024, 16, 2e-5, 0, 3), Cell(1024, 64, 1e-5, 0, 3)))
        assert flat.seconds(4, 4096) == pytest.approx(1e-5)
        assert steep.seconds(4, 4096) == pytest.approx(0.25e-5)
        assert falling.seconds(4, 4096) == pytest.approx(2e-5)

    def test_a_missing_cell_grows_from_the_next_smaller_or_is_as_the_next_larger(self) -> None:
        cells = (
            Cell(1024, 16, 1e-5, 0, 3),
            Cell(1024, 64, 2e-5, 0, 3),
            Cell(1024, 256, 6e-5, 0, 3),
            Cell(4096, 16, 3e-5, 0, 3),
            Cell(16384, 64, 9e-5, 0, 3),
            Cell(65536, 16, 1e-4, 0, 3),
            Cell(65536, 64, 2e-4, 0, 3),
        )
        cost = MeasuredCost(cells)
        assert cost.seconds(64, 64 * 4096) == pytest.approx(12e-5)  # from a single one
        assert cost.seconds(256, 256 * 65536) == pytest.approx(6e-4)  # by 1e-4 for 48 pieces
        assert cost.seconds(16, 16 * 16384) == pytest.approx(9e-5)

    @pytest.mark.parametrize("cells", [(), (Cell(1, 1, 1.0, 0, 1), Cell(1, 1, 2.0, 0, 1))])
    def test_no_cells_and_one_twice_are_refused(self, cells: tuple[Cell, ...]) -> None:
        with pytest.raises(ValueError, match="cell"):
            MeasuredCost(cells)
