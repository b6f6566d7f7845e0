"""``Origin``: from which layers and heads of an engine's cache a chunk was stored.

A chunk of some layers does not show which ones they are, and neither does a chunk of one layer. A
load that takes them for others would fill the wrong layers without an error, so a store records
what it named, and a load of others is refused.

What nobody named is not compared: a chunk of all layers and heads of a small cache may be some of a
larger one's, as between pipeline stages or ranks of different degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Origin", "require_origins"]


class Origin(NamedTuple):
    """Which layer and head of a cache the first ones of a chunk are, by the cache's own numbers."""

    layer: int | None = None
    """The first layer; None if the chunk holds all layers of its cache, or that is not known."""
    of_layers: int = 0
    """For chunks of one layer, the layers of their cache: between caches with other numbers of
    layers they are not compared. 0 for chunks of layers that were named."""
    head: int | None = None
    """The first head, if some of the cache's heads were named."""
    rows_per_layer: int = 0
    """For a batch of chunks of one layer: after so many of them follow those of the next layer."""

    def of_row(self, row: int) -> Origin:
        """The origin of one chunk of a batch."""
        if not self.rows_per_layer or self.layer is None:
            return self
        layer = self.layer + row // self.rows_per_layer
        return Origin(layer, self.of_layers, self.head)

    def of_rows(self, num_rows: int) -> list[Origin | None]:
        """The origin of each chunk of a batch."""
        step = self.rows_per_layer or num_rows
        found: list[Origin | None] = []
        for row in range(0, num_rows, max(step, 1)):
            found += [self.of_row(row)] * min(step, num_rows - row)
        return found

    def agrees_with(self, other: Origin) -> bool:
        """Whether both may be the same, as far as they are known.

        >>> Origin(layer=0).agrees_with(Origin(layer=1)), Origin(layer=0).agrees_with(Origin())
        (False, True)
        """
        if None not in (self.head, other.head) and self.head != other.head:
            return False
        if self.layer is None or other.layer is None or self.of_layers != other.of_layers:
            return True
        return self.layer == other.layer

    def __str__(self) -> str:
        """Its layer, and its head if that was named."""
        named = {"layer": self.layer, "head": self.head}
        return ", ".join(f"{name} {at}" for name, at in named.items() if at is not None)

    def to_list(self) -> list[int | None]:
        """Its numbers, for JSON or msgpack."""
        return list(self)


def require_origins(num_blocks: int, origins: Sequence[Origin | None]) -> None:
    """Raise if these are not the origins of so many blocks.

    Raises:
        ValueError: there are neither as many as blocks, nor one for all of them.
        TypeError: one is not an origin.
    """
    if len(origins) not in (1, num_blocks):
        raise ValueError(f"origins are those of {len(origins)} blocks, but there are {num_blocks}")
    for row, origin in enumerate(origins):
        if origin is not None and not isinstance(origin, Origin):
            raise TypeError(f"origins[{row}] must be an Origin, got {origin!r}")
