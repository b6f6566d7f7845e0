"""``StoredTokens``: which tokens the chunks of a batch hold, as far as that is known.

A chunk has room for more tokens than the last store filled, and the bytes behind them are a former
owner's. A store from an engine's cache therefore records its tokens here, and a load of others is
refused.

Most batches are stored and loaded as a whole. One number then stands for all chunks: the batch
holds its first tokens, chunk after chunk. Chunks that were stored by themselves or with gaps have a
set of tokens each: an ``int``, whose bit ``t`` stands for token ``t`` of the chunk. What other
means have written, such as ``source=`` or a caller's own copy, is not known, and nothing is
refused.

A store may write only some layers or heads: some :class:`Cells` of each chunk. These then have a
record of their own, and what nobody has stored counts as empty. Once all cells hold the same
tokens, one record stands for all again.

With the tokens goes their :class:`~kvheap.blocks.origin.Origin`: of which layers and heads they
are, where a store named some.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import and_
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout
from kvheap.blocks.origin import Origin
from kvheap.kernels.chunk_layout import ChunkLayout

__all__ = [
    "Cells",
    "StoredTokens",
    "TokenSet",
    "chunk_of",
    "require_token_count",
    "require_token_sets",
    "sets_of",
]

TokenSet: TypeAlias = int
"""Tokens of one chunk: bit ``t`` stands for token ``t``."""


class Cells(NamedTuple):
    """Some of the (layer, head) pairs of a chunk: bit ``layer * heads + head`` of ``mask``."""

    mask: int
    total: int
    """All (layer, head) pairs of the chunk."""

    @classmethod
    def of(
        cls, layers: tuple[int, int], num_layers: int, heads: tuple[int, int], num_heads: int
    ) -> Cells:
        """The cells of some layers and heads, each given as the first and their number.

        >>> bin(Cells.of((1, 2), 3, (0, 1), 2).mask)
        '0b10100'
        """
        (first_layer, some_layers), (first_head, some_heads) = layers, heads
        each_layer = ((1 << num_heads * some_layers) - 1) // ((1 << num_heads) - 1)
        row = ((1 << some_heads) - 1) << first_head
        return cls(row * each_layer << first_layer * num_heads, num_layers * num_heads)


class StoredTokens:
    """Which tokens the chunks of one batch hold.

    Every method that looks at single chunks takes ``chunk_tokens``, the tokens of a chunk, and
    ``is_per_layer``, whether the chunks of each layer follow those of the layer before.
    """

    __slots__ = (
        *("_apart", "_first", "_num_cells", "_of_row", "_origin", "_origin_of_row", "_rest"),
        "form",
    )

    def __init__(self) -> None:
        self._first: int | None = None
        # Single operations on a dict are atomic: threads may store into chunks of one batch.
        self._of_row: dict[int, TokenSet | None] = {}
        self._origin: Origin | None = None
        self._origin_of_row: dict[int, Origin | None] = {}
        # The cells with records of their own, by disjoint masks; None: no cells are apart.
        self._apart: dict[int, StoredTokens] | None = None
        self._rest: StoredTokens | None = None
        self._num_cells = 0
        self.form: str | None = None
        """What the last store took for one unit: rows of tokens, or blocks as an engine mixes them;
        None if that is not known."""

    @property
    def first(self) -> int | None:
        """N, if the batch holds its first N tokens, in all cells, and no others; else None."""
        if self._apart is None:
            return None if self._of_row else self._first
        counts = [part.first for part in self.within(None)]
        known = [count for count in counts if count is not None]
        return min(known) if len(known) == len(counts) else None

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is known of any chunk."""
        return self._apart is None and self._first is None and not self._of_row

    @property
    def num_rows_apart(self) -> int:
        """Number of chunks that have a record of their own."""
        return len(self._of_row)

    def set_first(
        self, num_tokens: int | None, origin: Origin | None = None, form: str | None = None
    ) -> None:
        """The batch holds its first ``num_tokens`` tokens; None: that is not known.

        Args:
            num_tokens: so many.
            origin: of which layers and heads they are.
            form: see :attr:`form`.
        """
        self._of_row = {}
        self._first = num_tokens
        self._origin, self._origin_of_row = origin, {}
        self._apart = None
        self.form = form

    def within(self, cells: Cells | None) -> Sequence[StoredTokens]:
        """The records of cells (None: of all). Together they say what can be loaded."""
        apart, rest = self._apart, self._rest
        if apart is None or rest is None:
            return (self,)
        found = []
        every = (1 << self._num_cells) - 1
        wanted = every if cells is None or cells.total != self._num_cells else cells.mask
        for mask, part in list(apart.items()):
            if mask & wanted:
                found.append(part)
                wanted &= ~mask
        return [*found, rest] if wanted else found

    def to_store(self, cells: Cells | None, rows: Sequence[int] | None) -> Sequence[StoredTokens]:
        """The records that a store to cells of ``rows`` must change (None: all cells, all rows).

        What is not known of the other cells of these rows counts as not stored from now on.
        """
        if cells is None:
            return self.within(None)
        if self._apart is not None and cells.total != self._num_cells:
            return ()  # heads of another size: no new token counts
        if self._apart is None:
            self._rest, self._num_cells = self._copy(), cells.total
            self._apart = {}
        apart, rest = self._apart, self._rest
        assert rest is not None
        for part in (rest, *apart.values()):
            part.empty_if_unknown(rows)
        found, left = [], cells.mask
        for mask, part in list(apart.items()):
            both = mask & left
            if not both:
                continue
            left &= ~both
            inner = part
            if both != mask:
                inner = part._copy()
                apart[mask & ~both] = part
                apart[both] = inner
                del apart[mask]
            found.append(inner)
        if left:
            found.append(apart.setdefault(left, rest._copy()))
        return found

    def empty_if_unknown(self, rows: Sequence[int] | None) -> None:
        """Chunks of which nothing is known hold no tokens (None: all chunks)."""
        for part in self.within(None):
            if rows is None:
                unknown = [row for row, held in list(part._of_row.items()) if held is None]
                part._of_row.update(dict.fromkeys(unknown, 0))
                part._first = 0 if part._first is None else part._first
            else:
                unknown = [row for row in rows if part._of_row.get(row, part._first) is None]
                part._of_row.update(dict.fromkeys(unknown, 0))

    def join(self) -> None:
        """Let one record stand for all cells, if all have the same."""
        if self._apart is None:
            return
        parts = self.within(None)
        first = parts[0]._what
        if any(part._what != first for part in parts):
            return
        self._first, self._of_row, self._origin, self._origin_of_row = first
        self._apart = None

    @property
    def _what(self) -> tuple[Any, ...]:
        return self._first, self._of_row, self._origin, self._origin_of_row

    def _copy(self) -> StoredTokens:
        found = StoredTokens()
        found._take(self)
        return found

    def _take(self, other: StoredTokens) -> None:
        self._first, self._of_row = other._first, dict(other._of_row)
        self._origin, self._origin_of_row = other._origin, dict(other._origin_of_row)

    def forget(self, rows: Int64Array | None) -> None:
        """The tokens of ``rows`` (None: all) are not known."""
        if rows is None:
            self.set_first(None)
        elif not self.is_unknown:
            self.form = None
            for part in self.within(None):
                part._of_row.update(dict.fromkeys(rows.tolist()))
                part._origin_of_row.update(dict.fromkeys(rows.tolist()))

    @property
    def origin(self) -> Origin | None:
        """The origin of all chunks, if one says it all; else None."""
        return None if self._origin_of_row or self._apart is not None else self._origin

    @property
    def has_origins(self) -> bool:
        """Whether the origin of any chunk is known."""
        return any(part._origin is not None or part._origin_of_row for part in self.within(None))

    def origin_of(self, row: int) -> Origin | None:
        """The origin of a chunk; None if it is not known, or not the same in all cells."""
        if self._apart is not None:
            found = {part.origin_of(row) for part in self.within(None)}
            return found.pop() if len(found) == 1 else None
        if row in self._origin_of_row:
            return self._origin_of_row[row]
        return None if self._origin is None else self._origin.of_row(row)

    def origins(self, rows: range) -> tuple[Origin | None, ...] | None:
        """The origin of each of some chunks, or one for all of them; None if none is known."""
        if not self.has_origins:
            return None
        only = self.origin
        # The chunks of a layer are so many only where the rows begin with the first ones.
        if only is None or (only.rows_per_layer and (rows.start or rows.step != 1)):
            return tuple(map(self.origin_of, rows))
        return (only,)

    def set_origins(self, origins: Sequence[Origin | None] | None) -> None:
        """The origins of all chunks, one after the other, or one for all; None: not known."""
        for part in self.within(None):
            part._origin = origins[0] if origins is not None and len(origins) == 1 else None
            each = origins if origins is not None and len(origins) > 1 else ()
            part._origin_of_row = dict(enumerate(each))

    def of(self, row: int, chunk_tokens: int, is_per_layer: bool) -> TokenSet | None:
        """The tokens of a chunk that it has in all cells; None if they are not known."""
        if self._apart is not None:
            sets = [part.of(row, chunk_tokens, is_per_layer) for part in self.within(None)]
            known = [held for held in sets if held is not None]
            return reduce(and_, known) if known else None
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
        if self._of_row or self._apart is not None:
            held = self.of(row, chunk_tokens, is_per_layer)
            return held is None or not ((1 << num_tokens) - 1) & ~held
        if first is None:
            return True
        if is_per_layer:
            row %= max(-(-first // chunk_tokens), 1)
        return first - row * chunk_tokens >= num_tokens

    def sets(self, num_rows: int, layout: BlockLayout) -> tuple[TokenSet | None, ...] | None:
        """The tokens of each chunk, unless :attr:`first` or nothing is all that is known."""
        chunk = chunk_of(layout)
        if self.is_unknown or chunk is None or (self._apart is None and not self._of_row):
            return None
        return tuple(self.of(row, chunk.num_tokens, chunk.is_per_layer) for row in range(num_rows))

    def of_rows(
        self, rows: range, layout: BlockLayout
    ) -> tuple[int | None, tuple[TokenSet | None, ...] | None]:
        """What some chunks hold: their number of tokens, or else the tokens of each.

        Both are None if nothing is known. O(1) where whole batches are stored.
        """
        chunk = None if self.is_unknown else chunk_of(layout)
        if chunk is None:
            return None, None
        first, room = self._first, chunk.num_tokens
        is_even = self._apart is None and not self._of_row and first is not None
        if is_even and first is not None and rows.step == 1 and not chunk.is_per_layer:
            held = min(first - rows.start * room, len(rows) * room)
            if held >= 0 and -(-held // room) == len(rows):
                return held, None
        return None, tuple(self.of(row, room, chunk.is_per_layer) for row in rows)

    def num_tokens_of(self, rows: range, layout: BlockLayout) -> int | None:
        """N, if some chunks hold N tokens, one chunk after the other, and no others; else None."""
        num_tokens, sets = self.of_rows(rows, layout)
        chunk = chunk_of(layout)
        if sets is None or chunk is None or chunk.is_per_layer:
            return num_tokens
        whole = (1 << chunk.num_tokens) - 1
        num_whole = next((at for at, held in enumerate(sets) if held != whole), len(sets))
        last, *rest = *sets[num_whole:], 0
        if last is None or last & (last + 1) or any(held != 0 for held in rest):
            return None
        return num_whole * chunk.num_tokens + last.bit_count()

    def of_block(self, row: int, layout: BlockLayout) -> TokenSet | None:
        """The tokens of one block of a layout; None if they are not known."""
        chunk = None if self.is_unknown else chunk_of(layout)
        return None if chunk is None else self.of(row, chunk.num_tokens, chunk.is_per_layer)

    def set_rows(self, sets: Sequence[TokenSet | None]) -> None:
        """The tokens of all chunks, one after the other."""
        self.set_first(None)
        self._of_row = dict(enumerate(sets))

    def set_row(self, row: int, tokens: TokenSet | None, origin: Origin | None = None) -> None:
        """The tokens of a chunk; None if they are not known."""
        for part in self.within(None):
            part._of_row[row] = tokens
            if origin != part.origin_of(row):
                part._origin_of_row[row] = origin

    def copy_from(self, other: StoredTokens) -> None:
        """Take over what is known of another batch of the same layout with as many chunks."""
        apart, rest = other._apart, other._rest
        self._take(other)
        self._num_cells = other._num_cells
        self.form = other.form
        self._rest = None if apart is None or rest is None else rest._copy()
        self._apart = (
            None if apart is None else {mask: part._copy() for mask, part in list(apart.items())}
        )


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


def require_token_sets(
    layout: BlockLayout, num_blocks: int, sets: Sequence[TokenSet | None]
) -> None:
    """Raise if these are not sets of tokens of so many blocks of a layout.

    Raises:
        ValueError: there are more or fewer than blocks, the blocks hold no tokens, or one has a
            token that a block has no room for.
        TypeError: a set is not an integer.
    """
    chunk = chunk_of(layout)
    if chunk is None:
        raise ValueError(f"blocks of {layout} hold no tokens of a paged cache")
    if len(sets) != num_blocks:
        raise ValueError(f"stored has the tokens of {len(sets)} blocks, but there are {num_blocks}")
    for row, held in enumerate(sets):
        if held is None:
            continue
        if type(held) is not int:
            raise TypeError(f"stored[{row}] must be a set of tokens as an integer, got {held!r}")
        if held < 0 or held.bit_length() > chunk.num_tokens:
            raise ValueError(
                f"stored[{row}] has tokens beyond the {chunk.num_tokens} of a block: {held:#x}"
            )
