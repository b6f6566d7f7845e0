"""The built-in costs, compared with the figures that they were derived from."""

from __future__ import annotations

from itertools import product
from math import log2

import pytest
from made_up_tables import SIZES

from kvheap.planning.path_costs import MEASURED_DIRECTIONS
from kvheap.planning.planner import table_for
from kvheap.planning.published_costs import PUBLISHED_CROSSOVERS, Crossover, published_costs

H100 = "NVIDIA H100 80GB HBM3"

A30_RATIOS = {
    1: (0.49, 0.66, 0.92, 1.36, 2.02, 3.43, 4.23),
    4: (0.57, 0.81, 1.19, 1.80, 2.68, 4.17, 4.47),
    8: (0.68, 0.99, 1.48, 2.20, 3.09, 3.73, 4.17),
    16: (0.86, 1.20, 1.81, 2.49, 2.99, 3.24, 3.73),
    24: (0.99, 1.44, 1.82, 2.44, 2.60, 3.02, 3.56),
    28: (0.57, 0.77, 0.94, 1.19, 1.29),
}
"""vLLM #57555: time by the copy engine over time by the kernel, host to device, by KiB of a piece,
at the counts below."""

A30_COUNTS = (16, 32, 64, 128, 256, 1024, 4096)

H100_ENGINE_GBPS = {4: 4.0, 8: 5.2, 16: 6.3, 24: 6.7}
"""vLLM #42212: 50,000 pieces by the copy engine, host to device, by KiB of a piece."""


class TestBuiltInCosts:
    @pytest.mark.parametrize("crossover", PUBLISHED_CROSSOVERS)
    def test_the_kernel_overtakes_the_copy_engine_where_it_was_seen_to(
        self, crossover: Crossover
    ) -> None:
        table = table_for(f"NVIDIA {crossover.device}", "0.0")
        size = crossover.piece_bytes
        for count, path in (
            (crossover.slower_at, "copy_engine"),
            (crossover.faster_at, "kernel"),
        ):
            assert table.choose("h2d", count, count * size, ("copy_engine", "kernel")) == path

    def test_an_a30s_ratios_are_met_within_a_third_and_a_sixth_in_the_middle(self) -> None:
        costs = published_costs("NVIDIA A30")
        assert costs is not None
        errors = []
        for kib, ratios in A30_RATIOS.items():
            for count, ratio in zip(A30_COUNTS, ratios, strict=False):
                num_bytes = count * kib << 10
                engine, kernel = (
                    costs["h2d", path].seconds(count, num_bytes)
                    for path in ("copy_engine", "kernel")
                )
                errors.append(abs(log2(engine / kernel / ratio)))
        assert max(errors) < log2(1.37)
        assert sorted(errors)[len(errors) // 2] < log2(1.1)

    @pytest.mark.parametrize(("kib", "gbps"), H100_ENGINE_GBPS.items())
    def test_an_h100s_copy_engine_is_as_slow_for_small_pieces_as_published(
        self, kib: int, gbps: float
    ) -> None:
        num_bytes = 50_000 * kib << 10
        seconds = table_for(H100, "0.0").seconds("h2d", "copy_engine", 50_000, num_bytes)
        assert seconds is not None
        assert num_bytes / seconds / 1e9 == pytest.approx(gbps, rel=0.06)

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            (H100, "built in"),
            ("NVIDIA H100 PCIe", "built in"),
            ("NVIDIA H200", "built in"),
            ("NVIDIA A30", "built in"),
            ("NVIDIA GH200 480GB", "cautious"),
            ("NVIDIA A300", "cautious"),
            ("NVIDIA GB10", "cautious"),
            ("", "cautious"),
        ],
    )
    def test_they_are_used_for_devices_of_that_name_alone(self, name: str, source: str) -> None:
        assert table_for(name, "0.0").source == source

    def test_the_cautious_rule_takes_the_copy_engine_where_it_is_close(self) -> None:
        known, unknown = table_for("NVIDIA A30", "0.0"), table_for("NVIDIA A40", "0.0")
        for direction, size in product(MEASURED_DIRECTIONS, SIZES[:6]):
            (_, engine), *others = unknown.choices(direction, size)
            assert engine == "copy_engine"
            assert not others or others[0][0] > known.choices(direction, size)[1][0]
