"""Paged copies against a copy token by token: the CPU path, the interpreted kernel, a GPU.

Every check compares every byte of the engine's storages and of the heap's buffers, so what lies
between and around must be as before.
"""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from paged_reference import (
    ONE_PLANE,
    SPECS,
    Engine,
    Sizes,
    Strides,
    World,
    pairs,
    slots_of_blocks,
)

import kvheap
from kvheap import LifetimeError, MemoryFormat, TensorMemoryAllocator
from kvheap.kernels import paged_copy
from kvheap.kernels.launch import triton
from kvheap.kernels.paged_copy import BlockIds
from kvheap.kernels.paged_layout import PagedKVCache

needs_triton = pytest.mark.skipif(triton is None, reason="needs the triton package")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PATHS = [
    "cpu",
    pytest.param("interpreter", marks=needs_triton),
    pytest.param("cuda", marks=needs_gpu),
]
BOTH_WAYS = pytest.mark.parametrize("is_store", [True, False], ids=["store", "load"])
ON_ALL_PATHS = pytest.mark.parametrize("path", PATHS)

F = MemoryFormat
TWO_PLANE_FORMATS = (F.KV_2LTD, F.KV_2TD, F.KV_T2D, F.KV_2TLD, F.KV_PL2TD)
SMALL = Sizes(num_layers=2, num_blocks=5, block_size=4, num_heads=3, head_dim=8)
PADDED = Strides(padding=8, guard=24)
FLASH = "vllm-flash-nhd"
FUSED = "vllm-lbhnc"


@contextmanager
def running(path: str) -> Iterator[torch.device]:
    """The device on which copies take this path; "interpreter" runs the Triton kernels."""
    if path != "interpreter":
        yield torch.device(path)
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(paged_copy).items()):
            if isinstance(value, JITFunction):
                patch.setattr(paged_copy, name, InterpretedFunction(value.fn))
        patch.setattr(paged_copy, "_copy_on_cpu", paged_copy._copy_on_gpu)
        yield torch.device("cpu")


def format_of(layout: str) -> MemoryFormat:
    return F.KV_MLA_FMT if layout in (*ONE_PLANE, "indexer") else F.KV_2LTD


def cache_of(engine: Engine) -> PagedKVCache:
    return PagedKVCache.of(engine.layout, engine.tensors, block_size=engine.block_size)


def random_slots(engine: Engine, num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).permutation(engine.num_slots)[:num_tokens].tolist()


def transfer(world: World, slots: Any, is_store: bool, **kept: Any) -> None:
    cache = cache_of(world.engine)
    if is_store:
        kvheap.store(cache, slots, world.batch, **kept)
    else:
        kvheap.load(world.batch, cache, slots, **kept)


def check(
    world: World, slots: Sequence[int], is_store: bool, given_as: Any = None, **kept: Any
) -> None:
    """Move what is at the slots, named as they are or in another way; look at every byte; undo."""
    before = world.snapshot()
    expected = world.expected(slots, is_store, **kept)
    moved = world.differences(expected)
    assert bool(moved) == any(slot >= 0 for slot in slots)  # there is something to see
    transfer(world, slots if given_as is None else given_as, is_store, **kept)
    assert world.differences(expected) == []
    world.restore(before)


def check_refused(
    world: World, error: type[Exception], message: str, slots: Any, is_store: bool, **kept: Any
) -> None:
    before = world.snapshot()
    with pytest.raises(error, match=message):
        transfer(world, slots, is_store, **kept)
    assert world.differences(before) == []


class TestLayouts:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("strides", [Strides(), PADDED], ids=["tight", "padded"])
    @pytest.mark.parametrize("layout", SPECS)
    def test_every_layout(self, layout: str, strides: Strides, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, strides, device)
            num_tokens = 5 if layout == "opaque" else 11
            world = World(engine, format_of(layout), num_tokens, chunk_tokens=4)
            check(world, random_slots(engine, num_tokens), is_store)

    @ON_ALL_PATHS
    @pytest.mark.parametrize("layout", [name for name, spec in SPECS.items() if spec.physical])
    def test_layers_as_a_list(self, layout: str, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, PADDED, device, is_list=True)
            check(World(engine, F.KV_2LTD, 11, 4), random_slots(engine, 11), True)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", TWO_PLANE_FORMATS, ids=lambda fmt: fmt.name)
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", FUSED, "sglang-mha"])
    def test_every_format(self, layout: str, fmt: MemoryFormat, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, PADDED, device)
            check(World(engine, fmt, 11, 4), random_slots(engine, 11), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FUSED, "vllm-blnhc", FLASH])
    def test_k_and_v_side_by_side_in_one_plane(
        self, layout: str, is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, Strides(), device)
            check(World(engine, F.KV_MLA_FMT, 11, 4), random_slots(engine, 11), is_store)

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
    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.float32]
    )
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", FUSED, "mla"])
    def test_every_dtype_is_copied_bit_by_bit(
        self, layout: str, dtype: torch.dtype, is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine(layout, Sizes(2, 4, 4, 2, 24, dtype), PADDED, device)
            check(World(engine, format_of(layout), 9, 4), random_slots(engine, 9), is_store)

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
            num_tokens = engine.num_slots // 2 + 1
            world = World(engine, format_of(layout), num_tokens, chunk_tokens=16)
            check(world, random_slots(engine, num_tokens), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("guard", [1, 2, 3, 4, 8])
    def test_tensors_at_any_address(self, guard: int, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, Strides(guard=guard, guard_step=guard), device)
            check(World(engine, F.KV_2LTD, 7, 4), random_slots(engine, 7), is_store)

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
            check(world, random_slots(engine, 7), is_store, **kept)


class TestSlots:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", "mla", "indexer"])
    def test_minus_one_skips_a_token(self, layout: str, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, device=device)
            world = World(engine, format_of(layout), 11, 4)
            check(world, [-1, 3, 4, -1, -1, 7, 8, 9, -1, 0, -1], is_store)
            check(world, [4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10], is_store)
            check(world, [-1] * 11, is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 12, 13])
    def test_the_last_chunk_may_be_partly_filled(
        self, num_tokens: int, is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine("mla", SMALL, device=device)
            world = World(engine, F.KV_MLA_FMT, num_tokens, 4)
            check(world, list(range(2, 2 + num_tokens)), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 5, 6, 7, 16])
    @pytest.mark.parametrize("layout", [FLASH, "mla"])
    def test_chunks_need_not_be_whole_blocks(
        self, layout: str, chunk_tokens: int, is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, device=device)
            world = World(engine, format_of(layout), 13, chunk_tokens)
            check(world, slots_of_blocks([3, 0, 4, 1], 4, 13), is_store)
            check(
                world,
                slots_of_blocks([2, 3, 4, 1], 4, 13),
                is_store,
                given_as=BlockIds([2, 3, 4, 1], 13),
            )

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("strides", [Strides(), PADDED], ids=["tight", "padded"])
    @pytest.mark.parametrize("num_tokens", [13, 16, None])
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", "mla", "indexer", FUSED])
    def test_block_ids_mean_their_slots(
        self, layout: str, num_tokens: int | None, strides: Strides, is_store: bool, path: str
    ) -> None:
        ids = [3, 0, 1, 2]
        with running(path) as device:
            engine = Engine(layout, SMALL, strides, device)
            world = World(engine, format_of(layout), num_tokens or 16, 8)
            slots = slots_of_blocks(ids, 4, num_tokens or 16)
            for given in (ids, np.array(ids, np.int32), torch.tensor(ids)):
                check(world, slots, is_store, given_as=BlockIds(given, num_tokens))

    @BOTH_WAYS
    def test_a_block_id_of_minus_one_skips_its_block(self, is_store: bool) -> None:
        engine = Engine("mla", SMALL)
        world = World(engine, F.KV_MLA_FMT, 11, 4)
        slots = [-1] * 4 + list(range(8, 12)) + [-1] * 3
        check(world, slots, is_store, given_as=BlockIds([-1, 2, -1], 11))

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize(
        "convert",
        [np.array, torch.tensor, tuple, lambda slots: np.array(slots, np.int32)],
        ids=["numpy", "torch", "tuple", "int32"],
    )
    def test_slots_in_any_form(
        self, convert: Callable[[list[int]], Any], is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            slots = random_slots(engine, 7)
            check(World(engine, F.KV_2LTD, 7, 4), slots, is_store, given_as=convert(slots))

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("layout", ["mla", FLASH])
    def test_neighbouring_blocks(self, layout: str, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(layout, SMALL, device=device)
            world = World(engine, format_of(layout), 16, 8)
            check(world, list(range(4, 20)), is_store)
            check(world, list(range(4, 20)), is_store, given_as=BlockIds([1, 2, 3, 4]))
            check(world, list(range(3, 19)), is_store)
            check(world, [*range(8, 16), *range(8)], is_store)
            check(world, list(range(19, 3, -1)), is_store)

    @ON_ALL_PATHS
    def test_a_slot_may_be_stored_twice(self, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            check(World(engine, F.KV_2LTD, 6, 4), [3, 3, 7, 3, 0, 7], True)

    @BOTH_WAYS
    def test_no_tokens_move_nothing(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 0, 4)
        check(world, [], is_store)


class TestParts:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("chunk_layers", [5, 3])
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TLD, F.KV_PL2TD], ids=lambda fmt: fmt.name)
    def test_some_layers(
        self, fmt: MemoryFormat, chunk_layers: int, is_store: bool, path: str
    ) -> None:
        with running(path) as device:
            engine = Engine(FLASH, Sizes(5, 3, 4, 2, 8), PADDED, device)
            world = World(engine, fmt, 7, 4, num_layers=chunk_layers)
            check(world, random_slots(engine, 7), is_store, layers=range(1, 4))

    @ON_ALL_PATHS
    @BOTH_WAYS
    def test_some_layers_of_chunks_of_one_layer(self, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, Sizes(5, 3, 4, 2, 8), device=device)
            world = World(engine, F.KV_2TD, 7, 4, num_layers=2)
            check(world, random_slots(engine, 7), is_store, layers=range(2, 4))

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize(
        ("engine_heads", "chunk_heads"), [(4, 2), (2, 4), (4, 4), (4, 1), (1, 4)]
    )
    @pytest.mark.parametrize("fmt", TWO_PLANE_FORMATS, ids=lambda fmt: fmt.name)
    @pytest.mark.parametrize("layout", [FLASH, "vllm-flash-hnd", FUSED])
    def test_some_heads(
        self,
        layout: str,
        fmt: MemoryFormat,
        engine_heads: int,
        chunk_heads: int,
        is_store: bool,
        path: str,
    ) -> None:
        count = min(engine_heads, chunk_heads, 2)
        with running(path) as device:
            engine = Engine(layout, Sizes(2, 3, 4, engine_heads, 8), PADDED, device)
            world = World(engine, fmt, 7, 4, num_heads=chunk_heads)
            for start in {0, 1, 4 - count}:
                heads = slice(start, start + count)
                check(world, random_slots(engine, 7), is_store, heads=heads)

    @ON_ALL_PATHS
    def test_layers_and_heads_together(self, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, Sizes(4, 3, 4, 4, 8), device=device)
            world = World(engine, F.KV_2LTD, 7, 4, num_layers=2, num_heads=2)
            kept = {"layers": range(2, 4), "heads": slice(1, 3)}
            check(world, random_slots(engine, 7), True, **kept)
            check(world, random_slots(engine, 7), False, **kept)

    @pytest.mark.parametrize("num_ranks", [2, 4])
    def test_ranks_fill_the_chunks_of_a_whole_cache(self, num_ranks: int) -> None:
        whole = Engine(FLASH, Sizes(2, 5, 4, 4, 8), seed=7)
        world = World(whole, F.KV_2LTD, 11, 4)
        slots, count = random_slots(whole, 11), 4 // num_ranks
        expected = world.expected(slots, is_store=True)
        for rank in range(num_ranks):
            heads = slice(rank * count, (rank + 1) * count)
            shards = [tensor[:, :, :, heads] for tensor in whole.tensors]
            shard = PagedKVCache.of("vllm-flash-hnd", [t.transpose(2, 3) for t in shards])
            kvheap.store(shard, slots, world.batch, heads=heads)
        assert world.differences(expected) == []


class TestHeap:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
    def test_chunks_in_several_buffers(self, fmt: MemoryFormat, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            world = World(engine, fmt, 19, 4, num_buffers=3)
            segments = np.searchsorted(world.heap._segment_starts, world.batch.addresses, "right")
            assert len(set(segments.tolist())) > 1
            check(world, random_slots(engine, 19), is_store)

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("align_bytes", [2, 4, 8, 16])
    def test_chunks_at_any_address(self, align_bytes: int, is_store: bool, path: str) -> None:
        sizes = Sizes(1, 4, 3, 1, 7)  # chunks of 14 bytes a row: no power of two in sight
        with running(path) as device:
            engine = Engine(FLASH, sizes, device=device)
            world = World(engine, F.KV_2LTD, 10, 3, align_bytes=align_bytes)
            check(world, random_slots(engine, 10), is_store)

    @ON_ALL_PATHS
    def test_objects_in_any_order_are_chunks_in_that_order(self, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, SMALL, device=device)
            world, cache = World(engine, F.KV_2LTD, 12, 4), cache_of(engine)
            slots = random_slots(engine, 12)
            expected = world.expected(slots, is_store=True)
            order = [2, 0, 1]
            turned = [slots[4 * at + i] for at in order for i in range(4)]
            kvheap.store(cache, turned, [world.batch[at] for at in order])
            assert world.differences(expected) == []
            for storage in engine.storages:
                storage.fill_(0xA5)
            expected = world.expected(slots, is_store=False)
            kvheap.load([world.batch[at] for at in order], cache, turned)
            assert world.differences(expected) == []

    @pytest.mark.parametrize("layout", [name for name in SPECS if name != "opaque"])
    def test_store_allocates_and_evict_collects(self, layout: str) -> None:
        engine = Engine(layout, SMALL, PADDED)
        cache, slots = cache_of(engine), random_slots(engine, 11)
        heap = TensorMemoryAllocator(torch.full((1 << 20,), 0xA5, dtype=torch.uint8))
        batch = heap.batched_store(cache, slots, chunk_tokens=4)
        assert batch is not None
        assert (len(batch), batch.fmt) == (3, format_of(layout))
        stored = list(pairs(engine, batch, slots))
        assert all(torch.equal(*pair) for pair in stored)
        saved = [engine_row.clone() for engine_row, _ in stored]
        for storage in engine.storages:
            storage.fill_(0x5A)
        heap.batched_load(batch, cache, slots)
        assert all(map(torch.equal, saved, [engine_row for engine_row, _ in stored]))
        contents = torch.stack([obj.tensor for obj in batch])
        out = heap.batched_evict(batch)
        assert torch.equal(out.view(torch.uint8), contents.view(torch.uint8))
        assert heap.stats().allocated_bytes == 0
        assert not batch.live.any()

    @pytest.mark.parametrize("fmt", TWO_PLANE_FORMATS, ids=lambda fmt: fmt.name)
    def test_store_takes_any_format(self, fmt: MemoryFormat) -> None:
        engine = Engine(FLASH, SMALL)
        heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
        slots = random_slots(engine, 11)
        batch = heap.batched_store(cache_of(engine), slots, 8, fmt)
        assert batch is not None
        assert batch.fmt is fmt
        assert all(torch.equal(*pair) for pair in pairs(engine, batch, slots))

    def test_a_full_heap_stores_nothing(self) -> None:
        heap = TensorMemoryAllocator(torch.full((4096,), 0xA5, dtype=torch.uint8))
        slots = list(range(20))
        assert heap.batched_store(cache_of(Engine(FLASH, SMALL)), slots, chunk_tokens=4) is None
        assert heap.stats().allocated_bytes == 0
        assert (heap.buffer == 0xA5).all()

    def test_a_wrong_slot_leaves_nothing_allocated(self) -> None:
        heap = TensorMemoryAllocator(torch.full((1 << 20,), 0xA5, dtype=torch.uint8))
        with pytest.raises(ValueError, match="20"):
            heap.batched_store(cache_of(Engine(FLASH, SMALL)), [0, 20], chunk_tokens=4)
        assert heap.stats().allocated_bytes == 0
        assert (heap.buffer == 0xA5).all()

    @BOTH_WAYS
    def test_a_freed_batch_is_refused(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        world.heap.batched_free(world.batch)
        check_refused(world, LifetimeError, "freed", list(range(7)), is_store)

    @BOTH_WAYS
    def test_one_freed_block_is_enough(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        world.heap.batched_free([world.batch[1]])
        check_refused(world, LifetimeError, "freed", list(range(7)), is_store)

    def test_the_cache_is_not_kept_alive(self) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        cache = cache_of(world.engine)
        kvheap.store(cache, list(range(7)), world.batch)
        seen = weakref.ref(cache)
        del cache
        gc.collect()
        assert seen() is None


class TestRefused:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("slot", [20, -2, 1 << 31, 1 << 40, -(1 << 40)])
    def test_slots_out_of_range(self, slot: int, is_store: bool, path: str) -> None:
        with running(path) as device:
            world = World(Engine(FLASH, SMALL, device=device), F.KV_2LTD, 7, 4)
            slots = [0, 1, 2, 3, slot, 5, 6]
            for given in (slots, np.array(slots), torch.tensor(slots)):
                check_refused(world, ValueError, str(slot), given, is_store)

    @BOTH_WAYS
    @pytest.mark.parametrize("block", [5, -2, 1 << 40])
    def test_blocks_out_of_range(self, block: int, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 8, 4)
        check_refused(world, ValueError, str(block), BlockIds([1, block]), is_store)

    @BOTH_WAYS
    @pytest.mark.parametrize("num_tokens", [0, 4, 9, -1])
    def test_blocks_of_other_tokens(self, num_tokens: int, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 8, 4)
        check_refused(world, ValueError, "token", BlockIds([1, 2], num_tokens), is_store)

    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD], ids=lambda fmt: fmt.name)
    @pytest.mark.parametrize("num_tokens", [0, 4, 9])
    def test_too_few_and_too_many_chunks(
        self, num_tokens: int, fmt: MemoryFormat, is_store: bool
    ) -> None:
        world = World(Engine(FLASH, SMALL), fmt, 8, 4)
        check_refused(world, ValueError, "chunk", list(range(num_tokens)), is_store)

    @BOTH_WAYS
    @pytest.mark.parametrize("slots", [[0.0, 1.0], [True, False], torch.zeros(2)], ids=repr)
    def test_slots_must_be_integers(self, slots: Any, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 2, 4)
        check_refused(world, TypeError, "integers", slots, is_store)

    @BOTH_WAYS
    def test_slots_must_have_one_dimension(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 2, 4)
        check_refused(world, ValueError, "one-dimensional", [[0, 1]], is_store)

    @BOTH_WAYS
    @pytest.mark.parametrize(
        ("kept", "message"),
        [
            ({"layers": range(0, 3)}, "layers"),
            ({"layers": range(-1, 2)}, "layers"),
            ({"layers": range(0, 2, 2)}, "layers"),
            ({"layers": range(1, 1)}, "layers"),
            ({"heads": slice(0, 4)}, "heads"),
            ({"heads": slice(2, 2)}, "heads"),
            ({"heads": slice(0, 3, 2)}, "heads"),
        ],
        ids=str,
    )
    def test_parts_that_are_not_there(
        self, kept: dict[str, Any], message: str, is_store: bool
    ) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        check_refused(world, ValueError, message, list(range(7)), is_store, **kept)

    @BOTH_WAYS
    @pytest.mark.parametrize(
        ("sizes", "kept"),
        [
            ({"num_layers": 3}, {}),
            ({"num_layers": 1}, {}),
            ({"num_heads": 4}, {}),
            ({"num_heads": 2}, {}),
            ({"num_heads": 2}, {"heads": slice(0, 1)}),
            ({"num_layers": 3}, {"layers": range(0, 1)}),
        ],
        ids=str,
    )
    def test_chunks_of_another_size(
        self, sizes: dict[str, int], kept: dict[str, Any], is_store: bool
    ) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4, **sizes)
        check_refused(world, ValueError, "layers|heads", list(range(7)), is_store, **kept)

    @BOTH_WAYS
    def test_another_dtype(self, is_store: bool) -> None:
        world = World(Engine(FLASH, SMALL), F.KV_2LTD, 7, 4)
        other = Engine(FLASH, Sizes(2, 5, 4, 3, 8, torch.float16))
        world.engine = other
        check_refused(world, ValueError, "float16", list(range(7)), is_store)

    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TD, F.KV_T2D], ids=lambda fmt: fmt.name)
    def test_two_planes_for_a_cache_of_one(self, fmt: MemoryFormat, is_store: bool) -> None:
        world = World(Engine("mla", SMALL), fmt, 7, 4)
        check_refused(world, ValueError, "plane", list(range(7)), is_store)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[int], bool]:
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
    if not spec.physical and layout not in ("indexer", "opaque"):
        order = "".join(draw(st.permutations(spec.dims[:-1]))) + spec.dims[-1]
    padding, guard = draw(st.sampled_from([0, 0, 1, 4, 8])), draw(st.integers(0, 16))
    engine = Engine(layout, sizes, Strides(padding, guard, draw(st.integers(0, 4)), order))
    formats = TWO_PLANE_FORMATS if format_of(layout) is F.KV_2LTD else (F.KV_MLA_FMT,)
    num_tokens = draw(st.integers(1, engine.num_slots))
    world = World(
        engine,
        draw(st.sampled_from(formats)),
        num_tokens,
        chunk_tokens=2 * draw(st.integers(1, 6)),
        num_buffers=draw(st.integers(1, 2)),
        align_bytes=draw(st.sampled_from([4, 8, 16, 256])),
    )
    slots = random_slots(engine, num_tokens, draw(st.integers(0, 1000)))
    how = draw(st.sampled_from(["random", "random", "sorted", "from the start", "skipping"]))
    if how == "sorted":
        slots.sort()
    elif how == "from the start":
        slots = list(range(num_tokens))
    elif how == "skipping":
        slots = [slot if slot % 3 else -1 for slot in slots]
    return world, slots, draw(st.booleans())


@pytest.mark.parametrize(
    ("path", "count"), [("cpu", 200), pytest.param("interpreter", 60, marks=needs_triton)]
)
def test_any_strides_and_sizes(path: str, count: int) -> None:
    @settings(max_examples=count, deadline=None)
    @hypothesis.given(drawn=worlds())
    def look(drawn: tuple[World, list[int], bool]) -> None:
        world, slots, is_store = drawn
        with running(path):
            check(world, slots, is_store)

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


@pytest.mark.parametrize("path", ["cpu", pytest.param("interpreter", marks=needs_triton)])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    def test_a_cache_of_more_than_eight_gib(self) -> None:
        num_blocks = 140_000  # 2 x 140,000 x 16,384 elements: more than 2**32
        tensor = torch.zeros(2, num_blocks, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
        tokens = tensor.view(torch.int16).view(2, -1, 1024)
        slots = torch.randperm(16 * num_blocks, device="cuda")[:4096]
        slots[0], slots[1] = 16 * num_blocks - 1, 0
        slots = slots.unique()
        whole = torch.randint(1, 1 << 14, (2, len(slots), 1024), dtype=torch.int16, device="cuda")
        tokens[:, slots] = whole
        cache = PagedKVCache.of(FLASH, [tensor])
        heap = TensorMemoryAllocator(torch.zeros(64 << 20, dtype=torch.uint8, device="cuda"))
        num_chunks = -(-len(slots) // 256)
        batch = heap.batched_allocate((2, 1, 256, 1024), torch.bfloat16, num_chunks)
        assert batch is not None
        for given in (slots.tolist(), slots, slots.int()):
            kvheap.store(cache, given, batch)
            found = torch.cat([obj.tensor.view(torch.int16)[:, 0] for obj in batch], 1)
            assert torch.equal(found[:, : len(slots)], whole)
            tokens[:, slots] = 0
            kvheap.load(batch, cache, given)
            assert torch.equal(tokens[:, slots], whole)
            assert int(tokens.count_nonzero()) == whole.numel()

    @pytest.mark.parametrize("is_pinned", [False, True])
    @pytest.mark.parametrize("as_blocks", [False, True])
    def test_a_layer_stack_of_a_real_model(self, as_blocks: bool, is_pinned: bool) -> None:
        shape = (2, 1024, 16, 8, 128)
        tensors = [torch.randn(shape, device="cuda").bfloat16() for _ in range(32)]
        cache = PagedKVCache.of(FLASH, tensors)
        memory = torch.zeros(300 << 20, dtype=torch.uint8)
        memory = memory.pin_memory() if is_pinned else memory.cuda()
        heap = TensorMemoryAllocator(memory)
        ids = torch.randperm(1024)[:120]
        slots = (ids[:, None] * 16 + torch.arange(16)).view(-1)
        batch = heap.batched_allocate((2, 32, 256, 1024), torch.bfloat16, 8)
        assert batch is not None
        kvheap.store(cache, BlockIds(ids) if as_blocks else slots, batch)
        torch.cuda.synchronize()
        wanted = torch.stack([t.view(2, -1, 1024)[:, slots.cuda()] for t in tensors], 1)
        chunks = torch.cat([obj.tensor for obj in batch], 2)
        assert torch.equal(chunks[:, :, : len(slots)].cuda(), wanted)
        saved = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.view(2, -1, 1024)[:, slots.cuda()] = 0
        kvheap.load(batch, cache, BlockIds(ids) if as_blocks else slots)
        assert all(torch.equal(a, b) for a, b in zip(tensors, saved, strict=True))

    def test_bad_slots_on_the_device_are_skipped_and_reported(self) -> None:
        engine = Engine(FLASH, SMALL, device="cuda")
        world, cache = World(engine, F.KV_2LTD, 7, 4), cache_of(engine)
        expected = world.expected([0, 1, -1, 3, -1, 5, 6], is_store=True)
        slots = torch.tensor([0, 1, 20, 3, -2, 5, 6], device="cuda")
        kvheap.store(cache, slots, world.batch)
        assert world.differences(expected) == []
        with pytest.raises(ValueError, match=r"token 2 .* 20"):
            paged_copy.raise_bad_slots(cache)
        paged_copy.raise_bad_slots(cache)

    def test_a_launch_does_not_wait_for_the_device(self) -> None:
        world = World(Engine(FLASH, SMALL, device="cuda"), F.KV_2LTD, 7, 4)
        slots = np.arange(7)
        transfer(world, slots, is_store=True)  # compiled now
        expected = world.expected(range(7), is_store=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # about a second of cycles
        transfer(world, slots, is_store=True)
        assert not torch.cuda.current_stream().query()
        slots[:] = 0  # already copied: the caller's array is its own again
        torch.cuda.synchronize()
        assert world.differences(expected) == []
