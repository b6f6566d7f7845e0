"""``groups_of``: the bytes of one chunk of each KV cache group, read from vLLM's configuration.

vLLM keeps the pages of all groups in the same tensors, and a slot of its own tier holds a block of
every tensor. The pages that a group's layers fill are in the specs of its layers:
``unpadded_page_size_bytes`` of attention, the states of a Mamba layer.

The scheduler's configuration has less than a worker's: where the layers of a group are unlike
(``UniformTypeKVCacheSpecs``), it keeps the spec of one of them. The page of each layer then comes
from where vLLM placed it (``KVCacheTensor``), with its padding. Both sides get the same numbers,
since both see a group as the scheduler does. Written against vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from dataclasses import replace

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import get_offloading_group_ids
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    get_kv_cache_spec_kind,
    iter_layer_specs,
)

from kvheap.addresses.arguments import require_count
from kvheap.integrations.vllm.groups import ChunkGroup

__all__ = ["groups_of", "is_packed", "layer_pages", "packed_pages", "unpadded_page"]


def groups_of(kv_cache_config: KVCacheConfig, blocks_per_chunk: int) -> list[ChunkGroup]:
    """The chunks of each group that is offloaded, in vLLM's order of groups.

    Args:
        kv_cache_config: vLLM's, of the scheduler or of a worker.
        blocks_per_chunk: the engine's blocks in a chunk.

    Returns:
        For each group its name (its kind, and its number), its bytes and its number.

    Raises:
        ValueError: no group is offloaded, or ``blocks_per_chunk`` is not positive.
        NotImplementedError: a layer's cache is neither attention nor Mamba; it is named.
    """
    blocks_per_chunk = require_count("blocks_per_chunk", blocks_per_chunk, at_least=1)
    groups = []
    for group_id in get_offloading_group_ids(kv_cache_config):
        group = kv_cache_config.kv_cache_groups[group_id]
        spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
        page_bytes = sum(layer_pages(kv_cache_config, group_id).values())
        name = f"{get_kv_cache_spec_kind(spec).value}_{group_id}"
        groups.append(ChunkGroup(name, page_bytes * blocks_per_chunk, group_id))
    if not groups:
        raise ValueError("no KV cache group of this model is offloaded: it has nothing to keep")
    return groups


def layer_pages(kv_cache_config: KVCacheConfig, group_id: int) -> dict[str, int]:
    """By layer of a group, the bytes of its page that are kept, in the order of the layers.

    Where vLLM packs the pages of all layers into one block (:func:`is_packed`), its connector hands
    out whole blocks: the group's first layer then stands for all, with a whole block.

    Raises:
        NotImplementedError: a layer's cache is neither attention nor Mamba; it is named.
    """
    group = kv_cache_config.kv_cache_groups[group_id]
    if is_packed(kv_cache_config):
        return {group.layer_names[0]: kv_cache_config.kv_cache_tensors[0].block_stride}
    return {name: page for name, (_, page) in packed_pages(kv_cache_config, group_id).items()}


def packed_pages(kv_cache_config: KVCacheConfig, group_id: int) -> dict[str, tuple[int, int]]:
    """By layer of a group, where its page begins in a packed block, and its bytes.

    What a group would take of packed blocks if its pages were copied one by one. Where nothing is
    packed, a page begins at 0 of its own tensor.

    Raises:
        NotImplementedError: a layer's cache is neither attention nor Mamba; it is named.
    """
    group = kv_cache_config.kv_cache_groups[group_id]
    spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
    padded, unpadded = spec.page_size_bytes, unpadded_page(spec)
    places = _placed(kv_cache_config)
    pages = {}
    for name in group.layer_names:
        offset, page = places.get(name, (0, padded))
        # Of the other layers of unlike ones, the scheduler knows the padded page only.
        pages[name] = (offset, unpadded if page == padded else page)
    return pages


def is_packed(kv_cache_config: KVCacheConfig) -> bool:
    """Whether the pages of a block lie side by side, so that vLLM hands out whole blocks.

    DeepSeek-V4's do. vLLM's connector asks whether the distance of two blocks of some attention
    layer is another than its page.
    """
    if kv_cache_config.hisparse_host_num_blocks is not None:
        return False
    strides = {
        layer: tensor.block_stride
        for tensor in kv_cache_config.kv_cache_tensors
        for layer in tensor.layers
    }
    places = _placed(kv_cache_config)
    return any(
        strides[layer] != places[layer][1]
        for group_id in get_offloading_group_ids(kv_cache_config)
        for group in (kv_cache_config.kv_cache_groups[group_id],)
        if isinstance(next(iter(iter_layer_specs(group.kv_cache_spec))), AttentionSpec)
        for layer in group.layer_names
        if layer in strides
    )


def unpadded_page(spec: KVCacheSpec) -> int:
    """The bytes that a layer fills of its page.

    Raises:
        NotImplementedError: the layer's cache is neither attention nor Mamba.
    """
    if isinstance(spec, AttentionSpec):
        return int(spec.unpadded_page_size_bytes)
    if isinstance(spec, MambaSpec):
        return int(replace(spec, page_size_padded=None).page_size_bytes)
    raise NotImplementedError(
        f"a KV cache of {type(spec).__name__} cannot be offloaded: only attention and Mamba layers "
        f"have pages of a known size"
    )


def _placed(kv_cache_config: KVCacheConfig) -> dict[str, tuple[int, int]]:
    """By layer, where its page begins in a block, and its bytes with padding, as vLLM placed it."""
    places = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        step = tensor.layer_stride
        is_layer_by_layer = step >= tensor.block_stride * kv_cache_config.num_blocks
        for at, layer in enumerate(tensor.layers):
            if is_layer_by_layer:
                places[layer] = (0, step // kv_cache_config.num_blocks)
            else:
                places[layer] = (tensor.offset + at * step, step)
    return places
