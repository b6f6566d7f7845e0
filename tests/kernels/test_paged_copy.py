"""Paged copies of any engine layout, size and slots against a copy token by token."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import BULK_PATHS, WITHOUT_A_GPU, needs_triton, running, sample
from paged_reference import (
    DENSE_BLOCKS,
    ONE_PLANE_FORMATS,
    PER_LAYER,
    SPECS,
    Engine,
    Sizes,
    Strides,
)
from paged_worlds import (
    BOTH_WAYS,
    FLASH,
    FUSED,
    PADDED,
    SMALL,
    TWO_PLANE_FORMATS,
    World,
    check_copy,
    format_of,
    random_slots,
    slots_of_blocks,
    transfer,
)

import kvheap
from kvheap import MemoryFormat, TensorMemoryAllocator
from kvheap.kernels import paged_copy
from kvheap.kernels.paged_copy import BlockIds
from kvheap.kernels.paged_layout import PagedKVCache

ON_ALL_PATHS = pytest.mark.parametrize("path", BULK_PATHS)

F = MemoryFormat


class TestLayouts:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", SPECS)
    def test_every_layout(self, layout: str, is_store: bool, path: str) -> None:
        at = list(SPECS).index(layout) + is_store
        with running(path) as device:
            for strides in sample([Strides(), PADDED], path, at, count=1):
                engine = Engine(layout, SMALL, strides, device)
                num_tokens = 5 if layout == "opaque" else 11
                world = World(engine, format_of(layout), num_tokens, chunk_tokens=4)
                check_copy(world, random_slots(engine, num_tokens), is_store)

    @ON_ALL_PATHS
    @pytest.mark.parametrize("layout", [name for name, spec in SPECS.items() if spec.physical])
    def test_layers_as_a_list(self, layout: str, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, PADDED, device, is_list=True)
            check_copy(World(engine, F.KV_2LTD, 11, 4), random_slots(engine, 11), True)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", TWO_PLANE_FORMATS, ids=lambda fmt: fmt.name)
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", FUSED, "sglang-mha"])
    def test_every_format(self, layout: str, fmt: MemoryFormat, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, PADDED, device)
            check_copy(World(engine, fmt, 11, 4), random_slots(engine, 11), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FUSED, "vllm-blnhc", FLASH])
    def test_k_and_v_side_by_side_in_one_plane(
        self, layout: str, is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, Strides(), device)
            check_copy(World(engine, F.KV_MLA_FMT, 11, 4), random_slots(engine, 11), is_store)

    @pytest.mark.parametrize("layout", SPECS)
    def test_a_round_trip_brings_everything_back(self, layout: str) -> None:
        engine = Engine(layout, strides=PADDED)
        world = World(engine, format_of(layout), engine.num_slots, chunk_tokens=6)
        slots = random_slots(engine, engine.num_slots)
        transfer(world, slots, is_store=True)
        stored = world.snapshot()
        for layer, plane, slot, head in np.ndindex(
            engine.sizes.num_layers, engine.num_planes, engine.num_slots, engine.sizes.num_heads
        ):
            engine.row(layer, plane, slot, head).fill_(0xA5)
        assert world.differences(stored)
        transfer(world, slots, is_store=False)
        assert world.differences(stored) == []


class TestSizes:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", FUSED, "mla"])
    def test_every_dtype_is_copied_bit_by_bit(self, layout: str, is_store: bool, path: str) -> None:
        # The first three differ in size, which is all that kernels see of a dtype.
        dtypes = [torch.bfloat16, torch.uint8, torch.float32, torch.float16, torch.float8_e4m3fn]
        with running(path) as device:
            for dtype in sample(dtypes, path, at=0, count=3):
                engine = Engine(layout, Sizes(2, 4, 4, 2, 24, dtype), PADDED, device)
                world = World(engine, format_of(layout), 9, 4)
                check_copy(world, random_slots(engine, 9), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize(
        ("layout", "sizes"),
        [
            ("mla", Sizes(1, 3, 16, 1, 576)),
            ("mla", Sizes(1, 3, 16, 1, 656, torch.uint8)),
            ("mla", Sizes(1, 2, 64, 1, 576)),
            ("indexer", Sizes(2, 2, 64, 1, 128)),
            ("sglang-mla", Sizes(2, 20, 1, 1, 576)),
            (FLASH, Sizes(1, 3, 16, 2, 80)),
            ("vllm-flash-hnd", Sizes(1, 3, 16, 2, 80)),
            (FUSED, Sizes(1, 3, 16, 2, 80)),
            (FLASH, Sizes(2, 40, 1, 3, 7, torch.uint8)),
            ("kv-tuples", Sizes(1, 2, 64, 1, 33, torch.float16)),
            ("opaque", Sizes(2, 6, 5, 1, 33, torch.uint8)),
        ],
        ids=lambda value: (
            value if isinstance(value, str) else f"{value.block_size}x{value.head_dim}"
        ),
    )
    def test_rows_and_blocks_of_real_models(
        self, layout: str, sizes: Sizes, is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine(layout, sizes, Strides(guard=32), device)
            num_tokens = min(engine.num_slots // 2 + 1, 10)
            world = World(engine, format_of(layout), num_tokens, chunk_tokens=8)
            check_copy(world, random_slots(engine, num_tokens), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    def test_tensors_at_any_address(self, is_store: bool, path: str) -> None:
        with running(path) as device:
            for guard in (1, 2, 3, 4, 8):
                engine = Engine(FLASH, SMALL, Strides(guard=guard, guard_step=guard), device)
                check_copy(World(engine, F.KV_2LTD, 7, 4), random_slots(engine, 7), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("kept", [{"layers": range(1, 2)}, {"heads": slice(1, 3)}], ids=str)
    def test_what_is_left_out_may_be_less_aligned(
        self, kept: dict[str, Any], is_store: bool, path: str
    ) -> None:
        strides = Strides(padding=4, guard=4, guard_step=4)  # layer 0 at 8, layer 1 at 16 bytes
        with running(path) as device:
            engine = Engine("mla" if "layers" in kept else FLASH, SMALL, strides, device)
            if "layers" in kept:
                engine = Engine("mla", SMALL, Strides(guard=4, guard_step=4), device)
            world = World(engine, format_of(engine.layout), 7, 4)
            check_copy(world, random_slots(engine, 7), is_store, **kept)


class TestSlots:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", "mla", "indexer"])
    def test_minus_one_skips_a_token(self, layout: str, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, device=device)
            world = World(engine, format_of(layout), 11, 4)
            check_copy(world, [-1, 3, 4, -1, -1, 7, 8, 9, -1, 0, -1], is_store)
            check_copy(world, [4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10], is_store)
            check_copy(world, [-1] * 11, is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    def test_the_last_chunk_may_be_partly_filled(self, is_store: bool, path: str) -> None:
        with running(path) as device:
            for num_tokens in (1, 3, 4, 5, 8, 12, 13):
                engine = Engine("mla", SMALL, device=device)
                world = World(engine, F.KV_MLA_FMT, num_tokens, 4)
                check_copy(world, list(range(2, 2 + num_tokens)), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FLASH, "mla"])
    def test_chunks_need_not_be_whole_blocks(self, layout: str, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, device=device)
            for chunk_tokens in sample((1, 16, 3, 6, 2, 5, 7), path, 3 * is_store, count=4):
                world = World(engine, format_of(layout), 13, chunk_tokens)
                check_copy(world, slots_of_blocks([3, 0, 4, 1], 4, 13), is_store)
                slots = slots_of_blocks([2, 3, 4, 1], 4, 13)
                check_copy(world, slots, is_store, given_as=BlockIds([2, 3, 4, 1], 13))

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", "mla", "indexer", FUSED])
    def test_block_ids_mean_their_slots(self, layout: str, is_store: bool, path: str) -> None:
        ids = [3, 0, 1, 2]
        forms = [ids, np.array(ids, np.int32), torch.tensor(ids)]
        with running(path) as device:
            for strides in sample([Strides(), PADDED], path, len(layout) + is_store, count=1):
                engine = Engine(layout, SMALL, strides, device)
                for given, num_tokens in zip(forms, (13, 16, None), strict=True):
                    world = World(engine, format_of(layout), num_tokens or 16, 8)
                    slots = slots_of_blocks(ids, 4, num_tokens or 16)
                    check_copy(world, slots, is_store, given_as=BlockIds(given, num_tokens))

    @BOTH_WAYS
    def test_a_block_id_of_minus_one_skips_its_block(self, is_store: bool) -> None:
        engine = Engine("mla", SMALL)
        world = World(engine, F.KV_MLA_FMT, 11, 4)
        slots = [-1] * 4 + list(range(8, 12)) + [-1] * 3
        check_copy(world, slots, is_store, given_as=BlockIds([-1, 2, -1], 11))

    @ON_ALL_PATHS
    @BOTH_WAYS
    def test_slots_in_any_form(self, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            slots = random_slots(engine, 7)
            forms = (np.array(slots), torch.tensor(slots), tuple(slots), np.array(slots, np.int32))
            for given in forms:
                check_copy(World(engine, F.KV_2LTD, 7, 4), slots, is_store, given_as=given)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", ["mla", FLASH])
    def test_neighbouring_blocks(self, layout: str, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, device=device)
            world = World(engine, format_of(layout), 16, 8)
            check_copy(world, list(range(4, 20)), is_store)
            check_copy(world, list(range(4, 20)), is_store, given_as=BlockIds([1, 2, 3, 4]))
            check_copy(world, list(range(3, 19)), is_store)
            check_copy(world, [*range(8, 16), *range(8)], is_store)
            check_copy(world, list(range(19, 3, -1)), is_store)

    @ON_ALL_PATHS
    def test_a_slot_may_be_stored_twice(self, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            check_copy(World(engine, F.KV_2LTD, 6, 4), [3, 3, 7, 3, 0, 7], True)

    @BOTH_WAYS
    def test_no_tokens_move_nothing(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 0, 4)
        check_copy(world, [], is_store)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[int], bool, dict[str, Any]]:
    layout = draw(st.sampled_from(list(SPECS)))
    spec = SPECS[layout]
    sizes = Sizes(
        num_layers=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(1, 6)),
        block_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
        num_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 4, 5, 8, 16, 24])),
        dtype=draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32])),
    )
    order = ""
    if not spec.physical and layout not in DENSE_BLOCKS:
        order = "".join(draw(st.permutations(spec.dims[:-1]))) + spec.dims[-1]
    padding, guard = draw(st.sampled_from([0, 0, 1, 4, 8])), draw(st.integers(0, 16))
    engine = Engine(layout, sizes, Strides(padding, guard, draw(st.integers(0, 4)), order))
    formats = TWO_PLANE_FORMATS if format_of(layout) is F.KV_2LTD else ONE_PLANE_FORMATS
    fmt = draw(st.sampled_from(formats))
    kept: dict[str, Any] = {}
    chunk: dict[str, int] = {}
    for name, count in (("layers", engine.sizes.num_layers), ("heads", engine.sizes.num_heads)):
        if draw(st.booleans()):
            last = draw(st.integers(1, count))
            first = draw(st.integers(0, last - 1))
            kept[name] = range(first, last) if name == "layers" else slice(first, last)
            if draw(st.booleans()) or (name == "layers" and fmt in PER_LAYER):
                chunk[f"num_{name}"] = last - first
    num_tokens = draw(st.integers(1, engine.num_slots))
    world = World(
        engine,
        fmt,
        num_tokens,
        chunk_tokens=2 * draw(st.integers(1, 6)),
        num_buffers=draw(st.integers(1, 2)),
        align_bytes=draw(st.sampled_from([4, 8, 16, 256])),
        **chunk,
    )
    slots = random_slots(engine, num_tokens, draw(st.integers(0, 1000)))
    how = draw(st.sampled_from(["random", "random", "sorted", "from the start", "skipping"]))
    if how == "sorted":
        slots.sort()
    elif how == "from the start":
        slots = list(range(num_tokens))
    elif how == "skipping":
        slots = [slot if slot % 3 else -1 for slot in slots]
    return world, slots, draw(st.booleans()), kept


@WITHOUT_A_GPU
def test_any_strides_sizes_and_parts(path: str) -> None:
    @settings(max_examples=50 if path == "interpreter" else 200, deadline=None)
    @given(drawn=worlds())
    def look(drawn: tuple[World, list[int], bool, dict[str, Any]]) -> None:
        world, slots, is_store, kept = drawn
        with running(path):
            check_copy(world, slots, is_store, **kept)

    look()


@needs_triton
def test_no_integer_is_specialized() -> None:
    """A stride of 1 would be compiled as a Python int, which has no ``.to``."""
    integers = [
        param
        for param in paged_copy._copy_tokens_kernel.params
        if not param.is_constexpr and not param.name.endswith("_ptr")
    ]
    assert [param.name for param in integers if not param.do_not_specialize] == []


def untouched_memory(size_bytes: int) -> torch.Tensor:
    """Zeros of which only the pages that are touched become real."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, size_bytes, flags=flags), dtype=torch.uint8)


@WITHOUT_A_GPU
def test_offsets_beyond_two_to_the_31_elements(path: str) -> None:
    num_blocks, row = 80_000, (16, 4, 512)  # 32 KiB a block, 5 GiB of K and V
    tensor = untouched_memory(2 * num_blocks * 32768).view(2, num_blocks, *row)
    cache = PagedKVCache.of(FLASH, [tensor])
    heap = TensorMemoryAllocator(untouched_memory(5 << 30))
    slots = [16 * num_blocks - 1, 0, 65_536, 65_535, 16 * num_blocks - 17]
    whole = torch.randint(0, 256, (2, 5, 4, 512), dtype=torch.uint8)
    tokens = tensor.view(2, -1, 4, 512)
    batch = heap.view([3 << 30, (5 << 30) - 65536], (2, 1, 4, 2048), torch.uint8)
    for at, slot in enumerate(slots):
        tokens[:, slot] = whole[:, at]
    with running(path):
        kvheap.store(cache, slots, batch)
        first, second = (obj.tensor for obj in batch)
        assert torch.equal(first[:, 0], whole[:, :4].view(2, 4, -1))
        assert torch.equal(second[:, 0, :1], whole[:, 4:].view(2, 1, -1))
        assert not second[:, 0, 1:].any()
        tokens[:, slots] = 0
        kvheap.load(batch, cache, slots)
    for at, slot in enumerate(slots):
        assert torch.equal(tokens[:, slot], whole[:, at])
