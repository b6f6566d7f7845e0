"""K and V of the caches of Hugging Face's transformers, as a (K, V) pair for each layer.

Facts from transformers 5.24.0, ``cache_utils.py``: a cache has ``layers``; a layer that holds
attention has ``keys`` and ``values`` of ``[batch, heads, tokens, head dim]``, which are None or
empty before its first token. Layers of a sliding window keep their last tokens only: their
``get_seq_length()`` counts more tokens than the tensors have. Those of a ``StaticCache`` have room
for more tokens than it counts. Older caches have the lists ``key_cache`` and ``value_cache``, and
the oldest are tuples of (K, V).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kvheap.kernels.arguments import as_whole
from kvheap.kernels.engine_layouts import LayoutError
from kvheap.kernels.tensor_dims import kind_of

__all__ = ["KeyValues", "key_value_tensors"]

Pair = tuple[torch.Tensor, torch.Tensor]

MAX_HEADS = 256
"""More KV heads than any known model has (GPT-3 has 96): what looks like more are tokens."""


class KeyValues(NamedTuple):
    """The tensors of a cache, and how many tokens of each layer are filled, if that is known."""

    pairs: list[Pair]
    filled: tuple[int, ...] | None


def key_value_tensors(
    cache: object, num_kv_heads: int | None = None, head_dim: int | None = None
) -> KeyValues:
    """The (K, V) tensors ``[B, H, T, D]`` of each layer, checked.

    Args:
        cache: an object with ``layers`` or with ``key_cache`` and ``value_cache``, or a pair for
            each layer.
        num_kv_heads: KV heads H, if known.
        head_dim: elements of a head of K, if known.

    Raises:
        LayoutError: a layer has no K and V, keeps only a window of its tokens, or does not fit the
            others or what was given; or two pairs may be two lists.
        TypeError: ``cache`` is of another kind, or counts its tokens in no integer.
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
    _require_pairs(cache, pairs)
    return KeyValues(pairs, _filled(cache, pairs))


def _pairs(cache: Any) -> list[Pair]:
    if isinstance(cache, torch.Tensor | str):
        raise TypeError(f"a cache of transformers or (K, V) pairs is needed, got {kind_of(cache)}")
    if hasattr(cache, "self_attention_cache"):
        raise TypeError(
            f"{type(cache).__name__} is two caches: give its self_attention_cache or "
            f"cross_attention_cache"
        )
    if hasattr(cache, "layers"):
        layers = _listed("layers", cache.layers)
        return [_of_layer(number, layer) for number, layer in enumerate(layers)]
    if hasattr(cache, "key_cache") and hasattr(cache, "value_cache"):
        keys = _listed("key_cache", cache.key_cache)
        values = _listed("value_cache", cache.value_cache)
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
    return keys, values


def _listed(name: str, value: Any) -> list[Any]:
    """What a cache has for each layer; one tensor of all layers counts as a list.

    Raises:
        TypeError: it is no list.
    """
    is_stacked = isinstance(value, torch.Tensor) and value.dim() == 5
    is_other = isinstance(value, (torch.Tensor, str, bytes, Mapping))
    if not is_stacked and (is_other or not hasattr(value, "__iter__")):
        raise TypeError(f"{name} of a cache must be a list, got {kind_of(value)}")
    return list(value)


def _filled(cache: Any, pairs: list[Pair]) -> tuple[int, ...] | None:
    """How many tokens each layer counts, if it does.

    Raises:
        LayoutError: it counts more than its tensors have.
        TypeError: the count is no integer.
    """
    if hasattr(cache, "layers"):
        counted = list(cache.layers)
    elif hasattr(cache, "key_cache"):
        counted = [cache] * len(pairs)
    else:
        return None
    if not all(callable(getattr(one, "get_seq_length", None)) for one in counted):
        return None
    filled = []
    for number, (one, (keys, _)) in enumerate(zip(counted, pairs, strict=True)):
        name = f"layer {number}, a {type(one).__name__},"
        count = as_whole(f"get_seq_length() of {name[:-1]}", one.get_seq_length())
        if not 0 <= count <= keys.shape[2]:
            raise LayoutError(
                f"{name} counts {count} tokens, but its keys [B, H, T, D] are "
                f"{tuple(keys.shape)}: it keeps a window or quantized tokens, or heads and tokens "
                f"are swapped"
            )
        filled.append(count)
    return tuple(filled)


def _require_pairs(cache: Any, pairs: list[Pair]) -> None:
    """Refuse two pairs of equal shapes that nobody calls K and V of two layers.

    Raises:
        LayoutError: they may be K of both layers, and V of both.
    """
    if hasattr(cache, "layers") or hasattr(cache, "key_cache") or len(pairs) != 2:
        return
    if len({tuple(side.shape) for pair in pairs for side in pair}) == 1:
        raise LayoutError(
            "two pairs of tensors may be (K, V) of two layers, or K of both and V of both: choose "
            "one by name, PagedKVCache.of('kv-tuples-hnd', [(k0, v0), (k1, v1)]) or "
            "PagedKVCache.of('sglang-mha-hnd', ([k0, k1], [v0, v1]))"
        )


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
