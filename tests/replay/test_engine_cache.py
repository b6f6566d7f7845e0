"""EngineCache: each layout's own addressing, and replays that find every wrong byte."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvheap import TensorMemoryAllocator
from kvheap.engine.chunks import load
from kvheap.kernels.paged_layout import LAYOUTS
from kvheap.prefix import PrefixStore
from kvheap.replay.contents import Contents
from kvheap.replay.copies import EngineCopies
from kvheap.replay.engine_cache import ENGINE_LAYOUTS, MAX_POOL_BYTES, EngineCache
from kvheap.replay.geometry import GEOMETRIES, Geometry
from kvheap.replay.replay import Replay

CPU = torch.device("cpu")
SMALL = {GEOMETRIES[name].kind: GEOMETRIES[name] for name in GEOMETRIES if "small" in name}

each_layout = pytest.mark.parametrize("layout", ENGINE_LAYOUTS)


def geometry_of(layout: str) -> Geometry:
    return SMALL[ENGINE_LAYOUTS[layout].kind]


def engine_of(layout: str, num_blocks: int = 100) -> EngineCache:
    return EngineCache(layout, geometry_of(layout), CPU, num_blocks)


def heap_of(chunks: int, geometry: Geometry) -> TensorMemoryAllocator:
    buffer = torch.zeros(chunks * geometry.chunk_bytes, dtype=torch.uint8)
    return TensorMemoryAllocator(buffer, on_full=None)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_there_is_one_for_each_layout() -> None:
    assert set(ENGINE_LAYOUTS) == set(LAYOUTS)


@each_layout
def test_chunks_are_read_as_they_were_written_and_nothing_else_is(layout: str) -> None:
    engine = engine_of(layout)
    taken = engine.take(3)
    chunks = Contents(geometry_of(layout), CPU).of([7, 8, 9])
    engine.write(taken, chunks)
    assert torch.equal(bits(engine.read(taken)), bits(chunks))
    others = torch.ones(100, dtype=torch.bool)
    others[taken] = False
    for layer in range(2):
        for plane in engine._planes(layer):
            assert not bits(plane[others]).any()
            assert bits(plane[taken]).any()


@each_layout
def test_every_row_is_where_the_paged_cache_says(layout: str) -> None:
    engine, geometry = engine_of(layout), geometry_of(layout)
    cache = engine.cache
    assert cache.token_bytes * geometry.shape[2] == geometry.chunk_bytes
    assert (cache.num_blocks, cache.num_layers) == (100, geometry.num_layers)
    for layer in range(geometry.num_layers):
        planes = engine._planes(layer)
        assert len(planes) == cache.num_planes
        for number, (plane, strides) in enumerate(zip(planes, cache.planes, strict=True)):
            for block, slot, head in product((0, 1, 99), *map(range, plane.shape[1:3])):
                row = plane[block, slot, head]
                offset = block * strides.block_stride + slot * strides.slot_stride
                offset += head * strides.head_stride
                assert row.data_ptr() == cache.base_addresses[layer, number] + offset
                assert row.numel() * row.element_size() == strides.row_bytes


@each_layout
def test_chunks_go_through_the_heap_into_other_blocks(layout: str) -> None:
    engine, geometry = engine_of(layout, 400), geometry_of(layout)
    heap = heap_of(3, geometry)
    chunks = Contents(geometry, CPU).of([1, 2, 3])
    first, second = engine.take(6).split(3)
    engine.write(first, chunks)
    batch = heap.batched_store(engine.cache, engine.slots(first), geometry.shape[2])
    assert (batch.shape, batch.dtype, batch.fmt) == (geometry.shape, geometry.dtype, geometry.fmt)
    for found, expected in zip(batch, chunks, strict=True):
        assert torch.equal(bits(found.tensor), bits(expected))
    load([batch[2], batch[0], batch[1]], engine.cache, engine.slots(second))
    assert torch.equal(bits(engine.read(second)), bits(chunks[[2, 0, 1]]))
    assert torch.equal(bits(engine.read(first)), bits(chunks))


def test_blocks_are_handed_out_at_random_by_the_seed() -> None:
    geometry = SMALL["latent"]
    engines = [EngineCache("mla", geometry, CPU, 100, seed) for seed in (-1, -1, 1 << 70)]
    taken = [engine.take(3) for engine in engines]
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], taken[2])
    assert not torch.equal(taken[0], engines[0].take(3))
    assert taken[0].shape == (3, 32)
    ids = taken[0].flatten()
    assert len(ids.unique()) == 96
    assert not torch.equal(ids, ids.sort().values)
    assert ids.min() >= 0
    assert ids.max() < 100


@pytest.mark.parametrize(
    ("layout", "geometry", "num_chunks"),
    [
        ("trtllm", "small", 128),
        ("opaque", "small-opaque", 128),
        ("vllm-blhnc", "gpt-oss-20b", 10),
        ("kv-tuples", "llama-3-8b", 4),
        ("vllm-flash-nhd", "llama-3-70b", 2),
        ("sglang-mla", "deepseek-v3", 7),
    ],
)
def test_the_pool_is_bounded_and_holds_two_chunks(
    layout: str, geometry: str, num_chunks: int
) -> None:
    engine = EngineCache(layout, GEOMETRIES[geometry], CPU)
    assert engine.num_chunks == num_chunks
    pool_bytes = engine.cache.token_bytes * engine.cache.num_slots
    assert pool_bytes <= max(MAX_POOL_BYTES, 2 * GEOMETRIES[geometry].chunk_bytes)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="mla keeps latent KV, but small is attention KV"):
        EngineCache("mla", SMALL["attention"], CPU)
    with pytest.raises(ValueError, match="takes 32 blocks, got a pool of 31"):
        engine_of("mla", 31)
    with pytest.raises(ValueError, match="room for 3 chunks, got 4"):
        engine_of("mla").take(4)
    with pytest.raises(KeyError):
        EngineCache("vllm", SMALL["latent"], CPU)


class TestReplay:
    def replay_of(self, layout: str, heap_chunks: int = 12, num_blocks: int = 80) -> Replay:
        geometry = geometry_of(layout)
        copies = EngineCopies(engine_of(layout, num_blocks))
        return Replay(heap_of(heap_chunks, geometry), geometry, copies)

    @each_layout
    def test_requests_larger_than_the_engine_go_piece_by_piece(self, layout: str) -> None:
        replay = self.replay_of(layout)
        assert engine_of(layout, 80).num_chunks == 2
        for first in (1, 1, 20, 21, 20, 1, 1):
            replay.serve(range(first, first + 7))
        assert replay.mismatches == 0
        # Hits: 1-7, 21-26, 20-26, 1-4, 1-7. Evicted: 7 6, 5, and for 5-7 again 27 26 25.
        evicted = replay.store.stats().evicted_chunks
        assert (replay.hits, replay.stored, evicted) == (31, 18, 6)

    def test_a_chunk_that_is_named_twice_is_loaded_once(self) -> None:
        replay = self.replay_of("sglang-mha")
        for _ in range(2):
            replay.serve([1, 2, 1, 1, 2, 3])
        assert (replay.hits, replay.mismatches) == (6, 0)

    @each_layout
    def test_a_wrong_bit_in_an_engine_block_before_the_store(
        self, layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = EngineCache.write

        def write_and_spoil(engine: EngineCache, block_ids, chunks) -> None:
            write(engine, block_ids, chunks)
            spoil(engine, block_ids)

        monkeypatch.setattr(EngineCache, "write", write_and_spoil)
        replay = self.replay_of(layout)
        replay.serve([1, 2])
        replay.serve([1, 2])
        assert (replay.hits, replay.mismatches) == (2, 1)

    @each_layout
    def test_a_wrong_bit_in_an_engine_block_after_the_load(
        self, layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = EngineCache.read

        def spoil_and_read(engine: EngineCache, block_ids: torch.Tensor) -> torch.Tensor:
            spoil(engine, block_ids)
            return read(engine, block_ids)

        monkeypatch.setattr(EngineCache, "read", spoil_and_read)
        replay = self.replay_of(layout)
        replay.serve([1, 2])
        replay.serve([1, 2])
        assert (replay.hits, replay.mismatches) == (2, 1)

    @each_layout
    def test_a_wrong_bit_in_the_heap(self, layout: str) -> None:
        replay = self.replay_of(layout)
        replay.serve([1, 2, 3])
        bits_of_chunk(replay.store, 3)[-1] ^= 1
        replay.serve([1, 2, 3, 4])
        assert (replay.hits, replay.mismatches) == (3, 1)

    def test_a_load_that_does_nothing_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvheap.replay.copies.load", lambda *arguments: None)
        replay = self.replay_of("trtllm")
        replay.serve([1, 2])
        replay.serve([1, 2])
        assert replay.mismatches == 2


def spoil(engine: EngineCache, block_ids: torch.Tensor) -> None:
    """Flip the last bit of the second chunk, where the engine keeps it."""
    last = engine._planes(1)[-1][int(block_ids[1, -1])]
    last.view(torch.uint8)[-1, -1, -1] ^= 1


def bits_of_chunk(store: PrefixStore, hash_id: int) -> torch.Tensor:
    (chunk,) = store.chunks([hash_id])
    return chunk.tensor.view(torch.uint8).reshape(-1)
