"""``batched_store(heads=)``: chunks of some heads, compared with the engine's own tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_heaps import heap_of

from kvheap import MemoryBatch, MemoryFormat, PagedKVCache, load, offload, store

F = MemoryFormat
LAYERS, BLOCKS, N, HEADS, DIM, CHUNK = 3, 12, 4, 4, 8, 8
TOKENS = 19
SLOTS = np.random.default_rng(3).permutation(BLOCKS * N)[:TOKENS]
TO = range(29, 29 + TOKENS)
STACKED = [F.KV_2LTD, F.KV_2TLD, F.KV_PL2TD, F.KV_2PHTLD, F.KV_PHL2TD, F.KV_MLA_FMT]
FORMATS = [*STACKED, F.KV_2TD, F.KV_T2D]
SOME = [slice(1, 3), slice(0, 2), slice(-1, None), slice(None), slice(3, 4)]


def engine(heads: int = HEADS, dtype: torch.dtype = torch.float32) -> PagedKVCache:
    tensors = [torch.randn(2, BLOCKS, N, heads, DIM).to(dtype) for _ in range(LAYERS)]
    return PagedKVCache.of("vllm-flash-nhd", tensors)


def zeros(heads: int = HEADS, dtype: torch.dtype = torch.float32) -> PagedKVCache:
    tensors = [torch.zeros(2, BLOCKS, N, heads, DIM, dtype=dtype) for _ in range(LAYERS)]
    return PagedKVCache.of("vllm-flash-nhd", tensors)


def kv(cache: PagedKVCache, slots: Any) -> torch.Tensor:
    """What the engine's tensors hold, ``[L, 2, T, H, C]``."""
    places = torch.as_tensor(np.asarray(slots))
    rows = [tensor.reshape(2, BLOCKS * N, -1, DIM)[:, places] for tensor in cache.tensors]
    return torch.stack(rows)


def stored(cache: PagedKVCache, heap: Any = None, **how: Any) -> MemoryBatch:
    batch = (heap or heap_of(64)).batched_store(cache, SLOTS, CHUNK, **how)
    assert batch is not None
    return batch


@pytest.mark.parametrize("heads", SOME, ids=str)
class TestSomeHeads:
    @pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
    def test_comes_back_into_the_same_heads(self, heads: slice, fmt: MemoryFormat) -> None:
        source, target = engine(), zeros()
        batch = stored(source, fmt=fmt, heads=heads)
        assert batch.size_bytes * HEADS == stored(source, fmt=fmt).size_bytes * len(
            range(HEADS)[heads]
        )
        assert batch.num_tokens == TOKENS
        load(batch, target, TO, heads=heads)
        expected = torch.zeros_like(kv(target, TO))
        expected[..., heads, :] = kv(source, SLOTS)[..., heads, :]
        assert torch.equal(kv(target, TO), expected)

    def test_the_bytes_of_a_chunk(self, heads: slice) -> None:
        source = engine()
        batch = stored(source, heads=heads)
        chosen = kv(source, SLOTS)[..., heads, :]
        found = torch.cat([tensor for tensor in batch.tensors if tensor is not None], dim=2)
        expected = chosen.transpose(0, 1).reshape(2, LAYERS, TOKENS, -1)
        assert torch.equal(found[:, :, :TOKENS], expected)

    @pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
    def test_equals_a_store_into_chunks_of_ones_own(self, heads: slice, fmt: MemoryFormat) -> None:
        source, heap = engine(), heap_of(64, scrub=True)
        batch = stored(source, heap, fmt=fmt, heads=heads)
        own = heap.batched_allocate(batch.shape, batch.dtype, len(batch), fmt)
        assert own is not None
        heap.batched_write(own, torch.zeros_like(heap.batched_read(own)))
        store(source, SLOTS, own, heads=heads)
        for one, other in zip(batch, own, strict=True):
            assert one.metadata.stored == other.metadata.stored
            assert one.metadata.origin == other.metadata.origin
        target, again = zeros(), zeros()
        load(batch, target, TO, heads=heads)
        load(own, again, TO, heads=heads)
        assert torch.equal(kv(target, TO), kv(again, TO))

    def test_a_cache_of_just_so_many_heads_takes_them(self, heads: slice) -> None:
        source = engine()
        rank = zeros(heads=len(range(HEADS)[heads]))
        load(stored(source, heads=heads), rank, TO)
        assert torch.equal(kv(rank, TO), kv(source, SLOTS)[..., heads, :])

    def test_layers_and_heads(self, heads: slice) -> None:
        source, target = engine(), zeros()
        batch = stored(source, heads=heads, layers=range(1, 3))
        load(batch, target, TO, heads=heads, layers=range(1, 3))
        expected = torch.zeros_like(kv(target, TO))
        expected[1:, ..., heads, :] = kv(source, SLOTS)[1:, ..., heads, :]
        assert torch.equal(kv(target, TO), expected)

    def test_converted(self, heads: slice) -> None:
        source, target, whole = (make(dtype=torch.bfloat16) for make in (engine, zeros, zeros))
        batch = stored(source, heads=heads, convert=True)
        load(batch, target, TO, heads=heads, convert=True)
        load(stored(source, convert=True), whole, TO, convert=True)
        expected = torch.zeros_like(kv(target, TO))
        expected[..., heads, :] = kv(whole, TO)[..., heads, :]
        assert torch.equal(kv(target, TO), expected)

    def test_in_part(self, heads: slice) -> None:
        source, target = engine(), zeros()
        batch = stored(source, heap_of(2), heads=heads, allow_partial=True)
        assert batch.num_tokens == min(len(batch) * CHUNK, TOKENS)
        load(batch, target, TO[: batch.num_tokens], heads=heads)
        count = batch.num_tokens
        assert torch.equal(
            kv(target, TO[:count])[..., heads, :], kv(source, SLOTS[:count])[..., heads, :]
        )


class TestOrigin:
    def test_other_heads_are_refused_wherever_the_chunks_go(self) -> None:
        batch = stored(engine(), heads=slice(1, 3))
        heap: Any = batch.allocator
        away = offload(batch, into=heap_of(64))
        assert away is not None
        received = type(batch.metadata).from_bytes(batch.metadata.to_bytes())
        for objs in (batch, list(batch), batch[:], away, heap.view(received)):
            target = zeros()
            for wrong in (slice(0, 2), slice(2, 4)):
                with pytest.raises(ValueError, match="was stored from head 1 "):
                    load(objs, target, TO, heads=wrong)
            with pytest.raises(ValueError, match="heads="):
                load(objs, target, TO)
            assert not kv(target, range(BLOCKS * N)).any()
            load(objs, target, TO, heads=slice(1, 3))
        batch.forget_origin()
        load(batch, zeros(), TO, heads=slice(2, 4))

    def test_ranks_put_together(self) -> None:
        """Two ranks of half the heads store; one engine of all heads loads, and the other way."""
        ranks, whole = [engine(heads=2), engine(heads=2)], zeros()
        for begin, rank in zip((0, 2), ranks, strict=True):
            load(stored(rank), whole, TO, heads=slice(begin, begin + 2))
        assert torch.equal(kv(whole, TO), torch.cat([kv(rank, SLOTS) for rank in ranks], dim=3))
        for begin, rank in zip((0, 2), ranks, strict=True):
            heap = heap_of(64)
            batch = heap.batched_store(whole, list(TO), CHUNK, heads=slice(begin, begin + 2))
            assert batch is not None
            target = zeros(heads=2)
            load(batch, target, SLOTS)
            assert torch.equal(kv(target, SLOTS), kv(rank, SLOTS))


class TestErrors:
    @pytest.mark.parametrize(
        ("heads", "kind", "match"),
        [
            (slice(0, 5), ValueError, "4 heads in steps of 1, got slice\\(0, 5"),
            (slice(2, 2), ValueError, "in steps of 1"),
            (slice(3, 1), ValueError, "in steps of 1"),
            (slice(0, 4, 2), ValueError, "in steps of 1"),
            (slice(None, None, -1), ValueError, "in steps of 1"),
            (slice(-9, 2), ValueError, "in steps of 1"),
            (slice("a", 2), TypeError, "bound of heads"),
            (slice(0, 1.5), TypeError, "bound of heads"),
            (slice(True, 2), TypeError, "bound of heads"),
            (range(2), TypeError, "heads must be a slice"),
            (2, TypeError, "heads must be a slice"),
            ([0, 1], TypeError, "heads must be a slice"),
        ],
        ids=str,
    )
    def test_wrong_heads_allocate_nothing(self, heads: Any, kind: type, match: str) -> None:
        heap = heap_of(64)
        with pytest.raises(kind, match=match):
            heap.batched_store(engine(), SLOTS, CHUNK, heads=heads)
        assert heap.stats().allocated_bytes == 0
        assert heap.stats().failed_allocations == 0

    def test_a_latent_has_one_head(self) -> None:
        cache = PagedKVCache.of("mla", [torch.rand(BLOCKS, N, 16) for _ in range(2)])
        heap = heap_of(64)
        batch = heap.batched_store(cache, SLOTS, CHUNK, heads=slice(0, 1))
        assert batch is not None
        with pytest.raises(ValueError, match="1 heads"):
            heap.batched_store(cache, SLOTS, CHUNK, heads=slice(0, 2))

    def test_a_heap_without_room(self) -> None:
        assert heap_of(1).batched_store(engine(), SLOTS, CHUNK, heads=slice(1, 3)) is None
