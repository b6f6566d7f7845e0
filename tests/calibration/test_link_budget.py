"""The SM budget of the host link: made-up links, and speeds that were measured on an H200."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvheap.calibration.link_budget import ROUNDS, SATURATED, TRIED_SMS, find_link_sms
from kvheap.device.directions import Direction

COPIED_BYTES = 128 << 20

H200 = {
    "h2d": {1: 26.0, 2: 48.0, 3: 51.0},
    "d2h": {1: 37.0, 2: 51.0, 3: 52.0},
}
"""GB/s of 16 KiB pieces by SMs, from benchmarks/NOTES.md; more SMs are no faster."""


class Link:
    """A link that has a speed for each number of SMs, and no other."""

    def __init__(self, speed: Callable[[Direction, int], float], noise: float = 0.0) -> None:
        self.speed = speed
        self.noise = noise
        self.random = random.Random(3)
        self.asked: list[tuple[Direction, int]] = []

    def __call__(self, direction: Direction, num_sms: int) -> list[float]:
        self.asked.append((direction, num_sms))
        seconds = COPIED_BYTES / self.speed(direction, num_sms)
        return [seconds * (1 + self.noise * self.random.random()) for _ in range(11)]


def never() -> bool:
    return False


def test_an_h200_has_the_budgets_that_were_chosen_for_it_by_hand() -> None:
    link = Link(lambda direction, n: 1e9 * H200[direction][min(n, 3)])
    assert find_link_sms(link, never) == {"h2d": 3, "d2h": 2}


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("seed", range(20))
def test_the_fewest_that_saturate_are_found(seed: int, noise: float) -> None:
    draw = random.Random(seed)
    of_link = {way: draw.uniform(10, 900) * 1e9 for way in ("h2d", "d2h")}
    of_sm = {way: speed / draw.uniform(0.5, 31) for way, speed in of_link.items()}

    def speed(direction: Direction, num_sms: int) -> float:
        return min(num_sms * of_sm[direction], of_link[direction])

    found = find_link_sms(Link(speed, noise), never)
    assert set(found) == {"h2d", "d2h"}
    for direction, number in found.items():
        shares = [speed(direction, n) / of_link[direction] for n in (number - 1, number)]
        assert shares[0] < SATURATED + noise
        assert shares[1] >= SATURATED - noise


def test_a_number_between_two_that_are_always_tried() -> None:
    link = Link(lambda _, n: 1e9 * min(n, 27))
    # 26 of 27 GB/s are the first that are 95 %.
    assert find_link_sms(link, never) == {"h2d": 26, "d2h": 26}
    assert {n for _, n in link.asked} - set(TRIED_SMS) == {28, 26, 25}


def test_a_drifting_clock_changes_all_numbers_alike() -> None:
    calls = 0

    def speed(direction: Direction, num_sms: int) -> float:
        nonlocal calls
        calls += 1
        return 1e9 * H200[direction][min(num_sms, 3)] * (1 - 1e-4 * calls)

    assert find_link_sms(Link(speed), never) == {"h2d": 3, "d2h": 2}


def test_a_direction_that_cannot_be_measured_is_left_out() -> None:
    link = Link(lambda direction, n: 1e9 * H200[direction][min(n, 3)])

    def measure(direction: Direction, num_sms: int) -> list[float] | None:
        return None if direction == "h2d" else link(direction, num_sms)

    assert find_link_sms(measure, never) == {"d2h": 2}
    assert find_link_sms(lambda *_: [], never) == {}


def test_without_time_for_all_numbers_there_is_no_answer() -> None:
    link = Link(lambda direction, n: 1e9 * H200[direction][min(n, 3)])
    of_round = len(TRIED_SMS)
    answers = []
    for limit in range(3 * of_round):
        link.asked.clear()
        answers.append(find_link_sms(link, lambda limit=limit: len(link.asked) >= limit))
        assert len(link.asked) == limit
    assert answers == (
        [{}] * of_round + [{"h2d": 3}] * of_round + [{"h2d": 3, "d2h": 2}] * of_round
    )


def test_each_number_is_tried_in_each_round() -> None:
    link = Link(lambda _, n: 1e9 * min(n, 5))
    find_link_sms(link, never)
    both = [(way, n) for way in ("h2d", "d2h") for n in TRIED_SMS]
    assert link.asked == both * ROUNDS


def test_without_time_the_number_that_is_known_to_suffice_is_taken() -> None:
    link = Link(lambda _, n: 1e9 * min(n, 27))
    late = 2 * len(TRIED_SMS) * ROUNDS
    assert find_link_sms(link, lambda: len(link.asked) >= late) == {"h2d": 32, "d2h": 32}
