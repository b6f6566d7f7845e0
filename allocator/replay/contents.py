"""``Contents``: the bytes that every chunk of a replay should hold, so that wrong bytes are found.

The contents are computed from the hash id, so the bytes that a hit reads can be checked without a
copy of what was stored: word ``w`` of chunk ``id`` is ``mix(id) + mix(~w)`` in wrapping 64-bit
arithmetic. Two ids or two places have the same word as rarely as a 64-bit hash collides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvheap.replay.geometry import Geometry

__all__ = ["Contents"]


class Contents:
    """The contents of the chunks of a geometry.

    Args:
        geometry: the geometry of a chunk, whose bytes must be a multiple of 8.
        device: where the contents are made.
    """

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self._geometry = geometry
        self._device = device
        words = torch.arange(geometry.chunk_bytes // 8, dtype=torch.int64, device=device)
        self._words = _mix(~words)

    def of(self, hash_ids: Sequence[int]) -> torch.Tensor:
        """The chunks' contents, ``[N, *shape]`` of the geometry's dtype."""
        ids = torch.tensor(hash_ids, dtype=torch.int64, device=self._device)
        words = _mix(ids)[:, None] + self._words[None, :]
        return words.view(self._geometry.dtype).view(len(hash_ids), *self._geometry.shape)

    def count_mismatches(self, hash_ids: Sequence[int], chunks: torch.Tensor) -> int:
        """How many of ``chunks`` (``[N, *shape]``) differ in any byte from what they should be."""
        found = chunks.view(len(hash_ids), -1).view(torch.int64)
        expected = self.of(hash_ids).view(len(hash_ids), -1).view(torch.int64)
        if torch.equal(found, expected):
            return 0
        return int((found != expected).any(dim=1).sum())


def _mix(values: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014), which never maps two values to one."""
    values = (values ^ _shifted(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _shifted(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A right shift that shifts in zeros; torch's own shift repeats the sign bit of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
