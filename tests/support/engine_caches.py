"""Caches as an engine allocates and registers them, and whether kvheap moves what is in them.

The reference is the engine's own index: views of its tensors, cut as the engine cuts them before it
writes a token. Every check compares every byte of the engine's memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import kvheap
from kvheap import BlockIds, MemoryFormat, PagedKVCache, TensorMemoryAllocator
from kvheap.kernels.engine_layouts import LayoutError

KEYS, VALUES = 0, 1

Rows = Callable[[int, int, int], list[tuple[int, torch.Tensor]]]
Pieces = Callable[[int, int], list[torch.Tensor]]


@dataclass(frozen=True)
class EngineCache:
    """One cache of an engine.

    Attributes:
        tensors: what the engine registers with a connector.
        known: what the engine knows about it: arguments of :meth:`PagedKVCache.detect`.
        num_layers, num_blocks, block_size: its geometry.
        rows: ``rows(layer, block, offset)`` are the bytes of a token: (plane, row), heads in order.
            None if a token is not kept in rows of its own, so that only whole blocks can be moved.
        pieces: ``pieces(layer, block)`` are the bytes of a whole block.
        name: the engine layout by which to ask for it, if what the engine knows cannot tell.
        given: what to give with the name.
    """

    tensors: Any
    known: Mapping[str, Any]
    num_layers: int
    num_blocks: int
    block_size: int
    pieces: Pieces
    rows: Rows | None = None
    name: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)
    storages: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        found: dict[int, torch.Tensor] = {}
        for tensor in flat(self.tensors):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
        for whole in found.values():
            if whole.numel():
                whole.random_(0, 256, generator=generator)
            self.storages.append(whole)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def detect(self, **instead: Any) -> PagedKVCache:
        """What kvheap finds, told what the engine knows, or something else ``instead``."""
        takes = inspect.signature(PagedKVCache.detect).parameters
        known = {**self.known, **instead}
        return PagedKVCache.detect(
            self.tensors, **{name: value for name, value in known.items() if name in takes}
        )

    def found(self) -> PagedKVCache:
        """The cache by its name, if it needs one, and else as it is detected."""
        if not self.name:
            return self.detect()
        takes = inspect.signature(PagedKVCache.of).parameters
        missing = self.given.keys() - takes.keys()
        if missing:
            raise LayoutError(f"{self.name} cannot be given {sorted(missing)}")
        return PagedKVCache.of(self.name, self.tensors, **self.given)

    def token(self, layer: int, slot: int) -> list[torch.Tensor]:
        assert self.rows is not None
        return [row for _, row in self.rows(layer, *divmod(slot, self.block_size))]

    def plane(self, plane: int, layer: int, slot: int) -> torch.Tensor:
        assert self.rows is not None
        rows = self.rows(layer, *divmod(slot, self.block_size))
        return torch.cat([row for p, row in rows if p == plane])


class EngineError(Exception):
    """The engine's own code failed, so that nothing can be said about its cache."""


@contextmanager
def engine_code() -> Iterator[None]:
    """Errors in this are the engine's: a case that does not work yet must not fail by them."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"{type(error).__name__}: {error}") from error


def flat(tensors: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and dicts."""
    if isinstance(tensors, torch.Tensor):
        yield tensors
        return
    for part in tensors.values() if isinstance(tensors, Mapping) else tensors:
        yield from flat(part)


def as_bytes(row: torch.Tensor) -> torch.Tensor:
    """A contiguous view as bytes, one-dimensional; a copy would not be a view."""
    assert row.is_contiguous(), (row.shape, row.stride())
    return row.reshape(-1).view(torch.uint8)


def runs_of(block: torch.Tensor) -> list[torch.Tensor]:
    """All elements of a view as contiguous pieces of bytes."""
    if block.is_contiguous():
        return [as_bytes(block)]
    return [piece for part in block for piece in runs_of(part)]


def heap() -> TensorMemoryAllocator:
    return TensorMemoryAllocator(torch.zeros(8 << 20, dtype=torch.uint8), on_full=None)


def check_tokens(engine: EngineCache, cache: PagedKVCache) -> None:
    """Move tokens to other slots, at other offsets in their blocks; compare all memory."""
    slots = np.random.default_rng(0).permutation(engine.num_slots)
    count = engine.num_slots // 2
    source, target = slots[:count], slots[-count:]
    assert (cache.num_layers, cache.num_slots) == (engine.num_layers, engine.num_slots)
    assert ((source - target) % engine.block_size).any() or engine.block_size == 1
    before = [storage.clone() for storage in engine.storages]
    for layer in range(engine.num_layers):
        for here, there in zip(source.tolist(), target.tolist(), strict=True):
            for read, written in zip(
                engine.token(layer, here), engine.token(layer, there), strict=True
            ):
                written.copy_(read)
    expected = _taken_back(engine, before)
    chunks = heap()
    batch = chunks.batched_store(cache, torch.from_numpy(source), 8)
    assert batch is not None
    check_chunks(engine, batch, source)
    chunks.batched_load(batch, cache, torch.from_numpy(target))
    _compare(engine, expected)
    _taken_back(engine, before)


def check_chunks(engine: EngineCache, batch: kvheap.MemoryBatch, slots: np.ndarray) -> None:
    """K and V are where the format of the chunks says."""
    chunk_tokens = 8
    if batch.fmt is not MemoryFormat.KV_2LTD or len(batch.shape) != 4:
        return
    for token in range(0, len(slots), 3):
        number, at = divmod(token, chunk_tokens)
        chunk = batch[number].tensor
        assert chunk is not None
        for layer in range(engine.num_layers):
            for plane in (KEYS, VALUES):
                expected = engine.plane(plane, layer, int(slots[token]))
                assert torch.equal(as_bytes(chunk[plane, layer, at]), expected), (plane, layer)


def check_blocks(engine: EngineCache, cache: PagedKVCache) -> None:
    """Move whole blocks to other blocks; compare all memory."""
    ids = np.random.default_rng(1).permutation(engine.num_blocks)
    count = engine.num_blocks // 2
    source, target = ids[:count], ids[-count:]
    assert (cache.num_layers, cache.num_blocks) == (engine.num_layers, engine.num_blocks)
    before = [storage.clone() for storage in engine.storages]
    for layer in range(engine.num_layers):
        for here, there in zip(source.tolist(), target.tolist(), strict=True):
            for read, written in zip(
                engine.pieces(layer, here), engine.pieces(layer, there), strict=True
            ):
                written.copy_(read)
    expected = _taken_back(engine, before)
    chunks = heap()
    batch = chunks.batched_store(cache, BlockIds(torch.from_numpy(source)), cache.block_size)
    assert batch is not None
    chunks.batched_load(batch, cache, BlockIds(torch.from_numpy(target)))
    _compare(engine, expected)
    _taken_back(engine, before)


def moves_single_tokens(engine: EngineCache, cache: PagedKVCache) -> bool:
    """Whether a store of part of a block is accepted."""
    if cache.num_slots != engine.num_slots or engine.block_size == 1:
        return False  # a slot is a block
    try:
        batch = heap().batched_store(cache, torch.tensor([engine.block_size + 1]), 1)
    except ValueError:
        return False
    return batch is not None


def check_detected(engine: EngineCache, cache: PagedKVCache) -> None:
    """What was detected moves tokens, or takes whole blocks only and moves these."""
    if not moves_single_tokens(engine, cache):
        check_blocks(engine, cache)
        return
    assert engine.rows is not None, (
        f"{cache.layout.name} takes tokens one by one, but a token has no rows of its own here"
    )
    check_tokens(engine, cache)


def _taken_back(engine: EngineCache, before: list[torch.Tensor]) -> list[torch.Tensor]:
    """All memory now; afterwards it is as ``before``."""
    now = [storage.clone() for storage in engine.storages]
    for storage, saved in zip(engine.storages, before, strict=True):
        storage.copy_(saved)
    return now


def _compare(engine: EngineCache, expected: list[torch.Tensor]) -> None:
    wrong = [
        int((storage != wanted).sum())
        for storage, wanted in zip(engine.storages, expected, strict=True)
    ]
    assert not any(wrong), f"{wrong} bytes are not where the engine keeps them"


def each(names: Iterable[str], not_yet: dict[str, str]) -> list[Any]:
    """A parameter for each name; those of ``not_yet`` must fail until they are taken off it."""
    names = list(names)
    unknown = not_yet.keys() - set(names)
    assert not unknown, f"not a case: {sorted(unknown)}"
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.xfail(
                    strict=True, raises=(AssertionError, ValueError), reason=not_yet[name]
                )
            ]
            if name in not_yet
            else [],
        )
        for name in names
    ]


def because(reason: str, *names: str) -> dict[str, str]:
    """Part of a table of cases that do not work yet."""
    return dict.fromkeys(names, reason)
