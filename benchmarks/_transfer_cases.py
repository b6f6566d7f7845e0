"""What ``bench_transfer.py`` copies: pieces between two buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from _timing import Call

from kvheap.kernels.pieces import Pieces
from kvheap.transfer.plan import CopyPlan

Pattern = Literal["scattered", "from a run", "into a run", "ragged", "runs"]

RUN_PIECES = 8
"""Pieces of a run of the pattern ``runs``."""

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Buffers:
    """A source and a target, both flat uint8 tensors."""

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Case:
    """Pieces between two buffers: byte offsets on both sides, and sizes."""

    buffers: Buffers
    sources: Int64Array
    targets: Int64Array
    sizes: Int64Array | int

    @classmethod
    def make(
        cls, buffers: Buffers, piece_bytes: int, num_pieces: int, pattern: Pattern, seed: int
    ) -> Case:
        """Make pieces in random places of both buffers, or contiguous on one side.

        ``ragged`` pieces are scattered, start at any byte, and have any size from 0.5 to 1.5 times
        ``piece_bytes``. ``runs`` are scattered runs of 8 pieces, contiguous on both sides.
        """
        rng = np.random.default_rng(seed)
        source_bytes, target_bytes = buffers.source.nbytes, buffers.target.nbytes
        if pattern == "ragged":
            sizes = ragged_sizes(rng, piece_bytes, num_pieces)
            starts = [
                slots_of(rng, side, 2 * piece_bytes, num_pieces)
                + rng.integers(0, 2 * piece_bytes - sizes + 1)
                for side in (source_bytes, target_bytes)
            ]
            return cls(buffers, *starts, sizes)
        run = min(RUN_PIECES, num_pieces) if pattern == "runs" else 1
        num_runs, run_bytes = num_pieces // run, run * piece_bytes
        within = np.arange(run, dtype=np.int64) * piece_bytes
        starts = [
            run_at(rng, side, run_bytes, num_runs)
            if pattern == one_run
            else slots_of(rng, side, run_bytes, num_runs)
            for side, one_run in ((source_bytes, "from a run"), (target_bytes, "into a run"))
        ]
        sources, targets = ((firsts[:, None] + within).reshape(-1) for firsts in starts)
        return cls(buffers, sources, targets, piece_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pieces, each counted once."""
        sizes = self.sizes
        return len(self.sources) * sizes if isinstance(sizes, int) else int(sizes.sum())

    @cached_property
    def pieces(self) -> Pieces:
        """The pieces with absolute addresses, not merged."""
        ends = self.buffers
        return Pieces(
            self.sources + ends.source.data_ptr(), self.targets + ends.target.data_ptr(), self.sizes
        )

    def plan(self) -> CopyPlan:
        """A new plan of the copy, as a caller makes it."""
        ends = self.buffers
        return CopyPlan.of_addresses(
            ends.source, ends.target, self.sources, self.targets, self.sizes
        )

    def views(self, count: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Target and source of the first ``count`` pieces, or of all."""
        sizes = self.pieces.size_array()[:count].tolist()
        rows = zip(self.targets.tolist(), self.sources.tolist(), sizes, strict=False)
        ends = self.buffers
        return [(ends.target[t : t + size], ends.source[s : s + size]) for t, s, size in rows]

    def check(self, method: str, call: Call, wait: Callable[[], object]) -> None:
        """Raise if a call does not write all bytes to their places, or writes any others.

        Args:
            method: its name, for the error.
            call: copies the pieces.
            wait: waits until the copy has ended.
        """
        target = self.buffers.target.fill_(0xA5)
        poison = target.clone()
        call()
        wait()
        if isinstance(self.sizes, int):
            rows = torch.from_numpy(self.targets // self.sizes).to(target.device)
            wanted = torch.from_numpy(self.sources // self.sizes).to(self.buffers.source.device)
            source_rows = self.buffers.source.view(-1, self.sizes)[wanted]
            poison.view(-1, self.sizes)[rows] = source_rows.to(target.device)
        else:
            for piece, (_, source) in zip(self.targets.tolist(), self.views(), strict=True):
                poison[piece : piece + len(source)] = source
        if not torch.equal(target, poison):
            raise RuntimeError(f"{method} moved wrong bytes: {self.pieces!r}")


def ragged_sizes(rng: np.random.Generator, piece_bytes: int, num_pieces: int) -> Int64Array:
    """Random sizes with the same sum as equal ones: pairs of a smaller and a larger one."""
    more = rng.integers(0, piece_bytes // 2 + 1, num_pieces // 2)
    sizes = np.full(num_pieces, piece_bytes, np.int64)
    sizes[: len(more)] += more
    sizes[len(more) : 2 * len(more)] -= more
    return rng.permutation(sizes)


def slots_of(
    rng: np.random.Generator, side_bytes: int, slot_bytes: int, num_slots: int
) -> Int64Array:
    """Offsets of different slots of a buffer, in random order."""
    return rng.choice(side_bytes // slot_bytes, num_slots, replace=False) * np.int64(slot_bytes)


def run_at(
    rng: np.random.Generator, side_bytes: int, slot_bytes: int, num_slots: int
) -> Int64Array:
    """Offsets of contiguous slots, from a random slot on."""
    first = int(rng.integers(side_bytes // slot_bytes - num_slots + 1))
    return (first + np.arange(num_slots, dtype=np.int64)) * slot_bytes
