"""Paged copies of some layers and heads, and paged copies that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_paths import BULK_PATHS, running, sample
from paged_reference import Engine, Sizes
from paged_worlds import (
    BOTH_WAYS,
    FLASH,
    FUSED,
    PADDED,
    SMALL,
    TWO_PLANE_FORMATS,
    World,
    check_copy,
    check_refused,
    random_slots,
)

import kvheap
from kvheap import MemoryFormat
from kvheap.kernels.paged_copy import BlockIds
from kvheap.kernels.paged_layout import PagedKVCache

ON_ALL_PATHS = pytest.mark.parametrize("path", BULK_PATHS)

F = MemoryFormat
HEAD_LAYOUTS = (FLASH, "vllm-flash-hnd", FUSED)


class TestParts:
    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", [F.KV_2LTD, F.KV_2TLD, F.KV_PL2TD], ids=lambda fmt: fmt.name)
    def test_some_layers(self, fmt: MemoryFormat, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, Sizes(5, 3, 4, 2, 8), PADDED, device)
            for chunk_layers in (5, 3):
                world = World(engine, fmt, 7, 4, num_layers=chunk_layers)
                check_copy(world, random_slots(engine, 7), is_store, layers=range(1, 4))

    @ON_ALL_PATHS
    @BOTH_WAYS
    def test_some_layers_of_chunks_of_one_layer(self, is_store: bool, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, Sizes(5, 3, 4, 2, 8), device=device)
            world = World(engine, F.KV_2TD, 7, 4, num_layers=2)
            check_copy(world, random_slots(engine, 7), is_store, layers=range(2, 4))

    @ON_ALL_PATHS
    @BOTH_WAYS
    @pytest.mark.parametrize("fmt", TWO_PLANE_FORMATS, ids=lambda fmt: fmt.name)
    @pytest.mark.parametrize("layout", HEAD_LAYOUTS)
    def test_some_heads(self, layout: str, fmt: MemoryFormat, is_store: bool, path: str) -> None:
        at = TWO_PLANE_FORMATS.index(fmt) + 2 * HEAD_LAYOUTS.index(layout)
        heads_of_both_sides = list(enumerate([(4, 2), (2, 4), (4, 4), (4, 1), (1, 4)]))
        with running(path) as device:
            for number, both in sample(heads_of_both_sides, path, at, count=2):
                engine_heads, chunk_heads = both
                count = min(engine_heads, chunk_heads, 2)
                engine = Engine(layout, Sizes(2, 3, 4, engine_heads, 8), PADDED, device)
                world = World(engine, fmt, 7, 4, num_heads=chunk_heads)
                start = (4 - count, 1, 0)[(at + number) % 3]
                heads = slice(start, start + count)
                check_copy(world, random_slots(engine, 7), is_store, heads=heads)

    @ON_ALL_PATHS
    def test_layers_and_heads_together(self, path: str) -> None:
        with running(path) as device:
            engine = Engine(FLASH, Sizes(4, 3, 4, 4, 8), device=device)
            world = World(engine, F.KV_2LTD, 7, 4, num_layers=2, num_heads=2)
            kept = {"layers": range(2, 4), "heads": slice(1, 3)}
            check_copy(world, random_slots(engine, 7), True, **kept)
            check_copy(world, random_slots(engine, 7), False, **kept)

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


class TestRefused:
    @ON_ALL_PATHS
    @BOTH_WAYS
    def test_slots_out_of_range(self, is_store: bool, path: str) -> None:
        with running(path) as device:
            world = World(Engine(FLASH, SMALL, device=device), F.KV_2LTD, 7, 4)
            for slot in (20, -2, 1 << 31, 1 << 40, -(1 << 40)):
                slots = [0, 1, 2, 3, slot, 5, 6]
                for given in (slots, np.array(slots), torch.tensor(slots)):
                    check_refused(world, ValueError, rf"slots\[4\] is {slot}:", given, is_store)

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
