"""K and V of the caches of Hugging Face's transformers, as a (K, V) pair for each layer.

Facts from transformers 5.24.0, ``cache_utils.py``: a cache has ``layers``; a layer that holds
attention has ``keys`` and ``values`` of ``[batch, heads, tokens, head dim]``, which are None or
empty before its first token. Layers of a sliding window keep their last tokens only: their
``get_seq_length()`` counts more tokens than the tensors have. Older caches have the lists
``key_cache`` and ``value_cache``, and the oldest are tuples of (K, V).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvheap.kernels.engine_layouts import LayoutError
from kvheap.kernels.tensor_dims import kind_of

__all__ = ["key_value_tensors"]

Pair = tuple[torch.Tensor, torch.Tensor]

MAX_HEADS = 256
"""More KV heads than any known model has (GPT-3 has 96): what looks like more are tokens."""


def key_value_tensors(
    cache: object, num_kv_heads: int | None = None, head_dim: int | None = None
) -> list[Pair]:
    """The (K, V) tensors ``[B, H, T, D]`` of each layer, checked.

    Args:
        cache: an object with ``layers`` or with ``key_cache`` and ``value_cache``, or a pair for
            each layer.
        num_kv_heads: KV heads H, if known.
        head_dim: elements of a head of K, if known.

    Raises:
        LayoutError: a layer has no K and V, keeps only a window of its tokens, or does not fit the
            others or what was given.
        TypeError: ``cache`` is of another kind.
    """
    pairs = _pairs(cache)
    if not pairs:
        raise LayoutError("the cache has no layers")
    for layer, (keys, values) in enumerate(pairs):
        _require_heads_and_tokens(f"layer {layer}", keys, values)
    for layer, (keys, _) in enumerate(pairs):
        _require_known(f"layer {layer}", tuple(keys.shape), num_kv_heads, head_dim)
    first = tuple(pairs[0][0].shape)
    for layer, (keys, _) in enumerate(pairs):
        _require_like_first(layer, tuple(keys.shape), first)
    return pairs


def _pairs(cache: Any) -> list[Pair]:
    if isinstance(cache, torch.Tensor | str):
        raise TypeError(f"a cache of transformers or (K, V) pairs is needed, got {kind_of(cache)}")
    if hasattr(cache, "self_attention_cache"):
        raise TypeError(
            f"{type(cache).__name__} is two caches: give its self_attention_cache or "
            f"cross_attention_cache"
        )
    if hasattr(cache, "layers"):
        return [_of_layer(number, layer) for number, layer in enumerate(cache.layers)]
    if hasattr(cache, "key_cache") and hasattr(cache, "value_cache"):
        keys, values = list(cache.key_cache), list(cache.value_cache)
        if len(keys) != len(values):
            raise LayoutError(f"the cache has {len(keys)} layers of K, {len(values)} of V")
        return list(zip(keys, values, strict=True))
    if not isinstance(cache, Sequence):
        raise TypeError(
            f"a cache with layers, or a (K, V) pair for each layer, is needed, got "
            f"{type(cache).__name__}"
        )
    pairs: list[Pair] = []
    for number, entry in enumerate(cache):
        if isinstance(entry, torch.Tensor) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise LayoutError(f"layer {number} must be a pair (K, V), got {kind_of(entry)}")
        pairs.append((entry[0], entry[1]))
    return pairs


def _of_layer(number: int, layer: Any) -> Pair:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
        raise LayoutError(
            f"layer {number}, a {type(layer).__name__}, has no keys and values: it keeps another "
            f"state, or no token yet"
        )
    count = getattr(layer, "get_seq_length", None)
    if callable(count) and keys.dim() == 4:
        num_tokens = int(count())
        if num_tokens > keys.shape[2]:
            raise LayoutError(
                f"layer {number}, a {type(layer).__name__}, counts {num_tokens} tokens, but its "
                f"keys [B, H, T, D] are {tuple(keys.shape)}: it keeps a window or quantized "
                f"tokens, or heads and tokens are swapped"
            )
    return keys, values


def _require_heads_and_tokens(label: str, keys: Any, values: Any) -> None:
    for name, tensor in (("K", keys), ("V", values)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{label}, {name} must be a tensor, got {kind_of(tensor)}")
        shape = tuple(tensor.shape)
        if tensor.dim() != 4 or 0 in shape:
            raise LayoutError(
                f"{label}, {name} must be [B, H, T, D] with tokens, got shape {shape}"
            )
    if keys.shape[:3] != values.shape[:3]:
        raise LayoutError(
            f"{label} has K of shape {tuple(keys.shape)} and V of shape {tuple(values.shape)}: "
            f"[B, H, T, D] must have the same B, H and T"
        )


def _require_known(
    label: str, shape: tuple[int, ...], num_kv_heads: int | None, head_dim: int | None
) -> None:
    if num_kv_heads is not None and shape[1] != num_kv_heads:
        swapped = shape[2] == num_kv_heads
        raise LayoutError(
            f"{label} has shape {shape}, [B, H, T, D] with H = {shape[1]}, not {num_kv_heads}"
            + ("; heads and tokens are swapped: transpose(1, 2)" if swapped else "")
        )
    if num_kv_heads is None and shape[1] > MAX_HEADS:
        raise LayoutError(
            f"{label} has shape {shape}, [B, H, T, D] with H = {shape[1]}: heads and tokens are "
            f"swapped? transpose(1, 2), or give num_kv_heads"
        )
    if head_dim is not None and shape[3] != head_dim:
        raise LayoutError(f"{label} has shape {shape} with D = {shape[3]}, not {head_dim}")


def _require_like_first(layer: int, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    if shape[:3] == first[:3]:
        return
    if shape[1] != first[1] and shape[2] == first[2]:
        hint = "heads differ, so they may be tokens: heads and tokens are swapped?"
    elif shape[2] != first[2] and shape[1] == first[1]:
        hint = "layers that keep another number of tokens need a cache of their own"
    else:
        hint = "all layers must have the same B, H and T"
    raise LayoutError(f"layer {layer} has shape {shape}, layer 0 {first}: {hint}")
