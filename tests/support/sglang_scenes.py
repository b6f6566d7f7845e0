"""SGLang's memory pools, made on a CPU by SGLang's own classes.

Written against SGLang 0.5.23. Where a token is in a pool, SGLang's own views, helpers and layout
classes say; pools without any are indexed as their writers do.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest
import torch
from engine_caches import KEYS, VALUES, EngineCache, Rows, as_bytes, runs_of
from stub_packages import stub

REQUIRE = "KVHEAP_REQUIRE_SGLANG"
"""With this environment variable set, a module of SGLang that is missing is a failure."""

INSTALL = (
    "needs SGLang: pip install -c constraints-sglang.txt '.[sglang-deps]' && "
    "pip install --no-deps sglang==0.5.23"
)

NUM_LAYERS, NUM_PAGES = 3, 5
"""Pages include the one that SGLang keeps for padding."""

HEADS, HEAD_DIM = 4, 32


def part_of_sglang(name: str) -> Any:
    """Import a module of SGLang.

    Without it the test is skipped, or fails where the environment says that SGLang is there.
    """
    if os.environ.get(REQUIRE):
        importlib.import_module("sglang")
    else:
        pytest.importorskip("sglang", reason=INSTALL, exc_type=ImportError)
    # transformers asks once whether torchvision is there: before its name is an empty package.
    importlib.import_module("transformers.utils").is_torchvision_available()
    stub(("torchvision",))
    return importlib.import_module(name)


@contextmanager
def one_rank() -> Iterator[None]:
    """A process that is alone: pools ask how many ranks there are."""
    parallel = part_of_sglang("sglang.srt.runtime_context").get_parallel()
    with parallel.override(attn_dcp_size=1):
        yield


def pool(cls: str, module: str = "memory_pool", page_size: int = 16, **options: Any) -> Any:
    """A pool of a few pages; ``cls`` is its class's name."""
    made = getattr(part_of_sglang(f"sglang.srt.mem_cache.{module}"), cls)
    common = {
        "size": (NUM_PAGES - 1) * page_size,
        "page_size": page_size,
        "dtype": torch.bfloat16,
        "layer_num": NUM_LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    with one_rank():
        return made(**{**common, **options})


def mha(cls: str = "MHATokenToKVPool", **options: Any) -> Any:
    return pool(cls, **{"head_num": HEADS, "head_dim": HEAD_DIM, **options})


@contextmanager
def environment(**values: Any) -> Iterator[None]:
    """Some of SGLang's environment variables have other values."""
    envs = part_of_sglang("sglang.srt.environ").envs
    name, value = next(iter(values.items()))
    rest = dict(list(values.items())[1:])
    with getattr(envs, name).override(value):
        if rest:
            with environment(**rest):
                yield
        else:
            yield


def cache_of(
    tensors: Any,
    num_blocks: int,
    page_size: int,
    rows: Rows | None,
    pieces: Callable[[int, int], list[torch.Tensor]],
    num_layers: int = NUM_LAYERS,
    name: str = "",
    given: Mapping[str, Any] = MappingProxyType({}),
    **known: Any,
) -> EngineCache:
    """An engine cache of so many pages; ``known`` is what SGLang knows besides the page size."""
    return EngineCache(
        name=name,
        given=given,
        tensors=tensors,
        known={"block_size": page_size, "kv_cache_dtype": "auto", **known},
        num_layers=num_layers,
        num_blocks=num_blocks,
        block_size=page_size,
        pieces=pieces,
        rows=rows,
    )


def key_value_cache(
    made: Any,
    tensors: Any = None,
    page_size: int = 16,
    num_layers: int = NUM_LAYERS,
    name: str = "",
) -> EngineCache:
    """The cache of a pool that has K and V of each layer, as SGLang's attention looks at it."""
    view = part_of_sglang("sglang.srt.mem_cache.layout.paged_view").paged_kv_view
    pages = [
        [view(buffer, page_size, made.head_num, buffer.shape[-1]) for buffer in side]
        for side in (made.k_buffer, made.v_buffer)
    ]

    def rows(layer: int, block: int, offset: int) -> list[tuple[int, torch.Tensor]]:
        return [
            (plane, as_bytes(head))
            for plane in (KEYS, VALUES)
            for head in pages[plane][layer][block, offset]
        ]

    return cache_of(
        [made.k_buffer, made.v_buffer] if tensors is None else tensors,
        pages[KEYS][0].shape[0],
        page_size,
        rows,
        lambda layer, block: [run for side in pages for run in runs_of(side[layer][block])],
        num_layers,
        name,
        num_kv_heads=made.head_num,
        head_dim=made.k_buffer[0].shape[-1],
        v_head_dim=made.v_buffer[0].shape[-1],
    )


def row_cache(
    buffers: Sequence[torch.Tensor], page_size: int, num_heads: int = 1, **known: Any
) -> EngineCache:
    """The cache of buffers [slots, ...] with one row for each head of a slot."""
    dim = buffers[0][0].numel() // num_heads

    def rows(layer: int, block: int, offset: int) -> list[tuple[int, torch.Tensor]]:
        row = buffers[layer][block * page_size + offset].reshape(num_heads, dim)
        return [(KEYS, as_bytes(head)) for head in row]

    def pieces(layer: int, block: int) -> list[torch.Tensor]:
        return runs_of(buffers[layer][block * page_size : (block + 1) * page_size])

    known = {"num_kv_heads": num_heads, "head_dim": dim, **known}
    num_blocks = buffers[0].shape[0] // page_size
    return cache_of(list(buffers), num_blocks, page_size, rows, pieces, **known)


def page_cache(
    buffers: Sequence[torch.Tensor],
    page_size: int,
    addressing: tuple[int, int, int],
    row_bytes: tuple[int, int],
    **known: Any,
) -> EngineCache:
    """The cache of buffers [pages, bytes].

    Args:
        buffers: those of the layers.
        page_size: tokens of a page.
        addressing: bytes from a row of values to the next, from the page's start to the first row
            of scales, and from a row of scales to the next.
        row_bytes: bytes of a token's values, and of its scales.
        known: what the engine knows, and the name of the engine layout.
    """
    data_stride, scale_base, scale_stride = addressing
    data_bytes, scale_bytes = row_bytes

    def rows(layer: int, block: int, offset: int) -> list[tuple[int, torch.Tensor]]:
        page = as_bytes(buffers[layer][block])
        starts = (offset * data_stride, scale_base + offset * scale_stride)
        return [
            (plane, page[start : start + size])
            for plane, (start, size) in enumerate(zip(starts, row_bytes, strict=True))
            if size
        ]

    known = {"num_kv_heads": 1, "head_dim": data_bytes + scale_bytes, **known}
    return cache_of(
        list(buffers),
        buffers[0].shape[0],
        page_size,
        rows,
        # Padding behind the scales is nobody's.
        lambda layer, block: [
            as_bytes(buffers[layer][block])[: page_size * (data_bytes + scale_bytes)]
        ],
        len(buffers),
        **known,
    )


def whole_pages(buffers: Sequence[torch.Tensor], page_size: int) -> EngineCache:
    """The cache of buffers [pages, ...] in which a token has no row of its own."""
    return cache_of(
        list(buffers),
        buffers[0].shape[0],
        page_size,
        None,
        lambda layer, block: [as_bytes(buffers[layer][block])],
        len(buffers),
        "opaque",
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
    )
