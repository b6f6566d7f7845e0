"""Where the tokens of a copy are in a paged cache: slots or whole blocks, as callers give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvheap.kernels.arguments import as_whole, require_memory
from kvheap.kernels.arrays import Int64Array, int64_array
from kvheap.kernels.paged_plan import Pairing

__all__ = ["BlockIds", "Places", "Slots", "count_tokens", "first_tokens"]

SKIPPED = -1
"""The slot or block id of tokens that are not copied."""

MAX_TABLE_PLACES = 256
"""Up to this many slots of a cache for each one given, a table of all finds repetitions."""

MAX_LISTED = 64
"""Up to this many places are compared with each other in a set."""

FEW_LISTED = 8
"""Up to this many are compared with a limit one by one; NumPy takes 0.7 us for more of them."""

SlotMapping: TypeAlias = "npt.NDArray[np.integer] | torch.Tensor | Sequence[int]"


@dataclass(frozen=True, slots=True)
class BlockIds:
    """Where tokens are, given by the blocks that hold them instead of a slot for each token.

    Attributes:
        ids: block ids in the order of the tokens, integers ``[blocks]``, on the host or on the
            cache's device; -1 skips a block.
        num_tokens: how many tokens the blocks hold, if the last block is only partly filled; None
            if every block is full.
    """

    ids: SlotMapping
    num_tokens: int | None = None


Slots: TypeAlias = "BlockIds | SlotMapping"
"""Where tokens are in a cache: the slot of each, or the blocks that hold them."""


@dataclass(slots=True)  # each copy makes one, and a frozen one takes four times as long
class Places:
    """Where the tokens of one copy are in the cache, in units of tokens in adjacent slots.

    Attributes:
        values: slot of the first token of each unit, or block ids; int64 on the host, int32 or
            int64 on the device.
        are_blocks: whether ``values`` are block ids.
        unit_tokens: tokens of a unit; for block ids a divisor of the block size.
        num_tokens: tokens of the copy; the last unit may be only partly filled.
        are_all_real: whether no value is known to be -1.
    """

    values: Int64Array | torch.Tensor
    are_blocks: bool
    unit_tokens: int
    num_tokens: int
    are_all_real: bool = field(default=False, repr=False)

    @classmethod
    def of(cls, slots: Slots, pairing: Pairing, eager: bool, distinct: bool) -> Places:
        """Check a caller's slots or block ids.

        Args:
            slots: the caller's slots or block ids.
            pairing: the cache and the chunk layout of the copy.
            eager: whether to check slots and ids on a device too, which waits for the device.
            distinct: whether to refuse a slot or block that appears twice; on a device, only eager
                mode does.

        Raises:
            ValueError: they are out of range, not one-dimensional, on another device, or not
                distinct.
            TypeError: they are not integers.
        """
        cache = pairing.cache
        blocks = slots if isinstance(slots, BlockIds) else None
        given = slots.ids if isinstance(slots, BlockIds) else slots
        name, limit = "slots", cache.num_slots
        if blocks is not None:
            name, limit = "block ids", cache.num_blocks
        values = _integers(name, given, cache.device)
        are_all_real = True  # as far as is known of values on a device
        if eager or not isinstance(values, torch.Tensor):
            seen = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
            are_all_real = _require_range(name, seen, limit)
            if distinct:
                _require_distinct(name, seen, limit, are_all_real)
        if blocks is None:
            return cls(values, False, 1, len(values), are_all_real)
        num_tokens = _tokens_of_blocks(blocks, len(values), cache.block_size)
        return cls(values, True, pairing.block_unit, num_tokens, are_all_real)

    def on_host(self) -> Int64Array:
        """The values, which must be on the host."""
        assert not isinstance(self.values, torch.Tensor)
        return self.values

    def kept(self, block_size: int) -> npt.NDArray[np.bool_] | None:
        """Which tokens are copied, bool ``[num_tokens]``; None if none is known to be skipped.

        Of places on a device, that is not known.
        """
        values = self.values
        if self.are_all_real or isinstance(values, torch.Tensor):
            return None
        tokens = block_size if self.are_blocks else self.unit_tokens
        return np.repeat(values >= 0, tokens)[: self.num_tokens]

    def require_filled(self, block_size: int, filled: int, eager: bool) -> None:
        """Refuse slots behind the first ``filled`` ones of a block. One pass over the tokens.

        Slots on a device are looked at only if ``eager``.

        Raises:
            ValueError: names the first such slot.
        """
        values = self.values
        if filled >= block_size or (isinstance(values, torch.Tensor) and not eager):
            return
        seen = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
        slots = replace(self, values=seen).as_slots(block_size).as_mapping()
        offsets = slots % block_size
        is_empty = (slots >= 0) & (offsets >= filled)
        if is_empty.any():
            at = int(is_empty.argmax())
            row, token = divmod(int(slots[at]), block_size)
            raise ValueError(
                f"slot {int(slots[at])} is token {token} of row {row}, which was not filled when "
                f"this cache was made: rows had {filled} of {block_size} tokens; store these, or "
                f"make the cache again"
            )

    def as_slots(self, block_size: int) -> Places:
        """The same places as slots. Block ids must be on the host."""
        if not self.are_blocks:
            return self
        ids = self.on_host()
        offsets = np.arange(0, block_size, self.unit_tokens, dtype=np.int64)
        starts = np.where(ids[:, None] < 0, SKIPPED, ids[:, None] * block_size + offsets)
        num_units = -(-self.num_tokens // self.unit_tokens)
        return Places(starts.reshape(-1)[:num_units], False, self.unit_tokens, self.num_tokens)

    def after(self, num_tokens: int) -> Places:
        """The places behind the first ``num_tokens``, which are whole units of one value each."""
        values = self.values[num_tokens // self.unit_tokens :]
        return replace(self, values=values, num_tokens=self.num_tokens - num_tokens)

    def as_mapping(self) -> Int64Array:
        """The slot of each token, int64 ``[num_tokens]``; the places must be slots on the host."""
        starts = self.on_host()
        offsets = np.arange(self.unit_tokens, dtype=np.int64)
        slots = np.where(starts[:, None] < 0, SKIPPED, starts[:, None] + offsets)
        return slots.reshape(-1)[: self.num_tokens]

    def merged(self, pairing: Pairing) -> Places:
        """The same places in the longest units that all slots allow. O(units) array operations.

        >>> from kvheap.kernels.chunk_layout import ChunkLayout
        >>> from kvheap.kernels.paged_layout import PagedKVCache
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
    """How many tokens a caller's slots or blocks stand for.

    Raises:
        ValueError: the number of blocks does not fit their ``num_tokens``.
    """
    if isinstance(slots, BlockIds):
        return _tokens_of_blocks(slots, _length("block ids", slots.ids), block_size)
    return _length("slots", slots)


def _length(name: str, given: SlotMapping) -> int:
    """How many places were given; whether they are integers is checked with the copy."""
    if not hasattr(given, "__len__") or (isinstance(given, torch.Tensor) and not given.dim()):
        raise TypeError(
            f"{name} must be integers in a sequence, an array or a tensor, got {given!r}"
        )
    return len(given)


def first_tokens(slots: Slots, num_tokens: int, block_size: int) -> Slots:
    """The slots or blocks of the first ``num_tokens`` tokens."""
    if isinstance(slots, BlockIds):
        return BlockIds(slots.ids[: -(-num_tokens // block_size)], num_tokens)
    return slots[:num_tokens]


def _integers(name: str, given: SlotMapping, device: torch.device) -> Int64Array | torch.Tensor:
    """Integers on the host as int64 ``[N]``, or those on ``device`` as they are."""
    if not isinstance(given, torch.Tensor):
        return int64_array(name, given)
    if not given.is_cpu:
        if given.device != device:
            raise ValueError(f"{name} are on {given.device}, the cache on {device}")
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} on a device must be int32 or int64, got {given.dtype}")
        if given.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {tuple(given.shape)}")
        return given.contiguous()
    require_memory(name, given)
    return int64_array(name, (given.detach() if given.requires_grad else given).numpy())


def _require_range(name: str, values: npt.NDArray[np.integer], limit: int) -> bool:
    """Refuse places out of range, and return whether all are real places, not -1."""
    if not len(values):
        return True
    if len(values) <= FEW_LISTED:
        listed = values.tolist()
        lowest, highest = min(listed), max(listed)
    else:
        # As unsigned integers, all that are negative are higher than any place.
        if values.dtype == np.int64 and np.maximum.reduce(values.view(np.uint64)) < limit:
            return True
        lowest, highest = int(values.min()), int(values.max())
    if lowest < SKIPPED or highest >= limit:
        at = int(values.argmin() if lowest < SKIPPED else values.argmax())
        raise ValueError(
            f"{name}[{at}] is {int(values[at])}: the cache has {limit} {name}, 0 to {limit - 1}, "
            f"and -1 skips one"
        )
    return bool(lowest >= 0)


def _require_distinct(
    name: str, places: npt.NDArray[np.integer], limit: int, are_all_real: bool
) -> None:
    """Refuse a place that appears twice, by a table of all places or, for few of many, a sort."""
    if len(places) < 2 or (
        are_all_real and len(places) <= MAX_LISTED and len(set(places.tolist())) == len(places)
    ):
        return
    real = places if are_all_real else places[places >= 0]
    if limit <= MAX_TABLE_PLACES * len(real):
        is_taken = np.zeros(limit, np.bool_)
        is_taken[real] = True
        if np.count_nonzero(is_taken) == len(real):
            return
    ordered = np.sort(real)
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        first = int(ordered[int(repeated.argmax())])
        at = np.flatnonzero(places == first)[:2].tolist()
        raise ValueError(
            f"{name} to load into must differ: {first} appears twice, at {at[0]} and {at[1]}"
        )


def _tokens_of_blocks(blocks: BlockIds, num_blocks: int, block_size: int) -> int:
    most = num_blocks * block_size
    if blocks.num_tokens is None:
        return most
    num_tokens = as_whole("num_tokens", blocks.num_tokens)
    if not most - block_size < num_tokens <= most and (num_tokens or num_blocks):
        raise ValueError(
            f"{num_blocks} blocks of {block_size} slots hold {max(most - block_size + 1, 0)} to "
            f"{most} tokens, got num_tokens={num_tokens}"
        )
    return num_tokens
