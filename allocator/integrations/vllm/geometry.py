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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import get_offloading_group_ids
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    get_kv_cache_spec_kind,
    group_kernel_blocks,
    iter_layer_specs,
)

from kvheap.addresses.arguments import require_count
from kvheap.integrations.vllm.groups import ChunkGroup

if TYPE_CHECKING:
    import torch

__all__ = [
    "groups_of",
    "is_packed",
    "joined",
    "layer_pages",
    "needs_whole_chunks",
    "require_places",
    "unpadded_page",
]

GAP_SHARE = 64
"""Padding of up to this share of a piece is kept with it: at most 1.6 % of a chunk.

One piece of 824 KB a block is copied at 42 GB/s, its 22 pages at 34 GB/s (H200, 2026-11-26).
"""


def groups_of(kv_cache_config: KVCacheConfig, blocks_per_chunk: int) -> list[ChunkGroup]:
    """The chunks of each group that is offloaded, in vLLM's order of groups.

    Args:
        kv_cache_config: vLLM's, of the scheduler or of a worker.
        blocks_per_chunk: the engine's blocks in a chunk.

    Returns:
        For each group its name (its kind, and its number), its bytes and its number; of packed
        blocks also where its bytes are in a block.

    Raises:
        ValueError: no group is offloaded, or ``blocks_per_chunk`` is not positive.
        NotImplementedError: a layer's cache is neither attention nor Mamba; it is named.
    """
    blocks_per_chunk = require_count("blocks_per_chunk", blocks_per_chunk, at_least=1)
    has_packed_blocks = is_packed(kv_cache_config)
    groups = []
    for group_id in get_offloading_group_ids(kv_cache_config):
        group = kv_cache_config.kv_cache_groups[group_id]
        spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
        pages = list(layer_pages(kv_cache_config, group_id).values())
        pieces = joined(pages) if has_packed_blocks else ()
        page_bytes = sum(size for _, size in pieces or pages)
        name = f"{get_kv_cache_spec_kind(spec).value}_{group_id}"
        groups.append(ChunkGroup(name, page_bytes * blocks_per_chunk, group_id, pieces))
    if not groups:
        raise ValueError("no KV cache group of this model is offloaded: it has nothing to keep")
    return groups


def layer_pages(kv_cache_config: KVCacheConfig, group_id: int) -> dict[str, tuple[int, int]]:
    """By layer of a group, where its page begins in a packed block, and the bytes that are kept.

    Where nothing is packed, a page begins at 0 of its own tensor.

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


def joined(pages: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The offsets and bytes of pages, with neighbours as one piece.

    Padding between two pages is taken along if it is at most a ``1 / GAP_SHARE`` of the piece so
    far: one long copy is cheaper than many.
    """
    pieces: list[tuple[int, int]] = []
    for offset, size in sorted(pages):
        if pieces:
            start, length = pieces[-1]
            gap = offset - (start + length)
            if gap * GAP_SHARE <= min(length, size):
                pieces[-1] = (start, offset + size - start)
                continue
        pieces.append((offset, size))
    return tuple(pieces)


def require_places(kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]) -> None:
    """Raise unless the pages of packed blocks are where the configuration says.

    Args:
        kv_cache_config: vLLM's, of this worker.
        kv_caches: by layer, the cache that vLLM's worker has made.

    Raises:
        ValueError: a layer's page is elsewhere, or has bytes that would not be kept; it is named.
    """
    if not is_packed(kv_cache_config):
        return
    strides = {
        layer: tensor.block_stride
        for tensor in kv_cache_config.kv_cache_tensors
        for layer in tensor.layers
    }
    for group_id in get_offloading_group_ids(kv_cache_config):
        group = kv_cache_config.kv_cache_groups[group_id]
        spec = group.kv_cache_spec
        for name, (offset, size) in layer_pages(kv_cache_config, group_id).items():
            cache = group_kernel_blocks(kv_caches[name], kv_cache_config.num_blocks)
            found = (
                cache.storage_offset() * cache.element_size(),
                cache.stride(0) * cache.element_size(),
            )
            if found != (offset, strides.get(name)):
                raise ValueError(
                    f"the page of layer {name} begins at byte {found[0]} of blocks of {found[1]} "
                    f"bytes, and not at {offset} of {strides.get(name)} as vLLM's configuration "
                    f"says: this model's cache is not supported"
                )
            of_layer = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            if unpadded_page(of_layer) > size:
                raise ValueError(
                    f"the page of layer {name} has {unpadded_page(of_layer)} bytes, of which "
                    f"{size} would be kept: this model's cache is not supported"
                )


def is_packed(kv_cache_config: KVCacheConfig) -> bool:
    """Whether the pages of a block lie side by side, so that vLLM hands out whole blocks.

    DeepSeek-V4's do. The block of a group has the pages of its own layers only, from its start, and
    is as long as that of the largest group. vLLM's connector asks whether the distance of two
    blocks of some attention layer is another than its page.
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


def needs_whole_chunks(kv_cache_config: KVCacheConfig) -> list[bool]:
    """By group that is offloaded, whether a load may need any block of a chunk.

    Of the states of a Mamba layer, it needs the last one.
    """
    groups = [
        kv_cache_config.kv_cache_groups[group_id]
        for group_id in get_offloading_group_ids(kv_cache_config)
    ]
    return [
        not isinstance(next(iter(iter_layer_specs(group.kv_cache_spec))), MambaSpec)
        for group in groups
    ]


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
