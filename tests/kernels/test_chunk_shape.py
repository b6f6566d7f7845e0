"""``cache.chunk_layout``: what a chunk is, as ``batched_store`` makes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_heaps import heap_of

from kvheap import BlockIds, BlockLayout, MemoryFormat, PagedKVCache, PrefixStore
from kvheap.kernels import ChunkShape
from kvheap.kernels.chunk_shape import CHUNK_ORDERS

HALF = torch.float16
CACHES: dict[str, Any] = {
    "kv": lambda: PagedKVCache.of(
        "vllm-flash-nhd", [torch.zeros(2, 8, 16, 4, 8, dtype=HALF) for _ in range(3)]
    ),
    "mla": lambda: PagedKVCache.of("mla", [torch.zeros(8, 16, 24, dtype=HALF) for _ in range(3)]),
    "cpu": lambda: PagedKVCache.of("vllm-cpu", torch.zeros(3, 8, 4, 16, 16, dtype=HALF)),
    "uneven": lambda: PagedKVCache.of(
        "kv-tuples",
        [
            (torch.zeros(8, 16, 4, 8, dtype=HALF), torch.zeros(8, 16, 4, 4, dtype=HALF))
            for _ in range(3)
        ],
    ),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"layers": range(1, 3)},
    {"heads": slice(1, 3)},
    {"layers": range(1), "heads": slice(2, 4)},
    {"convert": True},
]


def test_formats_are_those_of_memory_format() -> None:
    known = {fmt.name: fmt.dim_order for fmt in MemoryFormat if fmt.dim_order is not None}
    assert known == dict(CHUNK_ORDERS)


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("fmt", [None, *CHUNK_ORDERS])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("chunk_tokens", [16, 48])
def test_is_what_a_store_allocates(
    kind: str, fmt: str | None, how: dict[str, Any], chunk_tokens: int
) -> None:
    """The reference is the batch of a store; what one refuses, the other refuses too."""
    cache, heap = CACHES[kind](), heap_of(256)
    blocks = BlockIds([0, 3, 1, 5, 2])
    try:
        batch = heap.batched_store(cache, blocks, chunk_tokens, fmt, **how)
    except ValueError as error:
        if "only whole blocks" in str(error) or "cannot be converted" in str(error):
            return  # of the copy, not of the chunk
        with pytest.raises(ValueError, match=re.escape(str(error))):
            cache.chunk_layout(chunk_tokens, fmt, **how)
        return
    assert batch is not None
    chunk = cache.chunk_layout(chunk_tokens, fmt, **how)
    assert BlockLayout.of_chunk(chunk) == batch.layout
    assert chunk.fmt == batch.fmt.name
    assert chunk.size_bytes == batch.size_bytes
    assert chunk.num_chunks(80) == len(batch)
    assert (chunk.shape, chunk.dtype) == (tuple(batch.shape), batch.dtype)
    assert chunk.num_tokens == chunk_tokens
    assert chunk.num_layers == len(how.get("layers", range(3)))
    assert chunk.num_heads == len(range(cache.num_heads)[how.get("heads", slice(None))])
    fresh = heap.batched_allocate(chunk.shapes, chunk.dtypes, 2, chunk.fmt)
    assert fresh is not None
    assert fresh.layout == batch.layout
    assert fmt is None or chunk == cache.chunk_layout(chunk_tokens, MemoryFormat[fmt], **how)


@pytest.mark.parametrize(
    ("arguments", "how", "kind", "match"),
    [
        ((0,), {}, ValueError, "chunk_tokens must be positive, got 0"),
        ((-1,), {}, ValueError, "got -1"),
        ((1.5,), {}, TypeError, "chunk_tokens must be an integer, got 1.5"),
        ((16, "nonsense"), {}, ValueError, "nonsense is not a format"),
        ((16, MemoryFormat.BINARY), {}, ValueError, "BINARY is not a format"),
        ((16, 7), {}, TypeError, "fmt must be a MemoryFormat or its name, got 7"),
        ((17, "KV_PL2TD"), {}, ValueError, "17 tokens are not whole pages of 16"),
        ((16,), {"layers": range(2, 5)}, ValueError, r"of the 3 layers, got range\(2, 5\)"),
        ((16,), {"layers": range(0)}, ValueError, "of the 3 layers"),
        ((16,), {"layers": 2}, TypeError, "layers must be a range"),
        ((16,), {"heads": slice(3, 6)}, ValueError, "of the cache's 4 heads"),
        ((16,), {"heads": range(2)}, TypeError, "heads must be a slice"),
        ((16,), {"convert": 1}, TypeError, "convert must be True or False"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: Any, how: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        CACHES["kv"]().chunk_layout(*arguments, **how)


def test_stores_and_tiers_take_it(tmp_path: Path) -> None:
    cache, heap = CACHES["kv"](), heap_of(64)
    chunk = cache.chunk_layout(32)
    prefixes: PrefixStore[str] = PrefixStore(heap, chunk)
    assert prefixes.layout == BlockLayout.of_chunk(chunk)
    prefixes.store_from_engine(["a", "b"], cache, range(64))
    with pytest.raises(TypeError, match=r"must be a BlockLayout, got .*cache\.chunk_layout"):
        PrefixStore(heap, chunk.layout)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a ChunkShape"):
        BlockLayout.of_chunk(prefixes.layout)  # type: ignore[arg-type]
    pytest.importorskip("lmdb")
    pytest.importorskip("xxhash")
    from kvheap.files import FileTier

    with FileTier(tmp_path, 1 << 20, chunk, namespace="a model") as tier:
        assert tier.layout == prefixes.layout


def test_says_what_it_is() -> None:
    cache = CACHES["kv"]()
    assert repr(cache) == (
        "PagedKVCache(vllm-flash-nhd: 3 layers, 8 blocks of 16 slots, 4 heads of 8 in 2 planes, "
        "torch.float16 on cpu, 49152 bytes)"
    )
    assert repr(cache.chunk_layout(32, heads=slice(1, 3))) == (
        "ChunkShape(32 tokens of 3 layers and 2 heads: (2, 3, 32, 16) torch.float16 KV_2LTD, "
        "6144 bytes)"
    )
    assert str(cache.chunk_layout(32, "KV_2TD")).startswith("32 tokens of one of 3 layers and 4 ")
    converted = str(cache.chunk_layout(32, convert=True))
    assert "(2, 3, 32, 32) torch.float8_e4m3fn + (2, 3, 4) torch.float32 KV_2LTD" in converted
    assert "6240 bytes" in converted


@pytest.mark.parametrize("kind", CACHES)
def test_no_repr_has_pointers(kind: str) -> None:
    cache = CACHES[kind]()
    pointers = {str(tensor.data_ptr()) for tensor in cache.tensors}
    pointers |= {f"{tensor.data_ptr():x}" for tensor in cache.tensors}
    for shown in (repr(cache), str(cache), repr(cache.chunk_layout(16))):
        assert len(shown) < 200
        assert not any(pointer in shown for pointer in pointers)
    assert isinstance(cache.chunk_layout(16), ChunkShape)
