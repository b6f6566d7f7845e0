"""The methods that ``bench_paged_copy.py`` compares, each as a call that moves a case's tokens."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _paged_cases import CHUNK_TOKENS, Case
from _pointer_list import copy_list
from _timing import Call

import kvheap

LOOP_COPIES_ON_GPU = 512
LIST_ENTRIES_ON_GPU = 16_384

LMCACHE_FORMATS = {
    "vllm-flash-nhd": "NL_X_TWO_NB_BS_NH_HS",
    "vllm-flashinfer-nhd": "NL_X_NB_TWO_BS_NH_HS",
    "mla": "NL_X_NB_BS_HS",
}
"""LMCache's names of engine layouts."""


def calls_of(case: Case, operation: str, lmcache: LMCache | None) -> dict[str, Call]:
    """The call of each method that does the operation once."""
    own = store if operation == "store" else load
    calls = {"copy_": contiguous(case, operation), "kvheap": own(case, case.on_device())}
    if case.world.cache.device.type == "cuda":
        calls["kvheap + upload"] = own(case, case.given)
        calls["list"] = pointer_list(case, operation)
    elif lmcache is not None and case.world.geometry.layout in LMCACHE_FORMATS:
        calls["LMCache"] = lmcache.call(case, operation)
    calls["index"] = index(case, operation)
    if case.pattern != "tokens":
        calls["loop"] = loop(case, operation)
    return calls


def moved_shares(case: Case) -> dict[str, float]:
    """The share of the bytes that a method moves, for the methods that may not move all."""
    if case.world.cache.device.type != "cuda":
        return {}
    geometry = case.world.geometry
    copies = geometry.num_layers * len(case.slots) // geometry.block_size
    entries = case.world.side_bytes // geometry.run_bytes(case.pattern)
    return {
        "loop": min(1.0, LOOP_COPIES_ON_GPU / copies),
        "list": min(1.0, LIST_ENTRIES_ON_GPU / entries),
    }


def check(case: Case, operation: str, method: str, call: Call) -> None:
    """Raise if a method that moves everything moves wrong bytes."""
    world, geometry = case.world, case.world.geometry
    target = world.heap if operation == "store" else world.engine
    target.view(torch.int64).random_()
    call()
    world.cache.synchronize()
    slots = torch.from_numpy(case.slots).to(world.cache.device)
    dense = world.heap[: world.side_bytes].view(torch.int64)
    of_layer = dense.chunk(geometry.num_layers)
    for layer in range(geometry.num_layers):
        in_cache = world.blocks_of(layer).flatten(1, 2)[:, slots]
        if method == "index":
            in_heap = of_layer[layer].view(in_cache.shape)
        else:
            in_heap = world.chunks_of(layer).flatten(1, 2)[:, : len(slots)]
        if not torch.equal(in_cache, in_heap):
            raise RuntimeError(
                f"{method} moved wrong bytes: {operation}, {geometry.name}, {case.pattern}, "
                f"layer {layer}"
            )


def store(case: Case, places: Any) -> Call:
    return partial(kvheap.store, case.world.cache, places, case.world.batch)


def load(case: Case, places: Any) -> Call:
    return partial(kvheap.load, case.world.batch, case.world.cache, places)


def contiguous(case: Case, operation: str) -> Call:
    """One ``copy_`` of as many bytes: the ceiling."""
    size = case.world.side_bytes
    ends = (case.world.heap[:size], case.world.engine[:size])
    target, source = ends if operation == "store" else ends[::-1]
    return partial(target.copy_, source)


def index(case: Case, operation: str) -> Call:
    """One indexed copy per layer; it uses the heap as [L, planes, tokens, heads], not as chunks."""
    world = case.world
    words = world.geometry.run_bytes(case.pattern) // 8
    dense = world.heap[: world.side_bytes].view(torch.int64)
    numbers = torch.from_numpy(case.run_numbers().reshape(-1)).to(world.cache.device)
    calls: list[Call] = []
    for layer, part in zip(world.layers, dense.chunk(world.geometry.num_layers), strict=True):
        engine_rows = layer.view(-1).view(torch.int64).view(-1, words)
        own = part.view(-1, words)
        if operation == "store":
            calls.append(partial(torch.index_select, engine_rows, 0, numbers, out=own))
        else:
            calls.append(partial(engine_rows.index_copy_, 0, numbers, own))
    return partial(call_all, calls)


def loop(case: Case, operation: str) -> Call:
    """One ``copy_`` per block and layer, with views made beforehand."""
    world, block_size = case.world, case.world.cache.block_size
    copies = LOOP_COPIES_ON_GPU if world.cache.device.type == "cuda" else None
    pairs = []
    ids = (case.slots[::block_size] // block_size).tolist()
    places = itertools.product(range(world.geometry.num_layers), enumerate(ids))
    for layer, (number, block) in itertools.islice(places, copies):
        chunk, first = divmod(number * block_size, CHUNK_TOKENS)
        of_heap = world.chunks_of(layer)[:, chunk, first : first + block_size]
        ends = (of_heap, world.blocks_of(layer)[:, block])
        pairs.append(ends if operation == "store" else ends[::-1])
    return partial(copy_each, pairs)


def pointer_list(case: Case, operation: str) -> Call:
    """The pointer-list kernel over the first entries, layer by layer; the list is on the device."""
    world, geometry = case.world, case.world.geometry
    run_bytes, numbers = geometry.run_bytes(case.pattern), case.run_numbers()
    num_layers = min(geometry.num_layers, -(-LIST_ENTRIES_ON_GPU // numbers.size))
    layers = np.arange(num_layers)[:, None, None, None]
    cache_sides = world.cache.base_addresses[layers, 0] + numbers * run_bytes
    tokens = np.arange(0, len(case.slots), case.unit_tokens)[:, None]
    planes = np.arange(geometry.num_planes)[:, None, None]
    chunks, in_chunk = np.divmod(tokens, CHUNK_TOKENS)
    chunk_rows = (planes * geometry.num_layers + layers) * CHUNK_TOKENS + in_chunk
    heads = np.arange(numbers.shape[2]) * run_bytes
    heap_sides = chunks * world.batch.size_bytes + chunk_rows * geometry.row_bytes + heads
    ends = (world.heap.data_ptr() + heap_sides, cache_sides)
    target, source = ends if operation == "store" else ends[::-1]
    first = slice(LIST_ENTRIES_ON_GPU)
    device = world.cache.device
    sources, targets = (
        torch.from_numpy(side.reshape(-1)[first].astype(np.int64)).to(device)
        for side in (source, target)
    )
    sizes = torch.full((len(sources),), run_bytes, dtype=torch.int64, device=device)
    return partial(copy_list, sources, targets, sizes)


@dataclass(frozen=True, slots=True)
class LMCache:
    """LMCache's transfer on the CPU."""

    transfer: Callable[..., None]
    native: Any

    @classmethod
    def find(cls) -> LMCache | None:
        """None if LMCache, or a module that its import asks for, is missing."""
        try:
            kernels = importlib.import_module("lmcache.v1.platform.torch_ops.mem_kernels")
            native = importlib.import_module("lmcache.lmcache_native")
        except ImportError:
            return None
        return cls(kernels.multi_layer_kv_transfer, native)

    def call(self, case: Case, operation: str) -> Call:
        """A call per chunk, with all arguments made beforehand."""
        geometry, world = case.world.geometry, case.world
        num_slots = world.cache.num_slots
        flat = {
            "vllm-flash-nhd": (2, num_slots, -1),
            "vllm-flashinfer-nhd": (-1, 2, geometry.block_size, geometry.row_bytes // 2),
            "mla": (num_slots, -1),
        }[geometry.layout]
        layers = [layer.view(flat) for layer in world.layers]
        directions = self.native.TransferDirection
        direction = directions.D2H if operation == "store" else directions.H2D
        engine_format = getattr(self.native.EngineKVFormat, LMCACHE_FORMATS[geometry.layout])
        slots = torch.split(torch.from_numpy(case.slots), CHUNK_TOKENS)
        arguments = (torch.device("cpu"), num_slots, direction, engine_format, geometry.block_size)
        calls = [
            partial(self.transfer, obj.tensor, layers, of_chunk, *arguments)
            for obj, of_chunk in zip(world.batch, slots, strict=True)
        ]
        return partial(call_all, calls)


def call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def copy_each(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)
