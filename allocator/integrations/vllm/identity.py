"""What must be the same for the chunks of an earlier process to be of use to this one.

vLLM's own tiers on disk take model, dtype, hash blocks, parallelism and the groups' layers for the
name of a folder (``vllm/v1/kv_offload/file_mapper.py``). Here more is known, and more is compared:
the model's files and configuration, what block hashes begin with, and how pages are laid out.
Written against vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

from kvheap import __version__
from kvheap.integrations.vllm.versions import installed_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_offload.config import OffloadingConfig

    from kvheap.integrations.vllm.groups import ChunkGroup

__all__ = ["hash_seed", "identity_of", "layout_of", "model_files"]

CHUNK_LAYOUT = 1
"""To be raised whenever the bytes of a chunk come into another order."""

MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
"""Files of a model's folder that KV depends on, and some more."""


def identity_of(
    vllm_config: VllmConfig, offloading: OffloadingConfig, groups: Sequence[ChunkGroup]
) -> dict[str, str]:
    """By name, what an index and an engine must have in common. Numbers and digests as text.

    Args:
        vllm_config: vLLM's.
        offloading: made from it.
        groups: the chunks of each group.

    Raises:
        ValueError: block hashes begin with a random number, so that no other process has the same;
            the message names the key and what to do.
    """
    model, cache, parallel = vllm_config.model_config, offloading.cache, offloading.parallel
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    sizes = ("world_size", "tp_size", "pp_size", "pcp_size", "dcp_size", "data_parallel_index")
    return {
        "kvheap": f"{__version__}, layout {CHUNK_LAYOUT} of chunks",
        "vLLM": str(installed_version()),
        "model": str(model.model),
        "revision": str(model.revision),
        "model's files": model_files(model.model, model.revision),
        "model's configuration": _digest([_json_of(model.hf_config)]),
        "quantization": str(model.quantization),
        "draft model": str(getattr(vllm_config.speculative_config, "model", None)),
        "dtype": f"{model.dtype}, {offloading.model.dtype} in the cache",
        "block hashes": algorithm,
        "block hashes' seed": _digest([hash_seed(algorithm)]),
        "tokens of a block hash": str(cache.tokens_per_hash),
        "blocks_per_chunk": str(cache.blocks_per_chunk),
        "groups": "; ".join(
            f"{group.name}: {group.chunk_bytes} bytes, {described.tokens_per_block} tokens a block"
            f"{'' if not group.pieces else f', pieces {_digest(map(str, group.pieces))}'}"
            for group, described in zip(groups, offloading.groups, strict=True)
        ),
        "layers": _digest(name for group in offloading.groups for name in group.layer_names),
        "parallelism": ", ".join(f"{name} {getattr(parallel, name)}" for name in sizes),
        "kv_cache_layout": str(offloading.kv_cache_layout),
    }


def hash_seed(algorithm: str) -> str:
    """What block hashes begin with, in every process of this configuration and environment.

    Raises:
        ValueError: it is another one in every process; the message names the key and what to do.
    """
    function = get_hash_fn_by_name(algorithm)
    seed: str = resolve_none_hash_seed(function)
    if resolve_none_hash_seed(function) != seed:
        raise ValueError(
            f"kv_connector_extra_config has the key 'index_path', but with "
            f"--prefix-caching-hash-algo {algorithm} no other process computes the same block "
            f"hashes: set the environment variable PYTHONHASHSEED, or use sha256"
        )
    return seed


def model_files(model: str, revision: str | None) -> str:
    """Which files the model is loaded from, as far as it is known: names, bytes and times.

    A model of the Hugging Face hub is found in its cache, where each commit has a folder.
    """
    folder = Path(model)
    if not folder.exists():
        from huggingface_hub import try_to_load_from_cache

        config = None
        with suppress(ValueError):  # it is no name of a model of the hub
            config = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(config, str):
            return "not in a folder"
        folder = Path(config).parent
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    lines = []
    for file in files:
        if file.is_file() and file.suffix in MODEL_SUFFIXES:
            state = file.stat()
            lines.append(f"{file.name} {state.st_size} {state.st_mtime_ns}")
    return f"{len(lines)} files, {_digest(lines)}"


def layout_of(kv_caches: Mapping[str, Any], num_blocks: int) -> str:
    """How a worker's pages are laid out: by layer, device, dtype, shape and order of strides.

    Args:
        kv_caches: the engine's tensors by layer; a layer may have several.
        num_blocks: how many blocks each has, which may be another number in another process.
    """
    lines = []
    for layer, tensors in sorted(kv_caches.items()):
        for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
            shape = [
                f"{size // num_blocks} * blocks" if size % num_blocks == 0 and size else str(size)
                for size in tensor.shape
            ]
            strides = tensor.stride()
            order = sorted(
                (at for at, size in enumerate(tensor.shape) if size != 1),
                key=lambda at, strides=strides: (-strides[at], at),  # type: ignore[misc]
            )
            lines.append(
                f"{layer} {tensor.device.type} {tensor.dtype} [{', '.join(shape)}] {order}"
            )
    return f"{lines[0] if lines else 'nothing'}; {_digest(lines)}"


def _digest(lines: Iterable[str]) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def _json_of(config: Any) -> str:
    """A configuration of transformers as text; without its path, which is compared by itself."""
    try:
        found: str = config.to_json_string(use_diff=False)
    except (AttributeError, TypeError, ValueError):
        found = repr(config)
    return found.replace(os.fspath(getattr(config, "name_or_path", "") or "\0"), "")
