"""``Reader``: reads the values of a metadata dict, and refuses what no ``to_dict`` writes.

A dict has passed through msgpack, JSON or a socket, so nothing about it is certain. Every value is
checked for its type: no number is rounded, and no text is read as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from kvheap.blocks.memory_format import MemoryFormat
from kvheap.blocks.names import as_dtype
from kvheap.blocks.origin import Origin

__all__ = ["Reader"]

T = TypeVar("T")

INT64_END = 1 << 63
HEX_DIGITS = frozenset("0123456789abcdef")


class Reader:
    """The values of a dict of metadata.

    Every method takes a key, and raises KeyError if the key is missing and ValueError if the value
    is of another kind.

    Args:
        kind: the name of the metadata's class, which ``__type__`` must have if it is there.
        values: the dict.

    Raises:
        ValueError: ``values`` is not a dict, or one of another class.
    """

    def __init__(self, kind: str, values: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{kind} must be a dict, got {values!r}")
        found = values.get("__type__", kind)
        if found != kind:
            raise ValueError(f"expected the dict of a {kind}, got __type__ {found!r}")
        self._kind = kind
        self._values = values

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """The value that ``read`` finds; None if the dict has None."""
        return None if self._value(key) is None else read(key)

    def flag(self, key: str) -> bool:
        """True or False."""
        value = self._value(key)
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        return value

    def integer(self, key: str) -> int:
        """An integer that is not negative and fits int64."""
        return self._integer(key, self._value(key))

    def integers(self, key: str) -> list[int]:
        """A list of such integers."""
        return [self._integer(key, value) for value in self._list(key)]

    def shape(self, key: str) -> torch.Size:
        """A list of positive integers."""
        return self._shape(key, self._value(key))

    def shapes(self, key: str) -> list[torch.Size]:
        """A list of shapes, at least one."""
        return [self._shape(key, value) for value in self._list(key, at_least=1)]

    def dtype(self, key: str) -> torch.dtype:
        """The name of a dtype."""
        return self._dtype(key, self._value(key))

    def dtypes(self, key: str) -> list[torch.dtype]:
        """A list of names of dtypes, at least one."""
        return [self._dtype(key, value) for value in self._list(key, at_least=1)]

    def text(self, key: str) -> str:
        """A text."""
        value = self._value(key)
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, got {value!r}")
        return value

    def token_set(self, key: str) -> int | None:
        """A set of tokens in hexadecimal digits, or None."""
        return self._token_set(key, self._value(key))

    def token_sets(self, key: str) -> tuple[int | None, ...] | None:
        """A list of such sets, or None."""
        if self._value(key) is None:
            return None
        return tuple(self._token_set(key, value) for value in self._list(key))

    def origin(self, key: str) -> Origin | None:
        """An origin as its numbers, or None."""
        return self._origin(key, self._value(key))

    def origins(self, key: str) -> tuple[Origin | None, ...] | None:
        """A list of such origins, or None."""
        if self._value(key) is None:
            return None
        return tuple(self._origin(key, value) for value in self._list(key, at_least=1))

    def fmt(self, key: str) -> MemoryFormat:
        """The number of a format."""
        number = self._integer(key, self._value(key))
        try:
            return MemoryFormat(number)
        except ValueError:
            raise ValueError(f"{key} is {number}: there is no such format") from None

    def _value(self, key: str) -> Any:
        if key not in self._values:
            raise KeyError(f"{key} is missing in the dict of a {self._kind}")
        return self._values[key]

    def _list(self, key: str, at_least: int = 0) -> list[Any] | tuple[Any, ...]:
        value = self._value(key)
        if not isinstance(value, (list, tuple)) or len(value) < at_least:
            raise ValueError(f"{key} must be a list, got {value!r}")
        return value

    def _integer(self, key: str, value: object) -> int:
        if type(value) is not int or not 0 <= value < INT64_END:
            raise ValueError(f"{key} must be a non-negative 64-bit integer, got {value!r}")
        return value

    def _shape(self, key: str, value: object) -> torch.Size:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key} must be a list of positive integers, got {value!r}")
        extents = [self._integer(key, extent) for extent in value]
        if 0 in extents:
            raise ValueError(f"{key} must be a list of positive integers, got {value!r}")
        return torch.Size(extents)

    def _token_set(self, key: str, value: object) -> int | None:
        if value is None:
            return None
        if not isinstance(value, str) or not value or set(value) - HEX_DIGITS:
            raise ValueError(f"{key} must be tokens in hexadecimal digits, got {value!r}")
        return int(value, 16)

    def _origin(self, key: str, value: object) -> Origin | None:
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != 4:
            raise ValueError(f"{key} must be the numbers of an origin, got {value!r}")
        layer, of_layers, head, rows_per_layer = value
        return Origin(
            None if layer is None else self._integer(key, layer),
            self._integer(key, of_layers),
            None if head is None else self._integer(key, head),
            self._integer(key, rows_per_layer),
        )

    def _dtype(self, key: str, value: object) -> torch.dtype:
        if not isinstance(value, str):
            raise ValueError(f"{key} must be the name of a dtype, got {value!r}")
        return as_dtype(value)
