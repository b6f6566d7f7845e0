"""Refuses tensors of a cache that share bytes: a load of one would overwrite another.

Tensors may lie between each other's elements, as the layers of one page do. A tensor is therefore
taken as runs of adjacent bytes, repeated in nested steps: blocks, slots, heads. Layers that share
their KV are one tensor twice, which is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.kernels.arrays import Int64Array
from kvheap.kernels.engine_layouts import KVLayout, LayoutError
from kvheap.kernels.tensor_dims import TensorDims

__all__ = ["Extent", "require_disjoint_tensors", "steps_of"]

Bools: TypeAlias = "npt.NDArray[np.bool_]"

MAX_RUNS = 1 << 16
"""Tensors of unlike steps that lie between each other are compared run by run, up to so many."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes of one tensor: runs of ``run_bytes``, in nested steps.

    Attributes:
        label: what error messages call the tensor.
        layer: the layer that it belongs to.
        part: its number among the tensors of that layer, such as 0 for K and 1 for V.
        start: its address.
        steps: bytes and number of each step, the widest first.
        run_bytes: adjacent bytes.
    """

    label: str
    layer: int
    part: int
    start: int
    steps: tuple[tuple[int, int], ...]
    run_bytes: int

    @property
    def end(self) -> int:
        """Where its last byte ends."""
        return self.start + sum(step * (count - 1) for step, count in self.steps) + self.run_bytes

    def run_starts(self) -> Int64Array:
        """Where each run begins, ascending."""
        starts = np.array([self.start], np.int64)
        for step, count in self.steps:
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * step).reshape(-1)
        return starts


def steps_of(dims: TensorDims) -> tuple[tuple[tuple[int, int], ...], int]:
    """The steps and the bytes of a run of a tensor whose elements do not overlap.

    >>> steps_of(TensorDims({"B": 4, "H": 2, "C": 8}, {"B": 64, "H": 16, "C": 2}, 2))
    (((64, 4),), 32)
    """
    steps: list[tuple[int, int]] = []
    run_bytes = dims.item_bytes
    for step, count in sorted((dims.strides[d], n) for d, n in dims.sizes.items() if n > 1):
        if not steps and step == run_bytes:
            run_bytes *= count
        elif steps and step == steps[-1][0] * steps[-1][1]:
            steps[-1] = (steps[-1][0], steps[-1][1] * count)
        else:
            steps.append((step, count))
    return tuple(reversed(steps)), run_bytes


def require_disjoint_tensors(layout: KVLayout, extents: Sequence[Extent]) -> None:
    """Raise if two tensors of a cache share bytes, unless they are one tensor of two layers.

    O(T log T) for T tensors that follow each other, else O(T * T) vectorised.

    Raises:
        LayoutError: names the first two.
    """
    starts = np.array([extent.start for extent in extents], np.int64)
    ends = np.array([extent.end for extent in extents], np.int64)
    order = np.argsort(starts, kind="stable")
    if (np.maximum.accumulate(ends[order])[:-1] <= starts[order][1:]).all():
        return
    kinds: dict[tuple[object, ...], list[int]] = {}
    for at, extent in enumerate(extents):
        kinds.setdefault((extent.steps, extent.run_bytes, extent.part), []).append(at)
    groups = [np.array(group, np.int64) for group in kinds.values()]
    for number, group in enumerate(groups):
        for other in groups[number:]:
            pair = _first_overlap(layout, extents, starts, ends, (group, other))
            if pair is not None:
                raise LayoutError(_message(layout, *(extents[at] for at in sorted(pair))))


def _first_overlap(
    layout: KVLayout,
    extents: Sequence[Extent],
    starts: Int64Array,
    ends: Int64Array,
    groups: tuple[Int64Array, Int64Array],
) -> tuple[int, int] | None:
    """Two tensors of two groups that share bytes; all tensors of a group are alike."""
    here, there = groups
    one, two = extents[here[0]], extents[there[0]]
    apart = starts[there][None, :] - starts[here][:, None]
    meets: Bools = (starts[here][:, None] < ends[there][None, :]) & (
        starts[there][None, :] < ends[here][:, None]
    )
    meets &= ~_are_allowed(layout, extents, groups, apart)
    if not meets.any():
        return None
    if one.steps == two.steps:
        distances, at = np.unique(apart[meets], return_inverse=True)
        meets[meets] = _run_into_each_other(distances, one, two)[at.reshape(-1)]
    else:
        for row, column in np.argwhere(meets).tolist():
            meets[row, column] = _share_runs(extents[here[row]], extents[there[column]])
    found = np.argwhere(meets)
    return None if not len(found) else (int(here[found[0][0]]), int(there[found[0][1]]))


def _are_allowed(
    layout: KVLayout,
    extents: Sequence[Extent],
    groups: tuple[Int64Array, Int64Array],
    apart: Int64Array,
) -> Bools:
    """Which pairs may share bytes: a tensor and itself, and one tensor that two layers have.

    Blocks of bytes may be views of one pool for layers of several kinds, as vLLM's hybrid models
    have them, where each block belongs to one of the layers at a time: a block then is, or has in
    it, the other layer's block.
    """
    here, there = groups
    one, two = extents[here[0]], extents[there[0]]
    layers = np.array([extent.layer for extent in extents], np.int64)
    same: Bools = here[:, None] == there[None, :]
    if one.steps != two.steps:
        return same
    if layout.content == "blocks":
        longer = one.run_bytes - two.run_bytes
        is_within = (apart >= min(longer, 0)) & (apart <= max(longer, 0))
    else:
        is_within = (apart == 0) & (one.part == two.part) & (one.run_bytes == two.run_bytes)
    allowed: Bools = same | (is_within & (layers[here][:, None] != layers[there][None, :]))
    return allowed


def _run_into_each_other(distances: Int64Array, one: Extent, two: Extent) -> Bools:
    """Whether a run of a tensor shares bytes with one of another, so far behind, of equal steps."""
    # The difference of two runs' starts is a sum of steps. Narrower steps together are less than a
    # wider one, so only the next smaller and the next larger multiple of it can come close enough.
    left = distances[None, :]
    for step, count in one.steps:
        below = np.clip(left // step, 1 - count, count - 1)
        above = np.clip(left // step + 1, 1 - count, count - 1)
        left = np.concatenate([left - below * step, left - above * step])
    meets: Bools = (left < one.run_bytes) & (left > -two.run_bytes)
    return np.logical_or.reduce(meets, axis=0)  # type: ignore[no-any-return]


def _share_runs(one: Extent, two: Extent) -> bool:
    """Whether tensors of unlike steps share bytes; of very many runs, that is not known."""
    if max(np.prod([1, *(n for _, n in extent.steps)]) for extent in (one, two)) > MAX_RUNS:
        return False
    here, there = one.run_starts(), two.run_starts()
    at = np.searchsorted(there, here)
    behind = there[np.minimum(at, len(there) - 1)]
    before = there[np.maximum(at - 1, 0)]
    into_next = (at < len(there)) & (behind < here + one.run_bytes)
    into_last = (at > 0) & (before + two.run_bytes > here)
    return bool((into_next | into_last).any())


def _message(layout: KVLayout, one: Extent, two: Extent) -> str:
    at = max(one.start, two.start)
    advice = "layers that share their KV are one tensor twice"
    if one.layer == two.layer:
        advice = "if K and V are parts of one vector, use mla or sglang-mla"
    return (
        f"{one.label} and {two.label} of {layout.name} share bytes, at {at:#x}: a load of one "
        f"would overwrite the other; {advice}"
    )
