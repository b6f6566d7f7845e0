"""How often kernels are compiled: a few times for any traffic, and never after a warm-up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compile_ahead import compile_all
from compiled import needs_compiler
from paged_reference import (
    BYTES_ONLY,
    ONE_PLANE_FORMATS,
    PER_LAYER,
    SPECS,
    WITHOUT_KEYS,
    Engine,
    Sizes,
    Strides,
    chunk_shape,
)
from paged_worlds import TWO_PLANE_FORMATS, cache_of
from ptx_machine.jit import Gpu, running_ptx
from sparse import sparse_memory

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.kernels.paged_copy import run_copy
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy
from kvheap.kernels.token_copy import Chunks, TokenCopy

pytestmark = needs_compiler

F = MemoryFormat
CPU = torch.device("cpu")

MAX_FOR_A_CACHE = 4
MAX_FOR_PIECES = 6
MAX_FOR_BLOCKS = 5

SIZES = [
    Sizes(2, 40, 16, 4, 128),
    Sizes(3, 40, 8, 3, 20, torch.float16),  # accesses of 8 bytes
    Sizes(2, 100, 1, 2, 33, torch.uint8),  # of 1 and 2
]


CASES = [(layout, sizes) for layout in SPECS for sizes in SIZES]
CASES.remove(("opaque", SIZES[2]))  # its elements have two bytes
IDS = [f"{layout}-{sizes.head_dim}" for layout, sizes in CASES]


class Traffic:
    """Copies of any kind between one cache and the chunks of one heap."""

    def __init__(
        self, layout: str, sizes: Sizes, seed: int, strides: Strides | None = None
    ) -> None:
        self.engine = Engine(layout, sizes, strides or Strides())
        self.cache = cache_of(self.engine)
        self.heap = TensorMemoryAllocator(sparse_memory(1 << 28), 64, on_full=None)
        self.random = np.random.default_rng(seed)
        is_mla = layout in WITHOUT_KEYS
        self.formats = ONE_PLANE_FORMATS if is_mla else (*TWO_PLANE_FORMATS, F.KV_MLA_FMT)
        if self.cache.layout.whole_blocks:
            self.formats = (F.KV_MLA_FMT, F.KV_PLTD) if is_mla else (F.KV_2LTD, F.KV_MLA_FMT)

    def number(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    def some(self, count: int) -> range | None:
        """Some of so many layers or heads, next to each other, or None."""
        if not self.number(0, 1):
            return None
        first = self.number(0, count - 1)
        return range(first, self.number(first, count - 1) + 1)

    def copy(self) -> None:
        """Store and load some tokens, in a format, of some layers and heads, within a budget."""
        cache, sizes, block = self.cache, self.engine.sizes, self.cache.block_size
        fmt = self.formats[self.number(0, len(self.formats) - 1)]
        is_paged = "G" in (fmt.dim_order or "")
        chunk_tokens = block * self.number(1, 5)
        if not is_paged and not cache.layout.whole_blocks:
            chunk_tokens = self.number(1, 100)
        num_tokens = self.number(1, cache.num_slots)
        ids = self.random.permutation(cache.num_blocks)[: -(-num_tokens // block)]
        if self.number(0, 2) == 0:
            ids = np.arange(len(ids))
        layers = self.some(sizes.num_layers)
        some = self.some(sizes.num_heads)
        heads = None if some is None else slice(some.start, some.stop)
        if sizes.num_heads == 1 or cache.layout.whole_blocks or fmt is F.KV_PHL2TD:
            heads = None
        num_layers = sizes.num_layers if layers is None else len(layers)
        num_heads = sizes.num_heads if heads is None else heads.stop - heads.start
        shape = chunk_shape(self.engine, fmt, chunk_tokens, num_layers, num_heads, block)
        num_chunks = -(-num_tokens // chunk_tokens) * (num_layers if fmt in PER_LAYER else 1)
        batch = self.heap.batched_allocate(shape, cache.dtype, num_chunks, fmt)
        assert batch is not None
        is_skipped = self.random.random(len(ids)) < 0.2
        places: BlockIds | np.ndarray = BlockIds(np.where(is_skipped, -1, ids), num_tokens)
        if cache.layout.whole_blocks:
            places = BlockIds(ids)
            num_chunks = -(-len(ids) * block // chunk_tokens)
            self.heap.batched_free(batch)
            batch = self.heap.batched_allocate(shape, cache.dtype, num_chunks, fmt)
            assert batch is not None
        elif self.number(0, 1):
            tokens = np.arange(num_tokens)
            places = ids[tokens // block] * block + tokens % block
        kvheap.store(cache, places, batch, layers=layers, heads=heads)
        kvheap.load(batch, cache, places, layers=layers, heads=heads)
        self.repeat(shape, fmt, batch.addresses, places, layers, heads)
        self.heap.batched_free(batch)

    def repeat(self, shape, fmt, addresses, places, layers, heads) -> None:  # type: ignore[no-untyped-def]
        """The same copy with places that are on the device, at any address, and with a budget."""
        layout = kvheap.kernels.ChunkLayout.of(fmt.dim_order, shape, self.cache.dtype.itemsize)
        absolute = self.heap.buffer.data_ptr() + np.asarray(addresses)
        chunks = Chunks(self.heap.buffer, absolute, layout.size_bytes, 16, layout)
        copy = TokenCopy.of(
            self.cache, places, chunks, layers, heads, False, bool(self.number(0, 1))
        )
        dtype = [torch.int32, torch.int64][self.number(0, 1)]
        values = torch.tensor(np.asarray(copy.places.values), dtype=dtype)
        values = torch.cat([torch.zeros(3, dtype=dtype), values])[3:]
        copy = replace(copy, places=replace(copy.places, values=values))
        run_copy(copy, max_sms=[None, 1, 16][self.number(0, 2)])


def compiled_of(gpu: Gpu) -> dict[str, int]:
    return {name: count for name, count in gpu.num_compiled().items() if count}


@pytest.mark.parametrize(("layout", "sizes"), CASES, ids=IDS)
def test_a_few_variants_serve_all_traffic_of_a_cache_and_a_warm_up_compiles_them(
    layout: str, sizes: Sizes
) -> None:
    with running_ptx(90, memory=None, is_new=True) as gpu:
        traffic = Traffic(layout, sizes, seed=1)
        for _ in range(25):
            traffic.copy()
        found = compiled_of(gpu)
        assert 0 < found.pop("_copy_tokens_kernel") <= MAX_FOR_A_CACHE
        assert not found
    with running_ptx(90, memory=None, is_new=True) as gpu:
        traffic = Traffic(layout, sizes, seed=2)
        assert kvheap.warm_up(traffic.cache, align_bytes=64) == sum(gpu.num_compiled().values())
        before = compiled_of(gpu)
        assert before["_copy_tokens_kernel"] <= MAX_FOR_A_CACHE
        for _ in range(25):
            traffic.copy()
        assert compiled_of(gpu) == before
        assert kvheap.warm_up(traffic.cache, align_bytes=64) == 0


UNEVEN = {
    "heads of 100 bytes": (Sizes(2, 40, 16, 8, 50), Strides()),
    "heads of 33 bytes": (Sizes(2, 40, 16, 16, 33, torch.uint8), Strides()),
    "layers 2 bytes further each": (Sizes(6, 40, 16, 4, 64, torch.uint8), Strides(guard_step=2)),
    "layers at any byte": (Sizes(5, 40, 16, 1, 64, torch.uint8), Strides(guard_step=3)),
}
"""Caches whose heads and layers are not equally aligned."""


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("layout", ["vllm-flash-nhd", "vllm-flash-hnd", "kv-tuples", "sglang-mha"])
def test_heads_and_layers_that_are_not_equally_aligned_need_no_more(layout: str, kind: str) -> None:
    sizes, strides = UNEVEN[kind]
    with running_ptx(90, memory=None, is_new=True) as gpu:
        traffic = Traffic(layout, sizes, 1, strides)
        assert 2 <= kvheap.warm_up(traffic.cache, align_bytes=64) - 16 <= MAX_FOR_A_CACHE
        before = compiled_of(gpu)
        for _ in range(40):
            traffic.copy()
        assert compiled_of(gpu) == before


def test_clearing_behind_the_last_token_needs_no_kernel_of_its_own() -> None:
    """Also if the chunks are less aligned than the zeros."""
    with running_ptx(90, memory=None, is_new=True) as gpu:
        cache = cache_of(Engine("vllm-flash-nhd", SIZES[0]))
        heap = TensorMemoryAllocator(sparse_memory(1 << 28), 4, on_full=None)
        kvheap.warm_up(cache, align_bytes=4)
        before = compiled_of(gpu)
        batch = heap.batched_store(cache, np.arange(5), 16)
        assert batch is not None
        kvheap.load(batch, cache, np.arange(5), clear_rest=True)
        assert len(gpu.launches) == 3
        assert compiled_of(gpu) == before


def convert(cache: PagedKVCache, heap: TensorMemoryAllocator, seed: int) -> None:
    random = np.random.default_rng(seed)
    for number in range(20):
        num_tokens = int(random.integers(1, cache.num_slots))
        slots = random.permutation(cache.num_slots)[:num_tokens]
        ids = random.permutation(cache.num_blocks)[: -(-num_tokens // cache.block_size)]
        places = BlockIds(ids, num_tokens) if number % 2 else slots
        chunk_tokens = int(random.integers(1, 300))
        batch = heap.batched_store(cache, places, chunk_tokens, convert=True)
        assert batch is not None
        heap.batched_load(batch, cache, places, convert=True)
        shapes, dtypes, num_chunks = batch.layout.shapes, batch.layout.dtypes, len(batch)
        heap.batched_free(batch)
        fmt = batch.layout.fmt
        scales_first = heap.batched_allocate(shapes[::-1], dtypes[::-1], num_chunks, fmt)
        assert scales_first is not None
        kvheap.store(cache, places, scales_first, convert=True)
        kvheap.load(scales_first, cache, places, convert=True)
        heap.batched_free(scales_first)


def test_conversions() -> None:
    """One for each way, and as many where scales come first and leave elements less aligned."""
    with running_ptx(90, memory=None, is_new=True) as gpu:
        cache = cache_of(Engine("vllm-flash-nhd", Sizes(1, 40, 16, 1, 128)))
        heap = TensorMemoryAllocator(sparse_memory(1 << 28), 64, on_full=None)
        convert(cache, heap, seed=1)
        assert compiled_of(gpu) == {"_convert_tokens_kernel": 4}
    with running_ptx(90, memory=None, is_new=True) as gpu:
        kvheap.warm_up(cache, align_bytes=64, convert=True)
        before = compiled_of(gpu)
        assert before["_convert_tokens_kernel"] == 4
        convert(cache, heap, seed=2)
        assert compiled_of(gpu) == before


def copy_any_pieces(seed: int) -> None:
    """Some of one size and of many, at any addresses, each with another budget."""
    random = np.random.default_rng(seed)
    for _ in range(200):
        count, granule = int(random.integers(1, 40)), 1 << int(random.integers(0, 6))
        sizes = random.integers(1, int(random.choice([16, 300, 70_000])), count)
        sizes = sizes * granule if random.random() < 0.7 else sizes
        one_size = int(sizes[0]) if random.random() < 0.5 else sizes
        step = int(sizes.max()) + 64
        starts = [(1 << 40) + random.permutation(count) * (step // 64 * 64 + 64) for _ in "ab"]
        starts[0] += granule * int(random.integers(0, 4))
        pieces = Pieces.of(*starts, one_size)
        ready = PointerCopy.prepare(pieces, CPU)
        ready.run([None, 1, 4, 100][int(random.integers(0, 4))])


def copy_any_blocks(seed: int) -> None:
    """Of any size, stride and address."""
    random = np.random.default_rng(seed)
    buffer = torch.zeros(1 << 22, dtype=torch.uint8)
    for _ in range(60):
        count, granule = int(random.integers(1, 17)), 1 << int(random.integers(0, 6))
        size = int(random.integers(1, 3000)) * granule
        step = -(-size // granule) * granule
        shift, padding = (int(random.integers(0, 3)) * granule for _ in "ab")
        within = buffer[shift:]
        places = random.permutation((len(within) - size) // step)[: 2 * count] * step
        count = len(places) // 2
        dense = torch.empty(count, size + padding, dtype=torch.uint8)[:, :size]
        scatter_blocks(dense, within, places[:count])
        gather_blocks(within, places[count : 2 * count], dense)
        move_blocks(within, places[:count], places[count : 2 * count], size)
        fill_blocks(within, places, size, int(random.integers(0, 256)))


def test_pieces_and_blocks_of_any_kind() -> None:
    with running_ptx(90, memory=None, is_new=True) as gpu:
        copy_any_pieces(seed=1)
        copy_any_blocks(seed=1)
        found = compiled_of(gpu)
        assert 0 < found.pop("_copy_pieces_kernel") <= MAX_FOR_PIECES
        assert 0 < found.pop("_copy_blocks_kernel") <= MAX_FOR_BLOCKS
        assert 0 < found.pop("_fill_blocks_kernel") <= MAX_FOR_BLOCKS
        assert not found
    with running_ptx(90, memory=None, is_new=True) as gpu:
        kvheap.warm_up(CPU)
        before = compiled_of(gpu)
        copy_any_pieces(seed=2)
        copy_any_blocks(seed=2)
        assert compiled_of(gpu) == before


def test_the_tests_on_a_gpu_need_no_other_variants() -> None:
    with running_ptx(90, memory=None, is_new=True) as gpu:
        assert compile_all() == 26
        before = compiled_of(gpu)
        for layout, sizes in CASES[::5]:
            Traffic(layout, sizes, seed=3).copy()
        copy_any_pieces(seed=3)
        copy_any_blocks(seed=3)
        assert compiled_of(gpu) == before


def test_a_warm_up_on_a_cpu_does_nothing() -> None:
    assert kvheap.warm_up(CPU) == 0
    assert kvheap.warm_up(cache_of(Engine("mla", Sizes())), convert=True) == 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("cuda",), {}, TypeError, "must be a PagedKVCache or a torch.device, got 'cuda'"),
        ((CPU,), {"align_bytes": 24}, ValueError, "a positive power of two, got 24"),
        ((CPU,), {"align_bytes": 0}, ValueError, "a positive power of two, got 0"),
        ((CPU,), {"align_bytes": 1.5}, TypeError, "align_bytes"),
        ((CPU,), {"convert": True}, ValueError, "needs the cache that is to be converted"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        kvheap.warm_up(*arguments, **options)


def test_a_cache_that_cannot_be_converted_is_refused() -> None:
    cache = cache_of(Engine(BYTES_ONLY[0], Sizes(head_dim=64)))
    with pytest.raises(ValueError, match="only a cache of bfloat16 or float16"):
        kvheap.warm_up(cache, convert=True)
