"""Views of blocks that another process allocated: reads where they are, and checks that they fit.

A scheduler and its workers have heaps of their own over equal buffers. What a scheduler sends may
be damaged, or meant for a heap of another size, alignment or layout. A kernel would then read or
write beside the blocks, so every way in goes through :func:`read_view` and :func:`require_fitting`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kvheap.addresses.address_batch import AddressBatch
from kvheap.addresses.extents import Int64Array
from kvheap.blocks.block_layout import BlockLayout, Dtypes, Shapes
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryBatchMetadata, MemoryObjMetadata
from kvheap.blocks.origin import Origin, require_origins
from kvheap.blocks.stored_tokens import require_token_sets
from kvheap.heaps.segments import Segments

__all__ = ["View", "ViewedBlocks", "read_view", "require_fitting"]

ViewedBlocks: TypeAlias = (
    "MemoryBatchMetadata | MemoryObjMetadata | Sequence[MemoryObjMetadata] | AddressBatch | "
    "Sequence[int] | Int64Array"
)
"""Blocks that another process allocated: their metadata, or their addresses."""


@dataclass(frozen=True, slots=True)
class View:
    """Blocks of one layout, as a caller describes them.

    Attributes:
        layout: what each block holds.
        blocks: where the blocks are: disjoint, with addresses and ends in int64.
        num_tokens: how many tokens they hold; None if that is not known.
        stored: the tokens of each, if ``num_tokens`` does not say it all.
        form: in what units; None if that is not known.
        origins: from which layers and heads each was stored, or one for all; None if not known.
    """

    layout: BlockLayout
    blocks: AddressBatch
    num_tokens: int | None = None
    stored: Sequence[int | None] | None = None
    form: str | None = None
    origins: Sequence[Origin | None] | None = None


def read_view(
    blocks: ViewedBlocks,
    shape: Shapes | None,
    dtype: Dtypes | None,
    fmt: MemoryFormat | str,
    layout_of: Callable[[Shapes, Dtypes, Any], BlockLayout],
    aligned_size: Callable[[int], int],
) -> View:
    """Read the arguments of ``heap.view``.

    Args:
        blocks: as for ``heap.view``.
        shape: as for ``heap.view``.
        dtype: as for ``heap.view``.
        fmt: as for ``heap.view``.
        layout_of: the heap's block layout of a shape, a dtype and a format.
        aligned_size: rounds a number of bytes up to the heap's alignment.

    Raises:
        ValueError, TypeError: as ``heap.view``, except for what :func:`require_fitting` checks.
    """
    if isinstance(blocks, (MemoryBatch, MemoryObj)):
        raise TypeError(
            f"a view is made from the metadata of blocks, got {blocks!r}: pass its metadata"
        )
    if isinstance(blocks, Mapping):
        raise TypeError("a view is made from metadata: pass MemoryBatchMetadata.from_dict(values)")
    metadata = _metadata_of(blocks)
    if metadata is None:
        if shape is None or dtype is None:
            raise ValueError(
                f"addresses need a shape and a dtype: pass both, got blocks {reprlib.repr(blocks)}"
            )
        layout = layout_of(shape, dtype, fmt)
        if isinstance(blocks, AddressBatch):
            return View(layout, blocks.checked())
        addresses: Any = blocks
        block_bytes = aligned_size(layout.size_bytes)
        return View(layout, AddressBatch.of_addresses(addresses, block_bytes))
    if shape is not None or dtype is not None:
        raise ValueError("metadata says what the blocks hold: pass it without a shape or a dtype")
    metadata.require_whole()
    given = metadata.layout
    layout = layout_of(given.shapes, given.dtypes, given.fmt)
    blocks = metadata.blocks.checked()
    if metadata.stored is not None:
        require_token_sets(layout, len(blocks), metadata.stored)
    if metadata.origins is not None:
        require_origins(len(blocks), metadata.origins)
    known = (metadata.num_tokens, metadata.stored, metadata.form, metadata.origins)
    return View(layout, blocks, *known)


def _metadata_of(blocks: ViewedBlocks) -> MemoryBatchMetadata | None:
    """The metadata of a batch or of single objects, as that of a batch; None for addresses."""
    if isinstance(blocks, MemoryBatchMetadata):
        return blocks
    if isinstance(blocks, MemoryObjMetadata):
        return _of_objects([blocks])
    if isinstance(blocks, (list, tuple)) and any(isinstance(b, MemoryObjMetadata) for b in blocks):
        return _of_objects(blocks)
    return None


def _of_objects(objs: Sequence[Any]) -> MemoryBatchMetadata:
    for obj in objs:
        if not isinstance(obj, MemoryObjMetadata):
            raise TypeError(f"blocks must all be metadata of objects, got {obj!r} among them")
    first, layout = objs[0], objs[0].layout()
    for at, obj in enumerate(objs):
        if _holds_the_same(obj, first):
            obj.require_counts()
            continue
        found = obj.layout()
        if found != layout or obj.phy_size != first.phy_size:
            raise ValueError(
                f"the blocks of a view must be alike: block 0 is {layout} in {first.phy_size} "
                f"bytes, block {at} is {found} in {obj.phy_size} bytes"
            )
    blocks = AddressBatch.of_addresses([obj.address for obj in objs], first.phy_size)
    stored = tuple(obj.stored for obj in objs)
    is_known = any(held is not None for held in stored)
    form, tokens = _form_of(objs), stored if is_known else None
    origins = tuple(obj.origin for obj in objs)
    where = origins if any(origin is not None for origin in origins) else None
    return MemoryBatchMetadata(blocks, layout, None, tokens, form, where)


def _holds_the_same(one: MemoryObjMetadata, other: MemoryObjMetadata) -> bool:
    """Whether two blocks hold the same, by their metadata's lists; a quick look."""
    return (
        type(one.phy_size) is int
        and one.phy_size == other.phy_size
        and type(one.shape) is type(other.shape) is torch.Size
        and type(one.shapes) is type(other.shapes) is list
        and type(one.dtypes) is type(other.dtypes) is list
        and one.shape == other.shape
        and one.shapes == other.shapes
        and one.dtype is other.dtype
        and one.dtypes == other.dtypes
        and one.fmt is other.fmt
    )


def _form_of(objs: Sequence[MemoryObjMetadata]) -> str | None:
    """In what units blocks were stored, as far as it is known of any; they must agree."""
    found: str | None = None
    for at, obj in enumerate(objs):
        if obj.form is None:
            continue
        if not isinstance(obj.form, str):
            raise TypeError(f"form must be a text or None, got {obj.form!r}")
        if found is not None and obj.form != found:
            raise ValueError(
                f"the blocks of a view must be alike: block {at} was stored as {obj.form}, one "
                f"before it as {found}"
            )
        found = obj.form
    return found


def require_fitting(view: View, align_bytes: int, heap_bytes: int, segments: Segments) -> None:
    """Raise if the blocks of a view are not blocks that this heap could have allocated.

    Args:
        view: the blocks.
        align_bytes: the heap's alignment; kernels rely on it for every address.
        heap_bytes: where the heap ends.
        segments: the heap's buffers.

    Raises:
        ValueError: the blocks are smaller than their contents, not aligned, or leave the heap.
    """
    blocks, layout = view.blocks, view.layout
    if blocks.num_runs == 1 and blocks.block_bytes >= layout.size_bytes:  # most batches, in a us
        ((start, num_bytes),) = blocks.run_pairs()
        limit = min(heap_bytes, len(segments.buffers[0]))
        is_aligned = not start % align_bytes and not blocks.block_bytes % align_bytes
        if is_aligned and start + num_bytes <= limit:
            return
    if blocks.block_bytes < layout.size_bytes:
        raise ValueError(
            f"blocks of {blocks.block_bytes} bytes are too small: {layout} has "
            f"{layout.size_bytes} bytes"
        )
    starts = blocks.run_starts
    misaligned = starts % align_bytes != 0
    if blocks.block_bytes % align_bytes or misaligned.any():
        at = f" at {starts[misaligned][0]}" if misaligned.any() else ""
        raise ValueError(
            f"blocks of {blocks.block_bytes} bytes{at} are not aligned to this heap's "
            f"align_bytes of {align_bytes}: the heap that allocates must have the same align_bytes"
        )
    segments.require_inside(blocks)
    ends = starts + blocks.run_counts * blocks.block_bytes
    if len(ends) and ends.max() > heap_bytes:
        raise ValueError(
            f"blocks up to {ends.max()} leave the heap, which has {heap_bytes} bytes now"
        )
