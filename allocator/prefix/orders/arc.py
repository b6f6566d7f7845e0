"""``ARCOrder``: adaptive replacement as vLLM's CPU tier has it, in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Generic, TypeVar

from kvheap.prefix.orders.base import require_heap_bytes, require_new, require_num_bytes

__all__ = ["ARCOrder"]

K = TypeVar("K", bound=Hashable)


class _Sized(Generic[K]):
    """Keys with their sizes, the oldest first, and the bytes of all."""

    __slots__ = ("num_bytes", "sizes")

    def __init__(self) -> None:
        self.sizes: OrderedDict[K, int] = OrderedDict()
        self.num_bytes = 0

    def add(self, key: K, size_bytes: int) -> None:
        self.sizes[key] = size_bytes
        self.num_bytes += size_bytes

    def pop(self, key: K) -> int:
        size_bytes = self.sizes.pop(key)
        self.num_bytes -= size_bytes
        return size_bytes

    def trim(self, max_bytes: int) -> None:
        while self.num_bytes > max_bytes:
            self.num_bytes -= self.sizes.popitem(last=False)[1]


class ARCOrder(Generic[K]):
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003), with the choices of vLLM 0.33.

    Chunks used once and chunks used again are in two lists, and each list has ghosts of what it
    lost. A chunk that returns while ghosts of a list remember it shifts the target between the
    two. Unlike the paper, and like vLLM's ``ARCCachePolicy``, every new chunk enters the list of
    those used once, and each list has ghosts for as many bytes as the heap has. Counts are of
    bytes; with chunks of one byte they are vLLM's. The target shifts when a chunk is inserted,
    thus after the eviction that made room for it; in vLLM before.

    O(1) for each chunk, amortized, and for each pinned chunk that an eviction steps over.

    Args:
        heap_bytes: what the heap holds.

    Raises:
        ValueError: ``heap_bytes`` is not positive.
        TypeError: ``heap_bytes`` is not an integer.
    """

    def __init__(self, heap_bytes: int) -> None:
        self._heap_bytes = require_heap_bytes(heap_bytes)
        self._target_bytes = 0.0
        self.reset()

    def insert(self, key: K, size_bytes: int, group: int) -> None:
        """Put a chunk into the list of those used once; shift the target if ghosts remember it."""
        require_new(key, size_bytes, key in self)
        once, again = self._once_ghosts, self._again_ghosts
        if key in once.sizes:
            step = size_bytes * max(1.0, again.num_bytes / once.num_bytes)
            self._target_bytes = min(self._target_bytes + step, float(self._heap_bytes))
            once.pop(key)
        elif key in again.sizes:
            step = size_bytes * max(1.0, once.num_bytes / again.num_bytes)
            self._target_bytes = max(self._target_bytes - step, 0.0)
            again.pop(key)
        self._once.add(key, size_bytes)

    def touch(self, keys: Sequence[K]) -> None:
        """Move chunks to the recently used end of the list of those used again."""
        once, again = self._once, self._again
        for key in reversed(keys):
            if key in once.sizes:
                again.add(key, once.pop(key))
            elif key in again.sizes:
                again.sizes.move_to_end(key)

    def settle(self, keys: Sequence[K]) -> None:
        """Move chunks to the recently used ends of their lists, the head last."""
        for key in reversed(keys):
            for own in (self._once, self._again):
                if key in own.sizes:
                    own.sizes.move_to_end(key)

    def remove(self, key: K) -> None:
        """Forget a chunk; no ghost remembers it."""
        (self._once if key in self._once.sizes else self._again).pop(key)

    def evict_until(self, num_bytes: int, is_pinned: Callable[[K], bool]) -> list[K]:
        """Remove the least recently used chunks of the list that exceeds its target."""
        require_num_bytes(num_bytes)
        once, again = self._once, self._again
        first_once = _unpinned(once, is_pinned)
        first_again = _unpinned(again, is_pinned)
        once_bytes, target_bytes = once.num_bytes, int(self._target_bytes)
        victims: list[K] = []
        while num_bytes > 0:
            key = next(first_once, None) if once_bytes >= target_bytes else None
            if key is None:
                key = next(first_again, None)
            if key is None:
                key = next(first_once, None)
            if key is None:
                return []
            size_bytes = once.sizes.get(key)
            if size_bytes is None:
                size_bytes = again.sizes[key]
            else:
                once_bytes -= size_bytes
            num_bytes -= size_bytes
            victims.append(key)
        self.evict(victims)
        return victims

    def evict(self, keys: Iterable[K]) -> None:
        """Remove chunks; the ghosts of their lists remember them."""
        once, again = self._once, self._again
        for key in keys:
            if key in once.sizes:
                self._once_ghosts.add(key, once.pop(key))
            else:
                self._again_ghosts.add(key, again.pop(key))
        self._once_ghosts.trim(self._heap_bytes)
        self._again_ghosts.trim(self._heap_bytes)

    def reset(self) -> None:
        """Forget all chunks and ghosts, and reset the target."""
        self._once: _Sized[K] = _Sized()
        self._again: _Sized[K] = _Sized()
        self._once_ghosts: _Sized[K] = _Sized()
        self._again_ghosts: _Sized[K] = _Sized()
        self._target_bytes = 0.0

    def __repr__(self) -> str:
        """How many chunks are in the order."""
        return f"{type(self).__name__}({len(self)} chunks)"

    def __len__(self) -> int:
        """How many chunks are in the order."""
        return len(self._once.sizes) + len(self._again.sizes)

    def __iter__(self) -> Iterator[K]:
        """The chunks used once, then those used again, each in the order of use."""
        return chain(self._once.sizes, self._again.sizes)

    def __contains__(self, key: object) -> bool:
        """Whether a chunk is in the order."""
        return key in self._once.sizes or key in self._again.sizes


def _unpinned(chunks: _Sized[K], is_pinned: Callable[[K], bool]) -> Iterator[K]:
    return (key for key in chunks.sizes if not is_pinned(key))
