"""LMCache's names for the properties of a ``MemoryObj``.

Taken from LMCache 0.5.6, ``lmcache/v1/memory_management.py``. Each getter returns one property.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.memory_metadata import MemoryObjMetadata

__all__ = ["LMCacheNames"]


class _Block(Protocol):
    """The properties that the getters return."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shapes(self) -> tuple[torch.Size, ...]: ...
    @property
    def dtypes(self) -> tuple[torch.dtype, ...]: ...
    @property
    def fmt(self) -> MemoryFormat: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def ref_count(self) -> int: ...
    @property
    def pin_count(self) -> int: ...
    @property
    def metadata(self) -> MemoryObjMetadata: ...
    @property
    def byte_view(self) -> memoryview: ...


class LMCacheNames:
    """Getters with LMCache's names, for code written for LMCache."""

    __slots__ = ()

    def get_shape(self: _Block) -> torch.Size:
        """``shape``."""
        return self.shape

    def get_dtype(self: _Block) -> torch.dtype | None:
        """``dtype``."""
        return self.dtype

    def get_shapes(self: _Block) -> list[torch.Size]:
        """``shapes``, as a list."""
        return list(self.shapes)

    def get_dtypes(self: _Block) -> list[torch.dtype]:
        """``dtypes``, as a list."""
        return list(self.dtypes)

    def get_memory_format(self: _Block) -> MemoryFormat:
        """``fmt``."""
        return self.fmt

    def get_size(self: _Block) -> int:
        """``used_bytes``."""
        return self.used_bytes

    def get_physical_size(self: _Block) -> int:
        """``allocated_bytes``."""
        return self.allocated_bytes

    def get_ref_count(self: _Block) -> int:
        """``ref_count``."""
        return self.ref_count

    def get_num_tokens(self: _Block) -> int:
        """The number of tokens in the shape."""
        return self.shape[self.fmt.token_dim()]

    @property
    def meta(self: _Block) -> MemoryObjMetadata:
        """``metadata``."""
        return self.metadata

    @property
    def is_pinned(self: _Block) -> bool:
        """Whether the pin count is above zero."""
        return self.pin_count > 0

    @property
    def can_evict(self: _Block) -> bool:
        """Whether the block has one reference and no pin."""
        return self.pin_count == 0 and self.ref_count == 1

    @property
    def byte_array(self: _Block) -> memoryview:
        """``byte_view``."""
        return self.byte_view
