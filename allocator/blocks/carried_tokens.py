"""What a batch of copied blocks holds: the tokens of the blocks that were copied, as they were."""

from __future__ import annotations

from collections.abc import Sequence

from kvheap.blocks.batch_slice import BatchSlice
from kvheap.blocks.memory_batch import MemoryBatch, MemoryObj
from kvheap.blocks.rows import Rows
from kvheap.blocks.stored_tokens import chunk_of

__all__ = ["carry_tokens"]


def carry_tokens(source: MemoryBatch | Rows | Sequence[MemoryObj], target: MemoryBatch) -> None:
    """Record that block ``i`` of a new batch holds the tokens of block ``i`` of the source.

    O(1) for a whole batch.
    """
    if isinstance(source, MemoryBatch):
        target.stored_tokens.copy_from(source.stored_tokens)
        return
    chunk = chunk_of(target.layout)
    if chunk is None:
        return
    if isinstance(source, Rows):
        rows = range(len(source)) if source.rows is None else source.rows.tolist()
        pairs = [(source.batch.stored_tokens, row) for row in rows]
    elif isinstance(source, BatchSlice):
        pairs = [(source.batch.stored_tokens, row) for row in source.row_range]
    else:
        pairs = [(obj.batch.stored_tokens, obj.row) for obj in source]
    for at, (stored, row) in enumerate(pairs):
        if not stored.is_unknown:
            tokens = stored.of(row, chunk.num_tokens, chunk.is_per_layer)
            target.stored_tokens.set_row(at, tokens, stored.origin_of(row))
    forms = {stored.form for stored, _ in pairs}
    target.stored_tokens.form = forms.pop() if len(forms) == 1 else None
