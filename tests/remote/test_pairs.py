"""Parts of a read whose blocks are one run on both sides, beside the general way."""

from __future__ import annotations

from itertools import starmap

import pytest
import torch

from kvheap import HostMemoryAllocator
from kvheap.remote import pairs
from kvheap.remote.pairs import Part, parts_of, parts_of_span, span_of

BLOCK = 4096


def in_numbers(parts: list[Part] | None) -> list[tuple[int, int, int]]:
    """Source, target and bytes of every run, in the order in which they are posted."""
    found: list[tuple[int, int, int]] = []
    for part in reversed(parts or []):
        if isinstance(part, tuple):
            found.append(tuple(part))
        else:
            columns = (part.sources, part.targets, part.size_array())
            found += zip(*[each.tolist() for each in columns], strict=True)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("most", [BLOCK, 3 * BLOCK, 8 * BLOCK, 64 << 20])
def test_a_run_is_cut_as_pieces_are(count: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "POST_BYTES", most)
    here, there = HostMemoryAllocator(16 * BLOCK), HostMemoryAllocator(16 * BLOCK)
    for heap in (here, there):
        assert heap.allocate([BLOCK], torch.uint8) is not None
    source = there.batched_allocate([BLOCK], torch.uint8, count)
    target = here.batched_allocate([BLOCK], torch.uint8, count)
    assert source is not None
    assert target is not None
    runs = source.block_runs()
    parts = parts_of_span(span_of(runs), target.runs, count * BLOCK, here.memory_segments())
    assert in_numbers(parts) == in_numbers(parts_of(runs, target.block_runs()))
    assert len(parts or []) == -(-count * BLOCK // most)
    assert sum(starmap(lambda _, __, size: size, in_numbers(parts))) == count * BLOCK


def test_what_is_no_run_goes_the_general_way() -> None:
    heap = HostMemoryAllocator(16 * BLOCK)
    run = heap.batched_allocate([BLOCK], torch.uint8, 4)
    padded = heap.batched_allocate([BLOCK - 1], torch.uint8, 4)
    assert run is not None
    assert padded is not None
    span, segments = span_of(run.block_runs()), heap.memory_segments()
    assert span is not None
    assert span_of(padded.block_runs()) is None
    assert parts_of_span(None, run.runs, 4 * BLOCK, segments) is None
    assert parts_of_span(span, padded.runs, 4 * (BLOCK - 1), segments) is None
    assert parts_of_span((span[0], span[1] + BLOCK), run.runs, 4 * BLOCK, segments) is None
    assert parts_of_span(span, run.runs, 4 * BLOCK, [(0, BLOCK, 1 << 30)]) is None
