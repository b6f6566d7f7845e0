"""``FakeStore``: a stand-in for Mooncake Store's client, by what the real one was seen to do.

It answers as version 0.3.13.post1 does: a value that is there is not written again, a value that is
larger than its buffer is refused, a smaller one fills a part of it, and of a key that is named
twice one buffer is filled and both are answered.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

__all__ = ["FakeStore"]

INVALID, NOT_FOUND, LEASED, NO_SPACE = -600, -704, -706, -200


class FakeStore:
    """One client, and the whole store.

    Attributes:
        values: the store.
        capacity: bytes that it takes.
        ranges: the registered memory: sizes by address.
        calls: the number of keys of each call, by its name.
        answer: called with a call's name and its answer; returns what is answered instead.
        during: called with a call's name before anything is moved.
    """

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.values: dict[str, bytes] = {}
        self.leased: set[str] = set()
        self.capacity = capacity
        self.ranges: dict[int, int] = {}
        self.calls: list[tuple[str, int]] = []
        self.answer: Callable[[str, list[int]], Any] = lambda _, codes: codes
        self.during: Callable[[str], None] = lambda _: None

    def register_buffer(self, pointer: int, size: int) -> int:
        if pointer in self.ranges:
            return INVALID
        self.ranges[pointer] = size
        return 0

    def unregister_buffer(self, pointer: int) -> int:
        return 0 if self.ranges.pop(pointer, None) else INVALID

    def batch_put_from(
        self, keys: list[str], pointers: list[int], sizes: list[int], config: Any = None
    ) -> Any:
        self._begin("put", keys)
        return self.answer("put", [*map(self._put, keys, pointers, sizes)])

    def batch_get_into(self, keys: list[str], pointers: list[int], sizes: list[int]) -> Any:
        self._begin("get", keys)
        return self.answer("get", [*map(self._get, keys, pointers, sizes)])

    def batch_is_exist(self, keys: list[str]) -> Any:
        self._begin("exist", keys)
        self.leased |= {*keys} & {*self.values}
        return self.answer("exist", [int(key in self.values) for key in keys])

    def batch_remove(self, keys: list[str], force: bool = False) -> Any:
        self._begin("remove", keys)
        codes = []
        for key in keys:
            if key in self.leased and not force:
                codes.append(LEASED)
            else:
                codes.append(NOT_FOUND if self.values.pop(key, None) is None else 0)
        return self.answer("remove", codes)

    def _begin(self, name: str, keys: list[str]) -> None:
        self.calls.append((name, len(keys)))
        self.during(name)

    def _put(self, key: str, pointer: int, size: int) -> int:
        self._require_registered(pointer, size)
        if key not in self.values:
            if sum(map(len, self.values.values())) + size > self.capacity:
                return NO_SPACE
            self.values[key] = ctypes.string_at(pointer, size)
        return 0

    def _get(self, key: str, pointer: int, size: int) -> int:
        self._require_registered(pointer, size)
        value = self.values.get(key)
        if value is None:
            return NOT_FOUND
        if len(value) > size:
            return INVALID
        ctypes.memmove(pointer, value, len(value))
        self.leased.add(key)
        return len(value)

    def _require_registered(self, pointer: int, size: int) -> None:
        """The real client would read or write there all the same."""
        assert any(
            start <= pointer and pointer + size <= start + length
            for start, length in self.ranges.items()
        ), "memory that is not registered"
