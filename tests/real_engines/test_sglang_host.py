"""Whether chunks of kvheap are pages of SGLang's host pools, byte for byte, in every layout."""

from __future__ import annotations

import pytest
import torch
from engine_caches import each, engine_code, heap
from sglang_host import PAGE, HostPool, mha_host, mla_host
from sglang_scenes import HEADS, NUM_LAYERS, NUM_PAGES

import kvheap
from kvheap import MemoryFormat, PagedKVCache

KEY_VALUE = {
    "layer_first": "KV_2LTD",
    "page_first": "KV_2TLD",
    "page_first_direct": "KV_2LTD",
    "page_head": "KV_2PHTLD",
    "page_unified": "KV_PHL2TD",
}
LATENT = {
    "layer_first": "KV_MLA_FMT",
    "page_first": "KV_TLD",
    "page_first_direct": "KV_MLA_FMT",
    "page_unified": "KV_PLTD",
}
"""The format of a chunk that holds one page in a layout, by SGLang's name of the layout."""

NOT_YET: dict[str, str] = {}
NOT_YET_LATENT: dict[str, str] = {}


def check_pages(pools: HostPool, cache: PagedKVCache, planes: int, heads: int, fmt: str) -> None:
    assert hasattr(MemoryFormat, fmt), f"no format {fmt}"
    slots = torch.randperm(NUM_PAGES * PAGE)[: 2 * PAGE]
    chunks = heap()
    if pools.host.layout == "page_unified" and planes == 2:
        groups, layers, _, tokens, heads_of_group, dim = pools.host.kv_buffer.shape[1:]
        shape = (1, groups, layers, 2, tokens, heads_of_group * dim)
        batch = chunks.batched_allocate(shape, cache.dtype, 2, MemoryFormat[fmt])
        assert batch is not None
        kvheap.store(cache, slots, batch)
    else:
        batch = chunks.batched_store(cache, slots, PAGE, MemoryFormat[fmt])
    assert batch is not None
    for page in (0, 1):
        chunk = batch[page].tensor
        assert chunk is not None
        pools.set_page(page + 1, chunk)
    for token, slot in enumerate(slots.tolist()):
        for layer in range(NUM_LAYERS):
            for plane in range(planes):
                for head in range(heads):
                    buffers = (
                        (pools.device.k_buffer, pools.device.v_buffer)[plane]
                        if planes == 2
                        else pools.device.kv_buffer
                    )
                    expected = buffers[layer][slot, head]
                    there = pools.row(plane, layer, PAGE + token, head)
                    assert torch.equal(there, expected), (plane, layer, token, head)


def fill(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.random_(-100, 100)


@pytest.mark.parametrize("layout", each(KEY_VALUE, NOT_YET))
def test_a_chunk_is_a_page_of_keys_and_values(layout: str) -> None:
    with engine_code():
        pools = mha_host(layout)
    device = pools.device
    fill([*device.k_buffer, *device.v_buffer])
    cache = PagedKVCache.of("sglang-mha", [device.k_buffer, device.v_buffer], block_size=PAGE)
    check_pages(pools, cache, 2, HEADS, KEY_VALUE[layout])


@pytest.mark.parametrize("head_groups", [2, HEADS])
def test_heads_may_be_grouped(head_groups: int) -> None:
    with engine_code():
        pools = mha_host("page_unified", head_groups)
    device = pools.device
    fill([*device.k_buffer, *device.v_buffer])
    cache = PagedKVCache.of("sglang-mha", [device.k_buffer, device.v_buffer], block_size=PAGE)
    check_pages(pools, cache, 2, HEADS, KEY_VALUE["page_unified"])


@pytest.mark.parametrize("layout", each(LATENT, NOT_YET_LATENT))
def test_a_chunk_is_a_page_of_latent_vectors(layout: str) -> None:
    with engine_code():
        pools = mla_host(layout)
    fill(pools.device.kv_buffer)
    cache = PagedKVCache.of("sglang-mla", pools.device.kv_buffer, block_size=PAGE)
    check_pages(pools, cache, 1, 1, LATENT[layout])


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_the_rows_of_a_host_pool_are_a_cache(layout: str) -> None:
    """SGLang's own views of each layer: a chunk goes there as it comes from the device."""
    with engine_code():
        pools = mha_host(layout)
    device, host = pools.device, pools.host
    fill([*device.k_buffer, *device.v_buffer])
    near = PagedKVCache.of("sglang-mha", [device.k_buffer, device.v_buffer], block_size=PAGE)
    far = PagedKVCache.detect(
        [host.k_data_refs, host.v_data_refs],
        num_kv_heads=HEADS,
        head_dim=host.head_dim,
        block_size=PAGE,
    )
    slots = torch.randperm(NUM_PAGES * PAGE)
    chunks = heap()
    batch = chunks.batched_store(near, slots, PAGE)
    assert batch is not None
    chunks.batched_load(batch, far, slots)
    for slot in range(NUM_PAGES * PAGE):
        for layer in range(NUM_LAYERS):
            for head in range(HEADS):
                assert torch.equal(
                    pools.row(0, layer, slot, head), device.k_buffer[layer][slot, head]
                )
                assert torch.equal(
                    pools.row(1, layer, slot, head), device.v_buffer[layer][slot, head]
                )
