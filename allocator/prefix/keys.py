"""Checks of the keys that a caller names, and of the lists that go with them.

A text is a sequence of texts, and a tensor one of tensors, which are equal to nothing but
themselves. So ``store("ab", ...)`` would store chunks under "a" and "b", and ``store(tensor, ...)``
under keys that nobody finds again.

Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Hashable, Mapping, Sequence, Sized
from typing import Any

from kvheap.addresses.arguments import require_count

__all__ = [
    "as_bytes_keys",
    "as_key_error",
    "require_distinct",
    "require_key_list",
    "require_keys",
    "require_list",
    "require_new",
    "shown_keys",
    "sizes_of",
]

NAMED_KEYS = 3
"""How many keys a message names."""

TEXT = (str, bytes, bytearray, memoryview)


def require_keys(keys: Any, name: str = "keys") -> None:
    """Raise if an argument is not a collection of keys. O(1); an iterator is not begun.

    Raises:
        TypeError: names the argument and what it is.

    >>> require_keys("ab")
    Traceback (most recent call last):
    ...
    TypeError: keys must be a list or another iterable of keys, got 'ab': for one key pass ['ab']
    """
    kind = type(keys)
    if kind is list or kind is tuple:
        return
    if not hasattr(kind, "__iter__") or isinstance(keys, TEXT) or _is_tensor(keys):
        advice = f": for one key pass [{keys!r}]" if isinstance(keys, TEXT) else ""
        raise TypeError(f"{name} must be a list or another iterable of keys, got {keys!r}{advice}")


def require_list(name: str, values: Any) -> None:
    """Raise if an argument has no order or no length, or is a text. O(1).

    Raises:
        TypeError: names the argument and what it is.

    >>> require_list("values", {4096, 8192})
    Traceback (most recent call last):
    ...
    TypeError: values must be a list or another sequence, got a set, which has no order
    """
    kind = type(values)
    if kind is list or kind is tuple:
        return
    if isinstance(values, (set, frozenset)):
        raise TypeError(
            f"{name} must be a list or another sequence, got a {kind.__name__}, which has no order"
        )
    has_length = isinstance(values, Sized) and hasattr(kind, "__iter__")
    if not has_length or isinstance(values, TEXT):
        raise TypeError(f"{name} must be a list or another sequence, got {values!r}")


def require_key_list(keys: Any) -> None:
    """Raise if an argument is not a sequence of keys to store chunks under. O(1).

    Raises:
        TypeError: names the argument and what it is.
    """
    require_keys(keys)
    require_list("keys", keys)
    if (type(keys) is list or type(keys) is tuple) and keys and _is_tensor(keys[0]):
        raise TypeError(f"keys must not be tensors, got {keys[0]!r}: pass tensor.tolist()")


def as_bytes_keys(keys: Any, max_bytes: int, who: str, *, is_list: bool = False) -> list[bytes]:
    """Keys of bytes as a list.

    Args:
        keys: the keys.
        max_bytes: the most bytes that one may have.
        who: whose keys they are, for messages.
        is_list: whether they must have an order and a length.

    Raises:
        TypeError: they are no keys; the message names the first that is none.
        ValueError: a key is empty, or too long.
    """
    if is_list:
        require_key_list(keys)
    else:
        require_keys(keys)
    found = list(keys)
    if {*map(type, found)} - {bytes}:
        wrong = next(key for key in found if type(key) is not bytes)
        raise TypeError(f"a key of a {who} must be bytes, got {wrong!r}")
    lengths = [*map(len, found)]
    if found and (min(lengths) < 1 or max(lengths) > max_bytes):
        wrong = next(key for key in found if not 1 <= len(key) <= max_bytes)
        raise ValueError(
            f"a key must have 1 to {max_bytes} bytes, got {len(wrong)} in {wrong[:40]!r}: hash "
            f"longer ones"
        )
    return found


def require_distinct(keys: list[bytes]) -> None:
    """Raise if a key is named twice. O(N).

    Raises:
        ValueError: names the key.
    """
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"keys must not name a chunk twice, got {twice!r} twice")


def require_new(
    keys: Sequence[Hashable],
    distinct: Collection[Hashable],
    ready: Mapping[Any, object],
    pending: Mapping[Any, object],
) -> None:
    """Raise if chunks cannot be stored under keys. O(N).

    Args:
        keys: the keys, as the caller named them.
        distinct: each of them once.
        ready: what is stored, by key.
        pending: what is being stored, by key.

    Raises:
        ValueError: names a key that is stored or being stored already, or that is named twice.
    """
    for known, word in ((ready, "stored"), (pending, "being stored")):
        if not known.keys().isdisjoint(distinct):
            key = next(key for key in distinct if key in known)
            raise ValueError(f"{key!r} is {word} already")
    if len(distinct) < len(keys):
        seen: set[Hashable] = set()
        for key in keys:
            if key in seen:
                raise ValueError(f"{key!r} is named twice")
            seen.add(key)


def sizes_of(keys: Sequence[object], size_bytes: int | Sequence[int]) -> list[int]:
    """The bytes of each key's chunk, positive: a number for each, or one for all. O(N).

    Raises:
        ValueError: a size is not positive, or there is another number of them.
        TypeError: a size is not an integer. The key is named.
    """
    if isinstance(size_bytes, Sized):
        require_list("size_bytes", size_bytes)
    else:
        of_key = f" of {next(iter(keys))!r}" if len(keys) else ""
        return [require_count(f"size_bytes{of_key}", size_bytes, 1)] * len(keys)
    if len(size_bytes) != len(keys):
        raise ValueError(f"{len(keys)} keys need as many sizes, got {len(size_bytes)}")
    return [
        size if type(size) is int and size > 0 else require_count(f"size_bytes of {key!r}", size, 1)
        for key, size in zip(keys, size_bytes, strict=True)
    ]


def shown_keys(keys: Sequence[bytes]) -> str:
    """Keys for a message, the first ones by name.

    >>> shown_keys([b"a", b"b", b"c", b"d", b"e"])
    "b'a', b'b', b'c' and 2 more"
    """
    names = ", ".join([repr(key) for key in keys[:NAMED_KEYS]])
    more = len(keys) - NAMED_KEYS
    return f"{names} and {more} more" if more > 0 else names


def as_key_error(error: BaseException, keys: Any, name: str = "keys") -> BaseException:
    """The error to raise for ``error``, which a call with these keys has met.

    That of Python for a key that cannot be hashed does not say which one.
    """
    if type(error) is not TypeError or not isinstance(keys, (list, tuple)):
        return error
    for key in keys:
        if not _is_hashable(key):
            return TypeError(f"{key!r} in {name} is unhashable: a key must be hashable")
    return error


def _is_hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
