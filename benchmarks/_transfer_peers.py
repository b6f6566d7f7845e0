"""What transfers are compared on and with: pieces, peers, and stand-ins for a missing GPU.

:class:`Case` says what is copied. Peers are functions of a case that return a call. A
:class:`HostOnlyDevice` lets a whole transfer be submitted on a machine without a GPU: the host does
what it does for a GPU, and nothing is launched or copied.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch

from kvheap import MemoryBatch, TensorMemoryAllocator
from kvheap.kernels.copy_engine import Driver, driver
from kvheap.kernels.launch import jit, tl, upload
from kvheap.kernels.pieces import Pieces
from kvheap.kernels.pointer_copy import PointerCopy
from kvheap.transfer.plan import CopyPlan, Side

Pattern = Literal["scattered", "from a run", "into a run", "ragged", "runs"]

RUN_PIECES = 8
LOOP_COPIES = 512
"""Of the loop on a GPU: each takes microseconds of the host, whatever its size."""

BATCH_PIECES = 32_768
"""Of one call of the copy engine: 51,828 crashed a driver (vLLM #49276)."""

LIST_PROGRAMS = 12
LIST_WORDS = 1024

STAND_IN_NAME = "NVIDIA H100 80GB HBM3"
"""The stand-in's, so that the planner looks into a table as long as a GPU's."""

Call = Callable[[], object]
Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Buffers:
    """A source and a target, each a flat uint8 tensor."""

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
        """Pieces in random places of both buffers, or one behind the other on one side.

        ``ragged`` are scattered pieces at any byte, of any size from half to one and a half of
        ``piece_bytes``; ``runs`` are scattered runs of 8 pieces that are neighbours on both sides.
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
        """By absolute addresses, not merged."""
        ends = self.buffers
        return Pieces(
            self.sources + ends.source.data_ptr(), self.targets + ends.target.data_ptr(), self.sizes
        )

    def plan(self) -> CopyPlan:
        """What a caller has to make first."""
        ends = self.buffers
        return CopyPlan.of_addresses(
            ends.source, ends.target, self.sources, self.targets, self.sizes
        )

    def views(self, count: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Target and source of the first pieces."""
        sizes = self.pieces.size_array()[:count].tolist()
        rows = zip(self.targets.tolist(), self.sources.tolist(), sizes, strict=False)
        ends = self.buffers
        return [(ends.target[t : t + size], ends.source[s : s + size]) for t, s, size in rows]

    def check(self, method: str, call: Call, wait: Callable[[], object]) -> None:
        """Raise if a call does not bring all bytes, and those alone, to where they belong."""
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
    """Sizes that add up to as much as equal ones: pairs of a smaller and a larger one."""
    more = rng.integers(0, piece_bytes // 2 + 1, num_pieces // 2)
    sizes = np.full(num_pieces, piece_bytes, np.int64)
    sizes[: len(more)] += more
    sizes[len(more) : 2 * len(more)] -= more
    return rng.permutation(sizes)


def slots_of(
    rng: np.random.Generator, side_bytes: int, slot_bytes: int, num_slots: int
) -> Int64Array:
    """Different places in a buffer, multiples of ``slot_bytes``, in random order."""
    return rng.choice(side_bytes // slot_bytes, num_slots, replace=False) * np.int64(slot_bytes)


def run_at(
    rng: np.random.Generator, side_bytes: int, slot_bytes: int, num_slots: int
) -> Int64Array:
    """Places one behind the other, from a random multiple of ``slot_bytes`` on."""
    first = int(rng.integers(side_bytes // slot_bytes - num_slots + 1))
    return (first + np.arange(num_slots, dtype=np.int64)) * slot_bytes


# -- peers -----------------------------------------------------------------------------------------


def contiguous(case: Case, seed: int) -> Call:
    """One ``copy_`` of as many bytes: the ceiling."""
    ends, size = case.buffers, case.num_bytes
    starts = [
        int(np.random.default_rng(seed).integers((side.nbytes - size) // 4096 + 1)) * 4096
        for side in (ends.source, ends.target)
    ]
    source = ends.source[starts[0] : starts[0] + size]
    target = ends.target[starts[1] : starts[1] + size]
    return partial(target.copy_, source, non_blocking=True)


def loop(case: Case, count: int | None) -> Call:
    """``copy_(non_blocking=True)`` for each of the first pieces, views made beforehand."""
    views = case.views(count)

    def call() -> None:
        for target, source in views:
            target.copy_(source, non_blocking=True)

    return call


def batch_unmerged(case: Case, direction: Any, stream: int) -> Call:
    """The copy engine's batch call, all pieces as they are."""
    groups = [case.pieces[part] for part in batches_of(len(case.pieces))]

    def call() -> None:
        for group in groups:
            driver().copy_batch(group, stream, over_link=direction in ("h2d", "d2h"))

    return call


def batches_of(num_pieces: int) -> list[slice]:
    """Parts of pieces for one call each."""
    return [slice(first, first + BATCH_PIECES) for first in range(0, num_pieces, BATCH_PIECES)]


@jit(do_not_specialize=["num_pieces"])
def _copy_list_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    target_ptr,
    bytes_ptr,
    num_pieces,
    PROGRAMS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """Copy every ``PROGRAMS``-th piece of a list of addresses, in words of 8 bytes."""
    for piece in range(tl.program_id(0), num_pieces, PROGRAMS):
        source = tl.load(source_ptr + piece).to(tl.pointer_type(tl.int64))
        target = tl.load(target_ptr + piece).to(tl.pointer_type(tl.int64))
        num_words = tl.load(bytes_ptr + piece) // 8
        for first in range(0, num_words, WORDS):
            words = first + tl.arange(0, WORDS)
            mask = words < num_words
            tl.store(target + words, tl.load(source + words, mask=mask), mask=mask)


def pointer_list(case: Case, device: torch.device) -> Call:
    """A kernel of 12 programs over the list, uploaded by each call, as vLLM's for offloading.

    Pieces must be of whole words of 8 bytes.
    """
    pieces = case.pieces

    def call() -> None:
        table = np.concatenate((pieces.sources, pieces.targets, pieces.size_array()))
        columns = upload(table, device).view(3, -1)
        _copy_list_kernel[(LIST_PROGRAMS,)](
            *columns, len(pieces), PROGRAMS=LIST_PROGRAMS, WORDS=LIST_WORDS
        )

    return call


def bindings_lists(case: Case, stream: int) -> Call | None:
    """The batch call through cuda-bindings, whose arguments are lists; None where it is missing.

    Addresses come as arrays, so that a list of them is part of each call.
    """
    try:
        cuda = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None
    if not hasattr(cuda, "cuMemcpyBatchAsync"):
        return None
    attributes = cuda.CUmemcpyAttributes()
    attributes.srcAccessOrder = cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    handle, pieces = cuda.CUstream(stream), case.pieces

    def call() -> None:
        for part in batches_of(len(pieces)):
            targets = [cuda.CUdeviceptr(address) for address in pieces.targets[part].tolist()]
            sources = [cuda.CUdeviceptr(address) for address in pieces.sources[part].tolist()]
            sizes = pieces[part].size_array().tolist()
            status, *_ = cuda.cuMemcpyBatchAsync(
                targets, sources, sizes, len(sizes), [attributes], [0], 1, handle
            )
            if status != cuda.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"cuMemcpyBatchAsync: {status}")

    return call


# -- heaps -----------------------------------------------------------------------------------------


def batch_of_holes(buffer: torch.Tensor, block_bytes: int, num_blocks: int) -> MemoryBatch:
    """A batch in a heap of which every second block is taken: as many runs as blocks."""
    heap = TensorMemoryAllocator(
        buffer[: 2 * num_blocks * block_bytes], align_bytes=block_bytes, debug=False
    )
    every = heap.batched_allocate([block_bytes], torch.uint8, 2 * num_blocks)
    assert every is not None
    heap.batched_free(every[1::2])
    batch = heap.batched_allocate([block_bytes], torch.uint8, num_blocks)
    assert batch is not None
    if batch.num_runs != num_blocks:
        raise RuntimeError(f"{num_blocks} blocks lie in {batch.num_runs} runs")
    _taken.append(every)
    return batch


_taken: list[MemoryBatch] = []
"""Blocks that are live until the process ends."""


# -- without a GPU ---------------------------------------------------------------------------------


class NoOpLibrary:
    """Stands in for libcuda: every function returns success at once, and does nothing.

    Of those that a transfer calls none has anything to return but its status, so that one function
    of C does for all: ``pthread_equal`` compares its first two arguments, which are always two
    addresses that differ, and returns 0.
    """

    def __init__(self) -> None:
        self.cuDriverGetVersion = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._version)
        self._nothing = ctypes.CDLL(None).pthread_equal

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return self._nothing

    @staticmethod
    def _version(out: int) -> int:
        ctypes.c_int.from_address(out).value = 13000
        return 0


class _Ended:
    """An event that has passed."""

    def query(self) -> bool:
        """Always."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


@dataclass(frozen=True, slots=True)
class _Unlaunched:
    """Descriptors on the host, and no device to read them."""

    prepared: PointerCopy

    def run(self, max_sms: int | None = None) -> None:
        """Launch nothing."""

    def warm_up(self) -> None:
        """Compile nothing."""


class HostOnlyDevice:
    """A :class:`~kvheap.device.copy_device.CopyDevice` that does the host's part alone.

    Descriptors are planned and written, to host memory; the copy engine's arguments cross ctypes.
    """

    name = STAND_IN_NAME
    driver_version = "host only"
    has_kernel = True
    has_batch = True
    stream = 5

    def __init__(self) -> None:
        self.driver = Driver(NoOpLibrary())

    def current_stream(self) -> int:
        """There is one."""
        return self.stream

    def require_stream(self, stream: object) -> int:
        """The one."""
        return self.stream

    def is_legacy(self, stream: object) -> bool:
        """It is not."""
        return False

    def is_capturing(self, stream: object) -> bool:
        """Never."""
        return False

    def using(self, stream: object) -> AbstractContextManager[None]:
        """It is current already."""
        return nullcontext()

    def record_event(self, stream: object) -> _Ended:
        """Nothing is ever under way."""
        return _Ended()

    def wait_event(self, stream: object, event: object) -> None:
        """Nothing to wait for."""

    def side_stream(self) -> int:
        """The same."""
        return self.stream

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Host memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def prepare(self, pieces: Pieces) -> _Unlaunched:
        """Write the descriptors."""
        return _Unlaunched(PointerCopy.prepare(pieces, torch.device("cpu")))

    def copy_batch(self, pieces: Pieces, stream: int, *, over_link: bool) -> None:
        """Call a function that does nothing."""
        self.driver.copy_batch(pieces, stream, over_link=over_link)

    def copy_each(self, pieces: Pieces, stream: int) -> None:
        """Call it once for each piece."""
        self.driver.copy_each(pieces, stream)

    def locate(self, address: int) -> None:
        """No memory is known."""

    def is_own(self, location: object) -> bool:
        """None is."""
        return False

    def plan_of(self, pieces: Sequence[Pieces]) -> CopyPlan:
        """Pieces of a plan within the host, as if their targets were on a device."""
        return CopyPlan(Side(None), Side(self), tuple(pieces))


def cycle(calls: Sequence[Call]) -> Iterator[Call]:
    """Them, again and again."""
    while True:
        yield from calls
