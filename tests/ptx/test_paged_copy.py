"""The compiled kernel of paged copies, executed: every byte against a copy token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import CAPABILITIES, ON_ALL_CAPABILITIES, needs_compiler
from paged_reference import SPECS, Engine, Sizes, Strides
from paged_worlds import (
    BOTH_WAYS,
    FLASH,
    FUSED,
    PADDED,
    SMALL,
    TWO_PLANE_FORMATS,
    World,
    format_of,
    random_slots,
    slots_of_blocks,
)
from ptx_machine.jit import running_ptx
from ptx_machine.memory import GlobalMemory
from ptx_paged import check_compiled_copy

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.engine import transfers
from kvheap.kernels import LAYOUTS

pytestmark = needs_compiler

F = MemoryFormat


@BOTH_WAYS
@pytest.mark.parametrize("layout", SPECS)
def test_every_layout(layout: str, is_store: bool) -> None:
    """Each way for another GPU: kernels of copies are much the same for all."""
    number = list(SPECS).index(layout) + is_store
    strides, capability = [Strides(), PADDED][number % 2], CAPABILITIES[number % 3]
    engine = Engine(layout, SMALL, strides)
    num_tokens = 5 if layout == "opaque" else 11
    world = World(engine, format_of(layout), num_tokens, chunk_tokens=4)
    check_compiled_copy(world, random_slots(engine, num_tokens), is_store, capability)


@ON_ALL_CAPABILITIES
@pytest.mark.parametrize("layout", [FUSED, *sorted(LAYOUTS.keys() - SPECS.keys())])
def test_layouts_of_which_the_reference_knows_no_rows(layout: str, capability: int) -> None:
    """Beside the same copies on the CPU."""
    sizes = {"L": 2, "B": 6, "H": 6, "N": 4}
    shape = [sizes.get(dim, 18) for dim in LAYOUTS[layout].dims]
    tensor, blocks = torch.randint(0, 256, shape, dtype=torch.uint8), BlockIds([4, 0, 5, 2, 1])
    cache = PagedKVCache.of(layout, tensor)
    heap = TensorMemoryAllocator(torch.zeros(1 << 14, dtype=torch.uint8), 64)
    batch = heap.batched_store(cache, blocks, chunk_tokens=8)
    assert batch is not None
    stored = heap.buffer.clone()
    heap.buffer.zero_()
    with running_ptx(capability, GlobalMemory(reads=[tensor], writes=[heap.buffer])):
        kvheap.store(cache, blocks, batch)
    assert torch.equal(heap.buffer, stored)
    tensor.zero_()
    kvheap.load(batch, cache, blocks)
    loaded = tensor.clone()
    tensor.zero_()
    with running_ptx(capability, GlobalMemory(reads=[heap.buffer], writes=[tensor])):
        kvheap.load(batch, cache, blocks)
    assert loaded.any()
    assert torch.equal(tensor, loaded)


@BOTH_WAYS
@pytest.mark.parametrize("fmt", [*TWO_PLANE_FORMATS, F.KV_MLA_FMT], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("layout", [FLASH, FUSED])
def test_every_format(layout: str, fmt: MemoryFormat, is_store: bool) -> None:
    strides = Strides() if fmt is F.KV_MLA_FMT else PADDED
    engine = Engine(layout, SMALL, strides)
    capability = CAPABILITIES[[*TWO_PLANE_FORMATS, F.KV_MLA_FMT].index(fmt) % 3]
    check_compiled_copy(World(engine, fmt, 11, 4), random_slots(engine, 11), is_store, capability)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (FLASH, Sizes(2, 20, 1, 3, 7, torch.uint8)),
        ("kv-tuples", Sizes(1, 2, 64, 1, 33, torch.float16)),
        ("indexer", Sizes(2, 2, 64, 1, 128)),
        ("mla", Sizes(1, 3, 16, 1, 656, torch.uint8)),
        ("mla", Sizes(2, 2, 64, 1, 576)),
        ("vllm-flash-hnd", Sizes(1, 3, 16, 2, 80)),
        (FUSED, Sizes(1, 3, 16, 2, 128, torch.float8_e4m3fn)),
        (FLASH, Sizes(1, 3, 16, 8, 128)),
        ("sglang-mha", Sizes(1, 12, 1, 16, 2048)),
        ("opaque", Sizes(2, 3, 64, 1, 512)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.num_heads}x{value.head_dim}",
)
def test_rows_of_1_byte_to_64_kib(layout: str, sizes: Sizes, is_store: bool) -> None:
    """Rows of real models, and rows and blocks of all widths of access."""
    engine = Engine(layout, sizes, Strides(guard=32))
    num_tokens = min(engine.num_slots // 2 + 1, 10)
    world = World(engine, format_of(layout), num_tokens, chunk_tokens=8)
    check_compiled_copy(world, random_slots(engine, num_tokens), is_store, 90)


@BOTH_WAYS
@pytest.mark.parametrize("guard", [1, 2, 4])
def test_tensors_at_any_address(guard: int, is_store: bool) -> None:
    engine = Engine(
        FLASH, replace(SMALL, dtype=torch.uint8), Strides(guard=guard, guard_step=guard)
    )
    check_compiled_copy(World(engine, F.KV_2LTD, 7, 4), random_slots(engine, 7), is_store, 90)


class TestPlaces:
    @ON_ALL_CAPABILITIES
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", "mla", "indexer"])
    def test_blocks_and_runs_of_tokens(self, layout: str, is_store: bool, capability: int) -> None:
        """Of 16 tokens, which are one run where the layout allows it."""
        engine = Engine(layout, Sizes(2, 5, 16, 2, 32))
        world = World(engine, format_of(layout), 60, chunk_tokens=32)
        slots = slots_of_blocks([3, 0, 1, 4], 16, 60)
        given = BlockIds([3, 0, 1, 4], 60)
        check_compiled_copy(world, slots, is_store, capability, given_as=given)
        check_compiled_copy(world, slots, is_store, capability)

    @ON_ALL_CAPABILITIES
    @BOTH_WAYS
    def test_skipped_tokens_and_blocks(self, is_store: bool, capability: int) -> None:
        engine = Engine("mla", SMALL)
        world = World(engine, F.KV_MLA_FMT, 11, 4)
        slots = [-1, 3, 4, -1, -1, 7, 8, 9, -1, 0, -1]
        check_compiled_copy(world, slots, is_store, capability)
        slots = [-1] * 4 + list(range(8, 12)) + [-1] * 3
        given = BlockIds([-1, 2, -1], 11)
        check_compiled_copy(world, slots, is_store, capability, given_as=given)
        check_compiled_copy(world, [-1] * 11, is_store, capability)

    @ON_ALL_CAPABILITIES
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FLASH, "indexer"])
    def test_within_a_budget(
        self, layout: str, is_store: bool, capability: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two programs copy all tiles, in rows of one length and of two."""
        run_copy = transfers.run_copy
        monkeypatch.setattr(transfers, "run_copy", lambda copy: run_copy(copy, max_sms=2))
        engine = Engine(layout, Sizes(3, 20, 16, 2, 128))
        world = World(engine, format_of(layout), 150, chunk_tokens=64)
        gpu = check_compiled_copy(world, random_slots(engine, 150), is_store, capability)
        assert [launch.num_blocks for launch in gpu.launches] == [2]


@ON_ALL_CAPABILITIES
@BOTH_WAYS
@pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", FUSED])
def test_some_layers_and_heads(layout: str, is_store: bool, capability: int) -> None:
    engine = Engine(layout, Sizes(4, 3, 4, 4, 8), PADDED)
    world = World(engine, F.KV_2LTD, 7, 4, num_layers=2, num_heads=2)
    kept: dict[str, Any] = {"layers": range(2, 4), "heads": slice(1, 3)}
    check_compiled_copy(world, random_slots(engine, 7), is_store, capability, **kept)
    world = World(engine, F.KV_2TD, 7, 4)
    check_compiled_copy(world, random_slots(engine, 7), is_store, capability)
