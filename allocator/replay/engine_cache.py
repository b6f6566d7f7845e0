"""``EngineCache``: a paged KV cache as an engine keeps it, and the engine's own way to its bytes.

Chunks are written and read by plain torch indexing, as each layout's engine does it: nothing here
asks :class:`~kvheap.kernels.paged_layout.PagedKVCache` where a token is, so that what is copied
through one can be checked against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvheap.kernels.paged_copy import BlockIds
from kvheap.kernels.paged_layout import INDEXER_BYTES, SCALE_BYTES, PagedKVCache
from kvheap.replay.geometry import Geometry, Kind

__all__ = ["ENGINE_LAYOUTS", "EngineCache", "EngineLayout"]

BLOCK_TOKENS = 16
"""Tokens of an engine's block."""

VALUE_BYTES = INDEXER_BYTES - SCALE_BYTES
"""An indexer's values of one token."""

MAX_BLOCKS = 4096
MAX_BYTES = 256 << 20
MIN_CHUNKS = 2
"""A pool has ``MAX_BLOCKS`` blocks or what fits ``MAX_BYTES``, but at least ``MIN_CHUNKS``."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of an engine's tensors by letter.

    L layers, B blocks, N tokens of a block, H heads, C elements of a head; F is K then V of a
    head, S all slots, I the bytes that an indexer keeps of a token. A digit is itself.
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
        sizes |= {"S": num_blocks * block_size, "I": INDEXER_BYTES}
        return cls(sizes, geometry.dtype, device)

    def zeros(self, dims: str) -> torch.Tensor:
        """One tensor."""
        shape = [int(dim) if dim.isdigit() else self.by_letter[dim] for dim in dims]
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def layers(self, dims: str) -> list[torch.Tensor]:
        """One tensor a layer."""
        return [self.zeros(dims) for _ in range(self.by_letter["L"])]

    def pairs(self, dims: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each layer."""
        return list(zip(self.layers(dims), self.layers(dims), strict=True))

    def permuted(self, dims: str, order: str) -> torch.Tensor:
        """One tensor of ``dims``, whose dimensions are physically in another order."""
        return self.zeros(order).permute([order.index(dim) for dim in dims])


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """One engine's tensors, and where a layer's tokens are in them.

    Attributes:
        kind: the geometries that it can keep.
        make: the engine's tensors, zeros.
        planes: of the tensors, a layer and the tokens of a block: views ``[B, N, H, C]``; K and V,
            or values and scales, or one.
    """

    kind: Kind
    make: Callable[[_Sizes], Any]
    planes: Callable[[Any, int, int], Sequence[torch.Tensor]]


def _attention(
    make: Callable[[_Sizes], Any], planes: Callable[[Any, int, int], Sequence[torch.Tensor]]
) -> EngineLayout:
    return EngineLayout("attention", make, planes)


def _fused(order: str) -> EngineLayout:
    """One tensor of vLLM's, ``[L, B, H, N, 2C]``, K then V of each head, in any physical order."""
    return _attention(
        lambda sizes: sizes.permuted("LBHNF", order),
        lambda tensor, layer, _: tensor[layer].transpose(1, 2).chunk(2, dim=-1),
    )


def _pages(slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[S, H, C]`` as ``[B, N, H, C]``."""
    return slots.view(-1, block_size, *slots.shape[1:])


def _indexer_planes(
    tensors: Sequence[torch.Tensor], layer: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block holds the values of all its tokens, then all their scales."""
    of_block = tensors[layer].flatten(1)
    end = block_size * VALUE_BYTES
    values, scales = of_block[:, :end], of_block[:, end:]
    return values.view(-1, block_size, 1, VALUE_BYTES), scales.view(-1, block_size, 1, SCALE_BYTES)


ENGINE_LAYOUTS: Mapping[str, EngineLayout] = {
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
    "mla": EngineLayout(
        "latent",
        lambda sizes: sizes.layers("BNC"),
        lambda caches, layer, _: (caches[layer].unsqueeze(2),),
    ),
    "indexer": EngineLayout("indexer", lambda sizes: sizes.layers("BNI"), _indexer_planes),
    "sglang-mha": _attention(
        lambda sizes: (sizes.layers("SHC"), sizes.layers("SHC")),
        lambda buffers, layer, block_size: [
            _pages(buffer[layer], block_size) for buffer in buffers
        ],
    ),
    "sglang-mla": EngineLayout(
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
    "opaque": EngineLayout(
        "opaque",
        lambda sizes: sizes.layers("BC"),
        lambda caches, layer, _: (caches[layer][:, None, None],),
    ),
}
"""By the name that :data:`~kvheap.kernels.paged_layout.LAYOUTS` has for it."""


class EngineCache:
    """KV tensors of an engine, and a pool of their blocks.

    Args:
        layout: one of :data:`ENGINE_LAYOUTS`.
        geometry: what a chunk is, of the layout's kind.
        device: where the tensors live.
        num_blocks: size of the pool; None: as many as the limits of this module allow.
        seed: of the order in which blocks are handed out.

    Attributes:
        tensors: the engine's, as the layout has them.
        cache: the same, for kvheap.
        num_chunks: chunks that the pool has room for.

    Raises:
        KeyError: there is no such layout.
        ValueError: the geometry is of another kind than the layout keeps, or the pool is smaller
            than a chunk.
    """

    def __init__(
        self,
        layout: str,
        geometry: Geometry,
        device: torch.device,
        num_blocks: int | None = None,
        seed: int = 0,
    ) -> None:
        self._layout = ENGINE_LAYOUTS[layout]
        if geometry.kind != self._layout.kind:
            raise ValueError(
                f"{layout} keeps {self._layout.kind} KV, but {geometry.name} is {geometry.kind} KV"
            )
        self._geometry = geometry
        # An opaque block counts as one slot.
        self._block_size = 1 if geometry.kind == "opaque" else BLOCK_TOKENS
        self._blocks_per_chunk = geometry.shape[2] // self._block_size
        self._num_blocks = self._pool_size() if num_blocks is None else num_blocks
        self.num_chunks = self._num_blocks // self._blocks_per_chunk
        if not self.num_chunks:
            raise ValueError(
                f"a chunk of {geometry.name} takes {self._blocks_per_chunk} blocks, got a pool of "
                f"{num_blocks}"
            )
        self._random = torch.Generator().manual_seed(seed % (1 << 63))
        sizes = _Sizes.of(geometry, self._num_blocks, self._block_size, device)
        self.tensors = self._layout.make(sizes)
        self._device = device
        self.cache = PagedKVCache.of(layout, self.tensors, block_size=self._block_size)

    def _pool_size(self) -> int:
        block_bytes = self._geometry.chunk_bytes // self._blocks_per_chunk
        fitting = min(MAX_BLOCKS, MAX_BYTES // block_bytes)
        return max(fitting, MIN_CHUNKS * self._blocks_per_chunk)

    def take(self, num_chunks: int) -> torch.Tensor:
        """Block ids for chunks, int64 ``[num_chunks, blocks of a chunk]``: random, all different.

        What was taken before may be handed out again.

        Raises:
            ValueError: the pool has no room for so many.
        """
        if num_chunks > self.num_chunks:
            raise ValueError(f"the pool has room for {self.num_chunks} chunks, got {num_chunks}")
        ids = torch.randperm(self._num_blocks, generator=self._random, device="cpu")
        ids = ids[: num_chunks * self._blocks_per_chunk]
        return ids.view(num_chunks, self._blocks_per_chunk).to(self._device)

    def slots(self, block_ids: torch.Tensor) -> BlockIds:
        """The tokens of chunks that are kept in ``block_ids`` (``[chunks, blocks of a chunk]``)."""
        return BlockIds(block_ids.flatten())

    def write(self, block_ids: torch.Tensor, chunks: torch.Tensor) -> None:
        """Write ``chunks`` (``[N, *shape]``) to the blocks ``[N, blocks of a chunk]``."""
        for layer in range(self._geometry.num_layers):
            for plane, piece in zip(self._planes(layer), self._pieces(chunks, layer), strict=True):
                plane[block_ids] = piece

    def read(self, block_ids: torch.Tensor) -> torch.Tensor:
        """The chunks that are kept in blocks ``[N, blocks of a chunk]``: ``[N, *shape]``."""
        geometry = self._geometry
        shape = (len(block_ids), *geometry.shape)
        chunks = torch.empty(shape, dtype=geometry.dtype, device=self._device)
        for layer in range(geometry.num_layers):
            for plane, piece in zip(self._planes(layer), self._pieces(chunks, layer), strict=True):
                piece.copy_(plane[block_ids])
        return chunks

    def _planes(self, layer: int) -> Sequence[torch.Tensor]:
        """Views ``[B, N, H, C]`` of the engine's tensors."""
        return self._layout.planes(self.tensors, layer, self._block_size)

    def _pieces(self, chunks: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """Views ``[chunks, blocks of a chunk, N, H, C]`` of chunks, one for each plane."""
        planes: Sequence[torch.Tensor] = chunks[:, :, layer].unbind(1)
        if self._geometry.kind == "indexer":
            planes = planes[0][..., :VALUE_BYTES], planes[0][..., VALUE_BYTES:]
        shape = (len(chunks), self._blocks_per_chunk, self._block_size, self._geometry.num_heads)
        return [plane.view(*shape, -1) for plane in planes]
