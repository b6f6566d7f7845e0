"""How much times vary between rounds: what is counted as noisy, and how pictures show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOISY_RATIO = 2.0
"""A figure is noisy if its 80th percentile is more than so many times its 20th: then something else
ran on the machine, and the median may be of either."""

NOISY_LABEL = f"noisy: p80 > {NOISY_RATIO:g} x p20"


def spread_of(figures: Mapping[str, Any], unit: str = "us") -> tuple[float, float]:
    """The 20th and the 80th percentile of a time over its median.

    Args:
        figures: has ``p20_<unit>``, ``p50_<unit>`` and ``p80_<unit>``.
        unit: of these figures.
    """
    middle = figures[f"p50_{unit}"] or 1.0
    return figures[f"p20_{unit}"] / middle, figures[f"p80_{unit}"] / middle


def is_noisy(figures: Mapping[str, Any], unit: str = "us") -> bool:
    """Whether a time varied so much between rounds that its median says little."""
    low, high = spread_of(figures, unit)
    return high > NOISY_RATIO * low


def count_noisy(results: Any) -> tuple[int, int]:
    """How many times in results are noisy, and how many there are."""
    if isinstance(results, Mapping):
        units = [key[4:] for key in results if key.startswith("p20_")]
        own = [is_noisy(results, unit) for unit in units if f"p80_{unit}" in results]
        found = [(sum(own), len(own)), *map(count_noisy, results.values())]
    elif isinstance(results, (list, tuple)):
        found = [count_noisy(each) for each in results]
    else:
        return 0, 0
    return sum(noisy for noisy, _ in found), sum(total for _, total in found)


def mark_noisy(panel: Any, places: Sequence[float], heights: Sequence[float]) -> None:
    """Put a red ring around noisy points of a panel, and say in its legend what that means."""
    if len(places):
        look: dict[str, Any] = {"marker": "o", "fillstyle": "none", "markersize": 13}
        look |= {"linestyle": "", "color": "red"}
        has_label = any(line.get_label() == NOISY_LABEL for line in panel.get_lines())
        panel.plot(places, heights, **look, label="_" if has_label else NOISY_LABEL)


def plot_shares(
    panel: Any, xs: Sequence[float], rows: Sequence[Mapping[str, Any]], **look: Any
) -> None:
    """Draw shares of one copy, each with the range that the middle 60 % of its times give."""
    shares = [row["share_of_copy"] for row in rows]
    line = panel.plot(xs, shares, **look)[0]
    spreads = [spread_of(row) for row in rows]
    lows = [share / high for share, (_, high) in zip(shares, spreads, strict=True)]
    highs = [share / low for share, (low, _) in zip(shares, spreads, strict=True)]
    panel.vlines(xs, lows, highs, color=line.get_color(), linewidth=1, alpha=0.6)
    noisy = [at for at, row in enumerate(rows) if is_noisy(row)]
    mark_noisy(panel, [xs[at] for at in noisy], [shares[at] for at in noisy])


def plot_dots(
    panel: Any, places: Sequence[float], figures: Sequence[Mapping[str, Any]], **look: Any
) -> None:
    """Draw times as dots with the range of their middle 60 %, upwards from a logarithmic axis."""
    medians = [each["p50_us"] for each in figures]
    line = panel.plot(places, medians, "o", **look)[0]
    lows, highs = ([each[f"p{percent}_us"] for each in figures] for percent in (20, 80))
    panel.vlines(places, lows, highs, color=line.get_color(), linewidth=2, alpha=0.5)
    noisy = [at for at, each in enumerate(figures) if is_noisy(each)]
    mark_noisy(panel, [places[at] for at in noisy], [medians[at] for at in noisy])
