"""The chunk layout: where the KV of each token is in a chunk of the heap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

__all__ = ["ChunkLayout"]


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Where the KV of each token is in a chunk; strides in bytes.

    Attributes:
        num_tokens: tokens of a chunk.
        page_tokens: tokens that lie ``token_stride`` apart: ``num_tokens``, or fewer if the order
            of the dimensions has pages.
        num_planes: planes; a cache with more of them has several side by side in each.
        num_layers: layers; 1 if each layer has its own chunks.
        row_bytes: bytes of one token in one layer and plane, all heads.
        is_per_layer: whether a chunk holds one layer only.
        page_stride, token_stride, plane_stride, layer_stride: bytes from one page, token, plane
            or layer to the next.
        head_groups: groups of equally many heads that lie apart; 1 if the heads of a row are
            contiguous.
        head_group_stride: bytes from one group of heads to the next.
    """

    num_tokens: int
    page_tokens: int
    num_planes: int
    num_layers: int
    row_bytes: int
    is_per_layer: bool
    page_stride: int
    token_stride: int
    plane_stride: int
    layer_stride: int
    head_groups: int = 1
    head_group_stride: int = 0

    @classmethod
    def of(cls, order: str, shape: Sequence[int], item_bytes: int) -> ChunkLayout:
        """A contiguous chunk, by the order of its dimensions.

        Args:
            order: letters of the dimensions, outermost first: P planes (1 if it is left out), L
                layers, T tokens, D elements of all heads, G pages of T tokens. If heads lie apart,
                J groups of heads, with D elements each.
            shape: sizes of the dimensions; D may be split into heads and elements.
            item_bytes: bytes of an element.

        Raises:
            ValueError: the shape has another number of dimensions.

        >>> chunk = ChunkLayout.of("PLTD", (2, 32, 256, 1024), 2)
        >>> chunk.token_stride, chunk.layer_stride, chunk.plane_stride
        (2048, 524288, 16777216)
        """
        extents = tuple(shape)
        if len(extents) == len(order) + 1:
            extents = (*extents[:-2], extents[-2] * extents[-1])
        if len(extents) != len(order):
            raise ValueError(f"a chunk {' '.join(order)} cannot have shape {tuple(shape)}")
        sizes = dict(zip(order, extents, strict=True))
        strides: dict[str, int] = {}
        stride = item_bytes
        for letter in reversed(order):
            strides[letter] = stride
            stride *= sizes[letter]
        num_tokens = sizes["T"] * sizes.get("G", 1)
        head_groups = sizes.get("J", 1)
        return cls(
            num_tokens=num_tokens,
            page_tokens=sizes["T"],
            num_planes=sizes.get("P", 1),
            num_layers=sizes.get("L", 1),
            row_bytes=head_groups * sizes["D"] * item_bytes,
            is_per_layer="L" not in sizes,
            page_stride=strides.get("G", 0),
            token_stride=strides["T"],
            plane_stride=strides.get("P", 0),
            layer_stride=strides.get("L", 0),
            head_groups=head_groups,
            head_group_stride=strides["J"] if head_groups > 1 else 0,
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.num_planes * self.num_layers * self.num_tokens * self.row_bytes

    def with_item_bytes(self, item_bytes: int) -> ChunkLayout:
        """The same layout with elements of ``item_bytes``; its own must have one byte."""
        return replace(
            self,
            row_bytes=self.row_bytes * item_bytes,
            page_stride=self.page_stride * item_bytes,
            token_stride=self.token_stride * item_bytes,
            plane_stride=self.plane_stride * item_bytes,
            layer_stride=self.layer_stride * item_bytes,
            head_group_stride=self.head_group_stride * item_bytes,
        )

    def of_blocks(self, block_size: int) -> ChunkLayout:
        """The same chunk with a block of ``block_size`` tokens in place of each token.

        Raises:
            ValueError: chunks or their pages are not whole blocks, or the tokens of a block are not
                contiguous in each layer and plane.
        """
        if self.page_tokens % block_size:
            raise ValueError(
                f"only whole blocks of {block_size} tokens can be copied, the chunk has "
                f"{self.page_tokens} tokens in a row"
            )
        # With heads apart, the strides may be equal by chance: as many layers as groups of heads.
        if self.token_stride != self.row_bytes or self.head_groups > 1:
            raise ValueError(
                "only whole blocks can be copied, but in this format the tokens of a block lie "
                "apart: use KV_2LTD, KV_MLA_FMT, KV_2TD, KV_PL2TD or KV_PLTD"
            )
        return replace(
            self,
            num_tokens=self.num_tokens // block_size,
            page_tokens=self.page_tokens // block_size,
            row_bytes=self.row_bytes * block_size,
            token_stride=self.token_stride * block_size,
        )

    def view(self, elements: torch.Tensor, num_heads: int) -> torch.Tensor:
        """A chunk's elements as ``[planes, layers, tokens, heads, dims]``, without a copy."""
        item_bytes = elements.element_size()
        head_dim = self.row_bytes // item_bytes // num_heads
        sizes = (self.num_planes, self.num_layers, self.num_tokens, num_heads, head_dim)
        strides = (self.plane_stride, self.layer_stride, self.token_stride, head_dim * item_bytes)
        return elements.as_strided(
            sizes, (*(s // item_bytes for s in strides), 1), elements.storage_offset()
        )

    def num_chunks(self, num_tokens: int, num_layers: int) -> int:
        """How many chunks ``num_tokens`` tokens of ``num_layers`` layers take."""
        chunks = -(-num_tokens // self.num_tokens)
        return chunks * num_layers if self.is_per_layer else chunks
