"""``Probe``: wraps functions of classes and modules while somebody measures or marks their calls.

A function that nobody probes is the function itself, so a probe that is off costs nothing.

>>> class Queue:
...     def put(self, item): return item
>>> def doubled(function, name): return lambda self, item: 2 * function(self, item)
>>> probe = Probe([(Queue, "put")], doubled)
>>> probe.attach()
>>> Queue().put(3)
6
>>> probe.detach()
>>> Queue().put(3)
3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Place", "Probe"]

Place = tuple[Any, str]
"""A class or a module, and the name of a function in it."""

Function = Callable[..., Any]

_originals: dict[tuple[int, str], Function] = {}
_wrappers: dict[tuple[int, str], dict[int, Callable[[Function, str], Function]]] = {}


class Probe:
    """Wraps functions while it is attached. Several may wrap one function; their order is theirs.

    Args:
        places: where the functions are.
        wrap: called with a function and its name, returns what takes its place.
    """

    def __init__(self, places: Sequence[Place], wrap: Callable[[Function, str], Function]) -> None:
        self._places = places
        self._wrap = wrap
        self.is_attached = False
        """Whether the functions are wrapped now."""

    def attach(self) -> None:
        """Wrap the functions; nothing if they are."""
        for owner, name in self._places:
            key = id(owner), name
            _originals.setdefault(key, vars(owner)[name])
            _wrappers.setdefault(key, {})[id(self)] = self._wrap
            _put(owner, name)
        self.is_attached = True

    def detach(self) -> None:
        """Put the functions back; nothing if they are. Calls in progress end as they began."""
        self.is_attached = False
        for owner, name in self._places:
            _wrappers.get((id(owner), name), {}).pop(id(self), None)
            _put(owner, name)


def _put(owner: Any, name: str) -> None:
    key = id(owner), name
    if key not in _originals:
        return
    function = _originals[key]
    for wrap in _wrappers[key].values():
        function = wrap(function, name)
    setattr(owner, name, function)
    if not _wrappers[key]:
        del _originals[key], _wrappers[key]
