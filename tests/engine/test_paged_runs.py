"""The runs of paged copies: what they copy, against every layout's own indexing; how few they are.

The copy is replaced by a loop over the runs, and every byte of the engine and the heap is compared.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from paged_reference import ONE_PLANE_FORMATS, SPECS, WITHOUT_KEYS, Engine, Sizes, Strides
from paged_worlds import BOTH_WAYS, TWO_PLANE_FORMATS, World, check_copy, random_slots

from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.engine import transfers
from kvheap.engine.paged_runs import count_runs, pieces_of, units_of
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.token_copy import TokenCopy


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Pieces]:
    """Copies are made run by run; the runs of each."""
    found: list[Pieces] = []

    def copy_runs(copy: TokenCopy, max_sms: int | None = None) -> None:
        units = units_of(copy)
        pieces = pieces_of(copy, units)
        assert len(pieces) <= count_runs(copy, units)
        sizes = pieces.size_array().tolist()
        for source, target, size in zip(
            pieces.sources.tolist(), pieces.targets.tolist(), sizes, strict=True
        ):
            ctypes.memmove(target, source, size)
        found.append(pieces)

    monkeypatch.setattr(transfers, "run_copy", copy_runs)
    return found


PADDED = Strides(padding=8, guard=24, guard_step=8)
CASES = [
    (layout, fmt)
    for layout in SPECS
    for fmt in (ONE_PLANE_FORMATS if layout in WITHOUT_KEYS else TWO_PLANE_FORMATS)
    if layout != "opaque" or fmt is MemoryFormat.KV_MLA_FMT
]


@BOTH_WAYS
@pytest.mark.parametrize(
    ("layout", "fmt"), CASES, ids=lambda each: str(getattr(each, "name", each))
)
def test_every_layout_and_format(
    made: list[Pieces], layout: str, fmt: MemoryFormat, is_store: bool
) -> None:
    sizes = Sizes(num_layers=2, num_heads=4)
    engine = Engine(layout, sizes, PADDED)
    world = World(engine, fmt, 9 if engine.num_slots > 9 else 5, 6)
    slots = random_slots(engine, world.num_tokens)
    check_copy(world, slots, is_store)
    check_copy(
        world, list(range(1, world.num_tokens + 1)), is_store
    ) if layout != "opaque" else None
    check_copy(world, [slot if at % 3 else -1 for at, slot in enumerate(slots)], is_store)
    assert made


@BOTH_WAYS
@pytest.mark.parametrize("fmt", [MemoryFormat.KV_2LTD, MemoryFormat.KV_2TD, MemoryFormat.KV_PHL2TD])
@pytest.mark.parametrize("padding", [0, 8])
def test_some_layers_some_heads_and_blocks(
    made: list[Pieces], fmt: MemoryFormat, padding: int, is_store: bool
) -> None:
    engine = Engine("vllm-flash-nhd", Sizes(num_heads=4), Strides(padding=padding))
    check_copy(
        World(engine, fmt, 10, 4, num_layers=2),
        random_slots(engine, 10),
        is_store,
        layers=range(1, 3),
    )
    if fmt is not MemoryFormat.KV_PHL2TD:
        check_copy(
            World(engine, fmt, 10, 4, num_heads=2),
            random_slots(engine, 10),
            is_store,
            heads=slice(1, 3),
        )
    ids = [3, 4, 0, 6]
    slots = [block * 4 + at for block in ids for at in range(4)][:14]
    check_copy(World(engine, fmt, 14, 4), slots, is_store, BlockIds(ids, num_tokens=14))


def runs(cache: PagedKVCache, slots: object, fmt: MemoryFormat, made: list[Pieces]) -> Pieces:
    heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
    assert heap.batched_store(cache, slots, 32, fmt) is not None  # type: ignore[arg-type]
    return made[-1]


def test_whole_blocks_are_one_run_each(made: list[Pieces]) -> None:
    layers = [torch.randn(2, 16, 16, 2, 8).half() for _ in range(3)]
    cache = PagedKVCache.of("vllm-flash-nhd", layers)
    pieces = runs(cache, BlockIds([9, 2, 5, 7]), MemoryFormat.KV_2LTD, made)
    assert len(pieces) == 4 * 3 * 2
    assert pieces.sizes == 16 * 2 * 8 * 2
    firsts = [
        layers[i][p, b].data_ptr()
        for i, p, b in itertools.product(range(3), range(2), (9, 2, 5, 7))
    ]
    assert pieces.sources.tolist() == firsts  # layer by layer


def test_neighbours_are_merged(made: list[Pieces]) -> None:
    layers = [torch.randn(2, 16, 16, 2, 8).half() for _ in range(3)]
    cache = PagedKVCache.of("vllm-flash-nhd", layers)
    assert len(runs(cache, range(32, 64), MemoryFormat.KV_2LTD, made)) == 6
    assert len(runs(cache, [*range(32, 48), *range(80, 96)], MemoryFormat.KV_2LTD, made)) == 12
    assert len(runs(cache, [*range(0, 64, 2)], MemoryFormat.KV_2LTD, made)) == 32 * 6
    assert len(runs(cache, [-1] * 32, MemoryFormat.KV_2LTD, made)) == 0
    assert runs(cache, [-1] * 31 + [5], MemoryFormat.KV_2LTD, made).sizes == 32
