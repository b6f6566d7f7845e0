"""Store and load of paged KV caches, against peers and one plain ``copy_`` of as many bytes.

An engine's cache has twice as many slots as there are tokens. A store copies the tokens of all
layers into chunks of 256 tokens in a heap, [2, L, 256, H * C] or [1, L, 256, D]; a load copies them
back. Where the tokens are:

=========  =======================================================================================
pattern    how the tokens are named
=========  =======================================================================================
blocks     whole blocks in random order, as ``BlockIds``
runs       the same, in runs of 8 neighbours in random order (CPU only)
tokens     each token in a random slot, as a slot mapping
=========  =======================================================================================

Every method moves the same bytes in the same round:

================  ================================================================================
method            what runs
================  ================================================================================
copy_             one contiguous ``Tensor.copy_``: the ceiling, and the peak that shares refer to
kvheap            ``kvheap.store`` or ``kvheap.load``; on a GPU, slots or block ids are there
kvheap + upload   the same with slots or block ids on the host (GPU only)
LMCache           its CPU implementation of the same transfer, ``multi_layer_kv_transfer``, once for
                  each chunk, by slots (CPU only; it has none for HND; ``pip install --no-deps
                  lmcache==0.5.6`` and the modules that its import asks for)
index             one ``index_select`` or ``index_copy_`` of int64 words for each layer, on blocks
                  where those are contiguous; it fills no chunks but [L, planes, tokens, heads]
loop              one ``copy_`` for each block and layer (on a GPU, the first 512 of them only)
list              a Triton kernel of 12 programs over (source, target, bytes), as vLLM's for its
                  offloading; the list is there already, and the first 16,384 entries are copied
================  ================================================================================

Bytes count read + write, without slots and addresses. On a GPU, ``copy_`` and ``kvheap`` are queued
behind a kernel that keeps the GPU busy until all is submitted: so submission is outside, and the
upload of the chunks' addresses, which is part of every call, inside. They are not replayed from a
CUDA graph because of that upload. ``index`` and ``list`` are, and ``kvheap + upload`` and ``loop``
include their submission, as a caller would see it. Sets of tensors rotate until one rotation moves
at least four times the L2. The time that the host needs to submit one call is in a table of its
own. Before a case is timed, what each method that moves everything has moved is compared.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from _report import (
    Measure,
    Samples,
    describe_machine,
    in_a_graph,
    make_console,
    on_the_host,
    on_the_stream,
    parse_common,
    pyplot,
    size_label,
    submission,
    time_in_rounds,
    write_json,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels.launch import jit, tl
from kvheap.kernels.paged_layout import LAYOUTS

CHUNK_TOKENS = 256
RUN_BLOCKS = 8
SPARE = 2
"""Slots for each token."""

LOOP_COPIES_ON_GPU = 512
LIST_ENTRIES_ON_GPU = 16_384
LIST_PROGRAMS = 12
LIST_WORDS = 1024
LONGEST_SLEEP = 1 << 28

TARGET_TIMES_LMCACHE = 2.0
TARGET_SUBMISSION_US = 30.0
TARGET_FROM_BYTES = 64 << 20
"""On one side. Below, launches count more than copying: shares are reported, not judged."""

MEMORY_SHARE = 0.8
"""Of a GPU's free memory, for all sets of a case."""

SECONDS_ON_GPU = 85
"""Cases that are not begun by then, those of most tokens, are left out."""

PATTERNS = {"blocks": "random blocks", "runs": f"runs of {RUN_BLOCKS} blocks", "tokens": "tokens"}
OPERATIONS = ("store", "load")

Call = Callable[[], object]
Row = dict[str, Any]
Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The KV cache of a model, in the layout of an engine."""

    model: str
    layout: str
    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16

    @property
    def name(self) -> str:
        """Model and layout."""
        return f"{self.model} {self.layout}"

    @property
    def num_planes(self) -> int:
        """2 where K and V are apart."""
        return LAYOUTS[self.layout].num_planes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one token in one plane."""
        return self.head_dim * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer and plane."""
        return self.num_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers and planes."""
        return self.num_layers * self.num_planes * self.row_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether the heads of a token, and the tokens of a block, lie as they do in a chunk."""
        return "HN" not in LAYOUTS[self.layout].dims

    def run_bytes(self, pattern: str) -> int:
        """Bytes that lie together on both sides."""
        if not self.is_contiguous:
            return self.head_bytes
        return self.row_bytes * (1 if pattern == "tokens" else self.block_size)

    def target(self, pattern: str) -> float | None:
        """The share of ``copy_`` to reach on a GPU."""
        run_bytes = self.run_bytes(pattern)
        if pattern != "tokens":
            return 0.92 if run_bytes >= 4096 else None
        if run_bytes >= 1024:
            return 0.85
        return 0.75 if self.layout == "mla" and run_bytes >= 576 else None


LLAMA_8B = Geometry("llama-3-8b", "vllm-flash-nhd", 32, 8, 128)
GPU_GEOMETRIES = (
    LLAMA_8B,
    Geometry("llama-3-8b", "vllm-flashinfer-nhd", 32, 8, 128),
    Geometry("llama-3-8b", "vllm-flash-hnd", 32, 8, 128),
    Geometry("llama-3-70b-tp4", "vllm-flash-nhd", 80, 2, 128),
    Geometry("qwen3-8b", "vllm-flash-nhd", 36, 8, 128),
    Geometry("gpt-oss, 12 full layers", "vllm-flash-nhd", 12, 8, 64),
    Geometry("deepseek-v3", "mla", 61, 1, 576, block_size=64),
    Geometry("deepseek-v3-fp8", "mla", 61, 1, 576, torch.uint8, block_size=64),
    Geometry("deepseek-v3-fp8-656", "mla", 61, 1, 656, torch.uint8, block_size=64),
)
CPU_GEOMETRIES = (
    Geometry("llama-3-8b, 8 layers", "vllm-flash-nhd", 8, 8, 128),
    Geometry("llama-3-8b, 8 layers", "vllm-flashinfer-nhd", 8, 8, 128),
    Geometry("llama-3-8b, 8 layers", "vllm-flash-hnd", 8, 8, 128),
    Geometry("deepseek-v2-lite", "mla", 27, 1, 576),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    geometries: tuple[Geometry, ...]
    token_counts: tuple[int, ...]
    patterns: tuple[str, ...]
    rounds: int
    submitted_tokens: tuple[int, ...]

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Scale:
        """What takes a minute or two on this kind of device, or some seconds."""
        if device.type != "cuda":
            counts = (512 if quick else 1024,)
            return cls(CPU_GEOMETRIES, counts, tuple(PATTERNS), 3 if quick else 15, ())
        token_counts = (64, 8192) if quick else (64, 1024, 8192, 32_768, 131_072)
        submitted = (64, 8192) if quick else (64, 1024, 8192, 32_768)
        return cls(GPU_GEOMETRIES, token_counts, ("blocks", "tokens"), 5 if quick else 7, submitted)


# -- peers -----------------------------------------------------------------------------------------

LMCACHE_FORMATS = {
    "vllm-flash-nhd": "NL_X_TWO_NB_BS_NH_HS",
    "vllm-flashinfer-nhd": "NL_X_NB_TWO_BS_NH_HS",
    "mla": "NL_X_NB_BS_HS",
}


@dataclass(frozen=True, slots=True)
class LMCache:
    """LMCache's CPU implementation."""

    transfer: Callable[..., None]
    native: Any

    @classmethod
    def find(cls) -> LMCache | None:
        """None where LMCache, or a module that its import asks for, is missing."""
        try:
            kernels = importlib.import_module("lmcache.v1.platform.torch_ops.mem_kernels")
            native = importlib.import_module("lmcache.lmcache_native")
        except ImportError:
            return None
        return cls(kernels.multi_layer_kv_transfer, native)

    def call(self, case: Case, operation: str) -> Call:
        """A call for each chunk, all arguments made beforehand."""
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


@jit(do_not_specialize=["num_entries"])
def _copy_list_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    target_ptr,
    bytes_ptr,
    num_entries,
    PROGRAMS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """Copy every ``PROGRAMS``-th entry of a list of addresses, in words of 8 bytes."""
    for entry in range(tl.program_id(0), num_entries, PROGRAMS):
        source = tl.load(source_ptr + entry).to(tl.pointer_type(tl.int64))
        target = tl.load(target_ptr + entry).to(tl.pointer_type(tl.int64))
        num_words = tl.load(bytes_ptr + entry) // 8
        for first in range(0, num_words, WORDS):
            words = first + tl.arange(0, WORDS)
            mask = words < num_words
            tl.store(target + words, tl.load(source + words, mask=mask), mask=mask)


def call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def copy_each(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)


# -- what is copied --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """One set of tensors: an engine's cache, and a heap that is one batch of chunks."""

    geometry: Geometry
    num_tokens: int
    engine: torch.Tensor
    layers: list[torch.Tensor]
    cache: PagedKVCache
    heap: torch.Tensor
    batch: kvheap.MemoryBatch

    @classmethod
    def make(cls, device: torch.device, geometry: Geometry, num_tokens: int) -> World:
        """Random bytes on both sides."""
        num_blocks = SPARE * -(-num_tokens // geometry.block_size)
        engine = random_bytes(num_blocks * geometry.block_size * geometry.token_bytes, device)
        dims = LAYOUTS[geometry.layout].dims
        sizes = {"P": 2, "B": num_blocks, "N": geometry.block_size}
        sizes |= {"H": geometry.num_heads, "C": geometry.head_dim}
        layers = [
            part.view(geometry.dtype).view([sizes[dim] for dim in dims])
            for part in engine.chunk(geometry.num_layers)
        ]
        num_chunks = -(-num_tokens // CHUNK_TOKENS)
        heap = random_bytes(num_chunks * CHUNK_TOKENS * geometry.token_bytes, device)
        shape = (
            geometry.num_planes,
            geometry.num_layers,
            CHUNK_TOKENS,
            geometry.num_heads * geometry.head_dim,
        )
        is_mla = geometry.num_planes == 1
        fmt = MemoryFormat.KV_MLA_FMT if is_mla else MemoryFormat.KV_2LTD
        allocator = TensorMemoryAllocator(heap, debug=False)
        batch = allocator.batched_allocate(shape, geometry.dtype, num_chunks, fmt)
        if batch is None or batch.num_runs != 1:
            raise RuntimeError(f"{num_chunks} chunks {shape} are not all of the heap")
        cache = PagedKVCache.of(geometry.layout, layers)
        return cls(geometry, num_tokens, engine, layers, cache, heap, batch)

    @property
    def side_bytes(self) -> int:
        """Bytes that a copy reads, and writes."""
        return self.num_tokens * self.geometry.token_bytes

    def blocks_of(self, layer: int) -> torch.Tensor:
        """A layer as int64 words ``[planes, blocks, block size, heads, words]``, a view."""
        words, dims = self.layers[layer].view(torch.int64), LAYOUTS[self.geometry.layout].dims
        ordered = words.permute([dims.index(dim) for dim in "PBNHC" if dim in dims])
        return ordered if "P" in dims else ordered[None, :, :, None]

    def chunks_of(self, layer: int) -> torch.Tensor:
        """A layer as int64 words ``[planes, chunks, tokens, heads, words]``, a view."""
        geometry = self.geometry
        parts = (geometry.num_planes, geometry.num_layers, CHUNK_TOKENS, geometry.num_heads)
        words = self.heap.view(torch.int64).view(len(self.batch), *parts, -1)
        return words[:, :, layer].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Case:
    """A set of tensors, and where in the cache the tokens are."""

    world: World
    pattern: str
    slots: Int64Array
    given: BlockIds | Int64Array
    """Slots or block ids as kvheap gets them, on the host."""

    @classmethod
    def make(cls, world: World, pattern: str, seed: int) -> Case:
        """Tokens in random places."""
        generator = np.random.default_rng(seed)
        if pattern == "tokens":
            slots = generator.permutation(world.cache.num_slots)[: world.num_tokens]
            return cls(world, pattern, slots, slots)
        num_blocks = world.num_tokens // world.cache.block_size
        run = 1 if pattern == "blocks" else min(RUN_BLOCKS, num_blocks)
        firsts = generator.permutation(world.cache.num_blocks // run)[: -(-num_blocks // run)] * run
        ids = (firsts[:, None] + np.arange(run)).ravel()[:num_blocks]
        slots = (ids[:, None] * world.cache.block_size + np.arange(world.cache.block_size)).ravel()
        return cls(world, pattern, slots, BlockIds(ids))

    def on_device(self) -> BlockIds | torch.Tensor | Int64Array:
        """Slots or block ids on the cache's device."""
        device = self.world.cache.device
        if device.type == "cpu":
            return self.given
        if isinstance(self.given, BlockIds):
            return BlockIds(torch.from_numpy(np.asarray(self.given.ids)).to(device))
        return torch.from_numpy(self.given).to(device)

    def calls(self, operation: str, lmcache: LMCache | None) -> dict[str, Call]:
        """What each method calls to do the operation once."""
        world = self.world
        own: Callable[..., Call] = self._store if operation == "store" else self._load
        calls: dict[str, Call] = {
            "copy_": self._plain(operation),
            "kvheap": own(self.on_device()),
        }
        if world.cache.device.type == "cuda":
            calls["kvheap + upload"] = own(self.given)
            calls["list"] = self._list(operation)
        elif lmcache is not None and world.geometry.layout in LMCACHE_FORMATS:
            calls["LMCache"] = lmcache.call(self, operation)
        calls["index"] = self._index(operation)
        if self.pattern != "tokens":
            calls["loop"] = self._loop(operation)
        return calls

    def moved_shares(self) -> dict[str, float]:
        """How much of the bytes those methods move that do not move all."""
        if self.world.cache.device.type != "cuda":
            return {}
        geometry = self.world.geometry
        copies = geometry.num_layers * len(self.slots) // geometry.block_size
        entries = self.world.side_bytes // geometry.run_bytes(self.pattern)
        return {
            "loop": min(1.0, LOOP_COPIES_ON_GPU / copies),
            "list": min(1.0, LIST_ENTRIES_ON_GPU / entries),
        }

    def _store(self, slots: Any) -> Call:
        return partial(kvheap.store, self.world.cache, slots, self.world.batch)

    def _load(self, slots: Any) -> Call:
        return partial(kvheap.load, self.world.batch, self.world.cache, slots)

    def _plain(self, operation: str) -> Call:
        size = self.world.side_bytes
        ends = (self.world.heap[:size], self.world.engine[:size])
        target, source = ends if operation == "store" else ends[::-1]
        return partial(target.copy_, source)

    def _index(self, operation: str) -> Call:
        """One call a layer; the heap's bytes serve as [L, planes, tokens, heads]."""
        world, rows = self.world, self._rows()
        words = world.geometry.run_bytes(self.pattern) // 8
        dense = world.heap[: world.side_bytes].view(torch.int64)
        numbers = torch.from_numpy(rows.reshape(-1)).to(world.cache.device)
        calls: list[Call] = []
        for layer, part in zip(world.layers, dense.chunk(world.geometry.num_layers), strict=True):
            engine_rows = layer.view(-1).view(torch.int64).view(-1, words)
            own = part.view(-1, words)
            if operation == "store":
                calls.append(partial(torch.index_select, engine_rows, 0, numbers, out=own))
            else:
                calls.append(partial(engine_rows.index_copy_, 0, numbers, own))
        return partial(call_all, calls)

    @property
    def unit_tokens(self) -> int:
        """Tokens that lie together on both sides."""
        is_unit = self.pattern != "tokens" and self.world.geometry.is_contiguous
        return self.world.geometry.block_size if is_unit else 1

    def _rows(self) -> Int64Array:
        """Numbers of the runs of a layer, ``[planes, units, runs of a unit]``."""
        cache, geometry = self.world.cache, self.world.geometry
        plane = cache.planes[0]
        blocks, offsets = np.divmod(self.slots[:: self.unit_tokens], cache.block_size)
        starts = blocks * plane.block_stride + offsets * plane.slot_stride
        pieces = 1 if geometry.is_contiguous else geometry.num_heads
        heads = np.arange(pieces) * plane.head_stride
        planes = cache.base_addresses[0] - cache.base_addresses[0, 0]
        addresses = planes[:, None, None] + starts[:, None] + heads
        rows: Int64Array = addresses // geometry.run_bytes(self.pattern)
        return rows

    def _list(self, operation: str) -> Call:
        """The pointer-list kernel over the first entries, layer by layer."""
        world, geometry = self.world, self.world.geometry
        run_bytes, rows = geometry.run_bytes(self.pattern), self._rows()
        num_layers = min(geometry.num_layers, -(-LIST_ENTRIES_ON_GPU // rows.size))
        layers = np.arange(num_layers)[:, None, None, None]
        cache_sides = world.cache.base_addresses[layers, 0] + rows * run_bytes
        tokens = np.arange(0, len(self.slots), self.unit_tokens)[:, None]
        planes = np.arange(geometry.num_planes)[:, None, None]
        chunks, in_chunk = np.divmod(tokens, CHUNK_TOKENS)
        chunk_rows = (planes * geometry.num_layers + layers) * CHUNK_TOKENS + in_chunk
        heads = np.arange(rows.shape[2]) * run_bytes
        heap_sides = chunks * world.batch.size_bytes + chunk_rows * geometry.row_bytes + heads
        ends = (world.heap.data_ptr() + heap_sides, cache_sides)
        target, source = ends if operation == "store" else ends[::-1]
        first = slice(LIST_ENTRIES_ON_GPU)
        device = world.cache.device
        to_device = [
            torch.from_numpy(side.reshape(-1)[first].astype(np.int64)).to(device)
            for side in (source, target)
        ]
        num_entries = len(to_device[0])
        sizes = torch.full((num_entries,), run_bytes, dtype=torch.int64, device=device)
        launch = _copy_list_kernel[(LIST_PROGRAMS,)]
        return partial(
            launch, *to_device, sizes, num_entries, PROGRAMS=LIST_PROGRAMS, WORDS=LIST_WORDS
        )

    def _loop(self, operation: str) -> Call:
        """Pairs of views, made beforehand."""
        world, block_size = self.world, self.world.cache.block_size
        copies = LOOP_COPIES_ON_GPU if world.cache.device.type == "cuda" else None
        pairs = []
        ids = (self.slots[::block_size] // block_size).tolist()
        places = itertools.product(range(world.geometry.num_layers), enumerate(ids))
        for layer, (number, block) in itertools.islice(places, copies):
            chunk, first = divmod(number * block_size, CHUNK_TOKENS)
            of_heap = world.chunks_of(layer)[:, chunk, first : first + block_size]
            ends = (of_heap, world.blocks_of(layer)[:, block])
            pairs.append(ends if operation == "store" else ends[::-1])
        return partial(copy_each, pairs)


def random_bytes(size_bytes: int, device: torch.device) -> torch.Tensor:
    words = torch.empty(size_bytes // 8, dtype=torch.int64, device=device)
    return words.random_().view(torch.uint8)


def check(case: Case, operation: str, method: str, call: Call) -> None:
    """A benchmark of wrong results is worth nothing."""
    world = case.world
    target = world.heap if operation == "store" else world.engine
    target.view(torch.int64).random_()
    call()
    world.cache.synchronize()
    slots = torch.from_numpy(case.slots).to(world.cache.device)
    geometry = world.geometry
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


# -- timing ----------------------------------------------------------------------------------------


def behind_a_sleep(calls: Sequence[Call]) -> Measure:
    """Device time of the mean call; the device is kept busy until all are submitted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 1 << 20

    def measure() -> float:
        nonlocal cycles
        while True:
            torch.cuda._sleep(cycles)
            start.record()
            for call in calls:
                call()
            end.record()
            is_hidden = not start.query()
            end.synchronize()
            if is_hidden:
                return float(start.elapsed_time(end)) * 1e3 / len(calls)
            cycles *= 2
            if cycles > LONGEST_SLEEP:
                raise RuntimeError("the device was never busy until all calls were submitted")

    return measure


def timed(method: str, calls: Sequence[Call], device: torch.device) -> Measure:
    if device.type != "cuda":
        return on_the_host(calls)
    if method in ("copy_", "kvheap"):
        return behind_a_sleep(calls)
    return in_a_graph(calls) if method in ("index", "list") else on_the_stream(calls)


def measure_group(
    worlds: list[World], pattern: str, operation: str, scale: Scale, lmcache: LMCache | None
) -> list[Row]:
    """Time every method on one case; a row for each."""
    device = worlds[0].cache.device
    cases = [Case.make(world, pattern, seed) for seed, world in enumerate(worlds)]
    of_each = [case.calls(operation, lmcache) for case in cases]
    shares = cases[0].moved_shares()
    for method, call in of_each[0].items():
        if method != "copy_" and shares.get(method, 1.0) == 1.0:
            check(cases[0], operation, method, call)
    measures = {
        method: timed(method, [calls[method] for calls in of_each], device) for method in of_each[0]
    }
    samples = time_in_rounds(measures, scale.rounds)
    return [
        labels_of(worlds[0], pattern, operation)
        | {"method": method}
        | figures(samples, method, worlds[0].side_bytes, shares.get(method, 1.0))
        for method in samples
    ]


def labels_of(world: World, pattern: str, operation: str) -> Row:
    geometry = world.geometry
    return {
        "operation": operation,
        "pattern": pattern,
        "model": geometry.model,
        "layout": geometry.layout,
        "num_tokens": world.num_tokens,
        "block_size": geometry.block_size,
        "run_bytes": geometry.run_bytes(pattern),
        "side_bytes": world.side_bytes,
    }


def figures(samples: dict[str, Samples], method: str, side_bytes: int, share: float) -> Row:
    timing = samples[method]
    bytes_moved = 2 * side_bytes * share
    row: Row = {
        "bytes_read_and_written": round(bytes_moved),
        **timing.percentiles(),
        "gb_per_s": round(bytes_moved / timing.percentile(50) / 1e3, 2),
        "share_of_copy": round(timing.speed_against(samples["copy_"], share), 4),
    }
    if method == "kvheap" and "LMCache" in samples:
        row["times_lmcache"] = round(timing.speed_against(samples["LMCache"]), 2)
    return row


def num_sets(device: torch.device, side_bytes: int) -> int:
    if device.type != "cuda":
        return 2
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-4 * l2_bytes // (2 * side_bytes)))


def memory_needed(device: torch.device, geometry: Geometry, num_tokens: int) -> int:
    """Bytes of all sets of a case, and of what checks and indices take for a while."""
    chunk_tokens = -(-num_tokens // CHUNK_TOKENS) * CHUNK_TOKENS
    set_bytes = (SPARE * num_tokens + chunk_tokens) * geometry.token_bytes
    sets = num_sets(device, num_tokens * geometry.token_bytes)
    return sets * set_bytes + 6 * num_tokens * geometry.num_planes * geometry.row_bytes


def fits(device: torch.device, geometry: Geometry, num_tokens: int) -> bool:
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return memory_needed(device, geometry, num_tokens) <= MEMORY_SHARE * free_bytes


def measure_size(
    device: torch.device,
    geometry: Geometry,
    num_tokens: int,
    scale: Scale,
    lmcache: LMCache | None,
) -> list[Row]:
    """All patterns and operations on one set of sizes."""
    count = num_sets(device, num_tokens * geometry.token_bytes)
    worlds = [World.make(device, geometry, num_tokens) for _ in range(count)]
    rows = []
    for pattern, operation in itertools.product(scale.patterns, OPERATIONS):
        rows += measure_group(worlds, pattern, operation, scale, lmcache)
        gc.collect()  # graphs keep memory
    return rows


def measure_all(
    device: torch.device, scale: Scale, lmcache: LMCache | None, console: Console
) -> tuple[list[Row], list[Row]]:
    """Rows of all cases, in the order of the geometries; and the cases that were left out."""
    rows: list[Row] = []
    left_out: list[Row] = []
    end = time.monotonic() + (SECONDS_ON_GPU if device.type == "cuda" else float("inf"))
    sizes = list(itertools.product(scale.token_counts, scale.geometries))
    for num_tokens, geometry in track(sizes, "measuring", console=console, transient=True):
        case = {"case": geometry.name, "num_tokens": num_tokens}
        gc.collect()
        if time.monotonic() > end:
            left_out.append(case | {"reason": f"{SECONDS_ON_GPU} s were over"})
        elif not fits(device, geometry, num_tokens):
            gib = memory_needed(device, geometry, num_tokens) / 2**30
            left_out.append(case | {"reason": f"needs {gib:.1f} GiB"})
        else:
            rows += measure_size(device, geometry, num_tokens, scale, lmcache)
    order = [(geometry.model, geometry.layout) for geometry in scale.geometries]
    rows.sort(key=lambda row: order.index((row["model"], row["layout"])))
    return rows, left_out


def measure_submission(device: torch.device, scale: Scale) -> list[Row]:
    """Host time to submit one store to an idle GPU."""
    rows = []
    for num_tokens in scale.submitted_tokens:
        if not fits(device, LLAMA_8B, num_tokens):
            continue
        world = World.make(device, LLAMA_8B, num_tokens)
        measures = {}
        for pattern in ("blocks", "tokens"):
            calls = Case.make(world, pattern, 0).calls("store", None)
            measures["copy_"] = submission(calls["copy_"])
            measures[f"{pattern} on the device"] = submission(calls["kvheap"])
            measures[f"{pattern} on the host"] = submission(calls["kvheap + upload"])
        for method, timing in time_in_rounds(measures, scale.rounds).items():
            rows.append({"method": method, "num_tokens": num_tokens, **timing.percentiles()})
        del world, measures, calls
        gc.collect()
    return rows


# -- report ----------------------------------------------------------------------------------------

Key = tuple[str, str, str, int, str]


def grouped(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Rows of one case, by method."""
    groups: dict[Key, dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("model", "layout", "pattern", "num_tokens", "operation"))
        groups.setdefault(key, {})[row["method"]] = row
    return groups


def methods_of(rows: list[Row]) -> list[str]:
    """All methods but the ceiling, in one order."""
    return [method for method in dict.fromkeys(row["method"] for row in rows) if method != "copy_"]


def print_shares(console: Console, rows: list[Row]) -> None:
    methods = methods_of(rows)
    has_lmcache = "LMCache" in methods
    table = Table(title="Share of copy_ in the same rounds; copy_ in GB/s read + write")
    for title in ("model", "layout", "pattern"):
        table.add_column(title, overflow="fold")
    for title in ("tokens", "run", "", "copy_", *methods):
        table.add_column(title, justify="right")
    if has_lmcache:
        table.add_column("x LMCache", justify="right")
    last = None
    for key, group in grouped(rows).items():
        model, layout, pattern, num_tokens, operation = key
        if last is not None and last != key[:2]:
            table.add_section()
        run = size_label(group["copy_"]["run_bytes"])
        cells = [
            f"{group[m]['share_of_copy']:.1%}" if m in group else "" for m in ("copy_", *methods)
        ]
        cells[0] = f"{group['copy_']['gb_per_s']:,.1f}"
        if has_lmcache:
            times = group["kvheap"].get("times_lmcache")
            cells.append("" if times is None else f"{times:.2f}")
        names = (model, layout) if last != key[:2] else ("", "")
        table.add_row(*names, pattern, f"{num_tokens:,}", run, operation, *cells)
        last = key[:2]
    console.print(table)


def print_submission(console: Console, rows: list[Row]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table(title=f"Host time to submit one store, {LLAMA_8B.name}, us (p50)")
    for title in ("tokens", *methods):
        table.add_column(title, justify="right")
    for num_tokens in dict.fromkeys(row["num_tokens"] for row in rows):
        of_size = {row["method"]: row for row in rows if row["num_tokens"] == num_tokens}
        table.add_row(f"{num_tokens:,}", *(f"{of_size[m]['p50_us']:,.1f}" for m in methods))
    console.print(table)


def targets_of(rows: list[Row], submitted: list[Row], on_gpu: bool) -> list[Row]:
    """Each target beside the worst figure it is judged by."""
    own = [row for row in rows if row["method"] == "kvheap"]
    if not on_gpu:
        compared = [r for r in own if r["pattern"] == "tokens" and "times_lmcache" in r]
        return [
            worst_of("LMCache's speed, tokens", TARGET_TIMES_LMCACHE, compared, "times_lmcache")
        ]
    targets: dict[tuple[str, float], list[Row]] = {}
    by_name = {(g.model, g.layout): g for g in GPU_GEOMETRIES}
    for row in own:
        target = by_name[row["model"], row["layout"]].target(row["pattern"])
        if target is not None and row["side_bytes"] >= TARGET_FROM_BYTES:
            targets.setdefault((row["pattern"], target), []).append(row)
    found = [
        worst_of(
            f"copy_, {pattern} of {size_label(min(r['run_bytes'] for r in judged))} and more",
            target,
            judged,
            "share_of_copy",
        )
        for (pattern, target), judged in targets.items()
    ]
    on_device = [row for row in submitted if row["method"].endswith("on the device")]
    if on_device:
        slowest = max(on_device, key=lambda row: row["p50_us"])
        reached = slowest["p50_us"] <= TARGET_SUBMISSION_US
        found.append(
            {
                "target": "us of the host to submit",
                "asked": TARGET_SUBMISSION_US,
                "worst": slowest["p50_us"],
                "where": f"{slowest['method']}, {slowest['num_tokens']:,} tokens",
                "reached": reached,
            }
        )
    return found


def worst_of(title: str, asked: float, rows: list[Row], figure: str) -> Row:
    if not rows:
        return {"target": title, "asked": asked, "worst": None, "where": "", "reached": None}
    worst = min(rows, key=lambda row: row[figure])
    where = ", ".join(worst[k] for k in ("model", "layout", "pattern", "operation"))
    return {
        "target": title,
        "asked": asked,
        "worst": worst[figure],
        "where": f"{where}, {worst['num_tokens']:,} tokens",
        "reached": worst[figure] >= asked,
    }


def print_targets(console: Console, targets: list[Row]) -> None:
    for target in targets:
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[target["reached"]]
        worst = "" if target["worst"] is None else f"; worst {target['worst']} ({target['where']})"
        console.print(f"target of {target['asked']} ({target['target']}): {verdict}{worst}")


def draw(
    plt: ModuleType, rows: list[Row], patterns: tuple[str, ...], machine: dict[str, Any], path: Path
) -> None:
    """A panel for each operation and pattern."""
    on_gpu = machine["driver"] is not None
    size = (5.5 * len(patterns), 8.5) if on_gpu else (5 * len(patterns), 7.5)
    figure, panels = plt.subplots(
        2, len(patterns), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    draw_panel = draw_lines if on_gpu else draw_bars
    for across, operation in zip(panels, OPERATIONS, strict=True):
        for panel, pattern in zip(across, patterns, strict=True):
            shown = [r for r in rows if (r["operation"], r["pattern"]) == (operation, pattern)]
            draw_panel(panel, shown)
            panel.axhline(1.0, color="black", linewidth=1)
            panel.set_title(f"{operation}, {PATTERNS[pattern]}")
            panel.grid(alpha=0.3, axis="both" if on_gpu else "y")
        across[0].set_ylabel("speed / speed of one copy_")
    if on_gpu:
        for panel in panels[1]:
            panel.set_xlabel("tokens")
    panels[0, 0].set_ylim(0, 1.08 * max(1.0, *(row["share_of_copy"] for row in rows)))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if on_gpu else {}
    columns = {} if on_gpu else {"ncols": len(labels), "loc": "lower center"}
    note = "1.0 = copy_" if on_gpu else "1.0 = copy_; labels: kvheap against LMCache"
    title = f"Paged KV copy, {machine['device']}, {machine['date'][:10]} ({note})"
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(rect=(0, 0 if on_gpu else 0.05, 1, 1))
    figure.legend(handles, labels, **place, **columns)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_bars(panel: Any, rows: list[Row]) -> None:
    """One group for each layout, one bar for each method."""
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    methods = ("kvheap", "LMCache", "index", "loop")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        shown = {row["layout"]: row for row in rows if row["method"] == method}
        places = [layouts.index(layout) + (number - 1.5) * width for layout in shown]
        bars = panel.bar(
            places, [row["share_of_copy"] for row in shown.values()], width, label=method
        )
        if method == "kvheap":
            times = [row.get("times_lmcache") for row in shown.values()]
            texts = ["" if value is None else f"{value:.2f}x" for value in times]
            panel.bar_label(bars, texts, fontsize=8)
    panel.set_xticks(range(len(layouts)), layouts, rotation=15)


def draw_lines(panel: Any, rows: list[Row]) -> None:
    """Shares over tokens: kvheap one line for each geometry; the peers of the first one dashed."""
    peers = {"kvheap + upload": "P", "index": "^", "loop": "v", "list": "x"}
    for geometry in GPU_GEOMETRIES:
        label = f"{geometry.model}, {geometry.layout}"
        draw_line(panel, rows, geometry, "kvheap", marker="o", label=label)
    for method, marker in peers.items():
        look = {"color": "black", "linestyle": "--", "linewidth": 1, "marker": marker}
        label = f"{method}: {LLAMA_8B.model}, {LLAMA_8B.layout}"
        draw_line(panel, rows, LLAMA_8B, method, **look, label=label)
    counts = sorted({row["num_tokens"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [f"{count:,}" for count in counts])
    panel.minorticks_off()


def draw_line(panel: Any, rows: list[Row], geometry: Geometry, method: str, **look: Any) -> None:
    wanted = (geometry.model, geometry.layout, method)
    shown = [row for row in rows if (row["model"], row["layout"], row["method"]) == wanted]
    if shown:
        tokens = [row["num_tokens"] for row in shown]
        panel.plot(tokens, [row["share_of_copy"] for row in shown], **look)


def main() -> None:
    arguments = parse_common(__doc__.splitlines()[0])
    device, console = arguments.device, make_console()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    scale = Scale.of(device, arguments.quick)
    logging.disable(logging.WARNING)  # LMCache logs what it finds
    lmcache = None if on_gpu else LMCache.find()
    machine = describe_machine(device)
    machine["versions"]["lmcache"] = lmcache and importlib.metadata.version("lmcache")
    console.print(f"{machine['device']}, driver {machine['driver']}, {machine['versions']}")
    if not on_gpu and lmcache is None:
        console.print("lmcache is not installed: it is left out")
    rows, left_out = measure_all(device, scale, lmcache, console)
    submitted = measure_submission(device, scale) if on_gpu else []
    targets = targets_of(rows, submitted, on_gpu)
    print_shares(console, rows)
    if submitted:
        print_submission(console, submitted)
    print_targets(console, targets)
    for case in left_out:
        console.print(f"left out: {case['case']}, {case['num_tokens']:,} tokens: {case['reason']}")
    configuration = {
        "quick": arguments.quick,
        "rounds": scale.rounds,
        "chunk_tokens": CHUNK_TOKENS,
        "slots_per_token": SPARE,
        "run_blocks": RUN_BLOCKS,
        "bytes": "read + write, without slots and addresses",
        "share_of_copy": "median over rounds of the speed over copy_'s in the same round",
        "times_lmcache": "median over rounds of LMCache's time over kvheap's",
        "judged_from_side_bytes": TARGET_FROM_BYTES if on_gpu else 0,
    }
    tables = {"targets": targets, "copies": rows, "submission": submitted, "left_out": left_out}
    path = write_json(arguments.out, "paged_copy", machine, configuration, tables)
    console.print(f"wrote {path}")
    plt = pyplot(console)
    if plt is not None:
        draw(plt, rows, scale.patterns, machine, path.with_suffix(".png"))
        console.print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
