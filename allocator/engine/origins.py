"""Of which layers and heads chunks are: as a store names them, and as a load takes them."""

from __future__ import annotations

from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.heap import BlockObjects
from kvheap.blocks.memory_batch import MemoryBatch
from kvheap.blocks.origin import Origin
from kvheap.blocks.stored_tokens import Cells, StoredTokens
from kvheap.kernels.paged_plan import Pairing

__all__ = ["origin_of", "require_origin"]


def origin_of(pairing: Pairing, num_chunks: int) -> Origin | None:
    """The origin of the chunks of a copy; None if they are of all layers and heads of the cache."""
    chunk, cache = pairing.chunk, pairing.cache
    first, head = pairing.layers.start, None
    if pairing.heads is not None and chunk.row_bytes < cache.num_heads * pairing.chunk_head_stride:
        head = pairing.heads.indices(cache.num_heads)[0]
    if chunk.is_per_layer:
        return Origin(first, cache.num_layers, head, num_chunks // pairing.num_layers)
    if chunk.num_layers < cache.num_layers:
        return Origin(first, 0, head)
    return None if head is None else Origin(head=head)


def require_origin(objs: BlockObjects, wanted: Origin | None, cells: Cells | None) -> None:
    """Raise if chunks are known to be of other layers or heads than a load takes them for.

    O(1) for whole batches that were stored as such.

    Args:
        objs: the chunks.
        wanted: the origin that the load takes them to have.
        cells: the layers and heads that are loaded; None: all.

    Raises:
        ValueError: names the first such chunk.
    """
    if wanted is None:
        return
    if isinstance(objs, MemoryBatch):
        stored = objs.stored_tokens
        found = stored.origin
        is_alike = found is not None and found.rows_per_layer == wanted.rows_per_layer
        if not stored.has_origins or (found and is_alike and found.agrees_with(wanted)):
            return
        pairs = [(stored, row) for row in range(len(objs))]
    elif isinstance(objs, BatchSlice):
        pairs = [(objs.batch.stored_tokens, row) for row in objs.row_range]
    else:
        pairs = [(obj.batch.stored_tokens, obj.row) for obj in objs]
    step = wanted.rows_per_layer or len(pairs)
    last: StoredTokens | None = None
    compared: set[tuple[int, int]] = set()  # layers of the chunks' batch and of the load, as counts
    for at, (stored, row) in enumerate(pairs):
        if stored is not last:
            last, compared = stored, set()
            needs_check, only = stored.has_origins, stored.origin
        if not needs_check:
            continue
        if only is not None:
            layers = (row // only.rows_per_layer if only.rows_per_layer else 0, at // step)
            if layers in compared:
                continue
            compared.add(layers)
        takes = wanted.of_row(at)
        for part in stored.within(cells):
            found = part.origin_of(row)
            if found is not None and not found.agrees_with(takes):
                raise ValueError(
                    f"chunk {at} was stored from {found} of its cache on, and would be loaded as "
                    f"{takes}: name what it holds; if the two caches number layers or heads "
                    f"differently, call forget_origin() of its batch first"
                )
