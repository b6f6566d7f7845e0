"""Where the tokens of a copy are in a paged cache: slots, or whole blocks, given by a caller."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.paged_plan import Pairing

__all__ = ["BlockIds", "Places", "Slots", "count_tokens", "first_tokens"]

Int64Array = npt.NDArray[np.int64]

SKIPPED = -1
"""The slot (or block id) of a token that is not copied."""

SlotMapping: TypeAlias = "npt.NDArray[np.integer] | torch.Tensor | Sequence[int]"


@dataclass(frozen=True, slots=True)
class BlockIds:
    """Tokens by the whole blocks that hold them, instead of a slot for each.

    Attributes:
        ids: block ids in the order of the tokens, integers ``[blocks]``, on the host or on the
            cache's device; -1 skips a block.
        num_tokens: how many tokens they hold; None: every block is full. The last block may be
            partly filled.
    """

    ids: SlotMapping
    num_tokens: int | None = None


Slots: TypeAlias = "BlockIds | SlotMapping"
"""Where tokens are in a cache: their slots, or the blocks that hold them."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of one copy are in the cache, in units of tokens that stay together.

    Attributes:
        values: int64 on the host, or int32 or int64 on the device: slots of the first token of
            each unit, or block ids.
        are_blocks: which of the two.
        unit_tokens: tokens of a unit; for block ids it divides the block.
        num_tokens: all tokens.
    """

    values: Int64Array | torch.Tensor
    are_blocks: bool
    unit_tokens: int
    num_tokens: int

    @classmethod
    def of(cls, slots: Slots, pairing: Pairing, eager: bool, distinct: bool) -> Places:
        """Read slots or block ids.

        Args:
            slots: as users give them.
            pairing: what is copied.
            eager: also look at what is on a device, which waits for it.
            distinct: in eager mode, refuse a slot that is named twice.

        Raises:
            ValueError: out of range, not one-dimensional, or on another device.
            TypeError: they are not integers.
        """
        cache = pairing.cache
        are_blocks = isinstance(slots, BlockIds)
        name, limit = ("block ids", cache.num_blocks) if are_blocks else ("slots", cache.num_slots)
        given = slots.ids if isinstance(slots, BlockIds) else slots
        values = _integers(name, given, cache.device)
        if eager and isinstance(values, torch.Tensor):
            _require_range(name, values.cpu().numpy(), limit)
        elif not isinstance(values, torch.Tensor):
            _require_range(name, values, limit)
        if eager and distinct:
            _require_distinct(name, values)
        num_tokens = len(values)
        if isinstance(slots, BlockIds):
            num_tokens = _tokens_of_blocks(slots, len(values), cache.block_size)
        unit = pairing.block_unit if are_blocks else 1
        return cls(values, are_blocks, unit, num_tokens)

    def on_host(self) -> Int64Array:
        """The values, where they are on the host."""
        assert not isinstance(self.values, torch.Tensor)
        return self.values

    def as_slots(self, block_size: int) -> Places:
        """Block ids on the host as the slots of their units."""
        if not self.are_blocks:
            return self
        ids = self.on_host()
        offsets = np.arange(0, block_size, self.unit_tokens, dtype=np.int64)
        starts = np.where(ids[:, None] < 0, SKIPPED, ids[:, None] * block_size + offsets)
        num_units = -(-self.num_tokens // self.unit_tokens)
        return Places(starts.reshape(-1)[:num_units], False, self.unit_tokens, self.num_tokens)

    def as_mapping(self) -> Int64Array:
        """Slots on the host, one for each token."""
        starts = self.on_host()
        offsets = np.arange(self.unit_tokens, dtype=np.int64)
        slots = np.where(starts[:, None] < 0, SKIPPED, starts[:, None] + offsets)
        return slots.reshape(-1)[: self.num_tokens]

    def merged(self, pairing: Pairing) -> Places:
        """Slots on the host with units as long as all of them allow. O(units), in arrays.

        >>> from kvheap.kernels.paged_layout import PagedKVCache
        >>> from kvheap.kernels.paged_plan import ChunkLayout
        >>> cache = PagedKVCache.of("mla", [torch.zeros(8, 4, 2)])
        >>> pairing = Pairing.of(cache, ChunkLayout.of("PLTD", (1, 1, 8, 2), 4))
        >>> Places.of([4, 5, 6, 7, 0, 1, 2, 3], pairing, False, False).merged(pairing)
        Places(values=array([4, 0]), are_blocks=False, unit_tokens=4, num_tokens=8)
        """
        starts, unit = self.on_host(), self.unit_tokens
        if not pairing.tokens_merge or len(starts) < 2:
            return self
        before, after = starts[:-1], starts[1:]
        joined = (after == before + unit) & (before >= 0)
        if not pairing.blocks_merge:
            joined &= after % pairing.cache.block_size != 0
        joined |= (after < 0) & (before < 0)
        breaks = np.flatnonzero(~joined) + 1
        factor = math.gcd(
            int(np.gcd.reduce(breaks)) if len(breaks) else 0,
            pairing.chunk.num_tokens // unit,
            pairing.chunk.page_tokens // unit,
        )
        return Places(starts[::factor], False, unit * factor, self.num_tokens)


def count_tokens(slots: Slots, block_size: int) -> int:
    """How many tokens slots or blocks stand for.

    Raises:
        ValueError: the blocks cannot hold ``num_tokens``.
    """
    if isinstance(slots, BlockIds):
        return _tokens_of_blocks(slots, len(slots.ids), block_size)
    return len(slots)


def first_tokens(slots: Slots, num_tokens: int, block_size: int) -> Slots:
    """The first tokens of more."""
    if isinstance(slots, BlockIds):
        return BlockIds(slots.ids[: -(-num_tokens // block_size)], num_tokens)
    return slots[:num_tokens]


def _integers(name: str, given: SlotMapping, device: torch.device) -> Int64Array | torch.Tensor:
    if isinstance(given, torch.Tensor) and given.device.type != "cpu":
        if given.device != device:
            raise ValueError(f"{name} are on {given.device}, the cache on {device}")
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} on a device must be int32 or int64, got {given.dtype}")
        if given.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {tuple(given.shape)}")
        return given.contiguous()
    array = given.detach().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype} ({array.flat[0]!r}, ...)")
    if int(array.max()) > np.iinfo(np.int64).max:  # it would wrap, perhaps to -1
        raise ValueError(f"{name} must be 64-bit integers with a sign, got {int(array.max())}")
    return array.astype(np.int64, copy=False)


def _require_range(name: str, values: npt.NDArray[np.integer], limit: int) -> None:
    if not len(values):
        return
    lowest, highest = int(values.min()), int(values.max())
    if lowest < SKIPPED or highest >= limit:
        at = int(values.argmin() if lowest < SKIPPED else values.argmax())
        raise ValueError(f"{name}[{at}] is {int(values[at])}: the cache has {limit}, and -1 skips")


def _require_distinct(name: str, values: Int64Array | torch.Tensor) -> None:
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
    ordered = np.sort(array[array >= 0])
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        raise ValueError(
            f"{name} to load into must differ: {ordered[int(repeated.argmax())]} twice"
        )


def _tokens_of_blocks(blocks: BlockIds, num_blocks: int, block_size: int) -> int:
    most = num_blocks * block_size
    if blocks.num_tokens is None:
        return most
    num_tokens = operator.index(blocks.num_tokens)
    if not most - block_size < num_tokens <= most and (num_tokens or num_blocks):
        raise ValueError(
            f"{num_blocks} blocks of {block_size} slots hold {max(most - block_size + 1, 0)} to "
            f"{most} tokens, got num_tokens={num_tokens}"
        )
    return num_tokens
