"""KV between an engine's paged cache and the chunks of a heap: ``store`` and ``load``.

The format and shape of a batch determine where each token is in a chunk. ``kernels/paged_copy.py``
does the copy.

>>> from kvheap import PagedKVCache, TensorMemoryAllocator
>>> layers = [torch.randn(2, 64, 16, 2, 8).half() for _ in range(3)]
>>> cache = PagedKVCache.of("vllm-flash-nhd", layers)
>>> heap = TensorMemoryAllocator(torch.empty(1 << 20, dtype=torch.uint8))
>>> slots = torch.randperm(cache.num_slots)[:600]
>>> batch = heap.batched_store(cache, slots)
>>> batch
MemoryBatch(3 x (2, 3, 256, 16) torch.float16 KV_2LTD, 1 runs of 49152-byte blocks)
>>> layers[1].zero_()[0, 0, 0, 0, 0]
tensor(0., dtype=torch.float16)
>>> heap.batched_load(batch, cache, slots).result()
>>> block, offset = divmod(int(slots[300]), 16)
>>> torch.equal(batch[1].tensor[1, 1, 300 - 256], layers[1][1, block, offset].reshape(-1))
True
"""

from __future__ import annotations

from functools import lru_cache
from types import NoneType

import torch

from kvheap.addresses.arguments import require_flags
from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.heap import (
    BlockObjects,
    Heap,
    await_filling,
    await_transfers,
    heap_of,
    layout_and_addresses,
    require_writable,
)
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.rows import listed
from kvheap.device.directions import Path
from kvheap.device.transfer import Transfer
from kvheap.engine.clearing import clear_rest as clear_slots_behind
from kvheap.engine.few_blocks import keep_for_few, load_few, store_few
from kvheap.engine.reach import reachable_buffer
from kvheap.engine.tokens import record_stored, require_stored
from kvheap.engine.transfers import Route
from kvheap.errors import ForeignObjectError
from kvheap.kernels.arguments import require_tensor
from kvheap.kernels.block_addresses import require_disjoint
from kvheap.kernels.capture_mode import Relaxed
from kvheap.kernels.chunk_layout import ChunkLayout
from kvheap.kernels.chunk_shape import ChunkShape, require_convertible_to
from kvheap.kernels.launch import is_cuda
from kvheap.kernels.paged_copy import Chunks
from kvheap.kernels.paged_layout import PagedKVCache
from kvheap.kernels.paged_slots import Slots, count_tokens, first_tokens
from kvheap.kernels.token_copy import TokenCopy
from kvheap.kernels.untraced import untraced

__all__ = [
    "batched_evict",
    "batched_load",
    "batched_store",
    "dim_order_of",
    "load",
    "require_cache",
    "store",
]

FORMATS = (MemoryFormat, str, NoneType)
"""Of what types a format is, as a caller may give it."""

MAX_KEPT = 64
"""For how many lengths of a chunk a cache keeps what it is."""


@untraced
def store(
    cache: PagedKVCache,
    slots: Slots,
    batch: BlockObjects,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    convert: bool = False,
    stream: torch.cuda.Stream | None = None,
    path: Path | None = None,
    max_sms: int | None = None,
) -> Transfer:
    """Copy the KV of tokens from an engine's cache into a batch, bit by bit.

    Does not wait for a device. Bytes of the chunks beyond the tokens keep their contents. Within a
    device it is one launch on the current stream, which orders it like any other kernel: if the
    chunks may be freed before it ends, and the next allocation is for another stream, call
    ``batch.record_stream`` with the copy's stream. On another stream, by another path, and between
    a device and pinned host memory, it is a transfer as ``kvheap.transfer.copy`` makes it: the
    bytes of the chunks are not reused before it has ended, and what reads a batch waits for it.
    Within host memory, it first waits for transfers that still use the chunks.

    Args:
        cache: the engine's cache.
        slots: the slot of each token, integers ``[T]`` on the host or the cache's device (-1 skips
            the token); or :class:`~kvheap.BlockIds`, of whole blocks for the engine layouts that
            keep the tokens of a block together (``vllm-cpu``, ``vllm-nvfp4``).
        batch: exactly as many chunks as T tokens need. Chunk ``i`` holds tokens
            ``[i * n, (i + 1) * n)`` for chunks of ``n`` tokens; the last one may be partly filled.
            Formats of one layer (KV_2TD, KV_T2D) need that many chunks per layer, those of the
            first layer first. A chunk with one plane holds K then V of each head, or whatever
            planes the cache has, side by side.
        layers: copy only these layers, for pipelines that follow the computation; the chunks hold
            either all layers of the cache or only these. Tokens count as stored for the layers and
            heads that were stored; a load of others raises.
        heads: copy only these heads, numbered on the side that has more heads; the other side has
            either only these heads or all of them.
        convert: convert a cache of bfloat16 or float16 to chunks of two groups: elements of
            float8_e4m3fn, and scales, float32 ``[planes, layers, heads]``.
            ``kernels/paged_convert.py`` states how much precision is lost.
        stream: a stream of the cache's device; None: the current one. The caller orders it behind
            the work that produced the KV and slots on a device.
        path: take this path; None: the kernel within a device, and between a device and the host
            what the planner chooses. The copy engine and staging need slots on the host, and
            convert nothing.
        max_sms: maximum number of SMs for the kernel; None: no limit within a device, and over the
            link as many as ``kvheap calibrate`` found to saturate it, or without it 2 to the host
            and 3 to a device.

    Returns:
        The transfer. Copies within host memory have ended.

    Raises:
        ValueError: a slot is out of range, the cache and the chunks do not match, no device can
            reach the memory of both, or the path cannot be taken; nothing is written. Slots on a
            device are checked only in debug mode; otherwise, slots out of range are skipped, and
            ``cache.synchronize()`` names one.
        TypeError: slots are not integers, or the batch does not belong to a heap; nothing is
            written.
        LifetimeError: a chunk is freed; nothing is written.
        ForeignObjectError: the chunks are another process's, and a view for reading here; nothing
            is written.
        RuntimeError: a CUDA graph is being captured on the stream; nothing is written.
        TransferError: the copy failed to start; the chunks hold no tokens.
    """
    is_plain = layers is None and heads is None and convert is False
    if is_plain and stream is None and path is None and max_sms is None:
        few = store_few(cache, slots, batch)
        if few is not None:
            return few
    heap = heap_of(batch)
    require_cache(cache)
    route = Route(cache, heap, stream, path, max_sms)
    return _store(heap, route, cache, slots, batch, layers, heads, convert)


def _store(
    heap: Heap,
    route: Route,
    cache: PagedKVCache,
    slots: Slots,
    batch: BlockObjects,
    layers: range | None,
    heads: slice | None,
    convert: bool,
) -> Transfer:
    chunks = _chunks(heap, batch, cache, convert, route)
    require_writable(batch)
    if not isinstance(batch, (MemoryBatch, BatchSlice)):
        require_disjoint("chunks to store to", chunks.addresses, chunks.size_bytes)
    copy = TokenCopy.of(cache, slots, chunks, layers, heads, heap.debug, to_heap=True)
    if route.is_host:
        await_transfers(batch)
    transfer = route.execute(copy, batch)
    record_stored(batch, chunks.layout, copy, cache)
    if route.is_host and layers is None and heads is None and convert is False:
        keep_for_few(cache, batch, copy)
    return transfer


@untraced
def load(
    batch: BlockObjects,
    cache: PagedKVCache,
    slots: Slots,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    convert: bool = False,
    clear_rest: bool = False,
    stream: torch.cuda.Stream | None = None,
    path: Path | None = None,
    max_sms: int | None = None,
) -> Transfer:
    """Copy the KV of tokens from a batch into an engine's cache; the inverse of :func:`store`.

    No two tokens may have the same slot, as no two targets of a transfer may overlap. That is
    checked for slots and block ids on the host, and in debug mode for those on a device.

    Args:
        batch: the chunks; see :func:`store`. A chunk may be named more than once.
        cache: the engine's cache.
        slots: where the tokens go; see :func:`store`.
        layers: see :func:`store`. Chunks that were stored of some of a cache's layers or heads are
            loaded as the same ones; ``MemoryBatch.forget_origin`` lets them be others.
        heads: see :func:`store`.
        convert: see :func:`store`.
        clear_rest: also zero the slots behind the last token's in its block, in the layers and
            heads that are copied, by a second launch. An engine that masks them would still let a
            former owner's NaN through.
        stream: see :func:`store`.
        path: see :func:`store`.
        max_sms: see :func:`store`.

    Returns:
        The transfer. Copies within host memory have ended.

    Raises:
        ValueError: as for :func:`store`; a slot appears twice; a token was not stored, if the batch
            knows its tokens (``MemoryBatch.num_tokens``); or the chunks are known to be of other
            layers or heads. Nothing is loaded.
        TypeError, LifetimeError, RuntimeError: as for :func:`store`; nothing is loaded.
        TransferError: the copy failed to start, and the slots' contents are undefined; or the
            transfer that fills the chunks has failed, and nothing is loaded.
    """
    is_plain = layers is None and heads is None and convert is False and clear_rest is False
    if is_plain and stream is None and path is None and max_sms is None:
        few = load_few(batch, cache, slots)
        if few is not None:
            return few
    heap = heap_of(batch)
    require_cache(cache)
    route = Route(cache, heap, stream, path, max_sms)
    chunks = _chunks(heap, batch, cache, convert, route)
    copy = TokenCopy.of(cache, slots, chunks, layers, heads, heap.debug, to_heap=False)
    require_stored(batch, chunks.layout, copy, cache)
    if clear_rest is not False:
        require_flags(clear_rest=clear_rest)
    if clear_rest:
        with route.on_stream():
            # First: its slots may be among those to load.
            clear_slots_behind(copy.pairing, copy.places, copy.chunks.alignment)
    transfer = route.execute(copy, batch)
    if is_plain and route.is_host:
        keep_for_few(cache, batch, copy)
    return transfer


# -- methods of a heap -----------------------------------------------------------------------------


@untraced
def batched_store(
    heap: Heap,
    cache: PagedKVCache,
    slots: Slots,
    chunk_tokens: int = 256,
    fmt: MemoryFormat | str | None = None,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    allow_partial: bool = False,
    convert: bool = False,
    stream: torch.cuda.Stream | None = None,
    path: Path | None = None,
    max_sms: int | None = None,
) -> MemoryBatch | None:
    """Allocate chunks for the KV of tokens, and fill them from an engine's cache.

    A method of ``TensorMemoryAllocator``.

    Args:
        heap: where the chunks are allocated.
        cache: the engine's cache.
        slots: the slot of each token, or :class:`~kvheap.BlockIds`; see :func:`kvheap.store`.
        chunk_tokens: tokens per chunk; the last chunk may be partly filled.
        fmt: the chunks' format or its name; None: KV_2LTD, or KV_MLA_FMT for caches without
            separate K and V, or with K and V of different size. Formats of one layer take that
            many chunks for each layer.
        layers: store only these layers; the chunks then hold no others.
        heads: store only these of the cache's heads, a slice in steps of 1, such as those of one
            tensor-parallel rank; the chunks then hold no others. A load into a cache with more
            heads names them; one into a cache with just so many takes them as its own.
        allow_partial: if not all chunks fit, store only the first tokens, as many as fit.
        convert: store a cache of bfloat16 or float16, whose K and V have one size, as
            float8_e4m3fn, with float32 scales in a second group of each chunk (the first, if the
            bytes of the elements are not a multiple of 4); this loses precision.
        stream: see :func:`kvheap.store`.
        path: see :func:`kvheap.store`.
        max_sms: see :func:`kvheap.store`.

    Returns:
        The chunks; None if they do not fit. Their ``transfer`` tells when the bytes have arrived,
        unless it was one launch on the current stream or a copy within host memory.

    Raises:
        ValueError, TypeError, RuntimeError, TransferError: as for :func:`kvheap.store`; nothing is
            allocated.
        ClosedError: the allocator is closed.
    """
    require_cache(cache)
    require_flags(allow_partial=allow_partial, convert=convert)
    heap.require_open()
    route = Route(cache, heap, stream, path, max_sms, is_new=True)
    chunk, layout = _new_chunks(cache, chunk_tokens, fmt, layers, heads, convert)
    num_chunks = chunk.num_chunks(count_tokens(slots, cache.block_size))
    if allow_partial and chunk.layout.is_per_layer:
        raise ValueError(f"{chunk.fmt} has chunks per layer: allow_partial is not supported")
    is_one = len(layout.shapes) == 1
    shapes: Shapes = layout.shapes[0] if is_one else list(layout.shapes)
    dtypes: Dtypes = layout.dtypes[0] if is_one else list(layout.dtypes)
    batch = heap.batched_allocate(
        shapes, dtypes, num_chunks, layout.fmt, allow_partial=allow_partial
    )
    if batch is None:
        return None
    try:
        batch.stored_tokens.set_first(0)
        if len(batch) < num_chunks:
            slots = first_tokens(slots, len(batch) * chunk.num_tokens, cache.block_size)
        is_plain = route.is_host and layers is None and heads is None and convert is False
        if not is_plain or store_few(cache, slots, batch) is None:
            _store(heap, route, cache, slots, batch, layers, heads, convert)
    except BaseException:
        heap.batched_free(batch)
        raise
    return batch


@untraced
def batched_load(
    heap: Heap,
    batch: BlockObjects,
    cache: PagedKVCache,
    slots: Slots,
    *,
    layers: range | None = None,
    heads: slice | None = None,
    convert: bool = False,
    clear_rest: bool = False,
    stream: torch.cuda.Stream | None = None,
    path: Path | None = None,
    max_sms: int | None = None,
) -> Transfer:
    """Fill an engine's cache from chunks of this heap; see :func:`kvheap.load`.

    A method of ``TensorMemoryAllocator``.

    Raises:
        ForeignObjectError: the chunks belong to another allocator; nothing is loaded.
        ClosedError: the allocator is closed.
    """
    heap.require_open()
    if heap_of(batch) is not heap:
        raise ForeignObjectError("the chunks belong to another allocator")
    return load(
        batch,
        cache,
        slots,
        layers=layers,
        heads=heads,
        convert=convert,
        clear_rest=clear_rest,
        stream=stream,
        path=path,
        max_sms=max_sms,
    )


@untraced
def batched_evict(heap: Heap, batch: BlockObjects, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copy the contents of chunks to a tensor, for the next tier, and free the chunks.

    A method of ``TensorMemoryAllocator``.

    Args:
        heap: the heap that the chunks belong to.
        batch: chunks of one block layout, each with one reference and no pin.
        out: ``[N, *shape]`` of their dtype, on the heap's device or the host. None: a new tensor
            on the host, pinned if the heap is on a GPU. A copy from a GPU to the host runs on the
            current stream: synchronize with it before you read ``out``.

    Returns:
        ``out``.

    Raises:
        As ``batched_free``; also ValueError if ``out`` is on another device. Nothing is freed, but
        ``out`` may have been written.
    """
    objs = batch if isinstance(batch, MemoryBatch) else listed(batch)
    if heap_of(objs) is not heap:
        raise ForeignObjectError("the chunks belong to another allocator")
    layout = objs.layout if isinstance(objs, (MemoryBatch, BatchSlice)) else objs[0].batch.layout
    shape, dtype = layout.packed
    expected = (len(objs), *shape)
    if out is None:
        pinned = heap.device.type == "cuda"
        with Relaxed():
            out = torch.empty(expected, dtype=dtype, device="cpu", pin_memory=pinned)
    require_tensor("out", out)
    if out.device == heap.device:
        heap.batched_free(objs, out=out)
        return out
    if out.device.type != "cpu":
        raise ValueError(f"out must be on {heap.device} or the host, got {out.device}")
    if tuple(out.shape) != expected or out.dtype != dtype:
        raise ValueError(
            f"out must be {expected} of {dtype}, got {tuple(out.shape)} of {out.dtype}"
        )
    with Relaxed():
        staging = torch.empty(expected, dtype=dtype, device=heap.device)
        heap.require_gatherable(heap.rows_by_batch(objs), staging)
        if len(staging):
            heap.gather(objs, staging)
        out.copy_(staging, non_blocking=True)  # before the free, so that a failure loses nothing
    heap.batched_free(objs)
    return out


# -- what a chunk is -------------------------------------------------------------------------------


def require_cache(cache: PagedKVCache) -> None:
    """Raise if this is not an engine's cache.

    Raises:
        TypeError: names what it is.
    """
    if not isinstance(cache, PagedKVCache):
        raise TypeError(
            f"cache must be a PagedKVCache, got {type(cache).__name__}: make one of an engine's "
            f"tensors with PagedKVCache.of(layout, tensors)"
        )


def _new_chunks(
    cache: PagedKVCache,
    chunk_tokens: int,
    fmt: MemoryFormat | str | None,
    layers: range | None,
    heads: slice | None,
    convert: bool,
) -> tuple[ChunkShape, BlockLayout]:
    """What new chunks of a cache are, as it and as a heap says it; of all layers and heads, kept.

    Raises:
        ValueError, TypeError: as ``PagedKVCache.chunk_layout``.
    """
    kept: dict[object, tuple[ChunkShape, BlockLayout]] | None = None
    is_whole = layers is None and heads is None
    if is_whole and type(chunk_tokens) is int and type(fmt) in FORMATS and type(convert) is bool:
        kept = cache.kept.setdefault("new chunks", {})
        found = kept.get((chunk_tokens, fmt, convert))
        if found is not None:
            return found
    chunk = cache.chunk_layout(chunk_tokens, fmt, layers=layers, heads=heads, convert=convert)
    found = chunk, BlockLayout.of_chunk(chunk)
    if kept is not None:
        if len(kept) >= MAX_KEPT:
            kept.clear()
        kept[chunk_tokens, fmt, convert] = found
    return found


def dim_order_of(fmt: MemoryFormat) -> str:
    """The order of a chunk's dimensions; see ``MemoryFormat.dim_order``.

    Raises:
        ValueError: the format does not hold paged KV.
    """
    if fmt.dim_order is None:
        raise ValueError(f"{fmt.name} is not a format for tokens of a paged cache")
    return fmt.dim_order


def _chunks(
    heap: Heap, objs: BlockObjects, cache: PagedKVCache, convert: bool, route: Route
) -> Chunks:
    """Describe the chunks to the kernels."""
    if convert is not False:
        require_flags(convert=convert)
    layout, addresses = layout_and_addresses(objs)
    if convert:
        require_convertible_to(cache, layout.fmt.name)
    if not route.is_ordered and not (type(objs) is MemoryBatch and objs.transfer is None):
        await_filling(objs, heap.device)
    absolute, alignment = heap.absolute(addresses)
    parts = _converted_layout if convert else _chunk_layout
    chunk_layout, scale_offset, data_offset = parts(layout, cache.dtype, cache.head_dim)
    buffer, size_bytes = route.segments[0][1], layout.size_bytes
    is_far = buffer.is_cpu and is_cuda(cache.device)
    if is_far:
        buffer = reachable_buffer(heap, cache.device, absolute, size_bytes)
    return Chunks(
        buffer, absolute, size_bytes, alignment, chunk_layout, scale_offset, data_offset, is_far
    )


@lru_cache(maxsize=256)
def _chunk_layout(
    layout: BlockLayout, dtype: torch.dtype, head_dim: int
) -> tuple[ChunkLayout, None, int]:
    """The chunk layout of a block, for a cache of ``dtype``; it has no scales (None)."""
    if len(layout.shapes) != 1:
        raise ValueError(f"without convert=True, chunks must have one group, got {layout}")
    order = layout.fmt.dim_order
    if order is None:
        raise ValueError(f"{layout} is not a format for tokens of a paged cache")
    found = layout.dtypes[0]
    if found != dtype and torch.uint8 not in (found, dtype):
        raise ValueError(
            f"the chunks hold {found}, the cache {dtype}: only convert=True converts, between "
            f"the cache and float8_e4m3fn chunks with scales"
        )
    return ChunkLayout.of(order, layout.shapes[0], found.itemsize), None, 0


@lru_cache(maxsize=256)
def _converted_layout(
    layout: BlockLayout, dtype: torch.dtype, head_dim: int
) -> tuple[ChunkLayout, int, int]:
    """The chunk layout of an fp8 block, and the byte offsets of its scales and its elements."""
    expected = (torch.float8_e4m3fn, torch.float32)
    order = layout.fmt.dim_order
    if layout.dtypes not in (expected, expected[::-1]) or order is None:
        raise ValueError(f"to convert, chunks need two groups {expected}, got {layout}")
    codes = layout.dtypes.index(torch.float8_e4m3fn)
    chunk = ChunkLayout.of(order, layout.shapes[codes], 1)
    scales = (chunk.num_planes, chunk.num_layers, chunk.row_bytes // head_dim)
    found = tuple(layout.shapes[1 - codes])
    if found != scales:
        raise ValueError(f"the scales must have shape {scales}, got {found}")
    return chunk, layout.offsets[1 - codes], layout.offsets[codes]
