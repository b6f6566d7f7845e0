"""Whole blocks on a CPU: every way that copies them, and which of them start torch's threads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import kvheap
from kvheap import BlockIds, MemoryBatch, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels import paged_blocks_cpu, paged_dense_cpu, paged_single_cpu
from kvheap.kernels.paged_dense_cpu import DenseRows, starts_threads

GRAIN = 32768
"""What torch does not share among its threads, in elements."""

TOKENS = 4


def caches(num_layers: int, where: str, num_blocks: int, width: int) -> PagedKVCache:
    """A cache of made-up bfloat16, with layers in one storage or in storages of their own."""
    shape = (num_layers, num_blocks, TOKENS, width)
    storage = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)
    layers = list(storage) if where == "shared" else [layer.clone() for layer in storage]
    if where == "padded":  # blocks that do not follow each other
        wide = torch.zeros(num_blocks, TOKENS * width + 8, dtype=torch.bfloat16)
        layers = [wide.clone()[:, : TOKENS * width].view(shape[1:]) for _ in layers]
        for layer, values in zip(layers, storage, strict=True):
            layer.copy_(values)
    return PagedKVCache.of("mla", layers)


def chunks_for(cache: PagedKVCache, num_blocks: int, per_chunk: int, align: int) -> MemoryBatch:
    """Chunks of ``per_chunk`` blocks, in a heap whose other bytes are 7."""
    layer = cache.tensors[0]
    shape = (1, cache.num_layers, per_chunk * TOKENS, layer.shape[-1])
    num_chunks = -(-num_blocks // per_chunk)
    bytes_of_one = -(-2 * int(np.prod(shape)) // align) * align
    buffer = torch.full(((num_chunks + 2) * bytes_of_one,), 7, dtype=torch.uint8)
    heap = TensorMemoryAllocator(buffer, align_bytes=align)
    batch = heap.batched_allocate(shape, torch.bfloat16, num_chunks, MemoryFormat.KV_MLA_FMT)
    assert batch is not None
    return batch


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of bfloat16, which may be no numbers."""
    return tensor.contiguous().view(torch.int16)


def blocks_of(cache: PagedKVCache, ids: torch.Tensor) -> torch.Tensor:
    """``[blocks, layers, tokens, width]``, by plain indexing."""
    return bits(torch.stack([layer[ids] for layer in cache.tensors], 1))


def stored_in(batch: MemoryBatch, num_blocks: int) -> torch.Tensor:
    """The same of chunks."""
    chunks = bits(torch.stack([obj.tensor[0] for obj in batch]))
    return chunks.unflatten(2, (-1, TOKENS)).transpose(1, 2).flatten(0, 1)[:num_blocks]


BY_TORCH = {(module, "MAX_NUMPY_BYTES"): -1 for module in (paged_blocks_cpu, paged_dense_cpu)}

WAYS: dict[str, dict[tuple[Any, str], int]] = {
    "as they are": {},
    "by torch": BY_TORCH
    | {(paged_single_cpu, name): -1 for name in ("MAX_NUMPY_BYTES", "MIN_SHARED_BYTES")},
    "row by row": {(paged_blocks_cpu, "MAX_NUMPY_BYTES"): -1, (paged_dense_cpu, "STEP_BYTES"): 0},
}
WAYS["in parts"] = WAYS["by torch"] | {(paged_dense_cpu, "GRAIN"): 3 * 64}
WAYS["with helpers"] = WAYS["in parts"] | {(paged_dense_cpu, "THREAD_BYTES"): 64}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for (module, name), value in WAYS[request.param].items():
        monkeypatch.setattr(module, name, value)
    if request.param in ("in parts", "with helpers"):
        monkeypatch.setattr(DenseRows, "is_shared", lambda self, num_units: False)
    return str(request.param)


@pytest.mark.parametrize(("per_chunk", "inference"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("num_blocks", [1, 9, 75])
@pytest.mark.parametrize(
    ("num_layers", "where", "width", "align"),
    [
        (1, "shared", 32, 16),
        (1, "shared", 32, 4096),
        (1, "padded", 16, 64),
        (2, "shared", 12, 16),
        (5, "shared", 8, 64),
        (5, "apart", 8, 16),
        (5, "apart", 6, 256),
    ],
)
def test_there_and_back(
    num_layers: int,
    where: str,
    width: int,
    align: int,
    num_blocks: int,
    per_chunk: int,
    inference: bool,
    way: str,
) -> None:
    cache = caches(num_layers, where, 160, width)
    batch = chunks_for(cache, num_blocks, per_chunk, align)
    order = torch.randperm(160)
    ids, others, rest = order[:num_blocks], order[-num_blocks:], order[num_blocks:-num_blocks]
    kvheap.store(cache, BlockIds(ids), batch)  # from the second call on, the short way
    batch.allocator.buffer.fill_(7)
    before, kept = blocks_of(cache, ids), blocks_of(cache, torch.cat([ids, rest]))
    with torch.inference_mode(inference):
        kvheap.store(cache, BlockIds(ids), batch)
        kvheap.load(batch, cache, BlockIds(others))
    assert torch.equal(stored_in(batch, num_blocks), before)
    assert torch.equal(blocks_of(cache, others), before)
    assert torch.equal(blocks_of(cache, torch.cat([ids, rest])), kept)
    # Bytes beside the blocks are as they were.
    block_bytes = num_layers * TOKENS * width * 2
    touched = num_blocks * block_bytes
    assert int((batch.allocator.buffer != 7).sum()) <= touched
    end = int(batch.addresses[-1]) + per_chunk * block_bytes
    assert bool((batch.allocator.buffer[end:] == 7).all())


@pytest.mark.parametrize("count", [3, 9, 70])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", ["tensor", "strided", "array", "list"])
def test_any_number_of_ids_of_any_kind_goes_the_short_way(
    kind: str, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches(2, "shared", 90, 16)
    batch = chunks_for(cache, count, 1, 64)
    ids = torch.randperm(90)[:count].to(dtype)
    kvheap.store(cache, BlockIds(ids), batch)
    given: Any = {
        "tensor": ids,
        "strided": torch.stack([ids, ids], 1)[:, 0],
        "array": ids.numpy(),
        "list": ids.tolist(),
    }[kind]
    monkeypatch.setattr("kvheap.engine.chunks.Route", None)  # the ordinary way begins there
    kvheap.store(cache, BlockIds(given), batch)
    assert torch.equal(stored_in(batch, count), blocks_of(cache, ids))
    before = stored_in(batch, count)
    kvheap.load(batch, cache, BlockIds(given[::-1] if kind in ("array", "list") else given))
    target = ids.flip(0) if kind in ("array", "list") else ids
    assert torch.equal(blocks_of(cache, target), before)


@pytest.mark.parametrize("wrong", [90, -2, 1 << 63, -(1 << 70)])
@pytest.mark.parametrize("count", [3, 9, 70])
def test_ids_that_no_block_has(count: int, wrong: int) -> None:
    cache = caches(2, "shared", 90, 16)
    batch = chunks_for(cache, count, 1, 64)
    kvheap.store(cache, BlockIds(list(range(count))), batch)
    held, before = batch.allocator.buffer.clone(), blocks_of(cache, torch.arange(90))
    ids = [*range(count - 1), wrong]
    for call in (
        lambda: kvheap.store(cache, BlockIds(ids), batch),
        lambda: kvheap.load(batch, cache, BlockIds(ids)),
    ):
        # NumPy makes floats or objects of integers that int64 cannot hold.
        with pytest.raises((ValueError, TypeError), match=f"{wrong}|got (float|obj)"):
            call()
    assert torch.equal(batch.allocator.buffer, held)
    assert torch.equal(blocks_of(cache, torch.arange(90)), before)


KINDS: dict[str, Any] = {
    "reversed": lambda ids: ids.numpy()[::-1].copy()[::-1],
    "read-only": lambda ids: np.frombuffer(ids.numpy().tobytes(), np.int64),
    "other bytes": lambda ids: ids.numpy().astype(">i8"),
    "strided": lambda ids: ids.repeat_interleave(2)[::2],
    "reversed tensor": lambda ids: ids.flip(0).flip(0),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("num_layers", "width"), [(1, 2048), (2, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_torch_does_not_take_as_they_are(kind: str, num_layers: int, width: int) -> None:
    cache = caches(num_layers, "shared", 90, width)  # of one layer, torch's threads share a copy
    batch = chunks_for(cache, 64, 1, 64)
    ids = torch.randperm(90)[:64]
    kvheap.store(cache, BlockIds(ids), batch)
    batch.allocator.buffer.fill_(7)
    kvheap.store(cache, BlockIds(KINDS[kind](ids)), batch)
    assert torch.equal(stored_in(batch, 64), blocks_of(cache, ids))
    kvheap.load(batch, cache, BlockIds(KINDS[kind](ids.flip(0))))
    assert torch.equal(stored_in(batch, 64), blocks_of(cache, ids.flip(0)))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("count", [5, 70])
@pytest.mark.parametrize("kept_bytes", [0, 8, 32])
def test_ids_whose_memory_was_taken_away(num_layers: int, count: int, kept_bytes: int) -> None:
    cache = caches(num_layers, "shared", 90, 16)
    batch = chunks_for(cache, count, 1, 64)
    ids = torch.arange(count)
    kvheap.store(cache, BlockIds(ids.clone()), batch)
    held = batch.allocator.buffer.clone()
    ids.untyped_storage().resize_(kept_bytes)
    for call in (
        lambda: kvheap.store(cache, BlockIds(ids), batch),
        lambda: kvheap.load(batch, cache, BlockIds(ids)),
    ):
        with pytest.raises(ValueError, match=f"block ids .* resized to {kept_bytes} bytes"):
            call()
    assert torch.equal(batch.allocator.buffer, held)


# -- threads ---------------------------------------------------------------------------------------


class Calls:
    """The indexing calls of torch: rows and words of a row of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._patch = monkeypatch

    def watch(self) -> None:
        select, copy = torch.index_select, torch.Tensor.index_copy_

        def noted_select(rows: torch.Tensor, dim: int, ids: torch.Tensor, **out: Any) -> Any:
            self.shapes.append((len(ids), rows.shape[1]))
            return select(rows, dim, ids, **out)

        def noted_copy(rows: torch.Tensor, dim: int, ids: torch.Tensor, run: torch.Tensor) -> Any:
            self.shapes.append((len(ids), rows.shape[1]))
            return copy(rows, dim, ids, run)

        self._patch.setattr(torch, "index_select", noted_select)
        self._patch.setattr(torch.Tensor, "index_copy_", noted_copy)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize(
    ("num_layers", "where", "block_bytes", "num_blocks"),
    [
        (1, "shared", 64 << 10, 16),
        (1, "shared", 64 << 10, 80),
        (4, "shared", 64 << 10, 2),
        (4, "apart", 64 << 10, 5),
        (4, "apart", 16 << 10, 4),
        (32, "apart", 1 << 10, 64),
        (32, "shared", 16 << 10, 4),
    ],
)
def test_threads_start_only_where_a_loop_over_the_layers_starts_them(
    num_layers: int, where: str, block_bytes: int, num_blocks: int, calls: Calls
) -> None:
    cache = caches(num_layers, where, 2 * num_blocks, block_bytes // 2 // TOKENS)
    batch = chunks_for(cache, num_blocks, 1, 4096)
    ids = torch.randperm(2 * num_blocks)[:num_blocks]
    kvheap.store(cache, BlockIds(ids), batch)
    assert not starts_threads(num_blocks, block_bytes // 2)  # what each call of the loop copies
    calls.watch()
    kvheap.store(cache, BlockIds(ids), batch)
    kvheap.load(batch, cache, BlockIds(ids.flip(0)))
    assert [shape for shape in calls.shapes if shape[0] * shape[1] > GRAIN] == []
    assert torch.equal(stored_in(batch, num_blocks), blocks_of(cache, ids.flip(0)))


@pytest.mark.parametrize(
    ("num_layers", "block_bytes", "num_blocks"),
    [(1, 16 << 10, 64), (2, 2 << 10, 150), (1, 128 << 10, 9), (4, 96 << 10, 6)],
)
def test_one_call_is_shared_where_each_of_a_loop_is(
    num_layers: int, block_bytes: int, num_blocks: int, calls: Calls
) -> None:
    cache = caches(num_layers, "shared", 2 * num_blocks, block_bytes // 2 // TOKENS)
    batch = chunks_for(cache, num_blocks, 1, 4096)
    ids = torch.randperm(2 * num_blocks)[:num_blocks]
    kvheap.store(cache, BlockIds(ids), batch)
    assert starts_threads(num_blocks, block_bytes // 2)
    calls.watch()
    kvheap.store(cache, BlockIds(ids), batch)
    kvheap.load(batch, cache, BlockIds(ids.flip(0)))
    num_bytes = num_layers * block_bytes * num_blocks
    if num_bytes > paged_blocks_cpu.MIN_SHARED_BYTES:
        assert calls.shapes == [(num_layers * num_blocks, block_bytes // 16)] * 2
    assert torch.equal(stored_in(batch, num_blocks), blocks_of(cache, ids.flip(0)))


COUNT_THREADS = """
import os, numpy as np, torch
torch.set_num_threads(2)
for rows, row in {calls}:
    source, out = (torch.from_numpy(np.zeros((rows + more, row), np.int16)) for more in (1, 0))
    ids = torch.from_numpy(np.arange(rows))
    before = len(os.listdir("/proc/self/task"))
    torch.index_select(source, 0, ids, out=out)
    print(len(os.listdir("/proc/self/task")) - before)
"""


def test_when_torch_starts_threads() -> None:
    """Its threads live on, so only the last call may start them."""
    sizes = [(1, GRAIN), (64, GRAIN), (2, GRAIN // 2), (4, GRAIN // 4), (5, GRAIN // 4)]
    script = COUNT_THREADS.format(calls=sizes)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    started = [bool(int(line)) for line in run.stdout.split()]
    assert started == [starts_threads(*size) for size in sizes] == [False] * 4 + [True]


@pytest.mark.parametrize(("align", "needs_steps"), [(256, False), (4096, True)])
def test_rows_that_are_adjacent_on_both_sides_are_stored_without_a_temporary(
    align: int, needs_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches(1, "shared", 90, 32)
    batch = chunks_for(cache, 30, 1, align)
    ids = torch.randperm(90)[:30]
    kvheap.store(cache, BlockIds(ids), batch)
    steps: list[int] = []
    copy_in_steps = paged_single_cpu.copy_in_steps

    def noted(rows: Any, numbers: Any, run: Any, to_heap: bool) -> None:
        steps.append(len(numbers))
        copy_in_steps(rows, numbers, run, to_heap)

    monkeypatch.setattr(paged_single_cpu, "copy_in_steps", noted)
    kvheap.store(cache, BlockIds(ids.flip(0)), batch)
    assert steps == [30] * needs_steps
    assert torch.equal(stored_in(batch, 30), blocks_of(cache, ids.flip(0)))
