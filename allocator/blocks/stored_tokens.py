"""``StoredTokens``: which tokens the chunks of a batch hold, as far as that is known.

A chunk has room for more tokens than the last store filled, and the bytes behind them are a former
owner's. A store from an engine's cache therefore records its tokens here, and a load of others is
refused.

Most batches are stored and loaded as a whole. One number then stands for all chunks: the batch
holds its first tokens, chunk after chunk. Chunks that were stored by themselves or with gaps have a
set of tokens each: an ``int``, whose bit ``t`` stands for token ``t`` of the chunk. What other
means have written, such as ``source=`` or a caller's own copy, is not known, and nothing is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.kernels.chunk_layout import ChunkLayout

__all__ = ["StoredTokens", "TokenSet", "chunk_of", "require_token_count", "sets_of"]

TokenSet: TypeAlias = int
"""Tokens of one chunk: bit ``t`` stands for token ``t``."""


class StoredTokens:
    """Which tokens the chunks of one batch hold.

    Every method that looks at single chunks takes ``chunk_tokens``, the tokens of a chunk, and
    ``is_per_layer``, whether the chunks of each layer follow those of the layer before.
    """

    __slots__ = ("_first", "_of_row")

    def __init__(self) -> None:
        self._first: int | None = None
        # Single operations on a dict are atomic: threads may store into chunks of one batch.
        self._of_row: dict[int, TokenSet | None] = {}

    @property
    def first(self) -> int | None:
        """N, if the batch holds its first N tokens and no others; else None."""
        return None if self._of_row else self._first

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is known of any chunk."""
        return self._first is None and not self._of_row

    @property
    def num_rows_apart(self) -> int:
        """Number of chunks that have a record of their own."""
        return len(self._of_row)

    def set_first(self, num_tokens: int | None) -> None:
        """The batch holds its first ``num_tokens`` tokens; None: that is not known."""
        self._of_row = {}
        self._first = num_tokens

    def forget(self, rows: Int64Array | None) -> None:
        """The tokens of ``rows`` (None: all) are not known."""
        if rows is None:
            self.set_first(None)
        elif not self.is_unknown:
            self._of_row.update(dict.fromkeys(rows.tolist()))

    def of(self, row: int, chunk_tokens: int, is_per_layer: bool) -> TokenSet | None:
        """The tokens of a chunk; None if they are not known."""
        if row in self._of_row:
            return self._of_row[row]
        first = self._first
        if first is None:
            return None
        if is_per_layer:
            row %= max(-(-first // chunk_tokens), 1)
        return (1 << min(max(first - row * chunk_tokens, 0), chunk_tokens)) - 1

    def holds_first(self, row: int, num_tokens: int, chunk_tokens: int, is_per_layer: bool) -> bool:
        """Whether a chunk holds its first tokens, or nothing is known of it."""
        first = self._first
        if self._of_row:
            held = self.of(row, chunk_tokens, is_per_layer)
            return held is None or not ((1 << num_tokens) - 1) & ~held
        if first is None:
            return True
        if is_per_layer:
            row %= max(-(-first // chunk_tokens), 1)
        return first - row * chunk_tokens >= num_tokens

    def set_row(self, row: int, tokens: TokenSet | None) -> None:
        """The tokens of a chunk; None if they are not known."""
        self._of_row[row] = tokens

    def copy_from(self, other: StoredTokens) -> None:
        """Take over what is known of another batch with as many chunks."""
        self._of_row = dict(other._of_row)
        self._first = other._first


def sets_of(
    num_tokens: int, kept: npt.NDArray[np.bool_] | None, chunk_tokens: int
) -> Sequence[TokenSet]:
    """The tokens of each chunk, for the tokens of one copy.

    Args:
        num_tokens: tokens of the copy, chunk after chunk.
        kept: which of them are copied, bool ``[num_tokens]``; None: all.
        chunk_tokens: tokens of a chunk.

    >>> sets_of(5, None, 4), sets_of(5, np.array([True, False, True, False, True]), 4)
    ([15, 1], [5, 1])
    """
    whole, left = divmod(num_tokens, chunk_tokens)
    if kept is None:
        return [(1 << chunk_tokens) - 1] * whole + ([(1 << left) - 1] if left else [])
    return [
        int.from_bytes(
            np.packbits(kept[at : at + chunk_tokens], bitorder="little").tobytes(), "little"
        )
        for at in range(0, num_tokens, chunk_tokens)
    ]


@lru_cache(maxsize=256)
def chunk_of(layout: BlockLayout) -> ChunkLayout | None:
    """Where tokens are in a block of a layout; None if it does not hold tokens of a paged cache."""
    order = layout.fmt.dim_order
    if order is None:
        return None
    try:
        return ChunkLayout.of(order, layout.shapes[0], layout.dtypes[0].itemsize)
    except ValueError:
        return None


def require_token_count(layout: BlockLayout, num_blocks: int, num_tokens: int) -> None:
    """Raise if so many blocks of a layout are not what ``num_tokens`` tokens take.

    Raises:
        ValueError: they take another number of blocks, or the blocks hold no tokens.
    """
    chunk = chunk_of(layout)
    if chunk is None:
        raise ValueError(f"blocks of {layout} hold no tokens of a paged cache, got {num_tokens}")
    needed = -(-num_tokens // chunk.num_tokens)
    fits = num_blocks % needed == 0 if needed and chunk.is_per_layer else num_blocks == needed
    if num_tokens < 0 or not fits:
        raise ValueError(
            f"num_tokens is {num_tokens}, which are not the tokens of {num_blocks} blocks of "
            f"{chunk.num_tokens} tokens"
        )
