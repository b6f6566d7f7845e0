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
ONE_PLANE = ("mla", "sglang-mla", "sglang-rows", "vllm-packed", "opaque")
MORE_PLANES = {"vllm-nvfp4-linear": 4, "plane-tuples": 3}
WITHOUT_KEYS = (*ONE_PLANE, "indexer", "values-scales", "plane-tuples")
BYTES_ONLY = ("indexer", "values-scales", "vllm-nvfp4-linear")
DENSE_BLOCKS = (*BYTES_ONLY, "opaque")
SPLIT_SCALE_BYTES = 3
PER_LAYER = (MemoryFormat.KV_2TD, MemoryFormat.KV_T2D)
ONE_PLANE_FORMATS = (MemoryFormat.KV_MLA_FMT, MemoryFormat.KV_TLD, MemoryFormat.KV_PLTD)


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
    2 x C, V for the bytes of an indexer, U for those of values and scales, W for 2 x H, Q for the
    bytes of an NVFP4 row. ``physical`` is their order in memory.
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


def _split_at(t: Any, layer: int, plane: int, block: int, slot: int, head: int) -> torch.Tensor:
    block_size, token_bytes = t[layer].shape[1:]
    page = t[layer][block].reshape(-1)
    values = block_size * (token_bytes - SPLIT_SCALE_BYTES)
    return (page[:values], page[values:])[plane].view(block_size, -1)[slot]


def nvfp4_at(t: Any, layer: int, plane: int, block: int, slot: int, head: int) -> torch.Tensor:
    """By vLLM 0.33.0, ``_nvfp4_kv_views``: K data, K scales, V data, V scales of a dense block."""
    page = t[layer][block]
    head_slots, block_size, row = page.shape
    heads, is_hnd = head_slots // 2, page.is_contiguous()
    memory = (page if is_hnd else page.transpose(0, 1)).reshape(-1)
    assert memory.data_ptr() == page.data_ptr()
    sizes = [heads * block_size * row * eighths // 9 for eighths in (8, 1, 8, 1)]
    part = memory.split(sizes)[plane]
    if is_hnd:
        return part.view(heads, block_size, -1)[head, slot]
    return part.view(block_size, heads, -1)[slot, head]


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
    "values-scales": Spec("L", "BNU", _split_at),
    "vllm-nvfp4-linear": Spec("", "LBWNQ", nvfp4_at, "LBWNQ"),
    "vllm-packed": Spec("", "LBHNC", lambda t, i, p, b, n, h: t[i][b, h, n]),
    "sglang-mha-hnd": Spec("PL", "BHNC", lambda t, i, p, b, n, h: t[p][i][b, h, n]),
    "sglang-rows": Spec("L", "SHC", lambda t, i, p, s, n, h: t[i][s, h]),
    "kv-tuples-slots": Spec("LP", "SHC", lambda t, i, p, s, n, h: t[i][p][s, h]),
    "plane-tuples": Spec("LP", "BNHC", lambda t, i, p, b, n, h: t[i][p][b, n, h]),
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
        if layout in ("mla", "sglang-mla", "indexer", "values-scales", "opaque"):
            sizes = replace(sizes, num_heads=1)
        if layout in BYTES_ONLY:
            sizes = replace(sizes, dtype=torch.uint8)
        if layout == "values-scales":  # values have more bytes than their scales
            sizes = replace(sizes, head_dim=max(sizes.head_dim, SPLIT_SCALE_BYTES + 1))
        self.layout, self.sizes, self.device = layout, sizes, torch.device(device)
        self.spec, self.strides = SPECS[layout], strides
        self.block_size = 1 if layout == "opaque" else sizes.block_size
        self.num_planes = MORE_PLANES.get(layout, 1 if layout in ONE_PLANE else 2)
        self.facts: dict[str, Any] = {}
        if layout == "values-scales":
            self.facts["widths"] = (sizes.head_dim, SPLIT_SCALE_BYTES)
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
        if self.layout == "plane-tuples":
            dim = self.sizes.head_dim
            return [tuple(self._tensor(width) for width in (dim, 2 * dim, 1)) for _ in layers]
        if self.spec.nesting == "LP":
            return [(self._tensor(), self._tensor()) for _ in layers]
        return [[self._tensor() for _ in layers] for _ in "KV"]

    def _tensor(self, width: int | None = None) -> torch.Tensor:
        sizes, dims = self.sizes, self.spec.dims
        extents = {
            "L": sizes.num_layers,
            "B": sizes.num_blocks,
            "N": sizes.block_size,
            "H": sizes.num_heads,
            "C": width or sizes.head_dim,
            "P": 2,
            "S": sizes.num_blocks * sizes.block_size,
            "F": 2 * sizes.head_dim,
            "V": sizes.head_dim + SCALE_BYTES,
            "U": sizes.head_dim + SPLIT_SCALE_BYTES,
            "W": 2 * sizes.num_heads,
            "Q": 9 * sizes.head_dim,
        }
        is_whole_block = self.layout in DENSE_BLOCKS
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
    row = sum(engine.row_bytes) // engine.sizes.dtype.itemsize
    pages, groups = chunk_tokens // page_tokens, head_groups(heads)
    if fmt in ONE_PLANE_FORMATS:
        return {
            MemoryFormat.KV_MLA_FMT: (1, layers, chunk_tokens, row * heads),
            MemoryFormat.KV_TLD: (chunk_tokens, layers, row * heads),
            MemoryFormat.KV_PLTD: (pages, layers, page_tokens, row * heads),
        }[fmt]
    row //= 2
    dim = row * heads
    return {
        MemoryFormat.KV_2LTD: (2, layers, chunk_tokens, dim),
        MemoryFormat.KV_2TD: (2, chunk_tokens, dim),
        MemoryFormat.KV_T2D: (chunk_tokens, 2, dim),
        MemoryFormat.KV_2TLD: (2, chunk_tokens, layers, dim),
        MemoryFormat.KV_PL2TD: (pages, layers, 2, page_tokens, dim),
        MemoryFormat.KV_2PHTLD: (2, pages, heads, page_tokens, layers, row),
        MemoryFormat.KV_PHL2TD: (pages, groups, layers, 2, page_tokens, dim // groups),
    }[fmt]


def head_groups(num_heads: int) -> int:
    """Groups of heads in chunks of KV_PHL2TD: several heads in each, if that can be."""
    return num_heads if num_heads % 2 else num_heads // 2


def tokens_of_chunk(batch: MemoryBatch) -> int:
    shape, order = batch.shape, batch.fmt.dim_order
    assert order is not None
    pages = shape[order.index("G")] if "G" in order else 1
    return pages * shape[order.index("T")]


def layers_of_chunk(batch: MemoryBatch, num_chunks: int) -> int:
    order = batch.fmt.dim_order
    assert order is not None
    return batch.shape[order.index("L")] if "L" in order else len(batch) // num_chunks


def heads_of_chunk(batch: MemoryBatch, engine: Engine) -> int:
    planes = 1 if batch.fmt in ONE_PLANE_FORMATS else 2
    order = batch.fmt.dim_order
    assert order is not None
    groups = batch.shape[order.index("J")] if "J" in order else 1
    row_elements = batch.shape[order.index("D") :].numel() * groups
    return row_elements * batch.dtype.itemsize // (sum(engine.row_bytes) // planes)


@dataclass(frozen=True)
class Chunks:
    """A batch as what it holds: the rows of tokens."""

    batch: MemoryBatch
    engine: Engine
    num_chunks: int

    def row(self, layer: int, plane: int, token: int, head: int) -> torch.Tensor:
        """The bytes of one head of one token in one plane, a view of the heap."""
        fmt, widths = self.batch.fmt, self.engine.row_bytes
        number, t = divmod(token, tokens_of_chunk(self.batch))
        if fmt in PER_LAYER:
            number += layer * self.num_chunks
        chunk = self.batch[number].tensor
        assert chunk is not None
        # Planes of the engine that one plane of the chunk holds, side by side for each head.
        count = len(widths) if fmt in ONE_PLANE_FORMATS else len(widths) // 2
        side, part = divmod(plane, count)
        widths = widths[side * count : (side + 1) * count]
        if fmt is MemoryFormat.KV_2LTD:
            row = chunk[side, layer, t]
        elif fmt is MemoryFormat.KV_2TD:
            row = chunk[side, t]
        elif fmt is MemoryFormat.KV_T2D:
            row = chunk[t, side]
        elif fmt is MemoryFormat.KV_2TLD:
            row = chunk[side, t, layer].reshape(-1)
        elif fmt is MemoryFormat.KV_PL2TD:
            page, t = divmod(t, chunk.shape[3])
            row = chunk[page, layer, side, t]
        elif fmt is MemoryFormat.KV_TLD:
            row = chunk[t, layer]
        elif fmt is MemoryFormat.KV_PLTD:
            page, t = divmod(t, chunk.shape[2])
            row = chunk[page, layer, t]
        elif fmt is MemoryFormat.KV_2PHTLD:
            page, t = divmod(t, chunk.shape[3])
            row, head = chunk[side, page, head, t, layer], 0
        elif fmt is MemoryFormat.KV_PHL2TD:
            page, t = divmod(t, chunk.shape[4])
            heads = heads_of_chunk(self.batch, self.engine) // chunk.shape[1]
            row, head = chunk[page, head // heads, layer, side, t], head % heads
        else:
            row = chunk[0, layer, t]
        start = head * sum(widths) + sum(widths[:part])
        return row.view(torch.uint8)[start : start + widths[part]]


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
