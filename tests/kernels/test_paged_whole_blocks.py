"""Caches of which only whole blocks can be copied, against views as their engines make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_paths import ON_ALL_PATHS, running, sample
from paged_reference import nvfp4_at, random_bytes
from paged_worlds import BOTH_WAYS, check_moves

import kvheap
from kvheap import BlockIds, LayoutError, MemoryFormat, PagedKVCache, TensorMemoryAllocator

F = MemoryFormat
LAYERS, BLOCKS, SLOTS, HEADS = 2, 6, 4, 3
IDS = [4, 0, 5, 2, 1]
ROWS = {"vllm-cpu": 2 * 10, "vllm-nvfp4": 9 * 2}
HEAD_SLOTS = {"vllm-cpu": HEADS, "vllm-nvfp4": 2 * HEADS}
FORMATS = [F.KV_2LTD, F.KV_MLA_FMT, F.KV_2TD, F.KV_PL2TD, F.KV_PLTD]


class Engine:
    """Tensors ``[B, H, N, C]`` of each layer, in one storage of random bytes each."""

    def __init__(self, layout: str, device: Any, padding: int = 0, slots_first: bool = False):
        self.layout = layout
        dtype = torch.bfloat16 if layout == "vllm-cpu" else torch.uint8
        heads, row = HEAD_SLOTS[layout], ROWS[layout]
        page = heads * SLOTS * row
        strides = (page + padding, row, heads * row, 1)
        if not slots_first:
            strides = (page + padding, SLOTS * row, row, 1)
        random = torch.Generator().manual_seed(3)
        self.storages = []
        self.tensors = []
        for _ in range(LAYERS):
            size = (BLOCKS * (page + padding) + 16) * dtype.itemsize
            storage = random_bytes(size, random).to(device)
            self.storages.append(storage)
            flat = storage.view(dtype)
            self.tensors.append(flat.as_strided((BLOCKS, heads, SLOTS, row), strides, 8))

    def cache(self) -> PagedKVCache:
        return PagedKVCache.of(self.layout, self.tensors)

    def sides(self, layer: int, block: int) -> list[list[torch.Tensor]]:
        """The parts of K and those of V of a block, each ``[heads, bytes of all slots]``."""
        tensor = self.tensors[layer]
        if self.layout == "vllm-cpu":
            # vLLM 0.33.0, CPUAttentionBackendImpl.do_kv_cache_update
            key, value = tensor.view(BLOCKS, HEADS, 2 * SLOTS, -1).chunk(2, dim=2)
            return [[side[block].flatten(1).view(torch.uint8)] for side in (key, value)]
        parts = []
        for plane in range(4):
            rows = [
                [nvfp4_at(self.tensors, layer, plane, block, slot, head) for slot in range(SLOTS)]
                for head in range(HEADS)
            ]
            is_hnd = tensor[0].is_contiguous()
            first, width = rows[0][0], rows[0][0].numel()
            count = (HEADS, SLOTS * width) if is_hnd else (1, HEADS * SLOTS * width)
            parts.append(first.as_strided(count, (SLOTS * width, 1), first.storage_offset()))
        return [parts[:2], parts[2:]]


def chunk_parts(batch, fmt, layer: int, number: int) -> list[torch.Tensor]:
    """The bytes of block ``number`` in a batch, by plane of the chunk, each flat."""
    blocks_per_chunk = 2
    at, in_chunk = divmod(number, blocks_per_chunk)
    if fmt is F.KV_2TD:
        at += layer * -(-len(IDS) // blocks_per_chunk)
    chunk = batch[at].tensor
    tokens = slice(in_chunk * SLOTS, (in_chunk + 1) * SLOTS)
    views = {
        F.KV_2LTD: lambda: [chunk[0, layer, tokens], chunk[1, layer, tokens]],
        F.KV_2TD: lambda: [chunk[0, tokens], chunk[1, tokens]],
        F.KV_MLA_FMT: lambda: [chunk[0, layer, tokens]],
        F.KV_PL2TD: lambda: [chunk[in_chunk, layer, 0], chunk[in_chunk, layer, 1]],
        F.KV_PLTD: lambda: [chunk[in_chunk, layer]],
    }[fmt]()
    return [view.reshape(-1).view(torch.uint8) for view in views]


def moves(engine: Engine, batch, fmt, is_store: bool):
    found = []
    for layer in range(LAYERS):
        for number, block in enumerate(IDS):
            sides = engine.sides(layer, block)
            if fmt in (F.KV_MLA_FMT, F.KV_PLTD):
                sides = [sides[0] + sides[1]]
            targets = chunk_parts(batch, fmt, layer, number)
            for parts, target in zip(sides, targets, strict=True):
                heads = len(parts[0])
                by_head = target.view(heads, -1).split([p.shape[1] for p in parts], dim=1)
                for part, place in zip(parts, by_head, strict=True):
                    found.append((part, place) if is_store else (place, part))
    return found


@ON_ALL_PATHS
@BOTH_WAYS
@pytest.mark.parametrize(
    ("layout", "padding", "slots_first"),
    [
        ("vllm-cpu", 0, False),
        ("vllm-cpu", 24, False),
        ("vllm-nvfp4", 0, False),
        ("vllm-nvfp4", 5, True),
    ],
)
def test_whole_blocks(
    layout: str, padding: int, slots_first: bool, is_store: bool, path: str
) -> None:
    if layout == "vllm-cpu" and path == "cuda":
        pytest.skip("vllm-cpu is on a CPU")
    with running(path) as device:
        engine = Engine(layout, device, padding, slots_first)
        for fmt in sample(FORMATS, path, padding + is_store + len(layout), count=1):
            check_whole_blocks(engine, fmt, is_store)


def check_whole_blocks(engine: Engine, fmt: MemoryFormat, is_store: bool) -> None:
    cache = engine.cache()
    buffer = random_bytes(1 << 16, torch.Generator().manual_seed(5)).to(cache.device)
    heap = TensorMemoryAllocator(buffer)
    batch = heap.batched_store(cache, BlockIds(IDS), 2 * SLOTS, fmt)
    assert batch is not None

    def run() -> None:
        if is_store:
            kvheap.store(cache, BlockIds(IDS), batch)
        else:
            kvheap.load(batch, cache, BlockIds(IDS, len(IDS) * SLOTS))

    buffer.copy_(random_bytes(1 << 16, torch.Generator().manual_seed(6)))
    check_moves([*engine.storages, buffer], moves(engine, batch, fmt, is_store), run)


@ON_ALL_PATHS
@pytest.mark.parametrize("layout", ["vllm-cpu", "vllm-nvfp4"])
def test_a_round_trip_into_other_blocks(layout: str, path: str) -> None:
    if layout == "vllm-cpu" and path == "cuda":
        pytest.skip("vllm-cpu is on a CPU")
    with running(path) as device:
        engine = Engine(layout, device)
        cache = engine.cache()
        heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8, device=device))
        before = [tensor.clone().view(torch.uint8) for tensor in engine.tensors]
        ids = torch.tensor([5, 1, 3])
        batch = heap.batched_store(cache, BlockIds(ids), 3 * SLOTS)
        heap.batched_load(batch, cache, BlockIds([0, 2, 4]))
        for tensor, old in zip(engine.tensors, before, strict=True):
            assert torch.equal(tensor.view(torch.uint8)[[0, 2, 4]], old[ids])
            assert torch.equal(tensor.view(torch.uint8)[ids], old[ids])


def test_heads_of_whole_blocks() -> None:
    engine = Engine("vllm-cpu", "cpu")
    cache = engine.cache()
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    whole = heap.batched_store(cache, BlockIds(IDS), 5 * SLOTS)
    shape = (2, LAYERS, 5 * SLOTS, 10)
    part = heap.batched_allocate(shape, torch.bfloat16, 1, F.KV_2LTD)
    kvheap.store(cache, BlockIds(IDS), part, heads=slice(1, 2))
    expected = whole[0].tensor.view(2, LAYERS, 5, HEADS, SLOTS * 10)[:, :, :, 1]
    assert torch.equal(
        part[0].tensor.view(2, LAYERS, 5, SLOTS * 10).view(torch.int16), expected.view(torch.int16)
    )


REFUSED: list[tuple[Any, int, Any, str]] = [
    ([0, 1, 2, 3], SLOTS, None, "give BlockIds of whole blocks, not slots"),
    (torch.arange(4), SLOTS, None, "give BlockIds of whole blocks, not slots"),
    (BlockIds([0, 1], 7), 2 * SLOTS, None, "2 whole blocks of 4 slots have 8 tokens, got num_tok"),
    (BlockIds([0, 1]), 6, None, "only whole blocks of 4 tokens can be copied, the chunk has 6"),
    (BlockIds([0, 1]), 2 * SLOTS, F.KV_2TLD, "in this format the tokens of a block lie apart"),
    (BlockIds([0, 1]), 2 * SLOTS, F.KV_T2D, "in this format the tokens of a block lie apart"),
    (BlockIds([6]), SLOTS, None, "block ids"),
]


@pytest.mark.parametrize(("slots", "chunk_tokens", "fmt", "message"), REFUSED)
@pytest.mark.parametrize("layout", ["vllm-cpu", "vllm-nvfp4"])
def test_anything_else_is_refused(
    layout: str, slots: Any, chunk_tokens: int, fmt: Any, message: str
) -> None:
    cache = Engine(layout, "cpu").cache()
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=message):
        heap.batched_store(cache, slots, chunk_tokens, fmt)
    assert heap.stats().allocated_bytes == 0


@pytest.mark.parametrize("fmt", [fmt for fmt in F if fmt.dim_order], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("layout", ["vllm-cpu", "vllm-nvfp4"])
def test_a_format_brings_blocks_back_or_is_refused(
    layout: str, layers: int, heads: int, fmt: MemoryFormat
) -> None:
    """Also where as many layers as heads make two strides equal."""
    shape = (BLOCKS, heads, SLOTS, 40) if layout == "vllm-cpu" else (BLOCKS, 2 * heads, SLOTS, 36)
    tensors = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(layers)]
    before = [tensor.clone() for tensor in tensors]
    cache = PagedKVCache.of(layout, tensors)
    heap = TensorMemoryAllocator(torch.zeros(1 << 18, dtype=torch.uint8))
    try:
        batch = heap.batched_store(cache, BlockIds([4, 1, 0, 5]), 2 * SLOTS, fmt)
    except ValueError as error:
        assert "lie" in str(error) or "holds K and V" in str(error)  # noqa: PT017
        return
    assert batch is not None
    for tensor in tensors:
        tensor.fill_(9)
    heap.batched_load(batch, cache, BlockIds([4, 1, 0, 5]))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[[4, 1, 0, 5]], old[[4, 1, 0, 5]])
        assert (tensor[[2, 3]] == 9).all()


def caches_of_equal_rows(size: int) -> dict[str, PagedKVCache]:
    tensors = [torch.randint(0, 256, (size, 6, SLOTS * 6 // size, 36), dtype=torch.uint8)]
    wide = [torch.zeros(size, 3, SLOTS * 6 // size, 72, dtype=torch.uint8)]
    return {
        "vllm-nvfp4": PagedKVCache.of("vllm-nvfp4", tensors),
        "vllm-nvfp4-linear": PagedKVCache.of("vllm-nvfp4-linear", tensors),
        "vllm-packed": PagedKVCache.of("vllm-packed", wide),
    }


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("target", ["vllm-nvfp4", "vllm-nvfp4-linear", "vllm-packed"])
@pytest.mark.parametrize("sizes", [(6, 6), (6, 3), (3, 6)])
def test_blocks_are_loaded_as_they_were_stored(
    sizes: tuple[int, int], target: str, is_list: bool
) -> None:
    """Blocks of another size, and rows of tokens, would be read in another order."""
    source, other = caches_of_equal_rows(sizes[0]), caches_of_equal_rows(sizes[1])
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))

    def places(cache: PagedKVCache) -> Any:
        whole = cache.layout.whole_blocks
        return BlockIds(range(24 // cache.block_size)) if whole else range(24)

    for cache in source.values():
        batch = heap.batched_store(cache, places(cache), 24, F.KV_MLA_FMT)
        assert batch is not None
        loaded = other[target]
        objs: Any = list(batch) if is_list else batch
        is_same = cache.layout.whole_blocks == loaded.layout.whole_blocks
        if is_same and (not cache.layout.whole_blocks or sizes[0] == sizes[1]):
            kvheap.load(objs, loaded, places(loaded))
            continue
        with pytest.raises(ValueError, match=r"the chunks hold .*, the cache takes "):
            kvheap.load(objs, loaded, places(loaded))
        for metadata in (batch.metadata, [obj.metadata for obj in batch]):
            with pytest.raises(ValueError, match=r"the chunks hold .*, the cache takes "):
                kvheap.load(heap.view(metadata), loaded, places(loaded))
        sent = kvheap.MemoryBatchMetadata.from_dict(batch.metadata.to_dict())
        with pytest.raises(ValueError, match=r"the chunks hold .*, the cache takes "):
            kvheap.load(heap.view(sent), loaded, places(loaded))
        batch.set_num_tokens(24)  # says that other means have filled it
        assert batch.metadata.form is None


def test_conversion_is_refused() -> None:
    cache = Engine("vllm-cpu", "cpu").cache()
    heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="vllm-cpu holds no rows that could be converted"):
        heap.batched_store(cache, BlockIds([1]), SLOTS, convert=True)


def wrong(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("layout", "tensor", "message"),
    [
        ("vllm-cpu", wrong((6, 3, 4, 15)), "must hold K then V"),
        ("vllm-cpu", wrong((6, 4, 3, 16)).transpose(1, 2), "order B H N F"),
        ("vllm-cpu", wrong((6, 3, 4, 20))[..., :16], "slots of a head must be contiguous"),
        ("vllm-nvfp4", wrong((6, 3, 4, 18)), "multiple of 9 bytes .* got 3 x 18"),
        ("vllm-nvfp4", wrong((6, 2, 4, 16)), "multiple of 9 bytes .* got 2 x 16"),
        ("vllm-nvfp4", wrong((6, 2, 4, 18), torch.half), "multiple of 9 bytes"),
        ("vllm-nvfp4", wrong((6, 2, 4, 20))[..., :18], "blocks must be dense"),
        ("vllm-lbhnc", wrong((6, 2, 4, 72)), "NVFP4 of head dim 128: use vllm-nvfp4"),
        ("vllm-bhlnc", wrong((6, 2, 4, 36)), "NVFP4 of head dim 64: use vllm-nvfp4"),
    ],
)
def test_other_tensors_are_refused(layout: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        PagedKVCache.of(layout, [tensor])
