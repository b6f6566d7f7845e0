"""``CopyPlan``: the checked plan of a transfer: both sides, and the pieces to copy between them.

A plan is made from two batches, a batch and a tensor, addresses in two buffers, or pointers. Its
pieces have absolute addresses; they are merged into runs and split at addresses that no single copy
may cross. Making a plan copies nothing; ``kvheap.transfer.copy`` executes it, any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, TypeGuard, cast

import numpy as np
import numpy.typing as npt
import torch

from kvheap.addresses.arguments import require_flags
from kvheap.addresses.extents import Int64Array
from kvheap.addresses.integers import as_integer
from kvheap.blocks.heap import BlockObjects, Heap
from kvheap.blocks.rows import Rows
from kvheap.device import cuda
from kvheap.device.completion import Completion
from kvheap.device.copy_device import CopyDevice, PreparedCopy
from kvheap.device.directions import Direction
from kvheap.kernels.arguments import require_memory, require_tensor
from kvheap.kernels.arrays import as_array
from kvheap.kernels.block_addresses import host_addresses
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.even_pieces import even_pieces
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.untraced import untraced_class
from kvheap.transfer.sides import (
    NOWHERE,
    Blocks,
    Side,
    are_apart,
    direction_of,
    layer_offsets,
    paired,
    protect_sides,
    walls_of,
)

__all__ = ["CopyPlan", "Side"]


@untraced_class
@dataclass(slots=True, eq=False)
class CopyPlan:
    """Pieces to copy between two sides, in parts that end one after another.

    - made from: :meth:`between`, :meth:`of_addresses`, :meth:`of_pointers`;
    - what it is: ``direction``, ``device``, ``num_runs``, ``num_bytes``, ``num_host_runs``;
    - before a copy: ``prepare``.

    Attributes:
        source: where the bytes come from.
        target: where the bytes go.
        parts: the runs of each part: absolute addresses and sizes.
        walls: addresses that no single copy may straddle, on each side, int64, ascending.
        direction: the direction of the copy.
        num_runs: number of runs to submit, after merging neighbouring pieces.
        num_bytes: bytes to copy.

    >>> source, target = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    >>> plan = CopyPlan.of_addresses(source, target, [0, 8, 256], [0, 8, 16], 8)
    >>> plan
    CopyPlan(h2h, 24 bytes in 2 runs, 1 part)
    """

    source: Side
    target: Side
    parts: tuple[Pieces, ...]
    walls: tuple[Int64Array, Int64Array] = (NOWHERE, NOWHERE)
    direction: Direction = field(init=False)
    num_runs: int = field(init=False)
    num_bytes: int = field(init=False)
    _prepared: tuple[PreparedCopy, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.direction = direction_of(self.source, self.target)
        if len(self.parts) == 1:  # sums cost as much as a launch
            part = self.parts[0]
            self.num_runs, self.num_bytes = len(part), part.num_bytes
        else:
            self.num_runs = sum(len(part) for part in self.parts)
            self.num_bytes = sum(part.num_bytes for part in self.parts)

    # -- made from -----------------------------------------------------------------------------

    @classmethod
    def between(
        cls,
        source: BlockObjects | Rows | torch.Tensor,
        target: BlockObjects | Rows | torch.Tensor,
        *,
        by_layer: bool = False,
    ) -> CopyPlan:
        """Plan to copy block ``i`` of the source to block ``i`` of the target.

        Args:
            source: a batch, or some rows of it; objects of one heap and block layout; or a tensor
                ``[N, ...]``, each of its N rows contiguous.
            target: the same, as many blocks. Two batches must have equal block layouts; a tensor
                must have the shape and dtype of the batch's blocks, or be ``[N, size_bytes]`` of
                uint8.
            by_layer: make one part for each layer; the blocks' format must keep layers apart.

        Raises:
            ValueError: the sides do not match, or a device cannot reach the host memory.
            TypeError: a side is none of these.
            LifetimeError: a block is freed.
        """
        if by_layer is not False:
            require_flags(by_layer=by_layer)
        from_blocks, to_blocks = Blocks.of("source", source), Blocks.of("target", target)
        from_blocks.require_same(to_blocks)
        sides = (from_blocks.side, to_blocks.side)
        if by_layer:
            starts = (from_blocks.starts, to_blocks.starts)
            layout = from_blocks.layout or to_blocks.layout
            if layout is None:
                raise ValueError(
                    "by_layer needs blocks of a heap on one side: two tensors have no layers"
                )
            offsets, piece_bytes = layer_offsets(layout)
            parts = [
                Pieces(
                    (starts[0][:, None] + of_layer).reshape(-1),
                    (starts[1][:, None] + of_layer).reshape(-1),
                    piece_bytes,
                )
                for of_layer in offsets
            ]
            return cls._checked(*sides, parts)
        return cls._checked(*sides, [paired(from_blocks, to_blocks)])

    @classmethod
    def to_new_blocks(cls, source: BlockObjects, into: Heap) -> CopyPlan:
        """A plan to copy blocks to some of another heap, of which only the first is known yet.

        It cannot be executed; it shows what is wrong with the source, and which device would copy.

        Raises:
            ValueError: a device cannot reach the source, or nothing of ``into``.
            LifetimeError: a block is freed.
        """
        blocks = Blocks.of("source", source)
        memory = tuple(buffer for _, buffer in into.segments)
        target = Side(cuda.device_of(memory[0]), memory=memory, heap=into)
        pieces = Pieces(blocks.starts, blocks.starts, blocks.size_bytes)
        device = blocks.side.device or target.device
        walls_of(blocks.side, device, pieces.sources, pieces.sizes)
        if device is not None and target.device is None:
            ranges = into.pinned_addresses(device)
            if not len(ranges):
                raise ValueError(
                    f"the target is host memory that is not pinned: {device.name} cannot reach it"
                )
        return cls(blocks.side, target, (pieces.merged(),))

    @classmethod
    def of_addresses(
        cls,
        source: torch.Tensor,
        target: torch.Tensor,
        source_addresses: npt.ArrayLike,
        target_addresses: npt.ArrayLike,
        sizes: npt.ArrayLike,
        *,
        parts: Sequence[int] | None = None,
    ) -> CopyPlan:
        """Plan to copy byte ranges of one buffer to ranges of another, or of the same buffer.

        Args:
            source: contiguous, any dtype.
            target: contiguous, any dtype.
            source_addresses: N byte offsets in the source, integers.
            target_addresses: N byte offsets in the target.
            sizes: bytes of each piece, or one number for all; empty pieces are skipped.
            parts: number of pieces in each part, in order; None: one part.

        Raises:
            ValueError: a piece leaves its buffer, targets overlap each other or a source, lengths
                differ, or a device cannot reach the host memory; the message names the piece.
            TypeError: an address, size or count is not an integer.
        """
        if type(sizes) is int and parts is None:
            plan = cls._of_even(source, target, source_addresses, target_addresses, sizes)
            if plan is not None:
                return plan
        size_array = as_array("sizes", sizes)
        places = [
            _places(name, buffer, addresses, size_array)
            for name, buffer, addresses in (
                ("source_addresses", source, source_addresses),
                ("target_addresses", target, target_addresses),
            )
        ]
        from_side, to_side = Side.of_tensor(source), Side.of_tensor(target)
        is_one_size = parts is None and size_array.ndim == 0 and size_array.dtype.kind in "iu"
        if is_one_size and int(size_array) > 0 and len(places[0]) == len(places[1]):
            # They are within tensors, so each is a valid address.
            pieces = Pieces(places[0], places[1], int(size_array))
            return cls._checked(from_side, to_side, [pieces])
        return cls._of_arrays(from_side, to_side, places[0], places[1], size_array, parts)

    @classmethod
    def _of_even(
        cls, source: Any, target: Any, sources: Any, targets: Any, size_bytes: int
    ) -> CopyPlan | None:
        """:meth:`of_addresses` for the usual case; None for any other, also for what is wrong."""
        if not (
            _is_int64_row(sources)
            and len(sources) > 1  # one is as quick by the other way
            and _is_int64_row(targets)
            and size_bytes > 0
            and isinstance(source, torch.Tensor)
            and isinstance(target, torch.Tensor)
            and source.is_contiguous()
            and target.is_contiguous()
        ):
            return None
        require_memory("source", source)
        require_memory("target", target)
        here, there = (source.data_ptr(), source.nbytes), (target.data_ptr(), target.nbytes)
        if here[0] < sum(there) and there[0] < sum(here):  # a target may be a source
            return None
        pieces = even_pieces(sources, targets, size_bytes, here, there)
        if pieces is None:
            return None
        from_side, to_side = Side.of_tensor(source), Side.of_tensor(target)
        walls = NOWHERE, NOWHERE
        device = from_side.device or to_side.device
        if device is not None:
            walls = (
                walls_of(from_side, device, pieces.sources, pieces.sizes),
                walls_of(to_side, device, pieces.targets, pieces.sizes),
            )
            pieces = pieces.split(*walls)
        return cls(from_side, to_side, (pieces,), walls)

    @classmethod
    def of_pointers(
        cls,
        sources: npt.ArrayLike,
        targets: npt.ArrayLike,
        sizes: npt.ArrayLike,
        source_device: torch.device | str,
        target_device: torch.device | str,
        *,
        parts: Sequence[int] | None = None,
        keep: Sequence[torch.Tensor] = (),
    ) -> CopyPlan:
        """Plan to copy between ranges of memory given by absolute addresses.

        The driver is queried, once for each allocation, which device owns the memory. Addresses of
        plain host memory cannot be checked: only null and wrapping ones are refused.

        Args:
            sources: N absolute addresses.
            targets: N absolute addresses.
            sizes: bytes of each piece, or one number for all.
            source_device: where the sources are: a CUDA device, or ``cpu``.
            target_device: where the targets are.
            parts: as for :meth:`of_addresses`.
            keep: tensors to keep alive until a copy has ended. Any other memory that the pointers
                refer to must be kept alive by the caller.

        Raises:
            ValueError, TypeError: as for :meth:`of_addresses`.
        """
        source, target = (
            Side(cuda.find_device(torch.device(device)), memory=tuple(keep), is_unknown=True)
            for device in (source_device, target_device)
        )
        return cls._of_arrays(source, target, sources, targets, as_array("sizes", sizes), parts)

    @classmethod
    def _of_arrays(
        cls,
        source: Side,
        target: Side,
        sources: npt.ArrayLike,
        targets: npt.ArrayLike,
        sizes: npt.NDArray[np.integer],
        parts: Sequence[int] | None,
    ) -> CopyPlan:
        if parts is None:
            return cls._checked(source, target, [Pieces.of(sources, targets, sizes)])
        sources, targets = as_array("sources", sources), as_array("targets", targets)
        if len(targets) != len(sources) or (sizes.ndim and len(sizes) != len(sources)):
            Pieces.of(sources, targets, sizes)  # raises and names the difference
        counts = [as_integer("parts", count) for count in parts]
        if any(count < 0 for count in counts) or sum(counts) != len(sources):
            raise ValueError(f"parts must add up to {len(sources)} pieces, got {counts}")
        sizes = np.broadcast_to(sizes, len(sources)) if sizes.ndim == 0 else sizes
        bounds = list(accumulate(counts, initial=0))
        found = [Pieces.of(sources[a:b], targets[a:b], sizes[a:b]) for a, b in pairwise(bounds)]
        return cls._checked(source, target, found)

    @classmethod
    def _checked(cls, source: Side, target: Side, parts: Sequence[Pieces]) -> CopyPlan:
        """Run the checks common to all kinds of plans, merge neighbours, and split at walls."""
        whole = Pieces.joined(parts)
        if not target.is_one_batch:
            whole.require_distinct_targets(target.bounds)
        if (source.device is None) == (target.device is None) and not are_apart(source, target):
            whole.require_apart()
        device = source.device or target.device
        walls = (
            walls_of(source, device, whole.sources, whole.sizes),
            walls_of(target, device, whole.targets, whole.sizes),
        )
        if not (source.has_lone_blocks(len(whole)) or target.has_lone_blocks(len(whole))):
            parts = [part.merged() for part in parts]
        return cls(source, target, tuple([part.split(*walls) for part in parts]), walls)

    # -- what it is ----------------------------------------------------------------------------

    @property
    def device(self) -> CopyDevice | None:
        """The device that executes the copy; None for a copy within host memory."""
        return self.source.device or self.target.device

    @property
    def num_host_runs(self) -> int:
        """Number of runs on the host side alone; staging copies each with one call."""
        count = 0
        for part in self.parts:
            starts = part.sources if self.source.device is None else part.targets
            sizes = part.sizes if isinstance(part.sizes, int) else part.sizes[:-1]
            count += bool(len(part)) + int(np.count_nonzero(np.diff(starts) != sizes))
        return count

    @property
    def prepared(self) -> tuple[PreparedCopy, ...] | None:
        """The prepared copy of each part; None before :meth:`prepare`."""
        return self._prepared

    def prepare(self) -> CopyPlan:
        """Upload the SM kernel's descriptors, and wait for the upload; returns the plan.

        Later copies of the plan need no upload, and can be captured in a CUDA graph. Keep the
        plan for as long as the graph.

        Raises:
            RuntimeError: the kernel cannot execute the plan, or a graph is being captured.
        """
        device = self.device
        if device is None or self.direction == "p2p" or not device.has_kernel:
            raise RuntimeError(f"the kernel cannot execute a copy {self.direction}")
        stream = device.require_stream(None)
        if device.is_capturing(stream):
            raise RuntimeError("prepare() uploads descriptors: call it before the capture")
        over_link = self.direction in ("h2d", "d2h")
        with Relaxed(), device.using(stream):
            prepared = tuple(device.prepare(part, over_link=over_link) for part in self.parts)
            for part in prepared:
                part.warm_up()
            device.record_event(stream).synchronize()
        self._prepared = prepared
        return self

    def protect(self, completion: Completion) -> None:
        """Protect the bytes of both sides from reuse until a copy has ended.

        Raises:
            LifetimeError: a block is freed.
            ClosedError: a heap is closed.
        """
        protect_sides(self.source, self.target, completion)

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """The buffers of both sides."""
        return self.source.memory + self.target.memory

    def __repr__(self) -> str:
        """Direction, bytes, runs and parts."""
        parts = f"{len(self.parts)} part{'' if len(self.parts) == 1 else 's'}"
        return (
            f"CopyPlan({self.direction}, {self.num_bytes} bytes in {self.num_runs} runs, {parts})"
        )


def _is_int64_row(addresses: object) -> TypeGuard[Int64Array]:
    """Whether addresses are a contiguous array, int64 ``[N]``."""
    return (
        type(addresses) is np.ndarray
        and addresses.dtype == np.int64
        and addresses.ndim == 1
        and addresses.flags.c_contiguous
    )


def _places(
    name: str, buffer: torch.Tensor, addresses: npt.ArrayLike, sizes: npt.NDArray[np.integer]
) -> Int64Array:
    """Absolute addresses of pieces of a buffer, int64 ``[N]``."""
    require_tensor(name.removesuffix("_addresses"), buffer)
    require_memory(name.removesuffix("_addresses"), buffer)
    if not buffer.is_contiguous():
        raise ValueError(f"buffers must be contiguous, got strides {buffer.stride()}")
    num_bytes = buffer.nbytes
    size_bytes = max(int(sizes), 0) if sizes.ndim == 0 and sizes.dtype.kind in "iu" else 0
    array = cast("Int64Array", as_array(name, addresses))
    offsets = host_addresses(name, array, num_bytes, size_bytes)
    if sizes.ndim == 1 and len(sizes) == len(offsets) and sizes.dtype.kind in "iu":
        beyond = offsets > num_bytes - sizes.astype(np.int64)
        if beyond.any():
            at = int(np.argmax(beyond))
            raise ValueError(
                f"{name}[{at}] is {int(offsets[at])}: a piece of {int(sizes[at])} bytes there "
                f"exceeds the buffer of {num_bytes} bytes"
            )
    return offsets + buffer.data_ptr()
