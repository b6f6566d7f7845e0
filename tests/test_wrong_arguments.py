"""Every public callable with the wrong kind of each argument: it says what is wrong with it.

Each error is a ``TypeError`` or ``ValueError`` of kvheap whose message names the argument or shows
the value, and after it nothing is allocated, freed or copied. Odd values, which are right for some
arguments, are taken or refused by kvheap, and never met by Python, NumPy or torch further inside.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvheap
from kvheap import (
    AddressBatch,
    AddressManager,
    BlockIds,
    BlockLayout,
    BlockRuns,
    CopyPlan,
    HostBuffer,
    MemoryBatchMetadata,
    MemoryFormat,
    MemoryObjMetadata,
    PagedKVCache,
    PrefixIndex,
    PrefixStore,
    TensorMemoryAllocator,
)
from kvheap.kernels import fill_blocks, gather_blocks, move_blocks, scatter_blocks
from kvheap.replay.trace import infer_chunk_tokens, read_trace, synthetic_trace
from kvheap.transfer import copy, extents, paired_runs

HALF = torch.float16
OBJECT = object()
WRONG: dict[str, Any] = {
    "object": OBJECT,
    "float": 1.5,
    "text": "nonsense",
    "dict": {"a": 1},
    "list": [1, "a"],
    "tensor": torch.zeros(3),
    "class": dict,
}
ODD: dict[str, Any] = {
    "None": None,
    "huge": 1 << 70,
    "negative": -1,
    "True": True,
    "NaN": float("nan"),
    "empty": [],
    "bytes": b"ab",
    "set": {1, 2},
    "ragged": [[1, 2], [3]],
    "strange list": [None],
    "array": np.zeros(3),
    "bools": torch.tensor([True, False]),
}


class Scene:
    """A heap with a batch of an engine's chunks, another heap, and what the calls need."""

    def __init__(self) -> None:
        self.heap = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
        self.far = TensorMemoryAllocator(torch.zeros(1 << 16, dtype=torch.uint8))
        self.tensors = [torch.rand(2, 16, 16, 2, 8).half() for _ in range(2)]
        self.cache = PagedKVCache.of("vllm-flash-nhd", self.tensors)
        batch = self.heap.batched_store(self.cache, range(64), 32)
        assert batch is not None
        self.batch, self.layout = batch, batch.layout
        self.rows = torch.zeros(2, *self.layout.shapes[0]).half()
        self.index: PrefixStore[str] = PrefixStore(self.far, self.layout)
        beside = self.far.batched_allocate(self.layout.shapes[0], HALF, 2)
        assert beside is not None
        self.beside = beside
        self.manager = AddressManager(1 << 16)
        self.buffer = HostBuffer(1 << 16)
        self.before = self.state()

    def ready(self) -> PrefixIndex[str, int]:
        """An index that has chunks."""
        index: PrefixIndex[str, int] = PrefixIndex()
        index.begin(["a", "b"], [1, 2], 10).complete()
        return index

    def taken(self) -> AddressManager:
        """A manager with an allocated extent."""
        manager = AddressManager(1 << 16)
        manager.allocate(4096)
        return manager

    def state(self) -> tuple[Any, ...]:
        held = (self.heap.stats().allocated_bytes, self.far.stats().allocated_bytes)
        contents = [hash(each.numpy().tobytes()) for each in (self.heap.buffer, *self.tensors)]
        return (*held, *contents, self.batch.live.all())


@dataclass(frozen=True)
class Call:
    """A call that works; and what else is a right kind of each argument."""

    make: Callable[[Scene], Callable[..., Any]]
    arguments: Callable[[Scene], dict[str, Any]]
    right: frozenset[tuple[str, str]] = frozenset()


def call(make: Any, arguments: Any, *right: tuple[str, str]) -> Call:
    return Call(make, arguments, frozenset(right))


BYTES = torch.uint8
SHAPES = {"shape": [2, 3], "dtype": HALF}
HEAP_OPTIONS = {
    "page_layout": None,
    "idempotent_free": False,
    "scrub": False,
    "debug": False,
    "trace_frames": 0,
    "stream_wait_s": 0.0,
    "on_full": None,
    "on_full_interval_s": 1.0,
}
SECONDS = (("stream_wait_s", "float"), ("on_full_interval_s", "float"), ("on_full", "class"))

PATH = ("path", "text")
KEYS = (("keys", "list"), ("keys", "dict"))
LOOK_UPS = ("prefix_length", "chunks", "addresses", "missing", "touch", "hold", "remove")
METADATA: dict[str, Callable[[Scene], Any]] = {
    "batch's": lambda s: s.batch.metadata,
    "block's": lambda s: s.batch[0].metadata,
}

CALLS: dict[str, Call] = {
    "TensorMemoryAllocator": call(
        lambda s: TensorMemoryAllocator,
        lambda s: {
            "tensor": torch.zeros(1 << 16, dtype=BYTES),
            "align_bytes": 4096,
            "address_manager": None,
            **HEAP_OPTIONS,
        },
        *SECONDS,
        ("tensor", "tensor"),
    ),
    "PagedTensorMemoryAllocator": call(
        lambda s: kvheap.PagedTensorMemoryAllocator,
        lambda s: {
            "tensor": torch.zeros(1 << 16, dtype=BYTES),
            "shapes": [32, 9],
            "dtypes": HALF,
            "fmt": MemoryFormat.KV_2LTD,
        },
        ("tensor", "tensor"),
    ),
    "HostMemoryAllocator": call(
        lambda s: kvheap.HostMemoryAllocator,
        lambda s: {
            "size": 1 << 16,
            "align_bytes": 4096,
            "huge_pages": "none",
            "numa_node": None,
            "populate": False,
            "shared": False,
            "host_buffer": None,
            **HEAP_OPTIONS,
        },
        *SECONDS,
    ),
    "PinMemoryAllocator": call(
        lambda s: kvheap.PinMemoryAllocator,
        lambda s: {
            "size": 1 << 16,
            "align_bytes": 4096,
            "allow_unpinned": True,
            "registrar": None,
            "piece_bytes": 1 << 20,
        },
    ),
    "GPUMemoryAllocator": call(
        lambda s: kvheap.GPUMemoryAllocator,
        lambda s: {"size": 1 << 16, "align_bytes": 4096, "allow_cpu": True},
    ),
    "LazyMemoryAllocator": call(
        lambda s: kvheap.LazyMemoryAllocator,
        lambda s: {
            "init_size": 1 << 16,
            "final_size": 1 << 17,
            "align_bytes": 4096,
            "pin": "no",
            "piece_bytes": None,
            "on_progress": None,
            "registrar": None,
        },
        ("on_progress", "class"),
    ),
    "MixedMemoryAllocator": call(
        lambda s: kvheap.MixedMemoryAllocator,
        lambda s: {"pin_allocator": s.heap, "buffer_allocator": None},
    ),
    "AdHocMemoryAllocator": call(
        lambda s: kvheap.AdHocMemoryAllocator,
        lambda s: {"idempotent_free": False, "trace_frames": 0},
    ),
    "HostBuffer": call(
        lambda s: HostBuffer,
        lambda s: {"size": 1, "align_bytes": 4096, "numa_node": None, "fd": None},
    ),
    "HostBuffer.populate": call(
        lambda s: s.buffer.populate, lambda s: {"start": 0, "end": 4096, "threads": 1}
    ),
    "HostBuffer.pin": call(
        lambda s: s.buffer.pin,
        lambda s: {
            "start": 0,
            "end": 4096,
            "registrar": None,
            "piece_bytes": 4096,
            "allow_unpinned": True,
        },
    ),
    "BlockLayout.of": call(
        lambda s: BlockLayout.of,
        lambda s: {"shapes": [2, 3], "dtypes": HALF, "fmt": MemoryFormat.KV_2LTD},
    ),
    "allocate": call(lambda s: s.heap.allocate, lambda s: {**SHAPES, "fmt": MemoryFormat.KV_2LTD}),
    "batched_allocate": call(
        lambda s: s.heap.batched_allocate,
        lambda s: {
            **SHAPES,
            "batch_size": 2,
            "fmt": "KV_2LTD",
            "source": torch.zeros(2, 2, 3).half(),
            "allow_partial": False,
        },
    ),
    "ad hoc batched_allocate": call(
        lambda s: kvheap.AdHocMemoryAllocator().batched_allocate,
        lambda s: {**SHAPES, "batch_size": 2, "source": None, "allow_partial": False},
    ),
    "bytes allocate": call(
        lambda s: kvheap.BufferAllocator().allocate,
        lambda s: {"shape": [2], "dtype": None},
        *(("dtype", kind) for kind in WRONG),
        ("shape", "list"),  # only its first number counts
    ),
    "mixed allocate": call(
        lambda s: kvheap.MixedMemoryAllocator(s.heap).allocate,
        lambda s: {**SHAPES, "fmt": MemoryFormat.KV_2LTD},
    ),
    "max_batch": call(lambda s: s.heap.max_batch, lambda s: SHAPES),
    "free": call(lambda s: s.heap.free, lambda s: {"obj": s.batch[0]}),
    "batched_free": call(lambda s: s.heap.batched_free, lambda s: {"objs": s.batch, "out": None}),
    "batched_read": call(lambda s: s.heap.batched_read, lambda s: {"objs": s.batch, "out": None}),
    "batched_write": call(
        lambda s: s.heap.batched_write, lambda s: {"objs": s.batch, "source": s.rows}
    ),
    "mixed batched_free": call(
        lambda s: kvheap.MixedMemoryAllocator(s.heap).batched_free, lambda s: {"objs": s.batch}
    ),
    "view": call(
        lambda s: s.heap.view, lambda s: {"blocks": [0], **SHAPES, "fmt": MemoryFormat.KV_2LTD}
    ),
    "add_buffer": call(
        lambda s: s.heap.add_buffer,
        lambda s: {"tensor": torch.zeros(1 << 16, dtype=BYTES)},
        ("tensor", "tensor"),
    ),
    "close": call(lambda s: s.heap.close, lambda s: {"timeout_s": 1}, ("timeout_s", "float")),
    "batched_store": call(
        lambda s: s.heap.batched_store,
        lambda s: {
            "cache": s.cache,
            "slots": range(32),
            "chunk_tokens": 16,
            "fmt": None,
            "layers": None,
            "heads": None,
            "allow_partial": False,
            "convert": False,
        },
    ),
    "batched_load": call(
        lambda s: s.heap.batched_load,
        lambda s: {
            "batch": s.batch,
            "cache": s.cache,
            "slots": range(64),
            "layers": None,
            "heads": None,
            "convert": False,
            "clear_rest": False,
        },
    ),
    "batched_evict": call(
        lambda s: s.heap.batched_evict, lambda s: {"batch": s.batch, "out": None}
    ),
    "store": call(
        lambda s: kvheap.store,
        lambda s: {
            "cache": s.cache,
            "slots": range(64),
            "batch": s.batch,
            "layers": None,
            "heads": None,
            "convert": False,
        },
    ),
    "load": call(
        lambda s: kvheap.load,
        lambda s: {
            "batch": s.batch,
            "cache": s.cache,
            "slots": range(64),
            "layers": None,
            "heads": None,
            "convert": False,
            "clear_rest": False,
        },
    ),
    "offload": call(
        lambda s: kvheap.offload,
        lambda s: {
            "batch": s.batch,
            "into": s.far,
            "stream": None,
            "free": False,
            "allow_partial": False,
            "by_layer": False,
            "path": None,
            "max_sms": None,
        },
    ),
    "copy": call(
        lambda s: copy,
        lambda s: {"plan": (s.batch, s.rows), "stream": None, "path": None, "max_sms": None},
    ),
    "CopyPlan.between": call(
        lambda s: CopyPlan.between,
        lambda s: {"source": s.batch, "target": s.rows, "by_layer": False},
    ),
    "CopyPlan.of_addresses": call(
        lambda s: CopyPlan.of_addresses,
        lambda s: {
            "source": torch.zeros(64),
            "target": torch.zeros(64),
            "source_addresses": [0],
            "target_addresses": [0],
            "sizes": [8],
        },
        ("source", "tensor"),
        ("target", "tensor"),
    ),
    "PagedKVCache.of": call(
        lambda s: PagedKVCache.of,
        lambda s: {"layout": "vllm-flash-nhd", "tensors": s.tensors, "block_size": 16},
    ),
    "PrefixStore": call(lambda s: PrefixStore, lambda s: {"heap": s.heap, "layout": s.layout}),
    "PrefixStore.store": call(
        lambda s: s.index.store,
        lambda s: {"keys": ["a", "b"], "source": s.rows},
        ("keys", "list"),
        ("keys", "dict"),
        ("keys", "tensor"),
        ("keys", "text"),
    ),
    "PrefixStore.store_from_engine": call(
        lambda s: s.index.store_from_engine,
        lambda s: {"keys": ["a", "b"], "cache": s.cache, "slots": range(64)},
        ("keys", "list"),
        ("keys", "text"),
    ),
    "PrefixStore.offload": call(
        lambda s: s.index.offload,
        lambda s: {"keys": ["a", "b"], "batch": s.batch, "free": False, "max_sms": None},
        ("keys", "list"),
        ("keys", "text"),
    ),
    **{
        f"PrefixStore.{name}": call(
            lambda s, name=name: getattr(s.index, name),
            lambda s: {"keys": []},
            *KEYS,
        )
        for name in LOOK_UPS
    },
    "PrefixStore.begin": call(
        lambda s: s.index.begin, lambda s: {"keys": []}, ("keys", "list"), ("keys", "dict")
    ),
    "ChunkHold.release": call(lambda s: s.index.hold([]).release, lambda s: {"keys": []}, *KEYS),
    "PrefixIndex": call(
        lambda s: PrefixIndex, lambda s: {"policy": None, "name": "mine"}, ("name", "text")
    ),
    **{
        f"PrefixIndex.{name}": call(
            lambda s, name=name: getattr(s.ready(), name),
            lambda s: {"keys": ["a"]},
            *KEYS,
        )
        for name in ("prefix_length", "values", "missing", "touch", "hold", "remove")
    },
    "PrefixIndex.begin": call(
        lambda s: s.ready().begin,
        lambda s: {"keys": ["c", "d"], "values": [3, 4], "size_bytes": [10, 20]},
        ("keys", "list"),
        ("keys", "dict"),  # one key for two values
        ("values", "list"),
        ("values", "dict"),
        ("values", "tensor"),
        ("size_bytes", "dict"),
        ("size_bytes", "tensor"),
    ),
    "PrefixIndex.evict": call(
        lambda s: s.ready().evict,
        lambda s: {"num_bytes": 10, "protected": ["a"]},
        ("protected", "list"),
        ("protected", "dict"),
    ),
    "Hold.release": call(lambda s: s.ready().hold(["a"]).release, lambda s: {"keys": ["a"]}, *KEYS),
    **{
        f"PendingStore.{name}": call(
            lambda s, name=name: getattr(s.ready().begin(["c"], [3], 10), name),
            lambda s: {"keys": ["c"]},
            *KEYS,
        )
        for name in ("complete", "abort")
    },
    "AddressManager": call(lambda s: AddressManager, lambda s: {"size": 4096, "align_bytes": 4096}),
    "AddressManager.allocate": call(lambda s: s.manager.allocate, lambda s: {"size": 4096}),
    "AddressManager.batched_allocate": call(
        lambda s: s.manager.batched_allocate,
        lambda s: {"size": 4096, "batch_size": 2, "allow_partial": False},
    ),
    "AddressManager.of_pages": call(
        lambda s: AddressManager.of_pages, lambda s: {"num_pages": 3, "page_bytes": 512}
    ),
    "AddressManager.compute_aligned_size": call(
        lambda s: s.manager.compute_aligned_size, lambda s: {"size": 5}
    ),
    "AddressManager.free": call(lambda s: s.taken().free, lambda s: {"address": 0, "size": 4096}),
    "AddressManager.batched_free": call(
        lambda s: s.taken().batched_free, lambda s: {"blocks": [0], "sizes": 4096}
    ),
    "AddressManager.batched_free of pairs": call(
        lambda s: s.taken().batched_free, lambda s: {"blocks": [(0, 4096)]}
    ),
    "AddressManager.reserve": call(
        lambda s: AddressManager(1 << 16).reserve, lambda s: {"blocks": [0], "sizes": 4096}
    ),
    "AddressManager.reserve of pairs": call(
        lambda s: AddressManager(1 << 16).reserve, lambda s: {"blocks": [(0, 4096)]}
    ),
    "AddressManager.sbrk": call(
        lambda s: s.manager.sbrk, lambda s: {"size": 4096, "new_segment": False}
    ),
    "AddressManager.max_batch": call(lambda s: s.manager.max_batch, lambda s: {"size": 4096}),
    "AddressBatch.of_addresses": call(
        lambda s: AddressBatch.of_addresses, lambda s: {"addresses": [0], "block_bytes": 4096}
    ),
    "AddressBatch.of_runs": call(
        lambda s: AddressBatch.of_runs,
        lambda s: {"block_bytes": 4096, "run_starts": [0], "run_counts": [1]},
    ),
    "AddressBatch[]": call(
        lambda s: lambda index: AddressBatch(8, [0], [2])[index], lambda s: {"index": 1}
    ),
    "BlockLayout.view": call(
        lambda s: s.layout.view,
        lambda s: {"block": torch.zeros(s.layout.size_bytes, dtype=BYTES), "group": 0},
    ),
    "read_trace": call(lambda s: read_trace, lambda s: {"path": "/dev/null", "limit": None}, PATH),
    "infer_chunk_tokens": call(lambda s: infer_chunk_tokens, lambda s: {"requests": []}),
    "synthetic_trace": call(lambda s: synthetic_trace, lambda s: {"num_requests": 3, "seed": 0}),
    **{
        f"view of a {kind} metadata, {field.name}": call(
            lambda s, of=of: lambda **change: s.heap.view(replace(of(s), **change)),
            lambda s, of=of, field=field: {field.name: getattr(of(s), field.name)},
            ("form", "text"),
        )
        for kind, of in METADATA.items()
        for field in fields(of(Scene()))
    },
    "MemoryObjMetadata.from_dict": call(
        lambda s: MemoryObjMetadata.from_dict,
        lambda s: {"values": s.batch[0].metadata.to_dict()},
        ("values", "dict"),
    ),
    "MemoryObjMetadata.from_bytes": call(
        lambda s: MemoryObjMetadata.from_bytes,
        lambda s: {"data": s.batch[0].metadata.to_bytes()},
    ),
    "MemoryBatchMetadata.from_bytes": call(
        lambda s: MemoryBatchMetadata.from_bytes, lambda s: {"data": s.batch.metadata.to_bytes()}
    ),
    "MemoryBatch.extents": call(
        lambda s: s.batch.extents, lambda s: {"rows": [1, 0], "padding": False}
    ),
    "MemoryBatch.block_runs": call(lambda s: s.batch.block_runs, lambda s: {"rows": [1, 0]}),
    "extents": call(lambda s: extents, lambda s: {"blocks": s.batch[:], "padding": True}),
    "paired_runs": call(
        lambda s: paired_runs,
        lambda s: {"source": s.batch, "target": s.beside},
    ),
    "BlockRuns.placed": call(
        lambda s: BlockRuns.placed,
        lambda s: {
            "blocks": s.batch.runs,
            "size_bytes": s.layout.size_bytes,
            "segments": s.heap.memory_segments(),
        },
    ),
    "foreign_transfer": call(
        lambda s: kvheap.foreign_transfer,
        lambda s: {"work": Done, "source": s.batch, "target": None, "name": "others"},
        ("name", "text"),
        ("work", "class"),  # begins nothing that could be tracked
    ),
    "lease": call(
        lambda s: s.heap.lease,
        lambda s: {"objs": s.batch, "ttl": 5.0, "rows": [0, 1]},
        ("ttl", "float"),
    ),
    "BatchLease.extend": call(
        lambda s: s.heap.lease(s.batch, 5).extend, lambda s: {"ttl": 5.0}, ("ttl", "float")
    ),
    "MemoryBatch[]": call(lambda s: lambda index: s.batch[index], lambda s: {"index": 0}),
    "MemoryBatch.set_num_tokens": call(
        lambda s: s.batch.set_num_tokens, lambda s: {"num_tokens": 64}
    ),
    "MemoryObj.pin": call(lambda s: s.batch[0].pin, lambda s: {"ttl": None}, ("ttl", "float")),
    "MemoryObj.set_used_size": call(
        lambda s: s.batch[0].set_used_size, lambda s: {"size_bytes": 5}
    ),
    "MemoryObj.get_tensor": call(lambda s: s.batch[0].get_tensor, lambda s: {"index": 0}),
    "MemoryObj.record_stream": call(
        lambda s: s.batch[0].record_stream, lambda s: {"stream": Stream()}
    ),
    "MemoryBatchMetadata.from_dict": call(
        lambda s: MemoryBatchMetadata.from_dict,
        lambda s: {"values": s.batch.metadata.to_dict()},
        ("values", "dict"),  # a KeyError
    ),
    "scatter_blocks": call(
        lambda s: scatter_blocks,
        lambda s: {
            "blocks": torch.zeros(2, 8),
            "buffer": torch.zeros(100),
            "addresses": [0, 64],
            "address_alignment": 1,
        },
    ),
    "gather_blocks": call(
        lambda s: gather_blocks,
        lambda s: {
            "buffer": torch.zeros(100),
            "addresses": [0, 64],
            "out": torch.zeros(2, 8),
            "address_alignment": 1,
        },
        ("out", "tensor"),
    ),
    "move_blocks": call(
        lambda s: move_blocks,
        lambda s: {
            "buffer": torch.zeros(100),
            "source_addresses": [0],
            "target_addresses": [64],
            "block_bytes": 16,
        },
    ),
    "fill_blocks": call(
        lambda s: fill_blocks,
        lambda s: {"buffer": torch.zeros(100), "addresses": [0], "block_bytes": 16, "value": 0},
    ),
}


class Done:
    def query(self) -> bool:
        return True


class Stream:
    def record_event(self) -> Any:
        return type("Event", (), {"query": lambda self: True})()


@pytest.mark.parametrize("name", CALLS)
def test_the_wrong_kind_of_each_argument(name: str) -> None:
    """One test for each callable; a failure names the argument and the kind."""
    case = CALLS[name]
    good = Scene()
    case.make(good)(**case.arguments(good))  # as it is, the call works
    scene = Scene()
    for argument in case.arguments(scene):
        for kind, wrong in WRONG.items():
            if (argument, kind) in case.right:
                continue
            where = f"{name}({argument}={kind})"
            try:
                case.make(scene)(**{**case.arguments(scene), argument: wrong})
            except (TypeError, ValueError) as error:
                require_clear(error, argument, wrong, where)
            else:
                raise AssertionError(f"{where} is accepted")
            assert scene.state() == scene.before, where
            assert scene.heap.memcheck(), where


@pytest.mark.parametrize("name", CALLS)
def test_odd_values_of_each_argument(name: str) -> None:
    """They are taken, or refused by a ``raise`` of kvheap."""
    case = CALLS[name]
    scene = Scene()
    for argument in case.arguments(scene):
        for kind, odd in ODD.items():
            error = error_of(case.make(scene), {**case.arguments(scene), argument: odd})
            if error is None:
                scene = Scene()
                continue
            line = line_of(error)
            is_missing_key = isinstance(error, KeyError) and "key" in line
            where = f"{name}({argument}={kind})"
            assert is_missing_key or line.startswith("raise "), f"{where}: {error!r} in {line!r}"


def error_of(function: Callable[..., object], arguments: dict[str, Any]) -> Exception | None:
    """What a call raises; None if it returns."""
    try:
        function(**arguments)
    except Exception as error:
        return error
    return None


def line_of(error: Exception) -> str:
    """The line of kvheap's that has raised an error; empty if another's has."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    path = trace.tb_frame.f_code.co_filename
    if not {"kvheap", "allocator", "kernels"} & set(Path(path).parts):
        return ""
    return linecache.getline(path, trace.tb_lineno).strip()


def require_clear(error: Exception, argument: str, wrong: Any, where: str) -> None:
    """The message names the argument or shows the value, and kvheap's code has raised it."""
    message = str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    last = Path(trace.tb_frame.f_code.co_filename)
    names = {argument, argument.rstrip("s"), argument.replace("_", " ").rstrip("s")}
    shown = [repr(wrong), str(wrong), repr(type(wrong).__name__), type(wrong).__name__]
    shown += [repr(each) for each in wrong] if isinstance(wrong, (list, dict, torch.Tensor)) else []
    is_named = any(text in message for text in (*names, *shown))
    assert is_named, f"{where}: {message!r} says neither what nor which"
    is_own = "kvheap" in last.parts or "allocator" in last.parts or "kernels" in last.parts
    assert is_own, f"{where}: raised in {last}: {message}"


@pytest.mark.parametrize(
    ("wrong", "error", "advice"),
    [
        (lambda s: TensorMemoryAllocator(1 << 20), TypeError, r"HostMemoryAllocator\(1048576\)"),  # type: ignore[arg-type]
        (lambda s: s.heap.batched_store((torch.zeros(2),), range(4)), TypeError, "PagedKVCache.of"),
        (lambda s: s.heap.batched_store(s.tensors, range(4)), TypeError, "PagedKVCache.of"),
        (lambda s: kvheap.load(s.batch, s.tensors, range(4)), TypeError, "PagedKVCache.of"),
        (lambda s: kvheap.offload(torch.zeros(2), s.far), TypeError, "MemoryBatch or a list"),
        (lambda s: kvheap.offload(s.batch[0], s.far), TypeError, r"pass \[it\]"),
        (lambda s: kvheap.offload([s.batch[0], 7], s.far), TypeError, "got 7 in it"),
        (lambda s: kvheap.offload(s.batch, s.cache), TypeError, "into must be an allocator"),
        (lambda s: s.heap.free(s.batch), TypeError, r"free a batch by batched_free\(\)"),
        (lambda s: s.heap.batched_free(s.batch[0]), TypeError, r"free one by free\(\)"),
        (lambda s: s.heap.batched_free(None), TypeError, "a batch or a list of objects, got None"),
        (
            lambda s: kvheap.load(s.batch, s.cache, BlockIds([0, 1, 2, 16])),
            ValueError,
            r"block ids\[3\] is 16: the cache has 16 block ids, 0 to 15",
        ),
        (
            lambda s: s.heap.batched_store(s.cache, [256]),
            ValueError,
            r"slots\[0\] is 256: the cache has 256 slots, 0 to 255",
        ),
        (lambda s: kvheap.HostMemoryAllocator(100), ValueError, "size of 100 bytes .* heap of 0"),
        (lambda s: kvheap.PinMemoryAllocator(100), ValueError, "size of 100 bytes .* heap of 0"),
        (
            lambda s: kvheap.GPUMemoryAllocator(100, allow_cpu=True),
            ValueError,
            "size of 100 bytes .* at least 4096",
        ),
        (
            lambda s: TensorMemoryAllocator(torch.zeros(100, dtype=BYTES)),
            ValueError,
            "tensor of 100 bytes makes a heap of 0 bytes",
        ),
        (
            lambda s: kvheap.PagedTensorMemoryAllocator(torch.zeros(9, dtype=BYTES), [10], BYTES),
            ValueError,
            "tensor of 9 bytes .* at least 10",
        ),
        (
            lambda s: kvheap.HostMemoryAllocator(1 << 20, host_buffer=HostBuffer(1 << 16)),
            ValueError,
            "size is 1048576, more than the 65536 bytes",
        ),
        (lambda s: kvheap.LazyMemoryAllocator(-1, 1 << 20, pin="no"), ValueError, "init_size"),
        (
            lambda s: TensorMemoryAllocator(torch.zeros(1 << 16, device="meta")),
            ValueError,
            "CPU or a CUDA device, got meta",
        ),
        (lambda s: s.heap.allocate([4], "float8"), ValueError, "unknown dtype 'float8'"),
        (lambda s: s.heap.allocate([4], HALF, "KV_LTD"), ValueError, "known are .*KV_2LTD"),
        (lambda s: kvheap.offload(s.batch, s.far, free="no"), TypeError, "free must be True or"),
    ],
)
def test_what_people_get_wrong(
    wrong: Callable[[Scene], Any], error: type[Exception], advice: str
) -> None:
    scene = Scene()
    with pytest.raises(error, match=advice):
        wrong(scene)
    assert scene.state() == scene.before


def test_names_that_can_only_mean_one_thing() -> None:
    scene = Scene()
    batch = scene.heap.batched_store(scene.cache, range(32), 16, "KV_2TD")
    assert batch is not None
    assert batch.fmt is MemoryFormat.KV_2TD
    obj = scene.heap.allocate([2, 3], "bfloat16", "KV_2LTD")
    assert obj is not None
    assert (obj.dtype, obj.fmt) == (torch.bfloat16, MemoryFormat.KV_2LTD)
    view = scene.far.view([0], [2, 3], "torch.bfloat16", "KV_T2D")
    assert (view.dtype, view.fmt) == (torch.bfloat16, MemoryFormat.KV_T2D)
    paged = kvheap.PagedTensorMemoryAllocator(torch.zeros(80, dtype=BYTES), [5], "int64", "BINARY")
    assert paged.num_pages == 2
    assert scene.heap.max_batch([2], "uint8") > 0
