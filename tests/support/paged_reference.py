"""Paged KV caches and chunks of a heap as tensors, and which rows of both belong together.

Every engine layout is written down a second time, as an index into the engine's tensors, and every
format as an index into a chunk. Nothing here uses strides or addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvheap import MemoryBatch, MemoryFormat

SCALE_BYTES = 4
FUSED_ORDERS = ("LBHNF", "LBNHF", "LHBNF", "BLHNF", "BLNHF", "BHLNF")
ONE_PLANE = ("mla", "sglang-mla", "opaque")
PER_LAYER = (MemoryFormat.KV_2TD, MemoryFormat.KV_T2D)


@dataclass(frozen=True)
class Sizes:
    """Small, and all different, so that no two dimensions can be mixed up."""

    num_layers: int = 3
    num_blocks: int = 7
    block_size: int = 4
    num_heads: int = 5
    head_dim: int = 8
    dtype: torch.dtype = torch.bfloat16


At = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """``at(tensors, layer, plane, block, slot, head)`` is a row; and how the tensors nest.

    ``dims`` has a letter for each dimension: L, B, N, H, C, P for two planes, S for B x N, F for
    2 x C, V for the bytes of an indexer. ``physical`` is their order in memory.
    """

    nesting: str
    dims: str
    at: At
    physical: str = ""


def _fused_at(t: Any, layer: int, plane: int, block: int, slot: int, head: int) -> torch.Tensor:
    row = t[layer][block, head, slot]
    return row[: len(row) // 2] if plane == 0 else row[len(row) // 2 :]


def _indexer_at(t: Any, layer: int, plane: int, block: int, slot: int, head: int) -> torch.Tensor:
    block_size, token_bytes = t[layer].shape[1:]
    value_bytes = token_bytes - SCALE_BYTES
    values, scales = (
        t[layer][block].view(-1).split([block_size * value_bytes, block_size * SCALE_BYTES])
    )
    return (values, scales)[plane].view(block_size, -1)[slot]


SPECS: dict[str, Spec] = {
    "vllm-flash-nhd": Spec("L", "PBNHC", lambda t, i, p, b, n, h: t[i][p, b, n, h]),
    "vllm-flash-hnd": Spec("L", "PBHNC", lambda t, i, p, b, n, h: t[i][p, b, h, n]),
    "vllm-flashinfer-nhd": Spec("L", "BPNHC", lambda t, i, p, b, n, h: t[i][b, p, n, h]),
    "vllm-flashinfer-hnd": Spec("L", "BPHNC", lambda t, i, p, b, n, h: t[i][b, p, h, n]),
    **{
        f"vllm-{order.replace('F', 'C').lower()}": Spec("", "LBHNF", _fused_at, order)
        for order in FUSED_ORDERS
    },
    "vllm-cross-layer": Spec("", "BLPNHC", lambda t, i, p, b, n, h: t[b, i, p, n, h]),
    "mla": Spec("L", "BNC", lambda t, i, p, b, n, h: t[i][b, n]),
    "indexer": Spec("L", "BNV", _indexer_at),
    "sglang-mha": Spec("PL", "SHC", lambda t, i, p, s, n, h: t[p][i][s, h]),
    "sglang-mla": Spec("L", "SHC", lambda t, i, p, s, n, h: t[i][s, 0]),
    "trtllm": Spec("", "BLPHNC", lambda t, i, p, b, n, h: t[b, i, p, h, n]),
    "kv-tuples": Spec("LP", "BNHC", lambda t, i, p, b, n, h: t[i][p][b, n, h]),
    "kv-tuples-hnd": Spec("LP", "BHNC", lambda t, i, p, b, n, h: t[i][p][b, h, n]),
    "opaque": Spec("L", "BNC", lambda t, i, p, b, n, h: t[i][b].reshape(-1)),
}
"""By name of the engine layout. Where it only has slots, the slot is passed as the block."""


@dataclass(frozen=True)
class Strides:
    """How the tensors lie in memory: elements of padding, of guard before, order of dimensions.

    The guard of each tensor is ``guard_step`` larger than that of the one before.
    """

    padding: int = 0
    guard: int = 16
    guard_step: int = 0
    order: str = ""


class Engine:
    """The KV cache of an engine in one engine layout: random bytes, the padding included.

    With ``is_list``, a tensor of all layers is given as a list of its layers.
    """

    def __init__(
        self,
        layout: str,
        sizes: Sizes = Sizes(),
        strides: Strides = Strides(),
        device: torch.device | str = "cpu",
        seed: int = 0,
        is_list: bool = False,
    ) -> None:
        if layout in ("mla", "sglang-mla", "indexer", "opaque"):
            sizes = replace(sizes, num_heads=1)
        if layout == "indexer":
            sizes = replace(sizes, dtype=torch.uint8)
        self.layout, self.sizes, self.device = layout, sizes, torch.device(device)
        self.spec, self.strides = SPECS[layout], strides
        self.block_size = 1 if layout == "opaque" else sizes.block_size
        self.num_planes = 1 if layout in ONE_PLANE else 2
        self.storages: list[torch.Tensor] = []
        self._random = torch.Generator().manual_seed(seed)
        self.tensors = list(self._tensors()) if is_list else self._tensors()

    @property
    def num_slots(self) -> int:
        return self.sizes.num_blocks * self.block_size

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes of one head of one token, by plane."""
        return tuple(self.row(0, plane, 0, 0).numel() for plane in range(self.num_planes))

    def row(self, layer: int, plane: int, slot: int, head: int) -> torch.Tensor:
        """The bytes of one head of one token in one plane, a view."""
        if "S" in self.spec.dims:
            row = self.spec.at(self.tensors, layer, plane, slot, 0, head)
        else:
            block, at = divmod(slot, self.block_size)
            row = self.spec.at(self.tensors, layer, plane, block, at, head)
        return row.view(torch.uint8)

    def _tensors(self) -> Any:
        layers = range(self.sizes.num_layers)
        if self.spec.nesting == "":
            return self._tensor()
        if self.spec.nesting == "L":
            return [self._tensor() for _ in layers]
        if self.spec.nesting == "LP":
            return [(self._tensor(), self._tensor()) for _ in layers]
        return [[self._tensor() for _ in layers] for _ in "KV"]

    def _tensor(self) -> torch.Tensor:
        sizes, dims = self.sizes, self.spec.dims
        extents = {
            "L": sizes.num_layers,
            "B": sizes.num_blocks,
            "N": sizes.block_size,
            "H": sizes.num_heads,
            "C": sizes.head_dim,
            "P": 2,
            "S": sizes.num_blocks * sizes.block_size,
            "F": 2 * sizes.head_dim,
            "V": sizes.head_dim + SCALE_BYTES,
        }
        is_whole_block = self.layout in ("indexer", "opaque")
        steps: dict[str, int] = {}
        step = 1
        for dim in reversed(self.spec.physical or self.strides.order or dims):
            padded = step > 1 and (dim == "B" or not is_whole_block)
            steps[dim] = step + self.strides.padding * padded
            step = steps[dim] * extents[dim]
        shape = [extents[dim] for dim in dims]
        guard = self.strides.guard + self.strides.guard_step * len(self.storages)
        num_elements = step + 2 * guard
        storage = random_bytes(num_elements * sizes.dtype.itemsize, self._random).to(self.device)
        self.storages.append(storage)
        return storage.view(sizes.dtype).as_strided(shape, [steps[dim] for dim in dims], guard)


def random_bytes(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def chunk_shape(
    engine: Engine,
    fmt: MemoryFormat,
    chunk_tokens: int,
    num_layers: int | None = None,
    num_heads: int | None = None,
    page_tokens: int = 2,
) -> tuple[int, ...]:
    """The shape of a chunk of ``chunk_tokens`` tokens of this engine."""
    layers = engine.sizes.num_layers if num_layers is None else num_layers
    heads = engine.sizes.num_heads if num_heads is None else num_heads
    itemsize = engine.sizes.dtype.itemsize
    dim = engine.row_bytes[0] // itemsize * heads
    shapes = {
        MemoryFormat.KV_2LTD: (2, layers, chunk_tokens, dim),
        MemoryFormat.KV_2TD: (2, chunk_tokens, dim),
        MemoryFormat.KV_T2D: (chunk_tokens, 2, dim),
        MemoryFormat.KV_MLA_FMT: (
            1,
            layers,
            chunk_tokens,
            sum(engine.row_bytes) // itemsize * heads,
        ),
        MemoryFormat.KV_2TLD: (2, chunk_tokens, layers, dim),
        MemoryFormat.KV_PL2TD: (chunk_tokens // page_tokens, layers, 2, page_tokens, dim),
    }
    return shapes[fmt]


def tokens_of_chunk(batch: MemoryBatch) -> int:
    shape = batch.shape
    if batch.fmt is MemoryFormat.KV_PL2TD:
        return shape[0] * shape[3]
    return shape[
        {MemoryFormat.KV_T2D: 0, MemoryFormat.KV_2TD: 1, MemoryFormat.KV_2TLD: 1}.get(batch.fmt, 2)
    ]


def layers_of_chunk(batch: MemoryBatch, num_chunks: int) -> int:
    if batch.fmt in PER_LAYER:
        return len(batch) // num_chunks
    at = {MemoryFormat.KV_2TLD: 2}.get(batch.fmt, 1)
    return batch.shape[at]


def heads_of_chunk(batch: MemoryBatch, engine: Engine) -> int:
    is_one_plane = batch.fmt is MemoryFormat.KV_MLA_FMT
    row_bytes = sum(engine.row_bytes) if is_one_plane else engine.row_bytes[0]
    token_elements = batch.shape[3:] if batch.fmt is MemoryFormat.KV_2TLD else batch.shape[-1:]
    return token_elements.numel() * batch.dtype.itemsize // row_bytes


@dataclass(frozen=True)
class Chunks:
    """A batch as what it holds: the rows of tokens."""

    batch: MemoryBatch
    engine: Engine
    num_chunks: int

    def row(self, layer: int, plane: int, token: int, head: int) -> torch.Tensor:
        """The bytes of one head of one token in one plane, a view of the heap."""
        fmt = self.batch.fmt
        number, t = divmod(token, tokens_of_chunk(self.batch))
        if fmt in PER_LAYER:
            number += layer * self.num_chunks
        chunk = self.batch[number].tensor
        assert chunk is not None
        if fmt is MemoryFormat.KV_2LTD:
            row = chunk[plane, layer, t]
        elif fmt is MemoryFormat.KV_2TD:
            row = chunk[plane, t]
        elif fmt is MemoryFormat.KV_T2D:
            row = chunk[t, plane]
        elif fmt is MemoryFormat.KV_2TLD:
            row = chunk[plane, t, layer].reshape(-1)
        elif fmt is MemoryFormat.KV_PL2TD:
            page, t = divmod(t, chunk.shape[3])
            row = chunk[page, layer, plane, t]
        else:
            return self._one_plane_row(chunk[0, layer, t], plane, head)
        size = self.engine.row_bytes[plane]
        return row.view(torch.uint8)[head * size : (head + 1) * size]

    def _one_plane_row(self, row: torch.Tensor, plane: int, head: int) -> torch.Tensor:
        sizes = self.engine.row_bytes
        start = head * sum(sizes) + sum(sizes[:plane])
        return row.view(torch.uint8)[start : start + sizes[plane]]


def pairs(
    engine: Engine,
    batch: MemoryBatch,
    slots: Sequence[int],
    layers: range | None = None,
    heads: slice | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(row of the engine, row of the heap) of everything that a transfer moves."""
    num_chunks = max(1, -(-len(slots) // tokens_of_chunk(batch)))
    chunks = Chunks(batch, engine, num_chunks)
    layers = range(engine.sizes.num_layers) if layers is None else layers
    is_whole = layers_of_chunk(batch, num_chunks) == engine.sizes.num_layers
    engine_heads, chunk_heads = engine.sizes.num_heads, heads_of_chunk(batch, engine)
    numbers = range(engine_heads) if heads is None else range(heads.start, heads.stop)
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        for layer in layers:
            chunk_layer = layer if is_whole else layer - layers.start
            for head in numbers:
                here = head if engine_heads >= chunk_heads else head - numbers.start
                there = head if chunk_heads >= engine_heads else head - numbers.start
                for plane in range(engine.num_planes):
                    yield (
                        engine.row(layer, plane, slot, here),
                        chunks.row(chunk_layer, plane, token, there),
                    )
