"""``EngineCache``: a paged KV cache as an engine keeps it, with the engine's own indexing.

Chunks are written and read by plain torch indexing, as the engine of each layout does it. This
module never uses :class:`~kvheap.kernels.paged_layout.PagedKVCache` to find a token, so it can
check copies that use that class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvheap.kernels.paged_copy import BlockIds
from kvheap.kernels.paged_layout import INDEXER_BYTES, SCALE_BYTES, PagedKVCache
from kvheap.replay.geometry import Geometry, Kind

__all__ = ["ENGINE_LAYOUTS", "EngineCache", "EngineTensors"]

ENGINE_BLOCK_TOKENS = 16
"""Tokens of a block of the engine."""

INDEXER_VALUE_BYTES = INDEXER_BYTES - SCALE_BYTES
"""Bytes of the values that an indexer keeps for one token, without their scale."""

MAX_POOL_BLOCKS = 4096
"""The most blocks of a pool, unless ``MIN_POOL_CHUNKS`` needs more."""

MAX_POOL_BYTES = 256 << 20
"""The most bytes of a pool, unless ``MIN_POOL_CHUNKS`` needs more."""

MIN_POOL_CHUNKS = 2
"""A pool holds at least this many chunks."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of an engine's tensors by letter.

    L layers, B blocks, N tokens of a block, H heads, C elements of a head, F elements of K and V
    of a head, G heads of K and of V, S slots of all blocks, I bytes that an indexer keeps for a
    token, R and K elements of two parts of a head. A digit stands for itself.
    """

    by_letter: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls, geometry: Geometry, num_blocks: int, block_size: int, device: torch.device
    ) -> _Sizes:
        sizes = {"L": geometry.num_layers, "B": num_blocks, "N": block_size}
        sizes |= {"H": geometry.num_heads, "C": geometry.head_dim, "F": 2 * geometry.head_dim}
        sizes |= {"G": 2 * geometry.num_heads}
        sizes |= {"S": num_blocks * block_size, "I": INDEXER_BYTES}
        sizes |= {"K": geometry.head_dim // 4, "R": geometry.head_dim - geometry.head_dim // 4}
        return cls(sizes, geometry.dtype, device)

    def zeros(self, dims: str) -> torch.Tensor:
        """One tensor of the dimensions ``dims``."""
        shape = [int(dim) if dim.isdigit() else self.by_letter[dim] for dim in dims]
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def layers(self, dims: str) -> list[torch.Tensor]:
        """A tensor for each layer."""
        return [self.zeros(dims) for _ in range(self.by_letter["L"])]

    def pairs(self, dims: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tensors for K and V of each layer."""
        return list(zip(self.layers(dims), self.layers(dims), strict=True))

    def permuted(self, dims: str, order: str) -> torch.Tensor:
        """One tensor of the dimensions ``dims``, which are in memory in the order ``order``."""
        return self.zeros(order).permute([order.index(dim) for dim in dims])


@dataclass(frozen=True, slots=True)
class EngineTensors:
    """The tensors of an engine layout, and where the tokens of a layer are in them.

    Attributes:
        kind: the kind of geometry that they can keep.
        make: makes the tensors, filled with zeros.
        planes: takes the tensors, a layer, and the number of tokens of a block. Returns views
            ``[B, N, H, C]``: of K and V, of values and scales, of both of K and of V, or a single
            view.
        by_head: whether a chunk keeps each block head by head, because only whole blocks are
            copied, not token by token.
        widths: bytes of values and of scales, if the engine layout needs to be told.
    """

    kind: Kind
    make: Callable[[_Sizes], Any]
    planes: Callable[[Any, int, int], Sequence[torch.Tensor]]
    by_head: bool = False
    widths: tuple[int, int] | None = None


def _attention(
    make: Callable[[_Sizes], Any], planes: Callable[[Any, int, int], Sequence[torch.Tensor]]
) -> EngineTensors:
    return EngineTensors("attention", make, planes)


def _fused(order: str) -> EngineTensors:
    """One tensor ``[L, B, H, N, 2C]`` of vLLM: K then V of each head, in any physical order."""
    return _attention(
        lambda sizes: sizes.permuted("LBHNF", order),
        lambda tensor, layer, _: tensor[layer].transpose(1, 2).chunk(2, dim=-1),
    )


def _key_then_value_rows(
    tensor: torch.Tensor, layer: int, block_size: int
) -> Sequence[torch.Tensor]:
    """Views of K and V in ``[L, B, H, N, 2C]``, where a head has all its K rows first."""
    rows = tensor[layer].view(*tensor.shape[1:3], 2 * block_size, -1)
    return rows.transpose(1, 2).chunk(2, dim=1)


def _nvfp4_planes(tensor: torch.Tensor, layer: int, block_size: int) -> Sequence[torch.Tensor]:
    """Views of the data and scales of K, then of V, in ``[L, B, 2H, N, C]`` of bytes."""
    num_blocks, head_slots, _, row_bytes = tensor.shape[1:]
    shape = (num_blocks, head_slots // 2, block_size)
    sides = tensor[layer].flatten(1).chunk(2, dim=1)
    end = head_slots // 2 * block_size * row_bytes * 8 // 9
    parts = (part for side in sides for part in (side[:, :end], side[:, end:]))
    return [part.view(*shape, -1).transpose(1, 2) for part in parts]


def _pages(slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """A view ``[B, N, H, C]`` of slots ``[S, H, C]``, or ``[B, N, C]`` of ``[S, C]``."""
    return slots.view(-1, block_size, *slots.shape[1:])


def _indexer_planes(
    tensors: Sequence[torch.Tensor], layer: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of an indexer's block: first the values of all its tokens, then all their scales."""
    of_block = tensors[layer].flatten(1)
    end = block_size * INDEXER_VALUE_BYTES
    values, scales = of_block[:, :end], of_block[:, end:]
    shape = (-1, block_size, 1)
    return values.view(*shape, INDEXER_VALUE_BYTES), scales.view(*shape, SCALE_BYTES)


ENGINE_LAYOUTS: Mapping[str, EngineTensors] = {
    "vllm-flash-nhd": _attention(
        lambda sizes: sizes.layers("2BNHC"), lambda caches, layer, _: caches[layer].unbind(0)
    ),
    "vllm-flash-hnd": _attention(
        lambda sizes: sizes.layers("2BHNC"),
        lambda caches, layer, _: caches[layer].transpose(2, 3).unbind(0),
    ),
    "vllm-flashinfer-nhd": _attention(
        lambda sizes: sizes.layers("B2NHC"), lambda caches, layer, _: caches[layer].unbind(1)
    ),
    "vllm-flashinfer-hnd": _attention(
        lambda sizes: sizes.layers("B2HNC"),
        lambda caches, layer, _: caches[layer].transpose(2, 3).unbind(1),
    ),
    "vllm-lbhnc": _fused("LBHNF"),
    "vllm-lbnhc": _fused("LBNHF"),
    "vllm-lhbnc": _fused("LHBNF"),
    "vllm-blhnc": _fused("BLHNF"),
    "vllm-blnhc": _fused("BLNHF"),
    "vllm-bhlnc": _fused("BHLNF"),
    "vllm-cross-layer": _attention(
        lambda sizes: sizes.zeros("BL2NHC"), lambda cache, layer, _: cache[:, layer].unbind(1)
    ),
    "mla": EngineTensors(
        "latent",
        lambda sizes: sizes.layers("BNC"),
        lambda caches, layer, _: (caches[layer].unsqueeze(2),),
    ),
    "indexer": EngineTensors("indexer", lambda sizes: sizes.layers("BNI"), _indexer_planes),
    "sglang-mha": _attention(
        lambda sizes: (sizes.layers("SHC"), sizes.layers("SHC")),
        lambda buffers, layer, block_size: [
            _pages(buffer[layer], block_size) for buffer in buffers
        ],
    ),
    "sglang-mla": EngineTensors(
        "latent",
        lambda sizes: sizes.layers("S1C"),
        lambda buffers, layer, block_size: (_pages(buffers[layer], block_size),),
    ),
    "trtllm": _attention(
        lambda sizes: sizes.zeros("BL2HNC"),
        lambda pool, layer, _: pool[:, layer].transpose(2, 3).unbind(1),
    ),
    "kv-tuples": _attention(
        lambda sizes: sizes.pairs("BNHC"), lambda caches, layer, _: caches[layer]
    ),
    "kv-tuples-hnd": _attention(
        lambda sizes: sizes.pairs("BHNC"),
        lambda caches, layer, _: [plane.transpose(1, 2) for plane in caches[layer]],
    ),
    "values-scales": EngineTensors(
        "indexer",
        lambda sizes: sizes.layers("BNI"),
        _indexer_planes,
        widths=(INDEXER_VALUE_BYTES, SCALE_BYTES),
    ),
    "vllm-cpu": EngineTensors(
        "attention", lambda sizes: sizes.zeros("LBHNF"), _key_then_value_rows, by_head=True
    ),
    "vllm-nvfp4": EngineTensors(
        "nvfp4", lambda sizes: sizes.zeros("LBGNC"), _nvfp4_planes, by_head=True
    ),
    "vllm-nvfp4-linear": EngineTensors("nvfp4", lambda sizes: sizes.zeros("LBGNC"), _nvfp4_planes),
    "vllm-packed": EngineTensors(
        "latent",
        lambda sizes: sizes.zeros("LB1NC"),
        lambda tensor, layer, _: (tensor[layer].transpose(1, 2),),
    ),
    "sglang-mha-hnd": _attention(
        lambda sizes: (sizes.layers("BHNC"), sizes.layers("BHNC")),
        lambda buffers, layer, _: [buffer[layer].transpose(1, 2) for buffer in buffers],
    ),
    "sglang-rows": EngineTensors(
        "latent",
        lambda sizes: sizes.layers("SC"),
        lambda buffers, layer, block_size: (_pages(buffers[layer], block_size).unsqueeze(2),),
    ),
    "kv-tuples-slots": _attention(
        lambda sizes: sizes.pairs("SHC"),
        lambda caches, layer, block_size: [_pages(side, block_size) for side in caches[layer]],
    ),
    "plane-tuples": EngineTensors(
        "latent",
        lambda sizes: list(zip(sizes.layers("BN1R"), sizes.layers("BN1K"), strict=True)),
        lambda caches, layer, _: caches[layer],
    ),
    "opaque": EngineTensors(
        "opaque",
        lambda sizes: sizes.layers("BC"),
        lambda caches, layer, _: (caches[layer][:, None, None],),
    ),
}
"""Tensors of engine layouts, by their names in :data:`~kvheap.kernels.paged_layout.LAYOUTS`."""


class EngineCache:
    """The KV tensors of an engine, and a pool of their blocks.

    Args:
        engine_layout: a name of :data:`ENGINE_LAYOUTS`.
        geometry: the geometry of a chunk; its kind must be the one that the engine layout keeps.
        device: where the tensors live.
        num_blocks: blocks of the pool; None: as many as the limits of this module allow.
        seed: determines the order in which blocks are taken.

    Attributes:
        geometry, device: as given.
        tensors: the tensors, as the engine keeps them.
        cache: the same tensors, as kvheap sees them.
        num_chunks: how many chunks the pool has room for.

    Raises:
        KeyError: there is no such engine layout.
        ValueError: the geometry is of another kind than the engine layout keeps, its chunks are not
            whole blocks, or the pool is smaller than a chunk.
    """

    def __init__(
        self,
        engine_layout: str,
        geometry: Geometry,
        device: torch.device,
        num_blocks: int | None = None,
        seed: int = 0,
    ) -> None:
        self._engine_tensors = ENGINE_LAYOUTS[engine_layout]
        kept = self._engine_tensors.kind
        if geometry.kind != kept:
            raise ValueError(
                f"{engine_layout} keeps {kept} KV, but {geometry.name} is {geometry.kind} KV"
            )
        self.geometry = geometry
        # An opaque block counts as one slot.
        self._block_size = 1 if geometry.kind == "opaque" else ENGINE_BLOCK_TOKENS
        self._blocks_per_chunk, left = divmod(geometry.shape[2], self._block_size)
        if left or not self._blocks_per_chunk:
            raise ValueError(
                f"chunks of {geometry.shape[2]} tokens are not whole blocks of {self._block_size}"
            )
        self._num_blocks = self._pool_size() if num_blocks is None else num_blocks
        self.num_chunks = self._num_blocks // self._blocks_per_chunk
        if not self.num_chunks:
            raise ValueError(
                f"a chunk of {geometry.name} takes {self._blocks_per_chunk} blocks, got a pool of "
                f"{num_blocks}"
            )
        self._random = torch.Generator().manual_seed(seed % (1 << 63))
        sizes = _Sizes.of(geometry, self._num_blocks, self._block_size, device)
        self.tensors = self._engine_tensors.make(sizes)
        self.device = device
        self.cache = PagedKVCache.of(
            engine_layout,
            self.tensors,
            block_size=self._block_size,
            widths=self._engine_tensors.widths,
        )

    def _pool_size(self) -> int:
        block_bytes = self.geometry.chunk_bytes // self._blocks_per_chunk
        fitting = min(MAX_POOL_BLOCKS, MAX_POOL_BYTES // block_bytes)
        return max(fitting, MIN_POOL_CHUNKS * self._blocks_per_chunk)

    def take(self, num_chunks: int) -> torch.Tensor:
        """Blocks for chunks: random, distinct ids, int64 ``[num_chunks, blocks of a chunk]``.

        Blocks that were taken before may be taken again.

        Raises:
            ValueError: the pool has no room for that many chunks.
        """
        if num_chunks > self.num_chunks:
            raise ValueError(f"the pool has room for {self.num_chunks} chunks, got {num_chunks}")
        ids = torch.randperm(self._num_blocks, generator=self._random, device="cpu")
        ids = ids[: num_chunks * self._blocks_per_chunk]
        return ids.view(num_chunks, self._blocks_per_chunk).to(self.device)

    def slots(self, block_ids: torch.Tensor) -> BlockIds:
        """The slots of chunks in blocks ``block_ids``, ``[N, blocks of a chunk]``."""
        return BlockIds(block_ids.flatten())

    def write(self, block_ids: torch.Tensor, chunks: torch.Tensor) -> None:
        """Write ``chunks``, ``[N, *shape]``, to blocks ``[N, blocks of a chunk]``."""
        for layer in range(self.geometry.num_layers):
            for plane, piece in zip(self._planes(layer), self._pieces(chunks, layer), strict=True):
                plane[block_ids] = piece

    def read(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Read chunks, ``[N, *shape]``, from blocks ``[N, blocks of a chunk]``."""
        geometry = self.geometry
        shape = (len(block_ids), *geometry.shape)
        chunks = torch.empty(shape, dtype=geometry.dtype, device=self.device)
        for layer in range(geometry.num_layers):
            for plane, piece in zip(self._planes(layer), self._pieces(chunks, layer), strict=True):
                piece.copy_(plane[block_ids])
        return chunks

    def _planes(self, layer: int) -> Sequence[torch.Tensor]:
        """Views ``[B, N, H, C]`` of the tokens of a layer."""
        return self._engine_tensors.planes(self.tensors, layer, self._block_size)

    def _pieces(self, chunks: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """Views ``[chunks, blocks of a chunk, N, H, C]`` of a layer of chunks, for each plane."""
        sides: Sequence[torch.Tensor] = chunks[:, :, layer].unbind(1)
        widths = [plane.shape[-1] for plane in self._planes(layer)]
        widths = widths[: len(widths) // len(sides)]  # planes that are side by side in the chunk
        ends = [sum(widths[: at + 1]) for at in range(len(widths) - 1)]
        blocks, heads = (len(chunks), self._blocks_per_chunk), self.geometry.num_heads
        size = self._block_size
        if self._engine_tensors.by_head:
            by_head = [side.flatten(1).view(*blocks, heads, -1) for side in sides]
            cuts = [size * end for end in ends]
            parts = [part for side in by_head for part in side.tensor_split(cuts, dim=-1)]
            return [part.view(*blocks, heads, size, -1).transpose(2, 3) for part in parts]
        by_token = [side.view(*blocks, size, heads, -1) for side in sides]
        return [part for side in by_token for part in side.tensor_split(ends, dim=-1)]
